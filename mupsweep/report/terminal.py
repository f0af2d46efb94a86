"""What commands print: tables for people, JSON for scripts (design section 9)."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from rich.table import Table

from mupsweep import squeue
from mupsweep.axes import label_of
from mupsweep.build import TensorRule, audit, multipliers, rule_record, rules
from mupsweep.config import GRID, SweepConfig, from_tree
from mupsweep.cost import FLOPS_PER_SECOND, duration, si
from mupsweep.environment import accelerator, cores
from mupsweep.errors import ConfigError, MupsweepError, RecordError, counted
from mupsweep.identity import digest_of, refuse_namesakes
from mupsweep.optimizers.muon import SHAPE_FACTORS, Muon, convert
from mupsweep.plan import Recipe, RunSpec, corpus_remarks, load, next_round, plan, recipe, sweep_name
from mupsweep.records import DIVERGED, DONE, FAILED, FINISHED, PENDING, RUNNING, SweepDir
from mupsweep.report.console import console_of, table_of
from mupsweep.scaling import Monomial, Role, Rule, symbolic

if TYPE_CHECKING:
    from mupsweep.rounds import Looks

SILENT_SECONDS = 300.0  # a worker gives a sign of life every half minute, unless a step takes longer
RULE_KEYS = ("multiplier", "init_std", "lr", "weight_decay", "eps")


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
    seconds = sum(r.cost.seconds(r.recipe.steps, device) for r in left) / lanes
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
        on_one = sum(r.cost.seconds(r.recipe.steps, "cuda") for r in left)
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
        grid.max_runs * made.cost(made.size(*at)).flops for made in map(recipe, config.variants) for at in grid.ratios
    ]
    flops = min(sum(most), math.inf if grid.max_flops is None else grid.max_flops)
    return (
        f"adaptive search: {'only the first round is shown' if first else 'later rounds are not shown'}; which runs "
        f"follow, the losses say. It ends when every optimum is known to +-{grid.half_width:g} octaves, or "
        f"after {counted(grid.max_runs, 'run')} of a size: at most {counted(grid.max_runs * len(most), 'run')}, "
        f"{si(flops)}FLOPs"
    )


def show_rules(config: SweepConfig, as_json: bool, per_tensor: bool) -> None:
    """The scaling rules of every variant: symbols per role, numbers per size, and the audit."""
    lrs = sorted(config.sweep.log2_lrs)
    base_lr = 2.0 ** lrs[len(lrs) // 2]
    made = [recipe(variant) for variant in config.variants]
    documents = [_rules_document(one, config, base_lr) for one in made]
    if as_json:
        print(json.dumps(documents[0] if len(documents) == 1 else documents, indent=2))
        return
    console = console_of()
    for one in made:
        console.print(f"\n{'/'.join(one.variant.label)}", style="bold")
        symbols = list(_symbols(one))
        names = sorted({name for *_, thresholds in symbols for name in thresholds})
        table = table_of("role", "optimizer", "multiplier", "init std", "LR", "weight decay", "eps", *names)
        for role, part, rule, thresholds in symbols:
            entries = [getattr(rule, key) for key in RULE_KEYS] + [thresholds.get(name, "") for name in names]
            table.add_row(role.value, part, *map(str, entries))
        console.show(table)
        for r_n, r_L in config.sweep.ratios:
            size = one.size(r_n, r_L)
            rows = rules(one, size, base_lr)
            attention = multipliers(one, size).attention
            console.print(
                f"width {size.width} (x{r_n:g}), depth {size.depth} (x{r_L:g}), base LR 2^{lrs[len(lrs) // 2]:g}, "
                f"attention scale {attention:.4g}"
            )
            console.show(_rule_table(rows, per_tensor))
            if conventions := muon_conventions(one, rows):
                console.print("the LR with which the other conventions of Muon take the same step:")
                console.show(_convention_table(conventions))
        for note in audit(one):
            console.say(f"note: {note}")
    console.say("audit: every tensor has one role, one optimizer and one LR; no contradiction found")


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
    return config is None or not any(one.wanted for looks in _survey(config, sweep).values() for one in looks)


def _searching(sweep: SweepDir) -> SweepConfig | None:
    """The config of a sweep that searches; None where it does not."""
    try:
        config = from_tree(sweep.read_config())
    except MupsweepError:  # of a damaged config, the next run of the command tells
        return None
    return None if config.sweep.search == GRID else config


def _survey(config: SweepConfig, sweep: SweepDir) -> Looks:
    """Where a search stands, by variant."""
    from mupsweep.results import read_runs
    from mupsweep.rounds import survey  # which needs scipy

    return survey(config.variants, read_runs([sweep]), config.sweep)


def _search_lines(sweep: SweepDir, left: int) -> Iterable[str]:
    """Where a search stands: `left` runs of its round are not finished."""
    config = _searching(sweep)
    if config is None:
        return
    if left:
        yield f"adaptive search: {counted(left, 'run')} of this round left; more may follow"
        return
    for label, looks in _survey(config, sweep).items():
        for one in looks:
            wanted = f"; the next round trains {counted(len(one.wanted), 'run')}" if one.wanted else ""
            r_n, r_L = one.ratios
            yield f"adaptive search, {'/'.join(label)}, width x{r_n:g}, depth x{r_L:g}: {one.reason}{wanted}"


def _queue(sweep: SweepDir) -> squeue.Queue:
    """What Slurm holds of a sweep; where it cannot be asked, nothing but a line that says so."""
    try:
        return squeue.of_sweep(sweep.read_jobs())
    except RecordError as error:
        print(f"{error}; the jobs of this sweep are not shown", file=sys.stderr)
        return squeue.Queue()


def _rules_document(one: Recipe, config: SweepConfig, base_lr: float) -> dict[str, Any]:
    model, optimizer, parametrization = one.variant.names
    roles = {}
    for role, part, rule, thresholds in _symbols(one):
        roles[role.value] = {
            "optimizer": part,
            "multiplier": rule.multiplier.exponents,
            "init_var": (rule.init_std**2).exponents,
            **{key: getattr(rule, key).exponents for key in ("lr", "weight_decay", "eps")},
            "thresholds": {name: monomial.exponents for name, monomial in thresholds.items()},
        }
    sizes = []
    for r_n, r_L in config.sweep.ratios:
        size = one.size(r_n, r_L)
        rows = rules(one, size, base_lr)
        sizes.append(
            {
                "width": size.width,
                "depth": size.depth,
                "width_ratio": float(r_n),
                "depth_ratio": float(r_L),
                "attention_scale": multipliers(one, size).attention,
                "tensors": [rule_record(row) for row in rows],
                "muon_conventions": muon_conventions(one, rows),
            }
        )
    return {
        "model": model,
        "optimizer": optimizer,
        "parametrization": parametrization,
        "roles": roles,
        "sizes": sizes,
        "audit": audit(one),
    }


def _symbols(one: Recipe) -> Iterable[tuple[Role, str, Rule, dict[str, Monomial]]]:
    """(role, optimizer, rule as monomials, that of every threshold beside eps)."""
    for role in Role:
        optimizer = next(p.optimizer for p in one.parts if role in p.optimizer.takes)
        rule = symbolic(one.parametrization, optimizer.update_law(), role)
        decay = symbolic(one.parametrization, optimizer.decay_law(), role).weight_decay
        laws = {name: threshold.law for name, threshold in optimizer.thresholds().items()}
        scaled = {name: symbolic(one.parametrization, law, role).eps for name, law in laws.items()}
        yield role, optimizer.name, replace(rule, weight_decay=decay, eps=scaled.pop("eps")), scaled


def _rule_table(rows: Sequence[TensorRule], per_tensor: bool) -> Table:
    names = sorted({name for row in rows for name in row.thresholds})
    table = table_of(
        "tensor" if per_tensor else "role",
        "shape",
        "optimizer",
        "init std",
        "multiplier",
        "LR",
        "weight decay",
        "LR x decay",
        "eps",
        *names,
    )
    grouped: dict[tuple[Any, ...], list[TensorRule]] = defaultdict(list)
    for row in rows:
        name = row.name if per_tensor else row.role.value
        numbers = (row.init, row.init_std, row.multiplier, row.lr, row.weight_decay, row.eps)
        grouped[name, row.shape, row.optimizer, *numbers].append(row)
    for (name, shape, optimizer, *_), members in grouped.items():
        one = members[0]
        std = f"{one.init_std:.4g}" if one.init.value == "normal" else one.init.value
        numbers = (one.multiplier, one.lr, one.weight_decay, one.decay_per_step, one.eps)
        others = (f"{one.thresholds[n]:.4g}" if n in one.thresholds else "" for n in names)
        table.add_row(name, "x".join(map(str, shape)), optimizer, std, *(f"{x:.4g}" for x in numbers), *others)
    return table


def muon_conventions(one: Recipe, rows: Sequence[TensorRule]) -> list[dict[str, Any]]:
    """For every shape that a Muon without further parts steps, the LR of the same step in each convention."""
    optimizers = {role: p.optimizer for p in reversed(one.parts) for role in p.optimizer.takes}
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        muon = optimizers[row.role]
        if isinstance(muon, Muon) and not muon.composed:
            n_out, n_in = row.shape[::-1] if row.role is Role.INPUT else row.shape
            lrs = {target: convert(row.lr, muon.scaling, target, n_out, n_in) for target in SHAPE_FACTORS}
            found[n_out, n_in, row.lr] = {"n_out": n_out, "n_in": n_in, "scaling": muon.scaling, **lrs}
    return list(found.values())


def _convention_table(conventions: Sequence[dict[str, Any]]) -> Table:
    torchs = {"jordan": " (torch: original)", "kimi": " (torch: match_rms_adamw)"}
    table = table_of("n_out x n_in", *(name + torchs.get(name, "") for name in SHAPE_FACTORS))
    for row in conventions:
        table.add_row(f"{row['n_out']}x{row['n_in']}", *(f"{row[name]:.4g}" for name in SHAPE_FACTORS))
    return table


def _by_size(runs: Sequence[RunSpec]) -> dict[tuple[Any, ...], list[RunSpec]]:
    grouped: dict[tuple[Any, ...], list[RunSpec]] = defaultdict(list)
    for run in sorted(runs, key=lambda r: (r.recipe.variant.label, r.size)):
        grouped[run.recipe.variant.label, run.size].append(run)
    return grouped


def _counts(states: Iterable[tuple[Any, Any, dict[str, Any]]]) -> dict[str, int]:
    counts = Counter(status["status"] for _, _, status in states)
    return {name: counts[name] for name in (DONE, DIVERGED, RUNNING, PENDING, FAILED)}
