"""Sync: mirror a sweep to W&B from its records alone, now, and say what happened."""

from __future__ import annotations

from dataclasses import replace

from mupsweep import trackers
from mupsweep.errors import RecordError
from mupsweep.formatting import counted
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.trackers.live import catch_up
from mupsweep.trackers.wandb import Wandb


def sync(sweep: SweepDir, project: str | None = None, entity: str | None = None) -> None:
    """Push what W&B lacks of a sweep, with the settings of its own tracker where that is W&B.

    Raises:
        RecordError: the server does not take it, saying why.
    """
    section = sweep.read_config()["tracker"]
    own = trackers.load(sweep) if section["name"] == Wandb.name else None
    tracker = own if isinstance(own, Wandb) else Wandb()
    pushes_itself = tracker.active and project is None and entity is None
    tracker = replace(tracker, mode="online", project=project or tracker.project, entity=entity or tracker.entity)
    try:
        pushed = catch_up(tracker, sweep, running=not pushes_itself)
        where = "/".join(tracker.address())
    except Exception as error:
        raise RecordError(
            f"W&B does not take {sweep.path}: {trackers.in_one_line(error)}; check `wandb login` and the network, "
            "then run the same command again: what arrived stays"
        ) from error
    print(f"{pushed} of {counted(len(sweep.read_plan()), 'run')} pushed to {where}, group {sweep.name}")
