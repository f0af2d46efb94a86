"""Trackers mirror records elsewhere: one file and one yaml each. They read records and decide nothing.

A tracker logs a run while it trains (`live`), and logs what it missed when the sweep is analysed. An error of a tracker
is a warning and costs no result: `mupsweep sync` mirrors the records later.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol

from mupsweep.atomic_files import make_folder, write_text
from mupsweep.errors import ConfigError
from mupsweep.schema import instantiate, refuse_foreign_code
from mupsweep.store.run_dir import RunDir
from mupsweep.store.sweep_dir import SweepDir

log = logging.getLogger("mupsweep")


class RunLogger(Protocol):
    """Logs one run to a tracker."""

    def add(self, row: Mapping[str, Any]) -> None:
        """Log the next row of metrics."""
        ...

    def close(self, status: str) -> None:
        """End the log: the run ended with this status, or was interrupted where the status is not a final one."""
        ...


class Tracker(Protocol):
    """A dataclass under `trackers/`; its fields are the keys of its yaml."""

    @property
    def active(self) -> bool:
        """Whether runs are logged while a sweep trains."""
        ...

    def open(self, sweep: SweepDir, run: RunDir) -> RunLogger:
        """Open the log of a run, an existing one or a new one; every row is added anew, also those it holds already."""
        ...

    def held(self, sweep: SweepDir) -> Mapping[str, str]:
        """Return the fingerprints of the runs that are logged in full, by run id."""
        ...

    def analysed(self, sweep: SweepDir) -> None:
        """Log the sweep's results, which were written; every run is logged by now."""
        ...


def load(sweep: SweepDir) -> Tracker:
    """Return the tracker that a sweep's config names.

    Raises:
        ConfigError: it names code outside mupsweep that is not allowed.
    """
    section = sweep.read_config()["tracker"]
    refuse_foreign_code(section, "tracker", sweep.allow_imports)
    return instantiate(section, "tracker")


def log_results(sweep: SweepDir) -> None:
    """Log the results of a sweep to its tracker, and the runs that it missed."""
    from mupsweep.trackers.live import sync_runs

    try:
        tracker = load(sweep)
        if tracker.active:
            sync_runs(tracker, sweep, running=False)
    except Exception as error:  # no failure of a tracker may cost a result
        warn(sweep, error)


def warn(sweep: SweepDir, error: BaseException) -> None:
    """Warn in one line that a tracker failed, and how to mirror the records later."""
    log.warning(
        "tracker: %s; the records are complete, `mupsweep sync %s` mirrors them later", in_one_line(error), sweep.path
    )


def in_one_line(error: BaseException) -> str:
    """Return an error's class and message in one line of at most 400 characters."""
    return shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")


def fingerprint(run: RunDir) -> str:
    """Return a digest of everything of a run that a tracker logs."""
    digest = hashlib.sha256(run.status()["status"].encode())
    for path in (run.metrics_path, run.summary_path):
        digest.update(path.read_bytes() if path.is_file() else b"")
        digest.update(b"\0")
    return digest.hexdigest()[:16]


class SyncState:
    """The fingerprints of the runs that a local tracker has logged: a file per run, so that workers need no lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> dict[str, str]:
        """Return the fingerprints by run id."""
        return {path.name: path.read_text(errors="replace") for path in self.folder.glob("*") if path.is_file()}

    def remove(self, run: RunDir) -> None:
        """Record that a run is not logged in full."""
        (self.folder / run.run_id).unlink(missing_ok=True)

    def write(self, run: RunDir) -> None:
        """Record that a run is logged as its records are now."""
        make_folder(self.folder)
        write_text(self.folder / run.run_id, fingerprint(run), durable=False)


Ledger = SyncState  # the former name, which trackers outside this package import


class LocalTracker:
    """Base of trackers that write to this machine: they keep a SyncState, and log no results of the sweep."""

    name: str

    @property
    def active(self) -> bool:
        return True

    def held(self, sweep: SweepDir) -> Mapping[str, str]:
        return self.sync_state(sweep).read()

    def analysed(self, sweep: SweepDir) -> None:
        pass

    def sync_state(self, sweep: SweepDir) -> SyncState:
        """Return the record of the runs that are logged in full."""
        return SyncState(sweep.trackers / f"{self.name}-held")


def require_package(tracker: str, package: str) -> None:
    """Check that a tracker's package is installed.

    Raises:
        ConfigError: it is not; the message names what to install.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"tracker={tracker} needs the package {package}: pip install {package}")
