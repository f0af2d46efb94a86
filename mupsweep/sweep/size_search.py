"""The adaptive search of one variant of a sweep: what the search for the best LRs proposes at each of its sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from mupsweep.analysis.config import AnalysisConfig
from mupsweep.analysis.curves import LossCurve, collect
from mupsweep.analysis.estimate import QUANTILES, Array
from mupsweep.analysis.loss_curve import SizeRuns
from mupsweep.analysis.optimum import Optimum, runs_of, shuffled
from mupsweep.analysis.run_result import RunResult
from mupsweep.analysis.transfer import ladder_optima, size_ratio
from mupsweep.sweep.config import GridConfig
from mupsweep.sweep.lr_search import Goal, LRSearch, SearchedSize

MARGIN = 6.0  # octaves beyond log2_lrs that the search may go
AROUND = 2.0  # octaves around an expected optimum that the search of a value of another hyperparameter begins amid
Ratios = tuple[float, float]  # of width and depth, target / base


class Proposal(NamedTuple):
    """A run that the search would train next."""

    width_ratio: float
    depth_ratio: float
    log2_lr: float
    seed: int


@dataclass(frozen=True)
class SearchState:
    """The state of the search at one size.

    Attributes:
        ratios: (width_ratio, depth_ratio) of the size.
        proposals: the runs to train next.
        reason: why these runs, or why none.
    """

    ratios: Ratios
    proposals: tuple[Proposal, ...]
    reason: str


def search_state(
    results: Iterable[RunResult], grid: GridConfig, analysis: AnalysisConfig | None = None, has_goal: bool = True
) -> list[SearchState]:
    """The state of the search at every size, by rising cost; a size that waits for smaller ones proposes nothing.

    Args:
        results: of the finished runs of the variant.
        has_goal: whether the search goes on where every size has its optimum, for the verdict and the largest size.
    """
    curves = {(curve.width_ratio, curve.depth_ratio): curve for curve in collect(results)}
    sizes = sorted(grid.ratios, key=lambda ratios: (ratios[0] ** 2 * ratios[1], ratios))
    search = _search([_size(ratios, curves.get(ratios)) for ratios in sizes], grid, analysis or AnalysisConfig())
    search = search if has_goal else replace(search, goal=None)
    proposed = search.next(grid.at_once)
    states = []
    for k, ratios in enumerate(sizes):
        runs = [run for run in proposed if run.size == k]
        proposals = dict.fromkeys(
            Proposal(*ratios, run.log2_lr, _seed(curves.get(ratios), run.log2_lr, run.repetition, grid)) for run in runs
        )
        states.append(SearchState(ratios, tuple(proposals), runs[0].why if runs else search.looks[k][1]))
    return states


def _search(sizes: Sequence[SearchedSize], grid: GridConfig, analysis: AnalysisConfig) -> LRSearch:
    lowest, highest = min(grid.log2_lrs), max(grid.log2_lrs)
    largest = max(size.runs.position for size in sizes)
    goal = Goal(largest, grid.half_width, grid.regret, analysis.verdict if len(sizes) > 1 else None)
    return LRSearch(
        tuple(sizes),
        (lowest, highest),
        (lowest - MARGIN, highest + MARGIN),
        goal,
        len(grid.seeds),
        max(grid.max_seeds, len(grid.seeds)),
        grid.max_runs,
        both_ends=True,
        prior=analysis.curve,
    )


def _size(ratios: Ratios, curve: LossCurve | None) -> SearchedSize:
    """A size with its runs; it costs in proportion to the FLOPs of the blocks' matrices."""
    position = math.log2(size_ratio("joint", *ratios))
    runs = SizeRuns.of(position, [], []) if curve is None else runs_of(curve, position)
    return SearchedSize(runs, ratios[0] ** 2 * ratios[1])


def _seed(curve: LossCurve | None, log2_lr: float, repetition: int, grid: GridConfig) -> int:
    """The seed of a run: the next that its LR has not had."""
    points: Mapping[float, Iterable[int]] = {} if curve is None else {p.log2_lr: p.losses for p in curve.points}
    had = set(points.get(log2_lr, ()))
    further = (seed for seed in range(len(had) + repetition + len(grid.seeds) + 1) if seed not in grid.seeds)
    unused = [seed for seed in (*grid.seeds, *further) if seed not in had]
    return unused[repetition - len(had)]


def own_optimum(curve: LossCurve) -> Optimum:
    """The optimum of one curve by itself."""
    [optimum] = ladder_optima("width", [curve])
    return optimum


def may_be_best(optima: Sequence[Optimum]) -> list[bool]:
    """Whether each curve, at its own optimum, may have the lowest loss of all; a curve without an optimum may not."""
    losses = [_lowest_losses(optimum, i) for i, optimum in enumerate(optima)]
    best = losses[best_of(optima)]
    if best is None:
        return [False] * len(losses)
    return [draws is not None and float(np.quantile(draws - best, QUANTILES[0])) <= 0 for draws in losses]


def best_of(optima: Sequence[Optimum]) -> int:
    """The index of the curve with the lowest loss at its own optimum, as far as they have one."""
    losses = [_lowest_losses(optimum) for optimum in optima]
    medians = [math.inf if draws is None else float(np.median(draws)) for draws in losses]
    return medians.index(min(medians))


def _lowest_losses(optimum: Optimum, seed: int = 0) -> Array | None:
    """(draws,) of a curve's loss at its optimum, in an order of their own; None where that lies at an end."""
    return None if optimum.draws is None or optimum.log2_lr is None else shuffled(optimum.draws.floor, seed)
