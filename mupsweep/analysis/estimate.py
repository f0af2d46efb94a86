"""An estimate with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

CONFIDENCE = 0.95
QUANTILES = (0.5 - CONFIDENCE / 2, 0.5, 0.5 + CONFIDENCE / 2)


@dataclass(frozen=True)
class Estimate:
    """A number with its interval at CONFIDENCE; None where the data give none."""

    value: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, draws: Array) -> Estimate:
        """The median and the interval of some draws; unknown without any."""
        if not len(draws):
            return UNKNOWN
        low, value, high = map(float, np.quantile(draws, QUANTILES))
        return cls(value, low, high)

    @classmethod
    def among(cls, draws: Array) -> Estimate:
        """Three of the draws, some of which may be infinite: those at the median and the ends of the interval."""
        low, value, high = map(float, np.quantile(draws, QUANTILES, method="inverted_cdf"))
        return cls(value, low, high)

    def map(self, function: Callable[[float], float | None]) -> Estimate:
        """A rising function of the value and of both ends."""
        ends = (self.value, self.low, self.high)
        return Estimate(*(None if end is None else function(end) for end in ends))

    def record(self, unit: str = "value") -> dict[str, float | None]:
        """For JSON, the value under the name of its unit."""
        return {unit: self.value, "low": self.low, "high": self.high}

    @property
    def finite(self) -> Estimate:
        """Without the numbers that are infinite."""
        return self.map(lambda end: None if math.isinf(end) else end)

    @property
    def negated(self) -> Estimate:
        """By how much less, where this is by how much more."""
        value, low, high = (None if end is None else -end for end in (self.value, self.high, self.low))
        return Estimate(value, low, high)

    @property
    def half_width(self) -> float | None:
        """Half the width of the interval; None where it has an open end."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    def __format__(self, spec: str) -> str:
        """The value and its interval, or the bound there is, each number by `spec` and none of them -0.00."""
        spec = (spec or "+.2f").replace(".", "z.")
        ends = [("at least", self.low), ("at most", self.high)]
        bounds = " and ".join(f"{word} {end:{spec}}" for word, end in ends if end is not None)
        if self.value is None:
            return bounds or "unknown"
        if self.low is not None and self.high is not None:
            bounds = f"{self.low:{spec}}, {self.high:{spec}}"
        return f"{self.value:{spec}} [{bounds or 'no interval'}]"

    def __str__(self) -> str:
        return format(self)


UNKNOWN = Estimate(None, None, None)
ZERO = Estimate(0.0, 0.0, 0.0)
