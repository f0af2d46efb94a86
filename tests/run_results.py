"""Results of runs from rows that a test writes down."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mupsweep.analysis.run_result import RunResult


def results(rows: Iterable[Mapping[str, Any]]) -> list[RunResult]:
    """The results in some rows; a row needs no run id."""
    return [RunResult.of({"run_id": "", **row}) for row in rows]
