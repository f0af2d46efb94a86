"""Least-squares exponents with 95 % t-intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from mupsweep.analysis.estimate import CONFIDENCE, Estimate


@dataclass(frozen=True)
class Exponent(Estimate):
    """A fitted exponent: an estimate of which all three numbers are known."""

    value: float
    low: float
    high: float

    def away_from(self, expected: float) -> float:
        """How far `expected` lies outside the interval; 0 inside it."""
        return max(0.0, self.low - expected, expected - self.high)

    def widened(self, half: float) -> Exponent:
        """The exponent with an interval that is at least `half` to both sides."""
        return Exponent(self.value, min(self.low, self.value - half), max(self.high, self.value + half))

    def shifted(self, by: float) -> Exponent:
        """Value and interval plus `by`."""
        return Exponent(self.value + by, self.low + by, self.high + by)


def signed(value: float) -> str:
    """Two decimals and a sign; +0.00 for what rounds to zero from below."""
    return f"{value:+z.2f}"


def regress(columns: Sequence[ArrayLike], ys: ArrayLike, groups: Sequence[object] = ()) -> list[Exponent]:
    """One coefficient per column of a least-squares fit of `ys`, with an intercept for every group of points.

    Without a degree of freedom left, intervals are infinite.
    """
    y = np.asarray(ys, dtype=float)
    names = list(groups) or [None] * len(y)
    intercepts = [np.array([name == g for name in names], dtype=float) for g in dict.fromkeys(names)]
    X = np.stack([*(np.asarray(c, dtype=float) for c in columns), *intercepts], axis=1)
    beta = np.linalg.lstsq(X, y, rcond=None)[0]
    dof = len(y) - np.linalg.matrix_rank(X)
    if dof < 1:
        return [Exponent(float(b), -math.inf, math.inf) for b in beta[: len(columns)]]
    residual = y - X @ beta
    variance = float(residual @ residual) / dof * np.diag(np.linalg.pinv(X.T @ X))
    half = stats.t.ppf((1 + CONFIDENCE) / 2, dof) * np.sqrt(variance)
    return [Exponent(float(b), float(b - h), float(b + h)) for b, h in zip(beta, half, strict=True)][: len(columns)]


def slope(sizes: Sequence[float], values: Sequence[float]) -> Exponent:
    """The exponent of positive values in the size."""
    return regress([np.log2(sizes)], np.log2(values))[0]
