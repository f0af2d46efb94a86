"""The driver: plan a round of runs, have a launcher train what is open of it, and go on while another round follows.

A grid is one round. A search plans a round from the losses of the rounds before, and so does the validation of a
target. Every command that trains calls `train_rounds`, the only loop over rounds.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass

from mupsweep import data
from mupsweep.atomic_files import write_json
from mupsweep.errors import ConfigError
from mupsweep.formatting import counted, si
from mupsweep.launchers import Detached, Launcher
from mupsweep.recipes import validation
from mupsweep.report.generate import generate
from mupsweep.report.terminal.plan import price_text
from mupsweep.schema import instantiate
from mupsweep.store import environment, slurm_queue
from mupsweep.store.results import read_runs
from mupsweep.store.run_dir import FAILED, PENDING
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.config import GRID, SweepConfig, from_tree
from mupsweep.sweep.run_spec import RunSpec

DRIFTS_EXIT_CODE = 3  # under --strict


@dataclass(frozen=True)
class Outcome:
    """How the rounds of a command ended.

    Attributes:
        runs: the runs of the last round, with those that were trained before.
        stopped: whether the user stopped the training.
        submitted: whether a scheduler trains the runs, after this command has ended.
    """

    runs: Sequence[RunSpec]
    stopped: bool = False
    submitted: bool = False


def run_sweep(config: SweepConfig, command: str, as_json: bool = False, strict: bool = False) -> int:
    """Train a sweep round by round, write its report and return the exit code of `mupsweep run`.

    Args:
        config: the choices, the grid and the launcher.
        command: the command line, kept in the sweep's config.yaml.
        as_json: whether stdout is kept for the report's JSON.
        strict: whether a verdict "drifts" has an exit code of its own.
    """
    launcher = instantiate(config.launcher, "launcher")
    sweep, first_round = plan.sweep_dir(config), None
    if not sweep.path.exists():
        first_round = plan.plan(config)
        prepare(first_round)  # a corpus that cannot be used leaves no folder behind
    with _stdout_kept(as_json):
        outcome = train_rounds(launcher, sweep, _rounds(config, command, sweep, first_round))
    if outcome.submitted:  # a job goes on with the search, or writes the report, when the arrays have ended
        if as_json:
            print(json.dumps({"jobs": sweep.read_jobs()}))
        return 0
    verdicts = generate([sweep], as_json=as_json)
    return exit_code(sweep, outcome, strict and "drifts" in verdicts)


def preview(config: SweepConfig, command: str) -> None:
    """Plan a sweep, then write and print the job scripts that a detached launcher would submit.

    Raises:
        ConfigError: the launcher writes none.
    """
    launcher: Launcher = instantiate(config.launcher, "launcher")
    if not isinstance(launcher, Detached):
        raise ConfigError(f"--dry-run: launcher={launcher.name} writes no job scripts; mupsweep plan shows the runs")
    sweep, runs = plan.save(config, command)
    launcher.preview(sweep, [run.run_id for run in open_runs(sweep, _of_sweep(runs))])


def continue_sweep(sweep: SweepDir) -> None:
    """Submit what was left of a round for want of room in the queue, or the next round of a search if one follows."""
    config = from_tree(sweep.read_config(), sweep.allow_imports)
    planned = [row["run_id"] for row in sweep.read_plan() if not row.get("validation")]
    unfinished = {run_id for run_id in planned if sweep.run(run_id).is_open()}
    if waiting := unfinished - slurm_queue.submitted_runs(sweep.read_jobs()):
        runs = [run for run in plan.load(sweep) if run.run_id in waiting]
        train_rounds(instantiate(config.launcher, "launcher"), sweep, [runs])
        return
    if config.sweep.search == GRID:
        return
    if unfinished:
        n_runs = counted(len(unfinished), "run")
        print(f"the search stops here: {n_runs} not finished; the command that made the sweep goes on")
        return
    _, runs = plan.save(config, "mupsweep run " + shlex.join(config.overrides), sweep)
    train_rounds(instantiate(config.launcher, "launcher"), sweep, [_of_sweep(runs)])


def train_target(
    sweep: SweepDir,
    target: Mapping[str, int],
    optimizer: str | None,
    parametrization: str | None,
    as_json: bool = False,
    strict: bool = False,
    yes: bool = False,
) -> int:
    """Train what the validation of a target needs, judge the transferred LR there and return the exit code.

    Args:
        sweep: the sweep of the smaller sizes, to which the runs of the target are added.
        target: width and depth of the target.
        optimizer: its name, where others are left out.
        parametrization: its name, where others are left out.
        as_json: whether stdout is kept for the report's JSON.
        strict: whether a verdict "drifts" has an exit code of its own.
        yes: whether the price is agreed to, and nobody is asked.

    Raises:
        ConfigError: nobody agreed to the price.
    """
    config = from_tree(sweep.read_config(), sweep.allow_imports)
    launcher = instantiate(config.launcher, "launcher")
    trials = validation.trials(sweep, target, optimizer, parametrization)
    if runs := open_runs(sweep, (run for trial in trials for run in validation.first_runs(trial))):
        _agree(runs, config, yes)
    with _stdout_kept(as_json):
        outcome = train_rounds(launcher, sweep, _validation_rounds(sweep, trials))
        if outcome.submitted:
            print(
                f"the same command goes on when the jobs have ended; see mupsweep status {shlex.quote(str(sweep.path))}"
            )
            return 0
    verdicts = generate([sweep], as_json, optimizer, parametrization, trials=trials)
    return exit_code(sweep, outcome, strict and "drifts" in verdicts)


def train_rounds(launcher: Launcher, sweep: SweepDir, rounds: Iterable[Sequence[RunSpec]]) -> Outcome:
    """Train the open runs of every round, until a round has none, is not finished or is handed to a scheduler."""
    runs: Sequence[RunSpec] = ()
    for runs in rounds:
        remaining = open_runs(sweep, runs)
        if not remaining:
            break
        finished = train(launcher, sweep, remaining)
        if isinstance(launcher, Detached):
            return Outcome(runs, submitted=True)
        if not finished:
            return Outcome(runs, stopped=True)
        if open_runs(sweep, remaining):  # some failed or are another process's: the next round needs their losses
            break
    return Outcome(runs)


def train(launcher: Launcher, sweep: SweepDir, runs: Sequence[RunSpec]) -> bool:
    """Have a launcher train some runs of a sweep; False if the user stopped it."""
    write_json(sweep.environment_path, environment.describe())
    prepare(runs)
    for remark in (*plan.grid_remarks(runs), *plan.corpus_remarks(runs)):
        print(f"note: {remark}", file=sys.stderr)
    # A run that failed gets another try, and so does one that finished but has lost its summary.
    for run in runs:
        folder = sweep.run(run.run_id)
        if folder.has_ended() and not folder.is_claimed():
            folder.write_status(PENDING, durable=False)
    return launcher.launch(sweep, [run.run_id for run in runs])


def prepare(runs: Sequence[RunSpec]) -> None:
    """Encode the corpus of some runs, unless that was done before, and check that it is large enough for them."""
    runs = [run for run in runs if not run.resolved.trainer.runs_program]  # a program reads what it likes
    if not runs:
        return
    corpus = data.prepare(runs[0].resolved.variant.data, progress=lambda line: print(line, file=sys.stderr))
    for context, batch in {(run.size.context, run.resolved.training.batch_size) for run in runs}:
        corpus.require(context, batch)


def open_runs(sweep: SweepDir, runs: Iterable[RunSpec]) -> list[RunSpec]:
    """Return the runs that still need training."""
    return [run for run in runs if sweep.run(run.run_id).is_open()]


def exit_code(sweep: SweepDir, outcome: Outcome, drifts: bool) -> int:
    """Return 130 when stopped, 1 when some runs are not finished, 3 for a drift under --strict, else 0; say why."""
    if outcome.stopped:
        print(f"stopped; go on with the same command: the sweep is in {sweep.path}", file=sys.stderr)
        return 130
    failed = [run for run in outcome.runs if sweep.run(run.run_id).status()["status"] == FAILED]
    if failed:
        first = sweep.run(failed[0].run_id)
        print(
            f"{counted(len(failed), 'run')} failed, the first is {first.run_id} (see {first.log_path}); "
            "run the same command to retry",
            file=sys.stderr,
        )
        return 1
    if unfinished := len(open_runs(sweep, outcome.runs)):
        n_runs = counted(unfinished, "run")
        see = f"mupsweep status {shlex.quote(str(sweep.path))}"
        print(f"another process still trains {n_runs}; see {see}", file=sys.stderr)
        return 1
    return DRIFTS_EXIT_CODE if drifts else 0


def _rounds(
    config: SweepConfig, command: str, sweep: SweepDir, first_round: Sequence[RunSpec] | None
) -> Iterator[Sequence[RunSpec]]:
    """Plan the one round of a grid, or the rounds of a search, each when the one before has been trained."""
    while True:
        _, runs = plan.save(config, command, sweep, first_round)
        yield _of_sweep(runs)
        if config.sweep.search == GRID:
            return


def _of_sweep(runs: Iterable[RunSpec]) -> list[RunSpec]:
    """The runs of the sweep itself: those of a validation are trained by `transfer --validate` alone."""
    return [run for run in runs if not run.validation]


def _agree(runs: Sequence[RunSpec], config: SweepConfig, yes: bool) -> None:
    """Say what the first runs of a validation cost, and ask whether to train them."""
    size, cost = runs[0].size, runs[0].cost
    price = price_text(runs, config.launcher_options)
    question = f"--validate trains at least {counted(len(runs), 'run')} of width {size.width}, depth {size.depth}"
    if runs[0].resolved.trainer.runs_program:
        question += f": {price}"
    else:
        question += f" ({si(cost.parameters)} parameters): {price}; memory {si(cost.memory)}B a run"
    print(question, file=sys.stderr)
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError("--validate: nobody is there to ask whether to train that; add --yes")
    if input("train them? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ConfigError("--validate: nothing was trained")


def _validation_rounds(sweep: SweepDir, trials: Sequence[validation.Trial]) -> Iterator[Sequence[RunSpec]]:
    """Plan the LRs of every trial that the losses so far ask for, each round when the one before has been trained."""
    while True:
        rows = read_runs([sweep])
        yield [run for trial in trials for run in validation.extend(sweep, trial, rows)]


def _stdout_kept(as_json: bool) -> AbstractContextManager[object]:
    """Send what is printed meanwhile to stderr, so that scripts find nothing but the JSON on stdout."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()
