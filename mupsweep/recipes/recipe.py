"""Recipe: what to use at a target that was never trained, from a verdict and the rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from mupsweep.analysis.estimate import Estimate
from mupsweep.analysis.optimum import Optimum
from mupsweep.analysis.transfer import AXIS_UNIT, DRIFTS, HORIZON, INCONCLUSIVE, TRANSFERS, LadderResult
from mupsweep.errors import RecordError
from mupsweep.models.shape import Size
from mupsweep.sweep import tensor_rules
from mupsweep.sweep.run_spec import ResolvedVariant

SHAPE = ("width", "depth", "heads", "kv_heads", "head_dim", "ffn_width", "vocab_size", "context")
SCHEDULE = ("batch_size", "schedule", "min_lr_frac", "decay_fraction", "precision")


def recommend(ladder: LadderResult, doublings: float) -> tuple[Estimate, str]:
    """log2 of the base LR to use at a target `doublings` beyond the base on the group's axis, and what it rests on."""
    fitted = ladder.fitted
    if not fitted:
        why = (f"{_place(o)}: {o.reason}" for o in ladder.optima if o.reason)
        raise RecordError(
            f"{'/'.join(ladder.label)}: no size has an optimum with an interval yet, so there is no LR to recommend; "
            f"{next(why, 'train more LRs')}"
        )
    if ladder.verdict == TRANSFERS:
        w = np.array([1 / (o.se or 1.0) ** 2 for o in fitted])
        y = np.array([o.log2_lr for o in fitted])
        value = float(w @ y / w.sum())
        # the sizes share most of a fit's bias, so their intervals do not average out; what drift there is counts too
        half = _half_width(fitted) + float(np.abs(y - value).max())
        sizes = (
            "all measured sizes" if len(fitted) == len(ladder.optima) else f"the {len(fitted)} sizes where it is known"
        )
        return Estimate(value, value - half, value + half), f"transfers: the optimum of {sizes} together"
    largest, last = fitted[-1], ladder.optima[-1]
    of = "the largest measured size"
    if largest is not last:
        bound = Estimate(None, last.low, last.high)
        of = f"{_place(largest)}, the largest size where it is known; at {_place(last)} its log2 is {bound:.2f}"
    if (
        ladder.verdict == DRIFTS
        and ladder.drift.value is not None
        and ladder.drift.low is not None
        and ladder.drift.high is not None
    ):
        beyond = doublings - math.log2(ladder.ratio(largest.curve))
        at = largest.log2_lr or 0.0
        ends = [at + beyond * ladder.drift.low, at + beyond * ladder.drift.high]
        half = _half_width([largest])
        return (
            Estimate(at + beyond * ladder.drift.value, min(ends) - half, max(ends) + half),
            f"drifts: extrapolated along the measured drift from {of}; tune at the target instead",
        )
    return Estimate(largest.log2_lr, largest.low, largest.high), (
        f"{ladder.verdict}: the optimum of {of}; its interval does not cover the way to the target"
    )


def axis_of(resolved: ResolvedVariant, width: int, depth: int) -> str | None:
    """The ladder that leads from the base to a target; None for the base itself."""
    wider, deeper = width != resolved.model.width, depth != resolved.model.depth
    return "joint" if wider and deeper else "width" if wider else "depth" if deeper else None


def leading(groups: Sequence[LadderResult], resolved: ResolvedVariant, width: int, depth: int) -> LadderResult:
    """The ladder of a variant that leads to a target, or else its first; horizons alone are one size, the base."""
    axis = axis_of(resolved, width, depth)
    sizes = [group for group in groups if group.axis != HORIZON]
    if not sizes:
        base = groups[0]
        return replace(base, axis="width", optima=base.optima[-1:], regrets=base.regrets[-1:], verdict=INCONCLUSIVE)
    return next((group for group in sizes if group.axis == axis), sizes[0])


def exponent_of(groups: Sequence[LadderResult]) -> Estimate | None:
    """x in LR ~ tokens^x as the horizons of a variant measured it: the drift in octaves per doubling of tokens."""
    return next((group.drift for group in groups if group.axis == HORIZON), None)


def doublings_to(ladder: LadderResult, size: Size) -> float:
    """How far a size lies from the base on the group's axis."""
    ratio = {"width": size.width_ratio, "depth": size.depth_ratio}.get(ladder.axis, size.width_ratio * size.depth_ratio)
    return math.log2(ratio)


def target_recipe(
    ladder: LadderResult,
    resolved: ResolvedVariant,
    width: int,
    depth: int,
    tokens: int | None = None,
    horizon_exponent: Estimate | None = None,
) -> dict[str, Any]:
    """How to train a target that was never trained: its LR with an interval, and every tensor's numbers.

    Args:
        tokens: what the target is trained on; None: as many as the sweep's runs.
        horizon_exponent: a measured x in LR ~ tokens^x, with its interval, for sweeps whose training.horizon_exponent
            does not say it already, as `exponent_of` finds it.

    Raises:
        ConfigError: a target that is no multiple of the base shape.
    """
    size = resolved.size(width / resolved.model.width, depth / resolved.model.depth)
    choice, basis = recommend(ladder, doublings_to(ladder, size))
    axis = axis_of(resolved, width, depth)
    if axis not in (None, ladder.axis):
        basis = f"untested: the target lies on the {axis} axis, but only {ladder.axis} was measured; there, {basis}"
    elif (beyond := 2 ** doublings_to(ladder, size) / ladder.ratio(ladder.optima[-1].curve)) > 1:
        basis += f"; the target's {AXIS_UNIT.get(ladder.axis, ladder.axis)} is {beyond:.3g} times the largest measured"
    final = resolved if tokens is None else replace(resolved, variant=_trained_on(resolved, tokens))
    choice, horizon = _carried(choice, resolved, final, horizon_exponent)
    assert choice.value is not None
    return {
        "model": ladder.model,
        "optimizer": ladder.optimizer,
        "parametrization": ladder.parametrization,
        "verdict": ladder.verdict,
        "basis": basis,
        "log2_lr": choice.value,
        "log2_lr_low": choice.low,
        "log2_lr_high": choice.high,
        "horizon": horizon,
        **settings(final, size, 2.0**choice.value),
    }


def settings(resolved: ResolvedVariant, size: Size, base_lr: float) -> dict[str, Any]:
    """Everything that a run of `resolved` at a size is trained with; all that an export to another trainer needs."""
    forward = tensor_rules.multipliers(resolved, size)
    training = resolved.training
    return {
        "target": {key: getattr(size, key) for key in SHAPE},
        "base": {key: getattr(resolved.size(1.0, 1.0), key) for key in SHAPE},
        "base_lr": base_lr,
        "parameters": resolved.cost(size).parameters,
        "block_multiplier": forward.block,
        "output_multiplier": forward.output,
        "attention_scale": forward.attention,
        "clip": tensor_rules.clip_norm(resolved),
        "architecture": dict(resolved.variant.model),
        "training": {
            "tokens": _tokens(resolved),
            "steps": resolved.steps,
            "warmup_steps": training.warmup_steps(resolved.steps),
            **{key: getattr(training, key) for key in SCHEDULE},
        },
        "optimizers": [
            {
                "kind": f"{type(part.optimizer).__module__}.{type(part.optimizer).__qualname__}",
                **asdict(part.optimizer),
            }
            for part in resolved.optimizers
        ],
        "tensors": [tensor_rules.rule_record(row) for row in tensor_rules.rules(resolved, size, base_lr)],
    }


def _carried(
    choice: Estimate, resolved: ResolvedVariant, final: ResolvedVariant, exponent: Estimate | None
) -> tuple[Estimate, dict[str, Any]]:
    """The LR at the target's horizon, and a note on how it was carried there."""
    measured, wanted = _tokens(resolved), _tokens(final)
    octaves = math.log2(wanted / measured)
    factor, note = (
        1.0,
        f"for {measured:,} training tokens, as in the sweep; longer training wants a lower one: --to tokens=N",
    )
    if octaves and resolved.training.base_tokens is not None:  # the parts of the recipe carry the LR themselves
        factor = final.optimizers[0].lr_ratio / resolved.optimizers[0].lr_ratio
        note = f"carried from {measured:,} to {wanted:,} tokens by {_power(resolved.training.horizon_exponent)}"
    elif octaves and exponent is not None and exponent.value is not None:
        factor = 2.0 ** (octaves * exponent.value)
        ends = [None if e is None else octaves * e for e in (exponent.low, exponent.high)]
        low, high = ends if octaves > 0 else ends[::-1]
        choice = Estimate(*map(_sum, (choice.value, choice.low, choice.high), (octaves * exponent.value, low, high)))
        note = f"carried from {measured:,} to {wanted:,} tokens by the measured LR ~ tokens^{exponent:.3g}"
    elif octaves:
        note = (
            f"NOT carried to {wanted:,} tokens: measured at {measured:,}, and the best LR falls with the horizon; "
            "set training.horizon_exponent and training.base_tokens, or sweep at several horizons"
        )
    return choice, {"tokens": wanted, "measured_tokens": measured, "lr_factor": factor, "note": note}


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


def _power(exponent: float) -> str:
    return f"LR ~ tokens^{exponent:.3g}"


def _tokens(resolved: ResolvedVariant) -> int:
    """Training tokens of a run."""
    return resolved.steps * resolved.training.batch_size * resolved.model.context


def _trained_on(resolved: ResolvedVariant, tokens: int) -> Any:
    """The variant with another token budget; a warm-up given as a fraction, and decay rules per run, follow it."""
    return replace(resolved.variant, training=replace(resolved.training, steps=None, tokens=tokens))


def _place(optimum: Optimum) -> str:
    return f"width {optimum.curve.width}, depth {optimum.curve.depth}"


def _half_width(optima: Sequence[Optimum]) -> float:
    """Root mean square of the half-widths of some optima's intervals."""
    return math.sqrt(sum(((o.high or 0.0) - (o.low or 0.0)) ** 2 for o in optima) / len(optima)) / 2
