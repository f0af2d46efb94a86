"""Comparison: what one variant is worth against another, each at its own optimum of every size.

Every number is a quantile of the same draws that a verdict rests on. None of them changes a verdict.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mupsweep.analysis.estimate import QUANTILES, UNKNOWN, Estimate, Indices
from mupsweep.analysis.labels import Label
from mupsweep.analysis.optimum import Optimum
from mupsweep.analysis.quality import asymptote, drawn
from mupsweep.analysis.run_result import Size
from mupsweep.analysis.transfer import LadderResult

Flops = Mapping[tuple[Label, Size], float]  # of one run, by variant and size

EXTRAPOLATED = 1.0  # octaves of compute beyond the measured sizes that a speed-up is still read from
REFERENCE = "adamw"  # the optimizer that others are compared with, where it was trained
STANDARD = "sp"  # the parametrization that others are compared with, where it was trained


@dataclass(frozen=True)
class Comparison:
    """What one variant is worth against another on the same ladder, each at its own optimum of every size.

    Attributes:
        of, over: (model, optimizer, parametrization).
        width, depth, horizon: the largest size that both have.
        lower: nats per token by which the loss of `of` is below that of `over` there.
        speed_up: how many times its compute `over` needs, on a larger size, for the same loss (Qiu et al. 2512.05620).
        asymptotic_penalty: R(inf): nats per token by which the asymptotic loss of `of` is above that of `over`.
    """

    of: tuple[str, str, str]
    over: tuple[str, str, str]
    axis: str
    width: int
    depth: int
    lower: Estimate
    speed_up: Estimate
    asymptotic_penalty: Estimate
    horizon: int | None = None


def comparisons(groups: Sequence[LadderResult], flops: Flops) -> list[Comparison]:
    """Every optimizer against AdamW and every parametrization against SP, or against the first there is."""
    return [compare(ours, theirs, flops) for ours, theirs in pairs(groups) if shared(ours, theirs)]


def pairs(groups: Sequence[LadderResult]) -> Iterable[tuple[LadderResult, LadderResult]]:
    """Ladders that differ in their optimizer or their parametrization alone, as (ladder, reference)."""
    for position, reference in ((1, REFERENCE), (2, STANDARD)):
        families: dict[tuple[str, ...], list[LadderResult]] = defaultdict(list)
        for group in groups:
            others = [name for i, name in enumerate(group.label) if i != position]
            families[(group.axis, *others)].append(group)
        for members in families.values():
            over = next((group for group in members if group.label[position] == reference), members[0])
            yield from ((group, over) for group in members if group is not over)


def shared(ours: LadderResult, theirs: LadderResult) -> list[tuple[Optimum, Optimum]]:
    """The known optima of the sizes that two ladders have in common."""
    by_size = {optimum.curve.size: optimum for optimum in theirs.fitted}
    return [(optimum, by_size[optimum.curve.size]) for optimum in ours.fitted if optimum.curve.size in by_size]


def compare(ours: LadderResult, theirs: LadderResult, flops: Flops) -> Comparison:
    """What one ladder is worth against another with which it shares a size of known optima."""
    mine, other = shared(ours, theirs)[-1]
    # the draws of two ladders are independent of one another, so those of one are shuffled
    shuffled = np.random.default_rng(1).permutation(len(drawn(mine)[0]))
    limits = [asymptote(ladder.positions(ladder.fitted), ladder.fitted) for ladder in (ours, theirs)]
    penalty = limits[0] - limits[1][shuffled] if all(len(limit) for limit in limits) else np.empty(0)
    return Comparison(
        ours.label,
        theirs.label,
        ours.axis,
        mine.curve.width,
        mine.curve.depth,
        Estimate.of(drawn(other)[1][shuffled] - drawn(mine)[1]),
        _speed_up(mine, theirs.fitted, flops, shuffled),
        Estimate.of(penalty),
        mine.curve.horizon,
    )


def _speed_up(ours: Optimum, theirs: Sequence[Optimum], flops: Flops, shuffled: Indices) -> Estimate:
    """The compute at which a straight line through the other's losses over log compute reaches our loss / our compute.

    A line reaches no further than the sizes that it goes through: beyond them there is only a bound.
    """
    curves = [optimum.curve for optimum in (ours, *theirs)]
    compute = [flops.get((curve.label, curve.size)) for curve in curves]
    if len(set(compute[1:])) < 2 or None in compute:
        return UNKNOWN
    own, *x = (math.log2(c) for c in compute if c is not None)
    losses = np.array([drawn(optimum)[1][shuffled] for optimum in theirs])
    positions = np.array(x)
    center = positions - positions.mean()
    slope = center @ losses / (center @ center)
    target = drawn(ours)[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        reached = positions.mean() + (target - losses.mean(axis=0)) / slope
    # where more compute does not lower the loss, the line reaches a lower loss never and a higher one at once
    reached = np.where(slope < 0, reached, np.where(target < losses.mean(axis=0), math.inf, -math.inf))
    low, value, high = (float(q) for q in np.quantile(reached, QUANTILES, method="nearest"))
    lowest, highest = min(x) - EXTRAPOLATED, max(x) + EXTRAPOLATED

    def factor(at: float) -> float | None:
        return 2.0 ** (at - own) if lowest <= at <= highest else None

    if factor(value) is None:  # the loss is outside of what the other's sizes reach
        above, below = low > highest, high < lowest
        return Estimate(None, 2.0 ** (highest - own) if above else None, 2.0 ** (lowest - own) if below else None)
    return Estimate(factor(value), factor(low), factor(high))
