"""The console that commands print to: a terminal of any width, or a pipe, which has none."""

from __future__ import annotations

import re
from textwrap import wrap
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from mupsweep.errors import visible

PIPE_COLUMNS = 10_000  # width of a pipe, so that scripts read whole lines


class PipeConsole(Console):
    """A rich console that prints plain text as `print` does.

    Numbers and paths are not cut, brackets are no markup ("[at least -9]" is a bound), and a closed pipe raises.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError

    def say(self, line: str, indent: int = 0) -> None:
        """Print a line of prose, wrapped with a hanging indent where a terminal is too narrow for it.

        Control characters are spelled out, since records that somebody else wrote are quoted.
        """
        # an interval in brackets is not broken across lines
        unbroken = re.sub(r"\[[^][]*]", lambda interval: interval[0].replace(" ", "\xa0"), visible(line))
        lines = wrap(
            unbroken,
            self.width,
            initial_indent=" " * indent,
            subsequent_indent=" " * (indent + 2),
            break_long_words=False,
            break_on_hyphens=False,
        )
        self.print("\n".join(lines).replace("\xa0", " "), soft_wrap=True)

    def show(self, table: Table) -> None:
        """Print a table uncut; where a terminal is too narrow, titles take two lines and columns move closer."""
        if self._columns(table) > self.width:
            for column in table.columns:
                column.header = _halved(str(column.header))
        if self._columns(table) > self.width:
            table.padding = (0, 1, 0, 0)
        width = max(self.width, self._columns(table))
        colors = {"force_terminal": self.is_terminal, "color_system": self.color_system}
        PipeConsole(file=self.file, width=width, **colors).print(table)

    def _columns(self, table: Table) -> int:
        """The width of a table that is not cut."""
        return Measurement.get(self, self.options.update(width=PIPE_COLUMNS), table).maximum


def _halved(title: str) -> str:
    """A title on two lines, broken at the space or slash nearest to its middle."""
    breaks = [i for i, character in enumerate(title) if character in " /"]
    middle = min(breaks, key=lambda i: abs(i - len(title) / 2), default=len(title))
    return f"{title[:middle]}\n{title[middle:].lstrip()}".rstrip()


def console_of() -> PipeConsole:
    """A console for stdout: as wide as the terminal, or practically unlimited for a pipe."""
    console = PipeConsole()
    return console if console.is_terminal else PipeConsole(width=PIPE_COLUMNS)


def table_of(*columns: str) -> Table:
    """An empty table without borders, whose first column is aligned left and the others right."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table
