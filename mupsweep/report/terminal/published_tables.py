"""The papers' tables beside the solver, which `mupsweep rules --papers` prints."""

from __future__ import annotations

import json
from collections import defaultdict

from rich.table import Table

from mupsweep.check.published_tables import TABLES, Cell, cells
from mupsweep.report.terminal.console import console_of, table_of


def show_papers(as_json: bool) -> None:
    """Print every published table, with the solver's result in each cell where it differs."""
    if as_json:
        rows = [
            {
                "source": cell.table.source,
                "optimizer": cell.optimizer,
                "quantity": cell.quantity,
                "role": cell.role.value,
                "printed": cell.printed,
                "solved": cell.solved(),
            }
            for cell in cells()
        ]
        print(json.dumps(rows))
        return
    console = console_of()
    equal = total = 0
    for published in TABLES:
        table_cells = list(published.cells())
        console.print(f"\n{published.source}", style="bold")
        console.show(_table(table_cells))
        equal += sum(cell.solved() == cell.printed for cell in table_cells)
        total += len(table_cells)
    console.print(f"\n{equal} of {total} published cells equal what the solver gives")


def _table(table_cells: list[Cell]) -> Table:
    """One published table: a row per optimizer and quantity, a column per role."""
    roles = list(dict.fromkeys(cell.role for cell in table_cells))
    table = table_of("optimizer", "quantity", *(role.value for role in roles))
    rows: dict[tuple[str, str], dict[str, Cell]] = defaultdict(dict)
    for cell in table_cells:
        rows[cell.optimizer, cell.quantity][cell.role] = cell
    for (optimizer, quantity), by_role in sorted(rows.items()):
        table.add_row(optimizer, quantity, *(_text(by_role.get(role)) for role in roles))
    return table


def _text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    solved = cell.solved()
    return cell.printed if solved == cell.printed else f"{cell.printed} (solved: {solved})"
