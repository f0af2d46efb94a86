"""Recipe: what to use at a target that was never trained, from a verdict and the rules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mupsweep.analysis.config import AnalysisConfig
from mupsweep.analysis.estimate import UNKNOWN, Estimate
from mupsweep.analysis.optimum import Optimum
from mupsweep.analysis.transfer import AXIS_UNIT, HORIZON, LadderResult, axis_to, judge_ladders, size_ratio
from mupsweep.errors import RecordError
from mupsweep.sweep.run_spec import ResolvedVariant
from mupsweep.sweep.settings import settings


@dataclass(frozen=True)
class Recommendation:
    """The base LR to use at a target.

    Attributes:
        log2_lr: of the least expected loss there.
        optimum: where the target's optimum is; without an interval where no measured axis leads to the target.
        expected_regret: nats per token above the lowest loss there that it is expected to lose; None without interval.
        verdict: of the ladder that leads there.
        basis: what it rests on.
    """

    log2_lr: float
    optimum: Estimate
    expected_regret: float | None
    verdict: str
    basis: str

    def moved(self, octaves: Estimate) -> Recommendation:
        """Carried by so many octaves, whose error is independent of the optimum's."""
        own = self.optimum
        assert own.value is not None
        assert octaves.value is not None
        middle = own.value + octaves.value
        low = high = None
        if own.low is not None and octaves.low is not None:
            low = middle - math.hypot(own.value - own.low, octaves.value - octaves.low)
        if own.high is not None and octaves.high is not None:
            high = middle + math.hypot(own.high - own.value, octaves.high - octaves.value)
        return replace(self, log2_lr=self.log2_lr + octaves.value, optimum=Estimate(middle, low, high))


def recommend(ladder: LadderResult, axis: str | None, doublings: float) -> Recommendation:
    """The base LR to use at a target `doublings` beyond the base.

    Whatever the verdict, the walk of the optima goes on to the target, so the interval has the measured drift in it and
    grows with distance.

    Args:
        axis: on which the target lies; None for the base itself.

    Raises:
        RecordError: no size has a loss curve yet.
    """
    measured = axis in (None, ladder.axis)
    expected = ladder.forecast(doublings if measured else 0.0)
    if expected is None:
        why = (f"{_place(o)}: {o.reason}" for o in ladder.optima if o.reason)
        raise RecordError(
            f"{'/'.join(ladder.label)}: no size has a loss curve yet, so there is no LR to recommend; "
            f"{next(why, 'train more LRs')}"
        )
    if not measured:
        basis = f"untested: the target lies on the {axis} axis, but only {ladder.axis} was measured; the base's optimum"
        optimum = Estimate(expected.optimum.value, None, None)
        return Recommendation(expected.log2_lr, optimum, None, ladder.verdict, basis)
    largest = max(size.position for size, _ in ladder.posterior.fitted)
    beyond = 2 ** (doublings - largest)
    unit = AXIS_UNIT.get(ladder.axis, ladder.axis)
    where = f"; the target's {unit} is {beyond:.3g} times the largest measured" if beyond > 1 else ""
    drift = "an unknown drift" if ladder.drift == UNKNOWN else f"the drift of {ladder.drift} octaves per doubling"
    basis = f"{ladder.verdict}: the LR of the least expected loss, with {drift}"
    lost = [_place(o) for o in ladder.optima if o.curve.points and not any(point.losses for point in o.curve.points)]
    if lost:
        where += f"; every LR diverged at {' and '.join(lost)}, which it does not account for"
    return Recommendation(expected.log2_lr, expected.optimum, expected.expected_regret, ladder.verdict, basis + where)


def leading(groups: Sequence[LadderResult], axis: str | None) -> LadderResult:
    """The ladder of a variant along an axis, or else its first; horizons alone are one size, the base."""
    sizes = [group for group in groups if group.axis != HORIZON]
    if not sizes:
        longest, config = groups[0].optima[-1].curve, AnalysisConfig(groups[0].bounds, groups[0].posterior.prior)
        return judge_ladders([("width", [longest])], config)[0]
    return next((group for group in sizes if group.axis == axis), sizes[0])


def horizons_of(groups: Sequence[LadderResult]) -> LadderResult | None:
    """The ladder over training tokens of a variant, if several horizons were swept."""
    return next((group for group in groups if group.axis == HORIZON), None)


def recommend_at(groups: Sequence[LadderResult], width_ratio: float, depth_ratio: float) -> Recommendation:
    """The base LR to use at a size, from the ladders of a variant.

    Raises:
        RecordError: no size has a loss curve yet.
    """
    axis = axis_to(width_ratio, depth_ratio)
    ladder = leading(groups, axis)
    return recommend(ladder, axis, math.log2(size_ratio(ladder.axis, width_ratio, depth_ratio)))


def target_recipe(
    groups: Sequence[LadderResult], resolved: ResolvedVariant, target: Mapping[str, int]
) -> dict[str, Any]:
    """How to train a target that was never trained: its LR with an interval, and every tensor's numbers.

    Args:
        groups: the ladders of the variant.
        target: width, depth and training tokens; what it lacks is the base's.

    Raises:
        ConfigError: a target that is no multiple of the base shape.
        RecordError: no size has a loss curve yet.
    """
    width, depth = target.get("width", resolved.model.width), target.get("depth", resolved.model.depth)
    size = resolved.size(width / resolved.model.width, depth / resolved.model.depth)
    choice, resolved = recommend_at(groups, size.width_ratio, size.depth_ratio), resolved.at(size)
    final = resolved if "tokens" not in target else replace(resolved, variant=_trained_on(resolved, target["tokens"]))
    if resolved.training.base_tokens is not None:  # the parts of the recipe carry the LR themselves
        measured, wanted = resolved.tokens, final.tokens
        training = resolved.training
        by_rule = f"training.batch_rule={training.batch_rule}"
        rule = by_rule if training.batch_rule_has_tokens else _power(training.horizon_exponent)
        note = f"carried from {measured:,} to {wanted:,} tokens by {rule}"
        factor = final.optimizers[0].lr_ratio / resolved.optimizers[0].lr_ratio
        horizon = {"tokens": wanted, "measured_tokens": measured, "lr_factor": factor, "note": note}
    else:
        choice, horizon = _carried(choice, resolved.tokens, final.tokens, horizons_of(groups))
        if (ratio := final.training.tokens_per_parameter) is not None:
            horizon["note"] = (
                f"for {final.tokens:,} training tokens, {ratio:g} per parameter, as all sizes of the sweep"
            )
    return {**_record(groups[0], choice, horizon), **settings(final, size, 2.0**choice.log2_lr)}


def table_recipe(
    groups: Sequence[LadderResult], target: Mapping[str, int], resolved: ResolvedVariant | None = None
) -> dict[str, Any]:
    """The LR of a target from runs that were trained elsewhere, and every tensor's numbers if the base is known.

    Args:
        groups: the ladders of the variant.
        target: width, depth and training tokens; what it lacks is the base's.
        resolved: the base, as the table's smallest size was trained.
    """
    base = base_shape(groups)
    width, depth = target.get("width", base["width"]), target.get("depth", base["depth"])
    choice = recommend_at(groups, width / base["width"], depth / base["depth"])
    measured = max((o.curve.horizon for group in groups for o in group.optima if o.curve.horizon), default=None)
    several = "runs at several horizons carry it"
    choice, horizon = _carried(choice, measured, target.get("tokens", measured), horizons_of(groups), several)
    found = _record(groups[0], choice, horizon)
    if resolved is None:
        shapes = {"target": {"width": width, "depth": depth}, "base": base}
        return {**found, **shapes, "base_lr": 2.0**choice.log2_lr}
    final = resolved if "tokens" not in target else replace(resolved, variant=_trained_on(resolved, target["tokens"]))
    return {**found, **settings(final, final.size(width / base["width"], depth / base["depth"]), 2.0**choice.log2_lr)}


def base_shape(groups: Sequence[LadderResult]) -> dict[str, int]:
    """Width and depth of the size to which the ratios of a variant's ladders refer."""
    curve = groups[0].optima[0].curve
    width, depth = curve.width / curve.width_ratio, curve.depth / curve.depth_ratio
    return {"width": max(1, round(width)), "depth": max(1, round(depth))}  # a table may have a ratio without the size


def _record(ladder: LadderResult, choice: Recommendation, horizon: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model": ladder.model,
        "optimizer": ladder.optimizer,
        "parametrization": ladder.parametrization,
        "verdict": choice.verdict,
        "basis": choice.basis,
        "log2_lr": choice.log2_lr,
        "log2_lr_optimum": choice.optimum.value,
        "log2_lr_low": choice.optimum.low,
        "log2_lr_high": choice.optimum.high,
        "expected_regret": choice.expected_regret,
        "horizon": dict(horizon),
    }


def _carried(
    choice: Recommendation,
    measured: int | None,
    wanted: int | None,
    horizons: LadderResult | None,
    advice: str = "set training.horizon_exponent and training.base_tokens, or sweep at several horizons",
) -> tuple[Recommendation, dict[str, Any]]:
    """The LR at the target's horizon, and a note on how it was carried there; horizons are None where unknown."""
    factor = 1.0
    if wanted is None:
        note = "for as many training tokens as the table's runs; longer training wants a lower one"
    elif wanted == measured:
        note = f"for {measured:,} training tokens, as in the sweep; longer training wants a lower one: --to tokens=N"
    elif horizons is not None and (moved := _moved_to(horizons, wanted)) is not None:
        assert moved.value is not None
        factor = 2.0**moved.value
        choice = choice.moved(moved)
        note = (
            f"carried from {measured:,} to {wanted:,} tokens as the horizons measured it, {moved:.2f} octaves, "
            f"LR ~ tokens^{horizons.drift:.3g}"
        )
    else:
        choice = replace(choice, optimum=Estimate(choice.optimum.value, None, None), expected_regret=None)
        at = "an unknown number of tokens" if measured is None else f"{measured:,}"
        note = f"NOT carried to {wanted:,} tokens: measured at {at}, and the best LR falls with the horizon; {advice}"
    return choice, {"tokens": wanted, "measured_tokens": measured, "lr_factor": factor, "note": note}


def _moved_to(horizons: LadderResult, tokens: int) -> Estimate | None:
    """Octaves from the best LR after the longest training to that after `tokens`; None without curves."""
    longest = horizons.optima[-1]
    shortest = horizons.optima[0].curve.horizon
    assert shortest is not None
    expected = horizons.forecast(math.log2(tokens / shortest))
    if expected is None or longest.draws is None:
        return None
    return Estimate.of(expected.draws - longest.draws.optimum)


def _power(exponent: float) -> str:
    return f"LR ~ tokens^{exponent:.3g}"


def _trained_on(resolved: ResolvedVariant, tokens: int) -> Any:
    """The variant with another token budget; a warm-up given as a fraction, and decay rules per run, follow it."""
    return replace(resolved.variant, training=resolved.training.on_tokens(tokens))


def _place(optimum: Optimum) -> str:
    return f"width {optimum.curve.width}, depth {optimum.curve.depth}"
