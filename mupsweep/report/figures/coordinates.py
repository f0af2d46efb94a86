"""The figure of a coordinate check: every coordinate against the size, a line per number of steps, SP beside muP."""

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
ROWS: tuple[tuple[str, Role | None, str], ...] = (  # quantity, role, name on the y axis
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
        problem = "it is a folder" if path.is_dir() else f"{path.parent} is no folder that can be written to"
        raise ConfigError(f"--figure {path}: {problem}; name a file in one that is there, such as check{FORMATS[0]}")


def draw(variants: Sequence[Coordinates], path: Path) -> None:
    """Draw every coordinate against the size: a column per axis and variant, a row per quantity, both axes log."""
    columns = [(axis, variant) for axis in (WIDTH, DEPTH) for variant in variants if axis in variant.axes()]
    # a row is drawn where every column has its quantity
    rows = [key for key in ROWS if all(_row(variant, axis, *key[:2]) for axis, variant in columns)]
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(0.6 + 2.5 * len(columns), 0.9 + 2.1 * len(rows)), layout="constrained")
        panels = figure.subplots(len(rows), len(columns), squeeze=False, sharey="row")
        for panel_row, (quantity, role, name) in zip(panels, rows, strict=True):
            panel_row[0].set_ylabel(name)
            for axes, (axis, variant) in zip(panel_row, columns, strict=True):
                row = _row(variant, axis, quantity, role)
                assert row is not None
                _panel(axes, row)
        several_models = len({variant.label[:2] for variant in variants}) > 1
        for axes, (_, variant) in zip(panels[0], columns, strict=True):
            title = " ".join(variant.label[1:]) if several_models else variant.label[2]
            axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=19)
        for axes, (axis, _) in zip(panels[-1], columns, strict=True):
            axes.set_xlabel(axis)
        handles = _step_handles(variants)
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        save(figure, path)


def _step_handles(variants: Sequence[Coordinates]) -> list[Line2D]:
    """A legend entry per number of steps after which coordinates were measured."""
    steps = {count for variant in variants for row in variant.rows for count in row.values if count}
    handles = []
    for i, count in enumerate(sorted(steps)):
        label = f"after {counted(count, 'step')}"
        handles.append(Line2D([], [], color=_shade(i, len(steps)), marker="o", markersize=4, label=label))
    return handles


def _panel(axes: Axes, row: Row) -> None:
    """One quantity of one variant against the size, a line per number of steps."""
    for i, values in enumerate(row.values.values()):
        axes.plot(row.sizes, values, color=_shade(i, len(row.values)), marker="o", markersize=3.5, linewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(row.sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    color = QUIET if row.expected is None else VERDICT_COLORS["drifts" if row.violation > TOLERANCE else "transfers"]
    promised = "" if row.expected is None else f", promised {row.expected}"
    text = f"exponent {signed(row.final_exponent.value)}{promised}".replace("-", "−")
    axes.text(0, 1.04, text, transform=axes.transAxes, fontsize=8, color=color)


def _row(variant: Coordinates, axis: str, quantity: str, role: Role | None) -> Row | None:
    """The row of a quantity and role, or None where it was not measured."""
    return next((r for r in variant.by_role(axis) if (r.quantity, r.role) == (quantity, role)), None)


def _shade(i: int, count: int) -> tuple[float, float, float, float]:
    """The i-th of this many colours, from light to dark."""
    return SIZES(i / max(1, count - 1))
