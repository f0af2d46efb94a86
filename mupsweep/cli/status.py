"""mupsweep status"""

from __future__ import annotations

from typing import Annotated

import typer

from mupsweep.cli.options import Json, Sweep
from mupsweep.report.terminal.status import is_over, show_status


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
    from mupsweep.store.sweep_dir import SweepDir

    if watch and (runs or json):
        raise ConfigError(f"--watch shows a board of its own: leave out {'--runs' if runs else '--json'}")
    folder = SweepDir.open(sweep)
    if watch and not is_over(folder):
        from mupsweep.report.terminal import progress

        progress.watch(folder, lambda: is_over(folder))
    else:
        show_status(folder, per_run=runs, as_json=json)
