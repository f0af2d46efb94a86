"""`mupsweep plan --from`: which runs of a table to train next."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from shlex import quote

from mupsweep.errors import ConfigError, DataError
from mupsweep.formatting import counted, si
from mupsweep.report.generate import read_source
from mupsweep.report.terminal.console import console_of
from mupsweep.schema import LARGEST
from mupsweep.store.table_cells import Cells, read_cells
from mupsweep.store.table_columns import means
from mupsweep.store.tables import LEAST_LR, MOST_LR, Table, TableOptions
from mupsweep.sweep.ask import Optimum, Run, Search, Size, ask
from mupsweep.sweep.config import analysis_config


def show_next_runs(
    table: str,
    options: TableOptions,
    sizes: str | None,
    log2_lrs: str,
    count: int,
    target: dict[str, int],
    overrides: Sequence[str],
    as_json: bool,
) -> None:
    """Print the runs to train next, or the optima where nothing more is wanted.

    Args:
        sizes: a table of the sizes that can be trained; None for those of the runs.
        log2_lrs: LOW:HIGH.
        count: of LRs.
        target: width and depth whose LR is wanted; empty for the optima of the sizes.
    """
    known = read_source(table, options, None)
    search = _search(table, known, sizes, log2_lrs, target, overrides)
    runs = ask(search, count)
    optima = [] if runs else search.optima()
    if as_json:
        content: dict[str, object] = {"done": not runs, "runs": [asdict(run) for run in runs]}
        print(json.dumps(content if runs else {**content, "optima": [_optimum_record(one) for one in optima]}))
        return
    console = console_of()
    for note in known.notes:
        console.say(note)
    for run in runs:
        console.say(_line(run), indent=2)
    if runs:
        console.say(f"{counted(len(runs), 'run')} to train next; add the losses to {table} and ask again")
        return
    for optimum in optima:
        console.say(_optimum_line(optimum), indent=2)
    if any(optimum.log2_lr is None for optimum in optima):
        console.say(f"no further run within --log2-lrs={log2_lrs} would tell more: give a wider range to go on")
        return
    console.say(f"done: no further run is worth its cost{'; ' + search.state() if target else ''}")
    console.say(f"verdict and LR of a target: mupsweep transfer --from {quote(table)} --to width=N")


def _search(
    source: str, known: Table, sizes: str | None, log2_lrs: str, target: dict[str, int], overrides: Sequence[str]
) -> Search:
    shapes = {(run.width, run.depth) for run in known.runs}
    if sizes is None and not shapes:
        raise ConfigError(
            f"--from {source} has no runs yet: --sizes FILE names the sizes, with columns width and depth"
        )
    available = read_sizes(sizes) if sizes is not None else [Size(*shape) for shape in sorted(shapes)]
    if len(names := {run.label for run in known.runs}) > 1:
        one = " and ".join("/".join(map(str, label)) for label in sorted(names, key=str)[:2])
        raise ConfigError(f"--from {source} has {one}: one at a time, for example --filter optimizer=adamw")
    lengths = sorted({run.horizon for run in known.runs if run.horizon is not None})
    if len(lengths) > 1:
        raise ConfigError(
            f"--from {source} has runs of several lengths, {si(lengths[0])} to {si(lengths[-1])}: one at a time, "
            "for example --filter tokens=1e9"
        )
    search = Search(available, _range(log2_lrs), _target(target, available), prior=analysis_config({}, overrides).curve)
    for run in known.runs:
        loss = math.nan if run.val_loss is None else run.val_loss
        search.add(run.width, run.depth, run.log2_lr, loss, run.seed)
    return search


def _target(target: dict[str, int], sizes: Sequence[Size]) -> tuple[int, int] | None:
    if not target:
        return None
    if "tokens" in target:
        raise ConfigError("--to tokens=N: the search is over sizes, width=N and depth=N")
    depths = {size.depth for size in sizes}
    if "depth" not in target and len(depths) > 1:
        raise ConfigError(f"--to width={target.get('width')}: add depth=N, since the sizes have several")
    largest = max(sizes, key=lambda size: size.price)
    return target.get("width", largest.width), target.get("depth", largest.depth)


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        raise ConfigError(f"--log2-lrs={text}: expected LOW:HIGH, as --log2-lrs=-14:-5") from None
    least, most = math.log2(LEAST_LR), math.log2(MOST_LR)
    if not least <= low < high <= most:
        raise ConfigError(f"--log2-lrs={text}: expected LOW:HIGH, rising, within {least:.1f}:{most:.1f}, as -14:-5")
    return low, high


def read_sizes(source: str) -> list[Size]:
    """The sizes in a table with columns width, and depth and cost where they vary.

    Raises:
        DataError: naming the row and the column.
    """
    try:
        cells = read_cells(source)
    except DataError as error:
        raise DataError(str(error).replace("--from", "--sizes")) from error
    places = {meaning: _place(cells, meaning) for meaning in ("width", "depth")}
    places["cost"] = next((i for i, name in enumerate(cells.columns) if name.strip().casefold() == "cost"), None)
    if places["width"] is None:
        raise DataError(f"--sizes {source} has no column width: it has {', '.join(cells.columns)}")
    sizes = []
    for record in cells.records:
        numbers: dict[str, float | None] = {}
        for meaning, place in places.items():
            numbers[meaning] = None if place is None else _number(source, record.name, meaning, record.cells[place])
        cost = numbers["cost"]
        sizes.append(Size(int(numbers["width"] or 0), int(numbers["depth"] or 1), cost))
    if not sizes:
        raise DataError(f"--sizes {source} has no sizes: expected a heading and a row for each, width,depth,cost")
    return sizes


def _place(cells: Cells, meaning: str) -> int | None:
    return next((i for i, name in enumerate(cells.columns) if means(name, meaning)), None)


def _number(source: str, row: str, meaning: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (1 / LARGEST <= value <= LARGEST and (meaning == "cost" or value.is_integer())):
        expected = "a number above 0" if meaning == "cost" else "a whole number above 0"
        expected += f" and at most {LARGEST:g}"
        raise DataError(f"--sizes {source}, row {row}: {meaning} is {text or 'empty'}, expected {expected}")
    return value


def _optimum_record(optimum: Optimum) -> dict[str, object]:
    return {
        "width": optimum.width,
        "depth": optimum.depth,
        "log2_lr_optimum": optimum.log2_lr,
        "log2_lr_low": optimum.low,
        "log2_lr_high": optimum.high,
        "reason": optimum.reason,
    }


def _line(run: Run) -> str:
    seed = f", seed {run.seed}" if run.seed else ""
    return f"width {run.width}, depth {run.depth}, log2 LR {run.log2_lr:.2f}{seed} (cost {si(run.cost)}): {run.why}"


def _optimum_line(optimum: Optimum) -> str:
    if optimum.log2_lr is None:
        return f"width {optimum.width}, depth {optimum.depth}: no best LR, {optimum.reason}"
    return (
        f"width {optimum.width}, depth {optimum.depth}: best log2 LR {optimum.log2_lr:.2f} "
        f"[{optimum.low:.2f}, {optimum.high:.2f}]"
    )
