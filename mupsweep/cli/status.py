"""mupsweep status"""

from __future__ import annotations

from typing import Annotated

import typer

from mupsweep.cli.options import Json, Sweep


def status(
    sweep: Sweep,
    runs: Annotated[bool, typer.Option("--runs", help="One line per run instead of per size.")] = False,
    json: Json = False,
) -> None:
    """Show how far a sweep is.

    Example: mupsweep status sweeps/demo
    """
    from mupsweep.records import SweepDir
    from mupsweep.report import terminal

    terminal.show_status(SweepDir.open(sweep), per_run=runs, as_json=json)
