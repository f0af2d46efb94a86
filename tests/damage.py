"""Random damage to files, as Hypothesis draws it: bytes that were cut or flipped, values of another type or missing."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# the folder of a test is that of all its examples
of_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def undamaged_copy(of: Path, at: Path) -> None:
    """Copy a folder, in place of what an earlier example of the test has left."""
    shutil.rmtree(at, ignore_errors=True)
    shutil.copytree(of, at)


CELLS = st.one_of(
    st.sampled_from(
        ["", "nan", "inf", "-1", "1e30", "abc", "3.5±0.01", "1e400", "\x1b[31m", "../../x", "2^-10", '"', "9" * 400]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
)
STRANGE = st.one_of(
    st.sampled_from(
        [None, True, 0, -1, 1e30, 1e308, 10**400, "", "abc", "../../x", "/etc/passwd", "x" * 3000, "\x1b[31m", "\n"]
    ),
    st.sampled_from(
        [
            math.nan,
            math.inf,
            [],
            {},
            [[]],
            {"kind": "os.path"},
            "${oc.env:HOME}",
            "\u00b2",
            "1e5",
            "running",
            2**63,
            1e-300,
        ]
    ),
    st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False),
    st.integers(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of every value in plain data."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


@st.composite
def damaged_data(draw: st.DrawFn, value: Any) -> Any:
    """Plain data with one value replaced or left out, or a key more."""
    copy = json.loads(json.dumps(value))
    path = draw(st.sampled_from(list(places(copy))))
    if not path:
        return draw(STRANGE)
    parent = copy
    for key in path[:-1]:
        parent = parent[key]
    change = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
    if change == "remove":
        del parent[path[-1]]
    elif change == "add" and isinstance(parent, dict):
        parent["unknown"] = draw(STRANGE)
    else:
        parent[path[-1]] = draw(STRANGE)
    return copy


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes that were cut or flipped."""
    if draw(st.booleans()):
        return content[: draw(st.integers(0, len(content)))]
    flipped = bytearray(content)
    for place in draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        flipped[place] = draw(st.integers(0, 255))
    return bytes(flipped)


@st.composite
def damaged_cells(draw: st.DrawFn, content: bytes) -> bytes:
    """A csv with some cells replaced."""
    rows = [line.split(",") for line in content.decode().splitlines()]
    for _ in range(draw(st.integers(1, 3))):
        row = draw(st.integers(0, len(rows) - 1))
        rows[row][draw(st.integers(0, len(rows[row]) - 1))] = draw(CELLS)
    return "\n".join(",".join(row) for row in rows).encode()


@st.composite
def damaged_file(draw: st.DrawFn, path: Path) -> bytes:
    """The content of a record, damaged as data or as bytes."""
    content = path.read_bytes()
    if path.suffix not in (".yaml", ".json", ".jsonl", ".csv") or draw(st.integers(0, 3)) == 0:
        return draw(damaged_bytes(content))
    if path.suffix == ".yaml":
        return yaml.safe_dump(draw(damaged_data(yaml.safe_load(content)))).encode()
    if path.suffix == ".json":
        return json.dumps(draw(damaged_data(json.loads(content)))).encode()
    if path.suffix == ".csv":
        return draw(damaged_cells(content))
    lines = content.splitlines()
    row = draw(st.integers(0, len(lines) - 1))
    lines[row] = json.dumps(draw(damaged_data(json.loads(lines[row])))).encode()
    return b"\n".join(lines) + b"\n"
