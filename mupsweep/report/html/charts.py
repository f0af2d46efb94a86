"""The charts of the HTML report, as SVG. A point carries its values in data-tip, which report.js shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import chain
from typing import Any

from mupsweep.analysis.curves import LossCurve, Point, Size
from mupsweep.analysis.estimate import UNKNOWN, Estimate
from mupsweep.analysis.optimum import Optimum
from mupsweep.analysis.transfer import TOLERANCE_OCTAVES, Analysis, LadderResult, loss_of
from mupsweep.formatting import counted
from mupsweep.report.html.svg import Plot, hollow, minus, round_numbers, tip_of
from mupsweep.report.names import axis_name, in_order, loss_range, ordered_sizes, size_names, variant_name

THINNED = 80  # points of a training curve: more than a panel can show
SMOOTHED = 40  # means that a noisy curve is reduced to
SEED_POINTS = 2000  # of one loss curve, seed by seed: more make a page that nobody waits for
DIAMOND = "M0-5.5L5.5 0L0 5.5L-5.5 0Z"
MARKERS = (  # paths around the origin, one per variant
    "M0-4.5A4.5 4.5 0 1 1 0 4.5A4.5 4.5 0 1 1 0-4.5Z",
    "M-4-4H4V4H-4Z",
    DIAMOND,
    "M0-5L5 4H-5Z",
    "M0 5L5-4H-5Z",
    "M-2-5H2V-2H5V2H2V5H-2V2H-5V-2H-2Z",
)


def words(estimate: Estimate, unit: str = "", spec: str = "+.2f") -> str:
    """A value with its interval, or the bound there is, typeset."""
    return "unknown" if estimate == UNKNOWN else f"{minus(f'{estimate:{spec}}')} {unit}".rstrip()


class Charts:
    """Draws an analysis; sizes share their colours, and variants their markers, on the whole page.

    Attributes:
        groups: as people compare them.
        labels: of the variants; a variant is known to the page by its place in this list.
        names: of the sizes, the smallest first.
        several_axes: whether a group's variant does not yet tell which group it is.
    """

    def __init__(self, analysis: Analysis) -> None:
        self.groups = in_order(analysis.groups)
        self.labels = list(dict.fromkeys(g.label for g in self.groups))
        sizes = ordered_sizes(self.groups)
        self.names = dict(zip(sizes, size_names(list(sizes)), strict=True))
        self.several_axes = len({g.axis for g in self.groups}) > 1
        ends = chain(*((e.low, e.value, e.high) for e in (g.total_drift for g in self.groups)))
        self._reach = 1.15 * max([1.0, *(abs(x) for x in ends if x is not None)])

    def variant(self, group: LadderResult) -> str:
        """The name of a group's variant."""
        return variant_name(group.label, self.labels)

    def name(self, curve: LossCurve) -> str:
        """A size: width 64, depth 8, 64x8 or 400k tokens."""
        return self.names[curve.size]

    def number(self, curve: LossCurve) -> str:
        """A size where it is known what is meant: 64, 8, 64x8 or 400k."""
        return self.name(curve).removeprefix("width ").removeprefix("depth ").removesuffix(" tokens")

    def shade(self, size: Size) -> str:
        """Where a size lies between the colours of the smallest and the largest."""
        return f'style="--t:{100 * list(self.names).index(size) / max(1, len(self.names) - 1):.0f}%"'

    def keys(self, groups: Sequence[LadderResult]) -> str:
        """The markers of the variants."""
        drawn = {g.label for g in groups}
        return "".join(
            f'<span class="v{i % 6}" data-variant="{i}"><svg viewBox="-7 -7 14 14">'
            f'<path class="pt" d="{MARKERS[i % 6]}"/></svg> {escape(variant_name(label, self.labels))}</span>'
            for i, label in enumerate(self.labels)
            if label in drawn
        )

    def bar(self, drift: Estimate) -> str:
        """A drift against the tolerance; all bars of the page have one scale."""

        def at(octaves: float) -> float:
            return round(150 + octaves / self._reach * 140, 1)

        width = f"{280 * TOLERANCE_OCTAVES / self._reach:.1f}"
        parts = [f'<rect class="band" x="{at(-TOLERANCE_OCTAVES)}" y="2" width="{width}" height="20"/>']
        parts.append(f'<path class="frame" d="M10 22H290M{at(0)} 2V22"/>')
        step = math.ceil(self._reach / 4)
        last = math.floor(self._reach / step) * step
        for k in range(-last, last + 1, step):
            label = minus(f"{k:+d}") if k else "0"
            parts.append(f'<text class="middle" x="{at(k)}" y="34">{label}</text>')
        known = [end is not None for end in (drift.low, drift.high)]
        if any(known):
            low, high = at(-self._reach if drift.low is None else drift.low), drift.high
            arrows = ("" if known[0] else "M16 8l-6 4l6 4") + ("" if known[1] else "M284 8l6 4l-6 4")  # open ends
            parts.append(f'<path class="range" d="M{low} 12H{at(self._reach if high is None else high)}{arrows}"/>')
        if drift.value is not None:
            parts.append(f'<circle class="dot{hollow(drift)}" cx="{at(drift.value)}" cy="12" r="5.5"/>')
        label = f"total drift: {words(drift, 'octaves')}"
        return f'<svg class="chart" viewBox="0 0 300 38" role="img" aria-label="{label}">{"".join(parts)}</svg>'

    def curves(self, group: LadderResult, family: Sequence[LadderResult]) -> str:
        """Loss versus LR; the groups of a family share their axes, so that they can be compared by eye."""
        optima = [o for g in family for o in g.optima]
        curves = [o.curve for o in optima]
        lrs = [p.log2_lr for c in curves for p in c.points]
        pad = 0.06 * (max(lrs) - min(lrs)) or 0.5
        unstable = {c.size for c in curves if c.n_diverged}
        diverged = [size for size in self.names if size in unstable]
        pitch = min(9.0, 64 / max(1, len(diverged)))  # of the rows of crosses, one per size
        strip = pitch * len(diverged) + 4 if diverged else 0.0
        plot = Plot((min(lrs) - pad, max(lrs) + pad), loss_range(optima), "peak learning rate", strip)
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
            self._best(plot, optimum)
            plot.add("</g>")
        return plot.svg(f"loss versus learning rate, {self.variant(group)}")

    def _points(self, plot: Plot, optimum: Optimum, strip: float) -> None:
        """What was trained, and the expected loss around the minimum."""
        curve, made = optimum.curve, optimum.posterior
        points = [p for p in curve.usable if math.isfinite(p.mean)]
        line = f'<path class="line" d="{plot.path((p.log2_lr, p.mean) for p in points)}"/>'
        if made is not None:
            expected = zip(made.grid.tolist(), made.mean.tolist(), strict=True)
            line = f'<path class="fit" d="{plot.path(expected)}"/>{line}'
        bars = [(plot.x(p.log2_lr), p.mean, p.sem) for p in points if p.sem is not None and p.mean <= plot.ys[1]]
        line += "".join(f'<path class="bar" d="M{x} {plot.y(m - sem)}V{plot.y(m + sem)}"/>' for x, m, sem in bars)
        plot.clipped(line)
        self._seeds(plot, curve)
        for p in curve.points:
            x, tip = plot.x(p.log2_lr), tip_of(self.name(curve), *_facts(p))
            if p.censored:
                plot.add(f'<path class="pt cross" {tip} d="M{x - 3:.1f} {strip - 3}l6 6m0-6l-6 6"/>')
            elif p in points and p.mean > plot.ys[1]:
                plot.add(f'<path class="pt" {tip} transform="translate({x} {plot.upper + 5})" d="M0-5L4 3H-4Z"/>')
            elif p in points:
                plot.add(f'<circle class="pt" {tip} cx="{x}" cy="{plot.y(p.mean)}" r="2.8"/>')

    def _seeds(self, plot: Plot, curve: LossCurve) -> None:
        """Every seed's own losses, hidden until they are asked for."""
        shown, every = drawn_seeds(curve)
        if len(every) < 2:
            return
        plot.add('<g class="off" data-seeds="each">')
        for seed in shown:
            losses = [(p.log2_lr, p.losses[seed]) for p in curve.points if seed in p.losses]
            plot.clipped(f'<path class="faint" d="{plot.path(losses)}"/>')
            for lr, loss in losses:
                if plot.ys[0] <= loss <= plot.ys[1]:
                    tip = tip_of(f"{self.name(curve)}, seed {seed}", f"LR 2^{lr:g}", f"loss {loss:.4f}")
                    plot.add(f'<circle class="pt" {tip} cx="{plot.x(lr)}" cy="{plot.y(loss)}" r="1.6"/>')
        plot.add("</g>")

    def _best(self, plot: Plot, optimum: Optimum) -> None:
        """The fitted minimum and its interval."""
        if optimum.log2_lr is None or optimum.loss is None:
            return
        x, y = plot.x(optimum.log2_lr), plot.y(optimum.loss)
        at = Estimate(optimum.log2_lr, optimum.low, optimum.high)
        if ends := [plot.x(end) for end in (at.low, at.high) if end is not None]:
            caps = "".join(f"M{end} {y - 4:.1f}v8" for end in ends)
            plot.add(f'<path class="interval" d="M{min(x, *ends)} {y}H{max(x, *ends)}{caps}"/>')
        rate, loss = f"{2**optimum.log2_lr:.3g}, log2 {words(at, spec='.2f')}", words(loss_of(optimum), spec=".4f")
        tip = tip_of(f"{self.name(optimum.curve)}: best rate", rate, f"loss {loss}")
        plot.add(f'<path class="pt best{hollow(at)}" {tip} transform="translate({x} {y})" d="{DIAMOND}"/>')

    def ladder(
        self, groups: Sequence[LadderResult], values: Sequence[Sequence[Estimate]], tolerance: float, unit: str
    ) -> str:
        """An estimate per size of every group over the axis's ratio: octaves, or nats, which are never negative."""
        octaves = unit == "octaves"
        known = [v for e in chain(*values) for v in (e.value, e.low, e.high) if v is not None]
        top = max([tolerance * 1.5, *known])
        low = min([-tolerance * 1.5, *known]) if octaves else 0.0
        room = 0.12 * (top - low)  # for the arrows of bounds too
        at = {math.log2(g.ratio(o.curve)): o.curve for g in groups for o in g.optima}
        plot = Plot((min(at) - 0.3, max(at) + 0.3), (low - room * octaves, top + room), axis_name(groups[0].axis))
        plot.band(plot.y(tolerance), plot.y(-tolerance if octaves else 0.0))
        plot.y_ticks()
        plot.x_ticks((x, self.number(curve)) for x, curve in at.items())
        if not known:
            plot.add(f'<text class="middle" x="{(plot.LEFT + plot.RIGHT) / 2}" y="{plot.y(0) - 6}">unknown</text>')
        for nth, (group, estimates) in enumerate(zip(groups, values, strict=True)):
            variant = self.labels.index(group.label)
            plot.add(f'<g class="v{variant % 6}" data-variant="{variant}">')
            line = []
            for optimum, estimate in zip(group.optima, estimates, strict=True):
                x = plot.x(math.log2(group.ratio(optimum.curve))) + (nth - (len(groups) - 1) / 2) * 7  # side by side
                if estimate.value is not None:
                    line.append(f"{x:.1f} {plot.y(estimate.value)}")
                value = words(estimate, unit, "+.2f" if octaves else ".4f")
                tip = tip_of(f"{self.variant(group)}, {self.name(optimum.curve)}", value)
                plot.estimate(x, estimate, tip, MARKERS[variant % 6])
            if len(line) > 1:
                plot.add(f'<path class="faint" d="M{"L".join(line)}"/>')
            plot.add("</g>")
        return plot.svg(f"{unit} by size")

    def training(self, runs: Iterable[tuple[Size, Mapping[str, Any], Sequence[Mapping[str, Any]]]]) -> str:
        """Loss by step of some runs, each with its size, its row and its metrics; nothing where none was logged."""
        series = [(size, row, _smooth(_column(log, "train_loss")), _column(log, "val_loss")) for size, row, log in runs]
        every = [point for _, _, train, val in series for point in chain(train, val)]
        if not every:
            return ""
        last = max(step for step, _ in every)
        # the first steps fall from log(vocabulary): they would take all the room
        settled = [loss for step, loss in every if step >= 0.1 * last]
        low, high = min(settled), max(settled)
        pad = 0.05 * (high - low) or 0.01
        plot = Plot((0, last), (low - pad, high + pad), "step")
        plot.y_ticks()
        plot.x_ticks((t, f"{t:g}") for t in round_numbers(0, last))
        for size, row, train, val in series:
            plot.add(self._group(size))
            lines = {"smooth": train, "line": _thin(val)}
            plot.clipped("".join(f'<path class="{k}" d="{plot.path(v)}"/>' for k, v in lines.items()))
            for step, loss in _thin(val):
                if loss <= plot.ys[1]:
                    run = f"{self.names[size]}, LR 2^{row['log2_lr']:g}, seed {row['seed']}"
                    tip = tip_of(run, f"step {step:g}: {loss:.4f}")
                    plot.add(f'<circle class="pt" {tip} cx="{plot.x(step)}" cy="{plot.y(loss)}" r="2.4"/>')
            plot.add("</g>")
        return plot.svg("loss by training step")

    def _group(self, size: Size) -> str:
        return f'<g data-size="{size_id(size)}" {self.shade(size)}>'


def drawn_seeds(curve: LossCurve) -> tuple[list[int], list[int]]:
    """The seeds of a loss curve that are drawn, and all it has."""
    every = sorted({seed for p in curve.points for seed in p.losses})
    return every[: max(1, SEED_POINTS // max(1, len(curve.points)))], every


def size_id(size: Size) -> str:
    """What marks all that is drawn of a size, for the buttons."""
    return "x".join(str(number) for number in size if number is not None)


def _facts(point: Point) -> Iterable[str]:
    """What is known of a point of a loss curve."""
    yield f"LR 2^{point.log2_lr:g} = {2**point.log2_lr:.3g}"
    if point.diverged:
        yield f"{point.diverged} of {counted(point.diverged + len(point.losses), 'seed')} diverged"
    if point.losses:
        yield f"loss {point.mean:.4f}" + ("" if point.sem is None else f" ± {point.sem:.4f} (standard error)")
        yield counted(len(point.losses), "seed")


def _column(metrics: Iterable[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) wherever a value was logged."""
    pairs = ((row.get("step"), row.get(key)) for row in metrics)
    return [(step, v) for step, v in pairs if step is not None and v is not None and math.isfinite(v)]


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of neighbouring steps, SMOOTHED of them: of single batches one sees the noise only."""
    width = math.ceil(len(points) / SMOOTHED) or 1
    parts = (points[i : i + width] for i in range(0, len(points), width))
    return [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts]


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most THINNED points, the last one always."""
    stride = math.ceil(len(points) / THINNED) or 1
    return [p for i, p in enumerate(points) if (len(points) - 1 - i) % stride == 0]
