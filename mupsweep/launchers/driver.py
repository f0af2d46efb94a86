"""The loop that trains what a sweep lacks, round after round, by its launcher."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

from mupsweep.formatting import counted

if TYPE_CHECKING:
    from mupsweep.launchers import Launcher
    from mupsweep.store.sweep_dir import SweepDir
    from mupsweep.sweep.run_spec import RunSpec


def train(launcher: Launcher, sweep: SweepDir, runs: list[RunSpec]) -> bool:
    """Launch the open runs; False if the user stopped them."""
    from mupsweep.atomic_files import write_json
    from mupsweep.store import environment
    from mupsweep.store.run_dir import FAILED, FINISHED, PENDING
    from mupsweep.sweep.plan import corpus_remarks

    if not runs:
        return True
    write_json(sweep.environment_path, environment.describe())
    prepare(runs)
    for remark in corpus_remarks(runs):
        print(f"note: {remark}", file=sys.stderr)
    for spec in runs:  # what failed before gets another try, and what finished but has lost its summary
        folder = sweep.run(spec.run_id)
        if folder.status()["status"] in (FAILED, *FINISHED) and not folder.is_claimed():
            folder.write_status(PENDING, durable=False)
    return launcher.launch(sweep, [spec.run_id for spec in runs])


def prepare(runs: list[RunSpec]) -> None:
    """Encode the corpus of some runs, if that was not done before."""
    from mupsweep import data

    corpus = data.prepare(runs[0].resolved.variant.data, progress=lambda line: print(line, file=sys.stderr))
    for context, batch in {(run.size.context, run.resolved.training.batch_size) for run in runs}:
        corpus.require(context, batch)


def go_on(sweep: SweepDir) -> None:
    """Train the next round of a search by the sweep's launcher, where its last round is finished and it wants one."""
    from mupsweep.schema import instantiate
    from mupsweep.sweep import config, plan

    chosen = config.from_tree(sweep.read_config())
    if chosen.sweep.search == config.GRID:
        return
    if left := sum(sweep.run(row["run_id"]).is_open() for row in sweep.read_plan()):
        print(f"the search stops here: {counted(left, 'run')} not finished; the command that made the sweep goes on")
        return
    _, runs = plan.save(chosen, "mupsweep run " + shlex.join(chosen.overrides), sweep)
    train(instantiate(chosen.launcher, "launcher"), sweep, [r for r in runs if sweep.run(r.run_id).is_open()])
