"""Optimum: the best LR of a curve, drawn from everything that the losses around it leave possible.

The loss around its minimum is a parabola that bends: its third derivative is white noise of unknown strength (an
integrated Wiener process; the posterior mean is a quintic smoothing spline, Wahba 1978). Strength of the bend and of
the noise are shared by all sizes of a ladder and weighed by their evidence, so that the data choose between a stiff
parabola and a lopsided valley. Draws of the whole curve give draws of its minimum; interval, drift and regret are
quantiles of the same draws. Everything is in octaves (log2 LR) and nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from mupsweep.curves import LossCurve, Point

CONFIDENCE = 0.95
TAILS = (0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2)
WINDOW = 2.0  # octaves on each side of the best point that are looked at
WALL = 4.0  # standard errors by which an LR must be worse than the best of all to be worse for certain
MIN_POINTS = 5  # on coarse grids the window reaches further, until it has so many points
DRAWS = 2000
CELLS = 40  # of the window, on which curves are drawn
BENDS = np.geomspace(0.03, 4.0, 8)  # prior: third derivative, in ranges of loss per octave^2.5, each as likely
NOISES = np.geomspace(0.6, 2.2, 6)  # in units of what the seeds say
BLIND_NOISES = np.geomspace(0.003, 0.5, 12)  # in ranges of loss, where no seed was repeated
PRIOR_DOF = 4  # weight of the typical point's noise against a point's own seeds
NEGLIGIBLE = 0.005  # relative evidence below which a setting is not drawn
ROUNDING = 1e-9  # nats: seeds that differ by less were not different
Array = NDArray[np.floating[Any]]


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
        log2_lr: the median of the drawn minima; None where it is not bracketed.
        low, high: interval at CONFIDENCE; None where the data give no bound on that side.
        loss: the loss at the minimum.
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


@dataclass(frozen=True)
class Window:
    """The seed means around the best point of a curve.

    Attributes:
        center: log2 LR of the best point, the origin of `xs`.
        xs, ys: octaves and nats.
        sds: standard deviation of each point, up to the common factor that is estimated with the bend.
        tilt: standard deviation of a common slope of all points, which seeds give to a whole curve, nats per octave.
    """

    center: float
    xs: Array
    ys: Array
    sds: Array
    tilt: float = 0.0


def optima(curves: Sequence[LossCurve]) -> list[Optimum]:
    """The optimum of every curve. The curves of one ladder are given together: bend and noise are shared."""
    sds, dof = point_sds(curves)
    level = 1.0 if dof else _blind_noise(curves)
    windows = [window(curve, sd, level) for curve, sd in zip(curves, sds, strict=True)]
    posteriors = iter(_draw([w for w in windows if isinstance(w, Window)], dof))
    bounds = [walls(curve, sd, level) for curve, sd in zip(curves, sds, strict=True)]
    return [
        Optimum(curve, False, None, *between, None, None, made, None)
        if isinstance(made, str)
        else _optimum(curve, between, next(posteriors))
        for curve, made, between in zip(curves, windows, bounds, strict=True)
    ]


def window(curve: LossCurve, sds: Mapping[float, float], level: float) -> Window | str:
    """The seed means around the best point, or the reason why it is no minimum.

    The best point is lowest partly by luck, and around any luckiest point of a flat noisy curve the others look like a
    valley. So the window holds every LR that noise may have kept from being the best.
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
    if best is None:
        return []
    return [
        p.log2_lr
        for p in curve.points
        if p.censored
        or (p.losses and p.mean - best.mean > WALL * level * math.hypot(sds[p.log2_lr], sds[best.log2_lr]))
    ]


def walls(curve: LossCurve, sds: Mapping[float, float], level: float) -> tuple[float | None, float | None]:
    """The nearest LRs below and above every possible best one that are worse for certain; None where there is none."""
    worse = _worse(curve, sds, level)
    rivals = [p.log2_lr for p in curve.usable if p.log2_lr not in worse]
    if not rivals:
        return None, None
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
    settings, weights = _settings(whole, 0.0)
    return float(weights @ np.array([noise for _, noise in settings]))


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


def _draw(windows: Sequence[Window], dof: float) -> list[Posterior]:
    """Draws of every curve, the settings of bend and noise in proportion to their joint evidence."""
    if not windows:
        return []
    settings, weights = _settings(windows, dof)
    random = np.random.default_rng(0)  # fixed: the same records always give the same numbers
    counts = random.multinomial(DRAWS, weights)
    made = []
    for w in windows:
        grid = np.linspace(w.xs[0], w.xs[-1], CELLS + 1)
        drawn = [_solve(w, *s).draw(grid, n, random) for s, n in zip(settings, counts, strict=True) if n]
        made.append(_posterior(w.center + grid, np.concatenate(drawn)))
    return made


def _settings(windows: Sequence[Window], dof: float) -> tuple[list[tuple[float, float]], Array]:
    """(bend, noise) and how probable each is."""
    unit = float(np.median([w.ys.max() - w.ys.min() for w in windows])) or 1.0
    settings = [(unit * bend, noise) for bend in BENDS for noise in (NOISES if dof else BLIND_NOISES * unit)]
    evidence = np.array([sum(_solve(w, *s).evidence for w in windows) + _prior(s[1], dof) for s in settings])
    weights = np.exp(evidence - evidence.max())
    weights[weights < NEGLIGIBLE] = 0.0
    return settings, weights / weights.sum()


def _prior(noise: float, dof: float) -> float:
    """Log density of the common factor of the noise: scaled inverse chi-squared with half the seeds' freedom, as the
    points' own estimates use it too; flat in the logarithm without seeds."""
    return -dof / 2 * (math.log(noise) + 0.5 / noise**2) if dof else 0.0


@dataclass(frozen=True)
class Solved:
    """The Gaussian posterior of one curve at one setting (Rasmussen and Williams 2006, section 2.7)."""

    window: Window
    bend: float
    root: Array  # Cholesky factor of the covariance of the points
    basis: Array  # root^-1 times 1, x, x^2 at the points
    information: Array
    beta: Array
    rest: Array  # root^-1 times the residuals
    evidence: float

    def draw(self, grid: Array, count: int, random: np.random.Generator) -> Array:
        """(count, cells) curves on a grid relative to the center."""
        origin = self.window.xs[0]
        across = self.bend**2 * _bent(grid - origin, self.window.xs - origin)
        pulled = np.linalg.solve(self.root, across.T)  # (points, cells)
        parabola = np.vander(grid, 3, increasing=True)
        mean = parabola @ self.beta + pulled.T @ self.rest
        open_ = parabola.T - self.basis.T @ pulled
        within = self.bend**2 * _bent(grid - origin, grid - origin)
        covariance = within - pulled.T @ pulled + open_.T @ np.linalg.solve(self.information, open_)
        values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        spread = vectors * np.sqrt(np.clip(values, 0.0, None))
        return mean + random.standard_normal((count, len(grid))) @ spread.T


def _solve(w: Window, bend: float, noise: float) -> Solved:
    from_origin = w.xs - w.xs[0]
    covariance = bend**2 * _bent(from_origin, from_origin) + np.diag((noise * w.sds) ** 2)
    covariance += w.tilt**2 * np.outer(w.xs, w.xs)
    root = np.linalg.cholesky(covariance)
    basis = np.linalg.solve(root, np.vander(w.xs, 3, increasing=True))
    losses = np.linalg.solve(root, w.ys)
    information = basis.T @ basis
    beta = np.linalg.solve(information, basis.T @ losses)
    rest = losses - basis @ beta
    evidence = -0.5 * rest @ rest - np.log(np.diag(root)).sum() - 0.5 * np.linalg.slogdet(information)[1]
    return Solved(w, bend, root, basis, information, beta, rest, float(evidence))


def _bent(a: Array, b: Array) -> Array:
    """(len(a), len(b)) covariance of the thrice integrated white noise that starts at 0, for a, b >= 0."""
    least = np.minimum.outer(a, b)
    gap = np.abs(np.subtract.outer(a, b))
    return least**5 / 20 + gap * least**4 / 8 + gap**2 * least**3 / 12


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
    known = posterior.grid[0] + step <= low and high <= posterior.grid[-1] - step
    return Optimum(
        curve,
        bracketed=True,
        log2_lr=middle,
        low=low if known else between[0],
        high=high if known else between[1],
        loss=float(np.median(posterior.losses)),
        se=float(posterior.minima.std()) if known else None,
        reason=None if known else "the curve is too flat or too noisy to bound its minimum: add seeds or LRs",
        posterior=posterior,
    )
