"""Transfer: curves -> optima, drift of the optimal LR, regret, and a verdict with its reasons, for every ladder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mupsweep.analysis import verdict
from mupsweep.analysis.config import AnalysisConfig, CurvePrior, VerdictBounds
from mupsweep.analysis.curves import LossCurve
from mupsweep.analysis.estimate import UNKNOWN, ZERO, Array, Estimate
from mupsweep.analysis.forecast import Forecast, forecast, forecast_from_smaller
from mupsweep.analysis.loss_curve import LadderPosterior, fit_ladders
from mupsweep.analysis.optimum import Optimum, optima_of, runs_of
from mupsweep.analysis.quality import Quality, quality
from mupsweep.formatting import counted

HORIZON = "horizon"  # the axis of training tokens
AXIS_UNIT = {"joint": "size", HORIZON: "tokens"}  # what an axis counts, where that is not its name


@dataclass(frozen=True)
class MoreRuns:
    """The LRs of one size that would decide a verdict."""

    curve: LossCurve
    log2_lrs: tuple[float, ...]


CONFIRMED, REFUTED, OPEN = "confirmed", "refuted", "open"


@dataclass(frozen=True)
class Validation:
    """A forecast beside what came out at a size that was trained to test it.

    Attributes:
        optimum: of the target, from its own runs alone.
        forecast: from the smaller sizes.
        regret: nats per token lost there by the LR that was handed over; infinite numbers are None.
        outcome: CONFIRMED or REFUTED, as the interval of their difference has 0 in it; OPEN while it has no end there.
    """

    optimum: Optimum
    forecast: Forecast
    regret: Estimate
    outcome: str


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
        deciding_runs: the cheapest runs that would probably decide an inconclusive verdict.
        posterior: of the ladder's curves and of the walk of its optima.
        bounds: that the verdict rests on.
        validations: of forecasts on this axis; they change nothing else.
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
    deciding_runs: tuple[MoreRuns, ...]
    posterior: LadderPosterior
    bounds: VerdictBounds
    validations: tuple[Validation, ...] = ()

    @property
    def label(self) -> tuple[str, str, str]:
        return self.model, self.optimizer, self.parametrization

    @property
    def base(self) -> Optimum:
        """The optimum that the others are compared with: the base's, or that of the smallest size without a base."""
        at_base = next((o for o in self.optima if self.ratio(o.curve) == 1), self.optima[0])
        if at_base.draws is not None:
            return at_base
        return next((o for o in self.optima if o.draws is not None), at_base)

    @property
    def shifts(self) -> tuple[Estimate, ...]:
        """Octaves by which every size's optimum lies above the base's; the last of them is the total drift."""
        base = self.base
        here = UNKNOWN if base.log2_lr is None else ZERO
        return tuple(here if o is base else _shift(base, o) for o in self.optima)

    @property
    def fitted(self) -> tuple[Optimum, ...]:
        """The optima that have both ends."""
        return tuple(o for o in self.optima if o.known)

    def positions(self, optima: Iterable[Optimum]) -> Array:
        """log2 of the position of some sizes on this ladder's axis."""
        return np.log2([self.ratio(o.curve) for o in optima])

    @property
    def tolerance(self) -> float:
        """Octaves that the optimum may move in all."""
        positions = self.positions((self.base, self.optima[-1]))
        return self.bounds.total(float(positions[1] - positions[0]))

    @cached_property
    def quality(self) -> Quality:
        """How well the LR transfers, in the metrics that others report."""
        return quality(self.positions(self.optima), self.optima, self.posterior)

    def forecast(self, doublings: float) -> Forecast | None:
        """The optimum at a size so many doublings above the base, and the LR to use there; None without any curve."""
        return forecast(self.posterior, doublings)

    def ratio(self, curve: LossCurve) -> float:
        """The position of a size on this ladder's axis, target / base; of a horizon, to the shortest."""
        return ratio_on(self.axis, curve, self.optima[0].curve)

    def validate(self, target: LossCurve) -> Validation | None:
        """The forecast of the smaller sizes beside the runs of a target; None where they forecast nothing."""
        expected = forecast_from_smaller(self.posterior, math.log2(self.ratio(target)))
        if expected is None:
            return None
        [optimum] = ladder_optima(self.axis, [target], self.posterior.prior)
        if optimum.draws is None:
            return Validation(optimum, expected, UNKNOWN, OPEN)
        error = expected.error(optimum.draws)
        assert error.low is not None
        assert error.high is not None
        is_above = error.high < 0 and optimum.low is not None
        is_below = error.low > 0 and optimum.high is not None
        outcome = REFUTED if is_above or is_below else CONFIRMED if optimum.known else OPEN
        return Validation(optimum, expected, expected.regret(optimum.draws), outcome)


def ratio_on(axis: str, curve: LossCurve, smallest: LossCurve) -> float:
    """The position of a curve on an axis, target / base; of a horizon, to that of the ladder's first curve."""
    if axis == HORIZON:
        return (curve.horizon or 1) / (smallest.horizon or 1)
    return size_ratio(axis, curve.width_ratio, curve.depth_ratio)


def size_ratio(axis: str, width_ratio: float, depth_ratio: float) -> float:
    """The position of a size on an axis of sizes, target / base."""
    return {"width": width_ratio, "depth": depth_ratio}.get(axis, width_ratio * depth_ratio)


def axis_to(width_ratio: float, depth_ratio: float) -> str | None:
    """The axis that leads from the base to a size; None for the base itself."""
    wider, deeper = width_ratio != 1, depth_ratio != 1
    return "joint" if wider and deeper else "width" if wider else "depth" if deeper else None


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


def fit_curves(
    ladders: Sequence[tuple[str, Sequence[LossCurve]]], prior: CurvePrior | None = None
) -> list[LadderPosterior]:
    """The posterior of every ladder, given as its axis and its curves by rising size.

    They are fitted together, since a size that several of them share has one optimum.
    """
    sizes = [
        [runs_of(curve, math.log2(ratio_on(axis, curve, curves[0]))) for curve in curves] for axis, curves in ladders
    ]
    return fit_ladders(sizes, prior)


def ladder_optima(axis: str, curves: Sequence[LossCurve], prior: CurvePrior | None = None) -> tuple[Optimum, ...]:
    """The optimum of every size of one ladder, its curves given by rising size."""
    return optima_of(curves, fit_curves([(axis, curves)], prior)[0])


def judge_ladders(
    ladders: Sequence[tuple[str, Sequence[LossCurve]]], config: AnalysisConfig | None = None
) -> list[LadderResult]:
    """The verdict on every ladder, given as its axis and its curves by rising size."""
    config = config or AnalysisConfig()
    pairs = zip(ladders, fit_curves(ladders, config.curve), strict=True)
    return [judge_ladder(axis, curves, posterior, config.verdict) for (axis, curves), posterior in pairs]


def judge_ladder(
    axis: str, curves: Sequence[LossCurve], posterior: LadderPosterior, bounds: VerdictBounds, of: str = "LR"
) -> LadderResult:
    """The verdict that follows from the curves of one ladder, over the LR or over another hyperparameter."""
    optima = optima_of(curves, posterior)

    def cost(runs: verdict.Runs) -> float:
        return training_work(curves[runs.size]) * len(runs.log2_lrs)

    found = verdict.judge(posterior, bounds, cost, of)
    regrets = tuple(found.regrets.get(k, UNKNOWN).finite for k in range(len(curves)))
    runs = tuple(MoreRuns(curves[one.size], one.log2_lrs) for one in found.deciding_runs)
    ladder = LadderResult(
        *curves[0].names,
        axis,
        optima,
        found.drift,
        found.total_drift,
        found.regret.finite,
        regrets,
        found.name,
        (),
        runs,
        posterior,
        bounds,
    )
    base = ladder.base
    own = UNKNOWN if base.log2_lr is None else ZERO
    regrets = tuple(own if o is base else regret for o, regret in zip(optima, regrets, strict=True))
    return replace(ladder, regrets=regrets, reasons=tuple(_reasons(ladder, found, of)))


def training_work(curve: LossCurve) -> float:
    """The cost of one run beside that of others: parameters of the blocks times tokens, up to a factor."""
    return curve.width**2 * curve.depth * (curve.horizon or 1)


def _reasons(ladder: LadderResult, found: verdict.Verdict, of: str) -> Iterable[str]:
    """Why the verdict is what it is: how far the optimum moves and what that costs, and what is not known of it."""
    axis, base, optima = ladder.axis, ladder.base, ladder.optima
    largest = base if found.largest is None else optima[found.largest]
    if largest is base:
        yield f"no size larger than the base has {of}s enough for a curve: {_larger(ladder)}"
    else:
        separator = ";" if found.name == verdict.INCONCLUSIVE else ":"
        yield f"{found.reason}{separator} {_numbers(ladder, largest, of)}"
    if ladder.deciding_runs:
        runs = " and ".join(
            f"{more.curve.place(axis)} at log2 {of} {', '.join(f'{x:.3g}' for x in more.log2_lrs)}"
            for more in ladder.deciding_runs
        )
        yield f"the cheapest runs that would probably decide: {runs}"
    if ladder.ratio(base.curve) != 1:
        yield f"nothing is known at the base: {base.curve.place(axis)} stands for it"
    judged = {id(base): "the base", id(largest): "the largest size"}
    for optimum in optima:
        if optimum.reason is not None and found.reason != f"{judged.get(id(optimum))}: {optimum.reason}":
            yield f"{_size(axis, optimum)}: {optimum.reason}"
        if diverges(base, optimum):
            yield f"{_size(axis, optimum)}: the base's {of} diverges there"


def _larger(ladder: LadderResult) -> str:
    """What to do where there is no larger size to compare the base with."""
    untrained = [o for o in ladder.optima if o is not ladder.base]
    if not untrained:
        if ladder.ratio(ladder.base.curve) != 1:
            return "the other sizes, the base among them, are not trained yet"
        return "train ratios above 1, or add them"
    places = ", ".join(f"{o.curve.place(ladder.axis)} ({counted(o.curve.n_runs, 'run')})" for o in untrained)
    return f"go on with {places}"


def _numbers(ladder: LadderResult, largest: Optimum, of: str) -> str:
    """How far the optimum moves, and what the base's costs at the largest size."""
    at = largest.curve.place(ladder.axis)
    cost = f"costs {ladder.regret:.4f} nats"
    if ladder.regret == UNKNOWN:
        below = largest.draws is None and not diverges(ladder.base, largest)
        cost = "may cost anything" if below else "diverges"
    if ladder.total_drift == UNKNOWN:
        return f"the base's {of} {cost} at {at}"
    return (
        f"drift {ladder.drift:+.2f} octaves per doubling, {ladder.total_drift:+.2f} from "
        f"{ladder.base.curve.place(ladder.axis)} to {at}, where the base's {of} {cost}"
    )


def _shift(base: Optimum, other: Optimum) -> Estimate:
    if base.draws is None or other.draws is None:
        return UNKNOWN
    return verdict.difference(base.draws, base.estimate, other.draws, other.estimate)


def diverges(base: Optimum, at: Optimum) -> bool:
    """Whether runs of a size diverged at the base's optimum, or below it and everywhere above."""
    finished = [p.log2_lr for p in at.curve.usable]
    beyond = [p.log2_lr for p in at.curve.points if p.censored and p.log2_lr > max(finished, default=-math.inf)]
    return base is not at and base.log2_lr is not None and bool(beyond) and base.log2_lr >= beyond[0]


def _size(axis: str, optimum: Optimum) -> str:
    size = f"width {optimum.curve.width}, depth {optimum.curve.depth}"
    return f"{size}, {optimum.curve.place(axis)}" if axis == HORIZON else size
