"""Twins: what two parametrizations agree on is trained once, and recorded for both with the bits of a training."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from outcome import results

from mupsweep import data
from mupsweep.analysis.labels import DONE
from mupsweep.store.run_dir import FAILED, PENDING
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.config import load
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.sweep.twins import Twins, distinct
from mupsweep.training.slot import Slot
from mupsweep.training.worker import execute

SMOKE = ["experiment=smoke", "training.steps=10", "sweep.width_ratios=[1,2]", "sweep.log2_lrs=[-9,-7]"]

PROGRAM = ["trainer=command", "trainer.command='train --lr {lr} --width {width}'", "trainer.metrics=log.csv"]


def planned(*overrides: str) -> tuple[SweepDir, list[RunSpec]]:
    config = load([*SMOKE, *overrides])
    data.prepare(config.variants[0].data)
    return plan.save(config, "")


def twin_of(sweep: SweepDir, run: RunSpec) -> str | None:
    return (sweep.run(run.run_id).summary() or {}).get("twin_of")


def pair(runs: list[RunSpec]) -> tuple[RunSpec, RunSpec]:
    """The first run that has a twin, and its twin."""
    twins = Twins(runs)
    return next((run, twins.of(run)[0]) for run in runs if twins.of(run))


@pytest.mark.parametrize(
    ("choices", "spared"),
    [
        (["parametrization=sp,mup"], 2),
        (["parametrization=sp,mup,spectral"], 6),  # the last two agree at every depth ratio of 1
        (["parametrization=sp,mup", "optimizer=adamw,muon"], 4),
        (["parametrization=sp,mup", "optimizer=sgd"], 2),
        (["parametrization=sp,mup", "sweep.width_ratios=[2]"], 0),
        (["parametrization=sp", "optimizer=adamw,muon"], 0),
        (["parametrization=sp_fan_in,mup"], 2),
        (["parametrization=sp,mup", *PROGRAM], 0),
    ],
)
def test_twins_are_runs_whose_parametrizations_agree_at_their_size(choices: list[str], spared: int) -> None:
    runs = plan.plan(load([*SMOKE, *choices]))
    assert len(runs) - len(distinct(runs)) == spared
    for run in runs:
        for twin in Twins(runs).of(run):
            names = {one.resolved.variant.parametrization["name"] for one in (run, twin)}
            assert (run.size, run.log2_lr, run.seed) == (twin.size, twin.log2_lr, twin.seed)
            assert run.size.width_ratio == 1 or names == {"mup", "spectral"}
            assert run.resolved.variant.optimizer == twin.resolved.variant.optimizer
            assert len(names) == 2


def test_a_twin_has_the_records_that_its_own_training_would_have_left() -> None:
    sweep, runs = planned("parametrization=sp,mup", "out=both")
    assert execute(sweep)
    first, twin = pair(runs)
    assert (twin_of(sweep, first), twin_of(sweep, twin)) == (None, first.run_id)
    assert sum(twin_of(sweep, run) is not None for run in runs) == 2
    name = twin.resolved.variant.parametrization["name"]
    alone, _ = planned(f"parametrization={name}", "out=alone")
    assert execute(alone)
    summary, metrics = results(sweep)[twin.run_id]
    assert summary.pop("twin_of") == first.run_id
    assert results(alone)[twin.run_id] == (summary, metrics)
    for file in ("config.yaml", "groups.json"):
        assert (alone.run(twin.run_id).path / file).read_bytes() == (sweep.run(twin.run_id).path / file).read_bytes()
    assert f"the same training as {first.run_id}" in sweep.run(twin.run_id).log_path.read_text()


def test_a_twin_that_a_killed_worker_left_open_is_recorded_without_training() -> None:
    sweep, runs = planned("parametrization=sp,mup")
    first, twin = pair(runs)
    assert execute(sweep, Slot([first.run_id]))
    sweep.run(first.run_id).groups_path.write_text("{")  # which nothing rests on
    sweep.run(twin.run_id).status_path.unlink()
    sweep.run(twin.run_id).summary_path.unlink()
    assert execute(sweep, Slot([twin.run_id]))
    assert (sweep.run(twin.run_id).status()["status"], twin_of(sweep, twin)) == (DONE, first.run_id)


def test_a_worker_of_one_twin_alone_trains_it_and_records_the_other() -> None:
    sweep, runs = planned("parametrization=sp,mup")
    first, twin = pair(runs)
    assert execute(sweep, Slot([twin.run_id]))
    assert (twin_of(sweep, twin), twin_of(sweep, first)) == (None, twin.run_id)


def test_a_twin_that_another_worker_holds_is_left_to_it() -> None:
    sweep, runs = planned("parametrization=sp,mup")
    first, twin = pair(runs)
    lease = sweep.run(twin.run_id).claim()
    assert lease is not None
    assert execute(sweep, Slot([first.run_id]))
    assert sweep.run(twin.run_id).status() == {"status": PENDING}
    lease.release()
    assert execute(sweep, Slot([twin.run_id]))
    assert twin_of(sweep, twin) == first.run_id


def test_a_failure_is_the_twins_failure_too() -> None:
    sweep, runs = planned("parametrization=sp,mup")
    first, twin = pair(runs)
    sweep.run(first.run_id).path.mkdir(parents=True)
    sweep.run(first.run_id).write_status(FAILED, error="out of memory")
    assert execute(sweep, Slot([twin.run_id]))
    assert sweep.run(twin.run_id).status() == {"status": FAILED, "error": "out of memory"}


def test_a_plan_pays_for_the_runs_that_are_trained(cli: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = cli("plan", *SMOKE, "parametrization=sp,mup")
    assert (code, "6 of 8 runs to train, " in out) == (0, True)
    assert "2 runs need no training: at their size two parametrizations are the same\n" in out
    runs = plan.plan(load([*SMOKE, "parametrization=sp,mup"]))
    code, out, _ = cli("plan", *SMOKE, "parametrization=sp,mup", "--json")
    flops = json.loads(out)["totals"]["flops"]
    assert flops == sum(run.cost.flops for run in runs) - 2 * min(run.cost.flops for run in runs)
    _, twin = pair(runs)
    sweep, _ = planned("parametrization=sp,mup")
    assert execute(sweep, Slot([twin.run_id]))
    code, out, _ = cli("plan", *SMOKE, "parametrization=sp,mup")
    assert (code, "5 of 8 runs to train, " in out) == (0, True)
