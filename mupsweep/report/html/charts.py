"""The charts of the HTML report, as SVG. A point carries its values in data-tip, which report.js displays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import chain
from typing import Any

from mupsweep.analysis.analysis import Analysis
from mupsweep.analysis.curves import LossCurve, Point
from mupsweep.analysis.estimate import UNKNOWN, Estimate
from mupsweep.analysis.optimum import Optimum
from mupsweep.analysis.run_result import RunResult, Size
from mupsweep.analysis.transfer import LadderResult
from mupsweep.formatting import counted
from mupsweep.report.forecasts import fans, from_base, size_ticks
from mupsweep.report.html.svg import Plot, hollow, minus, round_numbers, tip_of
from mupsweep.report.names import (
    axis_name,
    loss_range,
    ordered_sizes,
    size_names,
    sorted_ladders,
    variant_name,
)

MAX_CURVE_POINTS = 80  # of a training curve: a panel can show no more
SMOOTHED_POINTS = 40  # means that a noisy curve is reduced to
MAX_SEED_POINTS = 2000  # of one loss curve, seed by seed: with more of them the page loads too slowly
CLIFF_TICK = 50  # height of the mark of a cliff at most, in SVG units
DIAMOND = "M0-5.5L5.5 0L0 5.5L-5.5 0Z"
MARKERS = (  # SVG paths around the origin, one per variant
    "M0-4.5A4.5 4.5 0 1 1 0 4.5A4.5 4.5 0 1 1 0-4.5Z",
    "M-4-4H4V4H-4Z",
    DIAMOND,
    "M0-5L5 4H-5Z",
    "M0 5L5-4H-5Z",
    "M-2-5H2V-2H5V2H2V5H-2V2H-5V-2H-2Z",
)


def estimate_text(estimate: Estimate, unit: str = "", spec: str = "+.2f") -> str:
    """A value with its interval and typographic minus signs, or the bounds that are known."""
    return "unknown" if estimate == UNKNOWN else f"{minus(f'{estimate:{spec}}')} {unit}".rstrip()


class Charts:
    """Draws an analysis; a size has one colour, and a variant one marker, on the whole page.

    Attributes:
        groups: ladders in the order of their variants.
        labels: labels of the variants; the page identifies a variant by its position in this list.
        names: name of every size, the smallest first.
        bounds: within which an optimum may move.
        several_axes: whether ladders run along several axes, so that the variant alone does not identify one.
    """

    def __init__(self, analysis: Analysis) -> None:
        self.groups = sorted_ladders(analysis.groups)
        self.bounds = analysis.config.verdict
        self.labels = list(dict.fromkeys(g.label for g in self.groups))
        sizes = ordered_sizes(self.groups)
        self.names = dict(zip(sizes, size_names(list(sizes)), strict=True))
        self.several_axes = len({g.axis for g in self.groups}) > 1
        ends = chain(*((e.low, e.value, e.high) for e in (g.total_drift for g in self.groups)))
        self._reach = 1.15 * max([1.0, *(abs(x) for x in ends if x is not None)])

    def variant(self, group: LadderResult) -> str:
        """The name of a ladder's variant."""
        return variant_name(group.label, self.labels)

    def name(self, curve: LossCurve) -> str:
        """The name of a size, such as width 64, depth 8, 64x8 or 400k tokens."""
        return self.names[curve.size]

    def number(self, curve: LossCurve) -> str:
        """The name of a size without its quantity, such as 64, 8, 64x8 or 400k, where an axis names that."""
        return self.name(curve).removeprefix("width ").removeprefix("depth ").removesuffix(" tokens")

    def shade(self, size: Size) -> str:
        """The attribute that places a size between the colours of the smallest and the largest."""
        return f'style="--t:{100 * list(self.names).index(size) / max(1, len(self.names) - 1):.0f}%"'

    def keys(self, groups: Sequence[LadderResult]) -> str:
        """The legend: markers and names of the variants that these ladders have."""
        labels = {g.label for g in groups}
        keys = []
        for i, label in enumerate(self.labels):
            if label in labels:
                keys.append(
                    f'<span class="v{i % 6}" data-variant="{i}"><svg viewBox="-7 -7 14 14">'
                    f'<path class="pt" d="{MARKERS[i % 6]}"/></svg> {escape(variant_name(label, self.labels))}</span>'
                )
        return "".join(keys)

    def bar(self, drift: Estimate, tolerance: float) -> str:
        """A drift beside the tolerance; all bars of the page have one scale."""

        def at(octaves: float) -> float:
            return round(150 + octaves / self._reach * 140, 1)

        width = f"{280 * tolerance / self._reach:.1f}"
        parts = [f'<rect class="band" x="{at(-tolerance)}" y="2" width="{width}" height="20"/>']
        parts.append(f'<path class="frame" d="M10 22H290M{at(0)} 2V22"/>')
        step = math.ceil(self._reach / 4)
        last = math.floor(self._reach / step) * step
        for k in range(-last, last + 1, step):
            label = minus(f"{k:+d}") if k else "0"
            parts.append(f'<text class="middle" x="{at(k)}" y="34">{label}</text>')
        if drift.low is not None or drift.high is not None:
            low = -self._reach if drift.low is None else drift.low
            high = self._reach if drift.high is None else drift.high
            # an unknown end is an arrow to the edge of the bar
            arrows = ("M16 8l-6 4l6 4" if drift.low is None else "") + ("M284 8l6 4l-6 4" if drift.high is None else "")
            parts.append(f'<path class="range" d="M{at(low)} 12H{at(high)}{arrows}"/>')
        if drift.value is not None:
            parts.append(f'<circle class="dot{hollow(drift)}" cx="{at(drift.value)}" cy="12" r="5.5"/>')
        label = f"total drift: {estimate_text(drift, 'octaves')}"
        return f'<svg class="chart" viewBox="0 0 300 38" role="img" aria-label="{label}">{"".join(parts)}</svg>'

    def curves(self, group: LadderResult, family: Sequence[LadderResult]) -> str:
        """Loss versus LR of one ladder; the ladders of `family` share their axes, for comparison by eye."""
        optima = [o for g in family for o in g.optima]
        curves = [o.curve for o in optima]
        lrs = [p.log2_lr for c in curves for p in c.points]
        pad = 0.06 * (max(lrs) - min(lrs)) or 0.5
        unstable = {c.size for c in curves if c.n_diverged}
        diverged = [size for size in self.names if size in unstable]
        # every size with diverged runs has a row of crosses
        pitch = min(9.0, 64 / max(1, len(diverged)))
        strip = pitch * len(diverged) + 4 if diverged else 0.0
        # and every size of a ladder a row for the interval of its optimum
        bounded = [[o for o in g.optima if o.low is not None or o.high is not None] for g in family]
        rows = max(map(len, bounded))
        foot = min(11.0, 80 / max(1, rows))
        xs, depth = (min(lrs) - pad, max(lrs) + pad), foot * rows + 4 if rows else 0.0
        plot = Plot(xs, loss_range(optima), "peak learning rate", strip, depth)
        row_of = {o.curve.size: i for i, o in enumerate(bounded[family.index(group)])}
        plot.y_ticks()
        plot.lr_ticks()
        base = group.base
        if base.log2_lr is not None:
            plot.add(f'<path class="base" d="M{plot.x(base.log2_lr)} {plot.TOP}V{plot.BOTTOM}"/>')
        for optimum in group.optima:
            size = optimum.curve.size
            row = diverged.index(size) if size in diverged else 0
            plot.add(self._group(size))
            self._points(plot, optimum, plot.upper - pitch * (row + 0.5) - 2)
            if size in row_of:
                self._best(plot, optimum, plot.lower + foot * (row_of[size] + 0.5) + 2)
            plot.add("</g>")
        return plot.svg(f"loss versus learning rate, {self.variant(group)}")

    def _points(self, plot: Plot, optimum: Optimum, cross_height: float) -> None:
        """Trained losses of one size, the valleys that they leave possible, and where its cliff begins."""
        curve, draws = optimum.curve, optimum.draws
        wall = math.inf if draws is None else draws.runs.wall
        points = [p for p in curve.usable if math.isfinite(p.mean)]
        line = f'<path class="line" d="{plot.path((p.log2_lr, p.mean) for p in points if p.log2_lr < wall)}"/>'
        if draws is not None:
            log2_lrs, (low, _, high) = (values.tolist() for values in draws.band)
            outline = [*zip(log2_lrs, low, strict=True), *zip(log2_lrs[::-1], high[::-1], strict=True)]
            line = f'<path class="fit" d="{plot.path(outline)}Z"/>{line}'
            if len(draws.runs.cliff_x):
                begins, last = (draws.runs.x[-1] + wall) / 2, draws.runs.lowest + draws.runs.y[-1]
                top = max(plot.y(last) - CLIFF_TICK, plot.y(min(last - draws.runs.y[-1] + draws.runs.cliff_y[0], 1e9)))
                line += f'<path class="cliff" d="M{plot.x(begins)} {plot.y(last)}V{top}"/>'
        bars = [(plot.x(p.log2_lr), p.mean, p.sem) for p in points if p.sem is not None and p.mean <= plot.ys[1]]
        line += "".join(f'<path class="bar" d="M{x} {plot.y(m - sem)}V{plot.y(m + sem)}"/>' for x, m, sem in bars)
        plot.clipped(line)
        self._seeds(plot, curve)
        for p in curve.points:
            x, tip = plot.x(p.log2_lr), tip_of(self.name(curve), *_facts(p))
            looks = "pt" if p.log2_lr < wall else "pt hollow"
            if p.censored:
                plot.add(f'<path class="pt cross" {tip} d="M{x - 3:.1f} {cross_height - 3}l6 6m0-6l-6 6"/>')
            elif p in points and p.mean > plot.ys[1]:
                plot.add(f'<path class="{looks}" {tip} transform="translate({x} {plot.upper + 5})" d="M0-5L4 3H-4Z"/>')
            elif p in points:
                plot.add(f'<circle class="{looks}" {tip} cx="{x}" cy="{plot.y(p.mean)}" r="2.8"/>')

    def _seeds(self, plot: Plot, curve: LossCurve) -> None:
        """The losses of every single seed, hidden until the user asks for them."""
        seeds, all_seeds = drawn_seeds(curve)
        if len(all_seeds) < 2:
            return
        plot.add('<g class="off" data-seeds="each">')
        for seed in seeds:
            losses = [(p.log2_lr, p.losses[seed]) for p in curve.points if seed in p.losses]
            plot.clipped(f'<path class="faint" d="{plot.path(losses)}"/>')
            for lr, loss in losses:
                if plot.ys[0] <= loss <= plot.ys[1]:
                    tip = tip_of(f"{self.name(curve)}, seed {seed}", f"LR 2^{lr:g}", f"loss {loss:.4f}")
                    plot.add(f'<circle class="pt" {tip} cx="{plot.x(lr)}" cy="{plot.y(loss)}" r="1.6"/>')
        plot.add("</g>")

    def _best(self, plot: Plot, optimum: Optimum, height: float) -> None:
        """The interval of an optimum in a row of its own; an end that no run bounds is an arrow."""
        log2_lr = optimum.estimate
        low, high = plot.LEFT + 4.0, plot.RIGHT - 4.0
        arrows = ("" if log2_lr.low is not None else f"M{low + 5} {height - 3:.1f}l-5 3l5 3") + (
            "" if log2_lr.high is not None else f"M{high - 5} {height - 3:.1f}l5 3l-5 3"
        )
        low, high = (edge if end is None else plot.x(end) for end, edge in ((log2_lr.low, low), (log2_lr.high, high)))
        caps = "".join(
            f"M{x} {height - 3:.1f}v6" for x, end in ((low, log2_lr.low), (high, log2_lr.high)) if end is not None
        )
        said = [f"best rate log2 {estimate_text(log2_lr, spec='.2f')}"]
        if optimum.log2_lr is not None:
            said = [f"best rate {2**optimum.log2_lr:.3g}, log2 {estimate_text(log2_lr, spec='.2f')}"]
            said += [f"loss {estimate_text(optimum.loss, spec='.4f')}"]
        tip = tip_of(self.name(optimum.curve), *said)
        plot.add(f'<path class="bar" {tip} d="M{low} {height:.1f}H{high}{caps}{arrows}"/>')
        if optimum.log2_lr is not None:
            place = f'transform="translate({plot.x(optimum.log2_lr)} {height:.1f})"'
            plot.add(f'<path class="pt best{hollow(log2_lr)}" {tip} {place} d="M0-4.5L4.5 0L0 4.5L-4.5 0Z"/>')

    def ladder(
        self,
        groups: Sequence[LadderResult],
        values: Sequence[Sequence[Estimate]],
        tolerance: Callable[[float], float],
        unit: str,
    ) -> str:
        """An estimate per size of every ladder against the ratio of its axis.

        Args:
            groups: ladders along one axis.
            values: for every ladder an estimate per size.
            tolerance: half height of the shaded band, so many doublings from the base.
            unit: octaves, which are signed and have forecasts, or nats, which are never negative.
        """
        octaves = unit == "octaves"
        larger = fans(groups) if octaves else [[] for _ in groups]
        targets = [self._targets(group) if octaves else [] for group in groups]
        beyond = [shift for _, shift in chain(*larger)] + [e for _, *both in chain(*targets) for e in both]
        numbers = [v for e in (*chain(*values), *beyond) for v in (e.value, e.low, e.high) if v is not None]
        least = 1.5 * tolerance(0.0)
        top = max([least, *numbers])
        low = min([-least, *numbers]) if octaves else 0.0
        margin = 0.12 * (top - low)  # enough for the arrows of bounds
        names = size_ticks(groups, targets=octaves, forecasts=any(larger))
        xs = (min(names) - 0.3, max(names) + 0.3)
        plot = Plot(xs, (low - margin * octaves, top + margin), axis_name(groups[0].axis))
        places = [xs[0] + (xs[1] - xs[0]) * i / 24 for i in range(25)]
        upper = [(x, tolerance(x)) for x in places]
        lower = [(x, -height * octaves) for x, height in reversed(upper)]
        plot.clipped(f'<path class="band" d="{plot.path([*upper, *lower])}Z"/>')
        plot.y_ticks()
        apart = -math.inf
        for at, name in names.items():  # a label that would overlap the last one is left out
            if plot.x(at) - apart > 6 * len(name) + 8:
                plot.x_ticks([(at, name)])
                apart = plot.x(at)
        if not numbers:
            plot.add(f'<text class="middle" x="{(plot.LEFT + plot.RIGHT) / 2}" y="{plot.y(0) - 6}">unknown</text>')
        for i, (group, estimates) in enumerate(zip(groups, values, strict=True)):
            variant = self.labels.index(group.label)
            dodge = (i - (len(groups) - 1) / 2) * 7  # ladders stand side by side at each size
            plot.add(f'<g class="v{variant % 6}" data-variant="{variant}">')
            plot.band_of(larger[i])
            for curve, expected, measured in targets[i]:
                x = plot.x(math.log2(group.ratio(curve))) + dodge
                tip = tip_of(
                    f"{self.variant(group)}, {curve.place(group.axis)}, trained to test the forecast",
                    f"forecast {estimate_text(expected, unit)}",
                    f"measured {estimate_text(measured, unit)}",
                )
                plot.target(x, expected, measured, tip)
            line = []
            for optimum, estimate in zip(group.optima, estimates, strict=True):
                x = plot.x(math.log2(group.ratio(optimum.curve))) + dodge
                if estimate.value is not None:
                    line.append(f"{x:.1f} {plot.y(estimate.value)}")
                value = estimate_text(estimate, unit, "+.2f" if octaves else ".4f")
                tip = tip_of(f"{self.variant(group)}, {self.name(optimum.curve)}", value)
                plot.estimate(x, estimate, tip, MARKERS[variant % 6])
            if len(line) > 1:
                plot.add(f'<path class="faint" d="M{"L".join(line)}"/>')
            plot.add("</g>")
        return plot.svg(f"{unit} by size")

    def _targets(self, group: LadderResult) -> list[tuple[LossCurve, Estimate, Estimate]]:
        """Targets that were trained, with the forecast and the optimum that came out, in octaves from the base's."""
        return [
            (v.optimum.curve, from_base(v.forecast.optimum, group), from_base(v.optimum.estimate, group))
            for v in group.validations
        ]

    def training(self, runs: Iterable[tuple[Size, RunResult, Sequence[Mapping[str, Any]]]]) -> str:
        """Loss by step of runs given as (size, result, metrics), or an empty string where no loss was logged."""
        series = []
        for size, result, log in runs:
            series.append((size, result, _smooth(_column(log, "train_loss")), _column(log, "val_loss")))
        points = [point for _, _, train, val in series for point in chain(train, val)]
        if not points:
            return ""
        last = max(step for step, _ in points)
        # the first steps fall from log(vocabulary) and would flatten the rest of the curve
        settled = [loss for step, loss in points if step >= 0.1 * last]
        low, high = min(settled), max(settled)
        pad = 0.05 * (high - low) or 0.01
        plot = Plot((0, last), (low - pad, high + pad), "step")
        plot.y_ticks()
        plot.x_ticks((t, f"{t:g}") for t in round_numbers(0, last))
        for size, result, train, val in series:
            plot.add(self._group(size))
            smooth, line = plot.path(train), plot.path(_thin(val))
            plot.clipped(f'<path class="smooth" d="{smooth}"/><path class="line" d="{line}"/>')
            for step, loss in _thin(val):
                if loss <= plot.ys[1]:
                    run = f"{self.names[size]}, LR 2^{result.log2_lr:g}, seed {result.seed}"
                    tip = tip_of(run, f"step {step:g}: {loss:.4f}")
                    plot.add(f'<circle class="pt" {tip} cx="{plot.x(step)}" cy="{plot.y(loss)}" r="2.4"/>')
            plot.add("</g>")
        return plot.svg("loss by training step")

    def _group(self, size: Size) -> str:
        return f'<g data-size="{size_id(size)}" {self.shade(size)}>'


def drawn_seeds(curve: LossCurve) -> tuple[list[int], list[int]]:
    """The seeds of a loss curve that are drawn one by one, and all its seeds."""
    seeds = sorted({seed for p in curve.points for seed in p.losses})
    return seeds[: max(1, MAX_SEED_POINTS // max(1, len(curve.points)))], seeds


def size_id(size: Size) -> str:
    """The value by which buttons find all elements of a size."""
    return "x".join(str(number) for number in size if number is not None)


def _facts(point: Point) -> Iterable[str]:
    """The lines of the tip at a point of a loss curve."""
    yield f"LR 2^{point.log2_lr:g} = {2**point.log2_lr:.3g}"
    if point.diverged:
        yield f"{point.diverged} of {counted(point.diverged + len(point.losses), 'seed')} diverged"
    if point.losses:
        yield f"loss {point.mean:.4f}" + ("" if point.sem is None else f" ± {point.sem:.4f} (standard error)")
        yield counted(len(point.losses), "seed")


def _column(metrics: Iterable[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) wherever a finite value was logged."""
    pairs = []
    for row in metrics:
        step, value = row.get("step"), row.get(key)
        if step is not None and value is not None and math.isfinite(value):
            pairs.append((step, value))
    return pairs


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """About SMOOTHED_POINTS means over neighbouring steps, since the losses of single batches show only noise."""
    width = math.ceil(len(points) / SMOOTHED_POINTS) or 1
    parts = (points[i : i + width] for i in range(0, len(points), width))
    return [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts]


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_CURVE_POINTS points, always with the last one."""
    stride = math.ceil(len(points) / MAX_CURVE_POINTS) or 1
    return [p for i, p in enumerate(points) if (len(points) - 1 - i) % stride == 0]
