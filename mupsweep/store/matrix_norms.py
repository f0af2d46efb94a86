"""Norms of matrices in the rows of metrics.jsonl, a column per matrix, as trackers show them.

A row of a step at which norms were measured has `norm_ROLE/TENSOR`, ||W||_R after the step, and
`relative_update_ROLE/TENSOR`, ||W_t+1 - W_t||_R / ||W_t||_R.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from mupsweep.store.records import is_number, or_none

NORM, RELATIVE_UPDATE = "norm_", "relative_update_"


class MatrixNorm(NamedTuple):
    """A matrix after a step.

    Attributes:
        norm: ||W||_R; None where an entry is not finite.
        relative_update: ||W_t+1 - W_t||_R / ||W_t||_R of the step; None where it is no number.
    """

    role: str
    tensor: str
    norm: float | None
    relative_update: float | None


def columns(norms: Iterable[MatrixNorm]) -> dict[str, float | None]:
    """The columns of a row of metrics.jsonl."""
    row: dict[str, float | None] = {}
    for role, tensor, norm, relative_update in norms:
        row |= {f"{NORM}{role}/{tensor}": norm, f"{RELATIVE_UPDATE}{role}/{tensor}": relative_update}
    return row


def in_row(row: Mapping[str, Any]) -> list[MatrixNorm]:
    """What a row of metrics.jsonl says of matrices; nothing where none were measured at its step."""
    norms = []
    for key, norm in row.items():
        role, separator, tensor = key.removeprefix(NORM).partition("/")
        relative_update = row.get(RELATIVE_UPDATE + key.removeprefix(NORM))
        if key.startswith(NORM) and separator and all(map(or_none(is_number), (norm, relative_update))):
            norms.append(MatrixNorm(role, tensor, norm, relative_update))
    return norms
