"""The best LR of every size of a ladder, and the loss curve around it: everything that the runs leave possible.

Model. A run whose LR is u octaves (log2) from its size's optimum has the loss, in nats per token,

    y = f + v(u) (1 + e(u)) + noise,      v(u) = h |u|^p exp(g (|u| - 1)),

with one height h, power p and growth g for u < 0 and another for u > 0: valleys are long and flat on the left, where
training is slow, and steep on the right, where it is on the edge of stability (Cohen et al. 2021, arXiv 2103.00065).

- Height: h is what an octave away costs. log h_left and log(h_right / h_left) of a ladder's typical size are Student t.
  A size's own log h is Student t around the typical one, which changes along the ladder at a steady rate, since longer
  training flattens valleys.
- Shape: (p, g) are from short lists of V-like, parabolic and cosh-like sides; most sizes have their ladder's.
- No side is exact: e is a Gaussian process in log |u|. It is integrated, so it widens intervals and bends no curve.
- Noise of a run: normal, variance sigma^2 + (c v(u))^2, with sigma common to a ladder; a mean over seeds has less.
- Cliff: a run far above the best of its size, right of it, and everything beyond it is no part of the valley, nor is a
  run that diverged: it is censored, and the optimum lies left of it. What lies as far above on the left is not looked
  at, but for the nearest two runs: the shape of a valley's far side says little of its bottom.
- Floor: f has a flat prior and is integrated in closed form.
- Optima walk along the ladder (see walk.py), which lets sizes help each other.

Computation. Heights, shapes, noise, rate and optimum are summed over on grids, which a look on coarse ones has placed;
given them the runs are jointly normal, and given what the sizes share they are independent (no sampler, no optimizer).
Draws from these sums are the answer: every interval, verdict and forecast is made of them, and seeds make them the same
each time.

The numbers of the model, `CurvePrior` in config.py, were learned from public sweeps (tests/tables) by their evidence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from mupsweep.analysis.config import CurvePrior, SidePrior
from mupsweep.analysis.estimate import QUANTILES, Array, Estimate, Indices
from mupsweep.analysis.walk import WalkDraws, choose, sample_walk

Singles = npt.NDArray[np.float32]  # for large tables of chances and likelihoods


# The grids on which the model is summed: accuracy against time, no knowledge.
DRAWS = 2000
SHARED_DRAWS = 250  # of noise, trend and typical sides, for which the walk is summed
CELLS = 41  # places of a size's optimum
COARSE_STEP = 0.25  # octaves between them in the first look
HEIGHTS = (1e-4, 0.8)  # nats: ends of the grid of heights
NOISES = (3e-4, 9e-2)  # nats: ends of the grid of noises
HEIGHT_STEP = 0.5  # of log height
TRENDS = (-2.0, 0.0, 2.0)  # standard deviations
BETWEEN_POWERS = 0.12  # standard deviation of the powers that lie between those of the shapes
NEAR_LEFT = 2  # runs left of the best that are looked at, however high they are
NEAREST = 0.02  # octaves: |u| of a run at the optimum, where log |u| would be infinite
BACKFITTING = 10  # rounds of means over seeds and shifts of seeds
MIN_LRS = 3  # a size with fewer usable LRs has bounds only
FARTHEST_BELOW = 6.0  # octaves below the lowest LR of a size whose runs all diverged, where its optimum is looked for
DENSITY_CELLS = 201  # of the optimum that ladders share
NEIGHBOURS = 8  # draws on each side of a place, of which one is taken for it
BAND_DRAWS, BAND_POINTS = 400, 41  # of the picture of a valley
FITS_KEPT = 128  # ladders, 0.1 MB a size: every round of a search asks again for those that have no new run
CERTAIN = 0.03  # nats between two neighbouring LRs that no noise explains


# ---- the runs


@dataclass(frozen=True, eq=False)
class SizeRuns:
    """The runs of one size of a ladder. Two are equal if their position and runs are.

    Attributes:
        position: doublings above the base on the ladder's axis; negative below it.
        log2_lrs: (n,) rising.
        losses: (n, seeds) nats per token; nan where a seed has no loss.
        diverged: (n,) how many runs diverged.
        variances: (n,) of the mean losses, known from elsewhere, beside the noise of runs; none by default.
    """

    position: float
    log2_lrs: Array
    losses: Array
    diverged: Indices
    variances: Array | None = None

    @classmethod
    def of(
        cls, position: float, log2_lrs: Iterable[float], losses: Iterable[float], seeds: Iterable[int] = ()
    ) -> SizeRuns:
        """From one entry a run, in any order; a loss that is not finite is a run that diverged.

        Args:
            seeds: of the runs; those of one LR and seed, and all of one LR where none are given, are repetitions.
        """
        runs = list(zip(log2_lrs, losses, strict=True))
        named = list(seeds) or [0] * len(runs)
        lrs = sorted({lr for lr, _ in runs})
        columns: dict[tuple[int, int], list[float]] = {}
        diverged = dict.fromkeys(lrs, 0)
        taken: dict[tuple[float, int], int] = {}
        for (lr, loss), seed in sorted(zip(runs, named, strict=True), key=lambda run: (run[1], run[0])):
            if not math.isfinite(loss):
                diverged[lr] += 1
                continue
            repetition = taken[lr, seed] = taken.get((lr, seed), -1) + 1
            column = columns.setdefault((seed, repetition), [math.nan] * len(lrs))
            column[lrs.index(lr)] = loss
        table = np.array([columns[key] for key in sorted(columns)]).T if columns else np.empty((len(lrs), 0))
        return cls(position, np.array(lrs), table, np.array([diverged[lr] for lr in lrs], dtype=np.intp))

    def with_run(self, log2_lr: float, loss: float, seed: int) -> SizeRuns:
        """These runs and one more, whose seed is a column of `losses` or a new one."""
        cells = [
            (x, y, column)
            for x, row in zip(self.log2_lrs.tolist(), self.losses.tolist(), strict=True)
            for column, y in enumerate(row)
            if math.isfinite(y)
        ]
        lost = np.repeat(self.log2_lrs, self.diverged).tolist()
        cells += [(x, math.nan, -1) for x in lost]
        return SizeRuns.of(self.position, *zip(*cells, (log2_lr, loss, seed), strict=True))

    @cached_property
    def _content(self) -> tuple[object, ...]:
        arrays = self.log2_lrs, self.losses, self.diverged, self.variances
        return self.position, self.losses.shape, *(None if array is None else array.tobytes() for array in arrays)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SizeRuns) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    @cached_property
    def seeds(self) -> Indices:
        """(n,) finished runs at each LR."""
        return np.isfinite(self.losses).sum(axis=1)

    @cached_property
    def usable(self) -> npt.NDArray[np.bool_]:
        """(n,) whether an LR has losses and no run that diverged, whose loss would be missing in the mean."""
        return (self.seeds > 0) & (self.diverged == 0)

    @cached_property
    def residuals(self) -> tuple[Array, Array]:
        """(n,) mean losses and (n, seeds) what runs are off them, without what a seed shifts at every LR alike.

        A shift moves no optimum. It is the median over the LRs that several seeds share, which one unstable run cannot
        move, and none where these are fewer than MIN_LRS.
        """
        table = np.where(self.usable[:, None], self.losses, np.nan)
        shared = table[self.usable & (self.seeds > 1)]
        shift = np.zeros(table.shape[1])
        often = np.isfinite(shared).sum(axis=0) >= MIN_LRS
        for _ in range(BACKFITTING if often.any() else 0):
            off = shared[:, often] - _row_means(shared - shift)[:, None]
            shift[often] = np.nanmedian(off, axis=0)
            shift[often] -= shift[often].mean()
        means = _row_means(table - shift)
        return means, table - shift - means[:, None]

    @cached_property
    def fitted(self) -> bool:
        """Whether there are LRs enough for a curve."""
        return int(self.usable.sum()) >= MIN_LRS

    @cached_property
    def best(self) -> int:
        """Index of the LR with the lowest mean loss."""
        return int(np.nanargmin(self.residuals[0]))

    def same_runs(self, other: SizeRuns) -> bool:
        """Whether another size has these runs: two ladders share it."""
        return (
            np.array_equal(self.log2_lrs, other.log2_lrs)
            and np.array_equal(self.losses, other.losses, equal_nan=True)
            and np.array_equal(self.diverged, other.diverged)
        )


def _row_means(table: Array) -> Array:
    """(n,) means of the finite entries of each row; nan where there is none."""
    count = np.isfinite(table).sum(axis=1)
    return np.where(count > 0, np.nansum(table, axis=1) / np.maximum(count, 1), np.nan)


@dataclass(frozen=True)
class Observations:
    """What the likelihood of one size is made of.

    Attributes:
        x: (n,) log2 LRs of the runs of the valley: before the cliff, within reach of the best and not much worse.
        y: (n,) their mean losses above `lowest`.
        seeds: (n,) runs behind each mean.
        variances: (n,) of each mean, beside the noise of runs.
        lowest: loss of the best LR.
        cliff_x, cliff_y: (c,) log2 LRs from the cliff on and losses above `lowest`; infinite where runs diverged.
    """

    x: Array
    y: Array
    seeds: Indices
    variances: Array
    lowest: float
    cliff_x: Array
    cliff_y: Array

    @classmethod
    def of(cls, runs: SizeRuns, prior: CurvePrior) -> Observations:
        means, x = runs.residuals[0], runs.log2_lrs
        lowest, best = means[runs.best], x[runs.best]
        above = np.where(runs.usable, means - lowest, np.inf)
        over = (x > best) & (above > prior.cliff)
        wall = x[over].min() if over.any() else np.inf
        kept = runs.usable & (np.abs(x - best) <= prior.reach) & (x < wall)
        left = np.flatnonzero(kept & (x < best))
        kept[left[:-NEAR_LEFT]] &= above[left[:-NEAR_LEFT]] <= prior.cliff
        censored = x >= wall
        variances = np.zeros(len(x)) if runs.variances is None else runs.variances
        valley = x[kept], above[kept], runs.seeds[kept], variances[kept]
        return cls(*valley, float(lowest), x[censored], above[censored])

    @property
    def wall(self) -> float:
        """The lowest log2 LR beyond the cliff; infinite where none was seen."""
        return float(self.cliff_x[0]) if len(self.cliff_x) else math.inf


# ---- sides of a valley, on a grid


@dataclass(frozen=True)
class SideGrid:
    """One side's heights and shapes that are summed over: every pair, each (M,)."""

    prior: CurvePrior
    side: SidePrior
    height_step: float
    log_h: Array
    p: Array
    g: Array
    shape: Indices

    @classmethod
    def of(cls, prior: CurvePrior, side: SidePrior, log_heights: Array) -> SideGrid:
        powers, growths = np.tile((side.powers, side.growths), len(log_heights))
        shape = np.tile(np.arange(len(side.powers)), len(log_heights))
        step = float(log_heights[1] - log_heights[0])
        return cls(prior, side, step, np.repeat(log_heights, len(side.powers)), powers, growths, shape)

    def valley(self, log_u: Array, which: Indices | slice = slice(None)) -> Array:
        """(..., M, n) v(u) of every pair, or of one for each row, at log |u| (..., 1, n)."""
        log_h, p, g = (value[which, None] for value in (self.log_h, self.p, self.g))
        return np.exp(log_h + p * log_u + g * (np.exp(log_u) - 1))

    def misfit_covariance(self, v: Array, log_u: Array, other_v: Array, other_log_u: Array) -> Array:
        """(..., n, m) covariance of v(u) e(u), and of the heights and powers that lie between those of the grid."""
        apart = (log_u[..., :, None] - other_log_u[..., None, :]) / self.prior.misfit_length
        shares = (
            self.prior.misfit**2 * np.exp(-0.5 * apart**2)
            + (self.height_step / 2) ** 2
            + BETWEEN_POWERS**2 * log_u[..., :, None] * other_log_u[..., None, :]
        )
        return v[..., :, None] * other_v[..., None, :] * shares

    def noise_variance(self, v: Array, sigma: Array, seeds: Indices) -> Array:
        """Variance of means over seeds."""
        return (sigma**2 + (self.side.height_noise * v) ** 2) / seeds

    def given_typical(self, position: float) -> Singles:
        """(T, A, M) chance that a size has a pair, for every trend and every pair of the ladder's typical side."""
        gap = self.log_h[None, :] - self.log_h[:, None]
        trends = np.array(TRENDS)[:, None, None] * self.prior.trend_sd
        sd = math.hypot(self.side.height_sd, self.height_step / 3)
        height = np.exp(log_student_t(gap - trends * position, sd)) * self.height_step
        others = (1 - self.side.same_shape) / max(1, len(self.side.powers) - 1)
        same = np.where(self.shape[:, None] == self.shape, self.side.same_shape, others)
        return (height * same).astype(np.float32)


def log_student_t(x: Array, sd: float) -> Array:
    """Log density of a Student t of 4 degrees of freedom and scale `sd`: what a prior finds odd stays possible."""
    return -2.5 * np.log1p((x / sd) ** 2 / 4) - 0.981 - math.log(sd)


# ---- evidence of one size


@dataclass(frozen=True)
class SideSums:
    """What the runs on one side of an optimum say, for every place of it, noise and side: each (J, S, M).

    With C the covariance of these runs and r what they are above v(u), whatever the floor f:

    Attributes:
        precision: 1'C^-1 1, of f.
        pull: 1'C^-1 r; f is normal around pull / precision.
        log_likelihood: at f = 0.
    """

    precision: Array
    pull: Array
    log_likelihood: Array

    @classmethod
    def of(cls, runs: Observations, grid: Array, noises: Array, sides: SideGrid, *, is_left: bool) -> SideSums:
        shape = len(grid), len(noises), len(sides.p)
        precision, pull, log_likelihood = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        runs_below = np.searchsorted(runs.x, grid, side="right")
        for count in np.unique(runs_below):
            places = np.flatnonzero(runs_below == count)
            here = slice(0, count) if is_left else slice(count, None)
            x, y, seeds = runs.x[here], runs.y[here], runs.seeds[here]
            if not len(x):
                continue
            log_u = _log_distance(x - grid[places, None])[:, None]
            v = sides.valley(log_u)  # (places, M, n)
            smooth = sides.misfit_covariance(v, log_u, v, log_u)
            covariance = np.repeat(smooth[:, None], len(noises), axis=1)  # (places, S, M, n, n)
            each = range(len(x))
            covariance[..., each, each] += (
                sides.noise_variance(v[:, None], noises[:, None, None], seeds) + runs.variances[here]
            )
            root = np.linalg.cholesky(covariance)
            both = np.broadcast_arrays(np.ones_like(v[:, None]), (y - v)[:, None], root[..., 0])
            ones, rest = _whiten(root, np.stack(both[:2]))
            precision[places], pull[places] = (ones * ones).sum(-1), (ones * rest).sum(-1)
            log_determinant = np.log(np.diagonal(root, axis1=-2, axis2=-1)).sum(-1)
            log_likelihood[places] = -0.5 * (rest * rest).sum(-1) - log_determinant
        return cls(precision, pull, log_likelihood)


def _outer_sum(left: Array, right: Array) -> Singles:
    """(J, S, L, R) sums of every left and right side; single precision is enough where a likelihood is not tiny."""
    return left.astype(np.float32)[..., :, None] + right.astype(np.float32)[..., None, :]


def _log_distance(u: Array) -> Array:
    return np.log(np.maximum(np.abs(u), NEAREST))


def _whiten(root: npt.NDArray[np.floating], values: Array) -> Array:
    """L^-1 values (..., n), by forward substitution, for many small lower triangles (..., n, n) at once."""
    out = np.empty_like(values)
    for i in range(values.shape[-1]):
        out[..., i] = (values[..., i] - np.einsum("...k,...k", root[..., i, :i], out[..., :i])) / root[..., i, i]
    return out


@dataclass(frozen=True)
class SizeEvidence:
    """The likelihood of one size on the grids, its floor integrated.

    Attributes:
        grid: (J,) places of the optimum.
        likelihood: (J, S, L, R) of place, noise, left and right side, in units of exp(log_scale).
        given_left, given_right: (T, A, L), (T, B, R) chances of its sides given the ladder's trend and typical sides.
    """

    runs: Observations
    grid: Array
    left: SideSums
    right: SideSums
    likelihood: Singles
    log_scale: float
    given_left: Singles
    given_right: Singles

    @classmethod
    def of(
        cls, runs: Observations, position: float, grid: Array, noises: Array, sides: tuple[SideGrid, SideGrid]
    ) -> SizeEvidence:
        left, right = (SideSums.of(runs, grid, noises, side, is_left=side is sides[0]) for side in sides)
        precision = _outer_sum(left.precision, right.precision)
        log = _outer_sum(left.pull, right.pull)
        log *= 0.5 * log / precision
        log += _outer_sum(left.log_likelihood, right.log_likelihood)
        log[grid >= runs.wall] = -np.inf
        top = float(log.max())
        likelihood = np.exp(np.subtract(log, top, out=log), out=log)
        likelihood /= np.sqrt(precision, out=precision)
        given = (side.given_typical(position) for side in sides)
        return cls(runs, grid, left, right, likelihood, top, *given)

    @cached_property
    def given_shared(self) -> Array:
        """(T, S, A, B) likelihood of what the ladder's sizes share, wherever the optimum is."""
        anywhere = self.likelihood.sum(axis=0) * np.float32(self.grid[1] - self.grid[0])
        likelihood = self.given_left[:, None] @ anywhere @ self.given_right[:, None].swapaxes(-1, -2)
        return np.maximum(likelihood, np.finfo(np.float32).tiny).astype(float)

    def given_draws(self, shared: Indices) -> Array:
        """(draws, J) likelihood of every place, given draws (4, draws) of what the sizes share."""
        out = np.empty((shared.shape[1], len(self.grid)))
        for rows, trend, noise in _by_trend_and_noise(shared):
            left, right = self.given_left[trend, shared[2, rows]], self.given_right[trend, shared[3, rows]]
            out[rows] = ((left @ self.likelihood[:, noise]) * right).sum(axis=-1).T
        return out


def _by_trend_and_noise(shared: Indices) -> Iterator[tuple[Indices, int, int]]:
    """The draws of each trend and noise that occur."""
    for trend, noise in np.unique(shared[:2], axis=1).T:
        yield np.flatnonzero((shared[0] == trend) & (shared[1] == noise)), trend, noise


# ---- evidence of a ladder


@dataclass(frozen=True)
class LadderEvidence:
    """The likelihood of all sizes on grids that hold what is probable.

    Attributes:
        noises: (S,) sigma.
        shared: (T, S, A, B) posterior of trend, noise and typical sides, for optima that are nowhere more likely.
    """

    sizes: tuple[SizeEvidence, ...]
    sides: tuple[SideGrid, SideGrid]
    noises: Array
    shared: Array

    @classmethod
    def of(cls, sizes: Sequence[SizeRuns], prior: CurvePrior) -> LadderEvidence:
        coarse = _first_look(sizes, prior)
        noises, log_noise = coarse.noises, log_noise_prior(sizes, coarse.noises, prior)
        log_shared = log_noise[:, None, None] + log_side_prior(coarse.sides, prior)
        evidence = []
        for size, grid in zip(sizes, coarse.grids, strict=True):
            evidence.append(SizeEvidence.of(Observations.of(size, prior), size.position, grid, noises, coarse.sides))
            log_shared = log_shared + np.log(evidence[-1].given_shared) + evidence[-1].log_scale
        weight = np.exp(log_shared - log_shared.max())
        return cls(tuple(evidence), coarse.sides, noises, weight / weight.sum())


def log_side_prior(sides: tuple[SideGrid, SideGrid], prior: CurvePrior) -> Array:
    """(T, 1, A, B) log prior of the trend and the typical sides of a ladder."""
    left, right = sides
    log = log_student_t(left.log_h - math.log(prior.height), prior.height_sd)[:, None]
    log = log + log_student_t(right.log_h[None] - left.log_h[:, None], prior.asymmetry_sd)
    log += math.log(left.height_step * right.height_step / len(left.side.powers) / len(right.side.powers))
    trend = -0.5 * np.array(TRENDS) ** 2
    return (trend - math.log(np.exp(trend).sum()))[:, None, None, None] + log


def log_noise_prior(sizes: Sequence[SizeRuns], noises: Array, prior: CurvePrior) -> Array:
    """(S,) log prior of sigma, with what repetitions say of it."""
    log = log_student_t(np.log(noises) - math.log(prior.noise), prior.noise_sd)
    for size in sizes:
        means, residuals = size.residuals
        repeated = size.usable & (size.seeds > 1)
        rows = int(repeated.sum())
        if rows < 2:
            continue
        share = (rows - 1) / rows  # the shifts of the seeds took their part of the freedom
        above = means - means[size.best]
        noise_share = np.where(np.arange(len(above)) < size.best, prior.left.height_noise, prior.right.height_noise)
        for row in np.flatnonzero(repeated):
            freedom = size.seeds[row] - 1
            square = np.nansum(residuals[row] ** 2)
            variance = noises**2 + (noise_share[row] * above[row]) ** 2
            log = log - 0.5 * share * (freedom * np.log(variance) + square / variance)
    return log - log.max() - math.log(np.exp(log - log.max()).sum())


@dataclass(frozen=True)
class Grids:
    """Where the model is summed."""

    noises: Array
    sides: tuple[SideGrid, SideGrid]
    grids: tuple[Array, ...]


def _first_look(sizes: Sequence[SizeRuns], prior: CurvePrior) -> Grids:
    """Grids around the noises, sides and optima that coarse ones leave possible."""
    log_heights = np.linspace(math.log(HEIGHTS[0]), math.log(HEIGHTS[1]), 7)
    left, right = (
        replace(side, powers=side.powers[::2], growths=side.growths[::2]) for side in (prior.left, prior.right)
    )
    sides = SideGrid.of(prior, left, log_heights), SideGrid.of(prior, right, log_heights)
    noises = np.geomspace(*NOISES, 5)
    log_shared = log_noise_prior(sizes, noises, prior)[:, None, None] + log_side_prior(sides, prior)
    looks = []
    for size in sizes:
        runs, x = Observations.of(size, prior), size.log2_lrs
        best = x[size.best]
        grid = np.arange(max(x[0] - 2, best - 6), min(x[-1] + 2, best + 6) + 0.01, COARSE_STEP)
        looks.append(SizeEvidence.of(runs, size.position, grid, noises, sides))
        log_shared = log_shared + np.log(looks[-1].given_shared)
    shared = np.exp(log_shared - log_shared.max())

    likely_noise = noises[_likely(shared.sum(axis=(0, 2, 3)), 1e-3)]
    ratio = math.sqrt(noises[1] / noises[0])
    fine_noises = np.geomspace(likely_noise[0] / ratio, likely_noise[-1] * ratio, 6)
    grids, heights = [], ([], [])
    for look in looks:
        # What the other sizes say of this one's sides, times what its own runs do.
        others = look.given_left[:, None].swapaxes(-1, -2) @ (shared / look.given_shared) @ look.given_right[:, None]
        joint = look.likelihood * others.sum(axis=0)
        likely = look.grid[_likely(joint.sum(axis=(1, 2, 3)), 2e-4)]
        grids.append(np.linspace(likely[0] - COARSE_STEP, likely[-1] + COARSE_STEP, CELLS))
        by_sides = joint.sum(axis=(0, 1))
        for k, side in enumerate(sides):
            heights[k].extend(side.log_h[_likely(by_sides.sum(axis=1 - k), 2e-3)])
    half = (log_heights[1] - log_heights[0]) / 2
    fine = [_spaced(min(found) - half, max(found) + half, HEIGHT_STEP) for found in heights]
    fine_sides = SideGrid.of(prior, prior.left, fine[0]), SideGrid.of(prior, prior.right, fine[1])
    return Grids(fine_noises, fine_sides, tuple(grids))


def _likely(weights: Array, share: float) -> Indices:
    """Indices of weights above a share of the largest."""
    return np.flatnonzero(weights > share * weights.max())


def _spaced(low: float, high: float, step: float) -> Array:
    return np.linspace(low, high, int(np.clip(math.ceil((high - low) / step) + 1, 5, 12)))


# ---- draws


@dataclass(frozen=True)
class CurveDraws:
    """Draws of one size's curve; draw i of every size of a ladder belongs to one ladder.

    Attributes:
        optimum: (draws,) log2 LR.
        floor: (draws,) loss there, nats.
        sigma: (draws,) noise of a run.
        left, right: (draws,) indices into the sides' grids.
        trend: (draws,) change of log height per doubling.
    """

    runs: Observations
    sides: tuple[SideGrid, SideGrid]
    optimum: Array
    floor: Array
    sigma: Array
    left: Indices
    right: Indices
    trend: Array

    def take(self, rows: Indices) -> CurveDraws:
        """Some draws, in their order."""
        names = ("optimum", "floor", "sigma", "left", "right", "trend")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def rise(self, log2_lrs: Array) -> Array:
        """(draws, m) nats of draw i's curve above its minimum at log2_lrs[i] (draws, m); infinite where runs diverge.

        A side's shape is bent as its runs say; what they leave open is drawn, alike at every LR of a draw's side.
        """
        rng = np.random.default_rng(1)
        return self._beyond_cliff(log2_lrs, self._valley_rise(log2_lrs, rng), rng)

    def _valley_rise(self, log2_lrs: Array, rng: np.random.Generator) -> Array:
        """`rise` without a cliff."""
        u = log2_lrs - self.optimum[:, None]
        out = np.zeros(u.shape)
        for side, which, is_left in zip(self.sides, (self.left, self.right), (True, False), strict=True):
            wanted = (u <= 0) == is_left
            rows = np.flatnonzero(wanted.any(axis=1))
            deviate = rng.standard_normal(len(u))
            if len(rows):
                found = self._side_rise(side, which[rows], rows, u[rows], deviate[rows], is_left=is_left)
                out[rows] = np.where(wanted[rows], found, out[rows])
        return out

    def _side_rise(
        self, side: SideGrid, which: Indices, rows: Indices, u: Array, deviate: Array, *, is_left: bool
    ) -> Array:
        """(rows, m) a draw from the Gaussian process of each row's side, given the runs on it."""
        apart = self.runs.x - self.optimum[rows, None]
        on_side = (apart <= 0) == is_left
        log_runs, log_u = _log_distance(apart), _log_distance(u)
        v_runs, v = side.valley(log_runs, which), side.valley(log_u, which)
        noise = side.noise_variance(v_runs, self.sigma[rows, None], self.runs.seeds) + self.runs.variances
        among = side.misfit_covariance(v_runs, log_runs, v_runs, log_runs)
        among = among * (on_side[:, :, None] & on_side[:, None, :])
        among[:, range(len(self.runs.x)), range(len(self.runs.x))] += np.where(on_side, noise, 1.0)
        across = side.misfit_covariance(v_runs, log_runs, v, log_u) * on_side[:, :, None]
        above = self.runs.y - (self.floor[rows, None] - self.runs.lowest) - v_runs
        gain = np.linalg.solve(among, across)
        mean = v + (gain * np.where(on_side, above, 0.0)[:, :, None]).sum(axis=1)
        one = v[:, :, None], log_u[:, :, None]
        variance = side.misfit_covariance(*one, *one)[..., 0, 0] - (gain * across).sum(axis=1)
        return np.maximum(mean + np.sqrt(np.maximum(variance, 0.0)) * deviate[:, None], 0.0)

    def _beyond_cliff(self, log2_lrs: Array, rise: Array, rng: np.random.Generator) -> Array:
        """Losses beyond the cliff are those of the runs there; it begins after the last run before it."""
        if not len(self.runs.cliff_x):
            return rise
        last = self.runs.x[-1]
        begins = np.maximum(last + (self.runs.wall - last) * rng.random(len(rise)), self.optimum)[:, None]
        with np.errstate(invalid="ignore"):  # between two diverged runs: infinity less infinity
            fallen = np.interp(log2_lrs, self.runs.cliff_x, self.runs.cliff_y)
        return np.where(log2_lrs > begins, np.maximum(rise, np.nan_to_num(fallen, nan=np.inf, posinf=np.inf)), rise)

    def regret(self, log2_lr: float | Array) -> Array:
        """(draws,) nats above the minimum of each draw at one LR, or at one for each draw."""
        return self.rise(np.broadcast_to(log2_lr, self.optimum.shape)[:, None])[:, 0]

    def losses(self, log2_lr: float) -> Array:
        """(draws,) nats of the drawn curves at an LR."""
        return self.floor + self.regret(log2_lr)

    def noise_variance(self, log2_lr: float) -> float:
        """Expected variance of one run's loss at an LR."""
        u = np.array([[log2_lr]]) - self.optimum[:, None]
        variance = 0.0
        for side, which, on_side in ((self.sides[0], self.left, u <= 0), (self.sides[1], self.right, u > 0)):
            v = side.valley(_log_distance(u), which)
            variance += float((side.noise_variance(v, self.sigma[:, None], np.ones(1, int)) * on_side).mean())
        return variance

    @cached_property
    def band(self) -> tuple[Array, Array]:
        """(m,) log2 LRs, and (3, m) QUANTILES of the losses of the drawn valleys there, for a picture.

        The LRs reach over the runs of the valley and where its optimum may lie, but not beyond the cliff.
        """
        low, _, high = np.quantile(self.optimum, QUANTILES)
        last = min(max(self.runs.x[-1], high), self.runs.wall)
        log2_lrs = np.linspace(min(self.runs.x[0], low), last, BAND_POINTS)
        some = self.take(np.arange(BAND_DRAWS))
        rise = some._valley_rise(np.broadcast_to(log2_lrs, (BAND_DRAWS, BAND_POINTS)), np.random.default_rng(1))
        return log2_lrs, np.quantile(some.floor[:, None] + rise, QUANTILES, axis=0)


@dataclass(frozen=True)
class SizeOptimum:
    """The best log2 LR of one size.

    Attributes:
        estimate: None where the LRs that were trained give no bound on that side, or only bounds.
        reason: why a number is missing.
    """

    estimate: Estimate
    reason: str | None


@dataclass(frozen=True)
class LadderPosterior:
    """What the runs of a ladder say of all its optima.

    Attributes:
        sizes: by rising position.
        draws: of the curve of each; None where no LR has a loss.
        walk: how the drawn optima move; None where no size has a loss.
        prior: the numbers that it rests on.
    """

    sizes: tuple[SizeRuns, ...]
    draws: tuple[CurveDraws | None, ...]
    walk: WalkDraws | None
    prior: CurvePrior

    @cached_property
    def curves(self) -> tuple[CurveDraws | None, ...]:
        """The draws of every size that has LRs enough for a curve of its own; None for the others."""
        pairs = zip(self.sizes, self.draws, strict=True)
        return tuple(draws if size.fitted else None for size, draws in pairs)

    @cached_property
    def fitted(self) -> list[tuple[SizeRuns, CurveDraws]]:
        """The sizes that have curves."""
        return [(size, curve) for size, curve in zip(self.sizes, self.curves, strict=True) if curve is not None]

    @cached_property
    def optima(self) -> list[SizeOptimum]:
        """The optimum of every size."""
        pairs = zip(self.sizes, self.curves, strict=True)
        return [bracket(size) if curve is None else bounded(size, curve.optimum) for size, curve in pairs]


def bounded(size: SizeRuns, draws: Array) -> SizeOptimum:
    """Quantiles of a size's optimum as far as its LRs bound it: the end of a grid is never an optimum."""
    low, middle, high = map(float, np.quantile(draws, QUANTILES))
    x, best = size.log2_lrs, size.log2_lrs[size.best]
    has_low, has_high = low > x[0] and best > x[0], high < x[-1] and best < x[-1]
    inside = x[0] < middle < x[-1] and x[0] < best < x[-1]
    reason = None
    if not (has_low and has_high):
        end, log2_lr, further = ("highest", x[-1], "higher") if has_low else ("lowest", x[0], "lower")
        reason = f"the optimum may lie beyond the {end} LR (2^{log2_lr:.4g}): train {further} ones"
    return SizeOptimum(
        Estimate(middle if inside else None, low if has_low else None, high if has_high else None), reason
    )


def bracket(size: SizeRuns) -> SizeOptimum:
    """Bounds of an optimum from too few LRs for a curve: it is left of what diverges or is certainly worse."""
    x = size.log2_lrs[size.usable]
    if not len(x):
        lowest = float(size.log2_lrs[0]) if len(size.log2_lrs) else None
        return SizeOptimum(Estimate(None, None, lowest), "no LR has a loss: train lower ones")
    best = size.log2_lrs[size.best]
    means = size.residuals[0][size.usable]
    worse = x[means > means.min() + CERTAIN]
    above = [*worse[worse > best], *size.log2_lrs[(size.log2_lrs > best) & (size.diverged > 0)]]
    low, high = max(worse[worse < best], default=None), min(above, default=None)
    reason = f"{len(x)} LR{'s' if len(x) > 1 else ''} with a loss: an optimum needs at least {MIN_LRS}"
    bounds = Estimate(None, None if low is None else float(low), None if high is None else float(high))
    return SizeOptimum(bounds, reason)


def fit_ladder(sizes: Iterable[SizeRuns], prior: CurvePrior | None = None) -> LadderPosterior:
    """The posterior of the curves of one ladder."""
    return _fit_ladder(tuple(sorted(sizes, key=lambda size: size.position)), prior or CurvePrior())


@lru_cache(FITS_KEPT)
def _fit_ladder(ordered: tuple[SizeRuns, ...], prior: CurvePrior) -> LadderPosterior:
    with_losses = [size for size in ordered if size.usable.any()]
    if not with_losses:
        return LadderPosterior(ordered, (None,) * len(ordered), None, prior)
    rng = np.random.default_rng(0)
    evidence = LadderEvidence.of(with_losses, prior)
    picked = rng.choice(evidence.shared.size, SHARED_DRAWS, p=evidence.shared.ravel())
    shared = np.array(np.unravel_index(picked, evidence.shared.shape))  # trend, noise, typical left and right side
    looks = iter(evidence.sizes)
    of_sizes = [next(looks) if size.usable.any() else None for size in ordered]
    walked = [k for k, size in enumerate(ordered) if len(size.log2_lrs)]
    likelihoods, grids = zip(*(_where(ordered[k], of_sizes[k], shared) for k in walked), strict=True)
    positions = np.array([ordered[k].position for k in walked])
    which, cells, walk = sample_walk(likelihoods, grids, positions, prior.walk, DRAWS, rng)
    draws: list[CurveDraws | None] = [None] * len(ordered)
    for k, cell in zip(walked, cells, strict=True):
        size = of_sizes[k]
        if size is not None:
            draws[k] = _draw_curves(evidence, prior, size, cell, shared[:, which], rng)
    return LadderPosterior(ordered, tuple(draws), walk, prior)


def _where(runs: SizeRuns, evidence: SizeEvidence | None, shared: Indices) -> tuple[Array, Array]:
    """(draws, J) likelihood of every place of a size's optimum, and the (J,) places: below all LRs that diverged."""
    if evidence is not None:
        return evidence.given_draws(shared), evidence.grid
    places = runs.log2_lrs[0] - np.linspace(FARTHEST_BELOW, 0, CELLS)
    return np.ones((shared.shape[1], CELLS)), places


def _draw_curves(
    evidence: LadderEvidence,
    prior: CurvePrior,
    size: SizeEvidence,
    cells: Indices,
    shared: Indices,
    rng: np.random.Generator,
) -> CurveDraws:
    """Sides and floor of a size, given draws of what the ladder shares and the cells of the optimum."""
    left, right = np.empty((2, len(cells)), dtype=np.intp)
    for rows, trend, noise in _by_trend_and_noise(shared):
        given_left, given_right = size.given_left[trend, shared[2, rows]], size.given_right[trend, shared[3, rows]]
        likelihood = size.likelihood[cells[rows], noise]  # (rows, L, R)
        left[rows] = choose(given_left * (likelihood @ given_right[..., None])[..., 0], rng)
        right[rows] = choose(given_right * likelihood[np.arange(len(rows)), left[rows]], rng)
    noise = shared[1]
    precision = size.left.precision[cells, noise, left] + size.right.precision[cells, noise, right]
    pull = size.left.pull[cells, noise, left] + size.right.pull[cells, noise, right]
    return CurveDraws(
        runs=size.runs,
        sides=evidence.sides,
        optimum=size.grid[cells] + (size.grid[1] - size.grid[0]) * (rng.random(len(cells)) - 0.5),
        floor=size.runs.lowest + pull / precision + rng.standard_normal(len(cells)) / np.sqrt(precision),
        sigma=evidence.noises[noise],
        left=left,
        right=right,
        trend=np.array(TRENDS)[shared[0]] * prior.trend_sd,
    )


# ---- ladders that share a size


def fit_ladders(ladders: Sequence[Sequence[SizeRuns]], prior: CurvePrior | None = None) -> list[LadderPosterior]:
    """The posterior of every ladder; a size with the same runs in several ladders has one estimate in all of them.

    SP and muP are one model at the base, so their ladders share its runs, and each ladder's other sizes say something
    of it through the walk. Given the optimum of the shared size the ladders are independent, so its posterior from all
    of them is p_1 p_2 ... / p_0^(ladders - 1), with p_k from ladder k and p_0 from the size alone. What ladders say of
    each other's noise and heights is left out. A ladder shares one size here: its smallest that another has too.
    """
    posteriors = [fit_ladder(sizes, prior) for sizes in ladders]
    tied: set[int] = set()
    for k, posterior in enumerate(posteriors):
        if k in tied:
            continue
        for i, size in enumerate(posterior.sizes):
            members = [(k, i)]
            for m in range(k + 1, len(ladders)):
                j = _index_of(size, posteriors[m])
                if j is not None and m not in tied:
                    members.append((m, j))
            if size.fitted and len(members) > 1:
                for (m, _), tied_posterior in zip(members, _tie(posteriors, members, prior), strict=True):
                    posteriors[m] = tied_posterior
                tied.update(m for m, _ in members)
                break
    return posteriors


def _index_of(size: SizeRuns, ladder: LadderPosterior) -> int | None:
    return next((j for j, other in enumerate(ladder.sizes) if size.same_runs(other)), None)


def _tie(
    posteriors: Sequence[LadderPosterior], members: Sequence[tuple[int, int]], prior: CurvePrior | None
) -> list[LadderPosterior]:
    """Draws of some ladders, chosen so that a size that they share has the draws of its posterior from all of them."""
    draws = [_curve(posteriors[k], i).optimum for k, i in members]
    alone = _curve(fit_ladder([posteriors[members[0][0]].sizes[members[0][1]]], prior), 0).optimum
    grid = np.linspace(min(d.min() for d in draws), max(d.max() for d in draws), DENSITY_CELLS)
    log_density = sum(_log_density(d, grid) for d in draws) - (len(draws) - 1) * _log_density(alone, grid)
    cumulative = np.cumsum(np.exp(log_density - log_density.max()))
    rng = np.random.default_rng(3)
    quantiles = rng.permutation((np.arange(DRAWS) + 0.5) / DRAWS)
    optimum = np.interp(quantiles, cumulative / cumulative[-1], grid)
    out: list[LadderPosterior] = []
    shared: CurveDraws | None = None
    for (k, i), own in zip(members, draws, strict=True):
        ladder = posteriors[k]
        order = np.argsort(own, kind="stable")
        nearest = np.searchsorted(own[order], optimum) + rng.integers(-NEIGHBOURS, NEIGHBOURS + 1, DRAWS)
        rows = order[np.clip(nearest, 0, DRAWS - 1)]
        curves = [None if curve is None else curve.take(rows) for curve in ladder.draws]
        shared = shared or replace(_curve(ladder, i).take(rows), optimum=optimum)
        curves[i] = shared
        out.append(replace(ladder, draws=tuple(curves), walk=ladder.walk and ladder.walk.take(rows)))
    return out


def _curve(ladder: LadderPosterior, i: int) -> CurveDraws:
    curve = ladder.draws[i]
    assert curve is not None
    return curve


def _log_density(draws: Array, grid: Array) -> Array:
    """Kernel estimate of a density, with Silverman's bandwidth; never quite zero, since it is divided by."""
    bandwidth = max(0.9 * draws.std() * len(draws) ** -0.2, grid[1] - grid[0])
    kernels = np.exp(-0.5 * ((grid[:, None] - draws) / bandwidth) ** 2)
    density = kernels.mean(axis=1) / bandwidth
    return np.log(density + 1e-3 * density.max())
