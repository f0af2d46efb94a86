"""Names of variants, sizes and axes, as every view prints them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from mupsweep.analysis.curves import LossCurve, Size
from mupsweep.analysis.estimate import UNKNOWN
from mupsweep.analysis.labels import Label
from mupsweep.analysis.optimum import Optimum
from mupsweep.analysis.transfer import AXIS_UNIT, HORIZON, LadderResult
from mupsweep.formatting import si

NAMES = {"sp": "SP", "mup": "μP", "depth_mup": "depth-μP"}
BARS = 0.25  # of the range of losses at most that is added below for the error bars


def variant_name(label: Label, among: Sequence[Label]) -> str:
    """A variant's parametrization and its change, after its model and optimizer where these differ among the others."""
    said = [label[i] for i in (0, 1) if len({other[i] for other in among}) > 1]
    return " · ".join([*said, NAMES.get(label[2], label[2]), *label[3:]])


def variant_order(label: Label) -> tuple[Any, ...]:
    """Sorts variants as people compare them: SP first, beside the other parametrizations of its optimizer."""
    return label[:2], [*NAMES, label[2]].index(label[2]), label[2:]


def in_order(groups: Iterable[LadderResult]) -> list[LadderResult]:
    """Groups in the order of their variants."""
    return sorted(groups, key=lambda g: variant_order(g.label))


def drift_words(group: LadderResult) -> str:
    """How far the optimum of a ladder moves, as far as it is known."""
    if len(group.sloped) < len(group.optima) and group.total_drift != UNKNOWN:  # a slope would leave out a bound
        return f"the optimum moves {group.total_drift} octaves"
    return "drift unknown" if group.drift == UNKNOWN else slope_words(group)


def slope_words(group: LadderResult) -> str:
    """The drift by doubling, and of which sizes where some are only bounded."""
    known, every = len(group.sloped), len(group.optima)
    of = f" of {AXIS_UNIT.get(group.axis, group.axis)}" if known == every else f" ({known} of {every} sizes)"
    return f"{group.drift} octaves per doubling{of}"


def axis_name(axis: str) -> str:
    """An axis of sizes, as charts write it below themselves."""
    return {"joint": "width x depth", HORIZON: "tokens"}.get(axis, axis)


def ordered_sizes(groups: Sequence[LadderResult]) -> dict[Size, LossCurve]:
    """Every size, the smallest first."""
    curves = [o.curve for g in groups for o in g.optima]
    return {c.size: c for c in sorted(curves, key=lambda c: (c.width * c.depth, c.width, c.horizon or 0))}


def size_names(sizes: Sequence[Size]) -> list[str]:
    """What tells sizes apart: width 64, depth 8, 64x8, or 400k tokens, the last beside the others where both differ."""
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


def loss_range(found: Sequence[Optimum]) -> tuple[float, float]:
    """The losses worth showing: all valleys and their flanks, cut where an exploding LR would flatten them."""
    means = [[p.mean for p in optimum.curve.usable if math.isfinite(p.mean)] for optimum in found]
    means = [m for m in means if m]
    if not means:
        return 0.0, 1.0
    low, high = min(map(min, means)), max(map(min, means))
    flank = median(loss - min(m) for m in means for loss in m)
    top = min(max(map(max, means)), high + max(2.5 * flank, 0.25 * (high - low)))
    low = min([low, *(optimum.loss for optimum in found if optimum.loss is not None)])
    # standard errors too, but for those that would take more than their share
    bars = [p.mean - (p.sem or 0.0) for o in found for p in o.curve.usable if math.isfinite(p.mean)]
    low = max(min([low, *bars]), low - BARS * (top - low))
    margin = 0.06 * (top - low) or 0.01
    return low - margin, top + margin
