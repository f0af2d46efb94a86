"""The command `mupsweep sync`: mirrors a sweep to W&B from its records alone."""

from __future__ import annotations

from dataclasses import replace

from mupsweep import trackers
from mupsweep.errors import MupsweepError, RecordError
from mupsweep.formatting import counted
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.trackers.live import sync_runs
from mupsweep.trackers.wandb import Wandb


def sync(sweep: SweepDir, project: str | None = None, entity: str | None = None) -> None:
    """Push what W&B lacks of a sweep, with the settings of the sweep's tracker where that is W&B.

    Raises:
        RecordError: the server does not take it; the message quotes why.
    """
    section = sweep.read_config()["tracker"]
    is_ours = section.get("kind") == f"{Wandb.__module__}.{Wandb.__qualname__}"
    configured = trackers.load(sweep) if is_ours else None
    tracker = configured if isinstance(configured, Wandb) else Wandb()
    workers_push = tracker.active and project is None and entity is None
    tracker = replace(tracker, mode="online", project=project or tracker.project, entity=entity or tracker.entity)
    try:
        n_pushed = sync_runs(tracker, sweep, running=not workers_push)
        address = "/".join(tracker.address())
    except MupsweepError:  # no login, damaged records: the message says what to do
        raise
    except Exception as error:
        raise RecordError(
            f"W&B does not take {sweep.path}: {trackers.in_one_line(error)}; check `wandb login` and the network, "
            "then run the same command again: what arrived stays"
        ) from error
    print(f"{n_pushed} of {counted(len(sweep.read_plan()), 'run')} pushed to {address}, group {sweep.name}")
