"""The figures of a sweep, loss versus LR and drift. One analysis always gives the same bytes."""

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

from mupsweep.analysis.analysis import Analysis
from mupsweep.analysis.curves import LossCurve
from mupsweep.analysis.estimate import CONFIDENCE, UNKNOWN, Estimate
from mupsweep.analysis.optimum import Optimum
from mupsweep.analysis.run_result import Size
from mupsweep.analysis.transfer import LadderResult
from mupsweep.atomic_files import make_folder
from mupsweep.report.figures.theme import (
    BAND,
    GROUPS,
    MARKERS,
    QUIET,
    SIZES,
    VERDICT_COLORS,
    FigureStyle,
    figure_style,
    save,
)
from mupsweep.report.forecasts import fans, from_base, size_ticks
from mupsweep.report.names import (
    axis_name,
    drift_text,
    loss_range,
    ordered_sizes,
    size_names,
    sorted_ladders,
    variant_name,
)

MAX_COLUMNS = 3  # panels side by side
TITLE_CHARACTERS = 24  # of a panel's title in its full size
LEGEND_CHARACTERS = 76  # of a line of the drift figure's legend
STRIP = 0.05, 0.22  # height of a row of diverged points, and of all rows at most, as fractions of the panel
OPTIMUM_STRIP = 0.05, 0.3  # of a row of optima, and of all
CLIFF_TICK = 0.2  # height of the mark of a cliff at most, as a fraction of that of the losses
DODGE = 0.03  # doublings of the size between the ladders at one size, so that their markers do not hide each other


def draw(analysis: Analysis, folder: Path, style_name: str = "screen") -> list[Path]:
    """Draw loss curves and drift for every axis that was swept.

    Args:
        folder: receives curves.png, curves.svg, drift.png and drift.svg for widths, curves-depth.png etc. for depths.
        style_name: a key of FIGURE_STYLES; "paper" adds PDF.

    Returns:
        The written files.
    """
    style = figure_style(style_name)
    make_folder(folder)
    written = []
    with matplotlib.style.context(["default", style.rc_params]):
        for axis in dict.fromkeys(g.axis for g in analysis.groups):
            groups = sorted_ladders(g for g in analysis.groups if g.axis == axis)
            axis_suffix = "" if axis == "width" else f"-{axis}"
            for name, figure in (("curves", _curves(groups, style)), ("drift", _drift(groups, style))):
                _scale_lines(figure, style.lines)
                written += [save(figure, folder / f"{name}{axis_suffix}{suffix}") for suffix in style.suffixes]
    return written


def _scale_lines(figure: Figure, factor: float) -> None:
    for axes in figure.axes:
        for line in axes.get_lines():
            line.set_linewidth(factor * line.get_linewidth())
            line.set_markersize(factor * line.get_markersize())


# Loss versus LR


@dataclass(frozen=True)
class _Scale:
    """The y axis and the colours that the panels of one row share.

    Attributes:
        low, high: range of the losses in the plot.
        bottom, top: ends of the y axis, beyond those by the strips for optima and for diverged points.
        optimum_rows: number of rows in the lower strip, one for every size of a ladder whose optimum is bounded.
        diverged_rows: the row of the upper strip that belongs to each size with diverged runs, from below.
        shades: position of every size in the colour map.
        crowded: whether there are too many LRs to write a number at each.
    """

    low: float
    high: float
    bottom: float
    top: float
    optimum_rows: int
    diverged_rows: dict[Size, int]
    shades: dict[Size, float]
    crowded: bool


def _curves(groups: Sequence[LadderResult], style: FigureStyle) -> Figure:
    rows = _panel_rows(groups)
    columns = max(map(len, rows))
    figure = Figure(figsize=style.size(columns, len(rows)), layout=_layout())
    axes = figure.subplots(len(rows), columns, squeeze=False, sharey="row", sharex=True)
    sizes = ordered_sizes(groups)
    shades = {size: i / max(1, len(sizes) - 1) for i, size in enumerate(sizes)}
    _lr_axis(axes[0, 0], [p.log2_lr for g in groups for o in g.optima for p in o.curve.points])
    for panels, members in zip(axes, rows, strict=True):
        scale = _scale(members, shades)
        for panel, group in zip(panels, members, strict=False):
            _panel(panel, group, groups, scale, style)
        for panel in panels[len(members) :]:
            panel.set_axis_off()
        panels[0].set_ylabel("validation loss (nats per token)")
        panels[0].set_ylim(scale.bottom, scale.top)
        panels[0].set_yticks([tick for tick in panels[0].get_yticks() if scale.low <= tick <= scale.high])
    # a panel without another one below it labels the shared x axis
    for panel, below in zip(axes.flat, [*axes[1:].flat, *[None] * columns], strict=True):
        if panel.axison and (below is None or not below.axison):
            panel.set_xlabel("peak learning rate at the base shape")
            panel.tick_params(labelbottom=True)
    handles = [
        Line2D([], [], color=SIZES(shades[size]), marker="o", markersize=4, label=name)
        for size, name in zip(sizes, size_names(list(sizes)), strict=True)
    ]
    handles += _mark_handles(groups)
    legend_rows = math.ceil(len(handles) / (2 * columns))
    figure.legend(handles=handles, loc="outside lower center", ncols=math.ceil(len(handles) / legend_rows))
    return figure


def _panel_rows(groups: Sequence[LadderResult]) -> list[list[LadderResult]]:
    """Ladders in rows of panels: a model and optimizer begin a row, so that their parametrizations stand together."""
    families: dict[tuple[str, ...], list[LadderResult]] = {}
    for group in groups:
        families.setdefault(group.label[:2], []).append(group)
    if all(len(members) == 1 for members in families.values()):  # nothing to compare within a row, so fill the rows
        families = {groups[0].label[:2]: list(groups)}
    rows = []
    for members in families.values():
        rows += [members[i : i + MAX_COLUMNS] for i in range(0, len(members), MAX_COLUMNS)]
    return rows


def _mark_handles(groups: Sequence[LadderResult]) -> list[Line2D | Patch]:
    """Legend entries of the marks that are drawn beside the losses."""
    optima = [o for g in groups for o in g.optima]
    draws = [o.draws for o in optima if o.draws is not None]
    handles: list[Line2D | Patch] = []
    if draws:
        handles.append(Patch(color=QUIET, alpha=0.25, linewidth=0, label=f"valley, {CONFIDENCE:.0%}"))
    if any(len(curve.runs.cliff_x) for curve in draws):
        cliff = {"linestyle": ":", "marker": "o", "markersize": 4, "mfc": "white"}
        handles.append(Line2D([], [], color=QUIET, label="cliff, and runs beyond it", **cliff))
    if any(map(_has_interval, optima)):
        marker = {"marker": "D", "markersize": 5, "markeredgecolor": "white"}
        handles.append(Line2D([], [], color=QUIET, label="optimum", **marker))
    if any(_has_bound(o) and not _has_interval(o) for o in optima):
        handles.append(Line2D([], [], color=QUIET, marker=">", markersize=4, label="optimum may lie beyond"))
    if any(g.base.log2_lr is not None for g in groups):
        dashes = {"linestyle": (0, (4, 3)), "linewidth": 1}
        handles.append(Line2D([], [], color=QUIET, label="the base's optimum", **dashes))
    return handles


def _has_interval(value: Optimum | Estimate) -> bool:
    """Whether both ends of the interval are known; a value without one is drawn hollow."""
    return value.low is not None and value.high is not None


def _has_bound(value: Optimum | Estimate) -> bool:
    """Whether anything is known of a value."""
    return value.low is not None or value.high is not None


def _marker_colors(value: Optimum | Estimate, color: Any) -> dict[str, Any]:
    """Face and edge of a marker: filled where the interval is known, else hollow."""
    return {"mfc": color, "mec": "white"} if _has_interval(value) else {"mfc": "white", "mec": color}


def _scale(members: Sequence[LadderResult], shades: dict[Size, float]) -> _Scale:
    optima = [o for g in members for o in g.optima]
    low, high = loss_range(optima)
    unstable = {o.curve.size for o in optima if o.curve.n_diverged}
    diverged = {size: i for i, size in enumerate(size for size in shades if size in unstable)}
    bounded = max(sum(map(_has_bound, g.optima)) for g in members)
    strips = (len(diverged), STRIP), (bounded, OPTIMUM_STRIP)
    above, below = (min(row * rows + 0.02, most) if rows else 0.0 for rows, (row, most) in strips)
    height = (high - low) / (1 - above - below)
    crowded = len({p.log2_lr for o in optima for p in o.curve.points}) > 12
    return _Scale(low, high, low - below * height, high + above * height, bounded, diverged, shades, crowded)


def _panel(axes: Axes, group: LadderResult, groups: Sequence[LadderResult], scale: _Scale, style: FigureStyle) -> None:
    """Loss versus LR of one ladder."""
    # curves leave through the edges of the losses, not through the strips
    window = TransformedBbox(Bbox([[0, scale.low], [1, scale.high]]), axes.get_yaxis_transform())
    strips = (
        (scale.diverged_rows, "diverged", scale.high, scale.top),
        (*(scale.optimum_rows, "optimum", scale.bottom, scale.low),),
    )
    for rows, name, lower, upper in strips:
        if rows:
            axes.axhspan(lower, upper, color=BAND, linewidth=0, zorder=0.5)
            position = {"xy": (0, upper), "xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
            axes.annotate(name, xytext=(4, -3), va="top", fontsize=style.small, color=QUIET, **position)
    for optimum in group.optima:
        _curve(axes, optimum, scale, window)
        _diverged_points(axes, optimum.curve, scale, style.small - 1)
        _valley(axes, optimum, scale, window)
    for row, optimum in enumerate(filter(_has_bound, group.optima)):
        _optimum(axes, optimum, row, scale)
    base = group.base
    if base.log2_lr is not None:
        axes.axvline(base.log2_lr, color=QUIET, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    for artist in (*axes.lines, *axes.collections, *axes.texts):
        artist.set_in_layout(False)  # parts beyond the panel are clipped, so they must not push the panels apart
    name = variant_name(group.label, [g.label for g in groups])
    if not style.show_titles:
        letter = chr(ord("a") + list(groups).index(group) % 26)
        axes.set_title(f"({letter}) {_plain(name)}", loc="left", fontsize=style.title, pad=7)
        return
    size = style.title * min(1, TITLE_CHARACTERS / len(name))
    axes.set_title(_plain(name), loc="left", fontsize=size, fontweight="bold", pad=19)
    axes.set_title(group.verdict, loc="right", fontsize=style.title, color=VERDICT_COLORS[group.verdict], pad=19)
    axes.text(0, 1.025, _plain(drift_text(group)), transform=axes.transAxes, color=QUIET, fontsize=8.5)


def _curve(axes: Axes, optimum: Optimum, scale: _Scale, window: TransformedBbox) -> None:
    """Seed means of one size with their standard errors, and triangles for losses above the axis.

    From the cliff on markers are hollow.
    """
    color = SIZES(scale.shades[optimum.curve.size])
    wall = math.inf if optimum.draws is None else optimum.draws.runs.wall
    points = [p for p in optimum.curve.usable if math.isfinite(p.mean)]
    before, beyond = ([p for p in points if (p.log2_lr < wall) == is_before] for is_before in (True, False))
    for part, style, face in ((before, "-", color), (beyond, "", "white")):
        looks = {"color": color, "linewidth": 0.8, "marker": "o", "markersize": 3.5, "mfc": face, "zorder": 3}
        (line,) = axes.plot([p.log2_lr for p in part], [p.mean for p in part], linestyle=style, **looks)
        line.set_clip_box(window)
    bars = [(p.log2_lr, p.mean, p.sem) for p in points if p.sem is not None and p.mean <= scale.high]
    if bars:
        x, y, sem = zip(*bars, strict=True)
        axes.errorbar(x, y, sem, fmt="none", ecolor=color, elinewidth=1, capsize=2, zorder=3)
    for part, face in ((before, color), (beyond, "white")):
        above = [p.log2_lr for p in part if p.mean > scale.high]
        axes.plot(above, [scale.high] * len(above), "^", color=color, mfc=face, markersize=5, clip_on=False, zorder=4)


def _diverged_points(axes: Axes, curve: LossCurve, scale: _Scale, fontsize: float) -> None:
    """A cross in the strip at every LR with diverged seeds, and how many of them diverged."""
    color = SIZES(scale.shades[curve.size])
    for point in curve.points:
        if not point.censored:
            continue
        row = scale.diverged_rows[curve.size]
        height = scale.high + (scale.top - scale.high) * (row + 0.6) / (len(scale.diverged_rows) + 0.2)
        axes.plot([point.log2_lr], [height], "x", color=color, markersize=4, markeredgewidth=1.3)
        count = f"{point.diverged}/{point.diverged + len(point.losses)}" if point.losses else f"{point.diverged}"
        position = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
        label = "" if scale.crowded else count
        axes.annotate(label, (point.log2_lr, height), fontsize=fontsize, color=QUIET, **position)


def _valley(axes: Axes, optimum: Optimum, scale: _Scale, window: TransformedBbox) -> None:
    """What the runs of one size leave possible: its valley as a band, and a dotted line where its cliff begins."""
    if optimum.draws is None:
        return
    color, runs = SIZES(scale.shades[optimum.curve.size]), optimum.draws.runs
    log2_lrs, (low, _, high) = optimum.draws.band
    axes.fill_between(log2_lrs, low, high, color=color, alpha=0.25, linewidth=0, zorder=2).set_clip_box(window)
    if len(runs.cliff_x):
        begins = (runs.x[-1] + runs.wall) / 2
        last = runs.lowest + runs.y[-1]
        tick = min(runs.cliff_y[0] - runs.y[-1], CLIFF_TICK * (scale.high - scale.low))
        axes.plot([begins, begins], [last, last + tick], ":", color=color, linewidth=1.2, zorder=2)


def _optimum(axes: Axes, optimum: Optimum, row: int, scale: _Scale) -> None:
    """The interval of one size's optimum in a row of the lower strip; an end that no run bounds is an arrow."""
    color = SIZES(scale.shades[optimum.curve.size])
    height = scale.low + (row + 0.6) / (scale.optimum_rows + 0.2) * (scale.bottom - scale.low)
    left, right = axes.get_xlim()
    margin = 0.015 * (right - left)
    ends = [(optimum.low, left + margin, "<"), (optimum.high, right - margin, ">")]
    span = [edge if end is None else end for end, edge, _ in ends]
    axes.plot(span, [height] * 2, color=color, linewidth=1.6, zorder=5)
    for end, edge, arrow in ends:
        looks = {"marker": arrow, "markersize": 4} if end is None else {"marker": "|", "markersize": 5}
        axes.plot(edge if end is None else end, height, color=color, zorder=5, **looks)
    if optimum.log2_lr is not None:
        axes.plot(optimum.log2_lr, height, "D", markersize=4.5, mew=0.8, zorder=6, **_marker_colors(optimum, color))


def _lr_axis(axes: Axes, lrs: Sequence[float]) -> None:
    """Label the x axis, which all panels share, with powers of two."""
    low, high = min(lrs), max(lrs)
    step = next(s for s in (0.5, 1, 2, 4, 8, 16, 1000) if (high - low) / s <= 8)
    axes.xaxis.set_major_locator(MultipleLocator(step))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"$2^{{{x:zg}}}$"))
    pad = 0.06 * (high - low) or 0.5
    axes.set_xlim(low - pad, high + pad)


# Drift of the optimum


def _drift(groups: Sequence[LadderResult], style: FigureStyle) -> Figure:
    width, height = style.drift
    legend_names = [_drift_legend(g, groups, style.show_titles) for g in groups]
    legend_rows = sum(1 + name.count("\n") for name in legend_names)
    figure = Figure(figsize=(width, height + 0.22 * legend_rows * style.show_titles), layout=_layout())
    axes = figure.subplots()
    bounds = groups[0].bounds
    axes.axhline(0, color=QUIET, linewidth=0.8, zorder=1)
    lowest = highest = 0.0
    larger = fans(groups)
    for i, group in enumerate(groups):
        dodge = (i - (len(groups) - 1) / 2) * DODGE
        heights = _shifts(axes, group, dodge, GROUPS[i % 6], MARKERS[i % 6])
        heights += _fan(axes, larger[i], GROUPS[i % 6]) + _validated(axes, group, dodge, GROUPS[i % 6])
        lowest, highest = min(lowest, *heights), max(highest, *heights)
    axes.set_ylim(min(-0.8, lowest - 0.25), max(0.8, highest + 0.25))
    if all(shift == UNKNOWN for group in groups for shift in group.shifts):
        axes.text(0.5, 0.55, "unknown", transform=axes.transAxes, ha="center", color=QUIET)
    _ratio_axis(axes, groups, any(larger))
    doublings = np.linspace(*axes.get_xlim(), 101)
    tolerance = np.array([bounds.total(x) for x in doublings])
    axes.fill_between(doublings, -tolerance, tolerance, color=BAND, linewidth=0, zorder=0.5)
    axes.set_ylabel(
        "optimal LR relative to the base's (octaves)" if style.show_titles else "shift of the optimal LR (octaves)"
    )
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=GROUPS[i % 6], marker=MARKERS[i % 6], markersize=5.5, label=name)
        for i, name in enumerate(legend_names)
    ]
    if not all(_has_interval(shift) for g in groups for shift in g.shifts if shift.value is not None):
        handles.append(Line2D([], [], color=QUIET, marker="o", mfc="white", linestyle="", label="without an interval"))
    if any(larger):
        handles.append(Patch(color=QUIET, alpha=0.25, linewidth=0, label="forecast of a target"))
    if any(g.validations for g in groups):
        handles.append(Line2D([], [], color=QUIET, marker="*", markersize=9, linestyle="", label="measured there"))
    handles.append(Patch(color=BAND, label=f"tolerance, ±{bounds.octaves:g} octaves or more"))
    columns = 1 if style.show_titles else 2
    if not style.show_titles:
        figure.set_figheight(height + 0.16 * math.ceil(len(handles) / columns))
    figure.legend(handles=handles, loc="outside lower left", handlelength=2.4, ncols=columns)
    return figure


def _ratio_axis(axes: Axes, groups: Sequence[LadderResult], forecasts: bool) -> None:
    """Label the x axis, log2 of the ratio to the base."""
    names = size_ticks(groups, targets=True, forecasts=forecasts)
    gaps = np.diff([*names])
    if len(gaps) and gaps.min() < 0.1 * gaps.sum():  # labels would overlap
        axes.tick_params(axis="x", labelrotation=35)
    axes.xaxis.set_major_locator(FixedLocator([*names]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: names.get(x, "")))
    axes.set_xlim(min(names) - 0.25, max(names) + 0.25)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel(f"{axis_name(groups[0].axis)} (log scale)")


def _fan(axes: Axes, fan: Sequence[tuple[float, Estimate]], color: str) -> list[float]:
    """Draw where a ladder expects the optimum of larger sizes; returns the octaves that are drawn."""
    low, high = ([end for _, shift in fan if (end := getattr(shift, name)) is not None] for name in ("low", "high"))
    axes.fill_between([position for position, _ in fan], low, high, color=color, linewidth=0, alpha=0.14, zorder=1.5)
    return [*low, *high]


def _validated(axes: Axes, group: LadderResult, dodge: float, color: str) -> list[float]:
    """Draw what was forecast for trained targets as bars, and what came out; returns the octaves that are drawn."""
    heights = []
    for validation in group.validations:
        x = math.log2(group.ratio(validation.optimum.curve)) + dodge
        expected = from_base(validation.forecast.optimum, group)
        ends = [end for end in (expected.low, expected.high) if end is not None]
        axes.fill_between([x - DODGE, x + DODGE], min(ends), max(ends), color=color, linewidth=0, alpha=0.4)
        heights += ends
        heights += _shift(axes, x, from_base(validation.optimum.estimate, group), color, "*", 10)
    return heights


def _shifts(axes: Axes, group: LadderResult, dodge: float, color: str, marker: str) -> list[float]:
    """Draw one ladder's optima relative to its base; returns the octaves that are drawn."""
    heights, fitted = [0.0], []
    for optimum, shift in zip(group.optima, group.shifts, strict=True):
        x = math.log2(group.ratio(optimum.curve))
        heights += _shift(axes, x + dodge, shift, color, marker, 6.5)
        if optimum.known and shift.value is not None:
            fitted.append((x, shift.value))
    if group.drift.value is not None and fitted:
        xs, ys = np.array(fitted).T
        center, height = xs.mean(), ys.mean()  # through which the line of the slope passes
        ends = np.array([xs.min(), xs.max()])
        axes.plot(ends, height + group.drift.value * (ends - center), color=color, linewidth=1.6, alpha=0.55, zorder=2)
    return heights


def _shift(axes: Axes, x: float, shift: Estimate, color: str, marker: str, size: float) -> list[float]:
    """Draw an optimum relative to the base's, with what is known of its interval; returns the octaves drawn."""
    heights = [end for end in (shift.value, shift.low, shift.high) if end is not None]
    if shift.value is None:
        _bound(axes, x, shift.low, shift.high, color)
        return heights + [end + arrow for end, arrow in ((shift.low, 0.5), (shift.high, -0.5)) if end is not None]
    for end in (shift.low, shift.high):
        if end is not None:
            axes.plot([x, x], [shift.value, end], color=color, linewidth=1.4, zorder=3)
            axes.plot(x, end, "_", color=color, markersize=6, markeredgewidth=1.4, zorder=3)
    axes.plot(x, shift.value, marker, markersize=size, mew=0.8, zorder=4, **_marker_colors(shift, color))
    return heights


def _bound(axes: Axes, x: float, low: float | None, high: float | None, color: str) -> None:
    """Draw an optimum that is only bounded: an arrow away from the bound, or a dotted line between two."""
    if low is not None and high is not None:
        axes.plot([x, x], [low, high], color=color, linewidth=1.2, linestyle=":", marker="_", zorder=3)
        return
    for start, direction in ((low, 0.5), (high, -0.5)):
        if start is not None:
            arrow = {"arrowstyle": "-|>", "color": color, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (x, start + direction), (x, start), arrowprops=arrow, zorder=3)
            axes.plot(x, start, "_", color=color, markersize=9, markeredgewidth=1.6, zorder=3)


def _drift_legend(group: LadderResult, groups: Sequence[LadderResult], show_titles: bool) -> str:
    """A ladder's name, with its verdict and drift unless a caption is to give them."""
    name = variant_name(group.label, [g.label for g in groups])
    if show_titles:
        name = fill(f"{name}: {group.verdict}, {drift_text(group)}", LEGEND_CHARACTERS)
    return _plain(name)


# Shared by both figures


def _layout() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.09)


def _plain(text: str) -> str:
    """Text with typographic minus signs, in which a $ does not start mathematics."""
    return re.sub(r"-(?=\d)", "−", text).replace("$", r"\$")
