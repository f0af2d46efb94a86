"""The figure of a coordinate check: what moved against the size, one line per step count, SP beside muP."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from mupsweep.check.exponents import DEPTH, TOLERANCE, WIDTH, Coordinates, Row
from mupsweep.check.measure import ATTENTION, CHANGE, FEATURES, LOGITS, UPDATE
from mupsweep.check.regression import signed
from mupsweep.errors import ConfigError
from mupsweep.formatting import counted
from mupsweep.report.figures.theme import QUIET, SIZES, STYLE, VERDICT_COLORS, save
from mupsweep.scaling import Role

FORMATS = (".png", ".svg")
ROWS: tuple[tuple[str, Role | None, str], ...] = (
    (CHANGE + FEATURES, None, "change of features"),
    (CHANGE + LOGITS, None, "change of logits"),
    (CHANGE + ATTENTION, None, "change of attention logits"),
    (UPDATE, Role.HIDDEN, r"$\|\Delta W\|_R$ of hidden matrices"),
)


def check(path: Path) -> None:
    """Refuse a path that no figure can be written to."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"--figure {path}: expected a path that ends in {' or '.join(FORMATS)}")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        where = "it is a folder" if path.is_dir() else f"{path.parent} is no folder that can be written to"
        raise ConfigError(f"--figure {path}: {where}; name a file in one that is there, such as check{FORMATS[0]}")


def draw(checked: Sequence[Coordinates], path: Path) -> None:
    """Draw what was measured: a column per axis and variant, a row per coordinate, both axes logarithmic."""
    columns = [(axis, one) for axis in (WIDTH, DEPTH) for one in checked if axis in one.axes()]
    shown = [key for key in ROWS if all(_row(one, axis, *key[:2]) for axis, one in columns)]
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(0.6 + 2.5 * len(columns), 0.9 + 2.1 * len(shown)), layout="constrained")
        panels = figure.subplots(len(shown), len(columns), squeeze=False, sharey="row")
        for line, (quantity, role, name) in zip(panels, shown, strict=True):
            line[0].set_ylabel(name)
            for axes, (axis, one) in zip(line, columns, strict=True):
                row = _row(one, axis, quantity, role)
                assert row is not None
                _panel(axes, row)
        several = len({one.label[:2] for one in checked}) > 1
        for axes, (_, one) in zip(panels[0], columns, strict=True):
            title = " ".join(one.label[1:]) if several else one.label[2]
            axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=19)
        for axes, (axis, _) in zip(panels[-1], columns, strict=True):
            axes.set_xlabel(axis)
        counts = sorted({count for one in checked for row in one.rows for count in row.values if count})
        handles = [
            Line2D([], [], color=_shade(i, len(counts)), marker="o", markersize=4, label=f"after {told}")
            for i, told in enumerate(counted(count, "step") for count in counts)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        save(figure, path)


def _panel(axes: Axes, row: Row) -> None:
    for i, values in enumerate(row.values.values()):
        axes.plot(row.sizes, values, color=_shade(i, len(row.values)), marker="o", markersize=3.5, linewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(row.sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    color = QUIET if row.promised is None else VERDICT_COLORS["drifts" if row.miss > TOLERANCE else "transfers"]
    promised = "" if row.promised is None else f", promised {row.promised}"
    text = f"exponent {signed(row.judged.value)}{promised}".replace("-", "−")
    axes.text(0, 1.04, text, transform=axes.transAxes, fontsize=8, color=color)


def _row(one: Coordinates, axis: str, quantity: str, role: Role | None) -> Row | None:
    return next((r for r in one.by_role(axis) if (r.quantity, r.role) == (quantity, role)), None)


def _shade(i: int, count: int) -> tuple[float, float, float, float]:
    return SIZES(i / max(1, count - 1))
