"""Validation: a target's runs join the sweep, the LR under test comes from smaller sizes, a kill costs nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
from run_results import results
from test_recipe import BEST, ladder

from mupsweep.analysis.analysis import analyse
from mupsweep.analysis.estimate import UNKNOWN, Estimate
from mupsweep.analysis.labels import DIVERGED, DONE
from mupsweep.analysis.transfer import CONFIRMED, OPEN, REFUTED
from mupsweep.errors import ConfigError, RecordError
from mupsweep.recipes import validation
from mupsweep.recipes.validation import Trial, _unbounded, neighbours
from mupsweep.report.results_files import to_json
from mupsweep.store.results import read_runs
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.run_spec import RunSpec

Cli = Callable[..., tuple[int, str, str]]
WIDTH = {"width": 64}


def finish(sweep: SweepDir, runs: list[RunSpec], best: float, diverges_above: float = math.inf) -> None:
    """Records of runs as if they had been trained: a noiseless parabola."""
    for run in runs:
        folder = sweep.run(run.run_id)
        status = DIVERGED if run.log2_lr > diverges_above else DONE
        loss = None if status == DIVERGED else 2.9 + 0.1 * (run.log2_lr - best) ** 2 + 1e-4 * run.seed
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.write_summary(
            {"run_id": run.run_id, **run.label_columns(), "status": status, "val_loss": loss, "device": "cpu"}
        )
        folder.write_status(status)


def trial(sweep: SweepDir, target: dict[str, int] | None = None) -> Trial:
    (found,) = validation.trials(sweep, target or WIDTH, None, None)
    return found


def extend(sweep: SweepDir, one: Trial) -> list[RunSpec]:
    return validation.extend(sweep, one, read_runs([sweep]))


def test_it_plans_the_transferred_lr_and_its_neighbours_with_the_sweeps_seeds() -> None:
    sweep = ladder()
    before = {run.run_id for run in plan.load(sweep)}
    config = sweep.config_path.read_bytes()
    single = trial(sweep)
    assert (single.step, single.seeds) == (1.0, (0, 1))
    assert abs(single.log2_lr - BEST) <= 0.25  # the LR of the least expected loss lies beside the optimum
    new = extend(sweep, single)
    assert sorted({(run.size.width, run.log2_lr, run.seed) for run in new}) == [
        (64, single.log2_lr + step, seed) for step in (-1.0, 0.0, 1.0) for seed in (0, 1)
    ]
    assert {run.run_id for run in plan.load(sweep)} == before | {run.run_id for run in new}
    assert sweep.config_path.read_bytes() == config  # what the sweep was asked for stays what it was


def test_a_command_that_was_interrupted_plans_the_same_runs_again() -> None:
    sweep = ladder()
    first = trial(sweep).log2_lr
    new = extend(sweep, trial(sweep))
    finish(sweep, new[:3], best=-6.5)  # a target whose own optimum lies elsewhere must not move the LR under test
    assert trial(sweep) == trial(sweep)
    assert extend(sweep, trial(sweep)) == new
    finish(sweep, new[3:], best=-6.5)
    assert trial(sweep).log2_lr == first


def test_further_lrs_are_planned_while_an_outer_one_is_the_best() -> None:
    sweep = ladder()
    first = trial(sweep).log2_lr
    finish(sweep, extend(sweep, trial(sweep)), best=-6.0)
    second = extend(sweep, trial(sweep))
    assert {run.log2_lr - first for run in second} == {-1.0, 0.0, 1.0, 2.0}
    finish(sweep, second, best=-6.0)
    third = extend(sweep, trial(sweep))
    finish(sweep, third, best=-6.0)
    assert {run.log2_lr - first for run in third} == {-1.0, 0.0, 1.0, 2.0, 3.0}
    assert extend(sweep, trial(sweep)) == third


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({}, [-9.0, -8.0, -7.0]),
        ({-9.0: 3.0, -8.0: 2.0}, [-9.0, -8.0, -7.0]),  # one is still trained: nothing can be said
        ({-9.0: 3.0, -8.0: 2.0, -7.0: math.inf}, [-9.0, -8.0, -7.0]),  # divergence brackets
        ({-9.0: 1.0, -8.0: 2.0, -7.0: math.inf}, [-10.0, -9.0, -8.0, -7.0]),
        ({float(lr): float(lr) for lr in range(-20, 0)}, [-13.0, -12.0, -11.0, -10.0, -9.0, -8.0, -7.0]),
    ],
)
def test_neighbours_bracket_the_best_and_end_somewhere(losses: dict[float, float], expected: list[float]) -> None:
    assert neighbours(-8.0, 1.0, losses) == expected


@pytest.mark.parametrize("best", [-8.0, -7.5])
def test_the_regret_of_the_transferred_lr_is_that_of_the_parabola(best: float) -> None:
    sweep = ladder()
    single = trial(sweep)
    for _ in range(3):
        finish(sweep, extend(sweep, single), best)
    outcome = validation.judge(analyse(read_runs([sweep])), single)
    assert outcome.optimum.value == pytest.approx(best, abs=0.1)
    assert outcome.regret.value == pytest.approx(0.1 * (single.log2_lr - best) ** 2, abs=0.01)
    assert outcome.outcome == CONFIRMED
    (group,) = analyse(read_runs([sweep])).groups
    assert [o.curve.width for o in group.optima] == [16, 32]  # a validation changes no verdict
    assert [v.optimum.curve.width for v in group.validations] == [64]
    [written] = to_json(analyse(read_runs([sweep])))["groups"][0]["validations"]
    assert (written["width"], written["outcome"], written["log2_lr"]) == (
        64,
        CONFIRMED,
        group.validations[0].forecast.log2_lr,
    )
    assert written["optimum"]["low"] < best < written["optimum"]["high"]


def test_a_forecast_that_comes_out_wrong_is_refuted_and_flips_no_verdict() -> None:
    sweep = ladder()
    (before,) = analyse(read_runs([sweep])).groups
    single = trial(sweep)
    for _ in range(5):
        finish(sweep, extend(sweep, single), best=-5.0)
    outcome = validation.judge(analyse(read_runs([sweep])), single)
    assert outcome.outcome == REFUTED
    assert outcome.forecast.high is not None
    assert outcome.forecast.high < -5.0
    assert outcome.regret.value == pytest.approx(0.9, abs=0.15)
    (after,) = analyse(read_runs([sweep])).groups
    assert (after.verdict, after.reasons, after.drift) == (before.verdict, before.reasons, before.drift)


def test_where_the_transferred_lr_diverges_the_regret_is_unknown_and_the_reason_is_given() -> None:
    sweep = ladder()
    single = trial(sweep)
    finish(sweep, extend(sweep, single), best=-8.0, diverges_above=-8.5)
    outcome = validation.judge(analyse(read_runs([sweep])), single)
    assert outcome.regret.value is None
    assert outcome.optimum.value is None
    assert "an optimum needs at least 3" in outcome.reasons[0]
    assert outcome.outcome == OPEN


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"width": 16}, "not larger than the base"),
        ({"width": 40, "tokens": 99}, "the sweep's runs train on 3840 tokens"),
        ({"width": 20}, "is not a multiple of model.head_dim=8"),
    ],
)
def test_a_target_that_tests_no_transfer_is_refused(target: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        trial(ladder(), target)


def test_a_sweep_without_results_or_with_another_optimizer_has_nothing_to_validate() -> None:
    sweep = ladder()
    with pytest.raises(ConfigError, match="no optimizer 'muon' in this sweep"):
        validation.trials(sweep, WIDTH, "muon", None)
    for run in plan.load(sweep):
        sweep.run(run.run_id).write_status("pending")
    with pytest.raises(RecordError, match="no finished runs of nanogpt/adamw/spectral below width 64"):
        trial(sweep)


def test_the_command_trains_the_target_by_the_sweeps_launcher_and_tells_the_regret(cli: Cli) -> None:
    sweep = ladder("launcher=inline", "training.steps=2", "training.eval_batches=1")
    code, _, err = cli("transfer", str(sweep.path), "--validate", "--to", "width=64", "depth=2")
    assert code == 2
    assert "--validate trains at least 6 runs of width 64, depth 2" in err
    assert err.splitlines()[-1].endswith("nobody is there to ask whether to train that; add --yes")
    assert not any(row.get("validation") for row in sweep.read_plan())
    code, out, err = cli("transfer", str(sweep.path), "--validate", "--to", "width=64", "depth=2", "--yes")
    assert code == 0, err
    mine = [row for row in read_runs([sweep]) if row.width == 64]
    assert len(mine) >= 6
    assert {row.seed for row in mine} == {0, 1}
    written = json.loads((sweep.results / "validation-adamw-spectral-w64-d2.json").read_text())
    assert written["width"] == 64
    assert abs(written["log2_lr"] - BEST) <= 0.25
    assert f"they handed over log2 LR {written['log2_lr']:g} and" in " ".join(out.split())
    sizes = json.loads((sweep.results / "transfer.json").read_text())["groups"][0]["sizes"]
    assert [size["width"] for size in sizes] == [16, 32]
    seconds = {row.run_id: row.seconds for row in mine}
    assert cli("transfer", str(sweep.path), "--validate", "--to", "width=64", "depth=2")[0] == 0
    assert {r.run_id: r.seconds for r in read_runs([sweep]) if r.width == 64} == seconds  # none again


def test_the_sweeps_own_command_trains_no_run_of_a_validation(cli: Cli) -> None:
    sweep = ladder("launcher=inline")
    new = extend(sweep, trial(sweep))
    overrides = [
        "experiment=smoke",
        "sweep.width_ratios=[1,2]",
        "sweep.log2_lrs=[-10,-9,-8,-7,-6]",
        "sweep.seeds=[0,1]",
    ]
    code, _, err = cli("run", *overrides, "launcher=inline")
    assert code == 0, err
    assert all(sweep.run(run.run_id).is_open() for run in new)
    assert {run.run_id for run in new} <= {row["run_id"] for row in sweep.read_plan() if row.get("validation")}


def test_the_runs_of_a_validation_can_be_forgotten(cli: Cli) -> None:
    sweep = ladder()
    before = sweep.plan_path.read_bytes()
    new = extend(sweep, trial(sweep))
    finish(sweep, new[:2], best=BEST)
    assert cli("cancel", str(sweep.path), "--validation")[:2] == (0, f"{sweep.path}: 6 runs of validations forgotten\n")
    assert sweep.plan_path.read_bytes() == before
    assert not any(sweep.run(run.run_id).path.exists() for run in new)


@pytest.mark.parametrize("overrides", [["--validate"], ["--validate", "--to", "width=64", "again"]])
def test_the_command_needs_one_sweep_and_a_target(overrides: list[str], cli: Cli) -> None:
    sweep = ladder()
    overrides = [str(sweep.path) if word == "again" else word for word in overrides]
    code, _, err = cli("transfer", str(sweep.path), *overrides)
    assert code == 2
    assert "--validate trains one target in one sweep" in err


def test_lrs_are_added_on_a_side_where_the_optimum_has_no_bound() -> None:
    losses = {-9.0: 3.0, -8.0: 2.0, -7.0: 2.1}
    assert _unbounded(Estimate(-8.0, -8.5, None), losses, 1.0) == [-6.0]
    assert _unbounded(Estimate(-8.0, None, None), losses, 0.5) == [-9.5, -6.5]
    assert _unbounded(Estimate(-8.0, -8.5, -7.5), losses, 1.0) == []
    assert _unbounded(Estimate(-8.0, None, None), losses | {-6.0: math.inf}, 1.0) == [-10.0]  # beyond it all diverge
    assert _unbounded(Estimate(-8.0, None, None), {float(lr): 1.0 for lr in range(7)}, 1.0) == []


def test_where_the_best_lr_may_lie_beyond_the_target_the_regret_is_no_number() -> None:
    """The transferred LR is the best of those trained: at an end of them, and in a valley too flat to have a bottom."""
    names = {"model": "m", "optimizer": "adamw", "parametrization": "mup", "depth": 4, "depth_ratio": 1.0}
    row = {**names, "width": 32, "width_ratio": 1.0, "status": DONE}
    grid = [(float(x), s) for x in range(-9, -2) for s in (0, 1)]
    edge = [{**row, "log2_lr": x, "seed": s, "val_loss": 3 + 0.1 * (x + 12) ** 2 + 1e-4 * s} for x, s in grid]
    (group,) = analyse(results(edge)).groups
    assert validation.regret(group.optima[0], -9.0) == UNKNOWN
    flat = [{**row, "log2_lr": x, "seed": s, "val_loss": 3 + 1e-3 * math.sin(9 * x + 5 * s)} for x, s in grid]
    (group,) = analyse(results(flat)).groups
    lost = validation.regret(group.optima[0], -6.0)
    assert (lost.value, lost.high) == (None, None)
