"""mupsweep run"""

from __future__ import annotations

import shlex
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mupsweep.cli.options import ConfigDir, Json, Overrides, Strict
from mupsweep.errors import ConfigError
from mupsweep.formatting import counted
from mupsweep.launchers.driver import prepare, train

if TYPE_CHECKING:
    from mupsweep.launchers import Launcher
    from mupsweep.store.sweep_dir import SweepDir
    from mupsweep.sweep.run_spec import RunSpec


def run(
    overrides: Overrides = None,
    config_dir: ConfigDir = None,
    json: Json = False,
    strict: Strict = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With launcher=slurm: write and print the job scripts, submit nothing.")
    ] = False,
) -> None:
    """Plan a sweep, train what is missing and write the report.

    Run the same command again to go on after an interruption, or with a longer grid to extend the sweep. With
    sweep.search=adaptive it trains round after round, until the optimal LR of every size is known.

    Example: mupsweep run parametrization=sp,spectral experiment=demo
    """
    from mupsweep.launchers import Detached
    from mupsweep.report.generate import generate
    from mupsweep.schema import instantiate
    from mupsweep.sweep import config, plan

    chosen = config.load(overrides or (), config_dir)
    launcher: Launcher = instantiate(chosen.launcher, "launcher")
    if dry_run and not isinstance(launcher, Detached):
        raise ConfigError(f"--dry-run: launcher={launcher.name} writes no job scripts; mupsweep plan shows the runs")
    new = None
    if not dry_run and not (Path(chosen.out) / plan.sweep_name(chosen)).exists():
        prepare(new := plan.plan(chosen))  # a corpus that cannot be used leaves no folder behind
    while True:
        sweep, runs = plan.save(chosen, "mupsweep " + shlex.join(sys.argv[1:]), new=new)
        missing = [r for r in runs if sweep.run(r.run_id).is_open()]
        if dry_run and isinstance(launcher, Detached):
            return launcher.preview(sweep, [r.run_id for r in missing])
        with apart(json):
            finished = train(launcher, sweep, missing)
        if missing and isinstance(launcher, Detached):  # a job goes on or concludes when they have ended
            return print(dumps({"jobs": sweep.read_jobs()})) if json else None
        unfinished = not finished or any(sweep.run(r.run_id).is_open() for r in missing)
        if not missing or unfinished or chosen.sweep.search == config.GRID:
            break
    verdicts = generate([sweep], as_json=json)
    raise typer.Exit(exit_code(sweep, runs, finished, strict and "drifts" in verdicts))


def apart(as_json: bool) -> AbstractContextManager[object]:
    """Where what is told meanwhile goes to stderr, so that scripts find nothing but the JSON on stdout."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


def exit_code(sweep: SweepDir, runs: list[RunSpec], finished: bool, drifts: bool) -> int:
    """130 when stopped, 1 when some runs failed, 3 for a drift under --strict, else 0."""
    from mupsweep.store.run_dir import FAILED

    if not finished:
        print(f"stopped; go on with the same command: the sweep is in {sweep.path}", file=sys.stderr)
        return 130
    failed = [r.run_id for r in runs if sweep.run(r.run_id).status()["status"] == FAILED]
    if failed:
        log = sweep.run(failed[0]).log_path
        told = counted(len(failed), "run")
        print(f"{told} failed, the first is {failed[0]} (see {log}); run the same command to retry", file=sys.stderr)
        return 1
    unfinished = sum(sweep.run(r.run_id).is_open() for r in runs)
    if unfinished:
        told = counted(unfinished, "run")
        print(f"another process still trains {told}; see mupsweep status {sweep.path}", file=sys.stderr)
        return 1
    return 3 if drifts else 0
