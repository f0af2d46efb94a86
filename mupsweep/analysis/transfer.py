"""Transfer: curves -> drift of the optimal LR, regret, and a verdict with its reasons."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.interpolate import PchipInterpolator

from mupsweep.analysis.curves import LossCurve
from mupsweep.analysis.estimate import UNKNOWN, ZERO, Estimate
from mupsweep.analysis.gaussian_process import Array
from mupsweep.analysis.optimum import TAILS, Optimum, optima
from mupsweep.analysis.quality import Quality, quality

TRANSFERS, DRIFTS, INCONCLUSIVE = "transfers", "drifts", "inconclusive"
HORIZON = "horizon"  # the axis of training tokens
AXIS_UNIT = {"joint": "size", HORIZON: "tokens"}  # what an axis counts, where that is not its name
TOLERANCE_OCTAVES = 0.5  # of total drift from the base to the largest size: half a step of an octave grid
TOLERANCE_NATS = 0.01  # of regret


def loss_of(optimum: Optimum) -> Estimate:
    """The loss at an optimum, in nats per token; without an interval where the data do not bound the optimum itself."""
    if optimum.posterior is not None and optimum.se is not None:
        return Estimate.of(optimum.posterior.losses)
    return Estimate(optimum.loss, None, None)


@dataclass(frozen=True)
class LadderResult:
    """What one ladder of sizes of one variant shows about transfer.

    Attributes:
        axis: "width" (at the base depth), "depth" (at the base width), "joint" (both change), or "horizon": tokens of
            training, at the base size.
        optima: by rising ratio.
        drift: octaves per doubling of the axis.
        total_drift: octaves from the base to the largest size.
        regret: nats per token lost at the largest size by using the base's optimum; its value is None where the base's
            optimum diverges there.
        regrets: nats per token lost by using the base's optimum, for every size.
        verdict: TRANSFERS, DRIFTS or INCONCLUSIVE.
        reasons: why, in sentences for people, the deciding one first.
    """

    model: str
    optimizer: str
    parametrization: str
    axis: str
    optima: tuple[Optimum, ...]
    drift: Estimate
    total_drift: Estimate
    regret: Estimate
    regrets: tuple[Estimate, ...]
    verdict: str
    reasons: tuple[str, ...]

    @property
    def label(self) -> tuple[str, str, str]:
        return self.model, self.optimizer, self.parametrization

    @property
    def base(self) -> Optimum:
        """The optimum that the others are compared with: the base's, or that of the smallest size without a base."""
        return next((o for o in self.optima if self.ratio(o.curve) == 1), self.optima[0])

    @property
    def shifts(self) -> tuple[Estimate, ...]:
        """Octaves by which every size's optimum lies above the base's; the last of them is the total drift."""
        base = self.base
        here = UNKNOWN if base.log2_lr is None else ZERO
        return tuple(here if o is base else _difference(base, o) for o in self.optima)

    @property
    def fitted(self) -> tuple[Optimum, ...]:
        """The optima that `drift` is the slope of: without those that are only bounded."""
        return tuple(o for o in self.optima if o.known)

    def positions(self, optima: Iterable[Optimum]) -> Array:
        """log2 of the position of some sizes on this ladder's axis."""
        return np.log2([self.ratio(o.curve) for o in optima])

    @cached_property
    def quality(self) -> Quality:
        """How well the LR transfers, in the metrics that others report."""
        return quality(self.positions(self.optima), self.optima)

    def ratio(self, curve: LossCurve) -> float:
        """The position of a size on this ladder's axis, target / base; of a horizon, to the shortest."""
        if self.axis == HORIZON:
            return (curve.horizon or 1) / (self.optima[0].curve.horizon or 1)
        return {"width": curve.width_ratio, "depth": curve.depth_ratio}.get(
            self.axis, curve.width_ratio * curve.depth_ratio
        )


def ladders(curves: Sequence[LossCurve]) -> Iterable[tuple[str, list[LossCurve]]]:
    """The ladders that the sizes of one variant form: width at the base depth, depth at the base width, and joint, each
    after the longest training; and the horizons of the base."""
    longest = max((c.horizon for c in curves if c.horizon is not None), default=None)
    whole = [c for c in curves if c.horizon == longest]
    width = [c for c in whole if c.depth_ratio == 1]
    depth = [c for c in whole if c.width_ratio == 1]
    joint = [c for c in whole if (c.width_ratio == 1) == (c.depth_ratio == 1)]
    horizon = [c for c in curves if c.horizon is not None and c.width_ratio == c.depth_ratio == 1]
    by_axis = {"width": width, "depth": depth, "joint": joint, HORIZON: horizon}
    of_several_sizes = [
        (axis, sorted(sizes, key=lambda c: (c.width_ratio * c.depth_ratio, c.horizon or 0)))
        for axis, sizes in by_axis.items()
        if len(sizes) > 1
    ]
    return of_several_sizes or [("width", list(curves)[:1])]


def judge_ladder(axis: str, ladder: Sequence[LossCurve]) -> LadderResult:
    """The verdict on one ladder, with the optima of its curves."""
    return verdict_of(axis, optima(ladder))


def verdict_of(axis: str, optima: Sequence[Optimum], of: str = "LR") -> LadderResult:
    """The verdict that follows from the optima of one ladder, of the LR or of another hyperparameter."""
    label = optima[0].curve.names
    unjudged = LadderResult(*label, axis, tuple(optima), UNKNOWN, UNKNOWN, UNKNOWN, (), INCONCLUSIVE, ())
    position = [math.log2(unjudged.ratio(o.curve)) for o in optima]
    base = unjudged.base
    drift = _slope(position, optima)
    total = _difference(base, optima[-1])
    regrets = tuple(_regret(base, o) for o in optima)
    verdict, reasons = _judge(axis, optima, base, total, regrets, of)
    if unjudged.ratio(base.curve) != 1:
        reasons.append(f"nothing is known at the base: {base.curve.place(axis)} stands for it")
    reasons += [f"{_size(axis, o)}: the base's {of} diverges there" for o in optima if diverges(base, o)]
    return LadderResult(*label, axis, tuple(optima), drift, total, regrets[-1], regrets, verdict, tuple(reasons))


def _slope(position: Sequence[float], optima: Sequence[Optimum]) -> Estimate:
    """Octaves per doubling: a weighted line through the optima of every draw."""
    fitted = [(x, o) for x, o in zip(position, optima, strict=True) if o.known]
    if len({x for x, _ in fitted}) < 2:
        return UNKNOWN
    x = np.array([x for x, _ in fitted])
    y = np.array([o.log2_lr for _, o in fitted], dtype=float)
    w = 1 / np.array([o.se for _, o in fitted], dtype=float) ** 2
    center = (w @ x) / w.sum()
    weights = w * (x - center) / float(w @ (x - center) ** 2)  # slope = weights @ optima
    slope = float(weights @ y)
    slopes = weights @ np.array([_minima(o) for _, o in fitted])
    low, high = np.quantile(slopes, TAILS)
    return Estimate(slope, float(low), float(high))


def _difference(base: Optimum, last: Optimum) -> Estimate:
    """Octaves from the base's optimum to the last size's; a bound where one of them is only bounded."""
    if base is last:
        return UNKNOWN
    if base.log2_lr is not None and last.log2_lr is not None and base.se is not None and last.se is not None:
        low, high = (float(q) for q in np.quantile(_minima(last) - _minima(base), TAILS))
        return Estimate(last.log2_lr - base.log2_lr, low, high)
    low = None if last.low is None or base.high is None else last.low - base.high
    high = None if last.high is None or base.low is None else last.high - base.low
    both = base.log2_lr is not None and last.log2_lr is not None
    return Estimate(last.log2_lr - base.log2_lr if both else None, low, high)  # type: ignore[operator]


def _regret(base: Optimum, at: Optimum) -> Estimate:
    """Nats lost at a size by using the base's optimum there: draw by draw, the loss there above the minimum."""
    if base is at:
        return UNKNOWN if base.log2_lr is None else ZERO
    if base.log2_lr is None or base.se is None or at.posterior is None or at.se is None:
        return UNKNOWN
    usable, starts = at.curve.usable, _minima(base)
    if not usable[0].log2_lr <= base.log2_lr <= usable[-1].log2_lr:
        return UNKNOWN
    # beyond the drawn window: interpolate the means; beyond those, runs diverge
    line = PchipInterpolator([p.log2_lr for p in usable], [p.mean for p in usable], extrapolate=False)
    outside = (starts < at.posterior.grid[0]) | (starts > at.posterior.grid[-1])
    there = np.where(outside, np.nan_to_num(line(starts), nan=math.inf), at.posterior.at(starts))
    lost = np.sort(np.maximum(there - at.posterior.losses, 0.0))
    ends = (float(lost[round(q * (len(lost) - 1))]) for q in (TAILS[0], 0.5, TAILS[1]))
    low, value, high = (end if math.isfinite(end) else None for end in ends)
    return Estimate(value, low, high)


def diverges(base: Optimum, at: Optimum) -> bool:
    """Whether runs of a size diverged at the base's optimum, or below it and everywhere above."""
    finished = [p.log2_lr for p in at.curve.usable]
    beyond = [p.log2_lr for p in at.curve.points if p.censored and p.log2_lr > max(finished, default=-math.inf)]
    return base is not at and base.log2_lr is not None and bool(beyond) and base.log2_lr >= beyond[0]


def _minima(optimum: Optimum) -> Array:
    """The drawn minima of an optimum that has them."""
    assert optimum.posterior is not None
    return optimum.posterior.minima


def _judge(
    axis: str,
    optima: Sequence[Optimum],
    base: Optimum,
    total: Estimate,
    regrets: Sequence[Estimate],
    of: str,
) -> tuple[str, list[str]]:
    """The verdict and its reasons.

    Transfers: the whole interval of the total drift lies within TOLERANCE_OCTAVES, or the whole interval of every
    size's regret below TOLERANCE_NATS (a valley so flat that the exact LR does not matter). Drifts: the interval
    excludes no drift and the drift exceeds the tolerance. Everything else is inconclusive.
    """
    names = f"from {base.curve.place(axis)} to {optima[-1].curve.place(axis)}"
    reasons = [f"{_size(axis, o)}: {o.reason}" for o in optima if o.reason is not None]
    if len(optima) < 2 or base is optima[-1]:
        return INCONCLUSIVE, [
            f"no size larger than the base on the {axis} axis: add ratios above 1",
            *reasons,
        ]
    tolerance = TOLERANCE_OCTAVES
    width = f"the optimum moves {_exactly(total, tolerance)} octaves {names}"
    if total.low is not None and total.high is not None and -tolerance <= total.low and total.high <= tolerance:
        return TRANSFERS, [f"{width}: within +-{tolerance:g}", *reasons]
    worst = max((r.high for r in regrets if r.high is not None), default=math.inf)
    if all(r.high is not None for r in regrets) and worst <= TOLERANCE_NATS:
        return TRANSFERS, [
            f"using the base's {of} costs at most {worst:.4f} nats at every size, within {TOLERANCE_NATS:g}",
            width,
            *reasons,
        ]
    down = (
        total.high is not None
        and total.high < 0
        and (total.value if total.value is not None else total.high) < -tolerance
    )
    up = total.low is not None and total.low > 0 and (total.value if total.value is not None else total.low) > tolerance
    if down or up:
        return DRIFTS, [f"{width}: more than {tolerance:g}", *reasons]
    if total.value is None and total.low is None and total.high is None:
        return INCONCLUSIVE, reasons or ["the optimum of the base or of the largest size is unknown"]
    return INCONCLUSIVE, [
        f"{width}: the interval is neither within +-{tolerance:g} nor clearly outside; "
        f"add seeds, or {of}s around the optimum",
        *reasons,
    ]


def _exactly(total: Estimate, tolerance: float) -> str:
    """The estimate with enough decimals for every number to stay on its side of the tolerance.

    -0.503 is not within +-0.5. Where the sign decides between a drift and none, numbers stay on their side of zero too.
    """
    ends = [end for end in (total.low, total.value, total.high) if end is not None]
    wide = any(abs(x) > tolerance for x in ends)

    def side(x: float) -> tuple[bool, bool, bool]:
        return abs(x) <= tolerance, wide and x < 0, wide and x > 0

    digits = next((d for d in range(2, 7) if all(side(round(x, d)) == side(x) for x in ends)), 2)
    return f"{total:+.{digits}f}"


def _size(axis: str, optimum: Optimum) -> str:
    size = f"width {optimum.curve.width}, depth {optimum.curve.depth}"
    return f"{size}, {optimum.curve.place(axis)}" if axis == HORIZON else size
