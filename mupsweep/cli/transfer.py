"""mupsweep transfer"""

from __future__ import annotations

from pathlib import Path
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
            metavar="FILE|wandb:ENTITY/PROJECT",
            help="Runs trained elsewhere, each with an LR, a loss and a width: csv, tsv, xlsx, parquet, jsonl, a "
            "paste; - for stdin; or a project of W&B.",
        ),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            metavar="lr=NAME,...", help="With --from: what columns are called, as lr=optimizer.lr,val_loss=eval/loss."
        ),
    ] = None,
    unit: Annotated[
        str | None, typer.Option(metavar="UNIT", help="With --from: of the losses, nats (default), bits or perplexity.")
    ] = None,
    filters: Annotated[
        list[str] | None,
        typer.Option("--filter", metavar="NAME=VALUE", help="With --from: only these runs, as group=sweep-3."),
    ] = None,
    average: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --from wandb: the mean of the last N logged losses, not the last one."),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="CSV", help="With --from: write what was read, in the form of runs.csv.")
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
    from mupsweep.store.tables import TableOptions

    sweeps, to = sweeps or [], to or []
    asked = {"--columns": columns, "--unit": unit, "--filter": filters, "--average": average, "--save": save}
    for option, value in asked.items():
        if value not in (None, []) and table is None:
            raise ConfigError(f"{option} is of a table: name it too, mupsweep transfer --from FILE {option} ...")
    if table is not None:
        options = TableOptions.parse(columns or (), unit or "nats", filters or (), average)
        verdicts = conclude_table(table, options, [*sweeps, *to], json, optimizer, parametrization, save)
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
