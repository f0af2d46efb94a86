"""The papers' tables beside the solver: what `mupsweep rules --papers` prints."""

from __future__ import annotations

import json
from collections import defaultdict

from rich.table import Table

from mupsweep.check.published_tables import TABLES, Cell, cells
from mupsweep.report.terminal.console import console_of, table_of


def show_papers(as_json: bool) -> None:
    """Every published table as printed, and what the solver gives wherever that is something else."""
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
    for one in TABLES:
        found = list(one.cells())
        console.print(f"\n{one.source}", style="bold")
        console.show(_drawn(found))
        equal, total = equal + sum(c.solved() == c.printed for c in found), total + len(found)
    console.print(f"\n{equal} of {total} published cells equal what the solver gives")


def _drawn(found: list[Cell]) -> Table:
    roles = list(dict.fromkeys(cell.role for cell in found))
    drawn = table_of("optimizer", "quantity", *(role.value for role in roles))
    lines: dict[tuple[str, str], dict[str, Cell]] = defaultdict(dict)
    for cell in found:
        lines[cell.optimizer, cell.quantity][cell.role] = cell
    for (optimizer, quantity), by_role in sorted(lines.items()):
        drawn.add_row(optimizer, quantity, *(_text(by_role.get(role)) for role in roles))
    return drawn


def _text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    solved = cell.solved()
    return cell.printed if solved == cell.printed else f"{cell.printed} (solved: {solved})"
