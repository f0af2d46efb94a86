"""An estimate with its interval."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mupsweep.analysis.gaussian_process import Array
from mupsweep.analysis.optimum import TAILS


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
        low, value, high = (float(q) for q in np.quantile(draws, (TAILS[0], 0.5, TAILS[1])))
        return cls(value, low, high)

    @property
    def negated(self) -> Estimate:
        """By how much less, where this is by how much more."""
        value, low, high = (None if end is None else -end for end in (self.value, self.high, self.low))
        return Estimate(value, low, high)

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
