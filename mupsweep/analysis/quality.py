"""Quality: how well the LR transfers along one ladder, in the numbers that others report.

Every number is a quantile of the same draws that a verdict rests on. None of them changes a verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mupsweep.analysis.estimate import UNKNOWN, Estimate
from mupsweep.analysis.gaussian_process import Array
from mupsweep.analysis.optimum import TAILS, Optimum

POWERS = (0.5, 2.0)  # finite-size corrections fall as size^-p; p is drawn between these, since few sizes cannot tell it
MISS = 1.0  # octaves: the error whose price kappa follows from size to size


@dataclass(frozen=True)
class HeldOut:
    """The largest size, predicted from the smaller ones as if it had not been trained.

    Attributes:
        predicted: log2 of the best LR.
        error: octaves by which the prediction lies above the optimum that was then measured.
        regret: nats per token lost there by using the prediction.
    """

    predicted: Estimate
    error: Estimate
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


def quality(positions: Array, optima: Sequence[Optimum]) -> Quality:
    """The metrics of one ladder; unknown where too few of its optima are known.

    Args:
        positions: log2 of every size's ratio to the base, rising.
        optima: of every size.
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
    held_out = _held_out(x, known) if known[-1] is optima[-1] else None
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
    """(draws,) log2 LRs of the minima of an optimum that has draws, and (draws,) the losses there."""
    assert optimum.posterior is not None
    return optimum.posterior.minima, optimum.posterior.losses


def _held_out(x: Array, known: Sequence[Optimum]) -> HeldOut | None:
    """The largest size beside what a line through the smaller ones predicts; None with fewer than 3 sizes."""
    if len(known) < 3:
        return None
    *smaller, last = known
    minima = np.array([drawn(optimum)[0] for optimum in smaller])
    predicted = _line(x[:-1], minima, x[-1:])[0]
    lowest, loss = drawn(last)
    assert last.posterior is not None
    lost = np.maximum(last.posterior.at(predicted) - loss, 0.0)
    # beyond the window that was fitted, nothing is known of the loss
    inside = (predicted >= last.posterior.grid[0]) & (predicted <= last.posterior.grid[-1])
    regret = Estimate.of(lost) if np.mean(inside) > 2 * TAILS[1] - 1 else UNKNOWN
    return HeldOut(Estimate.of(predicted), Estimate.of(predicted - lowest), regret)


def _line(x: Array, values: Array, at: Array) -> Array:
    """(places, draws) a straight line through every draw of `values` (sizes, draws), at some places."""
    center = x - x.mean()
    slope = center @ values / (center @ center)
    return values.mean(axis=0) + (at - x.mean())[:, None] * slope


def _price(optimum: Optimum) -> Array:
    """(draws,) nats lost by missing the minimum by MISS octaves, the mean of both sides."""
    assert optimum.posterior is not None
    lowest, loss = drawn(optimum)
    return (optimum.posterior.at(lowest - MISS) + optimum.posterior.at(lowest + MISS)) / 2 - loss
