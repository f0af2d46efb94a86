"""Cells of tables: csv of any separator, spreadsheets, parquet, json and pastes, all as rows of text."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import shlex
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mupsweep.documents import leaves, parse_json
from mupsweep.errors import DataError

FORMATS = "csv, tsv, xlsx, parquet, jsonl, or a paste of a table"
DELIMITERS = "\t;|,"
_BYTE_ORDER_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
_RULE = re.compile(r"[\s|:+=-]*[+=-][\s|:+=-]*")  # a line below a heading, of markdown, psql or reStructuredText


@dataclass(frozen=True)
class Record:
    """One line of a table.

    Attributes:
        name: its number in the file, where the heading is row 1, or the id of a W&B run.
        cells: text, as many as the table has columns; empty where there is nothing.
    """

    name: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Cells:
    """A table before anything in it is understood.

    Attributes:
        source: what the user gave to --from.
        kind: what a record is called, "row" or "run".
    """

    source: str
    columns: tuple[str, ...]
    records: tuple[Record, ...]
    kind: str = "row"

    def place(self, record: Record) -> str:
        """Where a record stands, for messages: --from runs.csv, row 7."""
        return f"--from {self.source}, {self.kind} {record.name}"

    def column(self, index: int) -> list[str]:
        """The cells of one column."""
        return [record.cells[index] for record in self.records]


def of_mappings(source: str, mappings: Iterable[tuple[str, Mapping[str, Any]]], kind: str = "row") -> Cells:
    """Named mappings as a table with a column for every key; keys of nested mappings are joined by dots."""
    try:
        flat = [(name, flattened(mapping)) for name, mapping in mappings]
    except RecursionError as error:
        raise DataError(f"--from {source} is nested too deep: expected one object a {kind}") from error
    columns = tuple(dict.fromkeys(key for _, row in flat for key in row))
    records = (Record(name, tuple(_text(row.get(column)) for column in columns)) for name, row in flat)
    return Cells(source, _one_line(columns), tuple(records), kind)


def read_cells(source: str) -> Cells:
    """The cells of a file, or of stdin for "-".

    Raises:
        DataError: there is no table in it.
    """
    content = _content(source)
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"--from {source} is a damaged gzip file ({error}): fetch it again") from error
    if not content.strip():
        raise DataError(f"--from {source} is empty: expected {FORMATS}, with a heading and a row for every run")
    if content[:4] == b"PAR1":
        return _parquet(source, content)
    if content[:4] in (b"PK\x03\x04", b"\xd0\xcf\x11\xe0"):
        return _spreadsheet(source, content)
    text = _decoded(source, content)
    start = text.lstrip()[:200]
    if start.startswith("version https://git-lfs"):
        raise DataError(f"--from {source} is a git-lfs pointer, not the file itself: git lfs pull, and try again")
    if start.startswith("<"):
        raise DataError(f"--from {source} is a web page, not a table: download the raw file, {FORMATS}")
    if re.match(r"\{|\[[\s{\[]", start):
        return _json(source, text)
    try:
        rows = list(_rows(text))
    except csv.Error as error:
        raise DataError(f"--from {source} is no readable csv ({error}): leave long texts out of the export") from error
    return _with_heading(source, rows)


def _content(source: str) -> bytes:
    if source == "-":
        return sys.stdin.buffer.read()
    if re.match(r"\w+://", source):
        raise DataError(f"--from {source} is an address: curl -L -o runs.csv ADDRESS, then --from runs.csv")
    if Path(source).is_dir():
        raise DataError(
            f"--from {source} is a folder: a sweep is judged without --from, mupsweep transfer {shlex.quote(source)}"
        )
    try:
        return Path(source).read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(
            f"--from {source} cannot be read: {getattr(error, 'strerror', None) or error}; expected a file "
            f"({FORMATS}), - for stdin, or wandb:ENTITY/PROJECT"
        ) from error


def _decoded(source: str, content: bytes) -> str:
    """The text of a file; bytes that are no UTF-8 are taken for those of a spreadsheet's "ANSI" export."""
    marked = next((name for mark, name in _BYTE_ORDER_MARKS if content.startswith(mark)), None)
    for encoding in (marked,) if marked else ("utf-8", "cp1252"):
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text
    raise DataError(f"--from {source} cannot be read: it is no text and none of the known formats; expected {FORMATS}")


# Formats


def _parquet(source: str, content: bytes) -> Cells:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # text and dates that are none
        message = str(error).partition("\n")[0]
        raise DataError(f"--from {source} is a damaged parquet file ({message}): fetch or export it again") from error
    return of_mappings(source, ((str(number), row) for number, row in enumerate(rows, 1)))


def _spreadsheet(source: str, content: bytes) -> Cells:
    """The first sheet of a workbook."""
    import pandas

    try:
        frame = pandas.read_excel(io.BytesIO(content), header=None, dtype=object, keep_default_na=False, na_values=[])
    except ImportError as error:
        raise DataError(
            f"--from {source} is a spreadsheet, which the package {error.name or 'openpyxl'} reads: "
            "pip install openpyxl, or save the sheet as csv"
        ) from error
    except Exception as error:  # each reader of workbooks has errors of its own
        raise DataError(f"--from {source} is no readable spreadsheet ({error}): save the sheet as csv") from error
    rows = ([_text(cell) for cell in row] for row in frame.itertuples(index=False))
    return _with_heading(source, [(number, row) for number, row in enumerate(rows, 1) if any(row)])


def _json(source: str, text: str) -> Cells:
    """Objects, one a line or in an array; or columns as lists; or W&B's table, {"columns": [...], "data": [...]}."""
    try:
        content: Any = json.loads(text)
    except ValueError:
        content = list(_json_lines(source, text))
    except RecursionError as error:
        raise DataError(f"--from {source} is nested too deep: expected one JSON object a run") from error
    if isinstance(content, dict) and isinstance(content.get("columns"), list) and isinstance(content.get("data"), list):
        content = [dict(zip(content["columns"], row, strict=False)) for row in content["data"]]
    elif isinstance(content, dict) and content and all(isinstance(column, list) for column in content.values()):
        content = [dict(zip(content, row, strict=False)) for row in zip(*content.values(), strict=False)]
    elif isinstance(content, dict):
        content = [content]
    for number, row in enumerate(content, 1):
        if not isinstance(row, dict):
            raise DataError(f'--from {source}, row {number}: expected one JSON object a run, as {{"lr": 0.001, ...}}')
    return of_mappings(source, ((str(number), row) for number, row in enumerate(content, 1)))


def _json_lines(source: str, text: str) -> Iterator[Any]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield parse_json(line)
            except ValueError as error:
                raise DataError(
                    f"--from {source}, row {number}: no JSON ({error}); expected one object a line, or an array of them"
                ) from error


def _rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """Lines of text, split into cells, with their numbers."""
    lines = list(enumerate(text.splitlines(), 1))
    if lines and (declared := re.fullmatch(r"sep=(.)", lines[0][1].strip().lower())):  # Excel's own first line
        lines, delimiter = lines[1:], declared[1]
    else:
        lines = _without_comments([(number, line) for number, line in lines if line.strip()])
        delimiter = _delimiter(lines[0][1]) if lines else ","
    if delimiter not in (None, "|"):
        reader = csv.reader(
            io.StringIO("\n".join(line for _, line in lines)), delimiter=delimiter, skipinitialspace=True
        )
        yield from _numbered(reader, [number for number, _ in lines])
        return
    lines = [(number, line.strip()) for number, line in lines if not _RULE.fullmatch(line)]
    if delimiter == "|":
        framed = all(line.startswith("|") for _, line in lines)
        for number, line in lines:
            yield number, [_bare(cell) for cell in (line[1:].removesuffix("|") if framed else line).split("|")]
        return
    # headings of several words stand apart by several spaces, if the rows do too
    wide = [(number, re.split(r"\t|\s{2,}", line)) for number, line in lines]
    yield from (
        wide
        if len({len(cells) for _, cells in wide}) == 1 and len(wide[0][1]) > 1
        else ((number, line.split()) for number, line in lines)
    )


def _numbered(reader: Iterator[list[str]], numbers: Sequence[int]) -> Iterator[tuple[int, list[str]]]:
    """The rows of a csv reader with the numbers of their first lines."""
    start = 0
    for row in reader:
        if any(cell.strip() for cell in row):
            yield numbers[start], [cell.strip() for cell in row]
        start = reader.line_num  # type: ignore[attr-defined]


def _without_comments(lines: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Lines without those that begin with #, the last of which is the heading where numbers follow at once."""
    comments = [(number, line) for number, line in lines if line.lstrip().startswith("#")]
    rest = [(number, line) for number, line in lines if not line.lstrip().startswith("#")]
    if comments and rest and not re.search(r"[A-Za-z]{2}", re.sub(r"(?i)\bnan\b|\binf\b", "", rest[0][1])):
        number, line = [comment for comment in comments if comment[0] < rest[0][0]][-1]
        return [(number, line.lstrip("# ")), *rest]
    return rest


def _delimiter(heading: str) -> str | None:
    """What separates the cells: the mark that stands most often outside the heading's quotes, None for white space.

    Only the heading votes, since a comma in a number may be a decimal one.
    """
    marks = Counter(char for char in re.sub(r'"[^"]*"', "", heading) if char in DELIMITERS)
    return max(DELIMITERS, key=lambda mark: marks[mark]) if marks else None


def _bare(cell: str) -> str:
    """A cell of markdown without its emphasis."""
    return cell.strip().strip("*`").strip()


def _with_heading(source: str, rows: list[tuple[int, list[str]]]) -> Cells:
    """A table whose heading is the first row with several names."""
    heading = next((i for i, (_, row) in enumerate(rows) if sum(bool(cell) for cell in row) > 1), 0)
    if not rows:
        raise DataError(f"--from {source} is empty: expected {FORMATS}, with a heading and a row for every run")
    columns = rows[heading][1]
    while columns and not columns[-1]:
        columns = columns[:-1]
    records = []
    for number, row in rows[heading + 1 :]:
        if row == rows[heading][1]:  # of a file that was appended to another
            continue
        if len(row) < len(columns) or any(row[len(columns) :]):  # cut off, or a decimal comma
            raise DataError(
                f"--from {source}, row {number}: expected {len(columns)} cells, as in the heading, not {len(row)}; "
                "quote cells that hold the separator"
            )
        records.append(Record(str(number), tuple(row[: len(columns)])))
    return Cells(source, _one_line(columns), tuple(records))


def _one_line(columns: Iterable[str]) -> tuple[str, ...]:
    """Names as messages can show them: a quote that is not closed takes in lines."""
    return tuple(" ".join(column.split()) for column in columns)


def flattened(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a nested mapping by their dotted keys; lists are left out."""
    return {key: value for key, value in leaves(mapping) if not isinstance(value, list | tuple)}


def _text(value: Any) -> str:
    """A cell's value as text from which a number is read back as it was."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value).strip()
