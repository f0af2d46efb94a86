"""Loss versus LR in the terminal, drawn with braille characters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from rich.text import Text

from mupsweep.analysis.curves import LossCurve
from mupsweep.analysis.estimate import Estimate
from mupsweep.analysis.optimum import Optimum
from mupsweep.report.names import loss_range, size_names, variant_name

# colours of the terminal's theme, readable on any background
COLORS = ("cyan", "blue", "magenta", "red", "yellow", "green")
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # bits of a braille cell by (column, row)
Cell = tuple[str, str]  # character, style


def curve_text(optima: Sequence[Optimum], width: int = 72, height: int = 14, fitted: bool = True) -> Text:
    """Loss versus log2 LR of several sizes.

    Every size is a letter at its seed means and its capital letter at the fitted optimum; in the top row `x` is
    an LR with a diverged seed and `^` a loss above the axis. The plot is readable without colours.

    Args:
        optima: the optimum of every size, each with its curve.
        width: columns of the whole plot.
        height: rows of the plot without its axis and legend.
        fitted: False where `optima` are the `lowest` seed means.
    """
    lrs = [p.log2_lr for optimum in optima for p in optimum.curve.points]
    if not lrs:
        return Text("no finished runs yet")
    low, high = loss_range(optima)
    digits = min(5, max(2, 1 - math.floor(math.log10(high - low))))
    margin = len(f"{high:.{digits}f}") + 2
    canvas = _Canvas(max(8, width - margin), max(3, height), (min(lrs), max(lrs)), (low, high))
    for i, optimum in enumerate(optima):
        canvas.curve(optimum, chr(ord("a") + i % 26), COLORS[i % len(COLORS)])
    text = Text(no_wrap=True, overflow="crop")
    # the first row is for points beyond the range; of the others four get a label
    labelled = {round(1 + k * (canvas.rows - 2) / 3) for k in range(4)}
    for i, row in enumerate(canvas.cells()):
        label = f"{canvas.loss(i):.{digits}f}" if i in labelled else ""
        text.append(f"{label:>{margin - 2}} {'┤' if label else '│'}", "dim")
        for character, style in row:
            text.append(character, style)
        text.append("\n")
    for line in canvas.axis():
        text.append(" " * (margin - 1) + line.rstrip() + "\n", "dim")
    return text.append_text(_legend(optima, width, "best" if fitted else "lowest"))


def lowest(curve: LossCurve) -> Optimum:
    """An optimum at the LR with the lowest mean, for where a fit would take too long."""
    best = min((p for p in curve.usable if math.isfinite(p.mean)), key=lambda p: p.mean, default=None)
    log2_lr, loss = (None, None) if best is None else (best.log2_lr, best.mean)
    return Optimum(curve, Estimate(log2_lr, None, None), Estimate(loss, None, None), None, None)


def _legend(optima: Sequence[Optimum], width: int, best: str) -> Text:
    """The letter, name and optimum of every size, as many on a line as fit, and the key of the marks."""
    curves = [optimum.curve for optimum in optima]
    labels = list(dict.fromkeys(c.label for c in curves))
    text, column = Text(), 0
    for i, (optimum, name) in enumerate(zip(optima, size_names([c.size for c in curves]), strict=True)):
        variant = f"{variant_name(optimum.curve.label, labels)} " if len(labels) > 1 else ""
        entry = f"{chr(ord('a') + i % 26)} {variant}{name}: {_optimum_text(optimum, best)}"
        if len(entry) > width:  # leave out the optimum, since half a number would be wrong
            entry = entry.rpartition(":")[0][:width]
        if column and column + 3 + len(entry) > width:
            text.append("\n")
            column = 0
        text.append(("   " if column else "") + entry, COLORS[i % len(COLORS)])
        column += len(entry) + (3 if column else 0)
    marks = f"capital: {'optimum' if best == 'best' else 'lowest'}   x: diverged   ^: higher loss"
    return text.append("\n" + marks[:width], "dim")


def _optimum_text(optimum: Optimum, best: str) -> str:
    """The optimum with the wider half of its interval, or its known bounds, to a tenth of an octave."""
    value, low, high = optimum.log2_lr, optimum.low, optimum.high
    if value is None:
        if low is not None and high is not None:
            return f"{best} 2^{low:z.1f} to 2^{high:z.1f}"
        ends = [f"{word} 2^{end:z.1f}" for word, end in (("at least", low), ("at most", high)) if end is not None]
        return f"{best} {ends[0]}" if ends else "no optimum"
    if best != "best":
        return f"{best} 2^{value:z.1f}"
    half = "?" if low is None or high is None else f"{math.ceil(10 * max(value - low, high - value)) / 10:.1f}"
    return f"{best} 2^{value:z.1f} ±{half}"


class _Canvas:
    """A plot of braille dots under letters, whose first row is for points beyond the range.

    Attributes:
        columns, rows: size in characters.
        left, right: range of log2 LRs.
        low, high: range of losses.
        bits: braille dots of every character.
        styles: style of every character.
        marks: letters that replace the braille character at (row, column).
    """

    def __init__(self, columns: int, rows: int, lrs: tuple[float, float], losses: tuple[float, float]) -> None:
        self.columns, self.rows = columns, rows
        pad = 0.02 * (lrs[1] - lrs[0]) or 0.5
        self.left, self.right = lrs[0] - pad, lrs[1] + pad
        self.low, self.high = losses
        self.bits = [[0] * columns for _ in range(rows)]
        self.styles = [[""] * columns for _ in range(rows)]
        self.marks: dict[tuple[int, int], Cell] = {}

    def loss(self, row: int) -> float:
        """The loss in the middle of a row."""
        return self.high - (row - 0.5) / (self.rows - 1) * (self.high - self.low)

    def curve(self, optimum: Optimum, letter: str, style: str) -> None:
        """Draw the means of one size as a line with letters, and its optimum as the capital letter."""
        points = [p for p in optimum.curve.usable if math.isfinite(p.mean)]
        for a, b in pairwise(points):
            self._line(self._dot(a.log2_lr, a.mean), self._dot(b.log2_lr, b.mean), style)
        for p in optimum.curve.points:
            beyond = p.censored or not p.mean <= self.high
            x, y = self._dot(p.log2_lr, self.high if beyond else p.mean)
            mark = ("x" if p.censored else "^") if beyond else letter
            position = (0 if beyond else y // 4, x // 2)
            if mark == "x" or position not in self.marks:
                self.marks[position] = (mark, style)
        if optimum.log2_lr is not None and optimum.loss.value is not None:
            x, y = self._dot(optimum.log2_lr, optimum.loss.value)
            self.marks[min(y // 4, self.rows - 1), x // 2] = (letter.upper(), f"bold {style}")

    def cells(self) -> Iterator[list[Cell]]:
        """The characters of every row, from the top."""
        for i, (bits, styles) in enumerate(zip(self.bits, self.styles, strict=True)):
            row = [(chr(0x2800 + b) if b else " ", s) for b, s in zip(bits, styles, strict=True)]
            yield [self.marks.get((i, j), cell) for j, cell in enumerate(row)]

    def axis(self) -> tuple[str, str]:
        """The x axis: a line with ticks, and the labels under it."""
        max_ticks = self.columns // 8
        step = next(s for s in (0.5, 1, 2, 4, 8, 16, 32, 64, math.inf) if (self.right - self.left) / s <= max_ticks)
        line, labels = ["─"] * self.columns, [" "] * (self.columns + 1)
        first = math.ceil(self.left / step) if math.isfinite(step) else 1
        last = math.floor(self.right / step) if math.isfinite(step) else 0
        for k in range(first, last + 1):
            column = self._dot(k * step, self.low)[0] // 2
            label = f"2^{k * step:g}"
            start = min(max(0, column + 1 - len(label) // 2), len(labels) - len(label))
            line[column] = "┬"
            labels[start : start + len(label)] = label
        name = "log2 LR"
        if not "".join(labels[-len(name) - 1 :]).strip():
            labels[-len(name) :] = name
        return "└" + "".join(line), "".join(labels)

    def _dot(self, log2_lr: float, loss: float) -> tuple[int, int]:
        """(column, row) of a point in dots; the row may lie outside of the plot."""
        x = (log2_lr - self.left) / (self.right - self.left) * (2 * self.columns - 1)
        y = 4 + (self.high - loss) / (self.high - self.low) * (4 * (self.rows - 1) - 1)
        return round(x), round(min(y, 1e6) if y > -1e6 else -1e6)

    def _line(self, start: tuple[int, int], end: tuple[int, int], style: str) -> None:
        """Set the dots of a segment between two points, except for those above the range."""
        (x0, y0), (x1, y1) = start, end
        for x in range(x0, x1 + 1):
            # the rows that the segment crosses within this column of dots
            ends = [y0 + (y1 - y0) * (t - x0) / max(1, x1 - x0) for t in (max(x0, x - 0.5), min(x1, x + 0.5))]
            for y in range(max(4, round(min(ends))), min(4 * self.rows - 1, round(max(ends))) + 1):
                self.bits[y // 4][x // 2] |= DOTS[x % 2][y % 4]
                self.styles[y // 4][x // 2] = style
