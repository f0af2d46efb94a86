"""The state of a sweep's runs, its search and its jobs."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from shlex import quote
from typing import TYPE_CHECKING, Any

from mupsweep.analysis.labels import DIVERGED, DONE, label_of
from mupsweep.errors import MupsweepError, RecordError
from mupsweep.formatting import counted
from mupsweep.report.terminal.console import console_of, table_of
from mupsweep.store import slurm_queue
from mupsweep.store.run_dir import FAILED, FINISHED, PENDING, RUNNING
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep.config import GRID, SweepConfig, from_tree

if TYPE_CHECKING:
    from mupsweep.sweep.search import SearchStates

SILENT_SECONDS = 300.0  # a worker gives a sign of life every half minute, unless a step takes longer


def show_status(sweep: SweepDir, per_run: bool, as_json: bool) -> None:
    """How far a sweep is."""
    rows = [(row, sweep.run(row["run_id"])) for row in sweep.read_plan()]
    states = [(row, folder, folder.state()) for row, folder in rows]
    queue = _queue(sweep)
    if as_json:
        jobs = {run_id: asdict(job) for run_id, job in queue.runs.items()}
        runs = [{**row, **status, "job": jobs.get(row["run_id"])} for row, _, status in states]
        print(json.dumps({"runs": runs, "totals": _counts(states)}))
        return
    console = console_of()
    if per_run:
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
    else:
        table = table_of("variant", "width", "depth", DONE, DIVERGED, RUNNING, PENDING, FAILED)
        sizes: dict[tuple[Any, ...], Counter[str]] = defaultdict(Counter)
        for row, _, status in states:
            key = ("/".join(label_of(row)), row["width"], row["depth"])
            sizes[key][status["status"]] += 1
        for key, counts in sorted(sizes.items()):
            table.add_row(*map(str, key), *(str(counts[s] or "") for s in (DONE, DIVERGED, RUNNING, PENDING, FAILED)))
    console.show(table)
    counts = _counts(states)
    left = sum(counts[s] for s in (RUNNING, PENDING, FAILED))
    console.print("  ".join(f"{name} {count}" for name, count in counts.items()))
    for line in [*queue.lines(), *_search_lines(sweep, left)]:
        console.say(line)
    if states and not left:
        console.say(f"all planned runs have ended; what they say: mupsweep transfer {quote(str(sweep.path))}")
    for row, folder, status in states:
        silence = folder.silence() if status["status"] == RUNNING else None
        if silence is not None and silence[0] > SILENT_SECONDS:
            console.say(
                f"silent for {silence[0] / 60:.0f} min: {row['run_id']}: its worker ({silence[1]}) lives but has not "
                "finished a step; if that goes on, kill it and run the same command again"
            )
        if status["status"] == FAILED:
            console.say(f"failed: {row['run_id']}: {status.get('error', '')} (see {folder.log_path})")


def is_over(sweep: SweepDir) -> bool:
    """Whether every planned run has its result, and no search wants further ones."""
    plan = sweep.read_plan()
    if not plan or any(sweep.run(row["run_id"]).status()["status"] not in FINISHED for row in plan):
        return False
    config = _searching(sweep)
    return config is None or not any(
        state.proposals for states in _search_states(config, sweep).values() for state in states
    )


def _searching(sweep: SweepDir) -> SweepConfig | None:
    """The config of a sweep that searches; None where it does not."""
    try:
        config = from_tree(sweep.read_config())
    except MupsweepError:  # of a damaged config, the next run of the command tells
        return None
    return None if config.sweep.search == GRID else config


def _search_states(config: SweepConfig, sweep: SweepDir) -> SearchStates:
    """The state of a search, by variant."""
    from mupsweep.store.results import read_runs
    from mupsweep.sweep.search import search_states  # which needs scipy

    return search_states(config.variants, read_runs([sweep]), config.sweep)


def _search_lines(sweep: SweepDir, left: int) -> Iterable[str]:
    """Where a search stands: `left` runs of its round are not finished."""
    config = _searching(sweep)
    if config is None:
        return
    if left:
        yield f"adaptive search: {counted(left, 'run')} of this round left; more may follow"
        return
    for label, states in _search_states(config, sweep).items():
        for state in states:
            following = f"; the next round trains {counted(len(state.proposals), 'run')}" if state.proposals else ""
            r_n, r_L = state.ratios
            yield f"adaptive search, {'/'.join(label)}, width x{r_n:g}, depth x{r_L:g}: {state.reason}{following}"


def _queue(sweep: SweepDir) -> slurm_queue.Queue:
    """What Slurm holds of a sweep; where it cannot be asked, nothing but a line that says so."""
    try:
        return slurm_queue.of_sweep(sweep.read_jobs())
    except RecordError as error:
        print(f"{error}; the jobs of this sweep are not shown", file=sys.stderr)
        return slurm_queue.Queue()


def _counts(states: Iterable[tuple[Any, Any, dict[str, Any]]]) -> dict[str, int]:
    counts = Counter(status["status"] for _, _, status in states)
    return {name: counts[name] for name in (DONE, DIVERGED, RUNNING, PENDING, FAILED)}
