"""The figures of tracked norms: ||W||_R and relative updates through training, by role, a line per size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from mupsweep.analysis.labels import Label
from mupsweep.analysis.run_result import Size
from mupsweep.atomic_files import make_folder
from mupsweep.report.figures.theme import SIZES, figure_style, save
from mupsweep.report.names import size_names, variant_name, variant_order
from mupsweep.report.norms import FIGURES, NormRow

Course = Sequence[NormRow]  # everything that one run recorded


def draw(courses: Mapping[tuple[Label, Size], Course], folder: Path, style_name: str = "screen") -> list[Path]:
    """Draw norms.svg and updates.svg: a row per variant, a column per role, a line per size over the share of the run.

    A line is the geometric mean over the matrices of a role.

    Args:
        courses: by variant and size, what the run that stands for it recorded.
    """
    style = figure_style(style_name)
    make_folder(folder)
    written = []
    with matplotlib.style.context(["default", style.rc_params]):
        for name, (column, title) in FIGURES.items():
            figure = _figure(courses, column, title)
            written += [save(figure, folder / f"{name}{suffix}") for suffix in style.suffixes]
    return written


def _figure(courses: Mapping[tuple[Label, Size], Course], column: str, title: str) -> Figure:
    labels = sorted({label for label, _ in courses}, key=variant_order)
    sizes = sorted({size for _, size in courses}, key=lambda size: (size[0] * size[1], size[0]))
    colors = {size: SIZES(i / max(1, len(sizes) - 1)) for i, size in enumerate(sizes)}
    roles = list(dict.fromkeys(row.role for course in courses.values() for row in course))
    figure = Figure(figsize=(0.8 + 2.5 * len(roles), 0.9 + 1.9 * len(labels)), layout="constrained")
    panels = figure.subplots(len(labels), len(roles), squeeze=False, sharex=True, sharey="col")
    for panel_row, label in zip(panels, labels, strict=True):
        panel_row[0].set_ylabel(variant_name(label, labels).replace("$", r"\$"))
        for axes, role in zip(panel_row, roles, strict=True):
            for size in sizes:
                course = [row for row in courses.get((label, size), ()) if row.role == role]
                _line(axes, course, column, colors[size])
    for axes, role in zip(panels[0], roles, strict=True):
        axes.set_title(role, loc="left", fontsize=10, fontweight="bold")
    for axes in panels[-1]:
        axes.set_xlabel("share of the run")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    figure.suptitle(title, x=0.02, ha="left", fontsize=11)
    names = zip(sizes, size_names(sizes), strict=True)
    handles = [Line2D([], [], color=colors[size], marker="o", markersize=3.5, label=name) for size, name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6))
    return figure


def _line(axes: Axes, course: Iterable[NormRow], column: str, color: tuple[float, ...]) -> None:
    """Draw one run: the geometric mean over its matrices at every step where all of them are known."""
    values: dict[float, list[float | None]] = defaultdict(list)
    for row in course:
        values[row.step / row.steps].append(getattr(row, column))
    means = {
        share: geometric_mean(value for value in at_step if value)
        for share, at_step in sorted(values.items())
        if all(at_step)
    }
    axes.set_yscale("log")
    axes.plot([*means], [*means.values()], color=color, marker="o", markersize=2.5, linewidth=1.2)
