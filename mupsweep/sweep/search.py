"""Searches of several variants: which runs every variant trains next.

Each variant is searched on its own (mupsweep/sweep/size_search.py). The defaults are searched at every size from the
beginning. A value of another hyperparameter is searched at the base first, around the optimum of the default there, and
at other sizes only while it may be the best value of its hyperparameter. All of this is a pure function of the finished
runs, as the search of one variant is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from mupsweep.analysis.config import AnalysisConfig
from mupsweep.analysis.curves import LossCurve, collect
from mupsweep.analysis.estimate import QUANTILES
from mupsweep.analysis.labels import Label
from mupsweep.analysis.optimum import shuffled
from mupsweep.analysis.run_result import RunResult
from mupsweep.analysis.transfer import ladder_optima
from mupsweep.sweep.config import GridConfig, Variant
from mupsweep.sweep.lr_search import LATTICE
from mupsweep.sweep.size_search import SearchState, search_state

AROUND = 2.0  # octaves around the default's optimum that the search of a value begins amid
SearchStates = dict[Label, list[SearchState]]
Runs = Sequence[RunResult]


def search_states(
    variants: Sequence[Variant],
    runs: Iterable[RunResult],
    grid: GridConfig,
    analysis: AnalysisConfig | None = None,
    patient: bool = False,
) -> SearchStates:
    """The state of the search at every size of every variant.

    Args:
        runs: the finished runs of all variants.
        patient: whether values wait until the defaults are known at every size, and not only at the base.
    """
    runs_of: dict[Label, list[RunResult]] = {variant.label: [] for variant in variants}
    for run in runs:
        runs_of.get(run.label, []).append(run)
    states = {
        v.label: search_state(runs_of[v.label], grid.of(v.optimizer), analysis) for v in variants if v.change is None
    }
    any_default_open = any(state.proposals for sizes in states.values() for state in sizes)
    for default in list(states):
        values = {v.label: v.change.hyperparameter for v in variants if v.change is not None and v.names == default}
        # values are judged against the default at the base, and the sizes below the base come before it
        until_base = [state.ratios for state in states[default]].index(base_of(grid)) + 1
        base_open = any(state.proposals for state in states[default][:until_base])
        if any_default_open if patient else base_open:
            states |= {label: [SearchState(base_of(grid), (), "waits for the default")] for label in values}
        else:
            states |= _states_of_values(values, runs_of[default], runs_of, grid, analysis)
    return states


def _states_of_values(
    values: Mapping[Label, str],
    default: Runs,
    runs_of: Mapping[Label, Runs],
    grid: GridConfig,
    analysis: AnalysisConfig | None,
) -> SearchStates:
    """The state of the search of every value of one default, whose own search at the base has ended.

    Args:
        values: label of the value's variant -> its hyperparameter.
        default: finished runs of the default.
        runs_of: finished runs of every variant.
    """
    base = base_of(grid)
    [curve] = _curves_at_base([default], grid)
    if not curve.usable:
        return {label: [SearchState(base, (), "the default diverges at every LR")] for label in values}
    [optimum] = ladder_optima("width", [curve])
    center = round(optimum.center / LATTICE) * LATTICE
    every_size = replace(grid, log2_lrs=(center - AROUND, center + AROUND))
    base_only = replace(every_size, width_ratios=base[:1], depth_ratios=base[1:], pair=False, sizes=None)
    states = {label: search_state(runs_of[label], base_only, analysis) for label in values}
    for hyperparameter in dict.fromkeys(values.values()):
        rivals = [label for label, other in values.items() if other == hyperparameter]
        still_open = any(state.proposals for label in rivals for state in states[label])
        if still_open or len(grid.ratios) == 1:
            continue
        # all rivals are known at the base: those that may be the best there go on to the other sizes
        may_win = may_be_best(_curves_at_base([default, *(runs_of[label] for label in rivals)], grid))
        for label, goes_on in zip(rivals, may_win[1:], strict=True):
            if goes_on:
                states[label] = search_state(runs_of[label], every_size, analysis)
            else:
                states[label] = [
                    SearchState(base, (), f"{state.reason}; not the best there") for state in states[label]
                ]
    return states


def base_of(grid: GridConfig) -> tuple[float, float]:
    """The ratios of the base, or of the smallest size of a grid without it."""
    return min(grid.ratios, key=lambda size: (size != (1.0, 1.0), size[0] ** 2 * size[1], size))


def may_be_best(curves: Sequence[LossCurve]) -> list[bool]:
    """Whether each curve, at its own optimum, may have the lowest loss of all; a curve without an optimum may not."""
    optima = [ladder_optima("width", [curve])[0] for curve in curves]
    losses = [
        None if o.draws is None or o.log2_lr is None else shuffled(o.draws.floor, i) for i, o in enumerate(optima)
    ]
    sampled = [draws for draws in losses if draws is not None]
    if not sampled:
        return [False] * len(losses)
    best = min(sampled, key=lambda draws: float(np.median(draws)))
    return [draws is not None and float(np.quantile(draws - best, QUANTILES[0])) <= 0 for draws in losses]


def _curves_at_base(runs_of_variants: Iterable[Runs], grid: GridConfig) -> list[LossCurve]:
    """The curve of each variant at the base, after the longest training."""
    at_base = []
    for runs in runs_of_variants:
        curves = [curve for curve in collect(runs) if (curve.width_ratio, curve.depth_ratio) == base_of(grid)]
        at_base.append(curves[-1])
    return at_base
