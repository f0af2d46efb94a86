"""The loop over rounds: what is launched, in which order, and when no further round is planned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from mupsweep.analysis.labels import DONE
from mupsweep.launchers.driver import Outcome, train_rounds
from mupsweep.store.run_dir import FAILED
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.config import load
from mupsweep.sweep.run_spec import RunSpec


@dataclass
class Recording:
    """A launcher that finishes runs at once, except those that fail or that come after a stop."""

    name: str = "recording"
    failing: frozenset[str] = frozenset()
    stops: bool = False
    launched: list[list[str]] = field(default_factory=list)

    def launch(self, sweep: SweepDir, run_ids: Sequence[str]) -> bool:
        self.launched.append(list(run_ids))
        for run_id in run_ids:
            folder = sweep.run(run_id)
            folder.path.mkdir(parents=True, exist_ok=True)
            if run_id in self.failing:
                folder.write_status(FAILED, error="ouch")
            elif not self.stops:
                folder.write_summary({"run_id": run_id, "status": DONE})
                folder.write_status(DONE)
        return not self.stops


class Submitting(Recording):
    """A launcher that only submits."""

    def launch(self, sweep: SweepDir, run_ids: Sequence[str]) -> bool:
        self.launched.append(list(run_ids))
        return True

    def preview(self, sweep: SweepDir, run_ids: Sequence[str]) -> None:
        raise AssertionError("no dry run here")


@dataclass
class Rounds:
    """Rounds that grow by one run each, and how many of them were planned."""

    runs: Sequence[RunSpec]
    planned: int = 0

    def __iter__(self) -> Iterator[Sequence[RunSpec]]:
        while True:
            self.planned += 1
            yield self.runs[: self.planned]


@pytest.fixture
def sweep() -> tuple[SweepDir, list[RunSpec]]:
    return plan.save(load(["experiment=smoke", "sweep.width_ratios=[1]", "sweep.log2_lrs=[-9,-8,-7]"]), "")


def test_rounds_follow_one_another_until_one_has_nothing_to_train(sweep: tuple[SweepDir, list[RunSpec]]) -> None:
    folder, runs = sweep
    launcher, rounds = Recording(), Rounds(runs)
    assert train_rounds(launcher, folder, rounds) == Outcome(runs)
    assert launcher.launched == [[run.run_id] for run in runs]
    assert rounds.planned == len(runs) + 1


def test_a_single_round_launches_its_open_runs_once(sweep: tuple[SweepDir, list[RunSpec]]) -> None:
    folder, runs = sweep
    launcher = Recording()
    assert train_rounds(launcher, folder, [runs[:1]]) == Outcome(runs[:1])
    assert train_rounds(launcher, folder, [runs]) == Outcome(runs)
    assert train_rounds(launcher, folder, [runs]) == Outcome(runs)
    assert launcher.launched == [[runs[0].run_id], [run.run_id for run in runs[1:]]]


def test_no_round_is_planned_after_one_that_failed(sweep: tuple[SweepDir, list[RunSpec]]) -> None:
    folder, runs = sweep
    launcher, rounds = Recording(failing=frozenset({runs[1].run_id})), Rounds(runs)
    assert train_rounds(launcher, folder, rounds) == Outcome(runs[:2])
    assert rounds.planned == len(launcher.launched) == 2


@pytest.mark.parametrize(
    ("launcher", "stopped", "submitted"), [(Recording(stops=True), True, False), (Submitting(), False, True)]
)
def test_no_round_is_planned_after_a_stop_or_a_submission(
    launcher: Recording, stopped: bool, submitted: bool, sweep: tuple[SweepDir, list[RunSpec]]
) -> None:
    folder, runs = sweep
    rounds = Rounds(runs)
    assert train_rounds(launcher, folder, rounds) == Outcome(runs[:1], stopped, submitted)
    assert rounds.planned == len(launcher.launched) == 1
