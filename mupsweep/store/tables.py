"""Tables: runs that were trained elsewhere, read from whatever somebody exported.

Three steps: `table_cells` finds rows and columns, `table_columns` says what each column means, and here the rows become
runs. What is left out, counted once or taken for granted is said in a line each; what cannot be meant is refused.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from mupsweep.analysis.labels import DIVERGED, DONE, NAMES, HyperparameterOverride, Label, label_of
from mupsweep.analysis.run_result import RunResult
from mupsweep.errors import ConfigError, DataError
from mupsweep.formatting import counted
from mupsweep.schema import LARGEST
from mupsweep.store.table_cells import Cells, Record, read_cells
from mupsweep.store.table_columns import NO, YES, Columns, find_column, match_columns, parse_columns

NATS: Mapping[str, Callable[[float], float]] = {  # unit of loss -> nats per token
    "nats": lambda loss: loss,
    "bits": lambda loss: loss * math.log(2),
    "perplexity": lambda loss: math.log(loss) if loss > 0 else -math.inf,
}
MOST_NATS = 1000.0
UNLIKELY_NATS = 12.0  # more than guessing among 160,000 tokens loses
LEAST_LR, MOST_LR = 1e-9, 100.0
SAME_OCTAVES = 0.05  # lr and log2_lr of one row agree within this: either may be rounded
DEFAULT_NAMES = {"model": "model", "optimizer": "optimizer", "parametrization": "given"}
FINISHED_STATES = ("finished", "done", "completed", "complete", "success", "succeeded", "ok")
DIVERGED_STATES = (DIVERGED, "exploded", "nan")
FAILED_STATES = (
    *("crashed", "failed", "killed", "error", "preempted", "preempting", "timeout", "cancelled", "canceled", "aborted"),
    *("stopped", "oom"),
)
RUNNING_STATES = ("running", "pending", "queued", "starting", "scheduled", "scheduling")
HOLES = ("", "-", "--", "—", "–", "na", "n/a", "#n/a", "none", "null", "missing", "?")
LOST = ("nan", "inf", "infinity", "∞", "diverged", "div", "div.", "exploded", "#num!", "#div/0!")
USES_MUP = {**dict.fromkeys(YES, "mup"), **dict.fromkeys(NO, "sp")}
MOST_NAMED = 5  # rows in a note
FEW_VALUES = 8  # a column with at most so many is a setting
_GROUPED = {  # digits in groups of three, without and with a decimal comma
    False: re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d+)?"),
    True: re.compile(r"[+-]?[1-9]\d{0,2}(\.\d{3})+(,\d+)?"),
}
_POWER = re.compile(r"(?:([\d.]+)\s*[x×·*]\s*)?(2|10)\s*(?:\^|\*\*)\s*[({]?\s*([+-]?[\d.]+)\s*[)}]?")
_SUFFIX = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}  # of tokens


@dataclass(frozen=True)
class TableOptions:
    """How a table is to be read.

    Attributes:
        columns: meaning -> column; an empty column leaves the meaning out.
        unit: of the losses, a key of NATS.
        filters: column -> the value that a row must have to be read; of W&B, a key of its filters.
        average: of W&B histories, how many last logged steps a loss is averaged over; None for the summary's loss.
        is_start: whether more runs will follow, so that a heading alone will do, and less than three LRs of every size.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    unit: str = "nats"
    filters: Mapping[str, str] = field(default_factory=dict)
    average: int | None = None
    is_start: bool = False

    @classmethod
    def parse(
        cls,
        columns: Sequence[str] = (),
        unit: str = "nats",
        filters: Sequence[str] = (),
        average: int | None = None,
        is_start: bool = False,
    ) -> TableOptions:
        """The options of the command line.

        Raises:
            ConfigError: naming the option that cannot be meant.
        """
        if unit not in NATS:
            raise ConfigError(f"--unit {unit}: expected the unit of the losses, {', '.join(NATS)}")
        if average is not None and average < 1:
            raise ConfigError(f"--average {average}: expected how many last logged steps to average over, 1 or more")
        kept: dict[str, str] = {}
        for pair in filters:
            name, equals, value = pair.partition("=")
            if not (name and equals):
                raise ConfigError(f"--filter {pair}: expected NAME=VALUE, for example --filter group=sweep-3")
            if kept.setdefault(name, value) != value:
                raise ConfigError(f"--filter {pair}: {name}={kept[name]} is given too; one value a column")
        return cls(parse_columns(columns), unit, kept, average, is_start)


@dataclass(frozen=True)
class Table:
    """Runs that were trained elsewhere.

    Attributes:
        runs: by rising size, LR and seed.
        notes: what was matched, counted once, taken for granted and left out, and why; one line each.
    """

    runs: list[RunResult]
    notes: tuple[str, ...]


def read_table(source: str, options: TableOptions | None = None) -> Table:
    """The runs in a file, or in what comes through stdin for "-".

    parametrization, width, log2_lr (or lr) and val_loss suffice, under any usual name.

    Raises:
        DataError: naming the row and the column that cannot be read.
        ConfigError: an option is of W&B alone.
    """
    options = options or TableOptions()
    if options.average is not None:
        raise ConfigError(
            f"--average {options.average} is of W&B histories, --from wandb:ENTITY/PROJECT; {source} has one loss a row"
        )
    return runs_of(filtered(read_cells(source), options.filters), options)


def runs_of(cells: Cells, options: TableOptions) -> Table:
    """The runs in the cells of a table."""
    columns = match_columns(cells, options.columns)
    if not cells.records and options.is_start:
        return Table([], (f"read from {cells.source}: {columns.line()}",))
    if not cells.records:
        raise DataError(f"--from {cells.source} has no runs: expected a heading and one {cells.kind} for every run")
    reader = _Reader(cells, columns, options.unit)
    left_out: dict[str, list[str]] = defaultdict(list)
    rows: list[dict[str, Any]] = []
    for record in cells.records:
        row = reader.row(record)
        if isinstance(row, str):
            left_out[row].append(record.name)
        else:
            rows.append(row)
    omissions = [f"left out, {reason}: {_named(cells.kind, names)}" for reason, names in sorted(left_out.items())]
    if not rows:
        raise DataError(f"--from {cells.source} has no runs with a result: {'; '.join(omissions)}")
    _check_octaves(cells, columns, rows)
    notes = [f"read from {cells.source}: {columns.line()}", *columns.passed_over]
    notes += _assumed(columns)
    notes += _tell_batch_sizes_apart(rows)
    notes += _find_horizons(rows)
    if not options.is_start:
        _check_lrs(cells, rows)
    rows, repeats = _count_repeats(cells, columns, rows)
    notes += repeats
    notes += _find_bases(rows)
    losses = sorted(row["val_loss"] for row in rows if row["val_loss"] is not None)
    if losses and losses[len(losses) // 2] > UNLIKELY_NATS:
        notes.append(
            f"half of the losses are above {losses[len(losses) // 2]:.3g} nats per token: if they are perplexities, "
            "--unit perplexity"
        )
    runs = [RunResult.of({"run_id": "", **row}) for row in rows]
    runs.sort(key=lambda run: (run.label, run.width, run.depth, run.horizon or 0, run.log2_lr, run.seed))
    return Table(runs, (*notes, *omissions))


def filtered(cells: Cells, filters: Mapping[str, str]) -> Cells:
    """The rows of a table with given values in given columns.

    Raises:
        DataError: there is no such column, or no such row.
    """
    records = cells.records
    for name, value in filters.items():
        place = find_column(cells, name, f"--filter {name}={value}")
        there = Counter(record.cells[place] for record in records)
        records = tuple(record for record in records if record.cells[place] == value)
        if not records:
            values = ", ".join(value for value, _ in there.most_common(MOST_NAMED))
            raise DataError(
                f"--from {cells.source} has no {cells.kind} with {name}={value}: {name} is {values or 'empty'}"
            )
    return Cells(cells.source, cells.columns, records, cells.kind)


class _Reader:
    """Reads single rows of a table, by what its columns mean."""

    def __init__(self, cells: Cells, columns: Columns, unit: str) -> None:
        self.cells, self.columns, self.unit = cells, columns, unit
        self.decimal_commas = {
            key: _has_decimal_commas(cells.column(columns.index[key]))
            for key in ("lr", "log2_lr", "val_loss")
            if key in columns.index
        }

    def row(self, record: Record) -> dict[str, Any] | str:
        """The columns of a run that stand in a row, or why the row is left out."""
        state = self._state(record)
        is_lost = state == DIVERGED or self._text(record, "val_loss").casefold().lstrip("+-−") in LOST
        if state == "running":
            return "still running"
        if state == "failed" and not is_lost:
            return "crashed or failed, though the loss is no blow-up"
        if not is_lost and not self._cell(record, "val_loss"):
            return "no loss"
        if not (self._cell(record, "lr") or self._cell(record, "log2_lr")):
            return "no LR"
        size = "width" if "width" in self.columns.index else "parameters"
        if size in self.columns.index and not self._cell(record, size):
            return f"no {size}"
        outcome = self._outcome(record, is_lost)
        return {"record": record, **self._labels(record), **self._numbers(record), **outcome}

    def _labels(self, record: Record) -> dict[str, Any]:
        labels: dict[str, Any] = {key: self._name(record, key) or name for key, name in DEFAULT_NAMES.items()}
        # of a column like use_mup
        labels["parametrization"] = USES_MUP.get(labels["parametrization"].casefold(), labels["parametrization"])
        if self._text(record, "hyperparameter"):
            labels |= {"hyperparameter": self._name(record, "hyperparameter"), "value": self._number(record, "value")}
            labels |= {"default": self._number(record, "default")} if self._cell(record, "default") else {}
        return labels | {"validation": self._text(record, "validation").casefold() in YES}

    def _numbers(self, record: Record) -> dict[str, Any]:
        numbers: dict[str, Any] = {"width": 1, "depth": 1, "log2_lr": self._log2_lr(record)}
        for key in ("width", "depth", "horizon", "tokens", "batch_size"):
            if self._cell(record, key):
                numbers[key] = int(self._number(record, key, 1, whole=True))
        if text := self._cell(record, "parameters"):
            numbers["parameters"] = self._number(record, "parameters", 1 / LARGEST, whole=text[-1].isalpha())
            if "width" not in self.columns.index:
                numbers["width"] = int(self._number(record, "parameters", 1, whole=True))
        for key in ("width_ratio", "depth_ratio", "flops"):
            if self._cell(record, key):
                numbers[key] = self._number(record, key, 1 / LARGEST)
        if self._cell(record, "seed"):
            numbers["seed"] = int(self._number(record, "seed", whole=True))
        return numbers

    def _outcome(self, record: Record, is_lost: bool) -> dict[str, Any]:
        if is_lost:
            return {"status": DIVERGED, "val_loss": None}
        loss = self._number(record, "val_loss")
        nats = NATS[self.unit](loss)
        if not 0 < nats <= MOST_NATS:
            limits = {
                "nats": f"above 0 and at most {MOST_NATS:g} nats per token",
                "bits": f"above 0 and at most {MOST_NATS / math.log(2):.0f} bits per token",
                "perplexity": "above 1",
            }
            raise self._refusal(
                record,
                "val_loss",
                f"expected a loss {limits[self.unit]}; write nan for a run that exploded, --unit {'|'.join(NATS)} for "
                "other units",
            )
        return {"status": DONE, "val_loss": nats}

    def _log2_lr(self, record: Record) -> float:
        """log2 of the LR, from either column or both."""
        of_lr = None
        if self._cell(record, "lr"):
            lr = self._number(record, "lr")
            if lr < 0:
                raise self._refusal(
                    record,
                    "lr",
                    f"an LR is positive; if these are log2 LRs, --columns log2_lr={self.columns.names['lr']}",
                )
            if not LEAST_LR <= lr <= MOST_LR:
                raise self._refusal(record, "lr", f"expected the peak LR, from {LEAST_LR:g} to {MOST_LR:g}")
            of_lr = math.log2(lr)
        if not self._cell(record, "log2_lr"):
            assert of_lr is not None
            return round(of_lr, 6)  # float32 LRs and those with a digit more are the same
        log2_lr = self._number(record, "log2_lr")
        if not math.log2(LEAST_LR) <= log2_lr <= math.log2(MOST_LR):
            low, high = math.log2(LEAST_LR), math.log2(MOST_LR)
            raise self._refusal(record, "log2_lr", f"expected octaves, {low:.1f} to {high:.1f}, log2 of the peak LR")
        if of_lr is not None and abs(of_lr - log2_lr) > SAME_OCTAVES:
            raise self._refusal(
                record,
                "log2_lr",
                f"{self.columns.names['lr']}={self._cell(record, 'lr')} is 2^{of_lr:.4g}; leave one of them out, "
                "--columns lr= or --columns log2_lr=",
            )
        return log2_lr

    def _state(self, record: Record) -> str:
        """DONE, DIVERGED, "failed" or "running"."""
        text = self._text(record, "status").casefold()
        states = {DONE: FINISHED_STATES, DIVERGED: DIVERGED_STATES, "failed": FAILED_STATES, "running": RUNNING_STATES}
        for state, names in states.items():
            if text in names:
                return state
        if text in HOLES:
            return DONE
        raise self._refusal(
            record,
            "status",
            f"expected {FINISHED_STATES[0]}, {DIVERGED_STATES[0]}, {', '.join(FAILED_STATES[:3])} or "
            f"{RUNNING_STATES[0]}; --columns status= leaves the column out",
        )

    def _text(self, record: Record, meaning: str) -> str:
        place = self.columns.index.get(meaning)
        return "" if place is None else record.cells[place]

    def _name(self, record: Record, meaning: str) -> str:
        """The text of a cell that names something; a terminal would obey control characters in it."""
        return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", self._text(record, meaning)).split())

    def _cell(self, record: Record, meaning: str) -> str:
        """The text of a cell that should hold a number; empty where people write that there is none."""
        text = self._text(record, meaning)
        return "" if text.casefold() in HOLES else text

    def _number(self, record: Record, meaning: str, least: float = -LARGEST, whole: bool = False) -> float:
        text = self._cell(record, meaning)
        decimal_comma = self.decimal_commas.get(meaning, any(self.decimal_commas.values()))
        value = _number(text, decimal_comma, whole)
        if value is not None and least <= value <= LARGEST and (value.is_integer() or not whole):
            return value
        kind = "a whole number" if whole else "a number"
        hint = "; an error is a column of its own, or one row for every seed" if re.search(r"±|\+/?-|\(", text) else ""
        raise self._refusal(record, meaning, f"expected {kind} from {least:g} to {LARGEST:g}{hint}")

    def _refusal(self, record: Record, meaning: str, why: str) -> DataError:
        name, cell = self.columns.names[meaning], self._text(record, meaning)
        return DataError(f"{self.cells.place(record)}: {name}={cell!r}: {why}")


# Numbers as people write them


def _has_decimal_commas(column: Iterable[str]) -> bool:
    """Whether commas stand where points would: there are some, and no points but those of thousands."""
    texts = list(column)
    has_points = any("." in text for text in texts if not _GROUPED[True].fullmatch(text))
    return any("," in text for text in texts) and not has_points


@lru_cache(maxsize=4096)  # sizes, LRs and seeds recur
def _number(text: str, decimal_comma: bool, whole: bool) -> float | None:
    """The number in a cell, None where there is none: 1e-3, 0,001, 2^-10, 1,024, 2.5B."""
    text = text.replace("−", "-").replace("\u00a0", "").replace("\u202f", "")
    if _GROUPED[decimal_comma].fullmatch(text):
        text = text.replace("." if decimal_comma else ",", "")
    if decimal_comma:
        text = text.replace(",", ".")
    factor = 1.0
    if whole and text[-1:].lower() in _SUFFIX:
        text, factor = text[:-1].rstrip(), _SUFFIX[text[-1].lower()]
    if power := _POWER.fullmatch(text):
        try:
            return float(power[1] or 1) * float(power[2]) ** float(power[3])
        except (ValueError, OverflowError):
            return None
    if "_" in text or not text.isascii():
        return None
    try:
        value = float(text) * factor
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    return float(round(value)) if factor > 1 else value


# What rows are to each other


def _assumed(columns: Columns) -> Iterator[str]:
    """What is taken for granted without a column."""
    if "parametrization" not in columns.index:
        yield f"no column parametrization: all runs are of one, called {DEFAULT_NAMES['parametrization']}"
    if "width" not in columns.index and "parameters" in columns.index:
        yield "no column width: sizes are told apart by their parameters, which are shown as widths"
    elif "width" not in columns.index:
        yield "no column width: all runs are of one, shown as width 1"


def _names(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(row[key] for key in NAMES)


def _by_names(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[_names(row)].append(row)
    return dict(sorted(groups.items()))


def _values_by(rows: Iterable[Mapping[str, Any]], of: Sequence[str], key: str) -> dict[Hashable, set[Any]]:
    """What a column holds at every size, or whatever else the columns `of` tell apart."""
    values: dict[Hashable, set[Any]] = defaultdict(set)
    for row in rows:
        if row.get(key) is not None:
            values[tuple(row.get(k) for k in of)].add(row[key])
    return values


def _tell_batch_sizes_apart(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Batch sizes of one size are models of their own; one that grows with the size belongs to it."""
    for names, group in _by_names(rows).items():
        defaults = [row for row in group if not row.get("hyperparameter")]  # which may be the batch size
        values = _values_by(defaults, ("width", "depth", "horizon", "tokens"), "batch_size")
        if any(len(found) > 1 for found in values.values()):
            for row in group:
                if "batch_size" in row:
                    row["model"] += f" bs{row['batch_size']}"
            sizes = sorted(set().union(*values.values()))
            yield f"{'/'.join(names)}: a ladder for every batch size, {', '.join(map(str, sizes))}"
        elif len(set().union(*values.values())) > 1:
            yield f"{'/'.join(names)}: the batch size changes along with the size"


def _find_horizons(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Tokens are a horizon where a size was trained for several; one that changes with the size belongs to it."""
    for names, group in _by_names(rows).items():
        key = "horizon" if any("horizon" in row for row in group) else "tokens"
        # what a diverged run has for tokens may be how far it came
        whole = [row for row in group if key == "horizon" or row["status"] == DONE]
        values = _values_by(whole, ("width", "depth"), key)
        if any(len(found) > 1 for found in values.values()):
            for row in group:
                horizons = values.get((row["width"], row["depth"]), ())
                row["horizon"] = min((h for h in horizons if h >= row.get(key, 0)), default=row.get(key))
        elif len(set().union(*values.values())) > 1:
            for row in group:
                row["tokens"], row["horizon"] = row.get(key), None
            yield f"{'/'.join(names)}: the tokens of training change along with the size"


def _count_repeats(
    cells: Cells, columns: Columns, rows: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows without those that are equal, and with seeds that tell apart all runs of one LR.

    Other losses of one LR and seed are repeats. Which repeat at one LR belongs to which at another is not known, so
    they are numbered by a digest of their losses, which depends neither on the order of rows nor on which is lower.
    """
    by_place: dict[tuple[Any, ...], dict[tuple[Any, ...], list[dict[str, Any]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows:
        place = label_of(row), *(row.get(key) for key in ("width", "depth", "horizon", "log2_lr", "validation"))
        by_place[place][row.get("seed"), row["status"], row["val_loss"]].append(row)
    different: list[dict[str, Any]] = []
    repeats: list[list[Record]] = []
    for place, outcomes in by_place.items():
        if max(Counter(seed for seed, *_ in outcomes).values()) > 1:
            repeats.append([row["record"] for equal in outcomes.values() for row in equal])
        taken = {seed for seed, *_ in outcomes if seed is not None}
        free = (number for number in range(len(outcomes) + len(taken)) if number not in taken)
        used: set[int] = set()
        digests = {outcome: hashlib.sha256(repr((place, outcome)).encode()).digest() for outcome in outcomes}
        for outcome in sorted(outcomes, key=lambda outcome: digests[outcome]):
            seed = outcome[0]
            if seed is None or seed in used:
                seed = next(free)
            used.add(seed)
            different.append({**outcomes[outcome][0], "seed": seed})
    notes = []
    if equal := len(rows) - len(different):
        notes.append(f"{counted(equal, 'row')} equal to another, counted once")
    if repeats:
        settings = ", ".join(_settings_within(cells, columns, repeats))
        where = f" (the rows differ in {settings}: --filter NAME=VALUE keeps one)" if settings else ""
        notes.append(f"other losses of one LR and seed are repeats, at {counted(len(repeats), 'point')}{where}")
    return different, notes


def _settings_within(cells: Cells, columns: Columns, repeats: Iterable[Sequence[Record]]) -> Iterator[str]:
    """The columns without a meaning that tell repeats apart and hold few values in all, so are settings of runs."""
    places = list(repeats)
    for i, name in enumerate(cells.columns):
        values = sorted({cell for cell in cells.column(i) if cell})
        if not name or i in columns.index.values() or not 1 < len(values) <= min(FEW_VALUES, len(cells.records) // 2):
            continue
        if any(len({record.cells[i] for record in records}) > 1 for records in places):
            yield f"{name} ({', '.join(values)})"


def _find_bases(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Each group has its own base, the smallest width and depth after the longest training, where no ratio is given."""
    for names, group in _by_names(rows).items():
        ladder = [row for row in group if not row["validation"]] or group
        longest = max((row["horizon"] for row in ladder if row.get("horizon") is not None), default=None)
        sizes = {(row["width"], row["depth"]) for row in ladder if row.get("horizon") == longest}
        smallest = min(width for width, _ in sizes), min(depth for _, depth in sizes)
        base = smallest
        if smallest not in sizes and any("width_ratio" not in row or "depth_ratio" not in row for row in group):
            base = min(sizes, key=lambda size: (size[0] * size[1], size))
            yield (
                f"{'/'.join(names)}: width {smallest[0]} at depth {smallest[1]} was not trained, so the base is "
                f"width {base[0]}, depth {base[1]}"
            )
        for row in group:
            row.setdefault("width_ratio", row["width"] / base[0])
            row.setdefault("depth_ratio", row["depth"] / base[1])


def _check_octaves(cells: Cells, columns: Columns, rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse LRs in a column called log2_lr."""
    if "log2_lr" in columns.index and all(0 < row["log2_lr"] < 0.1 for row in rows):
        name, record = columns.names["log2_lr"], rows[0]["record"]
        raise DataError(
            f"{cells.place(record)}: {name}={record.cells[columns.index['log2_lr']]!r}: expected log2 of an LR, "
            f"as -10; if these are LRs, --columns lr={name},log2_lr="
        )


def _check_lrs(cells: Cells, rows: Iterable[Mapping[str, Any]]) -> None:
    """Refuse a table of which no curve can be drawn."""
    lrs: dict[tuple[Label, Any, Any, Any], set[float]] = defaultdict(set)
    for row in rows:
        if row["val_loss"] is not None and HyperparameterOverride.of(row) is None and not row["validation"]:
            lrs[label_of(row), row["width"], row["depth"], row.get("horizon")].add(row["log2_lr"])
    most = max(map(len, lrs.values()), default=0)
    if most < 3:
        raise DataError(
            f"--from {cells.source} has no size with three LRs that have a loss (the most is {most}): a curve needs "
            "three; if a column tells apart what is one size, --columns model= leaves it out"
        )


def _named(kind: str, names: Sequence[str]) -> str:
    """rows 4, 9, 12, 13, 14 and 20 more"""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{kind}{'' if len(names) == 1 else 's'} {', '.join(names[:MOST_NAMED])}{more}"
