"""Norms of matrices through training, as the runs of a sweep recorded them (`training.norm_points`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

from mupsweep.analysis.run_result import RunResult
from mupsweep.store import matrix_norms
from mupsweep.store.sweep_dir import SweepDir


@dataclass(frozen=True)
class NormRow:
    """A matrix of a run after one of its steps; the fields are the columns of norms.csv.

    Attributes:
        steps: of the whole run.
        norm: ||W||_R; of an embedding the RMS of its entries.
        relative_update: ||W_t+1 - W_t||_R / ||W_t||_R of the step.
    """

    run_id: str
    model: str
    parametrization: str
    optimizer: str
    width: int
    depth: int
    log2_lr: float
    seed: int
    steps: int
    step: int
    role: str
    tensor: str
    norm: float | None
    relative_update: float | None


FIGURES = {  # file -> column, name
    "norms": ("norm", r"$\|W\|_R$"),
    "updates": ("relative_update", r"$\|\Delta W\|_R\,/\,\|W\|_R$ of a step"),
}
COLUMNS = tuple(field.name for field in fields(NormRow))


def are_tracked(sweep: SweepDir) -> bool:
    """Whether any variant of a sweep records norms, so that its metrics are worth reading for them."""
    variants = sweep.read_config().get("variants") or ()
    return any(variant.get("training", {}).get("norm_points") for variant in variants)


def read_norms(sweep: SweepDir, runs: Iterable[RunResult]) -> Iterator[NormRow]:
    """What finished runs of a sweep recorded; nothing of those that did not track norms."""
    for run in runs if are_tracked(sweep) else ():
        shared = {column: getattr(run, column) for column in COLUMNS[: COLUMNS.index("step")]}
        for row in sweep.run(run.run_id).metrics():
            for norm in matrix_norms.in_row(row):
                yield NormRow(**shared, step=row["step"], **norm._asdict())
