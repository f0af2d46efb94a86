"""Names of variants, sizes and axes, as every view prints them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from mupsweep.analysis.curves import LossCurve, Point
from mupsweep.analysis.estimate import UNKNOWN
from mupsweep.analysis.labels import Label
from mupsweep.analysis.optimum import Optimum
from mupsweep.analysis.run_result import Size
from mupsweep.analysis.transfer import AXIS_UNIT, HORIZON, LadderResult
from mupsweep.formatting import si

PARAMETRIZATION_NAMES = {"sp": "SP", "mup": "μP", "depth_mup": "depth-μP"}
MAX_ERROR_BARS = 0.25  # share of the range of losses that may be added below it for error bars


def variant_name(label: Label, among: Sequence[Label]) -> str:
    """A variant's parametrization and override, preceded by model and optimizer where `among` has several of them."""
    differing = [label[i] for i in (0, 1) if len({other[i] for other in among}) > 1]
    return " · ".join([*differing, PARAMETRIZATION_NAMES.get(label[2], label[2]), *label[3:]])


def variant_order(label: Label) -> tuple[Any, ...]:
    """Sort key of variants: by model and optimizer, and within these SP first, then its rivals."""
    return label[:2], [*PARAMETRIZATION_NAMES, label[2]].index(label[2]), label[2:]


def sorted_ladders(groups: Iterable[LadderResult]) -> list[LadderResult]:
    """Ladders in the order of their variants."""
    return sorted(groups, key=lambda g: variant_order(g.label))


def drift_text(group: LadderResult) -> str:
    """How far the optimum of a ladder moves, with what is known of it."""
    # where some sizes are only bounded, a slope through the others would leave the bounds out
    if len(group.fitted) < len(group.optima):
        total = group.total_drift
        return "drift unknown" if total == UNKNOWN else f"the optimum moves {total} octaves"
    return "drift unknown" if group.drift == UNKNOWN else slope_text(group)


def slope_text(group: LadderResult) -> str:
    """The drift per doubling of the ladder's axis."""
    return f"{group.drift} octaves per doubling of {AXIS_UNIT.get(group.axis, group.axis)}"


def axis_name(axis: str) -> str:
    """The label of a chart's axis of sizes."""
    return {"joint": "width x depth", HORIZON: "tokens"}.get(axis, axis)


def position_name(axis: str, curve: LossCurve) -> str:
    """The size of a curve where an axis of a chart names the quantity."""
    names = {"width": f"{curve.width}", "depth": f"{curve.depth}", HORIZON: si(curve.horizon or 0)}
    return names.get(axis, f"{curve.width}x{curve.depth}")


def ordered_sizes(groups: Sequence[LadderResult]) -> dict[Size, LossCurve]:
    """Every size with one of its curves, the smallest first."""
    curves = [o.curve for g in groups for o in g.optima]
    return {c.size: c for c in sorted(curves, key=lambda c: (c.width * c.depth, c.width, c.horizon or 0))}


def size_names(sizes: Sequence[Size]) -> list[str]:
    """A short name per size, of what differs among them: width 64, depth 8, 64x8, 400k tokens, or 64x8, 400k tokens."""
    widths, depths, horizons = (set(values) for values in zip(*sizes, strict=True)) if sizes else ({0}, {0}, {0})
    if len(horizons) > 1:
        tokens = [f"{si(horizon or 0)} tokens" for *_, horizon in sizes]
        if len(widths) == len(depths) == 1:
            return tokens
        shapes = size_names([(width, depth, None) for width, depth, _ in sizes])
        return [f"{shape}, {horizon}" for shape, horizon in zip(shapes, tokens, strict=True)]
    if len(depths) == 1:
        return [f"width {width}" for width, *_ in sizes]
    if len(widths) == 1:
        return [f"depth {depth}" for _, depth, _ in sizes]
    return [f"{width}x{depth}" for width, depth, _ in sizes]


def _before_cliff(optimum: Optimum) -> list[Point]:
    """The points with a loss, without those from which on a run is no part of the valley."""
    wall = math.inf if optimum.draws is None else optimum.draws.runs.wall
    return [p for p in optimum.curve.usable if math.isfinite(p.mean) and p.log2_lr < wall]


def loss_range(optima: Sequence[Optimum]) -> tuple[float, float]:
    """The losses worth plotting: all valleys and their flanks, cut where an exploding LR would flatten them."""
    curves = [points for optimum in optima if (points := _before_cliff(optimum))]
    if not curves:
        return 0.0, 1.0
    losses = [[p.mean for p in points] for points in curves]
    floors = [min(means) for means in losses]
    low, high = min(floors), max(floors)
    flank = median(loss - min(means) for means in losses for loss in means)
    top = min(max(map(max, losses)), high + max(2.5 * flank, 0.25 * (high - low)))
    low = min([low, *(o.loss.value for o in optima if o.loss.value is not None)])
    # the range covers standard errors too, but for those that would take more than their share of it
    bar_ends = [p.mean - (p.sem or 0.0) for points in curves for p in points]
    low = max(min([low, *bar_ends]), low - MAX_ERROR_BARS * (top - low))
    margin = 0.06 * (top - low) or 0.01
    return low - margin, top + margin
