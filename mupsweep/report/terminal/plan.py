"""What commands print: tables for people, JSON for scripts."""

from __future__ import annotations

import contextlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mupsweep.analysis.labels import DIVERGED, DONE
from mupsweep.errors import ConfigError, RecordError
from mupsweep.formatting import counted, duration, si
from mupsweep.report.terminal.console import console_of, table_of
from mupsweep.store.environment import accelerator, cores
from mupsweep.store.run_dir import PENDING
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep.config import GRID, SweepConfig, from_tree
from mupsweep.sweep.cost import FLOPS_PER_SECOND
from mupsweep.sweep.plan import corpus_remarks, load, next_round, plan, sweep_name
from mupsweep.sweep.run_identity import digest_of, refuse_namesakes
from mupsweep.sweep.run_spec import RunSpec, resolve


def show_plan(config: SweepConfig, as_json: bool) -> None:
    """The runs of a sweep before it starts; those that the sweep's folder already has count as done."""
    runs = plan(config)
    sweep = SweepDir(Path(config.out) / sweep_name(config))
    exists = sweep.plan_path.is_file()
    searches = config.sweep.search != GRID
    if searches and exists:
        runs = [*load(sweep), *next_round(config, sweep)]
    status = {r.run_id: sweep.run(r.run_id).status()["status"] if exists else PENDING for r in runs}
    left = [r for r in runs if status[r.run_id] not in (DONE, DIVERGED)]
    device = accelerator()
    lanes = _cpu_lanes(config.launcher) if device == "cpu" else 1
    seconds = sum(r.cost.seconds(r.resolved.steps, device) for r in left) / lanes
    if as_json:
        keys = ("run_id", "width", "depth", "log2_lr", "seed", "parametrization", "optimizer", "model")
        print(
            json.dumps(
                {
                    "runs": [
                        {
                            **{k: v for k, v in r.row().items() if k in (*keys, "parameters", "tokens", "flops")},
                            "status": status[r.run_id],
                        }
                        for r in runs
                    ],
                    "totals": {
                        "runs": len(runs),
                        "flops": sum(r.cost.flops for r in runs),
                        "tokens": sum(r.cost.tokens for r in runs),
                        "seconds_estimate": seconds,
                    },
                    "search": config.sweep.search,
                }
            )
        )
        return
    console = console_of()
    table = table_of("variant", "width", "depth", "runs", "done", "parameters", "tokens/run", "FLOPs/run", "memory/run")
    for (label, size), members in _by_size(runs).items():
        one = members[0]
        done = sum(status[r.run_id] in (DONE, DIVERGED) for r in members)
        table.add_row(
            "/".join(label),
            str(size.width),
            str(size.depth),
            str(len(members)),
            str(done),
            si(one.cost.parameters),
            si(one.cost.tokens),
            si(one.cost.flops),
            si(one.cost.memory) + "B",
        )
    console.show(table)
    console.say(_grid_words(runs))
    total = sum(r.cost.flops for r in left)
    elsewhere = ""
    if device == "cpu" and seconds > 3600:
        on_one = sum(r.cost.seconds(r.resolved.steps, "cuda") for r in left)
        elsewhere = f", {duration(on_one)} on a GPU at {si(FLOPS_PER_SECOND['cuda'])}FLOP/s"
    console.say(
        f"{len(left)} of {counted(len(runs), 'run')} to train, {si(total)}FLOPs, roughly {duration(seconds)} on "
        f"{lanes} {device} worker(s) at {si(FLOPS_PER_SECOND[device])}FLOP/s each{elsewhere}; "
        "while it runs you see the measured time left"
        if left
        else f"nothing to train: {counted(len(runs), 'run')} finished"
    )
    if searches:
        console.say(_search_remark(config, first=not exists))
    for remark in (*corpus_remarks(runs), *(_refusals(config, sweep) if exists else ())):
        console.say(f"note: {remark}")
    console.say(f"folder: {sweep.path}")


def _refusals(config: SweepConfig, sweep: SweepDir) -> Iterable[str]:
    """Why `mupsweep run` would refuse: other settings under a name that the sweep holds already."""
    with contextlib.suppress(RecordError):  # a damaged config is written anew
        held = from_tree(sweep.read_config()).variants
        try:
            refuse_namesakes({digest_of(one): one for one in (*held, *config.variants)}.values(), sweep)
        except ConfigError as error:
            yield f"mupsweep run would refuse this: {error}"


def _grid_words(runs: Sequence[RunSpec]) -> str:
    """The LRs themselves, beside the octaves that they are typed in."""
    lrs, seeds = sorted({run.log2_lr for run in runs}), len({run.seed for run in runs})
    ends = sorted({lrs[0], lrs[-1]})
    numbers, octaves = " to ".join(f"{2**x:.3g}" for x in ends), " to ".join(f"2^{x:g}" for x in ends)
    return f"base LRs: {len(lrs)}, {numbers} ({octaves}); seeds: {seeds}"


def _cpu_lanes(launcher: Mapping[str, Any]) -> int:
    """How many runs a launcher trains at once on the cores of this machine; others train one after the other."""
    if launcher.get("name") != "local":
        return 1
    width = int(launcher.get("threads", 1)) * int(launcher.get("devices_per_run", 1))
    return int(launcher.get("slots_per_device") or max(1, cores() // width))


def _search_remark(config: SweepConfig, first: bool) -> str:
    """What the runs that are shown are of a search."""
    grid = config.sweep
    most = [
        grid.max_runs * made.cost(made.size(*at)).flops for made in map(resolve, config.variants) for at in grid.ratios
    ]
    flops = min(sum(most), math.inf if grid.max_flops is None else grid.max_flops)
    return (
        f"adaptive search: {'only the first round is shown' if first else 'later rounds are not shown'}; which runs "
        f"follow, the losses say. It ends when every optimum is known to +-{grid.half_width:g} octaves, or "
        f"after {counted(grid.max_runs, 'run')} of a size: at most {counted(grid.max_runs * len(most), 'run')}, "
        f"{si(flops)}FLOPs"
    )


def _by_size(runs: Sequence[RunSpec]) -> dict[tuple[Any, ...], list[RunSpec]]:
    grouped: dict[tuple[Any, ...], list[RunSpec]] = defaultdict(list)
    for run in sorted(runs, key=lambda r: (r.resolved.variant.label, r.size)):
        grouped[run.resolved.variant.label, run.size].append(run)
    return grouped
