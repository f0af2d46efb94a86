"""One chart as SVG: its scales, its axes, and the marks on it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from mupsweep.analysis.estimate import Estimate


def minus(number: str) -> str:
    """A number with a typographic minus sign."""
    return number.replace("-", "−")


STAR = "M0-7L1.8-2.2 6.7-2.2 2.8.9 4.1 5.7 0 2.8-4.1 5.7-2.8.9-6.7-2.2-1.8-2.2Z"  # a path around the origin


class Plot:
    """A chart whose marks are added one after the other, and which `svg` closes.

    Attributes:
        xs, ys: ranges of the axes.
        title: name of the x axis.
        upper: height at which the largest y lies, below the strip for diverged runs.
        lower: height at which the smallest y lies, above the strip for optima.
        parts: SVG elements in the order of drawing.
    """

    WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 300, 50, 432, 8, 258

    def __init__(
        self, xs: tuple[float, float], ys: tuple[float, float], title: str, strip: float = 0.0, foot: float = 0.0
    ) -> None:
        self.xs, self.ys, self.title = xs, ys, title
        self.upper, self.lower = self.TOP + strip, self.BOTTOM - foot
        self.parts: list[str] = []
        if strip:
            self.band(self.TOP, self.upper)
            self.add(f'<text x="{self.LEFT + 5}" y="{self.TOP + 11}">diverged</text>')
        if foot:
            self.band(self.lower, self.BOTTOM)
            self.add(f'<text x="{self.LEFT + 5}" y="{self.lower + 12:.1f}">optimum</text>')

    def add(self, part: str) -> None:
        """Add an SVG element."""
        self.parts.append(part)

    def band(self, top: float, bottom: float) -> None:
        """Shade the plot between two heights."""
        width = self.RIGHT - self.LEFT
        self.add(f'<rect class="band" x="{self.LEFT}" y="{top}" width="{width}" height="{bottom - top:.1f}"/>')

    def clipped(self, parts: str) -> None:
        """Add lines that may leave the plot; a nested svg clips them at its edge."""
        x, y, w, h = self.LEFT, self.upper, self.RIGHT - self.LEFT, self.lower - self.upper
        box = f'x="{x}" y="{y}" width="{w}" height="{h}" viewBox="{x} {y} {w} {h}"'
        self.add(f'<svg {box} style="overflow:hidden">{parts}</svg>')

    def estimate(self, x: float, estimate: Estimate, tip: str, marker: str) -> None:
        """Add a value with its interval, or where there is no value its bounds.

        A value is hollow where an end of its interval is unknown; a single bound is an arrow away from it.
        """
        value, ends = estimate.value, [end for end in (estimate.low, estimate.high) if end is not None]
        if ends and (value is not None or len(ends) == 2):
            heights = [self.y(end) for end in (*ends, value) if end is not None]
            caps = "".join(f"M{x - 4:.1f} {self.y(end)}h8" for end in ends)
            bar_tip = f"{tip} " if value is None else ""
            self.add(f'<path class="bar" {bar_tip}d="{caps}M{x:.1f} {max(heights)}V{min(heights)}"/>')
        if value is not None:
            position = f'transform="translate({x:.1f} {self.y(value)})"'
            self.add(f'<path class="pt best{hollow(estimate)}" {tip} {position} d="{marker}"/>')
        if value is not None or len(ends) == 2:
            return
        for bound, sign in ((estimate.low, -1), (estimate.high, 1)):
            if bound is not None:
                y = self.y(bound)
                arrow = f"M{x - 5:.1f} {y}h10M{x:.1f} {y}v{18 * sign}m-4 {-5 * sign}l4 {5 * sign}l4 {-5 * sign}"
                self.add(f'<path class="bar" {tip} d="{arrow}"/>')

    def band_of(self, estimates: Sequence[tuple[float, Estimate]]) -> None:
        """Add the area between the ends of intervals, given with their x."""
        upper = [(x, e.high) for x, e in estimates if e.high is not None]
        lower = [(x, e.low) for x, e in reversed(estimates) if e.low is not None]
        if upper and lower:
            self.add(f'<path class="fan" d="{self.path([*upper, *lower])}Z"/>')

    def target(self, x: float, expected: Estimate, measured: Estimate, tip: str) -> None:
        """Add what was forecast as a broad bar, and what was measured as a star on it."""
        if expected.low is not None and expected.high is not None:
            top, bottom = self.y(expected.high), self.y(expected.low)
            self.add(f'<rect class="fit" {tip} x="{x - 5:.1f}" y="{top}" width="10" height="{bottom - top:.1f}"/>')
        self.estimate(x, measured, tip, STAR)

    def x(self, value: float) -> float:
        """Horizontal position of a value, in SVG units."""
        return round(self.LEFT + (value - self.xs[0]) / (self.xs[1] - self.xs[0]) * (self.RIGHT - self.LEFT), 1)

    def y(self, value: float) -> float:
        """Vertical position of a value, in SVG units."""
        return round(self.lower - (value - self.ys[0]) / (self.ys[1] - self.ys[0]) * (self.lower - self.upper), 1)

    def path(self, points: Iterable[tuple[float, float]]) -> str:
        """The `d` attribute of a line through points, or an empty string for no points."""
        line = "L".join(f"{self.x(x)} {self.y(y)}" for x, y in points)
        return f"M{line}" if line else ""

    def y_ticks(self) -> None:
        """Label the y axis with round numbers."""
        for value in round_numbers(*self.ys):
            y = self.y(value)
            self.add(f'<path class="grid" d="M{self.LEFT} {y}H{self.RIGHT}"/>')
            self.add(f'<text class="end" x="{self.LEFT - 6}" y="{y + 4:.1f}">{minus(f"{value:g}")}</text>')

    def x_ticks(self, ticks: Iterable[tuple[float, str]]) -> None:
        """Label the x axis at these values; labels may contain SVG."""
        for value, label in ticks:
            x = self.x(value)
            self.add(f'<path class="frame" d="M{x} {self.BOTTOM}v4"/>')
            self.add(f'<text class="middle" x="{x}" y="{self.BOTTOM + 17}">{label}</text>')

    def lr_ticks(self) -> None:
        """Label the x axis, log2 of the LR, with powers of two."""
        low, high = self.xs
        step = next(s for s in (0.5, 1, 2, 4, 8, 16, 1000) if (high - low) / s <= 9)
        lrs = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
        self.x_ticks((lr, f'2<tspan dy="-4" style="font-size:8.5px">{minus(f"{lr:g}")}</tspan>') for lr in lrs)

    def svg(self, label: str) -> str:
        """The whole chart; `label` describes it to screen readers."""
        middle = (self.LEFT + self.RIGHT) / 2
        return (
            f'<svg class="chart" viewBox="0 0 {self.WIDTH} {self.HEIGHT}" role="img" aria-label="{escape(label)}">'
            + "".join(self.parts)
            + f'<path class="frame" d="M{self.LEFT} {self.TOP}V{self.BOTTOM}H{self.RIGHT}"/>'
            f'<text class="name middle" x="{middle}" y="{self.HEIGHT - 6}">{escape(self.title)}</text></svg>'
        )


def hollow(estimate: Estimate) -> str:
    """The CSS class that draws a point without a complete interval hollow."""
    return " hollow" if estimate.low is None or estimate.high is None else ""


def round_numbers(low: float, high: float) -> list[float]:
    """About five round numbers within a range."""
    raw = (high - low) / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    return [round(k * step, 10) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tip_of(*lines: str) -> str:
    """The attribute with the lines that report.js shows where a point is hovered."""
    return f'data-tip="{escape(chr(10).join(lines))}"'
