"""Curves: records -> loss versus LR at each size.

Everything is in octaves (log2 LR) and nats per token. A diverged run censors its point: it is drawn and it bounds the
optimum, but it has no loss to fit.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mupsweep.analysis.labels import DIVERGED, DONE, HyperparameterOverride, Label
from mupsweep.analysis.run_result import RunResult, Size
from mupsweep.formatting import si


@dataclass(frozen=True)
class Point:
    """All seeds at one LR of one size.

    Attributes:
        losses: validation loss of each seed that finished, by seed.
        diverged: how many seeds diverged.
    """

    log2_lr: float
    losses: Mapping[int, float]
    diverged: int

    @property
    def censored(self) -> bool:
        """A point with a diverged seed has no mean: its loss is only known to be high."""
        return self.diverged > 0

    @cached_property
    def mean(self) -> float:
        return sum(self.losses.values()) / len(self.losses) if self.losses else math.nan

    @cached_property
    def sem(self) -> float | None:
        """Standard error of the mean over seeds; None with fewer than two."""
        if len(self.losses) < 2:
            return None
        return statistics.stdev(self.losses.values()) / math.sqrt(len(self.losses))


@dataclass(frozen=True)
class LossCurve:
    """Loss versus LR at one size of one variant, by rising LR.

    Attributes:
        horizon: tokens after which the losses were taken; None where runs have no branches and so but one horizon.
        change: the hyperparameter that is not the default's, if any.
    """

    model: str
    optimizer: str
    parametrization: str
    width: int
    depth: int
    width_ratio: float
    depth_ratio: float
    points: tuple[Point, ...]
    horizon: int | None = None
    change: HyperparameterOverride | None = None

    @property
    def names(self) -> tuple[str, str, str]:
        return self.model, self.optimizer, self.parametrization

    @property
    def label(self) -> Label:
        return self.names if self.change is None else (*self.names, self.change.name)

    @property
    def size(self) -> Size:
        """What tells the curves of one variant apart."""
        return self.width, self.depth, self.horizon

    @property
    def usable(self) -> tuple[Point, ...]:
        """The points with a loss."""
        return tuple(p for p in self.points if p.losses and not p.censored)

    def place(self, axis: str) -> str:
        """What tells this curve from the others of its ladder."""
        names = {
            "width": f"width {self.width}",
            "depth": f"depth {self.depth}",
            "horizon": f"{si(self.horizon or 0)} tokens",
        }
        return names.get(axis, f"{self.width}x{self.depth}")

    @property
    def n_runs(self) -> int:
        return sum(len(p.losses) + p.diverged for p in self.points)

    @property
    def n_diverged(self) -> int:
        return sum(p.diverged for p in self.points)


def collect(runs: Iterable[RunResult]) -> list[LossCurve]:
    """The curves of some runs, those of the smallest size first. Unfinished runs are left out."""
    by_curve: dict[tuple[Any, ...], dict[float, list[RunResult]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run.status in (DONE, DIVERGED):
            by_curve[run.label, run.size, run.width_ratio, run.depth_ratio][run.log2_lr].append(run)
    curves = []
    for by_lr in by_curve.values():
        points = tuple(_point(log2_lr, members) for log2_lr, members in sorted(by_lr.items()))
        run = next(iter(by_lr.values()))[0]
        shape = run.width, run.depth, run.width_ratio, run.depth_ratio
        curves.append(LossCurve(*run.names, *shape, points, run.horizon, run.change))
    return sorted(curves, key=lambda c: (c.label, c.width_ratio * c.depth_ratio, c.width_ratio, c.horizon or 0))


def _point(log2_lr: float, runs: Iterable[RunResult]) -> Point:
    by_seed = sorted(runs, key=lambda run: run.seed)
    losses = {run.seed: run.val_loss for run in by_seed if run.status == DONE and run.val_loss is not None}
    return Point(log2_lr, losses, len(by_seed) - len(losses))
