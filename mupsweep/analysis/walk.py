"""How the best LR moves from size to size along a ladder: steady drift, small steps, and single sizes that are off.

Let t be a size's position, in doublings above the base, and x(t) its optimum in octaves of LR:

    x(t) = level(t) + deviation,                       deviation ~ Student t of 2 degrees of freedom, times `deviation`
    level(t + gap) - level(t) = slope * gap + step,    step ~ Normal(0, step_sd^2 gap)

with one slope and one step_sd for a ladder, both unknown: the local linear trend of Harvey (1989) with heavy tails.
Steps make a forecast grow with distance. Deviations let one size of any ladder be off, which those of real sweeps of
one seed are now and then, and keep it from bending what is said of the others.

Given the likelihood of each size's optimum on a grid, the levels form a hidden Markov chain: evidence by forward
filtering, draws by backward sampling (Fruehwirth-Schnatter 1994, doi 10.1111/j.1467-9892.1994.tb00184.x).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mupsweep.analysis.config import WalkPrior
from mupsweep.analysis.estimate import Array, Indices

DEGREES_OF_FREEDOM = 2
SLOPES = 25  # that are summed over
FASTEST, DENSE = 2.5, 0.5  # octaves per doubling: the ends of their grid, and within what it is dense
LEVELS = 61  # places of a size's level
OFF = 1.0  # octaves by which levels may lie outside the places of the optimum
TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class WalkDraws:
    """Draws of a ladder's walk.

    Attributes:
        positions: (sizes,) doublings above the base, rising.
        levels: (sizes, draws) log2 LR.
        slopes: (draws,) octaves per doubling.
        step_sds: (draws,) octaves per root of a doubling.
    """

    prior: WalkPrior
    positions: Array
    levels: Array
    slopes: Array
    step_sds: Array

    def take(self, rows: Indices) -> WalkDraws:
        """Some draws, in their order."""
        return WalkDraws(self.prior, self.positions, self.levels[:, rows], self.slopes[rows], self.step_sds[rows])

    def optima(self, position: float, rng: np.random.Generator) -> Array:
        """(draws,) the optimum at another size: beyond the largest, below the smallest, or between two."""
        above = int(np.searchsorted(self.positions, position))
        if 0 < above < len(self.positions):
            level = self._between(above, position, rng)
        else:
            nearest = min(above, len(self.positions) - 1)
            gap = position - self.positions[nearest]
            step = self.step_sds * math.sqrt(abs(gap)) * rng.standard_normal(len(self.slopes))
            level = self.levels[nearest] + self.slopes * gap + step
        return level + self.prior.deviation * rng.standard_t(DEGREES_OF_FREEDOM, len(level))

    def _between(self, above: int, position: float, rng: np.random.Generator) -> Array:
        """(draws,) levels between two sizes: the bridge of the walk, on which the slope has no influence."""
        gap = self.positions[above] - self.positions[above - 1]
        share = (position - self.positions[above - 1]) / gap
        sd = self.step_sds * math.sqrt(gap * share * (1 - share))
        line = (1 - share) * self.levels[above - 1] + share * self.levels[above]
        return line + sd * rng.standard_normal(len(line))


@dataclass(frozen=True)
class Settings:
    """Every pair of a slope and a step that is summed over, with its prior weight; each (H,)."""

    slopes: Array
    slope_cells: Array
    step_sds: Array
    weights: Array

    @classmethod
    def of(cls, prior: WalkPrior) -> Settings:
        end = math.asinh(FASTEST / DENSE)
        angles = np.linspace(-end, end, SLOPES)
        slopes, cells = DENSE * np.sinh(angles), DENSE * np.cosh(angles) * (angles[1] - angles[0])
        density = np.exp(-0.5 * (slopes / prior.slope_sd) ** 2) * cells
        steps = len(prior.step_sds)
        weights = np.repeat(density / density.sum() / steps, steps)
        step_sds = np.tile(prior.step_sds, len(slopes))
        return cls(np.repeat(slopes, steps), np.repeat(cells, steps), step_sds, weights)

    def transition(self, start: Array, end: Array, gap: float) -> Array:
        """(H, J, K) density of a level on one size's grid, given the level on that of the size before it.

        Args:
            start, end: (J,), (K,) centers of the cells, equally spaced.
        """
        widths = start[1] - start[0], end[1] - end[0]
        slopes, slope_cells = self.slopes[:, None, None], self.slope_cells[:, None, None]
        within_cells = (widths[0] ** 2 + widths[1] ** 2 + (slope_cells * gap) ** 2) / 12
        variance = self.step_sds[:, None, None] ** 2 * gap + within_cells
        step = end - start[:, None] - slopes * gap
        return np.exp(-0.5 * step**2 / variance) / np.sqrt(variance)


def sample_walk(
    likelihoods: Sequence[Array],
    grids: Sequence[Array],
    positions: Array,
    prior: WalkPrior,
    draws: int,
    rng: np.random.Generator,
) -> tuple[Indices, list[Indices], WalkDraws]:
    """Draws of the optima of a ladder, given how likely each place is at each size by its own runs.

    Args:
        likelihoods: (I, J) of every size, for I draws of what the sizes share beside the walk.
        grids: (J,) places of every size's optimum, equally spaced.
        positions: of the sizes, rising.

    Returns:
        (draws,) which of the I it is, for every size the (draws,) cells of the optima, and the walk.
    """
    settings = Settings.of(prior)
    level_grids = [np.linspace(grid[0] - OFF, grid[-1] + OFF, LEVELS) for grid in grids]
    neighbours = zip(level_grids[:-1], level_grids[1:], np.diff(positions), strict=True)
    steps = [settings.transition(start, end, gap).astype(np.float32) for start, end, gap in neighbours]
    deviations = [_deviation(level, grid, prior) for level, grid in zip(level_grids, grids, strict=True)]
    likelihoods = [one / one.sum(axis=1, keepdims=True) for one in likelihoods]
    of_levels = [(one @ near.T).astype(np.float32) for one, near in zip(likelihoods, deviations, strict=True)]

    # Forward, for every setting of the walk (H) and of what else the sizes share (I): the evidence of each pair.
    log_evidence = np.zeros((len(settings.slopes), len(likelihoods[0])))
    filtered = np.broadcast_to(_normalized(of_levels[0])[0], (len(settings.slopes), *of_levels[0].shape))
    for step, likelihood in zip(steps, of_levels[1:], strict=True):
        filtered, total = _normalized(filtered @ step * likelihood)
        log_evidence += np.log(total)
    evidence = settings.weights[:, None] * np.exp(log_evidence - log_evidence.max())
    pairs = rng.choice(evidence.size, draws, p=evidence.ravel() / evidence.sum())
    walk, shared = np.unravel_index(pairs, evidence.shape)

    # Forward again for the pairs that were drawn, then backward: the largest size first, each smaller one given it.
    forward = [of_levels[0][shared]]
    for step, likelihood in zip(steps, of_levels[1:], strict=True):
        predicted = (forward[-1][:, None] @ step[walk])[:, 0]
        forward.append(_normalized(predicted * likelihood[shared])[0])
    level_cells = [choose(forward[-1], rng)]
    for step, seen in zip(steps[::-1], forward[-2::-1], strict=True):
        level_cells.insert(0, choose(seen * step[walk, :, level_cells[0]], rng))
    each_size = zip(likelihoods, deviations, level_cells, strict=True)
    cells = [choose(one[shared] * near[level], rng) for one, near, level in each_size]

    inside = rng.random((len(grids), draws)) - 0.5
    levels = [
        grid[cell] + (grid[1] - grid[0]) * u for grid, cell, u in zip(level_grids, level_cells, inside, strict=True)
    ]
    slopes = settings.slopes[walk] + settings.slope_cells[walk] * (rng.random(draws) - 0.5)
    return shared, cells, WalkDraws(prior, positions, np.array(levels), slopes, settings.step_sds[walk])


def choose(weights: npt.NDArray[np.floating], rng: np.random.Generator) -> Indices:
    """(draws,) a column of every row, with chances in proportion to the row's weights (draws, columns)."""
    cumulative = np.cumsum(weights, axis=1, dtype=float)
    height = rng.random((len(weights), 1)) * cumulative[:, -1:]
    return np.minimum((height >= cumulative).sum(axis=1), weights.shape[1] - 1)


def _deviation(levels: Array, optima: Array, prior: WalkPrior) -> Array:
    """(LEVELS, J) density of an optimum around its level."""
    within_cells = ((levels[1] - levels[0]) ** 2 + (optima[1] - optima[0]) ** 2) / 12
    scale = math.sqrt(prior.deviation**2 + within_cells)
    z = (optima - levels[:, None]) / scale
    return (1 + z**2 / DEGREES_OF_FREEDOM) ** (-(DEGREES_OF_FREEDOM + 1) / 2) / scale


def _normalized(weights: Array) -> tuple[Array, Array]:
    """Weights that sum to 1 along the last axis, and their sums before."""
    total = weights.sum(axis=-1) + TINY
    return weights / total[..., None], total
