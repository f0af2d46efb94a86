"""Optimum: the best LR of a curve, drawn from everything that the losses around it leave possible.

Draws of whole curves (see valleys) give draws of their minima; interval, drift and regret are quantiles of the same
draws. Everything is in octaves (log2 LR) and nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from mupsweep.analysis.curves import LossCurve, Point
from mupsweep.analysis.gaussian_process import Array, Window, draw, noise_without_seeds
from mupsweep.formatting import counted

CONFIDENCE = 0.95
TAILS = (0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2)
WINDOW = 2.0  # octaves on each side of the best point that are looked at
WALL = 4.0  # standard errors by which an LR must be worse than the best of all to be worse for certain
MIN_POINTS = 5  # on coarse grids the window reaches further, until it has so many points
PRIOR_DOF = 4  # weight of the typical point's noise against a point's own seeds
ROUNDING = 1e-9  # nats: seeds that differ by less were not different


@dataclass(frozen=True)
class Posterior:
    """What the losses around the minimum leave possible.

    Attributes:
        grid: (cells,) log2 LRs over the fitted window.
        draws: (draws, cells) losses; row i of every size of a ladder has the same bend and noise.
        minima: (draws,) log2 LR of the minimum of each draw.
        losses: (draws,) loss there.
    """

    grid: Array
    draws: Array
    minima: Array
    losses: Array

    @property
    def mean(self) -> Array:
        """(cells,) the expected loss."""
        return self.draws.mean(axis=0)

    def covers(self, log2_lr: float) -> bool:
        """Whether the losses around an LR were looked at."""
        return bool(self.grid[0] <= log2_lr <= self.grid[-1])

    def at(self, log2_lrs: Array) -> Array:
        """(draws,) the loss of draw i at log2_lrs[i]; beyond the window that of its end."""
        position = (log2_lrs - self.grid[0]) / (self.grid[1] - self.grid[0])
        left = np.clip(np.floor(position).astype(int), 0, len(self.grid) - 2)
        part = np.clip(position - left, 0.0, 1.0)
        rows = np.arange(len(self.draws))
        return self.draws[rows, left] * (1 - part) + self.draws[rows, left + 1] * part


@dataclass(frozen=True)
class Optimum:
    """The best LR of one size.

    Attributes:
        bracketed: whether worse LRs were trained on both sides; if not, there is no estimate, only a bound.
        log2_lr: the median of the drawn minima; None where it is not bracketed or lies at an end of what was drawn.
        low, high: interval at CONFIDENCE; None where the data give no bound on that side.
        loss: the loss at the minimum; None where `log2_lr` is.
        se: standard deviation of the drawn minima; None where a side has no bound.
        reason: why there is no estimate, or no interval.
        posterior: the drawn curves, for drift, regret and figures.
    """

    curve: LossCurve
    bracketed: bool
    log2_lr: float | None
    low: float | None
    high: float | None
    loss: float | None
    se: float | None
    reason: str | None
    posterior: Posterior | None

    @property
    def known(self) -> bool:
        """Whether it has draws that differ: what is derived from optima is told of such only."""
        return self.posterior is not None and bool(self.se)

    @property
    def center(self) -> float:
        """Where to look further: the median of the drawn minima, at an end too; the best LR where nothing was drawn."""
        if self.posterior is not None:
            return float(np.median(self.posterior.minima))
        return min(self.curve.usable, key=lambda p: p.mean).log2_lr


def optima(curves: Sequence[LossCurve]) -> list[Optimum]:
    """The optimum of every curve. The curves of one ladder are given together: bend and noise are shared."""
    return located(curves, *point_sds(curves))


def located(curves: Sequence[LossCurve], sds: Sequence[Mapping[float, float]], dof: float) -> list[Optimum]:
    """The same with the noise of every point given, as `point_sds` gives it."""
    level = 1.0 if dof else _blind_noise(curves)
    windows = [window(curve, sd, level) for curve, sd in zip(curves, sds, strict=True)]
    drawn = iter(draw([w for w in windows if isinstance(w, Window)], dof))
    bounds = [walls(curve, sd, level) for curve, sd in zip(curves, sds, strict=True)]
    return [
        Optimum(curve, False, None, *between, None, None, made, None)
        if isinstance(made, str)
        else _optimum(curve, between, _posterior(*next(drawn)))
        for curve, made, between in zip(curves, windows, bounds, strict=True)
    ]


def window(curve: LossCurve, sds: Mapping[float, float], level: float) -> Window | str:
    """The seed means around the best point, or the reason why it is no minimum.

    The best point is lowest partly by luck, and around any luckiest point of a flat noisy curve the others look like a
    valley. So the window holds every LR that noise may have kept from being the best.
    """
    points = curve.usable
    if not points:
        return "every LR diverges: train lower ones"
    if len(points) < 3:
        return f"{counted(len(points), 'LR')} with a loss; a minimum needs at least 3"
    best = min(range(len(points)), key=lambda i: points[i].mean)
    if best == 0:
        return f"the best LR is the lowest that has a loss (2^{points[best].log2_lr:g}): train lower ones"
    if best == len(points) - 1:
        beyond = "the next one diverges: train LRs between" if curve.points[-1].censored else "train higher ones"
        return f"the best LR is the highest that has a loss (2^{points[best].log2_lr:g}); {beyond}"
    center = points[best].log2_lr
    reach = max(WINDOW, sorted(abs(p.log2_lr - center) for p in points)[min(MIN_POINTS, len(points)) - 1])
    worse = _worse(curve, sds, level)
    rivals = [p.log2_lr for p in points if p.log2_lr not in worse]
    low, high = min(center - reach, *rivals), max(center + reach, *rivals)
    kept = [p for p in points if low - 1e-9 <= p.log2_lr <= high + 1e-9]
    return Window(
        center,
        np.array([p.log2_lr - center for p in kept]),
        np.array([p.mean for p in kept]),
        np.array([sds[p.log2_lr] for p in kept]),
        _tilt(kept),
    )


def _worse(curve: LossCurve, sds: Mapping[float, float], level: float) -> list[float]:
    """The LRs that are worse than the best beyond what noise (`level` times the `sds`) explains, or diverge."""
    best = min(curve.usable, key=lambda p: p.mean, default=None)
    return [
        p.log2_lr
        for p in curve.points
        if p.censored
        or (best and p.losses and p.mean - best.mean > WALL * level * math.hypot(sds[p.log2_lr], sds[best.log2_lr]))
    ]


def walls(curve: LossCurve, sds: Mapping[float, float], level: float) -> tuple[float | None, float | None]:
    """The nearest LRs below and above every possible best one that are worse for certain; None where there is none."""
    worse = _worse(curve, sds, level)
    rivals = [p.log2_lr for p in curve.usable if p.log2_lr not in worse]
    if not rivals:
        return None, min(worse, default=None)
    below, above = (x for x in worse if x < min(rivals)), (x for x in worse if x > max(rivals))
    return max(below, default=None), min(above, default=None)


def point_sds(curves: Sequence[LossCurve]) -> tuple[list[dict[float, float]], float]:
    """The standard deviation of every seed mean, by log2 LR, for each curve, and the degrees of freedom behind them.

    Noise grows towards the cliff, so each point has its own; few seeds estimate it badly, so it is moderated: pooled
    with the typical point as if that were PRIOR_DOF further seeds (Smyth 2004, doi 10.2202/1544-6115.1027). Typical
    is a median over the points around all optima of the ladder, which one unstable run cannot move. What a seed shifts
    at every LR alike moves no optimum and is removed. Where no LR has several seeds: 1, with no degree of freedom.
    """
    own: list[dict[float, tuple[float, int]]] = []
    near: list[float] = []
    freedom = 0
    for curve in curves:
        points = [p for p in curve.usable if len(p.losses) > 1]  # a search repeats seeds near the optimum only
        seeds = sorted(set.intersection(*(set(p.losses) for p in points))) if points else []
        own.append({})
        if len(seeds) < 2:
            continue
        best = min(curve.usable, key=lambda p: p.mean).log2_lr
        table = np.array([[p.losses[s] for s in seeds] for p in points])  # (LRs, seeds)
        rest = table - table.mean(axis=1, keepdims=True)
        rest = rest - np.median(rest, axis=0, keepdims=True)
        dof = len(seeds) - 1
        for point, row in zip(points, rest, strict=True):
            variance = float(row @ row) / dof
            own[-1][point.log2_lr] = (variance, dof)
            if abs(point.log2_lr - best) <= WINDOW:
                near.append(variance * dof / float(stats.chi2.median(dof)))
                freedom += dof
    typical = float(np.median(near)) if near else 0.0
    if typical < ROUNDING**2:
        return [{p.log2_lr: 1.0 for p in curve.points} for curve in curves], 0.0

    def sd(curve_own: Mapping[float, tuple[float, int]], point: Point) -> float:
        variance, dof = curve_own.get(point.log2_lr, (0.0, 0))
        moderated = (PRIOR_DOF * typical + dof * variance) / (PRIOR_DOF + dof)
        return math.sqrt(moderated / max(1, len(point.losses)))

    return [{p.log2_lr: sd(mine, p) for p in c.points} for c, mine in zip(curves, own, strict=True)], float(freedom)


def _blind_noise(curves: Sequence[LossCurve]) -> float:
    """The noise of a run where no seed was repeated: what the evidence of the whole curves says."""
    whole = [
        Window(
            0.0, np.array([p.log2_lr for p in c.usable]), np.array([p.mean for p in c.usable]), np.ones(len(c.usable))
        )
        for c in curves
        if len(c.usable) > 3
    ]
    if not whole:
        return math.inf
    return noise_without_seeds(whole)


def _tilt(points: Sequence[Point]) -> float:
    """How much more the slopes of the seeds differ than their noise explains, for the mean of the seeds."""
    seeds = sorted(set.intersection(*(set(p.losses) for p in points)))
    if len(seeds) < 3:  # two slopes hardly tell
        return 0.0
    x = np.array([p.log2_lr for p in points])
    x = x - x.mean()
    table = np.array([[p.losses[s] for s in seeds] for p in points])
    rest = table - table.mean(axis=1, keepdims=True)
    rest = rest - rest.mean(axis=0, keepdims=True)
    slopes = x @ rest / (x @ x)
    left = rest - np.outer(x, slopes)
    freedom = (len(points) - 2) * (len(seeds) - 1)
    noise = float((left**2).sum()) / max(1, freedom) / float(x @ x)
    excess = float(slopes @ slopes) / (len(seeds) - 1) - noise
    return math.sqrt(max(0.0, excess) / len(seeds))


def _posterior(grid: Array, draws: Array) -> Posterior:
    """The minimum of every draw, by a parabola through its lowest cell and the two beside it."""
    rows, best = np.arange(len(draws)), draws.argmin(axis=1)
    inner = np.clip(best, 1, len(grid) - 2)
    left, middle, right = draws[rows, inner - 1], draws[rows, inner], draws[rows, inner + 1]
    bend = left - 2 * middle + right
    shift = np.where((best == inner) & (bend > 0), 0.5 * (left - right) / np.where(bend > 0, bend, 1.0), 0.0)
    minima = grid[best] + shift * (grid[1] - grid[0])
    return Posterior(grid, draws, minima, draws[rows, best] - 0.25 * (left - right) * shift)


def _optimum(curve: LossCurve, between: tuple[float | None, float | None], posterior: Posterior) -> Optimum:
    """The optimum from its draws; where they reach an end of the window, only the walls of the valley bound it."""
    low, middle, high = (float(q) for q in np.quantile(posterior.minima, (TAILS[0], 0.5, TAILS[1])))
    step = posterior.grid[1] - posterior.grid[0]
    first, last = posterior.grid[0] + step, posterior.grid[-1] - step
    known, inside = first <= low and high <= last, first <= middle <= last
    return Optimum(
        curve,
        bracketed=True,
        log2_lr=middle if inside else None,
        low=low if known else between[0],
        high=high if known else between[1],
        loss=float(np.median(posterior.losses)) if inside else None,
        se=float(posterior.minima.std()) if known else None,
        reason=None if known else "the curve is too flat or too noisy to bound its minimum: add seeds or LRs",
        posterior=posterior,
    )
