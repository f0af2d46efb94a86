"""The state of a sweep while it is trained, read from its records. A poll reads only files that may have changed."""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mupsweep.analysis.labels import DONE, Label, label_of
from mupsweep.analysis.run_result import RunResult
from mupsweep.formatting import duration
from mupsweep.store.run_dir import FAILED, FINISHED, PENDING, RUNNING
from mupsweep.store.sweep_dir import SweepDir

SETTLED_SECONDS = (
    2.0  # a second change within the resolution of file times would go unnoticed: younger files are reread
)
Row = tuple[Label, int, int]  # variant, width, depth


@dataclass
class Cell:
    """The runs of one size at one LR, over seeds."""

    states: Counter[str] = field(default_factory=Counter)
    losses: list[float] = field(default_factory=list)

    def __add__(self, other: Cell) -> Cell:
        return Cell(self.states + other.states, self.losses + other.losses)


class Board:
    """The state of every run of a sweep; `poll` reads what has changed.

    Of 100,000 runs a poll reads only those that have a folder and are not finished, and the plan only after it grew.

    Attributes:
        planned: run ids -> their lines of the plan.
        labels: variants -> the ids of their runs.
        running: ids of running runs -> their status.
        losses: ids of finished runs -> their validation loss, None where they diverged.
        cells: variant and size -> log2 LR -> the runs there.
        counts: number of runs in each state.
        round: of the search, the last one that is planned; 0 for a grid.
        flops: planned FLOPs of the runs in each state, or their number where a program's are unknown; running runs
            count in full.
    """

    def __init__(self, sweep: SweepDir) -> None:
        self.sweep = sweep
        self.planned: dict[str, dict[str, Any]] = {}
        self.labels: dict[Label, list[str]] = defaultdict(list)
        self.running: dict[str, Mapping[str, Any]] = {}
        self.losses: dict[str, float | None] = {}
        self.cells: dict[Row, dict[float, Cell]] = defaultdict(lambda: defaultdict(Cell))
        self.counts: Counter[str] = Counter()
        self.flops = Counter[str]()
        self.round = 0
        self._states: dict[str, str] = {}
        self._started: dict[str, tuple[_Watched, dict[str, Any]]] = {}  # runs with a folder and without a result
        self._plan, self._runs = _Watched(sweep.plan_path), _Watched(sweep.runs)
        self._began, self._flops_at_start = time.monotonic(), 0.0
        self.poll()
        self._flops_at_start = self._flops_done()

    def poll(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Read files that may have changed; returns the runs that ended or failed since the last poll, with status."""
        plan_changed = self._plan.changed()
        if plan_changed:
            self._read_plan()
        if self._runs.changed() or plan_changed:
            for run_id in self.sweep.started():
                if self._states.get(run_id) not in (None, *FINISHED) and run_id not in self._started:
                    self._started[run_id] = _Watched(self.sweep.run(run_id).status_path), {"status": PENDING}
        ended = []
        for run_id, (watched, status) in list(self._started.items()):
            folder = self.sweep.run(run_id)
            if watched.changed():
                status = folder.status()
                self._started[run_id] = watched, status
            state = status["status"]
            if state == RUNNING and not folder.is_claimed():  # its worker died
                state = PENDING
            if self._set_state(run_id, state, status) and state in (*FINISHED, FAILED):
                ended.append((run_id, status))
        return ended

    def _read_plan(self) -> None:
        for row in self.sweep.read_plan():
            run_id = row["run_id"]
            if run_id not in self.planned:
                self.planned[run_id] = row
                self.labels[self.label(run_id)].append(run_id)
                self._set_state(run_id, PENDING, {})
                self.round = max(self.round, row.get("round", 0))

    def _set_state(self, run_id: str, state: str, status: Mapping[str, Any]) -> bool:
        """Move a run to a state; returns whether it was in another one before."""
        if state == RUNNING:
            self.running[run_id] = status
        else:
            self.running.pop(run_id, None)
        old = self._states.get(run_id)
        if old == state:
            return False
        self._states[run_id] = state
        row = self.planned[run_id]
        cell = self.cells[self.label(run_id), row["width"], row["depth"]][row["log2_lr"]]
        for counter, amount in ((self.counts, 1), (cell.states, 1), (self.flops, row.get("flops", 1.0))):
            counter[state] += amount
            if old is not None:
                counter[old] -= amount
        if state in FINISHED:
            del self._started[run_id]
            loss = (self.sweep.run(run_id).summary() or {}).get("val_loss") if state == DONE else None
            self.losses[run_id] = loss
            if loss is not None:
                cell.losses.append(loss)
        return True

    def label(self, run_id: str) -> Label:
        """The variant of a run."""
        return label_of(self.planned[run_id])

    @property
    def finished(self) -> int:
        """Runs that are done or diverged."""
        return sum(self.counts[state] for state in FINISHED)

    @property
    def open(self) -> int:
        """Runs that are neither finished nor failed."""
        return self.counts[PENDING] + self.counts[RUNNING]

    def results(self, label: Label) -> list[RunResult]:
        """The finished runs of a variant."""
        return [
            RunResult.of({**self.planned[run_id], "status": self._states[run_id], "val_loss": self.losses[run_id]})
            for run_id in self.labels[label]
            if run_id in self.losses
        ]

    def run_seconds_left(self, run_id: str) -> float | None:
        """Estimate how long a running run still takes at its own speed."""
        status, row = self.running[run_id], self.planned[run_id]
        speed, steps = status.get("tokens_per_second"), status.get("steps")
        return (1 - status.get("step", 0) / steps) * row["tokens"] / speed if speed and steps else None

    def seconds_left(self) -> float | None:
        """Estimate how long the open runs take, from their FLOPs and the speed so far.

        The speed is that since the first poll, or before any progress that of the running runs; None if unknown.
        """
        done = self._flops_done()
        remaining = self.flops[PENDING] + self.flops[RUNNING] - sum(map(self._partial, self.running))
        passed = time.monotonic() - self._began
        if done > self._flops_at_start and passed > 0:
            return remaining * passed / (done - self._flops_at_start)
        speed = sum(flops_per_second(self.planned[run_id], status) for run_id, status in self.running.items())
        return remaining / speed if speed else None

    def time_left(self) -> str | None:
        """How long the open runs take, for people; None if unknown. More runs may follow a round of a search."""
        seconds = self.seconds_left() if self.open else None
        return None if seconds is None else left_text(seconds, self.round)

    def _flops_done(self) -> float:
        return sum(self.flops[state] for state in FINISHED) + sum(map(self._partial, self.running))

    def _partial(self, run_id: str) -> float:
        """FLOPs that a running run has done."""
        return flops_done(self.planned[run_id], self.running[run_id])


def flops_done(row: Mapping[str, Any], status: Mapping[str, Any]) -> float:
    """FLOPs that a running run has done; its share of 1 where a program's are unknown."""
    return row.get("flops", 1.0) * status.get("step", 0) / max(1, status.get("steps", 1))


def flops_per_second(row: Mapping[str, Any], status: Mapping[str, Any]) -> float:
    """The speed of a running run, 0 while it is not measured."""
    speed = status.get("tokens_per_second")
    return row.get("flops", 1.0) / row["tokens"] * speed if speed and row.get("tokens") else 0.0


def left_text(seconds: float, round_number: int) -> str:
    """A time left, for people; after a round of a search others may follow."""
    return f"about {duration(seconds)} left{' in this round' if round_number else ''}"


class _Watched:
    """A file or folder that may change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stamp: tuple[int, int, int] | None = None

    def changed(self) -> bool:
        """Whether the file may have changed since the last call."""
        try:
            stat = os.stat(self.path)
        except OSError:
            stamp, settled = None, True
        else:
            stamp = stat.st_mtime_ns, stat.st_size, stat.st_ino
            settled = time.time() - stat.st_mtime > SETTLED_SECONDS
        changed = stamp != self.stamp
        self.stamp = stamp if settled else None
        return changed
