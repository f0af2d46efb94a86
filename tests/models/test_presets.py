"""Presets of papers' sizes: priced by the command in their first line, without torch, at the size in their name."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pytest
from tiny import ARCHITECTURES, MODELS, resolve

from mupsweep.sweep import config

TOLERANCE = 0.03  # of the number of parameters that a name says
PRESETS = [name for name in MODELS if name not in ARCHITECTURES]


def command(name: str) -> list[str]:
    """The words of the command in the first line of the preset's yaml."""
    first = (config.config_root() / "model" / f"{name}.yaml").read_text().splitlines()[0]
    program, verb, *overrides = shlex.split(first.lstrip("# "))
    assert (program, verb, overrides[0]) == ("mupsweep", "plan", f"model={name}")
    return overrides


@pytest.fixture(scope="module")
def planned() -> dict[str, dict[str, float]]:
    """The first run of every preset's plan, made in a process that must not import torch."""
    code = """
import json, sys
from mupsweep.sweep import config, plan
runs = {words[0]: plan.plan(config.load(words)) for words in json.loads(sys.argv[1])}
rows = {name: {**made[0].row(), "memory": made[0].cost.memory, "runs": len(made)} for name, made in runs.items()}
heavy = {"torch", "transformers", "matplotlib", "wandb", "scipy"} & set(sys.modules)
sys.exit(f"imported {heavy}") if heavy else print(json.dumps(rows))
"""
    words = json.dumps([command(name) for name in PRESETS])
    done = subprocess.run([sys.executable, "-c", code, words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name.split("=")[1]: row for name, row in json.loads(done.stdout).items()}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_as_many_parameters_as_its_name_says(name: str, planned: dict[str, dict[str, float]]) -> None:
    match = re.fullmatch(r".+_(\d+)m", name)
    assert match is not None
    row = planned[name]
    assert row["parameters"] == pytest.approx(int(match[1]) * 1e6, rel=TOLERANCE)
    assert row["flops"] > 6 * row["tokens"] * 0.5 * row["parameters"]
    assert row["memory"] > 16 * row["parameters"]


@pytest.mark.parametrize("name", PRESETS)
def test_the_tokens_of_a_preset_have_the_vocabulary_of_its_paper(name: str) -> None:
    vocabulary = resolve(*command(name)).size(1.0, 1.0).vocab_size
    assert vocabulary == (32_000 if name.startswith("llama_gupta") else 50_304)


def test_gpt2_has_its_published_shapes() -> None:
    """Parameters of transformers' gpt2, gpt2-medium, gpt2-large and gpt2-xl, plus 47 tokens of padding."""
    published = {124: 124_439_808, 355: 354_823_168, 774: 774_030_080, 1558: 1_557_611_200}
    for millions, parameters in published.items():
        resolved = resolve(*command(f"gpt2_{millions}m"))
        size = resolved.size(1.0, 1.0)
        assert resolved.cost(size).parameters == parameters + 47 * size.width
        assert size.head_dim == 64


def test_the_models_of_qiu_et_al_are_a_width_ladder_of_the_smallest() -> None:
    small = resolve(*command("llama_qiu_190m"))
    for ratio, millions in ((1.0, 190), (1.5, 380), (2.0, 640), (3.0, 1400)):
        preset = resolve(*command(f"llama_qiu_{millions}m"))
        shapes = [
            {t.name: t.shape for t in resolved.model.tensors(resolved.size(r_n, 1.0))}
            for resolved, r_n in ((small, ratio), (preset, 1.0))
        ]
        assert shapes[0] == shapes[1]
        assert preset.model.init_std == pytest.approx(preset.model.width**-0.5, abs=5e-5)


def test_the_models_of_gupta_et_al_give_both_published_sizes_with_one_mlp() -> None:
    sizes = {}
    for millions in (154, 314, 649, 1380):
        resolved = resolve(*command(f"llama_gupta_{millions}m"))
        size = resolved.size(1.0, 1.0)
        sizes[size.width] = resolved.cost(size).parameters
        assert (size.ffn_width, size.depth, size.heads // size.kv_heads) == (11_008, 16, 4)
    assert list(sizes) == [256, 512, 1024, 2048]
    assert (round(sizes[256] / 1e6), round(sizes[2048] / 1e9, 2)) == (154, 1.38)
