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
from mupsweep.analysis.labels import DONE
from mupsweep.analysis.transfer import LadderResult
from mupsweep.recipes import recipe
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import config, plan, run_spec
from mupsweep.sweep.run_spec import ResolvedVariant

TOLERANCE = {"numbers": 1e-12}  # relative
Cli = Callable[..., tuple[int, str, str]]
BEST = -8.0
MEASURED = 30 * 4 * 32  # tokens of a run of experiment=smoke


def ladder(*overrides: str) -> SweepDir:
    """A finished sweep of two widths: noiseless parabolas with the optimum at BEST."""
    grid = ["sweep.width_ratios=[1,2]", "sweep.log2_lrs=[-10,-9,-8,-7,-6]", "sweep.seeds=[0,1]"]
    sweep, runs = plan.save(config.load(["experiment=smoke", *grid, *overrides]), "")
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


def made(*overrides: str) -> ResolvedVariant:
    return run_spec.resolve(config.load(["experiment=smoke", *overrides]).variants[0])


def at(overrides: list[str], tokens: int | None = None, horizons: LadderResult | None = None) -> dict[str, Any]:
    groups = [measured()] if horizons is None else [measured(), horizons]
    length = {} if tokens is None else {"tokens": tokens}
    return recipe.target_recipe(groups, made(*overrides), {"width": 64, **length})


def rows(content: dict[str, Any], key: str) -> dict[str, float]:
    return {row["name"]: row[key] for row in content["tensors"]}


def test_it_names_the_target_whole_and_the_tokens_that_its_lr_is_for() -> None:
    content = recipe.target_recipe([measured()], made("model=llama", "model.kv_heads=1"), {"width": 64, "depth": 4})
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
    basis = recipe.target_recipe([measured()], made(), {"width": width})["basis"]
    outcome = "" if beyond is None else f"the target's width is {beyond} times the largest measured"
    assert basis.partition("; ")[2] == outcome


def test_without_an_exponent_another_horizon_changes_the_length_and_says_that_the_lr_is_not_carried() -> None:
    near, far = at([]), at([], tokens=100 * MEASURED)
    assert far["log2_lr"] == near["log2_lr"] == pytest.approx(BEST, abs=0.2)
    assert near["log2_lr_low"] < BEST < near["log2_lr_high"]
    assert (far["log2_lr_low"], far["log2_lr_high"], far["expected_regret"]) == (None, None, None)  # none that pretends
    assert rows(far, "lr") == rows(near, "lr")
    assert (far["training"]["steps"], far["training"]["warmup_steps"]) == (3000, 300)
    assert far["horizon"]["note"].startswith("NOT carried to 384,000 tokens: measured at 3,840")


def test_the_exponent_of_the_sweep_carries_every_lr() -> None:
    overrides = ["training.horizon_exponent=-0.5", f"training.base_tokens={MEASURED}"]
    near, far = at(overrides), at(overrides, tokens=16 * MEASURED)
    for name, lr in rows(far, "lr").items():
        assert lr == pytest.approx(rows(near, "lr")[name] / 4, rel=TOLERANCE["numbers"]), name
    assert far["horizon"]["lr_factor"] == pytest.approx(0.25, rel=TOLERANCE["numbers"])
    assert "carried from 3,840 to 61,440 tokens by LR ~ tokens^-0.5" in far["horizon"]["note"]


@cache
def horizons(drift: float) -> LadderResult:
    """Three horizons of the base that end at that of the sweep; the optimum drifts by so many octaves a doubling."""
    made = [
        {"model": "nanogpt", "optimizer": "adamw", "parametrization": "spectral", "depth": 2, "depth_ratio": 1.0}
        | {"width": 16, "width_ratio": 1.0, "log2_lr": lr, "seed": seed, "status": DONE}
        | {"val_loss": 3.0 + 0.1 * (lr - BEST - drift * k) ** 2 + 1e-4 * seed, "horizon": MEASURED * 4**k // 16}
        for k in range(3)
        for lr in (-11.0, -10.0, -9.0, -8.0, -7.0, -6.0)
        for seed in (0, 1)
    ]
    (group,) = analyse(results(made)).groups
    assert group.axis == "horizon"
    return group


@pytest.mark.parametrize("times", [16, 0.25])
def test_measured_horizons_carry_the_lr_and_widen_its_interval(times: float) -> None:
    """Optima fall by half an octave per factor of 4, so by a quarter per doubling of tokens."""
    near, far = at([]), at([], tokens=round(times * MEASURED), horizons=horizons(-0.5))
    tokens = far["training"]["tokens"]  # whole steps
    assert far["log2_lr"] - near["log2_lr"] == pytest.approx(-0.25 * math.log2(times), abs=0.3)
    widths = [one["log2_lr_high"] - one["log2_lr_low"] for one in (near, far)]
    assert widths[0] < widths[1]
    assert far["log2_lr_low"] < BEST - 0.25 * math.log2(times) < far["log2_lr_high"]
    assert far["base_lr"] == 2.0 ** far["log2_lr"]
    assert f"carried from 3,840 to {tokens:,} tokens as the horizons measured it" in far["horizon"]["note"]
    assert at([], horizons=horizons(-0.5))["log2_lr"] == near["log2_lr"]


@pytest.mark.parametrize(("rule", "factor"), [("timescale", 1 / 16), ("independent", 1.0), ("coupled_constant", 1.0)])
def test_weight_decay_is_solved_for_the_targets_horizon(rule: str, factor: float) -> None:
    overrides = ["optimizer.weight_decay=0.1", f"parametrization.weight_decay_rule={rule}"]
    near, far = at(overrides), at(overrides, tokens=16 * MEASURED)
    for name, decay in rows(far, "weight_decay").items():
        assert decay == pytest.approx(factor * rows(near, "weight_decay")[name], rel=TOLERANCE["numbers"]), name


def test_the_ladder_that_leads_to_the_target_is_asked() -> None:
    wide = measured()
    deep = replace(wide, axis="depth")
    assert recipe.leading([wide, deep], "depth").axis == "depth"
    assert recipe.leading([wide, deep], "width").axis == "width"
    assert recipe.leading([wide, deep], "joint").axis == "width"  # neither: the first
    assert recipe.leading([wide, deep], None).axis == "width"


def test_horizons_are_no_sizes_and_alone_they_are_one() -> None:
    assert recipe.horizons_of([measured(), horizons(-0.5)]) is horizons(-0.5)
    assert recipe.horizons_of([measured()]) is None
    assert recipe.leading([horizons(-0.5), measured()], "depth").axis == "width"
    alone = recipe.leading([horizons(-0.5)], "width")
    assert [optimum.curve.horizon for optimum in alone.optima] == [MEASURED]
    assert alone.verdict == "inconclusive"
    choice = recipe.recommend_at([horizons(-0.5)], 4.0, 1.0)
    assert choice.optimum.low is not None
    assert choice.optimum.high is not None
    assert choice.optimum.low < BEST - 1 < choice.optimum.high
    assert choice.optimum.high - choice.optimum.low > 1  # one size says nothing of the drift


@pytest.mark.parametrize("form", recipes.names())
def test_every_format_is_written_beside_the_json(form: str, cli: Cli) -> None:
    sweep = ladder("model=llama") if form in ("torchtitan", "huggingface", "olmo") else ladder()
    code, out, err = cli("transfer", str(sweep.path), "--to", "width=64", "depth=4", "--format", form)
    assert code == 0, err
    written = sorted(p.name for p in sweep.results.iterdir() if p.name.startswith("recipe-"))
    suffix = {"json": [], "megatron": ["-megatron.sh"]}.get(form, [f"-{form}.py"])
    assert written == sorted([f"recipe-adamw-spectral-w64-d4{s}" for s in [".json", *suffix]])
    message = "".join(out.split())
    text = (sweep.results / written[0]).read_text()
    limits = [line.removeprefix("# NOT HERE: ") for line in text.splitlines() if line.startswith("# NOT HERE")]
    assert all("".join(limit.split()) in message for limit in limits)
    assert "for3,840trainingtokens" in message


def test_a_target_of_another_horizon_has_a_file_of_its_own_and_a_warning(cli: Cli) -> None:
    sweep = ladder()
    code, out, err = cli("transfer", str(sweep.path), "--to", "width=64", "tokens=384000")
    assert code == 0, err
    assert "NOT carried to 384,000 tokens" in " ".join(out.split())
    content = json.loads((sweep.results / "recipe-adamw-spectral-w64-d2-t384000.json").read_text())
    assert content["training"]["steps"] == 3000


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--to", "width=64", "--format", "pytroch"], "did you mean 'pytorch'"),
        (["--format", "pytorch"], "name its target with --to"),
        (["--to", "tokens=0"], "--to tokens=0"),
        (["--to", "width=64", "--format", "torchtitan"], "torchtitan builds no nanogpt model"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line(overrides: list[str], said: str, cli: Cli) -> None:
    sweep = ladder()
    code, _, err = cli("transfer", str(sweep.path), *overrides)
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


def test_a_largest_size_that_is_only_bounded_pulls_the_forecast_all_the_same() -> None:
    group = drifting()
    assert group.verdict == "drifts"
    content = recipe.target_recipe([group], made(), {"width": 128})
    assert content["log2_lr_high"] < -8  # the largest size's optimum lies below the lowest LR, -9
    assert content["log2_lr"] < -9
    assert content["basis"].startswith("drifts: the LR of the least expected loss, with the drift of ")


@pytest.mark.parametrize("form", recipes.names())
def test_an_exported_lr_and_a_carried_one_have_their_intervals(form: str) -> None:
    content = at([], 2 * MEASURED, horizons(-0.5))
    assert "LR ~ tokens^-0.2" in content["horizon"]["note"]
    if form in ("pytorch", "megatron"):
        low, high = (f"{content[key]:+.2f}" for key in ("log2_lr_low", "log2_lr_high"))
        assert f"[{low}, {high}]" in recipes.export(form, content).text.splitlines()[0]
