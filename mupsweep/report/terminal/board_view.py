"""A board in the terminal: progress of the sweep, running runs, a grid of runs by size and LR, loss versus LR."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mupsweep.analysis.curves import LossCurve, collect
from mupsweep.analysis.labels import DIVERGED, DONE, Label
from mupsweep.analysis.transfer import ladder_optima, ladders
from mupsweep.formatting import counted, duration
from mupsweep.report.names import size_names, variant_name, variant_order
from mupsweep.report.terminal.board import Board, Cell, Row
from mupsweep.report.terminal.console import table_of
from mupsweep.report.terminal.curve_plot import curve_text, lowest
from mupsweep.store.run_dir import FAILED, PENDING, RUNNING

GLYPHS = {
    FAILED: "!",
    RUNNING: ">",
    DIVERGED: "x",
    DONE: "o",
    PENDING: "·",
}  # of several seeds the first state that applies
STYLES = {FAILED: "bold red", RUNNING: "bold cyan", DIVERGED: "red", DONE: "", PENDING: "dim"}
LEGEND = "· pending   > running   x diverged   ! failed   * lowest"
LOSS_WIDTHS = (7, 6)  # of columns with room for a loss of three or two decimals; narrower ones hold a sign
MAX_RUNNING = 4  # running runs listed in a terminal with fewer rows than
TALL = 30  # rows, above which a fifth of them lists running runs
WEIGHT = (FAILED, "none", RUNNING, "round", DIVERGED, "tok/s")  # what the first line has room for first
PLOT_HEIGHT = 6, 16  # rows of a plot at least and at most
MAX_FITTED_POINTS = 200  # of a ladder; larger ones take too long to fit
TURN_SECONDS = 8.0  # how long grid and plots are displayed in turn, where they do not fit together
FIT_TIME_SHARE = 0.05  # of the time at most goes into fitting curves, since training needs the cores
Plot = tuple[Label, str, Sequence[LossCurve]]  # variant, axis, the curves of a ladder


class BoardText:
    """Draws a board on demand, and fits curves again only where runs have finished since."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.ladders: dict[Label, list[tuple[str, Sequence[LossCurve]]]] = {}
        self._n_results: dict[Label, int] = {}  # results of each variant when its curves were collected
        self._next_fit = 0.0
        self._plots: dict[tuple[Label, str, int, int], tuple[int, Text]] = {}  # with the number of results in each

    def draw(self, width: int, height: int) -> Lines:
        """The board in this many columns and rows; where grid and plots do not fit together, they take turns."""
        running = self._running(min(MAX_RUNNING, (height - 12) // 3) if height < TALL else height // 5)
        parts: list[RenderableType] = [self._bar(width)]
        if running:
            parts += [Text(), _table(_fitting(running, width))]
        rows_left = height - 3 - (len(running) + 1 if running else 0)
        self._collect_curves()
        plots = [(label, axis, curves) for label, ladders in self.ladders.items() for axis, curves in ladders]
        min_plot_rows = _rows_of_plot(PLOT_HEIGHT[0], plots)
        grid_rows = len(self.board.cells) + 2
        turn = int(time.monotonic() / TURN_SECONDS)
        if grid_rows + 1 + min_plot_rows <= rows_left:  # both fit
            parts += [Text(), *self._grid(width, rows_left)]
            rows_left -= grid_rows + 1
            plot = plots[turn % len(plots)] if plots else None
        elif not plots or turn % 2 == 0 or min_plot_rows > rows_left:  # the grid alone
            parts += [Text(), *self._grid(width, max(1, rows_left - 3))]
            plot = None
        else:  # a plot alone
            plot = plots[turn // 2 % len(plots)]
        if plot is not None:
            parts += [Text(), self._plot(*plot, width, rows_left)]
        return Lines(*parts)

    def _bar(self, width: int) -> Table:
        """One line: the sweep's name, a progress bar, counts of runs, speed and remaining time."""
        board, total = self.board, len(self.board.planned)
        name = Text(board.sweep.name, "bold")
        name.truncate(max(4, width // 4), overflow="ellipsis")
        text = Text(", ".join(self._facts(width - len(name) - 8)))
        text.truncate(max(0, width - len(name) - 8), overflow="ellipsis")
        bar_width = max(4, min(40, width - len(name) - len(text) - 3))
        line = Table.grid(padding=(0, 1))
        line.add_row(name, ProgressBar(max(1, total), board.finished, width=bar_width), text)
        return line

    def _facts(self, room: int) -> list[str]:
        """What the first line says: the runs that have ended and the time left, and more as far as it fits."""
        board = self.board
        speed = sum(status.get("tokens_per_second") or 0.0 for status in board.running.values())
        seconds = board.seconds_left() if board.open else None
        left = [] if seconds is None else [f"{duration(seconds)} left"]
        facts = [
            f"{board.finished}/{len(board.planned)}",
            *([f"round {board.round}"] if board.round else []),
            *(f"{board.counts[state]} {state}" for state in (RUNNING, DIVERGED, FAILED) if board.counts[state]),
            *([f"{speed:,.0f} tok/s"] if speed else []),
            *(f"about {text}" for text in left),
            *(["none running"] if board.open and not board.running else []),
        ]
        kept = [fact for fact in facts if fact == facts[0] or fact.removeprefix("about ") in left]
        if len(", ".join(kept)) > room:
            return [facts[0], *left]
        others = [fact for fact in facts if fact not in kept]
        by_weight = sorted(others, key=lambda fact: next(i for i, word in enumerate(WEIGHT) if word in fact))
        for fact in by_weight:
            more = [other for other in facts if other in kept or other == fact]
            if len(", ".join(more)) <= room:
                kept = more
        return kept

    def _grid(self, width: int, rows: int) -> Iterator[Text]:
        """A line per size with a column per LR; neighbouring LRs share a column where there are too many."""
        board = self.board
        lrs = sorted({lr for cells in board.cells.values() for lr in cells})
        visible = _most_informative(board, rows)
        names = _row_names(list(board.labels), visible)
        margin = max(map(len, names), default=0) + 1
        room = max(8, width - margin)
        column = next((w for w in LOSS_WIDTHS if w * len(lrs) <= room), max(1, min(3, room // max(1, len(lrs)))))
        lrs_per_column = -(-len(lrs) * column // room)
        groups = [lrs[i : i + lrs_per_column] for i in range(0, len(lrs), lrs_per_column)]
        header = " " * margin + _header([group[0] for group in groups], column)
        yield Text(header, "dim", no_wrap=True, overflow="crop")
        for name, row in zip(names, visible, strict=True):
            by_lr = board.cells[row]
            cells = [sum((by_lr[lr] for lr in group if lr in by_lr), Cell()) for group in groups]
            yield self._line(f"{name:<{margin}}", cells, column)
        if hidden := len(board.cells) - len(visible):
            yield Text(counted(hidden, "more size"), "dim")
        yield Text(LEGEND if column >= min(LOSS_WIDTHS) else f"o done   {LEGEND}", "dim", no_wrap=True, overflow="crop")

    def _line(self, name: str, cells: Sequence[Cell], column: int) -> Text:
        """One size of the grid: a loss or a sign per column, with a star at the lowest loss."""
        line = Text(name, no_wrap=True, overflow="crop")
        means = [sum(c.losses) / len(c.losses) if c.losses else None for c in cells]
        lowest = min((m for m in means if m is not None), default=None)
        for cell, mean in zip(cells, means, strict=True):
            state = next((s for s in GLYPHS if cell.states[s] > 0), None)
            if state is None:  # not planned
                line.append(" " * column)
                continue
            best = mean is not None and mean == lowest and state != DIVERGED
            sign = "*" if best else GLYPHS[state]
            if column >= min(LOSS_WIDTHS):
                has_loss = mean is not None and state in (DONE, PENDING)
                text = f"{mean:.{column - 4}f}"[: column - 2] if has_loss else GLYPHS[state]
                sign = text + ("*" if best else " ")
            line.append(f"{sign:>{column}}", "bold" if best else STYLES[state])
        return line

    def _running(self, max_runs: int) -> list[tuple[str, ...]]:
        """A header and a row per running run: id, variant, step, loss, tokens/s, time left; empty if none runs."""
        board, labels = self.board, list(self.board.labels)
        if max_runs < 1:
            return []
        rows = []
        for run_id, status in list(board.running.items())[:max_runs]:
            loss, speed = status.get("train_loss"), status.get("tokens_per_second")
            seconds = board.run_seconds_left(run_id)
            rows.append(
                (
                    run_id,
                    variant_name(board.label(run_id), labels) if len(labels) > 1 else "",
                    f"{status.get('step', 0)}/{status.get('steps', '?')}",
                    "" if loss is None else f"{loss:.3f}",
                    "" if speed is None else f"{speed:,.0f}",
                    "" if seconds is None else duration(seconds),
                )
            )
        if rest := len(board.running) - len(rows):
            rows.append((f"and {rest} more", *[""] * 5))
        return [("running", "", "step", "loss", "tok/s", "left"), *rows] if rows else []

    def _plot(self, label: Label, axis: str, curves: Sequence[LossCurve], width: int, rows: int) -> Text:
        """Loss versus LR of one ladder, drawn again only after new results."""
        height = min(PLOT_HEIGHT[1], rows - _rows_of_plot(0, [(label, axis, curves)]))
        key, n_results = (label, axis, width, height), self._n_results[label]
        cached = self._plots.get(key)
        if cached is None or cached[0] != n_results:
            title = Text.assemble((f"loss so far: {variant_name(label, list(self.board.labels))}, by {axis}\n", "dim"))
            began = time.monotonic()
            fitted = sum(len(curve.points) for curve in curves) <= MAX_FITTED_POINTS
            minima = ladder_optima(axis, curves) if fitted else [lowest(curve) for curve in curves]
            plot = title.append_text(curve_text(minima, min(width, 100), height, fitted))
            self._plots[key] = cached = n_results, plot
            self._next_fit = time.monotonic() + (time.monotonic() - began) / FIT_TIME_SHARE
        return cached[1]

    def _collect_curves(self) -> None:
        """Collect the curves of every variant with new results, unless that was done too short a time ago."""
        if time.monotonic() < self._next_fit:
            return
        began = time.monotonic()
        for label, run_ids in self.board.labels.items():
            n_results = sum(run_id in self.board.losses for run_id in run_ids)
            if n_results and self._n_results.get(label) != n_results:
                self._n_results[label] = n_results
                self.ladders[label] = list(ladders(collect(self.board.results(label))))
        self._next_fit = time.monotonic() + (time.monotonic() - began) / FIT_TIME_SHARE


def _fitting(rows: Sequence[tuple[str, ...]], width: int) -> list[tuple[str, ...]]:
    """The rows of running runs without the columns for which a terminal is too narrow; the time left stays."""
    columns = list(zip(*rows, strict=True))
    for dropped in ("tok/s", "loss", "", "step"):
        if sum(max(map(len, column)) + 2 for column in columns) <= width + 2:
            break
        columns = [column for column in columns if column[0] != dropped]
    overflow = sum(max(map(len, column)) + 2 for column in columns) - 2 - width
    if overflow > 0:  # the end of a run id, so that the time left is not cut
        longest = max(map(len, columns[0])) - overflow
        columns[0] = tuple(text if len(text) <= longest else f"{text[: max(1, longest - 1)]}…" for text in columns[0])
    return list(zip(*columns, strict=True))


def _rows_of_plot(height: int, plots: Sequence[Plot]) -> int:
    """Rows of the largest plot, with its title, axis, legend of two sizes a line, and key of marks."""
    return height + 4 + max((-(-len(curves) // 2) for _, _, curves in plots), default=0)


def _most_informative(board: Board, max_rows: int) -> list[Row]:
    """The sizes to display, sorted; sizes with running or some finished runs have precedence over the others."""

    def rank(row: Row) -> int:
        states = sum((cell.states for cell in board.cells[row].values()), start=Counter[str]())
        if states[RUNNING]:
            return 0
        return 1 if states[PENDING] and (states[DONE] or states[DIVERGED]) else 2

    rows = sorted(board.cells, key=lambda row: (variant_order(row[0]), row[1] * row[2], row[1]))
    visible = set(sorted(rows, key=rank)[:max_rows])
    return [row for row in rows if row in visible]


def _row_names(labels: Sequence[Label], rows: Sequence[Row]) -> list[str]:
    """The names of sizes, preceded by their variants where there are several."""
    sizes = size_names([(width, depth, None) for _, width, depth in rows])
    if len(labels) == 1:
        return sizes
    return [f"{variant_name(row[0], labels)} {size}" for row, size in zip(rows, sizes, strict=True)]


def _header(lrs: Sequence[float], column: int) -> str:
    """log2 LRs above their columns, as many as fit."""
    line = [" "] * (len(lrs) * column)
    free = 0
    for i, lr in enumerate(lrs):
        label = f"{'2^' if column >= min(LOSS_WIDTHS) else ''}{lr:g}"
        end = (i + 1) * column - (1 if column >= min(LOSS_WIDTHS) else 0)
        start = max(0, end - len(label))
        if start >= free and start + len(label) <= len(line):
            line[start : start + len(label)] = label
            free = start + len(label) + 1
    return "".join(line)


def _table(rows: Sequence[tuple[str, ...]]) -> Table:
    """A table of a header and rows, whose first column and the one without a title are text."""
    table = table_of(*rows[0])
    for title, column in zip(rows[0], table.columns, strict=True):
        column.justify = "right" if title and column is not table.columns[0] else "left"
    for row in rows[1:]:
        table.add_row(*row)
    return table
