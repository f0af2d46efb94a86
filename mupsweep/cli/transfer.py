"""mupsweep transfer"""

from __future__ import annotations

from typing import Annotated

import typer

from mupsweep.cli.options import Json, Strict
from mupsweep.recipes import JSON, names


def transfer(
    sweeps: Annotated[list[str] | None, typer.Argument(metavar="SWEEP", help="Sweep folders, finished or not.")] = None,
    to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="width=N",
            help="A target, e.g. --to width=4096 depth=32 tokens=2e9: print and write its recipe.",
        ),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            help=f"Write the recipe also for another trainer: {', '.join(name for name in names() if name != JSON)}.",
        ),
    ] = JSON,
    validate: Annotated[
        bool, typer.Option("--validate", help="Train the target at the transferred LR and around it; judge that LR.")
    ] = False,
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

    With --validate the sweep grows by the runs of the target; the same command goes on after an interruption.

    Example: mupsweep transfer sweeps/demo --to width=4096 depth=32 --format pytorch
    """
    from mupsweep.errors import ConfigError
    from mupsweep.launchers.driver import DRIFTS_EXIT_CODE, train_target
    from mupsweep.report.generate import conclude_table, export, generate, read_target
    from mupsweep.store.sweep_dir import SweepDir

    sweeps, to = sweeps or [], to or []
    if table is not None:
        verdicts = conclude_table(table, [*sweeps, *to], json, optimizer, parametrization)
        raise typer.Exit(DRIFTS_EXIT_CODE if strict and "drifts" in verdicts else 0)
    folders = [SweepDir.open(word) for word in sweeps if "=" not in word]
    target = [*to, *(word for word in sweeps if "=" in word)]
    if validate:
        if len(folders) != 1 or not to:
            raise ConfigError(
                "--validate trains one target in one sweep: mupsweep transfer sweeps/NAME --validate --to width=N"
            )
        raise typer.Exit(train_target(folders[0], read_target(target), optimizer, parametrization, json, strict))
    if target:
        return export(folders, target, optimizer, parametrization, as_json=json, form=form)
    if form != JSON:
        raise ConfigError(f"--format {form} is of a recipe: name its target with --to width=N depth=N")
    verdicts = generate(folders, as_json=json, optimizer=optimizer, parametrization=parametrization)
    raise typer.Exit(DRIFTS_EXIT_CODE if strict and "drifts" in verdicts else 0)
