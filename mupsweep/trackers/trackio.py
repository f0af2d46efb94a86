"""trackio: W&B's calls into a local database, with a dashboard of its own (`trackio show`) and no account."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mupsweep.store.run_dir import RunDir
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.trackers import LocalTracker, RunLogger, SyncState, require_package


@dataclass
class Trackio(LocalTracker):
    """Writes runs to trackio's database.

    Attributes:
        project: the project of the dashboard that the runs are in.
    """

    name: str = "trackio"
    project: str = "mupsweep"

    def __post_init__(self) -> None:
        require_package(self.name, "trackio")

    def open(self, sweep: SweepDir, run: RunDir) -> RunLogger:
        sync_state = self.sync_state(sweep)
        sync_state.remove(run)
        return TrackioLogger(self.project, sweep, run, sync_state)


class TrackioLogger:
    """Writes one run to trackio's database, in place of what an earlier attempt left there."""

    def __init__(self, project: str, sweep: SweepDir, run: RunDir, sync_state: SyncState) -> None:
        import trackio

        self.run, self.sync_state = run, sync_state
        name = f"{sweep.name}-{run.run_id}"
        with contextlib.suppress(ValueError):  # the project does not exist yet
            for earlier in trackio.Api().runs(project):
                if earlier.name == name:
                    earlier.delete()
        config = run.config()
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            self.trackio_run = trackio.init(
                project, name, group=sweep.name, config=config, embed=False, auto_log_gpu=False, auto_log_cpu=False
            )

    def add(self, row: Mapping[str, Any]) -> None:
        self.trackio_run.log({k: v for k, v in row.items() if k != "step" and v is not None}, step=row["step"])

    def close(self, status: str) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self.trackio_run.finish()
        self.sync_state.write(self.run)
