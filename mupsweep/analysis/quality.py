"""Quality: how well the LR transfers along one ladder, in the numbers that others report.

Every number is a quantile of the same draws that a verdict rests on. None of them changes a verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mupsweep.analysis.estimate import UNKNOWN, Array, Estimate
from mupsweep.analysis.forecast import LOST_RUN, forecast_from_smaller
from mupsweep.analysis.loss_curve import LadderPosterior
from mupsweep.analysis.optimum import Optimum

POWERS = (0.5, 2.0)  # finite-size corrections fall as size^-p; p is drawn between these, since few sizes cannot tell it
MISS = 1.0  # octaves: the error whose price kappa follows from size to size


@dataclass(frozen=True)
class HeldOut:
    """The largest size, forecast from the smaller ones as if it had not been trained.

    Attributes:
        predicted: log2 of the best LR.
        error: octaves by which the prediction lies above the optimum that was then measured.
        log2_lr: of the LR that the smaller sizes hand over.
        regret: nats per token lost by that LR there.
    """

    predicted: Estimate
    error: Estimate
    log2_lr: float
    regret: Estimate


@dataclass(frozen=True)
class Quality:
    """The three metrics of Kalra and Barkeshli (2605.21486) as far as one ladder gives them, and a prediction.

    Attributes:
        fit_error: E, octaves: root mean square distance of the optima from the line through them. From 3 sizes.
        robustness: kappa: what missing the optimum by an octave costs grows as ratio^kappa. From 2 sizes.
        asymptotic_loss: nats per token that the loss at the optimum tends to as the ladder grows. From 3 sizes.
        held_out: None with fewer than 3 sizes, or where the optimum of the largest is not known.
    """

    fit_error: Estimate
    robustness: Estimate
    asymptotic_loss: Estimate
    held_out: HeldOut | None


def quality(positions: Array, optima: Sequence[Optimum], posterior: LadderPosterior) -> Quality:
    """The metrics of one ladder; unknown where too few of its optima are known.

    Args:
        positions: log2 of every size's ratio to the base, rising.
        optima: of every size.
        posterior: of the ladder.
    """
    known = [optimum for optimum in optima if optimum.known]
    if len(known) < 2:
        return Quality(UNKNOWN, UNKNOWN, UNKNOWN, None)
    x = np.array([position for position, optimum in zip(positions, optima, strict=True) if optimum.known])
    minima = np.array([drawn(optimum)[0] for optimum in known])
    fit_error = UNKNOWN
    if len(known) > 2:  # a line through two points fits them exactly
        residuals = minima - _line(x, minima, x)
        fit_error = Estimate.of(np.sqrt((residuals**2).mean(axis=0)))
    prices = np.log2(np.maximum([_price(optimum) for optimum in known], 1e-9))
    center = x - x.mean()
    robustness = Estimate.of(center @ prices / (center @ center))
    held_out = _held_out(optima[-1], posterior) if known[-1] is optima[-1] else None
    return Quality(fit_error, robustness, Estimate.of(asymptote(x, known)), held_out)


def asymptote(x: Array, known: Sequence[Optimum]) -> Array:
    """(draws,) the loss that those at the optima tend to as the ladder grows; empty below 3 sizes.

    The power of the finite-size correction is drawn too.

    Args:
        x: log2 of every size's ratio to the base.
        known: the optimum of every size, each with draws.
    """
    if len(known) < 3:
        return np.empty(0)
    losses = np.array([drawn(optimum)[1] for optimum in known])  # (sizes, draws)
    powers = np.random.default_rng(0).uniform(*POWERS, losses.shape[1])
    corrections = (2.0**x)[:, None] ** -powers  # (sizes, draws)
    center, mean = corrections.mean(axis=0), losses.mean(axis=0)
    slope = ((corrections - center) * (losses - mean)).sum(axis=0) / ((corrections - center) ** 2).sum(axis=0)
    return mean - slope * center


def drawn(optimum: Optimum) -> tuple[Array, Array]:
    """(draws,) log2 LRs of an optimum that has draws, and (draws,) the losses there."""
    assert optimum.draws is not None
    return optimum.draws.optimum, optimum.draws.floor


def _held_out(largest: Optimum, posterior: LadderPosterior) -> HeldOut | None:
    """The largest size beside what the smaller ones forecast for it; None with fewer than two of them with curves."""
    position = posterior.sizes[-1].position
    if sum(size.position < position for size, _ in posterior.fitted) < 2:
        return None
    expected = forecast_from_smaller(posterior, position)
    assert expected is not None
    assert largest.draws is not None
    return HeldOut(expected.optimum, expected.error(largest.draws), expected.log2_lr, expected.regret(largest.draws))


def _line(x: Array, values: Array, at: Array) -> Array:
    """(places, draws) a straight line through every draw of `values` (sizes, draws), at some places."""
    center = x - x.mean()
    slope = center @ values / (center @ center)
    return values.mean(axis=0) + (at - x.mean())[:, None] * slope


def _price(optimum: Optimum) -> Array:
    """(draws,) nats lost by missing the minimum by MISS octaves, the mean of both sides; a nat at most."""
    assert optimum.draws is not None
    beside = optimum.draws.optimum[:, None] + np.array([-MISS, MISS])
    return np.minimum(optimum.draws.rise(beside), LOST_RUN).mean(axis=1)
