"""What a picture of drift shows of sizes beyond the ladder: forecasts, and targets that were trained to test one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mupsweep.analysis.estimate import Estimate
from mupsweep.analysis.transfer import LadderResult
from mupsweep.report.names import position_name

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


def size_ticks(groups: Sequence[LadderResult], targets: bool, forecasts: bool) -> dict[float, str]:
    """Labels of an axis of log2 of the ratio to the base: the sizes' names, or ratios where ladders have other sizes.

    Args:
        targets: whether sizes that were trained to test a forecast are drawn too.
        forecasts: whether larger sizes are; they are named by their factor.
    """
    names: dict[float, str] = {}
    differ = False
    for group in groups:
        trained = [v.optimum.curve for v in group.validations] if targets else []
        for curve in (*(o.curve for o in group.optima), *trained):
            name = position_name(group.axis, curve)
            differ |= names.setdefault(math.log2(group.ratio(curve)), name) != name
    largest = max(math.log2(g.ratio(g.optima[-1].curve)) for g in groups)
    if differ:  # sizes whose ratios are almost the same share a label
        names = {at: f"×{2**at:.3g}" for at in {round(at, 1): at for at in names}.values()}
    for doublings in DOUBLINGS[1:] if forecasts else ():
        factor = 2 ** (largest + doublings if differ else doublings)
        names.setdefault(largest + doublings, f"×{factor:.3g}")
    return dict(sorted(names.items()))


def from_base(estimate: Estimate, group: LadderResult) -> Estimate:
    """An optimum in octaves from the middle of the base's, whose own interval is left out."""
    base = group.base.center
    return estimate.map(lambda end: end - base)
