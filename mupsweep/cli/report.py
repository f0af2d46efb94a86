"""mupsweep report"""

from __future__ import annotations

from typing import Annotated

import typer

from mupsweep.cli.options import AllowImports, Results, Sweep


def report(
    sweep: Sweep,
    next_round: Annotated[
        bool,
        typer.Option("--next-round", help="Submit what is left, or what a search wants next; Slurm's jobs call it."),
    ] = False,
    figures: Annotated[
        str | None,
        typer.Option(metavar="LOOK", help="Also draw the figures in this look: paper adds PDF at journal widths."),
    ] = None,
    results: Results = None,
    allow_imports: AllowImports = False,
) -> None:
    """Write a sweep's tables, figures and report.html again.

    Example: mupsweep report sweeps/demo
    """
    from mupsweep.launchers.driver import continue_sweep
    from mupsweep.report.generate import generate
    from mupsweep.store.sweep_dir import SweepDir

    try:
        if next_round:
            continue_sweep(SweepDir.open(sweep, allow_imports))
    finally:
        generate([SweepDir.open(sweep, allow_imports)], figures=figures, results=results)
