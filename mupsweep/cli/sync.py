"""mupsweep sync"""

from __future__ import annotations

from typing import Annotated

import typer

from mupsweep.cli.options import Sweep


def sync(
    sweep: Sweep,
    project: Annotated[str | None, typer.Option(help="The W&B project.", show_default=False)] = None,
    entity: Annotated[str | None, typer.Option(help="The W&B user or team.", show_default=False)] = None,
) -> None:
    """Mirror a sweep to W&B from its records.

    Runs, a summary and a Workspace, whatever the sweep's tracker was, finished or not. What W&B holds already is not
    sent again.

    Example: mupsweep sync sweeps/demo --project lr-transfer
    """
    from mupsweep.store.sweep_dir import SweepDir
    from mupsweep.trackers import sync as tracker

    tracker.sync(SweepDir.open(sweep), project, entity)
