"""The adaptive search of one variant: the runs that find the optimal LR of every size, given the finished runs.

A round is a pure function of the finished runs: the same records always lead to the same proposals, whoever asks and
whatever was interrupted. LRs lie on a grid of octaves, so that rounds, reruns and grid sweeps share runs.

A size begins with a few LRs an octave apart: the smallest over `log2_lrs`, a larger one around the optimum that the
smaller ones forecast. While the best LR is at an end of the trained ones, the search extends that end. After that,
draws of the optimum (mupsweep/analysis/loss_curve.py) decide: a linear Gaussian model gives the variance of the minimum
that a run would remove, and new LRs compete with another seed at every trained LR by the variance that they remove per
run (Lindley 1956, doi 10.1214/aoms/1177728069).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from scipy.linalg import block_diag

from mupsweep.analysis.curves import LossCurve, Point, collect
from mupsweep.analysis.estimate import QUANTILES
from mupsweep.analysis.forecast import forecast
from mupsweep.analysis.loss_curve import CurveDraws, LadderPosterior
from mupsweep.analysis.optimum import Optimum, optima_of
from mupsweep.analysis.run_result import RunResult
from mupsweep.analysis.transfer import fit_curves, size_ratio
from mupsweep.sweep.config import GridConfig

COARSE = 2.0  # octaves between the LRs with which the smallest size begins
COARSE_STEP = 1.0  # octaves between the LRs around a minimum, before draws of the optimum choose them
SEARCH_MARGIN = 6.0  # octaves beyond log2_lrs that the search may go
NEAR_RADIUS = 2.25  # octaves from the minimum within which an LR counts as near
MIN_NEAR_POINTS = 5  # LRs near the minimum before its interval counts; with fewer, the prior decides the curve's shape
REFINE_RADIUS = 2.0  # octaves from the optimum within which LRs are added between others; far ones amplify noise
MAX_PER_ROUND = 3  # candidates chosen in one round, since each of them changes which one would be best next
FIRST_SEEDS = 2  # seeds of every LR: without repetitions noise is a guess, and a search would stop early by luck
SHIFT = 100.0  # prior variance of a shift by the seed common to all LRs, in units of the noise's: as good as unknown
EPS = 1e-6  # octaves by which two LRs count as equal


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

    ratios: tuple[float, float]
    proposals: tuple[Proposal, ...]
    reason: str


def propose(
    results: Iterable[RunResult], grid: GridConfig, limits: tuple[float, float] | None = None
) -> list[Proposal]:
    """The next runs of one variant; none when the search has ended.

    Args:
        results: of the finished runs of the variant.
        limits: the lowest and the highest log2 LR; SEARCH_MARGIN beyond `log2_lrs` unless given.
    """
    return [proposal for state in search_state(results, grid, limits) for proposal in state.proposals]


def search_state(
    results: Iterable[RunResult], grid: GridConfig, limits: tuple[float, float] | None = None
) -> list[SearchState]:
    """The state of the search at every size, by rising cost; a size that waits for smaller ones proposes nothing."""
    space = Space.of(grid, limits)
    curves = {(c.width_ratio, c.depth_ratio): c for c in collect(results)}
    sizes = sorted(grid.ratios, key=lambda size: (size[0] ** 2 * size[1], size))
    begun = [size for size in sizes if size in curves]
    by_position = sorted(begun, key=position_of)
    ladder = [curves[size] for size in by_position]
    [posterior] = fit_curves([("joint", ladder)])
    optimum_of = dict(zip(by_position, optima_of(ladder, posterior), strict=True))
    searches = {size: SizeSearch(space, optimum_of[size]) for size in begun}
    states: list[SearchState] = []
    waits = False
    for size in sizes:
        if waits:
            states.append(SearchState(size, (), "waits for smaller sizes"))
            continue
        if size in searches:
            runs, reason = searches[size].next()
        else:
            runs, reason = space.first_runs(size, optimum_of, posterior), "first runs"
        states.append(SearchState(size, tuple(Proposal(*size, *run) for run in runs), reason))
        # a larger size begins around the optimum that this one predicts, so it needs an interval first
        waits = bool(runs) and (size not in optimum_of or not optimum_of[size].known)
    return states


@dataclass(frozen=True)
class Space:
    """The space of a search.

    Attributes:
        log2_lrs: the LRs with which the smallest size begins.
        step: octaves between neighbours of the LR grid.
        lowest, highest: the limits of the LR grid, themselves on it.
        seeds: the seeds, in the order in which they are used.
        half_width: octaves within which the optimum of every size shall be known.
        max_runs: the largest number of runs of one size.
    """

    log2_lrs: tuple[float, ...]
    step: float
    lowest: float
    highest: float
    seeds: tuple[int, ...]
    half_width: float
    max_runs: int

    @classmethod
    def of(cls, grid: GridConfig, limits: tuple[float, float] | None) -> Space:
        """The space of a config, whose seeds are followed by further ones up to `max_seeds`."""
        step = lr_grid(grid.half_width)
        low, high = limits or (min(grid.log2_lrs) - SEARCH_MARGIN, max(grid.log2_lrs) + SEARCH_MARGIN)
        ends = math.ceil(low / step - EPS) * step, math.floor(high / step + EPS) * step
        further = (seed for seed in range(grid.max_seeds + len(grid.seeds)) if seed not in grid.seeds)
        seeds = (*grid.seeds, *further)[: grid.max_seeds]
        return cls(tuple(sorted(grid.log2_lrs)), step, *ends, seeds, grid.half_width, grid.max_runs)

    def on(self, log2_lr: float) -> float:
        """The nearest LR of the LR grid."""
        return min(max(round(log2_lr / self.step) * self.step, self.lowest), self.highest)

    def first_runs(
        self,
        size: tuple[float, float],
        optimum_of: Mapping[tuple[float, float], Optimum],
        smaller: LadderPosterior,
    ) -> list[Run]:
        """The runs with which a size begins: around the optimum that the smaller ones forecast."""
        seeds = self.seeds[:FIRST_SEEDS]
        expected = forecast(smaller, position_of(size))
        trained = [optimum.center for optimum in optimum_of.values() if optimum.curve.usable]
        if expected is not None or trained:
            predicted = self.on(float(np.median(trained)) if expected is None else expected.optimum.value or 0.0)
            center = min(max(predicted, self.lowest + COARSE_STEP), self.highest - COARSE_STEP)
            return [(self.on(center + d), seed) for d in (-COARSE_STEP, 0.0, COARSE_STEP) for seed in seeds]
        lrs = [self.on(self.log2_lrs[0])]
        for log2_lr in map(self.on, self.log2_lrs):
            if log2_lr >= lrs[-1] + COARSE - EPS:
                lrs.append(log2_lr)
        return [(log2_lr, self.seeds[0]) for log2_lr in lrs]


Run = tuple[float, int]  # log2 LR and seed


def position_of(size: tuple[float, float]) -> float:
    """Doublings of width times depth above the base."""
    return math.log2(size_ratio("joint", *size))


def lr_grid(half_width: float) -> float:
    """Octaves between the LRs of a search: the largest power of two within an interval of +- `half_width`."""
    return 2.0 ** min(0, math.floor(math.log2(2 * half_width) + EPS))


@dataclass(frozen=True)
class SizeSearch:
    """The search at one size that has finished runs."""

    space: Space
    optimum: Optimum

    @property
    def curve(self) -> LossCurve:
        return self.optimum.curve

    def next(self) -> tuple[list[Run], str]:
        """The next runs, and the reason for them or for their absence."""
        half_width = self.half_width()
        if not self.curve.usable:
            runs = self.untrained([min(p.log2_lr for p in self.curve.points) - COARSE], self.space.seeds[:FIRST_SEEDS])
            return runs, "every LR diverges: tries lower ones" if runs else "every LR diverges"
        for lrs, seeds, reason in self.bracket():
            if runs := self.untrained(lrs, seeds):
                return self.within_budget(runs, reason)
        if self.optimum.draws is None:
            return [], f"stopped: {self.optimum.reason}"
        if half_width <= self.space.half_width:
            return [], f"known to +-{half_width:.2f} octaves"
        precision = "not bounded yet" if math.isinf(half_width) else f"known to +-{half_width:.2f} octaves only"
        candidates = list(self.candidates(self.optimum.draws))
        if not candidates:
            return [], f"stopped: {precision}, although every seed is used: the noise is too large"
        runs = self.refine(self.optimum.draws, candidates)
        return self.within_budget(runs or candidates[0].runs, precision)

    def half_width(self) -> float:
        """Half the width of the optimum's interval, in octaves; infinite where the optimum has none."""
        optimum = self.optimum
        if optimum.high is None or optimum.low is None:
            return math.inf
        return (optimum.high - optimum.low) / 2

    def within_budget(self, runs: list[Run], reason: str) -> tuple[list[Run], str]:
        """The runs and their reason; no runs where they would exceed the limit of one size."""
        if self.curve.n_runs + len(runs) <= self.space.max_runs:
            return runs, reason
        return [], f"stopped at sweep.max_runs={self.space.max_runs}: {reason}"

    def untrained(self, lrs: Iterable[float], seeds: Sequence[int]) -> list[Run]:
        """The new runs at these LRs and seeds, with LRs moved onto the LR grid; none at an LR that diverged."""
        points = {p.log2_lr: p for p in self.curve.points}
        runs: list[Run] = []
        for log2_lr in dict.fromkeys(map(self.space.on, lrs)):
            point = points.get(log2_lr)
            if point is not None and point.censored:
                continue
            runs += [(log2_lr, seed) for seed in seeds if point is None or seed not in point.losses]
        return runs

    def best(self) -> Point:
        """The point with the lowest mean loss."""
        return min(self.curve.usable, key=lambda p: p.mean)

    def bracket(self) -> Iterator[tuple[list[float], tuple[int, ...], str]]:
        """What a curve needs before draws of its optimum can choose runs: (LRs, seeds, reason), first need first."""
        best = self.best()
        yield list(self.neighbours()), self.space.seeds[: len(best.losses)], "the best LR has no neighbour on one side"
        if self.optimum.draws is None:
            return
        middle = self.optimum.center
        near = [p.log2_lr for p in self.curve.usable if abs(p.log2_lr - middle) <= NEAR_RADIUS]
        seeds = self.space.seeds[: max(FIRST_SEEDS, len(best.losses))]
        yield near, seeds, "LRs around the minimum need more seeds"
        if 0 < len(near) < MIN_NEAR_POINTS:
            beyond = [x for x in (min(near) - COARSE_STEP, max(near) + COARSE_STEP) if self.is_open(x)]
            between = [x for x in self.grid_around(middle) if self.is_open(x)]
            for lrs in (beyond, between):
                nearest_lr = sorted(lrs, key=lambda x: abs(x - middle))[:1]
                yield nearest_lr, seeds, f"fewer than {MIN_NEAR_POINTS} LRs around the minimum"
        points = self.curve.points
        for bound, end, sign in ((self.optimum.low, points[0], -1), (self.optimum.high, points[-1], 1)):
            if bound is None and not end.censored:
                yield [end.log2_lr + sign * COARSE_STEP], seeds, "the minimum may lie beyond what was trained"

    def neighbours(self) -> Iterator[float]:
        """LRs that are missing beside the best one; below an LR that diverged, the one halfway to it."""
        best = self.best().log2_lr
        below = max((p.log2_lr for p in self.curve.points if p.log2_lr < best - EPS), default=-math.inf)
        above = min((p.log2_lr for p in self.curve.points if p.log2_lr > best + EPS), default=math.inf)
        if best - below > COARSE_STEP + EPS:
            yield best - COARSE_STEP
        if above - best > COARSE_STEP + EPS:
            yield best + COARSE_STEP
        elif best == self.curve.usable[-1].log2_lr and above - best > self.space.step + EPS:
            yield best + (above - best) / 2 - EPS

    def is_open(self, log2_lr: float) -> bool:
        """Whether an LR is within the limits, below the lowest one that diverged, and not trained yet."""
        lowest_diverged = min((p.log2_lr for p in self.curve.points if p.censored), default=math.inf)
        untrained = all(abs(p.log2_lr - log2_lr) > EPS for p in self.curve.points)
        return untrained and self.space.lowest <= log2_lr <= self.space.highest and log2_lr < lowest_diverged

    def grid_around(self, middle: float) -> list[float]:
        """The LRs of the LR grid within REFINE_RADIUS of the optimum."""
        count = math.ceil(REFINE_RADIUS / self.space.step)
        around = [self.space.on(middle) + i * self.space.step for i in range(-count, count + 1)]
        return [x for x in around if abs(x - middle) <= REFINE_RADIUS]

    def candidates(self, draws: CurveDraws) -> Iterator[Candidate]:
        """What could be trained: another seed at every trained LR, or an LR between these with as many seeds."""
        inside = [p for p in self.curve.usable if draws.covers(p.log2_lr)]
        noise = {p.log2_lr: draws.noise_variance(p.log2_lr) for p in inside}
        typical = float(np.median(list(noise.values())))
        another = [seed for seed in self.space.seeds if any(seed not in p.losses for p in inside)][:1]
        if repeats := self.untrained([p.log2_lr for p in inside], another):
            lrs = [log2_lr for log2_lr, _ in repeats]
            # a seed that no LR has yet shifts the whole curve, so only differences between its losses count
            shift = SHIFT * typical if len(lrs) == len(inside) else 0.0
            yield Candidate(repeats, lrs, np.diag([noise[x] for x in lrs]) + shift)
        seeds = self.space.seeds[: max(FIRST_SEEDS, min(len(p.losses) for p in inside))]
        for log2_lr in self.grid_around(self.optimum.log2_lr or 0.0):
            if draws.covers(log2_lr) and self.is_open(log2_lr):
                yield Candidate(self.untrained([log2_lr], seeds), [log2_lr], np.array([[typical / len(seeds)]]))

    def refine(self, draws: CurveDraws, candidates: list[Candidate]) -> list[Run]:
        """The runs that remove the most variance of the minimum per run, until the remainder is expected to suffice.

        Either new LRs, or another seed at every trained LR; no runs where the budget has no room for any.
        """
        goal = float(draws.optimum.var()) - (self.space.half_width / NormalDist().inv_cdf(QUANTILES[2])) ** 2
        room = self.space.max_runs - self.curve.n_runs
        selected: list[Candidate] = []
        removed = 0.0
        while len(selected) < MAX_PER_ROUND and (not selected or removed < goal):
            if selected and len(selected[0].lrs) > 1:  # another seed at every LR is a round of its own
                break
            affordable = [c for c in candidates if len(c.runs) <= room and c not in selected]
            if selected:
                affordable = [c for c in affordable if len(c.lrs) == 1]
            reductions = [(variance_reduction(draws, [*selected, c]), c) for c in affordable]
            if not reductions:
                break
            removed, best = max(reductions, key=lambda pair: (pair[0] - removed) / len(pair[1].runs))
            selected.append(best)
            room -= len(best.runs)
        return [run for candidate in selected for run in candidate.runs]


@dataclass(frozen=True, eq=False)
class Candidate:
    """Runs that could be trained together, with the LRs of the losses they give and the covariance of the noise."""

    runs: list[Run]
    lrs: list[float]
    noise: np.ndarray


def variance_reduction(draws: CurveDraws, candidates: Sequence[Candidate]) -> float:
    """The variance of the minimum that the runs of these candidates would remove, in a linear Gaussian model."""
    lrs = [x for candidate in candidates for x in candidate.lrs]
    curves = np.array([draws.losses(x) for x in lrs])  # (LRs, draws)
    curves = curves - curves.mean(axis=1, keepdims=True)
    across = curves @ (draws.optimum - draws.optimum.mean()) / len(draws.optimum)
    covariance = curves @ curves.T / len(draws.optimum) + block_diag(*(candidate.noise for candidate in candidates))
    return float(across @ np.linalg.solve(covariance, across))
