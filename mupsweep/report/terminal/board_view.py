"""A board in the terminal: how far the sweep is, its runs by size and LR, what runs now, loss versus LR so far."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mupsweep.analysis.curves import LossCurve, collect
from mupsweep.analysis.labels import DIVERGED, DONE, Label
from mupsweep.analysis.optimum import optima
from mupsweep.analysis.transfer import ladders
from mupsweep.formatting import counted, duration
from mupsweep.report.names import size_names, variant_name, variant_order
from mupsweep.report.terminal.board import Board, Cell, Row
from mupsweep.report.terminal.console import table_of
from mupsweep.report.terminal.curve_plot import curve_text, lowest
from mupsweep.store.run_dir import FAILED, PENDING, RUNNING

GLYPHS = {FAILED: "!", RUNNING: ">", DIVERGED: "x", DONE: "o", PENDING: "·"}  # of several seeds the first that applies
STYLES = {FAILED: "bold red", RUNNING: "bold cyan", DIVERGED: "red", DONE: "", PENDING: "dim"}
LEGEND = "· pending   > running   x diverged   ! failed   * lowest"
WIDTHS = (7, 6)  # of a column that writes losses with three or two decimals; narrower ones hold a sign
ROOMY = 30  # rows of a terminal that has room for more than
RUNS_SHOWN = 4  # running ones
PLOT_HEIGHT = 6, 16  # rows of a plot at least and at most
FITTED = 200  # points of a ladder that are fitted in no time
TURN_SECONDS = 8.0  # what does not fit at once is shown in turn for so long
Plot = tuple[Label, str, Sequence[LossCurve]]  # variant, axis, the sizes of a ladder
SHARE = 0.05  # of the time at most that goes into fitting curves, while training needs the same cores


class BoardText:
    """Draws a board anew whenever asked; curves are fitted again only where runs have finished."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.ladders: dict[Label, list[tuple[str, Sequence[LossCurve]]]] = {}
        self._seen: dict[Label, int] = {}
        self._next_fit = 0.0
        self._plots: dict[tuple[Label, str, int, int], tuple[int, Text]] = {}

    def draw(self, width: int, height: int) -> Lines:
        """Everything that fits into so many columns and rows; where that is not all, grid and curves take turns."""
        now = self._running(min(RUNS_SHOWN, (height - 12) // 3) if height < ROOMY else height // 5)
        parts: list[RenderableType] = [self._bar(width)]
        if now:
            parts += [Text(), _table(now)]
        room = height - 3 - (len(now) + 1 if now else 0)
        self._fit()
        plots = [(label, axis, curves) for label, found in self.ladders.items() for axis, curves in found]
        turn = int(time.monotonic() / TURN_SECONDS)
        wanted = len(self.board.cells) + 2
        if wanted + 1 + _rows_of_plot(PLOT_HEIGHT[0], plots) <= room:
            parts += [Text(), *self._grid(width, room)]
            room -= wanted + 1
            shown = plots[turn % len(plots)] if plots else None
        elif not plots or turn % 2 == 0 or _rows_of_plot(PLOT_HEIGHT[0], plots) > room:
            return Lines(*parts, Text(), *self._grid(width, max(1, room - 3)))
        else:
            shown = plots[turn // 2 % len(plots)]
        return Lines(*parts, Text(), self._plot(*shown, width, room)) if shown else Lines(*parts)

    def _bar(self, width: int) -> Table:
        board, total = self.board, len(self.board.planned)
        speeds = [status.get("tokens_per_second") or 0.0 for status in board.running.values()]
        words = [f"{board.finished}/{total}"]
        words += [f"{board.counts[s]} {s}" for s in (RUNNING, DIVERGED, FAILED) if board.counts[s]]
        seconds = board.seconds_left() if board.open else None
        words += [f"{sum(speeds):,.0f} tok/s"] if any(speeds) else []
        words += [f"about {duration(seconds)} left"] if seconds is not None else []
        words += ["none running"] if board.open and not board.running else []
        name, told = Text(board.sweep.name, "bold"), Text(", ".join(words))
        name.truncate(max(4, width // 4), overflow="ellipsis")
        told.truncate(max(0, width - len(name) - 8), overflow="ellipsis")
        grid = Table.grid(padding=(0, 1))
        room = max(4, min(40, width - len(name) - len(told) - 3))
        grid.add_row(name, ProgressBar(max(1, total), board.finished, width=room), told)
        return grid

    def _grid(self, width: int, rows: int) -> Iterator[Text]:
        """A line per size: a column per LR, neighbours together where there are too many."""
        board = self.board
        lrs = sorted({lr for cells in board.cells.values() for lr in cells})
        shown = _most_telling(board, rows)
        names = _row_names(list(board.labels), shown)
        margin = max(map(len, names), default=0) + 1
        room = max(8, width - margin)
        column = next((w for w in WIDTHS if w * len(lrs) <= room), max(1, min(3, room // max(1, len(lrs)))))
        together = -(-len(lrs) * column // room)
        steps = [lrs[i : i + together] for i in range(0, len(lrs), together)]
        yield Text(" " * margin + _header([step[0] for step in steps], column), "dim", no_wrap=True, overflow="crop")
        for name, row in zip(names, shown, strict=True):
            cells = [sum((board.cells[row][lr] for lr in step if lr in board.cells[row]), Cell()) for step in steps]
            yield self._line(f"{name:<{margin}}", cells, column)
        if hidden := len(board.cells) - len(shown):
            yield Text(counted(hidden, "more size"), "dim")
        yield Text(LEGEND if column >= min(WIDTHS) else f"o done   {LEGEND}", "dim", no_wrap=True, overflow="crop")

    def _line(self, name: str, cells: Sequence[Cell], column: int) -> Text:
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
            if column >= min(WIDTHS):
                loss = f"{mean:.{column - 4}f}"[: column - 2] if mean is not None and state in (DONE, PENDING) else ""
                sign = (loss or GLYPHS[state]) + ("*" if best else " ")
            line.append(f"{sign:>{column}}", "bold" if best else STYLES[state])
        return line

    def _running(self, most: int) -> list[tuple[str, ...]]:
        """Run, variant, step, loss, tokens/s, time left."""
        board, labels = self.board, list(self.board.labels)
        if most < 1:
            return []
        rows = []
        for run_id, status in list(board.running.items())[:most]:
            loss, speed, left = (
                status.get("train_loss"),
                status.get("tokens_per_second"),
                board.run_seconds_left(run_id),
            )
            rows.append(
                (
                    run_id,
                    variant_name(board.label(run_id), labels) if len(labels) > 1 else "",
                    f"{status.get('step', 0)}/{status.get('steps', '?')}",
                    "" if loss is None else f"{loss:.3f}",
                    "" if speed is None else f"{speed:,.0f}",
                    "" if left is None else duration(left),
                )
            )
        if rest := len(board.running) - len(rows):
            rows.append((f"and {rest} more", *[""] * 5))
        return [("running", "", "step", "loss", "tok/s", "left"), *rows] if rows else []

    def _plot(self, label: Label, axis: str, curves: Sequence[LossCurve], width: int, room: int) -> Text:
        """Loss versus LR of one ladder, as fitted last."""
        height = min(PLOT_HEIGHT[1], room - _rows_of_plot(0, [(label, axis, curves)]))
        key, done = (label, axis, width, height), self._seen[label]
        drawn = self._plots.get(key)
        if drawn is None or drawn[0] != done:
            title = Text.assemble((f"loss so far: {variant_name(label, list(self.board.labels))}, by {axis}\n", "dim"))
            began = time.monotonic()
            fitted = sum(len(curve.points) for curve in curves) <= FITTED
            found = optima(curves) if fitted else [lowest(curve) for curve in curves]
            self._plots[key] = drawn = done, title.append_text(curve_text(found, min(width, 100), height, fitted))
            self._next_fit = time.monotonic() + (time.monotonic() - began) / SHARE
        return drawn[1]

    def _fit(self) -> None:
        """Collect the curves of every variant with new results, now and then."""
        if time.monotonic() < self._next_fit:
            return
        began = time.monotonic()
        for label, run_ids in self.board.labels.items():
            done = sum(run_id in self.board.losses for run_id in run_ids)
            if done and self._seen.get(label) != done:
                self._seen[label] = done
                self.ladders[label] = list(ladders(collect(self.board.results(label))))
        self._next_fit = time.monotonic() + (time.monotonic() - began) / SHARE


def _rows_of_plot(height: int, plots: Sequence[Plot]) -> int:
    """What the largest plot takes with its title, axis, legend of two sizes a line, and key."""
    return height + 4 + max((-(-len(curves) // 2) for _, _, curves in plots), default=0)


def _most_telling(board: Board, rows: int) -> list[Row]:
    """The rows of sizes to show, in order: those where something happens, before those that wait or are finished."""

    def rank(row: Row) -> int:
        states = sum((cell.states for cell in board.cells[row].values()), start=type(board.counts)())
        if states[RUNNING]:
            return 0
        return 1 if states[PENDING] and (states[DONE] or states[DIVERGED]) else 2

    every = sorted(board.cells, key=lambda row: (variant_order(row[0]), row[1] * row[2], row[1]))
    kept = set(sorted(every, key=rank)[:rows])
    return [row for row in every if row in kept]


def _row_names(labels: Sequence[Label], rows: Sequence[Row]) -> list[str]:
    sizes = size_names([(width, depth, None) for _, width, depth in rows])
    if len(labels) == 1:
        return sizes
    return [f"{variant_name(row[0], labels)} {size}" for row, size in zip(rows, sizes, strict=True)]


def _header(lrs: Sequence[float], column: int) -> str:
    """log2 LRs above their columns, as many as fit."""
    line = [" "] * (len(lrs) * column)
    free = 0
    for i, lr in enumerate(lrs):
        label = f"{'2^' if column >= min(WIDTHS) else ''}{lr:g}"
        end = (i + 1) * column - (1 if column >= min(WIDTHS) else 0)
        start = max(0, end - len(label))
        if start >= free and start + len(label) <= len(line):
            line[start : start + len(label)] = label
            free = start + len(label) + 1
    return "".join(line)


def _table(rows: Sequence[tuple[str, ...]]) -> Table:
    table = table_of(*rows[0])
    table.columns[1].justify = "left"
    for row in rows[1:]:
        table.add_row(*row)
    return table
