"""A recipe says what its LR is for, carries it to another horizon only by a known rule, and writes what was asked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from run_results import results

from mupsweep import recipes
from mupsweep.analysis.analysis import analyse
from mupsweep.analysis.estimate import Estimate
from mupsweep.analysis.labels import DONE
from mupsweep.analysis.transfer import LadderResult
from mupsweep.recipes import recipe
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import config, plan, run_spec
from mupsweep.sweep.run_spec import ResolvedVariant

TOLERANCE = {"numbers": 1e-12, "drawn": 0.002}  # relative; octaves, an optimum is a median of draws
Cli = Callable[..., tuple[int, str, str]]
BEST = -8.0
MEASURED = 30 * 4 * 32  # tokens of a run of experiment=smoke


def ladder(*words: str) -> SweepDir:
    """A finished sweep of two widths: noiseless parabolas with the optimum at BEST."""
    grid = ["sweep.width_ratios=[1,2]", "sweep.log2_lrs=[-10,-9,-8,-7,-6]", "sweep.seeds=[0,1]"]
    sweep, runs = plan.save(config.load(["experiment=smoke", *grid, *words]), "")
    for run in runs:
        folder, loss = sweep.run(run.run_id), 3.0 + 0.1 * (run.log2_lr - BEST) ** 2 + 1e-4 * run.seed
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.write_summary(
            {"run_id": run.run_id, **run.label_columns(), "status": DONE, "val_loss": loss, "device": "cpu"}
        )
        folder.write_status(DONE)
    return sweep


@cache
def measured() -> LadderResult:
    rows = [
        {"model": "nanogpt", "optimizer": "adamw", "parametrization": "spectral", "depth": 2, "depth_ratio": 1.0}
        | {"width": 16 * r, "width_ratio": float(r), "log2_lr": lr, "seed": seed, "status": DONE}
        | {"val_loss": 3.0 + 0.1 * (lr - BEST) ** 2 + 1e-4 * seed}
        for r in (1, 2)
        for lr in (-10.0, -9.0, -8.0, -7.0, -6.0)
        for seed in (0, 1)
    ]
    (group,) = analyse(results(rows)).groups
    return group


def made(*words: str) -> ResolvedVariant:
    return run_spec.resolve(config.load(["experiment=smoke", *words]).variants[0])


def at(words: list[str], tokens: int | None = None, exponent: Estimate | None = None) -> dict[str, Any]:
    return recipe.target_recipe(measured(), made(*words), 64, 4, tokens, exponent)


def rows(content: dict[str, Any], key: str) -> dict[str, float]:
    return {row["name"]: row[key] for row in content["tensors"]}


def test_it_names_the_target_whole_and_the_tokens_that_its_lr_is_for() -> None:
    content = recipe.target_recipe(measured(), made("model=llama", "model.kv_heads=1"), 64, 4)
    assert {k: content["target"][k] for k in ("heads", "kv_heads", "head_dim", "ffn_width")} == {
        "heads": 8,
        "kv_heads": 4,
        "head_dim": 8,
        "ffn_width": 176,
    }
    assert content["base"]["width"] == 16
    assert content["training"]["tokens"] == MEASURED
    assert content["horizon"] == {
        "tokens": MEASURED,
        "measured_tokens": MEASURED,
        "lr_factor": 1.0,
        "note": "for 3,840 training tokens, as in the sweep; longer training wants a lower one: --to tokens=N",
    }
    json.dumps(content)  # nothing but plain data


@pytest.mark.parametrize(("width", "beyond"), [(16, None), (32, None), (64, 2), (1024, 32)])
def test_it_says_how_far_the_target_lies_beyond_what_was_measured(width: int, beyond: int | None) -> None:
    basis = recipe.target_recipe(measured(), made(), width, 2)["basis"]
    told = "" if beyond is None else f"the target's width is {beyond} times the largest measured"
    assert basis.partition("; ")[2] == told


def test_without_an_exponent_another_horizon_changes_the_length_and_says_that_the_lr_is_not_carried() -> None:
    near, far = at([]), at([], tokens=100 * MEASURED)
    assert far["log2_lr"] == near["log2_lr"] == pytest.approx(BEST, abs=TOLERANCE["drawn"])
    assert rows(far, "lr") == rows(near, "lr")
    assert (far["training"]["steps"], far["training"]["warmup_steps"]) == (3000, 300)
    assert far["horizon"]["note"].startswith("NOT carried to 384,000 tokens: measured at 3,840")


def test_the_exponent_of_the_sweep_carries_every_lr() -> None:
    words = ["training.horizon_exponent=-0.5", f"training.base_tokens={MEASURED}"]
    near, far = at(words), at(words, tokens=16 * MEASURED)
    for name, lr in rows(far, "lr").items():
        assert lr == pytest.approx(rows(near, "lr")[name] / 4, rel=TOLERANCE["numbers"]), name
    assert far["horizon"]["lr_factor"] == pytest.approx(0.25, rel=TOLERANCE["numbers"])
    assert "carried from 3,840 to 61,440 tokens by LR ~ tokens^-0.5" in far["horizon"]["note"]


@pytest.mark.parametrize("times", [16, 0.5])
def test_a_measured_exponent_carries_the_lr_and_its_interval_widens_it(times: float) -> None:
    near, far = at([]), at([], tokens=round(times * MEASURED), exponent=Estimate(-0.5, -0.75, -0.25))
    octaves = math.log2(times)
    moved = [far[key] - near[key] for key in ("log2_lr_low", "log2_lr", "log2_lr_high")]
    assert moved == pytest.approx(sorted([-0.75 * octaves, -0.5 * octaves, -0.25 * octaves]))
    assert far["base_lr"] == pytest.approx(near["base_lr"] * times**-0.5, rel=TOLERANCE["numbers"])
    assert at([], exponent=Estimate(-0.5, -0.75, -0.25))["log2_lr"] == near["log2_lr"]


def test_an_exponent_without_interval_leaves_none() -> None:
    far = at([], tokens=4 * MEASURED, exponent=Estimate(-0.5, None, None))
    assert (far["log2_lr_low"], far["log2_lr_high"]) == (None, None)


@pytest.mark.parametrize(("rule", "factor"), [("timescale", 1 / 16), ("independent", 1.0), ("coupled_constant", 1.0)])
def test_weight_decay_is_solved_for_the_targets_horizon(rule: str, factor: float) -> None:
    words = ["optimizer.weight_decay=0.1", f"parametrization.weight_decay_rule={rule}"]
    near, far = at(words), at(words, tokens=16 * MEASURED)
    for name, decay in rows(far, "weight_decay").items():
        assert decay == pytest.approx(factor * rows(near, "weight_decay")[name], rel=TOLERANCE["numbers"]), name


def test_the_ladder_that_leads_to_the_target_is_asked() -> None:
    wide = measured()
    deep = replace(wide, axis="depth")
    assert recipe.leading([wide, deep], made(), 16, 8).axis == "depth"
    assert recipe.leading([wide, deep], made(), 64, 2).axis == "width"
    assert recipe.leading([wide, deep], made(), 64, 8).axis == "width"  # neither: the first


def test_horizons_give_the_exponent_and_are_no_sizes() -> None:
    horizons = replace(measured(), axis="horizon", drift=Estimate(-0.3, -0.4, -0.2))
    assert recipe.exponent_of([measured(), horizons]) == Estimate(-0.3, -0.4, -0.2)
    assert recipe.exponent_of([measured()]) is None
    assert recipe.leading([horizons, measured()], made(), 16, 8).axis == "width"
    alone = recipe.leading([horizons], made(), 64, 2)
    assert (alone.optima, alone.verdict) == (horizons.optima[-1:], "inconclusive")
    choice, _ = recipe.recommend(alone, 2.0)
    assert choice.value == horizons.optima[-1].log2_lr


@pytest.mark.parametrize("form", recipes.names())
def test_every_format_is_written_beside_the_json(form: str, cli: Cli) -> None:
    sweep = ladder("model=llama") if form in ("torchtitan", "huggingface") else ladder()
    code, out, err = cli("transfer", str(sweep.path), "--to", "width=64", "depth=4", "--format", form)
    assert code == 0, err
    written = sorted(p.name for p in sweep.results.iterdir() if p.name.startswith("recipe-"))
    suffix = {"json": [], "megatron": ["-megatron.sh"]}.get(form, [f"-{form}.py"])
    assert written == sorted([f"recipe-adamw-spectral-w64-d4{s}" for s in [".json", *suffix]])
    told = "".join(out.split())
    text = (sweep.results / written[0]).read_text()
    limits = [line.removeprefix("# NOT HERE: ") for line in text.splitlines() if line.startswith("# NOT HERE")]
    assert all("".join(limit.split()) in told for limit in limits)
    assert "for3,840trainingtokens" in told


def test_a_target_of_another_horizon_has_a_file_of_its_own_and_a_warning(cli: Cli) -> None:
    sweep = ladder()
    code, out, err = cli("transfer", str(sweep.path), "--to", "width=64", "tokens=384000")
    assert code == 0, err
    assert "NOT carried to 384,000 tokens" in " ".join(out.split())
    content = json.loads((sweep.results / "recipe-adamw-spectral-w64-d2-t384000.json").read_text())
    assert content["training"]["steps"] == 3000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "width=64", "--format", "pytroch"], "did you mean 'pytorch'"),
        (["--format", "pytorch"], "name its target with --to"),
        (["--to", "tokens=0"], "--to tokens=0"),
        (["--to", "width=64", "--format", "torchtitan"], "torchtitan builds no nanogpt model"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line(words: list[str], said: str, cli: Cli) -> None:
    sweep = ladder()
    code, _, err = cli("transfer", str(sweep.path), *words)
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not list(sweep.results.glob("recipe*"))


def drifting(*lowest: float) -> LadderResult:
    """Optima at -5 and -7, and at -10, which `lowest` cuts off: the largest size is only bounded."""
    best = (-5.0, -7.0, -10.0)
    rows = [
        {"model": "nanogpt", "optimizer": "adamw", "parametrization": "spectral", "depth": 2, "depth_ratio": 1.0}
        | {"width": 16 * 2**k, "width_ratio": 2.0**k, "log2_lr": float(lr), "seed": seed, "status": DONE}
        | {"val_loss": 3.0 + 0.1 * (lr - best[k]) ** 2 + 1e-4 * (-1) ** (seed + lr)}
        for k in range(3)
        for lr in range(-9, -2)
        for seed in (0, 1)
        if lr >= dict(enumerate(lowest)).get(k, -99)
    ]
    (group,) = analyse(results(rows)).groups
    return group


def test_a_bound_is_not_taken_for_the_largest_measured_size() -> None:
    group = drifting()
    assert group.verdict == "drifts"
    basis = recipe.target_recipe(group, made(), 128, 2)["basis"]
    assert (
        "from width 32, depth 2, the largest size where it is known; at width 64, depth 2 its log2 is at most" in basis
    )
    assert "from the largest measured size" not in basis


def test_a_drift_without_a_slope_is_not_called_inconclusive() -> None:
    group = replace(drifting(-99, -3), verdict="drifts", drift=Estimate(None, None, None))
    assert recipe.target_recipe(group, made(), 128, 2)["basis"].startswith(
        "drifts: the optimum of width 16, depth 2, the largest"
    )


@pytest.mark.parametrize("form", recipes.names())
def test_an_exported_lr_and_a_carried_one_have_their_intervals(form: str) -> None:
    content = at([], 2 * MEASURED, Estimate(-0.32, -0.4, -0.2))
    assert "LR ~ tokens^-0.32 [-0.4, -0.2]" in content["horizon"]["note"]
    if form in ("pytorch", "megatron"):
        low, high = (f"{content[key]:+.2f}" for key in ("log2_lr_low", "log2_lr_high"))
        assert f"[{low}, {high}]" in recipes.export(form, content).text.splitlines()[0]
