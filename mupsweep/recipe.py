"""Recipe: what to use at a target that was never trained, from a verdict and the rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mupsweep import build
from mupsweep.errors import RecordError
from mupsweep.optimum import Optimum
from mupsweep.plan import Recipe
from mupsweep.transfer import DRIFTS, TRANSFERS, Estimate, Group


def recommend(one: Group, doublings: float) -> tuple[Estimate, str]:
    """log2 of the base LR to use at a target `doublings` beyond the base on the group's axis, and what it rests on."""
    known = [o for o in one.optima if o.log2_lr is not None and o.se]
    if not known:
        raise RecordError(
            f"{'/'.join(one.label)}: no size has a bracketed optimum yet, so there is no LR to recommend; "
            f"{one.reasons[0] if one.reasons else 'train more LRs'}"
        )
    if one.verdict == TRANSFERS:
        w = np.array([1 / (o.se or 1.0) ** 2 for o in known])
        y = np.array([o.log2_lr for o in known])
        value = float(w @ y / w.sum())
        # the sizes share most of a fit's bias, so their intervals do not average out; what drift there is counts too
        half = _half_width(known) + float(np.abs(y - value).max())
        return Estimate(value, value - half, value + half), "transfers: the optimum of all measured sizes together"
    largest = known[-1]
    if (
        one.verdict == DRIFTS
        and one.drift.value is not None
        and one.drift.low is not None
        and one.drift.high is not None
    ):
        beyond = doublings - math.log2(one.ratio(largest.curve))
        at = largest.log2_lr or 0.0
        ends = [at + beyond * one.drift.low, at + beyond * one.drift.high]
        half = _half_width([largest])
        return (
            Estimate(at + beyond * one.drift.value, min(ends) - half, max(ends) + half),
            "drifts: extrapolated along the measured drift from the largest measured size; tune at the target instead",
        )
    return Estimate(largest.log2_lr, largest.low, largest.high), (
        "inconclusive: the optimum of the largest measured size; its interval does not cover the way to the target"
    )


def axis_of(made: Recipe, width: int, depth: int) -> str | None:
    """The ladder that leads from the base to a target; None for the base itself."""
    wider, deeper = width != made.model.width, depth != made.model.depth
    return "joint" if wider and deeper else "width" if wider else "depth" if deeper else None


def recipe(one: Group, made: Recipe, width: int, depth: int) -> dict[str, Any]:
    """How to train a target that was never trained: its LR with an interval, and every tensor's numbers.

    Raises:
        ConfigError: a target that is no multiple of the base shape.
    """
    size = made.size(width / made.model.width, depth / made.model.depth)
    ratio = {"width": size.width_ratio, "depth": size.depth_ratio}.get(one.axis, size.width_ratio * size.depth_ratio)
    choice, basis = recommend(one, math.log2(ratio))
    assert choice.value is not None
    axis = axis_of(made, width, depth)
    if axis not in (None, one.axis):
        basis = f"untested: the target lies on the {axis} axis, but only {one.axis} was measured; there, {basis}"
    forward = build.multipliers(made, size)
    return {
        "model": one.model,
        "optimizer": one.optimizer,
        "parametrization": one.parametrization,
        "target": {"width": size.width, "depth": size.depth, "heads": size.heads, "head_dim": size.head_dim},
        "verdict": one.verdict,
        "basis": basis,
        "log2_lr": choice.value,
        "log2_lr_low": choice.low,
        "log2_lr_high": choice.high,
        "base_lr": 2.0**choice.value,
        "parameters": made.cost(size).parameters,
        "block_multiplier": forward.block,
        "output_multiplier": forward.output,
        "attention_scale": forward.attention,
        "clip": build.clip_norm(made),
        "tensors": [build.rule_record(row) for row in build.rules(made, size, 2.0**choice.value)],
    }


def _half_width(found: Sequence[Optimum]) -> float:
    """Root mean square of the half-widths of some optima's intervals."""
    return math.sqrt(sum(((o.high or 0.0) - (o.low or 0.0)) ** 2 for o in found) / len(found)) / 2
