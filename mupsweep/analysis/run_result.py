"""The result of a run: what the analysis reads of a summary.json, and a line of results/runs.csv."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mupsweep.analysis.labels import HyperparameterOverride, Label

Size = tuple[int, int, int | None]  # width, depth, and the tokens of training where runs have several horizons


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """A finished run, or a branch of one that ended earlier.

    Losses are in nats per token; the learning rate is that at the base shape. The fields stand in the order of the
    columns of runs.csv.

    Attributes:
        run_id: empty for a run that was trained elsewhere.
        status: DONE or DIVERGED.
        val_loss: None where the run diverged.
        flops: of a run of its own that ends where this one does.
        horizon: tokens of training; None where no run of the sweep has branches.
        hyperparameter, value, default: what differs from the default of the sweep, if anything does.
        validation: whether it validates an LR at a target, and is no part of a ladder.
        parameters, batch_size: of the model, and sequences (or whatever a table counts) a step; None where not known.
        precision: of the arithmetic; no column of runs.csv.
        micro_batch: the largest that fitted after memory ran out, None where it never did; no column of runs.csv.
    """

    run_id: str
    model: str
    parametrization: str
    optimizer: str
    width: int
    depth: int
    width_ratio: float
    depth_ratio: float
    log2_lr: float
    seed: int
    status: str
    steps: int | None = None
    tokens: int | None = None
    train_loss: float | None = None
    val_loss: float | None
    val_bits_per_byte: float | None = None
    diverged_at_step: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    device: str | None = None
    flops: float | None = None
    horizon: int | None = None
    hyperparameter: str | None = None
    value: float | None = None
    default: float | None = None
    validation: bool = False
    parameters: float | None = None
    batch_size: int | None = None
    precision: str | None = None
    micro_batch: int | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> RunResult:
        """The result in a mapping with (at least) the required columns; its other keys are left out."""
        # interned: of 100,000 runs, a copy of every name would take more memory than the numbers
        columns: dict[str, Any] = {}
        for name in _FIELDS & row.keys():
            columns[name] = sys.intern(row[name]) if isinstance(row[name], str) else row[name]
        return cls(**columns)

    @property
    def change(self) -> HyperparameterOverride | None:
        """The hyperparameter that is not the default's, if any."""
        if not self.hyperparameter or self.value is None:
            return None
        return HyperparameterOverride(
            self.hyperparameter, float(self.value), None if self.default is None else float(self.default)
        )

    @property
    def names(self) -> tuple[str, str, str]:
        return self.model, self.optimizer, self.parametrization

    @property
    def label(self) -> Label:
        change = self.change
        return self.names if change is None else (*self.names, change.name)

    @property
    def size(self) -> Size:
        return self.width, self.depth, self.horizon


_FIELDS = {field.name for field in fields(RunResult)}
CHANGE_COLUMNS = tuple(field.name for field in fields(HyperparameterOverride))
COLUMNS = tuple(f.name for f in fields(RunResult) if f.name not in ("precision", "micro_batch"))  # of runs.csv
