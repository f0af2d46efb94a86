"""mupsweep run"""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

import typer

from mupsweep.cli.options import ConfigDir, Json, Overrides, Strict

if TYPE_CHECKING:
    from mupsweep.config import SweepConfig
    from mupsweep.plan import RunSpec
    from mupsweep.records import SweepDir


def run(overrides: Overrides = None, config_dir: ConfigDir = None, json: Json = False, strict: Strict = False) -> None:
    """Plan a sweep, train what is missing, analyse it and write the report.

    Run the same command again to go on after an interruption, or with a longer grid to extend the sweep.

    Example: mupsweep run parametrization=sp,spectral experiment=demo
    """
    from mupsweep import config, plan
    from mupsweep.report.conclude import conclude

    chosen = config.load(overrides or (), config_dir)
    sweep, runs = plan.save(chosen, "mupsweep " + shlex.join(sys.argv[1:]))
    finished = train(chosen, sweep, [r for r in runs if sweep.run(r.run_id).is_open()])
    verdicts = conclude([sweep], as_json=json)
    raise typer.Exit(exit_code(sweep, runs, finished, strict and "drifts" in verdicts))


def train(chosen: SweepConfig, sweep: SweepDir, runs: list[RunSpec]) -> bool:
    """Launch the open runs; False if the user stopped them."""
    from mupsweep import data, environment
    from mupsweep.files import write_json
    from mupsweep.records import FAILED, PENDING
    from mupsweep.sections import instantiate

    if not runs:
        return True
    write_json(sweep.environment_path, environment.describe())
    data.prepare(runs[0].recipe.variant.data, progress=lambda line: print(line, file=sys.stderr))
    for spec in runs:  # what failed before gets another try
        folder = sweep.run(spec.run_id)
        if folder.status()["status"] == FAILED and not folder.is_claimed():
            folder.write_status(PENDING, durable=False)
    return instantiate(chosen.launcher, "launcher").launch(sweep, [spec.run_id for spec in runs])


def exit_code(sweep: SweepDir, runs: list[RunSpec], finished: bool, drifts: bool) -> int:
    """130 when stopped, 1 when some runs failed, 3 for a drift under --strict, else 0."""
    from mupsweep.records import FAILED

    if not finished:
        print(f"stopped; go on with the same command: the sweep is in {sweep.path}", file=sys.stderr)
        return 130
    failed = [r.run_id for r in runs if sweep.run(r.run_id).status()["status"] == FAILED]
    if failed:
        log = sweep.run(failed[0]).log_path
        print(
            f"{len(failed)} runs failed, the first is {failed[0]} (see {log}); run the same command to retry",
            file=sys.stderr,
        )
        return 1
    unfinished = sum(sweep.run(r.run_id).is_open() for r in runs)
    if unfinished:
        print(
            f"{unfinished} runs are still trained by another process; see mupsweep status {sweep.path}", file=sys.stderr
        )
        return 1
    return 3 if drifts else 0
