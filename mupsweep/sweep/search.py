"""Searches of several variants: which runs every variant trains next.

Each variant is searched on its own (mupsweep/sweep/size_search.py). The defaults are searched at every size from the
beginning. A value of another hyperparameter is searched at the base first, around the optimum of the default there, and
at other sizes only while it may be the best value of its hyperparameter; those of a hyperparameter in `sweep.joint` are
searched as joint_search.py says. All of this is a pure function of the finished runs, as the search of one variant is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from mupsweep.analysis.config import AnalysisConfig
from mupsweep.analysis.curves import LossCurve, collect
from mupsweep.analysis.labels import HyperparameterOverride, Label
from mupsweep.analysis.run_result import RunResult
from mupsweep.sweep.config import GridConfig, Variant
from mupsweep.sweep.joint_search import JointSearch
from mupsweep.sweep.lr_search import LATTICE
from mupsweep.sweep.size_search import AROUND, SearchState, may_be_best, own_optimum, search_state

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
        values = {v.label: v.change for v in variants if v.change is not None and v.names == default}
        # values are judged against the default at the base, and the sizes below the base come before it
        until_base = [state.ratios for state in states[default]].index(base_of(grid)) + 1
        base_open = any(state.proposals for state in states[default][:until_base])
        if any_default_open if patient else base_open:
            states |= {label: [SearchState(base_of(grid), (), "waits for the default")] for label in values}
        else:
            star = {label: change for label, change in values.items() if change.hyperparameter not in grid.joint}
            states |= _states_of_values(star, runs_of[default], runs_of, grid, analysis)
            sizes = [base_of(grid), *(state.ratios for state in states[default] if state.ratios != base_of(grid))]
            for key in grid.joint:
                row = {label: change for label, change in values.items() if change.hyperparameter == key}
                states |= JointSearch(default, row, runs_of, grid, analysis).states(sizes) if row else {}
    return states


def _states_of_values(
    values: Mapping[Label, HyperparameterOverride],
    default: Runs,
    runs_of: Mapping[Label, Runs],
    grid: GridConfig,
    analysis: AnalysisConfig | None,
) -> SearchStates:
    """The state of the search of every value of one default, whose own search at the base has ended.

    Args:
        values: by the label of the value's variant.
        default: finished runs of the default.
        runs_of: finished runs of every variant.
    """
    base = base_of(grid)
    [curve] = _curves_at_base([default], grid)
    if not curve.usable:
        return {label: [SearchState(base, (), "the default diverges at every LR")] for label in values}
    center = round(own_optimum(curve).center / LATTICE) * LATTICE
    every_size = replace(grid, log2_lrs=(center - AROUND, center + AROUND))
    base_only = replace(every_size, width_ratios=base[:1], depth_ratios=base[1:], pair=False, sizes=None)
    states = {label: search_state(runs_of[label], base_only, analysis) for label in values}
    for hyperparameter in dict.fromkeys(change.hyperparameter for change in values.values()):
        rivals = [label for label, change in values.items() if change.hyperparameter == hyperparameter]
        still_open = any(state.proposals for label in rivals for state in states[label])
        if still_open or len(grid.ratios) == 1:
            continue
        # all rivals are known at the base: those that may be the best there go on to the other sizes
        curves = _curves_at_base([default, *(runs_of[label] for label in rivals)], grid)
        may_win = may_be_best([own_optimum(curve) for curve in curves])
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


def _curves_at_base(runs_of_variants: Iterable[Runs], grid: GridConfig) -> list[LossCurve]:
    """The curve of each variant at the base, after the longest training."""
    at_base = []
    for runs in runs_of_variants:
        curves = [curve for curve in collect(runs) if (curve.width_ratio, curve.depth_ratio) == base_of(grid)]
        at_base.append(curves[-1])
    return at_base
