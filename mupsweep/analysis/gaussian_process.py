"""Valleys: the loss curves of a ladder of sizes around their minima, drawn from a Gaussian model of all of them.

The loss around a minimum is a parabola that bends: its third derivative is white noise of unknown strength (an
integrated Wiener process; the posterior mean is a quintic smoothing spline, Wahba 1978). The valleys of a ladder bend
more or less alike. Strength and likeness of the bend, and the noise, are shared by all sizes and weighed by their
evidence: so the data choose between a stiff parabola and a lopsided valley, and what is uncertain in the shape of all
sizes alike is no uncertainty of their drift. Everything is in octaves (log2 LR) and nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

DRAWS = 2000
CELLS = 40  # of a window, on which its curve is drawn
BENDS = np.geomspace(0.03, 4.0, 8)  # third derivative, in ranges of loss per octave^2.5, each as likely
NOISES = np.geomspace(0.6, 2.2, 6)  # in units of what the seeds say
BLIND_NOISES = np.geomspace(0.003, 0.5, 12)  # in ranges of loss, where no seed was repeated
LIKENESSES = (0.0, 0.5, 0.9, 0.98)  # correlation of the bends of two sizes, each as likely
NEGLIGIBLE = 0.005  # relative evidence below which a setting is not drawn
Array = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Window:
    """The seed means around the best point of a curve.

    Attributes:
        center: log2 LR of the best point, the origin of `xs`.
        xs, ys: octaves and nats.
        sds: standard deviation of each point, up to the common factor that is estimated with the bend.
        tilt: standard deviation of a common slope of all points, which seeds give to a whole curve, nats per octave.
        bottom: about where the minimum is, relative to the center.
    """

    center: float
    xs: Array
    ys: Array
    sds: Array
    tilt: float = 0.0
    bottom: float = 0.0

    @property
    def cells(self) -> Array:
        """(CELLS + 1,) where the curve is drawn, relative to the center."""
        return np.linspace(self.xs[0], self.xs[-1], CELLS + 1)


class Setting(NamedTuple):
    """What is unknown beside the curves themselves.

    Attributes:
        bend: strength of the third derivative, nats per octave^2.5.
        noise: factor of the windows' `sds`.
        likeness: correlation of the bends of two sizes.
    """

    bend: float
    noise: float
    likeness: float


def draw(windows: Sequence[Window], dof: float) -> list[tuple[Array, Array]]:
    """(log2 LRs, (DRAWS, cells) losses) of every curve; draw i of all curves belongs together.

    Args:
        dof: degrees of freedom behind the windows' `sds`; 0 where no seed was repeated.
    """
    if not windows:
        return []
    if len(windows) > 1:  # valleys are compared bottom on bottom; where that is, a first look without likeness tells
        ladder = Ladder(windows)
        settings, weights = weigh(ladder, dof, (0.0,))
        means = ladder.solve(settings[int(weights.argmax())]).means()
        lowest = [float(w.cells[mean.argmin()]) for w, mean in zip(windows, means, strict=True)]
        windows = [replace(w, bottom=x) for w, x in zip(windows, lowest, strict=True)]
    ladder = Ladder(windows)
    settings, weights = weigh(ladder, dof, LIKENESSES if len(windows) > 1 else (0.0,))
    random = np.random.default_rng(0)  # fixed: the same records always give the same numbers
    counts = random.multinomial(DRAWS, weights)
    drawn = [ladder.solve(s).draw(n, random) for s, n in zip(settings, counts, strict=True) if n]
    each = np.split(np.concatenate(drawn), len(windows), axis=1)
    return [(w.center + w.cells, curves) for w, curves in zip(windows, each, strict=True)]


def noise_without_seeds(windows: Sequence[Window]) -> float:
    """What the evidence of whole curves says of the noise of a run, in nats, where no seed was repeated."""
    settings, weights = weigh(Ladder(windows), 0.0, (0.0,))
    return float(weights @ np.array([s.noise for s in settings]))


def weigh(ladder: Ladder, dof: float, likenesses: Sequence[float]) -> tuple[list[Setting], Array]:
    """The settings, and how probable each is."""
    unit = float(np.median([w.ys.max() - w.ys.min() for w in ladder.windows])) or 1.0
    noises = NOISES if dof else BLIND_NOISES * unit
    settings = [Setting(unit * bend, noise, alike) for bend in BENDS for noise in noises for alike in likenesses]
    evidence = np.array([ladder.solve(s).evidence + _prior(s.noise, dof) for s in settings])
    weights = np.exp(evidence - evidence.max())
    weights[weights < NEGLIGIBLE] = 0.0
    return settings, weights / weights.sum()


def _prior(noise: float, dof: float) -> float:
    """Log density of the common factor of the noise: scaled inverse chi-squared with half the seeds' freedom, as the
    points' own estimates use it too; flat in the logarithm without seeds."""
    return -dof / 2 * (math.log(noise) + 0.5 / noise**2) if dof else 0.0


@dataclass(frozen=True)
class Ladder:
    """The windows of some sizes, and the covariances that every setting scales."""

    windows: Sequence[Window]

    @cached_property
    def points(self) -> list[Array]:
        return [w.xs for w in self.windows]

    @cached_property
    def cells(self) -> list[Array]:
        return [w.cells for w in self.windows]

    @cached_property
    def among_points(self) -> Bends:
        return self.bends(self.points, self.points)

    @cached_property
    def to_cells(self) -> Bends:
        return self.bends(self.points, self.cells)

    @cached_property
    def among_cells(self) -> Bends:
        return self.bends(self.cells, self.cells)

    @cached_property
    def variances(self) -> Array:
        return np.diag(np.concatenate([w.sds for w in self.windows]) ** 2)

    @cached_property
    def tilts(self) -> Array:
        return _blocks(w.tilt**2 * np.outer(w.xs, w.xs) for w in self.windows)

    @cached_property
    def parabolas(self) -> Array:
        """1, x, x^2 of every curve at its points: the curves share nothing of these."""
        return _parabolas(self.points)

    def bends(self, a: Sequence[Array], b: Sequence[Array]) -> Bends:
        """The covariance of what the curves bend away from parabolas, at places `a` and `b` of each."""
        origin = min(w.xs[0] - w.bottom for w in self.windows)
        rows, columns = (
            [x - w.bottom - origin for w, x in zip(self.windows, places, strict=True)] for places in (a, b)
        )
        same = _blocks(np.ones((len(x), len(y))) for x, y in zip(rows, columns, strict=True))
        return Bends(_bent(np.concatenate(rows), np.concatenate(columns)), same)

    def solve(self, setting: Setting) -> Solved:
        """The posterior of all curves."""
        covariance = self.among_points.at(setting) + setting.noise**2 * self.variances + self.tilts
        root = np.linalg.cholesky(covariance)
        whitened = np.linalg.solve(
            root, np.column_stack([self.parabolas, np.concatenate([w.ys for w in self.windows])])
        )
        basis, losses = whitened[:, :-1], whitened[:, -1]
        information = basis.T @ basis
        beta = np.linalg.solve(information, basis.T @ losses)
        rest = losses - basis @ beta
        evidence = -0.5 * rest @ rest - np.log(np.diag(root)).sum() - 0.5 * np.linalg.slogdet(information)[1]
        return Solved(self, setting, root, basis, information, beta, rest, float(evidence))


@dataclass(frozen=True)
class Bends:
    """Covariance of the bends at unit strength, and which entries are of one and the same curve."""

    unit: Array
    same: Array

    def at(self, setting: Setting) -> Array:
        return setting.bend**2 * (setting.likeness + (1 - setting.likeness) * self.same) * self.unit


@dataclass(frozen=True)
class Solved:
    """The joint Gaussian posterior of all curves at one setting (Rasmussen and Williams 2006, section 2.7)."""

    ladder: Ladder
    setting: Setting
    root: Array  # Cholesky factor of the covariance of all points
    basis: Array  # root^-1 times the parabolas at the points
    information: Array
    beta: Array
    rest: Array  # root^-1 times the residuals
    evidence: float

    def means(self) -> list[Array]:
        """The expected curve of each window on its cells."""
        return np.split(self._mean(self._pulled()), len(self.ladder.windows))

    def draw(self, count: int, random: np.random.Generator) -> Array:
        """(count, cells of all windows, one after the other) curves."""
        pulled = self._pulled()
        open_ = _parabolas(self.ladder.cells).T - self.basis.T @ pulled
        within = self.ladder.among_cells.at(self.setting)
        covariance = within - pulled.T @ pulled + open_.T @ np.linalg.solve(self.information, open_)
        values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        spread = vectors * np.sqrt(np.clip(values, 0.0, None))
        return self._mean(pulled) + random.standard_normal((count, len(values))) @ spread.T

    def _pulled(self) -> Array:
        """(points, cells) root^-1 times the covariance of points and cells."""
        return np.linalg.solve(self.root, self.ladder.to_cells.at(self.setting))

    def _mean(self, pulled: Array) -> Array:
        return _parabolas(self.ladder.cells) @ self.beta + pulled.T @ self.rest


def _parabolas(places: Sequence[Array]) -> Array:
    return _blocks(np.vander(x, 3, increasing=True) for x in places)


def _blocks(matrices: Iterable[Array]) -> Array:
    """The matrices along the diagonal, zeros elsewhere."""
    return np.asarray(linalg.block_diag(*matrices))


def _bent(a: Array, b: Array) -> Array:
    """(len(a), len(b)) covariance of the thrice integrated white noise that starts at 0, for a, b >= 0."""
    least = np.minimum.outer(a, b)
    gap = np.abs(np.subtract.outer(a, b))
    return least**5 / 20 + gap * least**4 / 8 + gap**2 * least**3 / 12
