"""Live: a thread that reads the records of runs while they train and passes new rows on to a tracker.

The training loop writes its rows to a file and knows nothing of this; a tracker that is slow, stuck or broken costs it
nothing. What a tracker did not get in time it gets when the sweep is analysed, or from `mupsweep sync`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from mupsweep import trackers
from mupsweep.store.run_dir import FAILED, FINISHED, RunDir
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.trackers import RunLogger, Tracker, fingerprint

POLL = 1.0  # seconds between two looks at a run's records
PATIENCE = 30.0  # seconds that a worker waits for its tracker after its last run


@dataclass
class TrackedRun:
    """A run to show.

    Attributes:
        before: the version of its metrics before this attempt; what stands there until the run begins is older.
    """

    run: RunDir
    before: tuple[int, ...] | None = None
    ended: threading.Event = field(default_factory=threading.Event)


class LiveTracker:
    """Shows the runs of a worker to the sweep's tracker, one after the other, in a thread of its own."""

    def __init__(self, sweep: SweepDir, patience: float = PATIENCE) -> None:
        self.sweep, self.tracker, self.patience = sweep, trackers.load(sweep), patience
        self.jobs: SimpleQueue[TrackedRun | None] = SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="tracker", daemon=True)

    def __enter__(self) -> LiveTracker:
        return self

    def __exit__(self, *_: object) -> None:
        """Let the thread finish what it has, for a while."""
        if self.thread.ident:
            self.jobs.put(None)
            self.thread.join(self.patience)
            if self.thread.is_alive():
                trackers.warn(self.sweep, TimeoutError(f"still busy after {self.patience:g} s"))

    @contextlib.contextmanager
    def showing(self, run: RunDir) -> Iterator[None]:
        """Show a run while it trains; never waits."""
        if not self.tracker.active:
            yield
            return
        if not self.thread.ident:
            self.thread.start()
        job = TrackedRun(run, version(run.metrics_path))
        self.jobs.put(job)
        try:
            yield
        finally:
            job.ended.set()

    def _work(self) -> None:
        try:
            while (job := self.jobs.get()) is not None:
                show(self.tracker, self.sweep, job)
        except Exception as error:  # once is enough: no later run of this process waits for the same again
            trackers.warn(self.sweep, error)


def show(tracker: Tracker, sweep: SweepDir, job: TrackedRun) -> None:
    """Pass a run's rows on until it ended; from the first one again where the run went back to a checkpoint."""
    page: RunLogger | None = None
    shown: list[dict[str, Any]] = []
    ended = False
    while not ended:
        ended = job.ended.is_set()  # asked before the rows are read, so that none is missed
        rows = job.run.metrics() if ended or version(job.run.metrics_path) != job.before else []
        if page is not None and rows[: len(shown)] != shown:
            page.close(job.run.status()["status"])
            page = None
        if page is None and rows:
            page, shown = tracker.open(sweep, job.run), []
        if page is not None:
            for row in rows[len(shown) :]:
                page.add(row)
                shown.append(row)
        if not ended:
            job.ended.wait(POLL)
    if page is not None:
        page.close(job.run.status()["status"])


def catch_up(tracker: Tracker, sweep: SweepDir, running: bool) -> int:
    """Show every run that has rows and is not held as it is, then the results; how many runs that were.

    Args:
        running: also those that train at this moment, which their own workers do not show.
    """
    held, shown = tracker.held(sweep), 0
    for planned in sweep.read_plan():
        run = sweep.run(planned["run_id"])
        if run.status()["status"] not in (*FINISHED, FAILED) and run.is_claimed() and not running:
            continue
        if run.metrics_path.is_file() and held.get(run.run_id) != fingerprint(run):
            job = TrackedRun(run)
            job.ended.set()
            show(tracker, sweep, job)
            shown += 1
    tracker.analysed(sweep)
    return shown


def version(path: Path) -> tuple[int, ...] | None:
    """Changes whenever a file is written to or replaced."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
