"""Branches: from one trunk per LR, the losses of several horizons, each that of a run of its own to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_trainer import CLOCK, Killed, Result, TrainControl, assert_same, attempt, checkpoint, run

from mupsweep.data import Dataset, prepare
from mupsweep.errors import ConfigError
from mupsweep.store.results import read_runs
from mupsweep.store.run_dir import RunDir
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep.config import load
from mupsweep.sweep.plan import plan
from mupsweep.training import trainer as loop
from mupsweep.training.trainer import StopRequested

WSD = ("training.schedule=wsd", "training.warmup=3", "optimizer=muon")
BRANCHED = (*WSD, "training.branches=[0.4,0.8]")  # of 30 steps: decays 10-12, 19-24 (20 % of 12 and 24), and 24-30
TOKENS = 4 * 32  # per step


@pytest.fixture(scope="module")
def data() -> Dataset:
    return prepare(run().resolved.variant.data)


@pytest.fixture(scope="module")
def whole(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return attempt(run(*BRANCHED), data, tmp_path_factory.mktemp("whole"))


def test_every_branch_is_the_run_that_ends_there_and_the_trunk_does_not_notice(
    whole: Result, data: Dataset, tmp_path: Path
) -> None:
    straight = attempt(run(*WSD), data, tmp_path / "straight")
    assert straight.metrics == whole.metrics
    assert straight.summary["val_loss"] == whole.summary["val_loss"]
    assert [b["horizon"] for b in whole.summary["branches"]] == [12 * TOKENS, 24 * TOKENS]
    for steps, branch in zip((12, 24), whole.summary["branches"], strict=True):
        alone = attempt(run(*WSD, f"training.steps={steps}"), data, tmp_path / str(steps))
        for key in ("status", "steps", "tokens", "val_loss", "val_bits_per_byte"):
            assert branch[key] == alone.summary[key], key


@pytest.mark.parametrize("interrupt", ["stop", "kill"])
def test_a_run_interrupted_in_trunk_or_branch_goes_on_bit_for_bit(
    interrupt: str, whole: Result, data: Dataset, tmp_path: Path
) -> None:
    """38 steps in all; 4 at a time, so that some attempts end within a branch, some at its ends."""
    spec = run(*BRANCHED, "training.checkpoint_minutes=0")
    for _ in range(20):
        try:
            result = attempt(spec, data, tmp_path / "run", TrainControl(**{interrupt: 4}))
            break
        except (StopRequested, Killed):
            assert RunDir(tmp_path / "run").checkpoints[0].exists()
    else:
        raise AssertionError("it never ended")
    assert_same(result, whole)


@pytest.mark.parametrize("died_after", [5, 12])
def test_a_run_that_dies_in_the_trunk_goes_on_from_a_checkpoint_of_an_earlier_branch(
    died_after: int, whole: Result, data: Dataset, tmp_path: Path
) -> None:
    """Steps that the trunk took after the branch are logged once, also where a later branch has begun meanwhile."""
    spec, path = run(*BRANCHED), tmp_path / "run"
    with pytest.raises(StopRequested):
        attempt(spec, data, path, TrainControl(stop=11))  # one step into the first branch
    with pytest.raises(Killed):
        attempt(spec, data, path, TrainControl(kill=died_after))
    assert_same(attempt(spec, data, path), whole)


def test_a_damaged_trunk_starts_the_run_anew(whole: Result, data: Dataset, tmp_path: Path) -> None:
    spec = run(*BRANCHED)
    with pytest.raises(StopRequested):
        attempt(spec, data, tmp_path / "run", TrainControl(stop=11))  # one step into the first branch
    checkpoint(tmp_path / "run", "trunk.pt").write_bytes(b"damaged" * 20)
    with pytest.raises(Exception, match="the next try starts anew"):
        attempt(spec, data, tmp_path / "run")
    assert_same(attempt(spec, data, tmp_path / "run"), whole)


def test_a_trunk_that_diverges_leaves_the_later_horizons_diverged(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = loop.diverged_at
    monkeypatch.setattr(loop, "diverged_at", lambda losses, *rest: 15 if len(losses) >= 15 else right(losses, *rest))
    result = attempt(run(*BRANCHED), data, tmp_path / "run")
    assert result.summary["status"] == "diverged"
    assert [b["status"] for b in result.summary["branches"]] == ["done", "diverged"]


def test_results_hold_a_row_for_every_horizon(whole: Result, tmp_path: Path) -> None:
    sweep = SweepDir(tmp_path)
    spec = run(*BRANCHED)
    sweep.write_plan([spec.row()])
    folder = sweep.run(spec.run_id)
    folder.path.mkdir(parents=True)
    folder.write_summary(whole.summary)
    folder.write_status("done")
    rows = sorted(read_runs([sweep]), key=lambda run: run.horizon or 0)
    assert [row.horizon for row in rows] == [12 * TOKENS, 24 * TOKENS, 30 * TOKENS]
    assert [row.run_id for row in rows][-1] == spec.run_id
    assert len({row.run_id for row in rows}) == 3
    assert (rows[2].flops or 0.0) / (rows[0].flops or 0.0) == pytest.approx(30 / 12)
    assert spec.cost.tokens == (30 + 2 + 5) * TOKENS  # the trunk once, and both decays
    assert not set(CLOCK) & {"val_loss"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.branches=[0.5]"], "with training.schedule=wsd"),
        (["training.schedule=wsd", "training.branches=[0.5,0.4]"], "rising fractions"),
        (["training.schedule=wsd", "training.branches=[1.0]"], "between 0 and 1"),
        (["training.schedule=wsd", "training.branches=[0.1]", "training.warmup=10"], "would leave at steps"),
    ],
)
def test_branches_that_cannot_be_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(load(["experiment=smoke", *overrides]))


def test_without_branches_a_run_keeps_its_name() -> None:
    """The key is new, and runs trained before it are found again."""
    assert run(*WSD).run_id == run(*WSD, "training.branches=[]").run_id
    assert run(*WSD).run_id != run(*BRANCHED).run_id
