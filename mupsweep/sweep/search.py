"""Rounds: what a search of several variants trains next.

Each variant is searched on its own (mupsweep/sweep/size_search.py), the defaults at every size from the beginning.
A value of another hyperparameter is searched at the base first, around the default's optimum there, and at other sizes
only while it may be the best of its key. Like the search itself this is a pure function of the finished runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mupsweep.analysis.curves import LossCurve, collect
from mupsweep.analysis.labels import Label, label_of
from mupsweep.analysis.optimum import TAILS, optima
from mupsweep.sweep.config import GridConfig, Variant
from mupsweep.sweep.size_search import COARSE, SearchState, lr_grid, search_state

SearchStates = dict[Label, list[SearchState]]
Rows = Sequence[Mapping[str, Any]]


def survey(
    variants: Sequence[Variant], rows: Iterable[Mapping[str, Any]], grid: GridConfig, patient: bool = False
) -> SearchStates:
    """What the search thinks of every size of every variant.

    Args:
        rows: the finished runs of all variants, as in results/runs.csv.
        patient: whether values wait until the defaults are known at every size, and not at the base alone.
    """
    mine: dict[Label, list[Mapping[str, Any]]] = {variant.label: [] for variant in variants}
    for row in rows:
        mine.get(label_of(row), []).append(row)
    looks = {v.label: search_state(mine[v.label], grid) for v in variants if v.change is None}
    busy = any(one.wanted for sizes in looks.values() for one in sizes)
    for default in list(looks):
        values = {v.label: v.change.hyperparameter for v in variants if v.change is not None and v.names == default}
        first = [one.ratios for one in looks[default]].index(base_of(grid)) + 1  # smaller sizes come before it
        if busy if patient else any(one.wanted for one in looks[default][:first]):
            looks |= {label: [SearchState(base_of(grid), (), "waits for the default")] for label in values}
        else:
            looks |= _of_values(values, mine[default], mine, grid)
    return looks


def _of_values(
    values: Mapping[Label, str], default: Rows, mine: Mapping[Label, Rows], grid: GridConfig
) -> SearchStates:
    """The same for the values of one default, whose search at the base has ended."""
    at = base_of(grid)
    [known] = _at_base([default], grid)
    if not known.usable:
        return {label: [SearchState(at, (), "the default diverges at every LR")] for label in values}
    [found] = optima([known])
    center = round(found.center / lr_grid(grid.half_width)) * lr_grid(grid.half_width)
    near = replace(grid, log2_lrs=(center - COARSE, center, center + COARSE))
    small = replace(near, width_ratios=at[:1], depth_ratios=at[1:], pair=False)
    looks = {label: search_state(mine[label], small) for label in values}
    for key in dict.fromkeys(values.values()):
        rivals = [label for label, other in values.items() if other == key]
        if any(one.wanted for label in rivals for one in looks[label]) or len(grid.ratios) == 1:
            continue
        chances = may_be_best(_at_base([default, *(mine[label] for label in rivals)], grid))
        for label, chance in zip(rivals, chances[1:], strict=True):
            if chance:
                looks[label] = search_state(mine[label], near)
            else:
                looks[label] = [SearchState(at, (), f"{one.reason}; not the best there") for one in looks[label]]
    return looks


def base_of(grid: GridConfig) -> tuple[float, float]:
    """The ratios of the base, or of the smallest size of a grid without it."""
    return min(grid.ratios, key=lambda size: (size != (1.0, 1.0), size[0] ** 2 * size[1], size))


def may_be_best(curves: Sequence[LossCurve]) -> list[bool]:
    """Whether each of some curves may reach the lowest loss, each at its own optimum; without one it may not."""
    found = optima(curves)
    losses = [None if o.posterior is None else o.posterior.losses for o in found]
    known = [x for x in losses if x is not None]
    if not known:
        return [False] * len(found)
    best = min(known, key=lambda x: float(np.median(x)))
    return [x is not None and float(np.quantile(x - best, TAILS[0])) <= 0 for x in losses]


def _at_base(rows: Iterable[Rows], grid: GridConfig) -> list[LossCurve]:
    """The curve of each of some variants at the base, after the longest training."""
    return [[c for c in collect(mine) if (c.width_ratio, c.depth_ratio) == base_of(grid)][-1] for mine in rows]
