"""mupsweep transfer"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from mupsweep.cli.options import Json, Strict
from mupsweep.recipes import JSON, names

if TYPE_CHECKING:
    from mupsweep.store.sweep_dir import SweepDir
    from mupsweep.sweep.run_spec import RunSpec


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
    from mupsweep.report.generate import conclude_table, export, generate
    from mupsweep.store.sweep_dir import SweepDir

    sweeps, to = sweeps or [], to or []
    if table is not None:
        verdicts = conclude_table(table, [*sweeps, *to], json, optimizer, parametrization)
        raise typer.Exit(3 if strict and "drifts" in verdicts else 0)
    folders, target = [SweepDir.open(s) for s in sweeps if "=" not in s], [s for s in sweeps if "=" in s]
    if validate:
        if len(folders) != 1 or not to:
            raise ConfigError(
                "--validate trains one target in one sweep: mupsweep transfer sweeps/NAME --validate --to width=N"
            )
        verdicts, code = train_target(folders[0], [*to, *target], optimizer, parametrization, json)
        raise typer.Exit(code or (3 if strict and "drifts" in verdicts else 0))
    if to or target:
        export(folders, [*to, *target], optimizer, parametrization, as_json=json, form=form)
        return
    if form != JSON:
        raise ConfigError(f"--format {form} is of a recipe: name its target with --to width=N depth=N")
    verdicts = generate(folders, as_json=json, optimizer=optimizer, parametrization=parametrization)
    raise typer.Exit(3 if strict and "drifts" in verdicts else 0)


def train_target(
    sweep: SweepDir, target: Sequence[str], optimizer: str | None, parametrization: str | None, as_json: bool
) -> tuple[list[str], int]:
    """Train what the validation of a target needs, by the sweep's launcher; the verdicts, and an exit code."""
    from mupsweep.cli.run import apart, exit_code
    from mupsweep.launchers import Detached, Launcher
    from mupsweep.launchers.driver import train
    from mupsweep.recipes import validation
    from mupsweep.report.generate import conclude_validation, generate, read_target
    from mupsweep.schema import instantiate
    from mupsweep.store.results import read_runs
    from mupsweep.sweep import config

    launcher: Launcher = instantiate(config.from_tree(sweep.read_config()).launcher, "launcher")
    trials = validation.trials(sweep, read_target(target), optimizer, parametrization)
    runs: list[RunSpec] = []
    finished = True
    while finished:
        rows = read_runs([sweep])
        runs = [run for trial in trials for run in validation.extend(sweep, trial, rows)]
        missing = [run for run in runs if sweep.run(run.run_id).is_open()]
        if not missing:
            break
        with apart(as_json):
            finished = train(launcher, sweep, missing)
        if isinstance(launcher, Detached):
            told = f"the same command goes on when the jobs have ended; see mupsweep status {sweep.path}"
            print(told, file=sys.stderr if as_json else sys.stdout)
            return [], 0
        if any(sweep.run(run.run_id).is_open() for run in missing):  # failed, or trained by another process
            break
    verdicts = generate([sweep], as_json=as_json, optimizer=optimizer, parametrization=parametrization)
    conclude_validation(sweep, trials, as_json)
    return verdicts, exit_code(sweep, runs, finished, drifts=False)
