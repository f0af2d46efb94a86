"""mupsweep transfer"""

from __future__ import annotations

from typing import Annotated

import typer

from mupsweep.cli.options import Json, Strict


def transfer(
    sweeps: Annotated[list[str] | None, typer.Argument(metavar="SWEEP", help="Sweep folders, finished or not.")] = None,
    to: Annotated[
        str | None,
        typer.Option(metavar="width=N", help="A target, e.g. --to width=4096 depth=32: print and write its recipe."),
    ] = None,
    table: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="CSV",
            help="Runs trained elsewhere: columns parametrization, width, log2_lr or lr, val_loss, as in runs.csv.",
        ),
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="Only this optimizer.")] = None,
    parametrization: Annotated[str | None, typer.Option(help="Only this parametrization.")] = None,
    json: Json = False,
    strict: Strict = False,
) -> None:
    """Say whether the LR transfers, and what to use at a target.

    Example: mupsweep transfer sweeps/demo --to width=4096 depth=32
    """
    from mupsweep.records import SweepDir
    from mupsweep.report.conclude import conclude, conclude_table, export

    sweeps = sweeps or []
    if table is not None:
        verdicts = conclude_table(table, [*sweeps, *([to] if to else [])], json, optimizer, parametrization)
        raise typer.Exit(3 if strict and "drifts" in verdicts else 0)
    folders, target = [SweepDir.open(s) for s in sweeps if "=" not in s], [s for s in sweeps if "=" in s]
    if to is not None or target:
        export(folders, [*([to] if to else []), *target], optimizer, parametrization, as_json=json)
        return
    verdicts = conclude(folders, as_json=json, optimizer=optimizer, parametrization=parametrization)
    raise typer.Exit(3 if strict and "drifts" in verdicts else 0)
