"""Search: the runs that find the optimal LR of every size, told by those that are finished.

A round is a pure function of the finished runs of a variant: the same records always want the same runs, whoever asks
and whatever was interrupted. LRs lie on a lattice of octaves, so that rounds, reruns and grids share runs.

A size begins with a few LRs an octave apart, the smallest over `log2_lrs`, a larger one around the optimum that the
smaller ones lead to expect. While the best LR is at an end, the search walks on. Then the draws of the optimum
(mupsweep/analysis/optimum.py) say what to train: the variance of the minimum that a run would take away is that of
a linear Gaussian model, and new LRs and another seed for all LRs at hand are compared by what they take away per run
(Lindley 1956, doi 10.1214/aoms/1177728069).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from scipy.linalg import block_diag

from mupsweep.analysis.curves import LossCurve, Point, collect
from mupsweep.analysis.optimum import TAILS, Optimum, Posterior, optima, point_sds
from mupsweep.sweep.config import GridConfig

COARSE = 2.0  # octaves between the LRs of the first look at the smallest size
COARSE_STEP = 1.0  # octaves between the LRs around a minimum, before the draws choose
SEARCH_MARGIN = 6.0  # octaves beyond log2_lrs that the search may go
MIN_NEAR_POINTS = 5  # LRs within REACH of the minimum before its interval counts; fewer leave the shape to the prior
NEAR_RADIUS = 2.25  # octaves
REFINE_RADIUS = (
    2.0  # octaves from the optimum, within which new LRs are taken between others; far ones have leverage on noise
)
MAX_PER_ROUND = 3  # such choices in one round at most, since each changes what the next would be
FIRST_SEEDS = 2  # of every LR: without repetitions noise is a guess, and a search that stops early stops on luck
SLOPE = 1.0  # octaves per doubling: standard deviation of the drift before any was seen; SP drifts by one
SCATTER = 0.2  # octaves by which optima may lie off a straight line
UNKNOWN = 0.7  # octaves: standard deviation of an optimum of which only the best LR is known
SHIFT = 100.0  # variance of what a seed shifts at every LR alike, in those of the noise: as good as unknown
EPS = 1e-6


class Proposal(NamedTuple):
    """A run that the search wants."""

    width_ratio: float
    depth_ratio: float
    log2_lr: float
    seed: int


@dataclass(frozen=True)
class SearchState:
    """What the search thinks of one size.

    Attributes:
        wanted: the next runs.
        reason: why it wants these, or none.
    """

    ratios: tuple[float, float]
    wanted: tuple[Proposal, ...]
    reason: str


def propose(
    rows: Iterable[Mapping[str, Any]], grid: GridConfig, limits: tuple[float, float] | None = None
) -> list[Proposal]:
    """The next runs of one variant; none when the search has ended.

    Args:
        rows: its finished runs, as in results/runs.csv.
        limits: the lowest and the highest log2 LR; ROOM beyond `log2_lrs` unless given.
    """
    return [proposal for one in search_state(rows, grid, limits) for proposal in one.wanted]


def search_state(
    rows: Iterable[Mapping[str, Any]], grid: GridConfig, limits: tuple[float, float] | None = None
) -> list[SearchState]:
    """The state of every size, by rising cost; a size that still waits for smaller ones wants nothing."""
    space = Space.of(grid, limits)
    curves = {(c.width_ratio, c.depth_ratio): c for c in collect(rows)}
    sizes = sorted(grid.ratios, key=lambda size: (size[0] ** 2 * size[1], size))
    seen = [size for size in sizes if size in curves]
    ladder = [curves[size] for size in seen]
    sds, freedom = point_sds(ladder)
    found = dict(zip(seen, optima(ladder), strict=True))
    looks = {size: SizeSearch(space, found[size], sd if freedom else {}) for size, sd in zip(seen, sds, strict=True)}
    made: list[SearchState] = []
    waits = False
    for size in sizes:
        if waits:
            made.append(SearchState(size, (), "waits for smaller sizes"))
            continue
        runs, reason = looks[size].next() if size in looks else (space.first_look(size, found), "first look")
        made.append(SearchState(size, tuple(Proposal(*size, *run) for run in runs), reason))
        waits = bool(runs) and (size not in found or found[size].se is None)
    return made


@dataclass(frozen=True)
class Space:
    """Where a search may go.

    Attributes:
        log2_lrs: where the smallest size begins.
        step: of the lattice, octaves.
        lowest, highest: limits, on the lattice.
        seeds: in the order in which they are taken.
        half_width: octaves to which the optimum is wanted.
        max_runs: of one size.
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
        step = lr_grid(grid.half_width)
        low, high = limits or (min(grid.log2_lrs) - SEARCH_MARGIN, max(grid.log2_lrs) + SEARCH_MARGIN)
        ends = math.ceil(low / step - EPS) * step, math.floor(high / step + EPS) * step
        further = (seed for seed in range(grid.max_seeds + len(grid.seeds)) if seed not in grid.seeds)
        seeds = (*grid.seeds, *further)[: grid.max_seeds]
        return cls(tuple(sorted(grid.log2_lrs)), step, *ends, seeds, grid.half_width, grid.max_runs)

    def on(self, log2_lr: float) -> float:
        """The nearest LR of the lattice."""
        return min(max(round(log2_lr / self.step) * self.step, self.lowest), self.highest)

    def first_look(self, size: tuple[float, float], found: Mapping[tuple[float, float], Optimum]) -> list[Run]:
        """The runs with which a size begins."""
        seeds = self.seeds[:FIRST_SEEDS]
        known = {at: o for at, o in found.items() if o.curve.usable}
        if known:
            center = min(max(self.on(_expected(size, known)), self.lowest + COARSE_STEP), self.highest - COARSE_STEP)
            return [(self.on(center + d), seed) for d in (-COARSE_STEP, 0.0, COARSE_STEP) for seed in seeds]
        taken = [self.on(self.log2_lrs[0])]
        for log2_lr in map(self.on, self.log2_lrs):
            if log2_lr >= taken[-1] + COARSE - EPS:
                taken.append(log2_lr)
        return [(log2_lr, self.seeds[0]) for log2_lr in taken]


Run = tuple[float, int]  # log2 LR and seed


def lr_grid(half_width: float) -> float:
    """Octaves between the LRs of a search: the largest power of two within an interval of the wanted width."""
    return 2.0 ** min(0, math.floor(math.log2(2 * half_width) + EPS))


@dataclass(frozen=True)
class SizeSearch:
    """What is known of one size.

    Attributes:
        sds: standard deviation of every seed mean by log2 LR; empty where no seed was repeated.
    """

    space: Space
    optimum: Optimum
    sds: Mapping[float, float]

    @property
    def curve(self) -> LossCurve:
        return self.optimum.curve

    def next(self) -> tuple[list[Run], str]:
        """The next runs, and why these or why none."""
        known = self.half_width()
        if not self.curve.usable:
            runs = self.untrained([min(p.log2_lr for p in self.curve.points) - COARSE], self.space.seeds[:FIRST_SEEDS])
            return runs, "every LR diverges: looks lower" if runs else "every LR diverges"
        for lrs, seeds, reason in self.bracket():
            if runs := self.untrained(lrs, seeds):
                return self.within_budget(runs, reason)
        if self.optimum.posterior is None:
            return [], f"stopped: {self.optimum.reason}"
        if known <= self.space.half_width:
            return [], f"known to +-{known:.2f} octaves"
        about = "not bounded yet" if math.isinf(known) else f"known to +-{known:.2f} octaves only"
        options = list(self.options(self.optimum.posterior))
        if not options:
            return [], f"stopped: {about}, with every seed: noise rules"
        runs = self.refine(self.optimum.posterior, options)
        return self.within_budget(runs or options[0].runs, about)

    def half_width(self) -> float:
        o = self.optimum
        return (o.high - o.low) / 2 if o.se is not None and o.high is not None and o.low is not None else math.inf

    def within_budget(self, runs: list[Run], reason: str) -> tuple[list[Run], str]:
        if self.curve.n_runs + len(runs) <= self.space.max_runs:
            return runs, reason
        return [], f"stopped at sweep.max_runs={self.space.max_runs}: {reason}"

    def untrained(self, lrs: Iterable[float], seeds: Sequence[int]) -> list[Run]:
        """Those of these runs that are new, within the limits, and not at an LR that diverged."""
        had = {p.log2_lr: p for p in self.curve.points}
        return [
            (log2_lr, seed)
            for log2_lr in dict.fromkeys(map(self.space.on, lrs))
            if log2_lr not in had or not had[log2_lr].censored
            for seed in seeds
            if log2_lr not in had or seed not in had[log2_lr].losses
        ]

    def best(self) -> Point:
        return min(self.curve.usable, key=lambda p: p.mean)

    def bracket(self) -> Iterator[tuple[list[float], tuple[int, ...], str]]:
        """LRs, and their seeds, that every curve needs before its draws can choose: what to try in turn."""
        best = self.best()
        yield list(self.neighbours()), self.space.seeds[: len(best.losses)], "the best LR lacks a neighbour"
        if self.optimum.posterior is None:
            return
        middle, trained = self.optimum.center, [p.log2_lr for p in self.curve.points]
        near = [p.log2_lr for p in self.curve.usable if abs(p.log2_lr - middle) <= NEAR_RADIUS]
        seeds = self.space.seeds[: max(FIRST_SEEDS, len(best.losses))]
        yield near, seeds, "LRs around the minimum lack seeds"
        if 0 < len(near) < MIN_NEAR_POINTS:
            beyond = [x for x in (min(near) - COARSE_STEP, max(near) + COARSE_STEP) if self.is_open(x)]
            between = [x for x in self.lattice_around(middle) if self.is_open(x)]
            for chosen in (beyond, between):
                yield (
                    sorted(chosen, key=lambda x: abs(x - middle))[:1],
                    seeds,
                    f"fewer than {MIN_NEAR_POINTS} LRs around it",
                )
        posterior = self.optimum.posterior
        cell = posterior.grid[1] - posterior.grid[0]
        for end, sign in ((posterior.grid[0], -1), (posterior.grid[-1], 1)):
            reached = float(np.mean(np.abs(posterior.minima - end) <= cell)) > TAILS[0]
            if reached and not any((x - end) * sign > EPS for x in trained):
                yield [float(end) + sign * COARSE_STEP], seeds, "the minimum may lie beyond what was trained"

    def neighbours(self) -> Iterator[float]:
        """LRs that are missing beside the best one; before a cliff, half of the way to it."""
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
        """Whether an LR is within the limits, below the cliff and not trained yet."""
        cliff = min((p.log2_lr for p in self.curve.points if p.censored), default=math.inf)
        new = all(abs(p.log2_lr - log2_lr) > EPS for p in self.curve.points)
        return new and self.space.lowest <= log2_lr <= self.space.highest and log2_lr < cliff

    def lattice_around(self, middle: float) -> list[float]:
        """The LRs of the lattice within FILL of the optimum."""
        count = math.ceil(REFINE_RADIUS / self.space.step)
        around = [self.space.on(middle) + i * self.space.step for i in range(-count, count + 1)]
        return [x for x in around if abs(x - middle) <= REFINE_RADIUS]

    def options(self, posterior: Posterior) -> Iterator[Candidate]:
        """What could be trained: another seed at every LR at hand, or an LR between them with their seeds."""
        inside = [p for p in self.curve.usable if posterior.covers(p.log2_lr)]
        noise = {p.log2_lr: self.noise(p, posterior) for p in inside}
        typical = float(np.median(list(noise.values())))
        another = [seed for seed in self.space.seeds if any(seed not in p.losses for p in inside)][:1]
        if repeats := self.untrained([p.log2_lr for p in inside], another):
            lrs = [log2_lr for log2_lr, _ in repeats]
            shift = SHIFT * typical if len(lrs) == len(inside) else 0.0  # of a new seed, only differences tell
            yield Candidate(repeats, lrs, np.diag([noise[x] for x in lrs]) + shift)
        seeds = self.space.seeds[: max(FIRST_SEEDS, min(len(p.losses) for p in inside))]
        for log2_lr in self.lattice_around(self.optimum.log2_lr or 0.0):
            if posterior.covers(log2_lr) and self.is_open(log2_lr):
                yield Candidate(self.untrained([log2_lr], seeds), [log2_lr], np.array([[typical / len(seeds)]]))

    def refine(self, posterior: Posterior, options: list[Candidate]) -> list[Run]:
        """The options that take away the most variance of the minimum per run, until the rest is expected to suffice:
        LRs, or another seed of all there are. None where the budget has no room for any."""
        goal = float(posterior.minima.var()) - (self.space.half_width / NormalDist().inv_cdf(TAILS[1])) ** 2
        room = self.space.max_runs - self.curve.n_runs
        taken: list[Candidate] = []
        gained = 0.0
        while len(taken) < MAX_PER_ROUND and (not taken or gained < goal):
            left = [o for o in options if len(o.runs) <= room and o not in taken and (len(o.lrs) == 1 or not taken)]
            gains = [(variance_reduction(posterior, [*taken, o]), o) for o in left]
            if not gains or (taken and len(taken[0].lrs) > 1):
                break
            gained, best = max(gains, key=lambda pair: (pair[0] - gained) / len(pair[1].runs))
            taken.append(best)
            room -= len(best.runs)
        return [run for option in taken for run in option.runs]

    def noise(self, point: Point, posterior: Posterior) -> float:
        """Variance of one run's loss; where no seed was repeated, what the draws leave open."""
        if self.sds:
            return self.sds[point.log2_lr] ** 2 * len(point.losses)
        return float(posterior.at(np.full(len(posterior.minima), point.log2_lr)).var())


@dataclass(frozen=True, eq=False)
class Candidate:
    """Some runs, and the losses that they would give: at which LRs, with which covariance of the noise."""

    runs: list[Run]
    lrs: list[float]
    noise: np.ndarray


def variance_reduction(posterior: Posterior, options: Sequence[Candidate]) -> float:
    """Variance of the minimum that these runs would take away."""
    lrs = [x for option in options for x in option.lrs]
    curves = np.array([posterior.at(np.full(len(posterior.minima), x)) for x in lrs])  # (LRs, draws)
    curves = curves - curves.mean(axis=1, keepdims=True)
    across = curves @ (posterior.minima - posterior.minima.mean()) / len(posterior.minima)
    covariance = curves @ curves.T / len(posterior.minima) + block_diag(*(option.noise for option in options))
    return float(across @ np.linalg.solve(covariance, across))


def _expected(size: tuple[float, float], known: Mapping[tuple[float, float], Optimum]) -> float:
    """The optimum that the other sizes lead to expect: a plane through them, its slopes drawn to no drift."""
    places = np.array([[1.0, math.log2(r_n), math.log2(r_L)] for r_n, r_L in known])
    centers = np.array([o.center for o in known.values()])
    weights = np.array([1 / ((UNKNOWN if o.se is None else o.se) ** 2 + SCATTER**2) for o in known.values()])
    prior = np.diag([EPS, SLOPE**-2, SLOPE**-2])
    middle = weights @ centers / weights.sum()
    plane = np.linalg.solve(places.T * weights @ places + prior, places.T * weights @ (centers - middle))
    return float(middle + plane @ [1.0, math.log2(size[0]), math.log2(size[1])])
