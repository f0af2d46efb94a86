"""Trackers show the records to somebody else: one file and one yaml each. They read records and decide nothing.

A tracker shows a run while it trains (`live`) and catches up with whatever it has not seen whole when a sweep is
analysed. What goes wrong there is a warning, never an error: `mupsweep sync` makes up for it from the records.
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
from mupsweep.schema import instantiate
from mupsweep.store.run_dir import RunDir
from mupsweep.store.sweep_dir import SweepDir

log = logging.getLogger("mupsweep")


class RunLogger(Protocol):
    """One run as a tracker shows it."""

    def add(self, row: Mapping[str, Any]) -> None:
        """The next row of metrics."""
        ...

    def close(self, status: str) -> None:
        """No more rows: the run ended with this status, or goes on later where it is none of those that end a run."""
        ...


class Tracker(Protocol):
    """A dataclass under `trackers/`; its fields are the keys of its yaml."""

    @property
    def active(self) -> bool:
        """Whether it is told anything while a sweep runs."""
        ...

    def open(self, sweep: SweepDir, run: RunDir) -> RunLogger:
        """The run's page, the one that is there already or a new one; rows that it shows already are added again."""
        ...

    def held(self, sweep: SweepDir) -> Mapping[str, str]:
        """The fingerprints of the runs that it shows whole, by run id."""
        ...

    def analysed(self, sweep: SweepDir) -> None:
        """The sweep's results were written and every run is shown."""
        ...


def load(sweep: SweepDir) -> Tracker:
    """The tracker that a sweep's config names."""
    return instantiate(sweep.read_config()["tracker"], "tracker")


def analysed(sweep: SweepDir) -> None:
    """Tell the sweep's tracker that results were written, and show it the runs that it missed."""
    from mupsweep.trackers.live import catch_up

    try:
        tracker = load(sweep)
        if tracker.active:
            catch_up(tracker, sweep, running=False)
    except Exception as error:  # a tracker is a view: nothing that it does may cost a result
        warn(sweep, error)


def warn(sweep: SweepDir, error: BaseException) -> None:
    """Say that a tracker failed, in one line, and how to make up for it."""
    log.warning(
        "tracker: %s; the records are complete, `mupsweep sync %s` mirrors them later", in_one_line(error), sweep.path
    )


def in_one_line(error: BaseException) -> str:
    """What a tracker's own error says, and of which kind it is."""
    return shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")


def fingerprint(run: RunDir) -> str:
    """Changes with whatever of a run a tracker shows."""
    digest = hashlib.sha256(run.status()["status"].encode())
    for path in (run.metrics_path, run.summary_path):
        digest.update(path.read_bytes() if path.is_file() else b"")
        digest.update(b"\0")
    return digest.hexdigest()[:16]


class SyncState:
    """The fingerprints of what a tracker without a server holds: a file for each run, so that workers need no lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> dict[str, str]:
        """Run id -> fingerprint."""
        return {path.name: path.read_text() for path in self.folder.glob("*")}

    def remove(self, run: RunDir) -> None:
        """The run is not shown whole."""
        (self.folder / run.run_id).unlink(missing_ok=True)

    def write(self, run: RunDir) -> None:
        """The run is shown as its records are now."""
        make_folder(self.folder)
        write_text(self.folder / run.run_id, fingerprint(run), durable=False)


Ledger = SyncState  # the name by which trackers outside this package import it


class WithoutServer:
    """What trackers share that keep all they show on this machine: a ledger of it, and no page of the sweep."""

    name: str

    @property
    def active(self) -> bool:
        return True

    def held(self, sweep: SweepDir) -> Mapping[str, str]:
        return self.ledger(sweep).read()

    def analysed(self, sweep: SweepDir) -> None:
        pass

    def ledger(self, sweep: SweepDir) -> SyncState:
        """What is shown whole."""
        return SyncState(sweep.trackers / f"{self.name}-held")


def require_package(tracker: str, package: str) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        ConfigError: saying what to install.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"tracker={tracker} needs the package {package}: pip install {package}")
