"""The runs of a sweep and their cost, as `mupsweep plan` prints them: tables for people, JSON for scripts."""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from mupsweep.analysis.labels import DIVERGED, DONE
from mupsweep.errors import ConfigError, RecordError
from mupsweep.formatting import counted, duration, si, verb
from mupsweep.report.terminal.console import console_of, table_of
from mupsweep.store.environment import accelerator, cores
from mupsweep.store.run_dir import PENDING
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep.config import GRID, SweepConfig, from_tree
from mupsweep.sweep.cost import FLOPS_PER_SECOND
from mupsweep.sweep.launcher_options import LauncherOptions
from mupsweep.sweep.plan import corpus_remarks, grid_remarks, is_begun, load, next_round, plan, sweep_dir
from mupsweep.sweep.run_identity import digest_of, refuse_namesakes
from mupsweep.sweep.run_spec import RunSpec, resolve
from mupsweep.sweep.twins import distinct

JSON_KEYS = (
    *("run_id", "width", "depth", "log2_lr", "seed", "parametrization", "optimizer", "model"),
    *("parameters", "tokens", "flops"),
)


def show_plan(config: SweepConfig, as_json: bool) -> None:
    """Print the runs of a sweep before it starts; runs that its folder already has count as done."""
    runs = plan(config)
    sweep = sweep_dir(config)
    exists = sweep.plan_path.is_file()
    searches = config.sweep.search != GRID
    if searches and exists:
        runs = [*(run for run in load(sweep) if not run.validation), *next_round(config, sweep)]
    status = {r.run_id: sweep.run(r.run_id).status()["status"] if exists else PENDING for r in runs}
    open_runs = [r for r in runs if not exists or sweep.run(r.run_id).is_open()]
    status |= {r.run_id: PENDING for r in open_runs if status[r.run_id] in (DONE, DIVERGED)}  # a damaged summary
    open_ids = {r.run_id for r in open_runs}
    paid = distinct(sorted(runs, key=lambda r: r.run_id in open_ids))  # a finished run spares its twins
    to_train = [r for r in paid if r.run_id in open_ids]
    if as_json:
        device = _device(config.launcher_options)
        seconds = _seconds(to_train, config.launcher_options, device)
        print(json.dumps(_document(runs, paid, status, seconds, config.sweep.search)))
        return
    console = console_of()
    console.show(_size_table(runs, status))
    for line in _grid_lines(runs):
        console.say(line)
    spared = len(open_runs) - len(to_train)
    if to_train:
        price = price_text(to_train, config.launcher_options)
        console.say(
            f"{len(to_train)} of {counted(len(runs), 'run')} to train, {price}; "
            "while it runs you see the measured time left"
        )
    else:
        console.say(f"nothing to train: {counted(len(runs) - spared, 'run')} finished")
    if spared:
        at_size = "at its size" if spared == 1 else "at their size"
        console.say(
            f"{counted(spared, 'run')} {verb(spared, 'need')} no training: {at_size} two parametrizations are the same"
        )
    if searches:
        console.say(_search_remark(config, runs, first=not exists))
    remarks = [*_device_remarks(config.launcher_options), *grid_remarks(runs), *corpus_remarks(runs)]
    if exists and is_begun(sweep):
        remarks += _refusals(config, sweep)
    for remark in remarks:
        console.say(f"note: {remark}")
    console.say(f"folder: {sweep.path}")


def price_text(runs: Sequence[RunSpec], launcher: LauncherOptions) -> str:
    """What some runs cost: FLOPs, and the time on what this machine has, and on a GPU if that is long."""
    device = _device(launcher)
    seconds = _seconds(runs, launcher, device)
    if seconds is None:
        return "each as long as your program takes"
    elsewhere = ""
    if device == "cpu" and seconds > 3600:
        on_one_gpu = sum(run.cost.seconds(run.resolved.steps, "cuda") for run in runs)
        elsewhere = f", {duration(on_one_gpu)} on a GPU at {si(FLOPS_PER_SECOND['cuda'])}FLOP/s"
    lanes = _lanes(launcher, device)
    return (
        f"{si(sum(run.cost.flops for run in runs))}FLOPs, roughly {duration(max(seconds, 1.0))} on "
        f"{counted(lanes, f'{device} worker')} at {si(FLOPS_PER_SECOND[device])}FLOP/s{' each' if lanes > 1 else ''}"
        f"{elsewhere}"
    )


def _device(launcher: LauncherOptions) -> str:
    """The kind of device that a time is estimated for: that of the launcher's devices, else of this machine's."""
    named = launcher.device_kind
    return named if named in FLOPS_PER_SECOND else accelerator()


def _device_remarks(launcher: LauncherOptions) -> Iterator[str]:
    """A remark on devices that are named and that this machine does not seem to have."""
    if launcher.name == "local" and launcher.device_kind not in (None, "cpu", accelerator()):
        yield (
            f"launcher.devices names {launcher.device_kind}, and this machine seems to have {accelerator()} alone: "
            "mupsweep run stops at once here"
        )


def _seconds(runs: Sequence[RunSpec], launcher: LauncherOptions, device: str) -> float | None:
    """Wall time of some runs on what this machine has; None where a program's is unknown."""
    if not all(run.cost.known for run in runs):
        return None
    return sum(run.cost.seconds(run.resolved.steps, device) for run in runs) / _lanes(launcher, device)


def _lanes(launcher: LauncherOptions, device: str) -> int:
    """Return how many runs a launcher trains at once on this machine; only the local one has workers on its cores."""
    if device != "cpu" or launcher.name != "local":
        return 1
    return launcher.slots_per_device or max(1, cores() // (launcher.threads * launcher.devices_per_run))


def _document(
    runs: Sequence[RunSpec], paid: Sequence[RunSpec], status: Mapping[str, str], seconds: float | None, search: str
) -> dict[str, Any]:
    """What `mupsweep plan --json` prints; `paid` are the runs that are trained, without their twins."""
    records = []
    for run in runs:
        row = run.row()
        active = {key: row[key] for key in ("active_parameters",) if key in row}  # of a mixture of experts
        records.append({**{key: row.get(key) for key in JSON_KEYS}, **active, "status": status[run.run_id]})
    return {
        "runs": records,
        "totals": {
            "runs": len(runs),
            "flops": sum(r.cost.flops for r in paid) if all(r.cost.known for r in paid) else None,
            "tokens": sum(r.cost.tokens for r in paid),
            "seconds_estimate": seconds,
        },
        "search": search,
    }


def _size_table(runs: Sequence[RunSpec], status: Mapping[str, str]) -> Table:
    """A row per variant and size, with the number of runs and the cost of one."""
    table = table_of("variant", "width", "depth", "runs", "done", "parameters", "tokens/run", "FLOPs/run", "memory/run")
    for (label, size), members in _by_size(runs).items():
        cost = members[0].cost
        done = sum(status[r.run_id] in (DONE, DIVERGED) for r in members)
        active = f" ({si(cost.active_parameters)} active)" if cost.active_parameters else ""
        table.add_row(
            "/".join(label),
            str(size.width),
            str(size.depth),
            str(len(members)),
            str(done),
            si(cost.parameters) + active if cost.known else "",
            si(cost.tokens),
            si(cost.flops) if cost.known else "",
            "" if members[0].resolved.trainer.runs_program else si(cost.memory) + "B",
        )
    return table


def _refusals(config: SweepConfig, sweep: SweepDir) -> Iterable[str]:
    """Why `mupsweep run` would refuse this config: the sweep already has other settings under one of its names."""
    with contextlib.suppress(RecordError):  # mupsweep run replaces a damaged config
        try:
            stored = from_tree(sweep.read_config(), config.allow_imports).variants
            by_digest = {digest_of(variant): variant for variant in (*stored, *config.variants)}
            refuse_namesakes(by_digest.values(), sweep)
        except ConfigError as error:
            yield f"mupsweep run would refuse this: {error}"


def _grid_lines(runs: Sequence[RunSpec]) -> Iterator[str]:
    """The number and range of LRs, as values beside the powers of two of the config, and the number of seeds.

    Optimizers with the same LRs share a line.
    """
    lrs_of: dict[str, set[float]] = defaultdict(set)
    for run in runs:
        lrs_of[run.resolved.optimizer.name].add(run.log2_lr)
    seeds = len({run.seed for run in runs})
    names_of: dict[tuple[float, ...], list[str]] = defaultdict(list)
    for name, values in lrs_of.items():
        names_of[tuple(sorted(values))].append(name)
    for lrs, names in names_of.items():
        ends = sorted({lrs[0], lrs[-1]})
        numbers, octaves = " to ".join(f"{2**x:.3g}" for x in ends), " to ".join(f"2^{x:g}" for x in ends)
        of_which = "" if len(names_of) == 1 else f" of {', '.join(sorted(names))}"
        yield f"base LRs{of_which}: {len(lrs)}, {numbers} ({octaves}); seeds: {seeds}"


def _search_remark(config: SweepConfig, runs: Sequence[RunSpec], first: bool) -> str:
    """The rounds of the search that the printed runs belong to, and an upper bound of its cost.

    A size begins with as many runs as its first LRs are, also where `max_runs` is less.
    """
    grid = config.sweep
    n_runs = Counter((run.resolved.digest, run.size) for run in runs)
    most, flops, is_known = 0, 0.0, True
    for resolved in (resolve(variant, listed=grid.listed) for variant in config.variants):
        for size in (resolved.size(*ratios) for ratios in grid.ratios):
            at_size, cost = max(grid.max_runs, n_runs[resolved.digest, size]), resolved.cost(size)
            most += at_size
            flops += at_size * cost.flops
            is_known = is_known and cost.known
    flops = min(flops, math.inf if grid.max_flops is None else grid.max_flops)
    limit = counted(max([grid.max_runs, *n_runs.values()]), "run")
    return (
        f"adaptive search: {'only the first round is shown' if first else 'later rounds are not shown'}; the losses "
        f"decide which runs follow. It ends when the best LR of the largest size is known to +-{grid.half_width:g} "
        f"octaves or expected to lose at most {grid.regret:g} nats, or after {limit} of a size: "
        f"at most {counted(most, 'run')}{f', {si(flops)}FLOPs' if is_known else ''}"
    )


def _by_size(runs: Sequence[RunSpec]) -> dict[tuple[Any, ...], list[RunSpec]]:
    """The runs of every (label, size), sorted."""
    grouped: dict[tuple[Any, ...], list[RunSpec]] = defaultdict(list)
    for run in sorted(runs, key=lambda r: (r.resolved.variant.label, r.size)):
        grouped[run.resolved.variant.label, run.size].append(run)
    return grouped
