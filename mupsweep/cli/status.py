"""mupsweep status"""

from __future__ import annotations

from typing import Annotated

import typer

from mupsweep.cli.options import Json, Sweep


def status(
    sweep: Sweep,
    runs: Annotated[bool, typer.Option("--runs", help="One line per run instead of per size.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Stay, and show what changes until all runs have ended; Ctrl-C leaves.")
    ] = False,
    json: Json = False,
) -> None:
    """Show how far a sweep is.

    Example: mupsweep status sweeps/demo
    """
    from mupsweep.errors import ConfigError
    from mupsweep.records import SweepDir
    from mupsweep.report import terminal

    if watch and (runs or json):
        raise ConfigError(f"--watch shows a board of its own: leave out {'--runs' if runs else '--json'}")
    folder = SweepDir.open(sweep)
    if watch and not terminal.is_over(folder):
        from mupsweep.launchers import progress

        progress.watch(folder, lambda: terminal.is_over(folder))
    else:
        terminal.show_status(folder, per_run=runs, as_json=json)
