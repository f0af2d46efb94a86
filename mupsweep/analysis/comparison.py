"""Quality: how well the LR transfers in numbers that others report, and what one variant is worth against another.

Every number is a quantile of the same draws that a verdict rests on. None of them changes a verdict.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mupsweep.analysis.estimate import UNKNOWN, Estimate
from mupsweep.analysis.gaussian_process import Array
from mupsweep.analysis.optimum import TAILS, Optimum
from mupsweep.analysis.transfer import Analysis, LadderResult

POWERS = (0.5, 2.0)  # finite-size corrections fall as size^-p; p is drawn between these, since few sizes cannot tell it
MISS = 1.0  # octaves: the error whose price kappa follows from size to size
REACH = 1.0  # octaves of compute beyond the measured sizes that a speed-up is still read from
REFERENCE = "adamw"  # the optimizer that others are compared with, where it was trained
STANDARD = "sp"  # the parametrization that others are compared with, where it was trained


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


def quality(group: LadderResult) -> Quality:
    """The metrics of one ladder; unknown where its optima are."""
    known = _known(group)
    if len(known) < 2:
        return Quality(UNKNOWN, UNKNOWN, UNKNOWN, None)
    x, minima = _positions(group, known), np.array([_drawn(o)[0] for o in known])
    fit = UNKNOWN
    if len(known) > 2:
        rest = minima - _line(x, minima, x)
        fit = Estimate.of(np.sqrt((rest**2).mean(axis=0)))
    prices = np.log2(np.maximum([_price(o) for o in known], 1e-9))
    center = x - x.mean()
    held_out = _held_out(x, known) if known[-1] is group.optima[-1] else None
    return Quality(fit, Estimate.of(center @ prices / (center @ center)), Estimate.of(_asymptote(group)), held_out)


def comparisons(analysis: Analysis) -> list[Comparison]:
    """Every optimizer against AdamW and every parametrization against SP, or against the first there is."""
    return [compare(a, b, analysis.flops) for a, b in pairs(analysis.groups) if shared(a, b)]


def pairs(groups: Sequence[LadderResult]) -> Iterable[tuple[LadderResult, LadderResult]]:
    """Ladders that differ in their optimizer or their parametrization alone: (one, the reference)."""
    for position, reference in ((1, REFERENCE), (2, STANDARD)):
        alike: dict[tuple[str, ...], list[LadderResult]] = defaultdict(list)
        for group in groups:
            same = [name for i, name in enumerate(group.label) if i != position]
            alike[(group.axis, *same)].append(group)
        for members in alike.values():
            over = next((g for g in members if g.label[position] == reference), members[0])
            yield from ((group, over) for group in members if group is not over)


def shared(a: LadderResult, b: LadderResult) -> list[tuple[Optimum, Optimum]]:
    """The optima of the sizes that two groups have in common."""
    mine = {o.curve.size: o for o in _known(b)}
    return [(o, mine[o.curve.size]) for o in _known(a) if o.curve.size in mine]


def compare(a: LadderResult, b: LadderResult, flops: Mapping[tuple[Any, ...], float]) -> Comparison:
    """What `a` is worth against `b`, which share a size of known optima; FLOPs by variant, width, depth and horizon."""
    ours, theirs = shared(a, b)[-1]
    random = np.random.default_rng(1)  # the draws of two ladders have nothing to do with one another
    shuffled = random.permutation(len(_drawn(ours)[0]))
    size = ours.curve.width, ours.curve.depth
    asymptotes = _asymptote(a), _asymptote(b)
    penalty = asymptotes[0] - asymptotes[1][shuffled] if all(len(a) for a in asymptotes) else np.empty(0)
    return Comparison(
        a.label,
        b.label,
        a.axis,
        *size,
        Estimate.of(_drawn(theirs)[1][shuffled] - _drawn(ours)[1]),
        _speed_up(ours, _known(b), flops, shuffled),
        Estimate.of(penalty),
        ours.curve.horizon,
    )


def _speed_up(
    ours: Optimum, theirs: Sequence[Optimum], flops: Mapping[tuple[Any, ...], float], shuffled: Any
) -> Estimate:
    """Compute at which a straight line through the other's losses over log compute reaches our loss / our compute.

    A line reaches no further than the sizes it goes through: beyond, only a bound is told.
    """
    curves = [o.curve for o in (ours, *theirs)]
    compute = [flops.get((*c.label, *c.size)) for c in curves]
    if len(set(compute[1:])) < 2 or None in compute:
        return UNKNOWN
    own, *x = (math.log2(c) for c in compute if c is not None)
    losses = np.array([_drawn(o)[1][shuffled] for o in theirs])
    place = np.array(x)
    center = place - place.mean()
    slope = center @ losses / (center @ center)
    target = _drawn(ours)[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        reached = place.mean() + (target - losses.mean(axis=0)) / slope
    reached = np.where(slope < 0, reached, np.where(target < losses.mean(axis=0), math.inf, -math.inf))
    low, value, high = (float(q) for q in np.quantile(reached, (TAILS[0], 0.5, TAILS[1]), method="nearest"))
    lowest, highest = min(x) - REACH, max(x) + REACH

    def factor(at: float) -> float | None:
        return 2.0 ** (at - own) if lowest <= at <= highest else None

    if factor(value) is None:  # the loss is outside of what the other's sizes reach
        above, below = low > highest, high < lowest
        return Estimate(None, 2.0 ** (highest - own) if above else None, 2.0 ** (lowest - own) if below else None)
    return Estimate(factor(value), factor(low), factor(high))


def _asymptote(group: LadderResult) -> Array:
    """(draws,) the loss that those at the optima tend to, the correction's power drawn too; empty below 3 sizes."""
    known = _known(group)
    if len(known) < 3:
        return np.empty(0)
    ratio = 2.0 ** _positions(group, known)
    losses = np.array([_drawn(o)[1] for o in known])  # (sizes, draws)
    powers = np.random.default_rng(0).uniform(*POWERS, losses.shape[1])
    shape = ratio[:, None] ** -powers
    shape_mean, mean = shape.mean(axis=0), losses.mean(axis=0)
    slope = ((shape - shape_mean) * (losses - mean)).sum(axis=0) / ((shape - shape_mean) ** 2).sum(axis=0)
    return mean - slope * shape_mean


def _held_out(x: Array, known: Sequence[Optimum]) -> HeldOut | None:
    if len(known) < 3:
        return None
    *smaller, last = known
    minima = np.array([_drawn(o)[0] for o in smaller])
    predicted = _line(x[:-1], minima, x[-1:])[0]
    lowest, loss = _drawn(last)
    assert last.posterior is not None
    lost = np.maximum(last.posterior.at(predicted) - loss, 0.0)
    inside = bool(
        np.mean((predicted >= last.posterior.grid[0]) & (predicted <= last.posterior.grid[-1])) > 2 * TAILS[1] - 1
    )
    return HeldOut(Estimate.of(predicted), Estimate.of(predicted - lowest), Estimate.of(lost) if inside else UNKNOWN)


def _line(x: Array, values: Array, at: Array) -> Array:
    """(places, draws) a straight line through every draw of `values` (sizes, draws), at some places."""
    center = x - x.mean()
    slope = center @ values / (center @ center)
    return values.mean(axis=0) + (at - x.mean())[:, None] * slope


def _price(optimum: Optimum) -> Array:
    """(draws,) nats lost by missing the minimum by MISS octaves, the mean of both sides."""
    assert optimum.posterior is not None
    lowest, loss = _drawn(optimum)
    return (optimum.posterior.at(lowest - MISS) + optimum.posterior.at(lowest + MISS)) / 2 - loss


def _known(group: LadderResult) -> list[Optimum]:
    return [o for o in group.optima if o.known]


def _positions(group: LadderResult, known: Sequence[Optimum]) -> Array:
    return np.log2([group.ratio(o.curve) for o in known])


def _drawn(optimum: Optimum) -> tuple[Array, Array]:
    """(draws,) log2 LRs of the minima, and the losses there."""
    assert optimum.posterior is not None
    return optimum.posterior.minima, optimum.posterior.losses
