"""Labels of results: the choices that tell variants apart, and the outcomes of runs that are results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NAMES = ("model", "optimizer", "parametrization")
Label = tuple[str, ...]  # NAMES, and the name of a change if there is one


@dataclass(frozen=True)
class HyperparameterOverride:
    """The one hyperparameter in which a variant is not the default.

    Attributes:
        hyperparameter: its dotted key in the config; a number is the place in a list.
        default: its value in the default; None where that is null.
    """

    hyperparameter: str
    value: float
    default: float | None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> HyperparameterOverride | None:
        """That of a row of any table; None for the default."""
        if not row.get("hyperparameter"):
            return None
        default = row.get("default")
        return cls(row["hyperparameter"], float(row["value"]), None if default in (None, "") else float(default))

    @property
    def name(self) -> str:
        """optimizer.lr_ratio=0.2"""
        return f"{self.hyperparameter}={self.value:.12g}"


def label_of(row: Mapping[str, Any]) -> Label:
    """The variant of a row of any table."""
    change = HyperparameterOverride.of(row)
    names = tuple(row[key] for key in NAMES)
    return names if change is None else (*names, change.name)


LARGEST_LOG2_LR = 64


DONE, DIVERGED = "done", "diverged"
