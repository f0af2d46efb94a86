"""The figures of a sweep, for screens and for papers. The same analysis always gives the same bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MultipleLocator
from matplotlib.transforms import Bbox, TransformedBbox

from mupsweep.analysis.curves import LossCurve, Size
from mupsweep.analysis.estimate import UNKNOWN, Estimate
from mupsweep.analysis.optimum import Optimum
from mupsweep.analysis.transfer import HORIZON, TOLERANCE_OCTAVES, Analysis, LadderResult
from mupsweep.atomic_files import make_folder
from mupsweep.formatting import si
from mupsweep.report.figures.theme import (
    BAND,
    GROUPS,
    INK,
    MARKERS,
    QUIET,
    SIZES,
    VERDICT_COLORS,
    FigureStyle,
    look_of,
    save,
)
from mupsweep.report.names import axis_name, drift_words, in_order, loss_range, ordered_sizes, size_names, variant_name

COLUMNS = 3  # panels side by side
LEGEND = 76  # characters of a line below the drift
STRIP = 0.05, 0.22  # height of a row of diverged points, and of all rows at most, as fractions of the panel


def draw(analysis: Analysis, folder: Path, look: str = "screen") -> list[Path]:
    """Loss curves and drift of every axis that was swept.

    Args:
        folder: gets curves.png, curves.svg, drift.png, drift.svg for widths, curves-depth.png etc. for others.
        look: a key of LOOKS; that of papers adds PDF.

    Returns:
        The written files.
    """
    chosen = look_of(look)
    make_folder(folder)
    written = []
    with matplotlib.style.context(["default", chosen.style]):
        for axis in dict.fromkeys(g.axis for g in analysis.groups):
            groups = in_order(g for g in analysis.groups if g.axis == axis)
            suffix = "" if axis == "width" else f"-{axis}"
            for name, figure in (("curves", _curves(groups, chosen)), ("drift", _drift(groups, chosen))):
                for line in (line for axes in figure.axes for line in axes.get_lines()):
                    line.set_linewidth(chosen.lines * line.get_linewidth())
                    line.set_markersize(chosen.lines * line.get_markersize())
                written += [save(figure, folder / f"{name}{suffix}{kind}") for kind in chosen.suffixes]
    return written


# Loss versus LR


@dataclass(frozen=True)
class _Scale:
    """What the panels of one row share.

    Attributes:
        low, high: the losses shown.
        top: the end of the y axis, above `high` by the strip for diverged points.
        rows: the row of that strip that each size has.
        shades: the position of every size in the colour map.
        crowded: whether there are too many LRs to write a number at each.
    """

    low: float
    high: float
    top: float
    rows: dict[Size, int]
    shades: dict[Size, float]
    crowded: bool


def _curves(groups: Sequence[LadderResult], look: FigureStyle) -> Figure:
    families: dict[tuple[str, str], list[LadderResult]] = {}
    for group in groups:
        families.setdefault(group.label[:2], []).append(group)
    if all(len(members) == 1 for members in families.values()):  # nothing to put side by side: fill the rows
        families = {groups[0].label[:2]: list(groups)}
    rows = [f[i : i + COLUMNS] for f in families.values() for i in range(0, len(f), COLUMNS)]
    columns = max(map(len, rows))
    figure = Figure(figsize=look.size(columns, len(rows)), layout=_layout())
    axes = figure.subplots(len(rows), columns, squeeze=False, sharey="row", sharex=True)
    sizes = ordered_sizes(groups)
    shades = {key: i / max(1, len(sizes) - 1) for i, key in enumerate(sizes)}
    for panels, members in zip(axes, rows, strict=True):
        scale = _scale(members, shades)
        for panel, group in zip(panels, members, strict=False):
            _panel(panel, group, groups, scale, look)
        for panel in panels[len(members) :]:
            panel.set_axis_off()
        panels[0].set_ylabel("validation loss (nats per token)")
        panels[0].set_ylim(scale.low, scale.top)
        panels[0].set_yticks([tick for tick in panels[0].get_yticks() if scale.low <= tick <= scale.high])
    _lr_axis(axes[0, 0], [p.log2_lr for g in groups for o in g.optima for p in o.curve.points])
    for panel, below in zip(axes.flat, [*axes[1:].flat, *[None] * columns], strict=True):
        if panel.axison and (below is None or not below.axison):
            panel.set_xlabel("peak learning rate at the base shape")
            panel.tick_params(labelbottom=True)
    names = size_names(list(sizes))
    lines = [
        Line2D([], [], color=SIZES(shades[key]), marker="o", markersize=4, label=name)
        for key, name in zip(sizes, names, strict=True)
    ]
    handles = [*lines, *_marks(groups)]
    lines_of_legend = math.ceil(len(handles) / (3 * columns))
    figure.legend(handles=handles, loc="outside lower center", ncols=math.ceil(len(handles) / lines_of_legend))
    return figure


def _marks(groups: Sequence[LadderResult]) -> list[Line2D]:
    """Legend entries of what is drawn beside the curves."""
    drawn = [o for g in groups for o in g.optima if o.log2_lr is not None]
    marker = {"color": QUIET, "marker": "D", "markersize": 6}
    made = []
    if any(map(_bounded, drawn)):
        made.append(Line2D([], [], markeredgecolor="white", label="fitted optimum", **marker))
    if not all(map(_bounded, drawn)):
        made.append(Line2D([], [], markerfacecolor="white", linestyle="", label="no interval", **marker))
    if any(g.base.log2_lr is not None for g in groups):
        made.append(Line2D([], [], color=QUIET, linestyle=(0, (4, 3)), linewidth=1, label="the base's optimum"))
    return made


def _bounded(one: Optimum | Estimate) -> bool:
    """Whether both ends are known; what lacks one is drawn hollow."""
    return one.low is not None and one.high is not None


def _faces(one: Optimum | Estimate, color: Any) -> dict[str, Any]:
    return {"mfc": color, "mec": "white"} if _bounded(one) else {"mfc": "white", "mec": color}


def _scale(members: Sequence[LadderResult], shades: dict[Size, float]) -> _Scale:
    low, high = loss_range([o for g in members for o in g.optima])
    curves = [o.curve for g in members for o in g.optima]
    diverged = [key for key in shades if any(c.n_diverged for c in curves if c.size == key)]
    strip = min(STRIP[0] * len(diverged) + 0.02, STRIP[1]) if diverged else 0.0
    top = high + (high - low) * strip / (1 - strip)
    crowded = len({p.log2_lr for c in curves for p in c.points}) > 12
    return _Scale(low, high, top, {key: i for i, key in enumerate(diverged)}, shades, crowded)


def _panel(axes: Axes, group: LadderResult, groups: Sequence[LadderResult], scale: _Scale, look: FigureStyle) -> None:
    # curves leave through the upper edge of the losses, not through the strip
    window = TransformedBbox(Bbox([[0, scale.low], [1, scale.high]]), axes.get_yaxis_transform())
    if scale.rows:
        axes.axhspan(scale.high, scale.top, color=BAND, linewidth=0, zorder=0.5)
        place = {"xy": (0, scale.top), "xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
        axes.annotate("diverged", xytext=(4, -3), va="top", fontsize=look.small, color=QUIET, **place)
    for optimum in group.optima:
        _curve(axes, optimum, scale, window, look.small - 1)
    base = group.base
    if base.log2_lr is not None:
        axes.axvline(base.log2_lr, color=QUIET, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    for artist in (*axes.lines, *axes.collections, *axes.texts):
        artist.set_in_layout(False)  # what leaves the panel is clipped, so it must not push the panels apart
    name = variant_name(group.label, [g.label for g in groups])
    if not look.told:
        letter = chr(ord("a") + list(groups).index(group) % 26)
        axes.set_title(f"({letter}) {_plain(name)}", loc="left", fontsize=look.title, pad=7)
        return
    axes.set_title(_plain(name), loc="left", fontsize=look.title, fontweight="bold", pad=19)
    axes.set_title(group.verdict, loc="right", fontsize=look.title, color=VERDICT_COLORS[group.verdict], pad=19)
    axes.text(0, 1.025, _plain(drift_words(group)), transform=axes.transAxes, color=QUIET, fontsize=8.5)


def _curve(axes: Axes, optimum: Optimum, scale: _Scale, window: TransformedBbox, small: float) -> None:
    curve = optimum.curve
    key = curve.size
    color = SIZES(scale.shades[key])
    points = [p for p in curve.usable if math.isfinite(p.mean)]
    xs, ys = [p.log2_lr for p in points], [p.mean for p in points]
    (line,) = axes.plot(xs, ys, color=color, linewidth=1, marker="o", markersize=3.5, zorder=3)
    line.set_clip_box(window)
    bars = [(p.log2_lr, p.mean, p.sem) for p in points if p.sem is not None and p.mean <= scale.high]
    if bars:
        x, y, sem = zip(*bars, strict=True)
        axes.errorbar(x, y, sem, fmt="none", ecolor=color, elinewidth=1, capsize=2, zorder=3)
    above = [x for x, y in zip(xs, ys, strict=True) if y > scale.high]
    axes.plot(above, [scale.high] * len(above), "^", color=color, markersize=5, clip_on=False, zorder=4)
    for p in curve.points:
        if p.censored:
            height = scale.high + (scale.top - scale.high) * (scale.rows[key] + 0.6) / (len(scale.rows) + 0.2)
            axes.plot([p.log2_lr], [height], "x", color=color, markersize=4, markeredgewidth=1.3)
            count = f"{p.diverged}/{p.diverged + len(p.losses)}" if p.losses else f"{p.diverged}"
            place = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
            axes.annotate("" if scale.crowded else count, (p.log2_lr, height), fontsize=small, color=QUIET, **place)
    if optimum.posterior is not None:
        mean = optimum.posterior.mean
        fitted = axes.plot(optimum.posterior.grid, mean, color=color, linewidth=4, alpha=0.22, zorder=2)
        fitted[0].set_clip_box(window)
    if optimum.log2_lr is not None and optimum.loss is not None:
        ends = [end for end in (optimum.low, optimum.log2_lr, optimum.high) if end is not None]
        axes.plot(ends, [optimum.loss] * len(ends), color=INK, linewidth=1.3, zorder=5)
        for end in (optimum.low, optimum.high):
            axes.plot([] if end is None else [end], [] if end is None else [optimum.loss], "|", color=INK, zorder=5)
        axes.plot(optimum.log2_lr, optimum.loss, "D", markersize=6, mew=0.9, zorder=6, **_faces(optimum, color))


def _lr_axis(axes: Axes, lrs: Sequence[float]) -> None:
    """Powers of two; all panels share it."""
    low, high = min(lrs), max(lrs)
    step = next(s for s in (0.5, 1, 2, 4, 8, 16, 1000) if (high - low) / s <= 8)
    axes.xaxis.set_major_locator(MultipleLocator(step))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"$2^{{{x:zg}}}$"))
    pad = 0.06 * (high - low) or 0.5
    axes.set_xlim(low - pad, high + pad)


# Drift of the optimum


def _drift(groups: Sequence[LadderResult], look: FigureStyle) -> Figure:
    wide, high = look.drift
    named = [_drift_legend(g, groups, look.told) for g in groups]
    rows = sum(1 + name.count("\n") for name in named)
    figure = Figure(figsize=(wide, high + 0.22 * rows * look.told), layout=_layout())
    axes = figure.subplots()
    axes.axhspan(-TOLERANCE_OCTAVES, TOLERANCE_OCTAVES, color=BAND, linewidth=0, zorder=0.5)
    axes.axhline(0, color=QUIET, linewidth=0.8, zorder=1)
    lowest = highest = 0.0
    for i, group in enumerate(groups):
        ends = _moves(axes, group, (i - (len(groups) - 1) / 2) * 0.03, GROUPS[i % 6], MARKERS[i % 6])
        lowest, highest = min(lowest, *ends), max(highest, *ends)
    axes.set_ylim(min(-0.8, lowest - 0.25), max(0.8, highest + 0.25))
    if all(move == UNKNOWN for group in groups for move in group.moves):
        axes.text(0.5, 0.55, "unknown", transform=axes.transAxes, ha="center", color=QUIET)
    names: dict[float, dict[str, None]] = {}
    for group in groups:
        for optimum in group.optima:
            at = math.log2(group.ratio(optimum.curve))
            names.setdefault(at, {})[_position_name(group.axis, optimum.curve)] = None
    axes.xaxis.set_major_locator(FixedLocator(sorted(names)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "/".join(names.get(x, ()))))
    axes.set_xlim(min(names) - 0.25, max(names) + 0.25)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel(f"{axis_name(groups[0].axis)} (log scale)")
    axes.set_ylabel("optimal LR relative to the base's (octaves)" if look.told else "shift of the optimal LR (octaves)")
    lines = [
        Line2D(
            [],
            [],
            color=GROUPS[i % 6],
            marker=MARKERS[i % 6],
            markersize=5.5,
            label=name,
        )
        for i, name in enumerate(named)
    ]
    if not all(_bounded(move) for g in groups for move in g.moves if move.value is not None):
        lines.append(Line2D([], [], color=QUIET, marker="o", mfc="white", linestyle="", label="without an interval"))
    band = Patch(color=BAND, label=f"tolerance, ±{TOLERANCE_OCTAVES:g} octaves")
    columns = 1 if look.told else 3
    figure.legend(handles=[*lines, band], loc="outside lower left", handlelength=2.4, ncols=columns)
    return figure


def _moves(axes: Axes, group: LadderResult, dodge: float, color: str, marker: str) -> tuple[float, float]:
    """One group's optima relative to its base; returns the lowest and the highest octave drawn."""
    drawn, fitted = [0.0], []
    for optimum, move in zip(group.optima, group.moves, strict=True):
        x, y, low, high = math.log2(group.ratio(optimum.curve)) + dodge, move.value, move.low, move.high
        drawn += [end for end in (y, low, high) if end is not None]
        if y is None:
            _bound(axes, x, low, high, color)
            drawn += [end + arrow for end, arrow in ((low, 0.5), (high, -0.5)) if end is not None]
            continue
        for end in (low, high):
            if end is not None:
                axes.plot([x, x], [y, end], color=color, linewidth=1.4, zorder=3)
                axes.plot(x, end, "_", color=color, markersize=6, markeredgewidth=1.4, zorder=3)
        if optimum.se:
            fitted.append((x - dodge, y, 1 / optimum.se**2))
        axes.plot(x, y, marker, markersize=6.5, mew=0.8, zorder=4, **_faces(move, color))
    if group.drift.value is not None and fitted:
        xs, ys, weights = np.array(fitted).T  # the slope's line passes through the weighted centre
        center, height = weights @ xs / weights.sum(), weights @ ys / weights.sum()
        ends = np.array([xs.min(), xs.max()])
        axes.plot(ends, height + group.drift.value * (ends - center), color=color, linewidth=1.6, alpha=0.55, zorder=2)
    return min(drawn), max(drawn)


def _bound(axes: Axes, x: float, low: float | None, high: float | None, color: str) -> None:
    """An optimum that is only bounded: an arrow away from the bound, or a bar between two."""
    if low is not None and high is not None:
        axes.plot([x, x], [low, high], color=color, linewidth=1.2, linestyle=":", marker="_", zorder=3)
        return
    for start, direction in ((low, 0.5), (high, -0.5)):
        if start is not None:
            arrow = {"arrowstyle": "-|>", "color": color, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (x, start + direction), (x, start), arrowprops=arrow, zorder=3)
            axes.plot(x, start, "_", color=color, markersize=9, markeredgewidth=1.6, zorder=3)


def _drift_legend(group: LadderResult, groups: Sequence[LadderResult], told: bool) -> str:
    name = variant_name(group.label, [g.label for g in groups])
    return _plain(fill(f"{name}: {group.verdict}, {drift_words(group)}", LEGEND) if told else name)


def _position_name(axis: str, curve: LossCurve) -> str:
    names = {"width": f"{curve.width}", "depth": f"{curve.depth}", HORIZON: si(curve.horizon or 0)}
    return names.get(axis, f"{curve.width}x{curve.depth}")


# Shared by both figures


def _layout() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.09)


def _plain(text: str) -> str:
    """Typeset minus signs, and no names read as mathematics."""
    return re.sub(r"-(?=\d)", "−", text).replace("$", r"\$")
