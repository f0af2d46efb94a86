"""mupsweep run"""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

from mupsweep.cli.options import ConfigDir, Json, Overrides, Strict


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
    from mupsweep.launchers import driver
    from mupsweep.sweep.config import load

    config, command = load(overrides or (), config_dir), "mupsweep " + shlex.join(sys.argv[1:])
    if dry_run:
        return driver.preview(config, command)
    raise typer.Exit(driver.run_sweep(config, command, as_json=json, strict=strict))
