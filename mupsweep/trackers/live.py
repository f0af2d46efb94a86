"""Live tracking: a thread that reads the records of runs while they train and passes new rows on to a tracker.

The training loop writes its rows to a file and knows nothing of trackers, so a slow, stuck or broken one costs it
nothing. Rows that a tracker missed are logged when the sweep is analysed, or by `mupsweep sync`.
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
from mupsweep.store.run_dir import RunDir
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.trackers import RunLogger, Tracker, fingerprint

POLL = 1.0  # seconds between two reads of a run's records
PATIENCE = 30.0  # seconds that a worker waits for its tracker after its last run


@dataclass
class TrackedRun:
    """A run to log.

    Attributes:
        stale_version: the version of the run's metrics before this attempt; while the file has this version, its rows
            are those of an earlier attempt.
        ended: set when the run has ended or was interrupted.
    """

    run: RunDir
    stale_version: tuple[int, ...] | None = None
    ended: threading.Event = field(default_factory=threading.Event)


class LiveTracker:
    """Logs the runs of a worker to the sweep's tracker, one after the other, in a thread of its own."""

    def __init__(self, sweep: SweepDir, patience: float = PATIENCE) -> None:
        self.sweep, self.tracker, self.patience = sweep, trackers.load(sweep), patience
        self.queue: SimpleQueue[TrackedRun | None] = SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="tracker", daemon=True)

    def __enter__(self) -> LiveTracker:
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the thread to log the runs in its queue, for `patience` seconds at most."""
        if self.thread.ident:
            self.queue.put(None)
            self.thread.join(self.patience)
            if self.thread.is_alive():
                trackers.warn(self.sweep, TimeoutError(f"still busy after {self.patience:g} s"))

    @contextlib.contextmanager
    def track(self, run: RunDir) -> Iterator[None]:
        """Log a run while it trains in this context, which never waits for the tracker."""
        if not self.tracker.active:
            yield
            return
        if not self.thread.ident:
            self.thread.start()
        tracked = TrackedRun(run, version(run.metrics_path))
        self.queue.put(tracked)
        try:
            yield
        finally:
            tracked.ended.set()

    def _work(self) -> None:
        try:
            while (tracked := self.queue.get()) is not None:
                log_run(self.tracker, self.sweep, tracked)
        except Exception as error:  # the thread ends, so that no later run waits for the tracker to fail again
            trackers.warn(self.sweep, error)


def log_run(tracker: Tracker, sweep: SweepDir, tracked: TrackedRun) -> None:
    """Log a run's rows until it has ended; all of them anew where the run went back to a checkpoint."""
    logger: RunLogger | None = None
    logged: list[dict[str, Any]] = []
    ended = False
    while not ended:
        ended = tracked.ended.is_set()  # checked before the rows are read, so that none is missed
        is_stale = not ended and version(tracked.run.metrics_path) == tracked.stale_version
        rows = [] if is_stale else tracked.run.metrics()
        if logger is not None and rows[: len(logged)] != logged:
            logger.close(tracked.run.status()["status"])
            logger = None
        if logger is None and rows:
            logger, logged = tracker.open(sweep, tracked.run), []
        if logger is not None:
            for row in rows[len(logged) :]:
                logger.add(row)
                logged.append(row)
        if not ended:
            tracked.ended.wait(POLL)
    if logger is not None:
        logger.close(tracked.run.status()["status"])


def sync_runs(tracker: Tracker, sweep: SweepDir, running: bool) -> int:
    """Log every run that has rows and is not logged as its records are now, then the results.

    Args:
        running: whether to log runs too that train at this moment, which is right where their workers do not.

    Returns:
        How many runs were logged.
    """
    synced, n_logged = tracker.held(sweep), 0
    for row in sweep.read_plan():
        run = sweep.run(row["run_id"])
        if not run.has_ended() and run.is_claimed() and not running:
            continue
        if run.metrics_path.is_file() and synced.get(run.run_id) != fingerprint(run):
            tracked = TrackedRun(run)
            tracked.ended.set()
            log_run(tracker, sweep, tracked)
            n_logged += 1
    tracker.analysed(sweep)
    return n_logged


def version(path: Path) -> tuple[int, ...] | None:
    """Return what changes whenever a file is written to or replaced; None where there is no file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
