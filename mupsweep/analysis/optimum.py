"""Optima: the best LR of every size of a ladder, with the curve and the draws that it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mupsweep.analysis.curves import LossCurve
from mupsweep.analysis.estimate import UNKNOWN, Array, Estimate
from mupsweep.analysis.loss_curve import CurveDraws, LadderPosterior, SizeRuns


@dataclass(frozen=True)
class Optimum:
    """The best LR of one size.

    Attributes:
        estimate: of its log2; numbers that the trained LRs do not bound are None.
        loss: in nats per token there; without an interval where the optimum has none.
        reason: why a number is missing.
        draws: of the curve; None with too few LRs for one.
    """

    curve: LossCurve
    estimate: Estimate
    loss: Estimate
    reason: str | None
    draws: CurveDraws | None

    @property
    def log2_lr(self) -> float | None:
        """The median; None where it lies at an end of the trained LRs, or beyond."""
        return self.estimate.value

    @property
    def low(self) -> float | None:
        return self.estimate.low

    @property
    def high(self) -> float | None:
        return self.estimate.high

    @property
    def known(self) -> bool:
        """Whether the trained LRs bound it on both sides."""
        return self.draws is not None and self.log2_lr is not None and None not in (self.low, self.high)

    @property
    def bracketed(self) -> bool:
        """Whether LRs with higher losses were trained on both sides of the best one."""
        usable = self.curve.usable
        if not usable:
            return False
        best = min(usable, key=lambda p: p.mean).log2_lr
        return self.curve.points[0].log2_lr < best < self.curve.points[-1].log2_lr

    @property
    def center(self) -> float:
        """Where to look further: the median of the draws, at an end too; the best LR where there are none."""
        if self.draws is not None:
            return float(np.median(self.draws.optimum))
        return min(self.curve.usable, key=lambda p: p.mean).log2_lr


def runs_of(curve: LossCurve, position: float) -> SizeRuns:
    """The runs of a curve, at a position on a ladder in doublings above the base."""
    runs = [(p.log2_lr, loss, seed) for p in curve.points for seed, loss in p.losses.items()]
    diverged = [(p.log2_lr, np.nan, -1) for p in curve.points for _ in range(p.diverged)]
    if not runs and not diverged:
        return SizeRuns.of(position, [], [])
    log2_lrs, losses, seeds = zip(*runs, *diverged, strict=True)
    return SizeRuns.of(position, log2_lrs, losses, seeds)


def optima_of(curves: Sequence[LossCurve], posterior: LadderPosterior) -> tuple[Optimum, ...]:
    """The optimum of every curve of a ladder."""
    found = []
    for curve, optimum, draws in zip(curves, posterior.optima, posterior.curves, strict=True):
        loss = UNKNOWN
        if draws is not None and optimum.estimate.value is not None:
            loss = Estimate.of(draws.floor)
        if optimum.reason is not None:
            loss = Estimate(loss.value, None, None)
        found.append(Optimum(curve, optimum.estimate, loss, optimum.reason, draws))
    return tuple(found)


def shuffled(draws: Array, seed: int = 1) -> Array:
    """Draws in another order, for a comparison with those of another ladder: the two are independent."""
    return np.random.default_rng(seed).permutation(draws)
