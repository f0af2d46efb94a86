"""Forecast: the best LR of a size that was never trained, and the LR to use there.

The walk of the optima goes on from the sizes that were trained to the target (see walk.py): beyond the largest, below
the smallest, or between two. The interval therefore grows with distance and has the measured drift in it, whatever the
verdict. Handed over is the LR with the least expected loss: left of the middle where the right side is steep.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mupsweep.analysis.estimate import Array, Estimate
from mupsweep.analysis.loss_curve import CurveDraws, LadderPosterior, fit_ladder

LOST_RUN = 1.0  # nats that a run may lose at most; one that diverges does
CANDIDATES = 25  # LRs that are compared


@dataclass(frozen=True)
class Forecast:
    """What a ladder expects at a target.

    Attributes:
        log2_lr: of the least expected loss.
        expected_regret: nats above the target's lowest loss that it is expected to lose.
        optimum: where the target's optimum is.
        draws: (draws,) of that optimum.
    """

    log2_lr: float
    expected_regret: float
    optimum: Estimate
    draws: Array

    def error(self, measured: CurveDraws) -> Estimate:
        """Octaves by which the expected optimum lies above the one that was then measured on its own."""
        return Estimate.of(np.random.default_rng(4).permutation(self.draws) - measured.optimum)

    def regret(self, measured: CurveDraws) -> Estimate:
        """Nats that the LR handed over loses on the curve that was then measured; infinite numbers are None."""
        return Estimate.among(measured.regret(self.log2_lr)).finite


def forecast_from_smaller(ladder: LadderPosterior, position: float) -> Forecast | None:
    """The forecast of a size from those that are smaller, whatever else was trained."""
    smaller = [size for size in ladder.sizes if size.position < position]
    return forecast(ladder if len(smaller) == len(ladder.sizes) else fit_ladder(smaller, ladder.prior), position)


def forecast(ladder: LadderPosterior, position: float) -> Forecast | None:
    """The optimum at a size `position` doublings above the base, and the LR to use; None where no size has a curve.

    A ladder's trained size is forecast too, as if another like it were trained.
    """
    if ladder.walk is None or not ladder.fitted:
        return None
    draws = ladder.walk.optima(position, np.random.default_rng(2))
    candidates, lost = losses_at_target(ladder, position, draws)
    expected = lost.mean(axis=0)
    best = int(expected.argmin())
    return Forecast(float(candidates[best]), float(expected[best]), Estimate.of(draws), draws)


def losses_at_target(ladder: LadderPosterior, position: float, optimum: Array) -> tuple[Array, Array]:
    """(m,) LRs where the optimum of a target may be, and (draws, m) what each would lose there, LOST_RUN at most.

    The target's valley is that of the nearest trained size, its height changed along the ladder's trend.
    """
    size, nearest = min(ladder.fitted, key=lambda pair: (abs(pair[0].position - position), -pair[0].position))
    low, high = map(float, np.quantile(optimum, (0.05, 0.95)))
    candidates = np.linspace(low, high, CANDIDATES)
    offsets = candidates - optimum[:, None]
    growth = np.exp(nearest.trend * (position - size.position))[:, None]
    return candidates, np.minimum(growth * nearest.rise(nearest.optimum[:, None] + offsets), LOST_RUN)
