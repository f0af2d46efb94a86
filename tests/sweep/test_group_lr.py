"""LRs per group: which tensors a key fits, what their factor changes and what it leaves, also in runs and records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mupsweep.errors import ConfigError
from mupsweep.models.shape import Size
from mupsweep.sweep import config
from mupsweep.sweep.plan import plan
from mupsweep.sweep.run_spec import ResolvedVariant, resolve
from mupsweep.sweep.settings import settings
from mupsweep.sweep.tensor_rules import TensorRule, audit, rules

Cli = Callable[..., tuple[int, str, str]]

SMOKE = ["experiment=smoke", "sweep.width_ratios=[2]", "sweep.log2_lrs=[-7]"]
EXACT = 1e-12  # relative, float64
NAMES = ("token_embedding", "attention_norm", "attention.query", "attention.query.bias", "mlp.up", "norm", "head")


def resolved(*overrides: str) -> ResolvedVariant:
    return resolve(config.load([*SMOKE, "model.bias=true", *overrides]).variants[0])


def at(variant: ResolvedVariant) -> Size:
    return variant.size(2.0, 1.0)


def rows(*overrides: str) -> dict[str, TensorRule]:
    variant = resolved(*overrides)
    return {row.name: row for row in rules(variant, at(variant), 2.0**-7)}


def ratios(changed: dict[str, TensorRule], plain: dict[str, TensorRule], key: str = "lr") -> dict[str, float]:
    """Short name of a tensor -> a number with factors / that number without."""
    full = {
        "token_embedding": "token_embedding.weight",
        "norm": "norm.weight",
        "head": "head.weight",
        "attention.query.bias": "blocks.1.attention.query.bias",
    }
    names = {name: full.get(name, f"blocks.1.{name}.weight") for name in NAMES}
    return {name: getattr(changed[tensor], key) / getattr(plain[tensor], key) for name, tensor in names.items()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lamb"])
@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ("{input:2}", {"token_embedding": 2}),
        ("{output:0.5,hidden_vector:4}", {"head": 0.5, "attention_norm": 4, "attention.query.bias": 4}),
        ("{attention:3}", {"attention.query": 3}),  # the matrices of the branch, without norms and biases
        ("{mlp:0.25,hidden:2}", {"attention.query": 2, "mlp.up": 0.5}),  # where both fit, they multiply
        ("{blocks.*.query.weight:5,attention:2}", {"attention.query": 10}),
        ("{blocks.1.*:7}", {"attention_norm": 7, "attention.query": 7, "attention.query.bias": 7, "mlp.up": 7}),
        ("{input:1,mlp:1}", {}),
    ],
)
def test_a_factor_is_on_the_lr_of_its_tensors_alone(optimizer: str, factors: str, expected: dict[str, float]) -> None:
    plain = rows(f"optimizer={optimizer}")
    changed = rows(f"optimizer={optimizer}", f"optimizer.group_lr={factors}")
    assert ratios(changed, plain) == pytest.approx({name: expected.get(name, 1.0) for name in NAMES}, rel=EXACT)
    for name, row in changed.items():
        for key in ("init_std", "multiplier", "eps", "weight_decay", "lr_ratio", "optimizer"):
            assert getattr(row, key) == getattr(plain[name], key), (name, key)


@pytest.mark.parametrize(
    ("rule", "shrinks"), [("coupled_constant", 4.0), ("unscaled", 4.0), ("independent", 1.0), ("timescale", 1.0)]
)
def test_decay_follows_the_lr_where_its_rule_is_coupled_and_stays_a_share_of_a_step_or_run_else(
    rule: str, shrinks: float
) -> None:
    words = ["optimizer.weight_decay=0.1", f"parametrization.weight_decay_rule={rule}"]
    plain, changed = rows(*words), rows(*words, "optimizer.group_lr={hidden:4}")
    name = "blocks.0.mlp.up.weight"
    assert changed[name].lr / plain[name].lr == pytest.approx(4.0, rel=EXACT)
    assert changed[name].decay_per_step / plain[name].decay_per_step == pytest.approx(shrinks, rel=EXACT)


def test_factors_are_said_by_the_audit_and_the_recipe() -> None:
    variant = resolved("optimizer=muon", "optimizer.group_lr={input:2,output:1,mlp:0.5}")
    assert audit(variant) == ["optimizer.group_lr multiplies LRs at every size: input by 2, mlp by 0.5"]
    recipe = settings(variant, at(variant), 2.0**-7)
    assert recipe["group_lr"] == {"input": 2.0, "mlp": 0.5}
    lrs = {row["name"]: row["lr"] for row in recipe["tensors"]}
    assert lrs["token_embedding.weight"] / lrs["head.weight"] == pytest.approx(2.0, rel=EXACT)
    assert lrs["blocks.0.mlp.up.weight"] / lrs["blocks.0.attention.query.weight"] == pytest.approx(0.5, rel=EXACT)
    plain = resolved("optimizer=muon")
    assert "group_lr" not in settings(plain, at(plain), 2.0**-7)
    assert audit(plain) == []


def ids(*overrides: str) -> list[str]:
    return [run.run_id for run in plan(config.load([*SMOKE, *overrides]))]


def test_run_ids_know_factors_and_not_how_they_are_written() -> None:
    """Those without a factor are held by tests/stored/run_ids.json."""
    (plain,) = ids()
    assert ids("optimizer.group_lr={input:1}") == ids("optimizer.group_lr={}") == [plain]
    (doubled,) = ids("optimizer.group_lr={input:2}")
    assert doubled != plain
    assert ids("optimizer.group_lr={input:2.0,mlp:1}") == ids("optimizer.group_lr.input=2") == [doubled]
    assert ids("optimizer=muon", "optimizer.group_lr={input:2}") != ids("optimizer=muon")


def test_an_axis_of_factors_is_a_star_around_one() -> None:
    axes = "sweep.axes={optimizer.group_lr.input:[0.5,1,2],optimizer.group_lr.blocks.*.mlp.up.weight:[4]}"
    variants = config.load([*SMOKE, axes]).variants
    changes = [variant.change and (variant.change.hyperparameter, variant.change.value) for variant in variants]
    pattern = "optimizer.group_lr.blocks.*.mlp.up.weight"
    assert changes == [None, ("optimizer.group_lr.input", 0.5), ("optimizer.group_lr.input", 2.0), (pattern, 4.0)]
    assert [variant.change.default for variant in variants if variant.change] == [1.0] * 3
    assert [variant.optimizer["group_lr"] for variant in variants] == [
        None,
        {"input": 0.5},
        {"input": 2.0},
        {"blocks.*.mlp.up.weight": 4.0},
    ]
    assert set(ids()) < set(ids(axes))
    around = config.load([*SMOKE, "optimizer.group_lr={input:2,mlp:3}", "sweep.axes={optimizer.group_lr.input:[1,4]}"])
    assert [variant.optimizer["group_lr"] for variant in around.variants] == [
        {"input": 2, "mlp": 3},
        {"input": 1.0, "mlp": 3},
        {"input": 4.0, "mlp": 3},
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimizer.group_lr={embed:2}"], "no group of tensors 'embed'; .*input.*or a pattern of names"),
        (["optimizer.group_lr={input:0}"], "input=0: expected a positive number"),
        (["optimizer.group_lr={input:two}"], "input='two': expected a positive number"),
        (["optimizer.group_lr={blocks.*.mpl:2}"], r"no tensor of the model is 'blocks\.\*\.mpl'"),
        (["optimizer=muon", "optimizer.rest.group_lr={input:2}"], "optimizer.rest.group_lr: give the factors to opt"),
        (["model.tied=true", "optimizer.group_lr={input:2}"], "share storage, but their factors are 2 and 1"),
        (["sweep.axes={optimizer.group_lr.inputs:[2]}"], "no group of tensors 'inputs'; did you mean 'input'"),
    ],
)
def test_a_bad_factor_is_refused_with_its_key(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rows(*words)


def test_a_run_trains_with_its_factors_and_its_records_show_them(cli: Cli) -> None:
    words = [*SMOKE, "training.steps=3", "launcher=inline", "sweep.name=grouped"]
    code, _, err = cli("run", *words, "sweep.axes={optimizer.group_lr.input:[4]}")
    assert code == 0, err
    losses: dict[Any, float] = {}
    for run in Path("sweeps/grouped/runs").iterdir():
        stored = yaml.safe_load((run / "config.yaml").read_text())
        factor = (stored["optimizer"]["group_lr"] or {}).get("input", 1.0)
        lrs = {name: group["lr"] for group in read(run / "groups.json") for name in group["tensors"]}
        assert lrs["token_embedding.weight"] == pytest.approx(factor * 2.0**-7, rel=EXACT)
        assert lrs["head.weight"] == 2.0**-7
        assert stored["rules"]["input"]["lr"] == pytest.approx(factor * 2.0**-7, rel=EXACT)
        losses[factor] = read(run / "summary.json")["val_loss"]
    assert losses.keys() == {1.0, 4.0}
    assert abs(losses[1.0] - losses[4.0]) > 1e-3


def read(path: Path) -> Any:
    return json.loads(path.read_text())
