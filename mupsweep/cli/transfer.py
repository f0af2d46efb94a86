"""mupsweep transfer"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mupsweep.cli.options import (
    AllowImports,
    Columns,
    Filters,
    Json,
    Results,
    Strict,
    Unit,
    complete_sweeps,
    refuse_without_table,
)
from mupsweep.recipes import JSON, names

TARGET = ("width", "depth", "tokens", "batch_size", "parameters")  # what --to says


def transfer(
    sweeps: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SWEEP",
            help="Sweep folders, finished or not; analysis.KEY=VALUE changes what a verdict rests on.",
            autocompletion=complete_sweeps,
        ),
    ] = None,
    to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="width=N",
            help="A target, e.g. --to width=4096 depth=32 tokens=2e9: print and write its recipe.",
        ),
    ] = None,
    law: Annotated[
        bool,
        typer.Option(
            "--law",
            help="Fit one law of the LR over parameters, tokens and batch size; with --to, the LR from it.",
        ),
    ] = False,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            help=f"Write the recipe also for another trainer: {', '.join(name for name in names() if name != JSON)}.",
            autocompletion=names,
        ),
    ] = JSON,
    validate: Annotated[
        bool, typer.Option("--validate", help="Train the target at the transferred LR and around it; judge that LR.")
    ] = False,
    enough: Annotated[
        bool,
        typer.Option(
            "--enough",
            help="Say the smallest part of the runs that had given the answer, and what as many again would buy.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --validate: train without a question.")] = False,
    table: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FILE|wandb:ENTITY/PROJECT",
            help="Runs trained elsewhere, each with an LR, a loss and a width: csv, tsv, xlsx, parquet, jsonl, a "
            "paste; - for stdin; or a project of W&B.",
        ),
    ] = None,
    base: Annotated[
        list[str] | None,
        typer.Option(
            metavar="model=NAME",
            help="With --from and --to: how its smallest size was trained, --base model=NAME optimizer=NAME "
            "parametrization=NAME, for a whole recipe.",
        ),
    ] = None,
    columns: Columns = None,
    unit: Unit = None,
    filters: Filters = None,
    average: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --from wandb: the mean of the last N logged losses, not the last one."),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="CSV", help="With --from: write what was read, in the form of runs.csv.")
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="Only this optimizer.")] = None,
    parametrization: Annotated[str | None, typer.Option(help="Only this parametrization.")] = None,
    results: Results = None,
    allow_imports: AllowImports = False,
    json: Json = False,
    strict: Strict = False,
) -> None:
    """Say whether the LR transfers, and what to use at a target.

    With --validate the sweep grows by the runs of the target; the same command goes on after an interruption.

    Example: mupsweep transfer sweeps/demo --to width=4096 depth=32 --format pytorch
    """
    from mupsweep.errors import ConfigError
    from mupsweep.launchers.driver import DRIFTS_EXIT_CODE, train_target
    from mupsweep.report import laws
    from mupsweep.report.generate import Selection, conclude_table, export, export_table, generate, read_target
    from mupsweep.store.sweep_dir import SweepDir
    from mupsweep.store.tables import TableOptions

    words = [*(sweeps or []), *(to or []), *(base or [])]
    named = [word for word in sweeps or [] if "=" not in word]
    if table is None:
        asked = {"--columns": columns, "--unit": unit, "--filter": filters, "--average": average, "--save": save}
        refuse_without_table("transfer", {**asked, "--base": base})
    if named and table is not None:
        raise ConfigError(f"--from {table} is read without sweeps, not beside {named[0]}")
    folders = [SweepDir.open(word, allow_imports) for word in named]
    overrides = [word for word in words if word.startswith("analysis.")]
    settings = [word for word in words if word not in (*named, *overrides)]
    _check_target([] if to or base else settings)
    shape = [word for word in settings if not base or word.partition("=")[0] in TARGET]
    if form != JSON and not (shape or validate):
        raise ConfigError(f"--format {form} is of a recipe: name its target with --to width=N depth=N")
    _check_enough(enough, beside=bool(shape or validate or law))
    options = TableOptions.parse(columns or (), unit or "nats", filters or (), average)
    of_base = [word for word in settings if word not in shape]
    asked = Selection(optimizer, parametrization, overrides, json, form, results, save)
    if law or any(word.startswith("batch_size=") for word in shape):
        refused = {"--validate": validate, "--strict": strict}
        laws.answer(folders, table, options, shape, of_base, asked, refused)
        return
    if table is not None:
        if validate:
            raise ConfigError(
                f"--validate trains the target of a sweep, not of a table: mupsweep transfer --from {table} --to "
                "width=N says the LR to train it at"
            )
        if base and not shape:
            raise ConfigError("--base is of a recipe: name its target with --to width=N depth=N")
        if shape:
            verdicts = export_table(table, options, shape, of_base, asked)
        else:
            verdicts = conclude_table(table, options, asked, enough)
    elif validate:
        if len(folders) != 1 or not to:
            raise ConfigError(
                "--validate trains one target in one sweep: mupsweep transfer sweeps/NAME --validate --to width=N"
            )
        if form != JSON or overrides:
            what = f"--format {form}" if form != JSON else overrides[0]
            raise ConfigError(f"{what} is not of --validate, which trains: leave it out, or leave --validate out")
        if results is not None:
            raise ConfigError("--results is not of --validate, which adds runs to the sweep: leave one of them out")
        raise typer.Exit(train_target(folders[0], read_target(shape), optimizer, parametrization, json, strict, yes))
    elif shape:
        verdicts = export(folders, shape, asked)
    else:
        verdicts = generate(
            folders, json, optimizer, parametrization, overrides=overrides, results=results, with_effort=enough
        )
    raise typer.Exit(DRIFTS_EXIT_CODE if strict and "drifts" in verdicts else 0)


def _check_enough(enough: bool, beside: bool) -> None:
    """Refuse --enough beside an option that asks for something else than a verdict."""
    from mupsweep.errors import ConfigError

    if enough and beside:
        raise ConfigError("--enough is of the verdict: leave --to, --validate and --law out")


def _check_target(words: list[str]) -> None:
    """Refuse words that are neither a sweep nor a target, where no --to says what they are."""
    from mupsweep.errors import ConfigError

    for word in words:
        if word.partition("=")[0] not in TARGET:
            raise ConfigError(
                f"{word}: expected sweep folders, analysis.KEY=VALUE, or a target as --to width=N depth=N tokens=N"
            )
