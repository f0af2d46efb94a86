"""A locale without more than ASCII gets plots and tables in ASCII, whatever Python's own encoding is."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from run_results import results

from mupsweep.report.results_files import save_runs
from mupsweep.report.terminal import encoding

Cli = Callable[..., tuple[int, str, str]]


def written(text: str, encoded: str, environment: dict[str, str]) -> bytes:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoded)
    encoding.prepare(stream, environment)
    stream.write(text)
    stream.flush()
    return stream.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"LC_ALL": "C"}, b"uP +-1 | |- '.:"),
        ({"LANG": "POSIX"}, b"uP +-1 | |- '.:"),
        ({"LC_ALL": "C.UTF-8", "LANG": "C"}, "μP ±1 │ |─ ⠉⣀⣿".encode()),
        ({"LC_ALL": "", "LC_CTYPE": "de_DE.UTF-8", "LANG": "C"}, "μP ±1 │ |─ ⠉⣀⣿".encode()),
        ({}, "μP ±1 │ |─ ⠉⣀⣿".encode()),
    ],
)
def test_a_named_ascii_locale_gets_ascii(environment: dict[str, str], expected: bytes) -> None:
    assert written("μP ±1 │ |─ ⠉⣀⣿", "utf-8", environment) == expected


def test_a_folder_keeps_its_name_where_the_stream_can_write_it() -> None:
    assert written("folder: µ/漢·", "utf-8", {"LC_ALL": "C"}) == "folder: µ/漢.".encode()
    assert written("folder: µ/漢·", "ascii", {"LC_ALL": "C"}) == b"folder: ?/?."
    assert written("µ ± ⣀ 漢", "latin-1", {"LANG": "de_DE"}) == "µ ± . ?".encode("latin-1")


def test_a_verdict_is_drawn_in_ascii(rows: Callable, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    save_runs(Path("runs.csv"), results(rows(widths=(32, 64), log2_lrs=(-10, -9, -8, -7, -6, -5), seeds=1)))
    outputs = {}
    for locale in ("C", "C.UTF-8"):
        monkeypatch.setenv("LC_ALL", locale)
        code, outputs[locale], err = cli("transfer", "--from", "runs.csv")
        assert code == 0, err
    assert outputs["C"].isascii()
    assert "?" not in outputs["C"].replace("+-?", "")  # which is an unknown interval
    drawn = [line for line in outputs["C"].splitlines() if "|" in line or "+" in line]
    assert sum(line.count(".") + line.count("'") + line.count(":") for line in drawn) > 40
