"""The plan of a sweep: its runs, each with an id that is made of what the run trains and of nothing else."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from mupsweep.analysis.labels import Label, label_of
from mupsweep.analysis.run_result import RunResult
from mupsweep.data import epochs_remark
from mupsweep.data.tokenizers import vocab_size
from mupsweep.errors import ConfigError, RecordError
from mupsweep.formatting import counted, verb
from mupsweep.models.shape import Size
from mupsweep.optimizers import Optimizer
from mupsweep.schema import refused_code
from mupsweep.store import workers
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep.config import GRID, GridConfig, SweepConfig, default_lrs, from_tree, to_tree
from mupsweep.sweep.cost import Cost
from mupsweep.sweep.run_identity import digest_of, refuse_namesakes
from mupsweep.sweep.run_spec import (
    ResolvedVariant,
    RunSpec,
    check_batch_shares,
    check_schedule,
    check_size_overrides,
    resolve,
)
from mupsweep.sweep.tensor_rules import rules
from mupsweep.sweep.twins import Twins

if TYPE_CHECKING:
    from mupsweep.sweep.size_search import SearchState


def plan(config: SweepConfig, finished: Iterable[RunResult] = ()) -> list[RunSpec]:
    """Every run of the grid, or those of a search's next round, the most expensive first. Writes nothing.

    Args:
        finished: the runs from which a search goes on, with the FLOPs that were planned for each.
    """
    grid = config.sweep
    resolved = [resolve(variant, config.launcher_options, listed=grid.listed) for variant in config.variants]
    for one in resolved:
        check_batch_shares(one, config.launcher_options)
    check_size_overrides(resolved, config)
    seeds = grid.seeds if grid.search == GRID else (*grid.seeds, *range(grid.max_seeds))
    for one in resolved:
        check_model(one, grid)
        for ratios in grid.ratios if one.training.tokens_per_parameter else ():
            check_schedule(one.at(one.size(*ratios)))
        one.trainer.check(_grid(one, grid.ratios, grid.of(one.variant.optimizer).log2_lrs, seeds))
    if grid.search != GRID:
        return _longest_first(_search_round(resolved, config, list(finished)))
    runs: list[RunSpec] = []
    for one in resolved:
        runs += _grid(one, grid.ratios, grid.of(one.variant.optimizer).log2_lrs, grid.seeds)
    return _longest_first(runs)


def check_model(resolved: ResolvedVariant, grid: GridConfig) -> None:
    """Refuse a model of somebody else's code that cannot be trained, or not at some size of the grid.

    A program builds a network of its own, so only what the rules need is checked for it.
    """
    if not resolved.model.inferred:
        return
    if not resolved.trainer.runs_program:
        resolved.model.check(resolved.size(1.0, 1.0), vocab_size(resolved.variant.data.tokenizer))
    for ratios in grid.ratios:
        rules(resolved, resolved.size(*ratios), 1.0)


def _search_round(
    resolved: Sequence[ResolvedVariant], config: SweepConfig, finished: Sequence[RunResult]
) -> list[RunSpec]:
    """The next round of a search, size by size as far as its budget reaches; the defaults draw on the budget first."""
    from mupsweep.sweep.search import search_states  # which needs numpy

    grid = config.sweep
    costs = (one.cost(one.size(*ratios)) for one in resolved for ratios in grid.ratios)
    if grid.max_flops is not None and not all(cost.known for cost in costs):
        raise ConfigError(
            f"sweep.max_flops={grid.max_flops:g}: what a program costs is known only where every entry of sweep.sizes "
            "has parameters"
        )
    remaining = math.inf if grid.max_flops is None else grid.max_flops - sum(run.flops or 0.0 for run in finished)
    affordable: list[RunSpec] = []
    # a budget goes to the defaults of every size first, and only what they leave to values of other hyperparameters
    for patient in (True, False) if grid.max_flops is not None else (False,):
        states = search_states([one.variant for one in resolved], finished, grid, config.analysis, patient)
        for runs in _runs_by_size(resolved, states):
            cost = sum(run.cost.flops for run in runs)
            if cost <= remaining:
                affordable += runs
                remaining -= cost
        if affordable:
            return [*affordable, *_free_runs(affordable, resolved, {run.run_id for run in finished})]
    if grid.max_flops is not None and not finished:
        raise ConfigError(f"sweep.max_flops={grid.max_flops:g}: no size's first round costs so little; give more")
    return []


def _free_runs(runs: Sequence[RunSpec], resolved: Sequence[ResolvedVariant], finished: set[str]) -> list[RunSpec]:
    """The twins that some runs have in the other variants: what one of them shows costs the others nothing."""
    if len(resolved) < 2:
        return []
    others = [
        replace(other, reason=f"the same training as for {'/'.join(run.resolved.variant.names)}")
        for run in runs
        for one in resolved
        if one.digest != run.resolved.digest and one.variant.change is None
        for other in _grid(one, [(run.size.width_ratio, run.size.depth_ratio)], [run.log2_lr], [run.seed])
    ]
    twins = Twins([*runs, *others])
    planned = finished | {run.run_id for run in runs}
    free = {twin.run_id: twin for run in runs for twin in twins.of(run)}
    return [twin for run_id, twin in free.items() if run_id not in planned]


def _runs_by_size(
    resolved: Iterable[ResolvedVariant], states: Mapping[Label, Sequence[SearchState]]
) -> list[list[RunSpec]]:
    """The runs that a search proposes for each size, those of the defaults first, then by rising cost."""
    sizes: list[list[RunSpec]] = []
    for one in resolved:
        for state in states[one.variant.label]:
            runs: list[RunSpec] = []
            for width_ratio, depth_ratio, log2_lr, seed in state.proposals:
                chosen = _grid(one, [(width_ratio, depth_ratio)], [log2_lr], [seed])
                runs += [replace(run, reason=state.reason) for run in chosen]
            if runs:
                sizes.append(runs)
    return sorted(sizes, key=lambda runs: (runs[0].resolved.variant.change is not None, runs[0].cost.flops))


def sweep_name(config: SweepConfig) -> str:
    """`sweep.name`, or else a name made from the choices of the variants, which does not depend on the grid."""
    if config.sweep.name is not None:
        return config.sweep.name
    defaults = [variant for variant in config.variants if variant.change is None]
    columns = zip(*(variant.names for variant in defaults), strict=True)
    readable = "-".join("+".join(dict.fromkeys(names)) for names in columns)
    digest = hashlib.sha256("".join(digest_of(v) for v in defaults).encode()).hexdigest()
    return f"{readable}-{digest[:6]}"


def sweep_dir(config: SweepConfig) -> SweepDir:
    """Return the folder that a config's sweep has, or will have."""
    return SweepDir(Path(config.out) / sweep_name(config), allow_imports=config.allow_imports)


def save(
    config: SweepConfig, header: str, sweep: SweepDir | None = None, new: Sequence[RunSpec] | None = None
) -> tuple[SweepDir, list[RunSpec]]:
    """Add the plan to the sweep's folder and return every run of the sweep, planned now or before.

    Args:
        sweep: the sweep's folder; None for the one that the config names.
        new: the runs of `plan(config)`, where they are planned already.

    Raises:
        ConfigError: the folder holds a variant of the same name with other settings.
    """
    new = plan(config) if new is None else new
    sweep = sweep_dir(config) if sweep is None else sweep
    with sweep.lock():
        stored = _stored_runs(sweep)
        planned = {run.resolved.digest: run.resolved.variant for run in [*stored, *new]}.values()
        labels = {variant.label for variant in planned}
        later = (variant for variant in config.variants if variant.label not in labels)  # to which a search may come
        variants = [*planned, *later]
        try:
            refuse_namesakes(variants, sweep)
        except ConfigError:
            if is_begun(sweep):
                raise
            stored = []  # of a start that failed before anything was trained
            variants = list(config.variants)
        if stored and config.sweep.search != GRID:
            new = next_round(config, sweep)
        if config.sweep.search != GRID:
            number = 1 + max((run.round for run in stored), default=0)
            new = [replace(run, round=number) for run in new]
        runs = {run.run_id: run for run in [*stored, *new]}
        ordered = _longest_first(runs.values())
        sweep.write_config(to_tree(replace(config, variants=tuple(variants))), header)
        sweep.write_plan(run.row() for run in ordered)
    return sweep, ordered


def next_round(config: SweepConfig, sweep: SweepDir) -> list[RunSpec]:
    """The runs that a search adds to its sweep: none while a run is unfinished.

    So its choices depend on whole rounds alone, and not on when it was interrupted.
    """
    planned = {sweep.run(row["run_id"]): row.get("flops") for row in sweep.read_plan() if not row.get("validation")}
    if any(folder.is_open() for folder in planned):
        return []
    summaries = [(folder.summary() or {}) | {"flops": flops} for folder, flops in planned.items()]
    trained = [{**row, "flops": 0.0} if "twin_of" in row else row for row in summaries]
    return plan(config, map(RunResult.of, trained))


def validation_runs(
    resolved: ResolvedVariant, ratios: tuple[float, float], log2_lrs: Iterable[float], seeds: Iterable[int]
) -> list[RunSpec]:
    """The runs that validate some LRs at one size of a variant."""
    return [replace(run, validation=True) for run in _grid(resolved, [ratios], log2_lrs, seeds)]


def extend(
    sweep: SweepDir,
    resolved: ResolvedVariant,
    ratios: tuple[float, float],
    log2_lrs: Iterable[float],
    seeds: Iterable[int],
) -> list[RunSpec]:
    """Add runs that validate an LR at one size of a variant to a sweep's plan, and return them.

    The sweep's config is not changed, nor are runs that the sweep has at this size.
    """
    new = validation_runs(resolved, ratios, log2_lrs, seeds)
    with sweep.lock():
        runs = {run.run_id: run for run in [*new, *load(sweep)]}
        sweep.write_plan(run.row() for run in _longest_first(runs.values()))
    return new


def forget_validations(sweep: SweepDir) -> list[str]:
    """Take the runs of validations out of a sweep, with all that they trained, and return their ids.

    Raises:
        RecordError: a worker trains one of them.
    """
    with sweep.lock():
        rows = sweep.read_plan()
        forgotten = [row["run_id"] for row in rows if row.get("validation")]
        for run_id in forgotten:
            if sweep.run(run_id).is_claimed():
                raise RecordError(f"{run_id} of {sweep.path} is being trained: stop the command that validates first")
        sweep.write_plan(row for row in rows if not row.get("validation"))
        for run_id in forgotten:
            shutil.rmtree(sweep.run(run_id).path, ignore_errors=True)
    return forgotten


def load(sweep: SweepDir, to_train: bool = True) -> list[RunSpec]:
    """Every run in a sweep's plan, in the order of the plan.

    Args:
        to_train: whether the runs will be trained, and must find the text that they were planned for. Runs that are
            only shown need no text, and those of `unreadable` variants are left out.
    """
    config = from_tree(sweep.read_config(), sweep.allow_imports, to_read=not to_train)
    variants = {variant.label: variant for variant in config.variants}
    left_out = {} if to_train else _foreign_variants(config)
    by_digest: dict[str, ResolvedVariant] = {}
    if to_train:
        for variant in variants.values():
            resolved = resolve(variant, config.launcher_options, listed=config.sweep.listed)
            by_digest[resolved.digest] = resolved

    @cache
    def at_size(digest: str, width_ratio: float, depth_ratio: float) -> tuple[ResolvedVariant, Size, Cost]:
        size = by_digest[digest].size(width_ratio, depth_ratio)
        return by_digest[digest].at(size), size, by_digest[digest].cost(size)

    runs, rows = [], sweep.read_plan()[::-1]
    while rows:  # each is freed as it is used: 100,000 rows take more memory than their runs
        row = rows.pop()
        digest = row["variant"]
        if left_out and label_of(row) in left_out:
            continue
        if not to_train and digest not in by_digest and label_of(row) in variants:
            by_digest[digest] = resolve(variants[label_of(row)], config.launcher_options, digest, config.sweep.listed)
        if digest not in by_digest:
            where = {variant.data.path or variant.data.name for variant in config.variants}
            where |= {str(variant.model["path"]) for variant in config.variants if "path" in variant.model}
            raise RecordError(
                f"{sweep.path} was planned on another text than {', '.join(sorted(where))} holds now, or its "
                "config.yaml was edited: choose another sweep.name, or bring the old text back"
            )
        resolved, size, cost = at_size(digest, row["width_ratio"], row["depth_ratio"])
        if size.label != row.get("size"):  # the list has another name now; the run keeps that of its plan
            size = replace(size, label=row.get("size"))
        flags = row.get("validation", False), row.get("round", 0), row.get("reason", "")
        runs.append(RunSpec(row["run_id"], resolved, size, row["log2_lr"], row["seed"], cost, *flags))
    return runs


def unreadable(sweep: SweepDir) -> dict[Label, str]:
    """The variants of a sweep that name code outside mupsweep which this command may not import, and that name."""
    return _foreign_variants(from_tree(sweep.read_config(), sweep.allow_imports, to_read=True))


def _foreign_variants(config: SweepConfig) -> dict[Label, str]:
    """The variants that name code outside mupsweep without being allowed to, and what they name."""
    unreadable = {}
    for variant in config.variants:
        refused = refused_code(asdict(variant), "config", config.allow_imports)
        if refused is not None:
            unreadable[variant.label] = refused.removeprefix("config.")
    return unreadable


def corpus_remarks(runs: Iterable[RunSpec]) -> list[str]:
    """A remark per variant whose runs read their corpus more than once, as far as the corpus's size is known."""
    ours = (run for run in runs if not run.resolved.trainer.runs_program)
    by_length = sorted(ours, key=lambda run: run.cost.tokens)
    one_per_variant = {run.resolved.digest: run for run in by_length}.values()  # the longest
    remarks = (epochs_remark(run.resolved.variant.data, run.cost.tokens) for run in one_per_variant)
    return list(dict.fromkeys(remark for remark in remarks if remark))


def grid_remarks(runs: Iterable[RunSpec]) -> list[str]:
    """A remark where most LRs of an optimizer's grid lie outside the range in which its LRs lie.

    A search may leave the range, since losses lead it there, so only its first round counts.
    """
    grids: dict[str, set[float]] = defaultdict(set)
    optimizers: dict[str, Optimizer] = {}
    for run in runs:
        if run.round <= 1 and not run.validation:
            optimizer = run.resolved.optimizer
            optimizers[optimizer.name] = optimizer
            grids[optimizer.name].add(run.log2_lr)
    remarks = []
    for name, optimizer in optimizers.items():
        low, high = optimizer.log2_lr_range or (-math.inf, math.inf)
        outside = [x for x in grids[name] if not low <= x <= high]
        if 2 * len(outside) > len(grids[name]):
            remarks.append(
                f"{name}: {len(outside)} of {counted(len(grids[name]), 'LR')} {verb(len(outside), 'lie')} outside of "
                f"2^{low:g} to 2^{high:g}, where its best LRs lie as a rule; {_grid_hint(name, optimizers, grids)}"
            )
    return remarks


def _grid_hint(name: str, optimizers: Mapping[str, Optimizer], grids: Mapping[str, Iterable[float]]) -> str:
    """The grids with which an optimizer has its own, and every other one keeps what it has."""
    lrs = {other: sorted(grids[other]) for other in optimizers} | {name: default_lrs(optimizers[name].log2_lr_range)}
    lists = [f"{other}:[{','.join(f'{x:g}' for x in values)}]" for other, values in lrs.items()]
    wanted = lists[0].partition(":")[2] if len(lists) == 1 else f"{{{','.join(lists)}}}"
    return f"to look there: 'sweep.log2_lrs={wanted}'"


def is_begun(sweep: SweepDir) -> bool:
    """Whether anything of a sweep was trained, is being trained or waits in Slurm; only then its name is taken."""
    return bool(sweep.started() or sweep.read_jobs() or workers.living(sweep, ()))


def _stored_runs(sweep: SweepDir) -> list[RunSpec]:
    """The runs that the folder's plan holds; none where its config or plan is damaged, since both are written anew."""
    if not sweep.plan_path.is_file():
        return []
    try:
        sweep.read_config()
        sweep.read_plan()
    except RecordError:
        return []
    return load(sweep)


def _longest_first(runs: Iterable[RunSpec]) -> list[RunSpec]:
    """The runs by falling cost, so that the last ones to finish are short."""
    return sorted(runs, key=lambda run: (-run.cost.flops, run.run_id))


def _grid(
    resolved: ResolvedVariant, ratios: Iterable[tuple[float, float]], log2_lrs: Iterable[float], seeds: Iterable[int]
) -> Iterable[RunSpec]:
    """The runs of one variant at every combination of size, base LR and seed."""
    for ratio_pair in ratios:
        size = resolved.size(*ratio_pair)
        cost, at_size = resolved.cost(size), resolved.at(size)
        for log2_lr in log2_lrs:
            for seed in seeds:
                key = f"{resolved.digest} {size.width_ratio!r} {size.depth_ratio!r} {float(log2_lr)!r} {int(seed)}"
                key += "" if size.label is None else f" {size.label}"
                run_id = f"{size.name}-lr{log2_lr:.2f}-s{seed}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
                yield RunSpec(run_id, at_size, size, float(log2_lr), int(seed), cost)
