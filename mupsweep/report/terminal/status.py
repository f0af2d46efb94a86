"""The state of a sweep's runs, its search and its Slurm jobs, as `mupsweep status` prints it."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from shlex import quote
from typing import TYPE_CHECKING, Any

from rich.table import Table

from mupsweep.analysis.labels import DIVERGED, DONE, label_of
from mupsweep.errors import MupsweepError, RecordError
from mupsweep.formatting import counted
from mupsweep.report.terminal.board import flops_done, flops_per_second, left_text
from mupsweep.report.terminal.console import console_of, table_of
from mupsweep.store import slurm_queue
from mupsweep.store.run_dir import FAILED, FINISHED, METRICS_ROWS, PENDING, RUNNING, RunDir
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.store.workers import living
from mupsweep.sweep.config import GRID, SweepConfig, from_tree

if TYPE_CHECKING:
    from mupsweep.sweep.search import SearchStates

STATES = (DONE, DIVERGED, RUNNING, PENDING, FAILED)
RunState = tuple[dict[str, Any], RunDir, dict[str, Any]]  # line of the plan, folder, status
MAX_WORKERS = 8  # processes that are named
SILENT_SECONDS = 300.0  # without a row of metrics, or three times as long as rows take where that is more


def show_status(sweep: SweepDir, per_run: bool, as_json: bool) -> None:
    """Print how many runs of a sweep are in each state, or the state of every run, and what needs attention."""
    rows = [(row, sweep.run(row["run_id"])) for row in sweep.read_plan()]
    states = [(row, folder, folder.state()) for row, folder in rows]
    queue = _queue(sweep)
    if as_json:
        jobs = {run_id: asdict(job) for run_id, job in queue.runs.items()}
        runs = [{**row, **status, "job": jobs.get(row["run_id"])} for row, _, status in states]
        print(json.dumps({"runs": runs, "totals": _counts(states)}))
        return
    console = console_of()
    console.show(_run_table(states, queue) if per_run else _size_table(states))
    counts = _counts(states)
    left = time_left(states)
    unfinished = sum(counts[s] for s in (RUNNING, PENDING, FAILED))
    console.print("  ".join([*(f"{name} {count}" for name, count in counts.items()), *([left] if left else [])]))
    for line in [*queue.lines(), *_search_lines(sweep, unfinished)]:
        console.say(line)
    if line := _worker_line(sweep, states):
        console.say(line)
    if not states:
        console.say("no run is planned yet: go on with the mupsweep run that made the sweep")
    elif not unfinished:
        console.say(f"all planned runs have ended; what they say: mupsweep transfer {quote(str(sweep.path))}")
    for row, folder, status in states:
        silence = folder.seconds_since_status() if status["status"] == RUNNING else 0.0
        if silence > max(SILENT_SECONDS, 3 * seconds_per_row(row, status)) and (holder := folder.holder()):
            console.say(
                f"silent for {silence / 60:.0f} min: {row['run_id']}: its worker ({holder}) lives but shows no "
                "progress; if that goes on, kill it and run the same command again"
            )
        if status["status"] == FAILED:
            console.say(f"failed: {row['run_id']}: {status.get('error', '')} (see {folder.log_path})")
    if counts[FAILED]:
        console.say("the command that made the sweep tries failed runs again")


def _worker_line(sweep: SweepDir, states: Iterable[RunState]) -> str | None:
    """The processes that train outside of Slurm's jobs of the sweep, and how to stop them."""
    running = [row["run_id"] for row, _, status in states if status["status"] == RUNNING]
    jobs = {str(job["job"]) for job in sweep.read_jobs()}
    outside = [w for w in living(sweep, running) if (w.slurm_job or "").partition("_")[0] not in jobs]
    if not outside:
        return None
    names = [str(worker) for worker in outside[:MAX_WORKERS]]
    if more := len(outside) - len(names):
        names.append(f"{more} more")
    return f"trained by {', '.join(names)}; mupsweep cancel {quote(str(sweep.path))} stops those of this machine"


def time_left(states: Iterable[RunState]) -> str | None:
    """How long the open runs take at the speed of those that run now; None where none runs."""
    remaining, speed, last_round = 0.0, 0.0, 0
    for row, _, status in states:
        if status["status"] in (RUNNING, PENDING):
            remaining += row.get("flops", 1.0)
            last_round = max(last_round, row.get("round", 0))
        if status["status"] == RUNNING:
            remaining -= flops_done(row, status)
            speed += flops_per_second(row, status)
    return left_text(remaining / speed, last_round) if speed else None


def seconds_per_row(row: Mapping[str, Any], status: Mapping[str, Any]) -> float:
    """How long a running run takes from one row of its metrics to the next; 0 while its speed is not measured."""
    speed = status.get("tokens_per_second")
    rows = max(1, min(METRICS_ROWS, status.get("steps", METRICS_ROWS)))
    return row["tokens"] / rows / speed if speed and row.get("tokens") else 0.0


def _run_table(states: Sequence[RunState], queue: slurm_queue.Queue) -> Table:
    """A row per run; jobs have a column where Slurm has some."""
    table = table_of(
        *("run", "variant", "status", "step", "loss", "tok/s", "val loss"), *(["job"] if queue.runs else [])
    )
    for row, folder, status in states:
        loss, speed = status.get("train_loss"), status.get("tokens_per_second")
        final = (folder.summary() or {}).get("val_loss") if status["status"] == DONE else None
        table.add_row(
            row["run_id"],
            "/".join(label_of(row)[1:]),
            status["status"],
            f"{status['step']}/{status['steps']}" if "steps" in status else "",
            "" if loss is None else f"{loss:.3f}",
            "" if speed is None else f"{speed:,.0f}",
            "" if final is None else f"{final:.4f}",
            *([str(queue.runs.get(row["run_id"], ""))] if queue.runs else []),
        )
    return table


def _size_table(states: Iterable[RunState]) -> Table:
    """Counts of runs by state, a row per variant and size."""
    table = table_of("variant", "width", "depth", *STATES)
    sizes: dict[tuple[Any, ...], Counter[str]] = defaultdict(Counter)
    for row, _, status in states:
        sizes["/".join(label_of(row)), row["width"], row["depth"]][status["status"]] += 1
    for size, counts in sorted(sizes.items()):
        table.add_row(*map(str, size), *(str(counts[state] or "") for state in STATES))
    return table


def is_over(sweep: SweepDir) -> bool:
    """Whether every planned run has a result and no search is going to add further runs."""
    plan = sweep.read_plan()
    if not plan or any(sweep.run(row["run_id"]).status()["status"] not in FINISHED for row in plan):
        return False
    config = _searching(sweep)
    if config is None:
        return True
    return not any(state.proposals for states in _search_states(config, sweep).values() for state in states)


def _searching(sweep: SweepDir) -> SweepConfig | None:
    """The config of a sweep with an adaptive search, or None for a grid."""
    try:
        config = from_tree(sweep.read_config(), to_read=True)
    except MupsweepError:  # the next `mupsweep run` reports a damaged config
        return None
    return None if config.sweep.search == GRID else config


def _search_states(config: SweepConfig, sweep: SweepDir) -> SearchStates:
    """The state of the search at every size, by variant."""
    from mupsweep.store.results import read_runs
    from mupsweep.sweep.search import search_states  # imports scipy

    return search_states(config.variants, read_runs([sweep]), config.sweep, config.analysis)


def _search_lines(sweep: SweepDir, unfinished: int) -> Iterable[str]:
    """The state of an adaptive search, a line per variant and size, or one while runs of its round are unfinished."""
    config = _searching(sweep)
    if config is None:
        return
    if unfinished:
        number = max((row.get("round", 0) for row in sweep.read_plan()), default=0)
        which = f"round {number}" if number else "this round"
        yield f"adaptive search: {counted(unfinished, 'run')} of {which} left; more may follow"
        return
    for label, states in _search_states(config, sweep).items():
        for state in states:
            r_n, r_L = state.ratios
            next_round = f"; the next round trains {counted(len(state.proposals), 'run')}" if state.proposals else ""
            yield f"adaptive search, {'/'.join(label)}, width x{r_n:g}, depth x{r_L:g}: {state.reason}{next_round}"


def _queue(sweep: SweepDir) -> slurm_queue.Queue:
    """The jobs of a sweep in Slurm; empty, with a line on stderr, where Slurm cannot be asked."""
    try:
        return slurm_queue.of_sweep(sweep.read_jobs())
    except RecordError as error:
        print(f"{error}; the jobs of this sweep are not shown", file=sys.stderr)
        return slurm_queue.Queue()


def _counts(states: Iterable[RunState]) -> dict[str, int]:
    """Number of runs in each state."""
    counts = Counter(status["status"] for _, _, status in states)
    return {state: counts[state] for state in STATES}
