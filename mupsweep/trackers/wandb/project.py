"""Projects of W&B as tables: what `transfer --from wandb:ENTITY/PROJECT` reads, through the client's public API."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mupsweep.errors import ConfigError, DataError
from mupsweep.store.table_cells import Cells, Record, flattened, of_mappings
from mupsweep.store.table_columns import MEANINGS, match_columns, means
from mupsweep.store.tables import DIVERGED_STATES, RUNNING_STATES, Table, TableOptions, filtered, runs_of
from mupsweep.trackers.wandb import start_service

PREFIX = "wandb:"
TIMEOUT = 20  # seconds to wait for an answer
PAGE = 200  # runs in an answer
STEPS = 1000  # of a history in an answer
ATTRIBUTES = {  # of a run, by which the server filters; every other name is of its config or summary
    "group": "group",
    "job_type": "jobType",
    "jobType": "jobType",
    "state": "state",
    "tags": "tags",
    "displayName": "displayName",
    "name": "name",
    "username": "username",
}
RESULTS = ("val_loss", "tokens", "flops")  # are read from a run's summary, everything else from its config


def is_project(source: str) -> bool:
    """Whether --from names a project of W&B."""
    return source.startswith(PREFIX)


def read_project(source: str, options: TableOptions) -> Table:
    """The runs of a W&B project.

    Args:
        source: wandb:ENTITY/PROJECT, on the server at WANDB_BASE_URL or the client's own.

    Raises:
        DataError: the server does not answer, there is no such project, or its runs cannot be read.
    """
    path = source.removeprefix(PREFIX).strip("/")
    if path.count("/") != 1:
        raise ConfigError(f"--from {source}: expected wandb:ENTITY/PROJECT, as in the address of the project's page")
    attributes = {ATTRIBUTES[name]: value for name, value in options.filters.items() if name in ATTRIBUTES}
    others = {name: value for name, value in options.filters.items() if name not in ATTRIBUTES}
    with _refusals(source):
        runs = list(_api().runs(path, filters=attributes, per_page=PAGE, lazy=False))
    if not runs:
        chosen = "".join(f" with {name}={value}" for name, value in options.filters.items() if name in ATTRIBUTES)
        raise DataError(f"--from {source} has no runs{chosen}: --filter chooses by group, state, tags or a config key")
    cells = of_mappings(source, ((_name(run), _columns(run, options)) for run in runs), "run")
    cells = filtered(cells, others)
    if options.average is None:
        return runs_of(cells, options)
    cells = _averaged(cells, {_name(run): run for run in runs}, options.average, options)
    table = runs_of(cells, options)
    return replace(table, notes=(*table.notes, f"losses are means over the last {options.average} that were logged"))


def _api() -> Any:
    """The client's public API, without a prompt where there is no key."""
    import wandb

    start_service()
    stdin = sys.stdin
    with open(os.devnull) as nothing:
        sys.stdin = nothing  # a client that finds a terminal asks for a key there
        try:
            return wandb.Api(timeout=TIMEOUT)
        finally:
            sys.stdin = stdin


@contextlib.contextmanager
def _refusals(source: str) -> Iterator[None]:
    """The client's errors in one line, with the next command."""
    from wandb.errors import AuthenticationError, UsageError

    server, path = os.environ.get("WANDB_BASE_URL", "W&B"), source.removeprefix(PREFIX)
    try:
        yield
    except UsageError as error:
        raise DataError(f"--from {source}: no API key for {server}: wandb login, or set WANDB_API_KEY") from error
    except AuthenticationError as error:
        raise DataError(
            f"--from {source}: {server} does not answer or refuses the API key ({_line(error)}): check the network, "
            "then wandb login --relogin"
        ) from error
    except ValueError as error:
        if "Could not find project" not in str(error):
            raise
        raise DataError(
            f"--from {source}: no project {path} on {server}, or none that this key may read: compare with the address "
            "of its page, wandb login --relogin changes the key"
        ) from error
    except Exception as error:  # every layer of the client has errors of its own
        raise DataError(
            f"--from {source}: {server} cannot be read ({_line(error)}): try again, or export its table as csv and "
            "give that to --from"
        ) from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _name(run: Any) -> str:
    return run.id if run.name in (None, "", run.id) else f"{run.id} ({run.name})"


def _columns(run: Any, options: TableOptions) -> dict[str, Any]:
    """The columns of one run: its state, its config, and what its summary says of results.

    A key that is in the wrong one of the two is left out, unless --columns names it: a summary's lr is that of the last
    step, and a config's loss is a choice.
    """
    named = options.columns.values()
    config, summary = flattened(run.config), flattened(run.summary_metrics)
    columns: dict[str, Any] = {"state": run.state}
    if str(summary.get("status")).casefold() in DIVERGED_STATES and run.state not in RUNNING_STATES:
        columns["state"] = summary["status"]  # of our own runs
    for key, value in config.items():
        if key in named or not (means(key, "status") or means(key, "val_loss")):
            columns.setdefault(key, value)
    settings = [meaning for meaning in MEANINGS if meaning not in RESULTS]
    for key, value in summary.items():
        if key in named or not any(means(key, meaning) for meaning in settings):
            columns.setdefault(key, value)
    return columns


def _averaged(cells: Cells, runs: Mapping[str, Any], average: int, options: TableOptions) -> Cells:
    """The table with the mean over the last logged losses of each run in place of the last one."""
    columns = match_columns(cells, options.columns)
    place, key, states = columns.index["val_loss"], columns.names["val_loss"], cells.columns.index("state")
    records = []
    for record in cells.records:
        row = list(record.cells)
        if row[states] not in RUNNING_STATES:
            with _refusals(cells.source):
                losses = _last_logged(runs[record.name], key, average)
            row[place] = str(sum(losses) / len(losses)) if losses else ""
        records.append(Record(record.name, tuple(row)))
    return replace(cells, records=tuple(records))


def _last_logged(run: Any, key: str, count: int) -> list[float]:
    """The last logged values of a key, read from the end of a run's history."""
    end, steps = run.lastHistoryStep + 1, STEPS
    while True:
        first = max(end - steps, 0)
        rows = run.scan_history(keys=[key], min_step=first, page_size=STEPS)
        values = [float(row[key]) for row in rows if row.get(key) is not None]
        if len(values) >= count or first == 0:
            return values[-count:]
        steps *= 10
