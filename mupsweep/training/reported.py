"""Losses that a program reports while it trains: rows of JSONL or CSV, TensorBoard events, or lines of its output.

A reader is asked again and again for what is new, and keeps what it saw to say what was wrong where no loss came.
"""

from __future__ import annotations

import contextlib
import csv
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mupsweep.documents import parse_json
from mupsweep.errors import ConfigError
from mupsweep.formatting import nearest
from mupsweep.store.records import LARGEST_COUNT

EVENTS = "tfevents"  # in the name of every TensorBoard event file
RECORD_HEADER, RECORD_FOOTER = 12, 4  # bytes around a record of an event file: length with its CRC, CRC of the record
MOST_NAMES = 12  # names of keys or files that a message lists


class Reported(NamedTuple):
    """A loss as the program reported it.

    Attributes:
        step: the step it belongs to; without a key for steps, the number of the report.
        loss: the loss that runs are compared by.
        train_loss: another loss, for views.
    """

    step: int
    loss: float
    train_loss: float | None = None


@dataclass(frozen=True)
class Keys:
    """What the values are called: keys of a JSON row (also dotted, as eval.loss), columns, or tags.

    Attributes:
        step: None where reports are counted instead.
        train_loss: None where there is none.
    """

    loss: str
    step: str | None
    train_loss: str | None = None


class Reader(Protocol):
    """Reads what a program reports."""

    def read(self, ended: bool = False) -> list[Reported]:
        """Return what was reported since the last call; `ended` where nothing follows, not even the end of a line."""
        ...

    def position(self) -> int:
        """Return a number that grows while the program writes."""
        ...

    def complaint(self) -> str:
        """Say why no loss was found."""
        ...


@dataclass
class Lines:
    """The lines of a file that grows."""

    path: Path
    offset: int = 0

    def new(self, ended: bool = False) -> list[str]:
        """Return the lines since the last call; a file that became shorter was begun anew, and is read from its start.

        Carriage returns end lines too, since progress bars write them.
        """
        try:
            if self.path.stat().st_size < self.offset:
                self.offset = 0
            with self.path.open("rb") as file:
                file.seek(self.offset)
                content = file.read()
        except OSError:
            return []
        whole = len(content) if ended else max(content.rfind(b"\n"), content.rfind(b"\r")) + 1
        self.offset += whole
        return content[:whole].decode(errors="replace").splitlines()


@dataclass
class RowReader:
    """Reads rows of JSONL or CSV.

    Attributes:
        folder: the folder that the program writes to.
        name: the file's name in it; a pattern, as logs/*/metrics.csv, stands for the newest file that matches.
        keys: what the values are called.
        seen: the keys of all rows.
        count: the number of losses so far.
    """

    folder: Path
    name: str
    keys: Keys
    lines: Lines | None = None
    header: list[str] = field(default_factory=list)
    seen: dict[str, None] = field(default_factory=dict)
    count: int = 0

    def read(self, ended: bool = False) -> list[Reported]:
        path = newest_match(self.folder, self.name)
        if path is None:
            return []
        if self.lines is None or self.lines.path != path:
            self.lines, self.header = Lines(path), []
        found: list[Reported] = []
        for row in self.rows(self.lines, ended):
            self.seen |= dict.fromkeys(map(str, row))
            loss, step = number(row, self.keys.loss), None
            if self.keys.step is not None:
                step = step_of(number(row, self.keys.step))
            if loss is None or (step is None and self.keys.step is not None):
                continue
            self.count += 1
            train_loss = number(row, self.keys.train_loss) if self.keys.train_loss else None
            found.append(Reported(self.count if step is None else step, loss, train_loss))
        return found

    def rows(self, lines: Lines, ended: bool) -> Iterator[Mapping[str, Any]]:
        """Yield the new rows as mappings; lines that are none are left out."""
        starts = lines.offset == 0
        for line in lines.new(ended):
            if Path(self.name).suffix.lower() in CSV:
                if starts:
                    self.header, starts = [], False
                cells = split_cells(line)
                if not self.header:
                    self.header = [cell.strip() for cell in cells]
                elif len(cells) == len(self.header):
                    yield dict(zip(self.header, cells, strict=True))
                continue
            with contextlib.suppress(ValueError):
                row = parse_json(line)
                if isinstance(row, dict):
                    yield row

    def position(self) -> int:
        return 0 if self.lines is None else self.lines.offset

    def complaint(self) -> str:
        if self.lines is None:
            wrote = sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())
            others = listed("but ", wrote) or "nor anything else"
            return f"it wrote no trainer.metrics={self.name} under {{dir}}, {others}"
        return wrong_key(self.lines.path.name, self.keys, list(self.seen))


@dataclass
class EventReader:
    """Reads the scalars of TensorBoard event files.

    Attributes:
        folder: the folder whose event files count, at any depth, or one of them.
        offsets: how far every file was read.
        seen: every tag.
    """

    folder: Path
    keys: Keys
    offsets: dict[Path, int] = field(default_factory=dict)
    seen: dict[str, None] = field(default_factory=dict)
    train_losses: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parse = event_parser()

    def read(self, ended: bool = False) -> list[Reported]:
        found: list[Reported] = []
        files = [self.folder] if self.folder.is_file() else sorted(self.folder.rglob(f"*{EVENTS}*"))
        for path in files:
            for record in self.records(path):
                event = self.parse(record)
                if event is None or (step := step_of(event.step)) is None:
                    continue
                for value in event.summary.value:
                    self.seen[value.tag] = None
                    scalar = scalar_of(value)
                    if scalar is None:
                        continue
                    if value.tag == self.keys.train_loss:
                        self.train_losses[step] = scalar
                    if value.tag == self.keys.loss:
                        found.append(Reported(step, scalar, self.train_losses.get(step)))
        return found

    def records(self, path: Path) -> Iterator[bytes]:
        """Yield the whole records of a file that were not read before."""
        offset = self.offsets.get(path, 0)
        try:
            with path.open("rb") as file:
                file.seek(offset)
                content = file.read()
        except OSError:
            return
        start = 0
        while start + RECORD_HEADER <= len(content):
            (length,) = struct.unpack_from("<Q", content, start)
            end = start + RECORD_HEADER + length + RECORD_FOOTER
            if end > len(content):
                break
            yield content[start + RECORD_HEADER : end - RECORD_FOOTER]
            start = end
        self.offsets[path] = offset + start

    def position(self) -> int:
        return sum(self.offsets.values())

    def complaint(self) -> str:
        if not self.offsets:
            return f"it wrote no TensorBoard events under {self.folder} (trainer.metrics)"
        return wrong_key("its events", self.keys, list(self.seen))


@dataclass
class OutputReader:
    """Reads losses off what a program prints.

    Attributes:
        lines: of the program's output.
        pattern: with the group `loss`, and `step` and `train_loss` where the output has them.
        last: the last line that holds anything.
    """

    lines: Lines
    pattern: re.Pattern[str]
    count: int = 0
    last: str = ""

    def read(self, ended: bool = False) -> list[Reported]:
        found: list[Reported] = []
        for line in self.lines.new(ended):
            self.last = line.strip() or self.last
            match = self.pattern.search(line)
            groups = {} if match is None else match.groupdict()
            loss, step = number(groups, "loss"), step_of(number(groups, "step"))
            if loss is not None:
                self.count += 1
                found.append(Reported(self.count if step is None else step, loss, number(groups, "train_loss")))
        return found

    def position(self) -> int:
        return self.lines.offset

    def complaint(self) -> str:
        last = f"; its last line was {shortened(self.last)!r}" if self.last else "; it printed nothing"
        return f"no line of its output has trainer.pattern={self.pattern.pattern}{last}"


CSV = (".csv", ".tsv")
ROWS = (*CSV, ".jsonl", ".ndjson", ".json", ".log", ".txt")


def reader_of(folder: Path, metrics: str, keys: Keys) -> Reader:
    """The reader of a file or folder that a program writes under `folder`, by its name."""
    name = metrics.removeprefix("{dir}").lstrip("/") if metrics.startswith("{dir}") else metrics
    if Path(name).suffix.lower() in ROWS:
        return RowReader(folder, name, keys)
    return EventReader(folder / name, keys)


def newest_match(folder: Path, name: str) -> Path | None:
    """The file of a name in a folder, or the newest that matches it; None where there is none yet."""
    if not set(name) & set("*?["):
        path = folder / name
        return path if path.is_file() else None
    return max(folder.glob(name), key=lambda path: path.stat().st_mtime_ns, default=None)


def number(row: Mapping[str, Any], key: str) -> float | None:
    """The number of a key, or of a dotted path of keys, nan and inf included; None where there is none."""
    value: Any = row
    for part in [key] if key in row else key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None or isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def step_of(value: float | None) -> int | None:
    """The number of a step; None for what is none, such as nan."""
    return int(value) if value is not None and 0 <= value <= LARGEST_COUNT else None


def split_cells(line: str) -> list[str]:
    """The cells of a line of CSV, separated by tabs, semicolons or commas."""
    delimiter = "\t" if "\t" in line else ";" if ";" in line and "," not in line else ","
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:  # a cell of more than 131,072 characters
        return []


def event_parser() -> Callable[[bytes], Any]:
    """What turns a record of an event file into an event, or into None where the record is damaged.

    Raises:
        ConfigError: no package that knows the format is installed.
    """
    try:
        from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]
    except ImportError:
        try:
            from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-not-found]
        except ImportError as error:
            raise ConfigError(
                "trainer.metrics names no .jsonl or .csv, so it is read as TensorBoard events, which needs the package "
                "tensorboardX or tensorboard: pip install tensorboardX"
            ) from error
    from google.protobuf.message import DecodeError

    def parse(record: bytes) -> Any:
        try:
            return Event.FromString(record)
        except DecodeError:
            return None

    return parse


def scalar_of(value: Any) -> float | None:
    """The number of a value of a TensorBoard summary; None where it is no scalar."""
    if value.HasField("simple_value"):
        return float(value.simple_value)
    tensor = value.tensor
    if value.HasField("tensor") and not tensor.tensor_shape.dim:
        for numbers in (tensor.float_val, tensor.double_val):
            if len(numbers) == 1:
                return float(numbers[0])
        for form, size in (("<f", 4), ("<d", 8)):
            if len(tensor.tensor_content) == size:
                return float(struct.unpack(form, tensor.tensor_content)[0])
    return None


def wrong_key(where: str, keys: Keys, seen: Sequence[str]) -> str:
    """Why rows with these keys gave no loss."""
    if not seen:
        return f"{where} holds no rows"
    key, option = (keys.loss, "loss") if keys.loss not in seen or keys.step in (None, *seen) else (keys.step, "step")
    if key in seen:
        return f"{where} has no number under trainer.{option}={key}"
    return f"{where} has no trainer.{option}={key}; {nearest(str(key), list(seen)[:MOST_NAMES])}"


def listed(before: str, names: Sequence[str]) -> str:
    """Some names, as many as a message takes; empty where there are none."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"{before}{', '.join(names[:MOST_NAMES])}{more}" if names else ""


def shortened(text: str, length: int = 160) -> str:
    """The end of a text that is too long for a message."""
    return text if len(text) <= length else f"...{text[-length:]}"
