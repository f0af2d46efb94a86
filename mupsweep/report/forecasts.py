"""What a picture of drift shows of sizes beyond the ladder: forecasts, and targets that were trained to test one."""

from __future__ import annotations

from collections.abc import Sequence

from mupsweep.analysis.estimate import Estimate
from mupsweep.analysis.transfer import LadderResult

DOUBLINGS = 0.0, 1.0, 2.0  # beyond the largest size
MAX_FANS = 4  # in one picture: more of them hide each other


def fans(groups: Sequence[LadderResult]) -> list[list[tuple[float, Estimate]]]:
    """For every ladder where it expects the optimum at larger sizes, in octaves from the base's, by position.

    A ladder forecasts nothing without a known base and a larger size.
    """
    return [_fan(group) if len(groups) <= MAX_FANS else [] for group in groups]


def _fan(group: LadderResult) -> list[tuple[float, Estimate]]:
    base, largest = group.base, group.optima[-1]
    if base.draws is None or not base.known or base is largest:
        return []
    start = float(group.positions([largest])[0])
    expected = [(start + doublings, group.forecast(start + doublings)) for doublings in DOUBLINGS]
    return [(at, Estimate.of(found.draws - base.draws.optimum)) for at, found in expected if found is not None]


def from_base(estimate: Estimate, group: LadderResult) -> Estimate:
    """An optimum in octaves from the middle of the base's, whose own interval is left out."""
    base = group.base.center
    return Estimate(*(None if end is None else end - base for end in (estimate.value, estimate.low, estimate.high)))
