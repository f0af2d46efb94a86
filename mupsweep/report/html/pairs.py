"""The loss over LR and another hyperparameter as SVG: a row of colours per value, the runs, the ridge, the optimum."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from html import escape

import numpy as np

from mupsweep.analysis.estimate import CONFIDENCE, UNKNOWN
from mupsweep.analysis.optimum import Optimum
from mupsweep.analysis.tuning import SizeTuning, Tuning, place_of, value_text
from mupsweep.report.html.svg import Plot, hollow, tip_of

LEVELS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)  # nats above the lowest loss of a size, where the colour changes
COLUMNS = 64  # of a row; neighbours of one colour are one rectangle
DIAMOND = "M0-6L6 0L0 6L-6 0Z"
MIN_ROWS = 3
NOTE = (
    "In the pictures a row of colours is the fitted curve of one value, between the rates that were trained (dots); "
    f"the line joins the best rates, and the diamond is the best pair with its {CONFIDENCE:.0%} intervals."
)


def panels(tunings: Iterable[Tuning]) -> str:
    """A picture per size with enough values, and what the colours mean; empty without any."""
    figures = [
        f'<figure class="pairs"><figcaption>{escape(_title(tuning, size))}</figcaption>'
        f"{pair_chart(tuning, size)}</figure>"
        for tuning in tunings
        for size in tuning.sizes
        if len(_rows(tuning, size)) >= MIN_ROWS
    ]
    return f'{_legend()}<div class="panels">{"".join(figures)}</div>' if figures else ""


def _title(tuning: Tuning, size: SizeTuning) -> str:
    horizon = "" if size.horizon is None else f", {size.horizon:,} tokens"
    return f"{tuning.names[1]}/{tuning.names[2]}, {tuning.hyperparameter} at {size.width}x{size.depth}{horizon}"


def pair_chart(tuning: Tuning, size: SizeTuning) -> str:
    """The losses of one size over log2 of the LR and of the value, as far as LRs were trained."""
    rows = _rows(tuning, size)
    places = [place for place, _, _ in rows]
    inner = [(a + b) / 2 for a, b in itertools.pairwise(places)]
    edges = [places[0] - (inner[0] - places[0]), *inner, places[-1] + (places[-1] - inner[-1])]
    lrs = [p.log2_lr for _, _, optimum in rows for p in optimum.curve.points]
    pad = 0.04 * (max(lrs) - min(lrs)) or 0.5
    plot = Plot((min(lrs) - pad, max(lrs) + pad), (edges[0], edges[-1]), "peak learning rate")
    lowest = min(loss.value for loss in size.losses.values() if loss.value is not None)
    for (_, _, optimum), low, high in zip(rows, edges[:-1], edges[1:], strict=True):
        for left, right, level in _cells(optimum, lowest):
            x, y = plot.x(left), plot.y(high)
            shape = f'x="{x}" y="{y}" width="{plot.x(right) - x:.1f}" height="{plot.y(low) - y:.1f}"'
            plot.add(f'<rect class="heat" fill-opacity="{_opacity(level)}" {shape}/>')
    for place, value, optimum in rows:
        y = plot.y(place)
        plot.add(f'<text class="end" x="{plot.LEFT - 6}" y="{y + 4:.1f}">{escape(value_text(value))}</text>')
        for p in optimum.curve.points:
            x, where = plot.x(p.log2_lr), f"{tuning.hyperparameter}={value_text(value)}, LR 2^{p.log2_lr:g}"
            if p.censored:
                tip = tip_of(where, "diverged")
                plot.add(f'<path class="pt cross" {tip} d="M{x - 3:.1f} {y - 3:.1f}l6 6m0-6l-6 6"/>')
            else:
                plot.add(f'<circle class="pt" {tip_of(where, f"loss {p.mean:.4f}")} cx="{x}" cy="{y}" r="2.4"/>')
    plot.lr_ticks()
    ridge = [(optimum.log2_lr, place) for place, _, optimum in rows if optimum.log2_lr is not None]
    plot.add(f'<path class="ridge" d="{plot.path(ridge)}"/>')
    _add_optimum(plot, tuning, size)
    name = f"width {size.width}, depth {size.depth}"
    return plot.svg(f"loss over learning rate and {tuning.hyperparameter}, {name}")


def _legend() -> str:
    """What the colours mean."""
    names = [f"below {LEVELS[0]:g}", *(f"{level:g}" for level in LEVELS)]
    keys = [
        f'<span><svg viewBox="0 0 14 14"><rect class="heat" width="14" height="14" fill-opacity="{_opacity(i)}"/></svg>'
        f" {name}</span>"
        for i, name in enumerate(names)
    ]
    return f'<p class="quiet heat-keys">nats above the lowest, from {" ".join(keys)}</p>'


def _opacity(level: int) -> float:
    """Of the rectangles of one level, the lowest losses the darkest."""
    return round(0.85 * (1 - level / (len(LEVELS) + 0.5)), 2)


def _rows(tuning: Tuning, size: SizeTuning) -> list[tuple[float, float | None, Optimum]]:
    """(octaves, value, optimum of the LR) of every value that has octaves, by rising value."""
    placed = ((place_of(tuning.hyperparameter, value), value, optimum) for value, optimum in size.optima.items())
    return sorted(((place, value, one) for place, value, one in placed if place is not None), key=lambda row: row[0])


def _cells(optimum: Optimum, lowest: float) -> Iterator[tuple[float, float, int]]:
    """(left, right, level) of the parts of a row where the fitted loss is at one level, within the trained LRs."""
    points = optimum.curve.usable
    if optimum.draws is None or len(points) < 2:
        return
    log2_lrs, (_, losses, _) = optimum.draws.band
    ends = np.linspace(points[0].log2_lr, points[-1].log2_lr, COLUMNS + 1)
    fitted = np.interp((ends[1:] + ends[:-1]) / 2, log2_lrs, losses)
    levels = np.searchsorted(LEVELS, fitted - lowest).tolist()
    left = 0
    for level, group in itertools.groupby(levels):
        right = left + len(list(group))
        yield float(ends[left]), float(ends[right]), level
        left = right


def _add_optimum(plot: Plot, tuning: Tuning, size: SizeTuning) -> None:
    """The optimum of the pair with the interval of each."""
    lr, value = UNKNOWN if size.ridge is None else size.ridge.log2_lr, size.minimum
    if lr.value is None or value.value is None:
        return
    octaves = value.map(partial(place_of, tuning.hyperparameter)).map(lambda end: min(max(end, plot.ys[0]), plot.ys[1]))
    assert octaves.value is not None
    x, y = plot.x(lr.value), plot.y(octaves.value)
    tip = tip_of("best pair", f"log2 LR {lr:.2f}", f"{tuning.hyperparameter} {value:.3g}")
    left, right = (plot.x(end) for end in (lr.low, lr.high) if end is not None)
    ends = zip((octaves.low, octaves.high), plot.ys, strict=True)
    bottom, top = (plot.y(edge if end is None else end) for end, edge in ends)
    plot.clipped(f'<path class="pair" d="M{left} {y}H{right}M{x} {bottom}V{top}"/>')
    plot.add(f'<path class="pt best{hollow(value)} optimum" {tip} transform="translate({x} {y})" d="{DIAMOND}"/>')
