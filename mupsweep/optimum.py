"""Optimum: the best LR of a curve, with an interval that holds noise and the bias of fitting.

Everything is in octaves (log2 LR) and nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from mupsweep.curves import LossCurve, Point

CONFIDENCE = 0.95
WINDOW = 1.5  # octaves on each side of the best point that a fit sees at most
PRIOR_DOF = 4  # weight of the typical point's noise against a point's own seeds
MIN_POINTS = 5  # on coarse grids it reaches further, until it has so many points; narrow fits see just these
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """A polynomial of degree 2 or 3 through the points around the minimum.

    Attributes:
        center: log2 LR of the best point, the origin of the polynomial.
        xs, ys: the fitted points, xs relative to the center.
        sds: the standard deviation of each point, up to a common factor; a fit weighs points by its inverse square.
        beta: coefficients of 1, x, x^2 (, x^3).
        unit: times `Noise.variance`, the covariance of beta.
        vertex: the minimum, relative to the center.
        others: the polynomials that were not chosen, to tell how far the choice matters.
    """

    center: float
    xs: Array
    ys: Array
    sds: Array
    beta: Array
    unit: Array
    vertex: float
    others: tuple[Fit, ...] = ()

    def value(self, log2_lr: float) -> float:
        x = log2_lr - self.center
        return float(self.beta @ x ** np.arange(len(self.beta)))

    def covers(self, log2_lr: float) -> bool:
        """Whether the points around an LR were fitted: beyond them the polynomial means nothing."""
        return self.xs[0] <= log2_lr - self.center <= self.xs[-1]

    def slope_weights(self, x: float) -> Array:
        """d value / dx = slope_weights(x) @ beta."""
        k = np.arange(len(self.beta), dtype=float)
        return np.where(k > 0, k * x ** np.maximum(k - 1, 0), 0.0)

    @property
    def slope_pull(self) -> Array:
        """d slope at the vertex / d loss of each point."""
        design = np.vander(self.xs, len(self.beta), increasing=True)
        return self.slope_weights(self.vertex) @ self.unit @ (design / self.sds[:, None] ** 2).T

    @property
    def pull(self) -> dict[float, tuple[float, float]]:
        """(d vertex / d loss of a point, the point's sd), by log2 LR, to first order."""
        k = np.arange(len(self.beta), dtype=float)
        curvature = float(np.where(k > 1, k * (k - 1) * self.vertex ** np.maximum(k - 2, 0), 0.0) @ self.beta)
        moved = -self.slope_pull / curvature
        return {
            float(self.center + x): (float(m), float(sd)) for x, m, sd in zip(self.xs, moved, self.sds, strict=True)
        }

    @property
    def residuals(self) -> Array:
        """In units of the points' standard deviations."""
        return (self.ys - np.vander(self.xs, len(self.beta), increasing=True) @ self.beta) / self.sds


@dataclass(frozen=True)
class Noise:
    """How large noise is over the sizes of a ladder.

    Attributes:
        variance: of a point about the fitted polynomial, in units of the square of its `sds`.
        dof: degrees of freedom behind it.
    """

    variance: float
    dof: float

    @property
    def quantile(self) -> float:
        """Student's two-sided quantile at CONFIDENCE."""
        return float(stats.t.ppf(0.5 + CONFIDENCE / 2, max(self.dof, 1.0)))


@dataclass(frozen=True)
class Optimum:
    """The best LR of one size.

    Attributes:
        bracketed: whether worse LRs were trained on both sides; if not, there is no estimate, only a bound.
        log2_lr: the fitted minimum; None where it is not bracketed.
        low, high: interval at CONFIDENCE; None where the data give no bound on that side.
        loss: the fitted loss at the minimum.
        se: standard error of log2_lr, for further fits; the curves of a ladder share most of their bias.
        reason: why there is no estimate, or no interval.
        fit: the polynomial, for drawing and regret.
    """

    curve: LossCurve
    bracketed: bool
    log2_lr: float | None
    low: float | None
    high: float | None
    loss: float | None
    se: float | None
    reason: str | None
    fit: Fit | None


def optima(curves: Sequence[LossCurve]) -> list[Optimum]:
    """The optimum of every curve. The curves of one ladder are given together: their noise is pooled."""
    sds = point_sds(curves)
    found = [candidates(curve, sd) for curve, sd in zip(curves, sds, strict=True)]
    noise = pooled_noise([(c, fits[-1]) for c, fits in zip(curves, found, strict=True) if isinstance(fits, list)])
    chosen = [fits if isinstance(fits, str) else _choose(fits, noise) for fits in found]
    noise = pooled_noise([(c, made) for c, made in zip(curves, chosen, strict=True) if isinstance(made, Fit)])
    return [_optimum(curve, made, noise, sd) for curve, made, sd in zip(curves, chosen, sds, strict=True)]


def point_sds(curves: Sequence[LossCurve]) -> list[dict[float, float]]:
    """The standard deviation of every seed mean, by log2 LR, for each curve; 1 where no curve has several seeds.

    Noise grows towards the cliff, so each point has its own; few seeds estimate it badly, so it is moderated: pooled
    with the typical point as if that were PRIOR_DOF further seeds (Smyth 2004, doi 10.2202/1544-6115.1027). Typical
    is a median over the points around all optima of the ladder, which one unstable run cannot move. What a seed shifts
    at every LR alike moves no optimum and is removed.
    """
    own: list[dict[float, tuple[float, int]]] = []
    near: list[float] = []
    for curve in curves:
        points = curve.usable
        seeds = sorted(set.intersection(*(set(p.losses) for p in points))) if points else []
        own.append({})
        if len(seeds) < 2:
            continue
        best = min(points, key=lambda p: p.mean).log2_lr
        table = np.array([[p.losses[s] for s in seeds] for p in points])  # (LRs, seeds)
        rest = table - table.mean(axis=1, keepdims=True)
        rest = rest - np.median(rest, axis=0, keepdims=True)
        dof = len(seeds) - 1
        for point, row in zip(points, rest, strict=True):
            variance = float(row @ row) / dof
            own[-1][point.log2_lr] = (variance, dof)
            if abs(point.log2_lr - best) <= WINDOW:
                near.append(variance * dof / float(stats.chi2.median(dof)))
    typical = float(np.median(near)) if near else 0.0
    if typical == 0.0:
        return [{p.log2_lr: 1.0 for p in curve.points} for curve in curves]

    def sd(curve_own: Mapping[float, tuple[float, int]], point: Point) -> float:
        variance, dof = curve_own.get(point.log2_lr, (0.0, 0))
        moderated = (PRIOR_DOF * typical + dof * variance) / (PRIOR_DOF + dof)
        return math.sqrt(moderated / max(1, len(point.losses)))

    return [{p.log2_lr: sd(mine, p) for p in c.points} for c, mine in zip(curves, own, strict=True)]


def candidates(curve: LossCurve, sds: Mapping[float, float]) -> list[Fit] | str:
    """Polynomials through the seed means around the best point, the widest first, or the reason why there are none.

    A valley is steeper towards the cliff, so a cubic; a wide window averages noise away, and where it cannot follow the
    valley a narrower one can.
    """
    points = curve.usable
    if len(points) < 3:
        return f"{len(points)} LRs with a loss; a minimum needs at least 3"
    best = min(range(len(points)), key=lambda i: points[i].mean)
    if best == 0:
        return f"the best LR is the lowest that has a loss (2^{points[best].log2_lr:g}): train lower ones"
    if best == len(points) - 1:
        beyond = "the next one diverges: train LRs between" if curve.points[-1].censored else "train higher ones"
        return f"the best LR is the highest that has a loss (2^{points[best].log2_lr:g}); {beyond}"
    center = points[best].log2_lr
    distances = sorted(abs(p.log2_lr - center) for p in points)
    narrow = distances[min(MIN_POINTS, len(points)) - 1]
    wide, near = ([p for p in points if abs(p.log2_lr - center) <= r + 1e-9] for r in (max(WINDOW, narrow), narrow))
    three = points[best - 1 : best + 2]
    shapes = [(wide, 3), (near, 3), (near, 2), (three, 2)]
    tried = [_polynomial(center, window, degree, sds) for window, degree in shapes if len(window) > degree]
    fits = [made for made in tried if made is not None]
    return fits or "the losses around the best LR have no minimum: noise, or too few LRs; add seeds or LRs between"


def _choose(fits: list[Fit], noise: Noise) -> Fit:
    """The widest polynomial whose residuals are no larger than noise explains; the others tell its bias."""
    for made in fits:
        dof = len(made.ys) - len(made.beta)
        squares = float(made.residuals @ made.residuals)
        if dof == 0 or not squares > dof * noise.variance * stats.f.ppf(0.95, dof, max(noise.dof, 1.0)):
            return replace(made, others=tuple(other for other in fits if other is not made))
    return fits[-1]


def pooled_noise(fitted: Sequence[tuple[LossCurve, Fit]]) -> Noise:
    """How far a seed mean lies from its polynomial, over all sizes of a ladder.

    Two estimates: the scatter between seeds (after removing what a seed shifts at every LR alike), and the scatter of
    the means about the fit, which also holds what the polynomial cannot follow. Where the second is significantly
    larger it stands alone, else both are pooled. Seeds may also tilt whole curves; where they do, the seed estimate is
    raised to what explains the tilt.
    """
    pure_ss = pure_dof = fit_ss = fit_dof = tilt_ss = tilt_dof = 0.0
    for curve, made in fitted:
        residuals = made.residuals
        fit_ss += float(residuals @ residuals)
        fit_dof += len(residuals) - len(made.beta)
        window = [p for p in curve.usable if made.covers(p.log2_lr)]
        seeds = sorted(set.intersection(*(set(p.losses) for p in window)))
        if len(seeds) < 2:
            continue
        table = np.array([[p.losses[s] for s in seeds] for p in window])  # (LRs, seeds)
        rest = table - table.mean(axis=1, keepdims=True)
        rest = (rest - rest.mean(axis=0, keepdims=True)) / made.sds[:, None]
        pure_ss += float((rest**2).sum()) / len(seeds)
        pure_dof += (len(window) - 1) * (len(seeds) - 1)
        weights = made.slope_pull
        slopes = weights @ table
        tilt_ss += (
            float(((slopes - slopes.mean()) ** 2).sum())
            / float((weights * made.sds) @ (weights * made.sds))
            / len(seeds)
        )
        tilt_dof += len(seeds) - 1
    if not fitted:
        return Noise(math.nan, 1.0)
    if pure_dof == 0:
        return Noise(fit_ss / fit_dof, fit_dof) if fit_dof else Noise(math.nan, 1.0)
    pure = pure_ss / pure_dof
    if tilt_dof:
        pure = max(pure, tilt_ss / tilt_dof)
    if fit_dof == 0:
        return Noise(pure, pure_dof)
    scatter = fit_ss / fit_dof
    if scatter > pure * stats.f.ppf(0.95, fit_dof, pure_dof):
        return Noise(scatter, fit_dof)
    return Noise((pure * pure_dof + scatter * fit_dof) / (pure_dof + fit_dof), pure_dof + fit_dof)


def _polynomial(center: float, points: Sequence[Point], degree: int, sd: Mapping[float, float]) -> Fit | None:
    xs = np.array([p.log2_lr - center for p in points])
    ys = np.array([p.mean for p in points])
    sds = np.array([sd[p.log2_lr] for p in points])
    design = np.vander(xs, degree + 1, increasing=True)
    weighed = design / sds[:, None] ** 2
    unit = np.linalg.inv(design.T @ weighed).astype(np.float64)
    beta = unit @ weighed.T @ ys
    roots = np.roots(np.polyder(beta[::-1]))
    inside = [float(r.real) for r in roots if abs(r.imag) < 1e-9 and xs[0] <= r.real <= xs[-1]]
    curvature = np.polyder(beta[::-1], 2)
    minima = [r for r in inside if np.polyval(curvature, r) > 0]
    if not minima or len(inside) > 1:  # a second turning point inside the window is noise, not a valley
        return None
    return Fit(center, xs, ys, sds, beta, unit, minima[0])


def _optimum(curve: LossCurve, made: Fit | str, noise: Noise, sds: Mapping[float, float]) -> Optimum:
    if isinstance(made, str):
        low, high = _bounds(curve)
        return Optimum(curve, False, None, low, high, None, None, made, None)
    best = made.center + made.vertex
    loss = made.value(best)
    if not math.isfinite(noise.variance):
        return Optimum(curve, True, best, None, None, loss, None, "one seed and no spare LRs: no interval", made)
    left, right = _valley(curve, noise, sds)
    low, high = _root_interval(made, noise)
    low, high = _tighter(low, left - made.center, max), _tighter(high, right - made.center, min)
    bias = max((_disagreement(made, other, noise) for other in made.others), default=0.0)
    # where the grid falls differs from size to size, and the bias with it: half of it does not cancel in a drift
    se = None if low is None or high is None else math.hypot((high - low) / (2 * noise.quantile), bias / 2)
    low, high = (None if low is None else low - bias), (None if high is None else high + bias)
    reason = None if se is not None else "the curve is too flat or too noisy to bound its minimum: add seeds or LRs"
    low, high = (None if x is None else made.center + x for x in (low, high))
    return Optimum(curve, True, best, low, high, loss, se, reason, made)


def _disagreement(made: Fit, other: Fit, noise: Noise) -> float:
    """Octaves between the minima of two polynomials beyond what noise explains: the bias of choosing one of them."""
    mine, theirs = made.pull, other.pull
    none = (0.0, 0.0)
    variance = noise.variance * sum(
        ((mine.get(x, none)[0] - theirs.get(x, none)[0]) * max(mine.get(x, none)[1], theirs.get(x, none)[1])) ** 2
        for x in mine.keys() | theirs.keys()
    )
    gap = made.center + made.vertex - other.center - other.vertex
    return max(0.0, abs(gap) - math.sqrt(variance))


def _root_interval(made: Fit, noise: Noise) -> tuple[float | None, float | None]:
    """The LRs at which the slope is not significantly different from 0, around the minimum (Fieller 1954).

    None on a side where that reaches beyond the fitted points.
    """

    def undecided(x: float) -> bool:
        weights = made.slope_weights(x)
        slope = float(weights @ made.beta)
        return slope**2 <= noise.quantile**2 * noise.variance * float(weights @ made.unit @ weights)

    def edge(end: float) -> float | None:
        inside, step = made.vertex, (end - made.vertex) / 256
        for i in range(1, 257):
            outside = made.vertex + i * step
            if not undecided(outside):
                for _ in range(30):
                    middle = (inside + outside) / 2
                    inside, outside = (middle, outside) if undecided(middle) else (inside, middle)
                return (inside + outside) / 2
            inside = outside
        return None

    return edge(float(made.xs[0])), edge(float(made.xs[-1]))


def _valley(curve: LossCurve, noise: Noise, sds: Mapping[float, float]) -> tuple[float, float]:
    """The nearest LRs on both sides with a loss significantly above the best: a valley's minimum lies between them."""
    points = curve.usable
    best = min(points, key=lambda p: p.mean)
    unit = noise.quantile * math.sqrt(noise.variance)
    floor = best.log2_lr
    higher = [p.log2_lr for p in points if p.mean - best.mean > unit * math.hypot(sds[p.log2_lr], sds[floor])]
    left = max((x for x in higher if x < best.log2_lr), default=-math.inf)
    return left, min((x for x in higher if x > best.log2_lr), default=math.inf)


def _tighter(bound: float | None, other: float, choose: Callable[[float, float], float]) -> float | None:
    """The tighter of two bounds, either of which may be missing."""
    if not math.isfinite(other):
        return bound
    return other if bound is None else choose(bound, other)


def _bounds(curve: LossCurve) -> tuple[float | None, float | None]:
    """What an unbracketed curve still says: the optimum lies below its second point, or above its last but one."""
    points = curve.usable
    if len(points) < 2:
        return None, None
    best = min(range(len(points)), key=lambda i: points[i].mean)
    low = points[best - 1].log2_lr if best > 0 else None
    high = points[best + 1].log2_lr if best + 1 < len(points) else None
    above = [p.log2_lr for p in curve.points if p.censored and p.log2_lr > points[best].log2_lr]
    return low, high if high is not None else min(above, default=None)
