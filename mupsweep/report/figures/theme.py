"""Colours, fonts and formats of the figures that matplotlib draws, for screens and for papers."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from mupsweep.atomic_files import write_bytes
from mupsweep.errors import ConfigError
from mupsweep.formatting import nearest

INK, QUIET, BAND = "#1f2328", "#6b7280", "#f1f3f5"
VERDICT_COLORS = {"transfers": "#17734a", "drifts": "#b3400a", "inconclusive": QUIET}
# small sizes are light and large ones dark, in every kind of colour vision
SIZES = LinearSegmentedColormap.from_list("sizes", ["#9fd49b", "#45b5a5", "#2a86b5", "#33529b", "#2d1857"])
# Okabe and Ito, jfly.uni-koeln.de/color
GROUPS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKERS = ("o", "s", "D", "^", "v", "P")
STYLE = {
    "svg.hashsalt": "mupsweep",  # gives elements the same ids in every drawing
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#9aa1a9",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e8eaed",
    "grid.linewidth": 0.6,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}
PAPER_STYLE = {
    **STYLE,
    "font.family": "STIXGeneral",  # close to the Times of most journals, and shipped with matplotlib
    "mathtext.fontset": "stix",
    "font.size": 8,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "axes.grid": False,
    "lines.linewidth": 0.9,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.direction": "in",
    "ytick.direction": "in",
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7.5,
    "pdf.fonttype": 42,  # TrueType: many publishers refuse Type 3
}


@dataclass(frozen=True)
class FigureStyle:
    """The fonts, sizes and file formats of the figures.

    Attributes:
        rc_params: matplotlib's settings.
        suffixes: suffixes of the written files, which select the format.
        panel: width and height of a panel, in inches; a width of None divides TEXT_WIDTH among the columns.
        drift: width and height of the drift figure without its legend, in inches.
        title, small: font sizes, in points.
        lines: factor for line widths and marker sizes.
        show_titles: whether verdict and drift stand above each panel; if not, panels get letters for a caption.
    """

    rc_params: dict[str, Any]
    suffixes: tuple[str, ...]
    panel: tuple[float | None, float]
    drift: tuple[float, float]
    title: float
    small: float
    lines: float
    show_titles: bool

    def size(self, columns: int, rows: int) -> tuple[float, float]:
        """Width and height of a figure with this many panels, in inches."""
        width, height = self.panel
        text_width = TEXT_WIDTH[0] if columns == 1 else TEXT_WIDTH[1]
        return text_width if width is None else 0.5 + width * columns, 0.7 + height * rows


TEXT_WIDTH = 3.35, 6.9  # inches of one column and of two, which fit most journals
FIGURE_STYLES = {
    "screen": FigureStyle(STYLE, (".png", ".svg"), (4.1, 3.7), (5.8, 4.1), 11, 7, 1.0, True),
    "paper": FigureStyle(PAPER_STYLE, (".png", ".svg", ".pdf"), (None, 2.1), (3.35, 2.3), 8.5, 6, 0.7, False),
}


def figure_style(name: str) -> FigureStyle:
    """Look up a style by its name in FIGURE_STYLES."""
    if name not in FIGURE_STYLES:
        raise ConfigError(f"--figures {name}: {nearest(name, FIGURE_STYLES)}")
    return FIGURE_STYLES[name]


# file metadata that would differ between two drawings of one figure
METADATA = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def save(figure: Figure, path: Path) -> Path:
    """Write a figure in the format of the path's suffix; returns the path."""
    buffer = BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=200, metadata=METADATA[path.suffix])
    write_bytes(path, buffer.getvalue())
    figure.set_layout_engine("none")  # laid out once: another format would take as long again to lay it out alike
    return path
