"""trackio: W&B's calls into a local database, with a dashboard of its own (`trackio show`) and no account."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from mupsweep.store.run_dir import RunDir
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.trackers import RunLogger, SyncState, WithoutServer, require_package


@dataclass
class Trackio(WithoutServer):
    """Writes runs to trackio's database.

    Attributes:
        project: where they are found in the dashboard.
    """

    name: str = "trackio"
    project: str = "mupsweep"

    def __post_init__(self) -> None:
        require_package(self.name, "trackio")

    def open(self, sweep: SweepDir, run: RunDir) -> RunLogger:
        ledger = self.ledger(sweep)
        ledger.remove(run)
        return TrackioPage(self.project, sweep, run, ledger)


class TrackioPage:
    """One run in trackio's database; what an earlier attempt left there goes."""

    def __init__(self, project: str, sweep: SweepDir, run: RunDir, ledger: SyncState) -> None:
        import trackio

        self.run, self.ledger = run, ledger
        name = f"{sweep.name}-{run.run_id}"
        with contextlib.suppress(ValueError):  # the project does not exist yet
            for older in trackio.Api().runs(project):
                if older.name == name:
                    older.delete()
        config = yaml.safe_load(run.config_path.read_text())
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            self.shown = trackio.init(
                project, name, group=sweep.name, config=config, embed=False, auto_log_gpu=False, auto_log_cpu=False
            )

    def add(self, row: Mapping[str, Any]) -> None:
        self.shown.log({k: v for k, v in row.items() if k != "step" and v is not None}, step=row["step"])

    def close(self, status: str) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self.shown.finish()
        self.ledger.write(self.run)
