"""The plan: a SweepConfig's runs, each with an id made of what it trains and nothing else."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mupsweep.analysis.labels import Label, label_of
from mupsweep.data import epochs_remark
from mupsweep.errors import ConfigError, RecordError
from mupsweep.schema import refuse_foreign_code
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep.config import GRID, GridConfig, SweepConfig, from_tree, to_tree
from mupsweep.sweep.run_identity import digest_of, refuse_namesakes
from mupsweep.sweep.run_spec import ResolvedVariant, RunSpec, _check_shares, _check_sizes, _sized, resolve

if TYPE_CHECKING:
    from mupsweep.sweep.size_search import SearchState


def plan(config: SweepConfig, finished: Iterable[Mapping[str, Any]] = ()) -> list[RunSpec]:
    """Every run of the grid, or those of a search's next round, the most expensive first. Writes nothing.

    Args:
        finished: summaries of the runs from which a search goes on, with the FLOPs that were planned for each.
    """
    grid = config.sweep
    for variant in config.variants:
        _check_shares(variant.training, config.launcher)
    recipes = [resolve(variant, config.launcher) for variant in config.variants]
    _check_sizes(recipes, config)
    if grid.search != GRID:
        return _longest_first(_next(recipes, grid, list(finished)))
    return _longest_first(run for made in recipes for run in _grid(made, grid.ratios, grid.log2_lrs, grid.seeds))


def _next(recipes: Sequence[ResolvedVariant], grid: GridConfig, finished: Sequence[Mapping[str, Any]]) -> list[RunSpec]:
    """The next round of a search: size by size, as far as its budget goes, which the defaults draw on first."""
    from mupsweep.sweep.search import survey  # which needs scipy

    left = math.inf if grid.max_flops is None else grid.max_flops - sum(row["flops"] for row in finished)
    chosen: list[RunSpec] = []
    for patient in (True, False) if grid.max_flops is not None else (False,):
        looks = survey([made.variant for made in recipes], finished, grid, patient)
        for runs in _wanted(recipes, looks):
            cost = sum(run.cost.flops for run in runs)
            if cost <= left:
                chosen += runs
                left -= cost
        if chosen:
            return chosen
    if grid.max_flops is not None and not finished:
        raise ConfigError(f"sweep.max_flops={grid.max_flops:g}: no size's first round costs so little; give more")
    return []


def _wanted(recipes: Iterable[ResolvedVariant], looks: Mapping[Label, Sequence[SearchState]]) -> list[list[RunSpec]]:
    """The runs that a search wants of each size, the defaults first, then by cost."""
    sizes = [
        [run for r_n, r_L, log2_lr, seed in one.wanted for run in _grid(made, [(r_n, r_L)], [log2_lr], [seed])]
        for made in recipes
        for one in looks[made.variant.label]
        if one.wanted
    ]
    return sorted(sizes, key=lambda runs: (runs[0].resolved.variant.change is not None, runs[0].cost.flops))


def sweep_name(config: SweepConfig) -> str:
    """`sweep.name`, or one made from the choices, the same for the same choices whatever the grid."""
    if config.sweep.name is not None:
        return config.sweep.name
    defaults = [variant for variant in config.variants if variant.change is None]
    columns = zip(*(variant.names for variant in defaults), strict=True)
    readable = "-".join("+".join(dict.fromkeys(names)) for names in columns)
    digest = hashlib.sha256("".join(digest_of(v) for v in defaults).encode()).hexdigest()
    return f"{readable}-{digest[:6]}"


def save(
    config: SweepConfig, header: str, sweep: SweepDir | None = None, new: Sequence[RunSpec] | None = None
) -> tuple[SweepDir, list[RunSpec]]:
    """Add the plan to the sweep's folder and return every run of the sweep, planned now or before.

    Args:
        sweep: the folder; None is that of the config.
        new: the config's `plan`, where it was made already.

    Raises:
        ConfigError: the folder holds a variant of the same name with other settings.
    """
    new = plan(config) if new is None else new
    sweep = SweepDir(Path(config.out) / sweep_name(config)) if sweep is None else sweep
    with sweep.lock():
        old = _planned_before(sweep)
        variants = {run.resolved.digest: run.resolved.variant for run in [*old, *new]}
        refuse_namesakes(variants.values(), sweep)
        for variant in variants.values():
            refuse_foreign_code(asdict(variant), str(sweep.path), config.allow_imports)
        if old and config.sweep.search != GRID:
            new = next_round(config, sweep)
        runs = {run.run_id: run for run in [*old, *new]}
        ordered = _longest_first(runs.values())
        sweep.write_config(to_tree(replace(config, variants=tuple(variants.values()))), header)
        sweep.write_plan(run.row() for run in ordered)
    return sweep, ordered


def next_round(config: SweepConfig, sweep: SweepDir) -> list[RunSpec]:
    """What a search adds to its sweep: nothing while a run is not finished, so that what it adds depends on whole
    rounds alone and not on when it was interrupted."""
    planned = {sweep.run(row["run_id"]): row["flops"] for row in sweep.read_plan()}
    if any(folder.is_open() for folder in planned):
        return []
    return plan(config, [{**(folder.summary() or {}), "flops": flops} for folder, flops in planned.items()])


def extend(
    sweep: SweepDir, made: ResolvedVariant, ratios: tuple[float, float], log2_lrs: Iterable[float], seeds: Iterable[int]
) -> list[RunSpec]:
    """Add runs of one size of a variant to a sweep's plan, and return them; its config stays as it is."""
    new = list(_grid(made, [ratios], log2_lrs, seeds))
    with sweep.lock():
        runs = {run.run_id: run for run in [*load(sweep), *new]}
        sweep.write_plan(run.row() for run in _longest_first(runs.values()))
    return new


def load(sweep: SweepDir, to_train: bool = True) -> list[RunSpec]:
    """Every run of a sweep that was planned before, in the order of its plan.

    Args:
        to_train: whether on the text that they were planned for; only to be shown, runs need none.
    """
    config = from_tree(sweep.read_config())
    variants = {variant.label: variant for variant in config.variants}
    made = (resolve(variant, config.launcher) for variant in variants.values()) if to_train else ()
    recipes = {one.digest: one for one in made}
    sizes = cache(lambda digest, r_n, r_L: _sized(recipes[digest], r_n, r_L))  # noqa: N803
    runs, rows = [], sweep.read_plan()[::-1]
    while rows:  # each freed as it is used: 100,000 rows take more memory than their runs
        row = rows.pop()
        if not to_train and row["variant"] not in recipes and label_of(row) in variants:
            recipes[row["variant"]] = resolve(variants[label_of(row)], config.launcher, row["variant"])
        if row["variant"] not in recipes:
            where = {variant.data.path or variant.data.name for variant in config.variants}
            raise RecordError(
                f"{sweep.path} was planned on another text than {', '.join(sorted(where))} holds now, or its "
                "config.yaml was edited: choose another sweep.name, or bring the old text back"
            )
        size, cost = sizes(row["variant"], row["width_ratio"], row["depth_ratio"])
        runs.append(RunSpec(row["run_id"], recipes[row["variant"]], size, row["log2_lr"], row["seed"], cost))
    return runs


def corpus_remarks(runs: Iterable[RunSpec]) -> list[str]:
    """What to say of runs that read their corpus more than once, as far as its size is known."""
    one_each = {run.resolved.digest: run for run in runs}.values()
    remarks = (epochs_remark(run.resolved.variant.data, run.cost.tokens) for run in one_each)
    return list(dict.fromkeys(remark for remark in remarks if remark))


def _planned_before(sweep: SweepDir) -> list[RunSpec]:
    """What the folder holds already; nothing where its config or plan is damaged, since both are now written anew."""
    if not sweep.plan_path.is_file():
        return []
    try:
        sweep.read_config()
        sweep.read_plan()
    except RecordError:
        return []
    return load(sweep)


def _longest_first(runs: Iterable[RunSpec]) -> list[RunSpec]:
    return sorted(runs, key=lambda run: (-run.cost.flops, run.run_id))


def _grid(
    made: ResolvedVariant, ratios: Iterable[tuple[float, float]], log2_lrs: Iterable[float], seeds: Iterable[int]
) -> Iterable[RunSpec]:
    for r_n, r_L in ratios:
        size, cost = _sized(made, r_n, r_L)
        for log2_lr in log2_lrs:
            for seed in seeds:
                key = f"{made.digest} {size.width_ratio!r} {size.depth_ratio!r} {float(log2_lr)!r} {int(seed)}"
                run_id = f"{size.name}-lr{log2_lr:.2f}-s{seed}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
                yield RunSpec(run_id, made, size, float(log2_lr), int(seed), cost)
