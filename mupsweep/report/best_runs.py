"""The run of every size that trained nearest to its best LR, whose course through training the views show."""

from __future__ import annotations

from collections import defaultdict

from mupsweep.analysis.analysis import Analysis
from mupsweep.analysis.labels import DONE, Label
from mupsweep.analysis.optimum import Optimum
from mupsweep.analysis.run_result import RunResult, Size


def best_runs(analysis: Analysis) -> dict[tuple[Label, Size], RunResult]:
    """By variant and size, the finished run nearest to the best LR; of seeds the first."""
    runs: dict[tuple[Label, Size], list[RunResult]] = defaultdict(list)
    for run in analysis.runs:
        if run.status == DONE:
            runs[run.label, run.size].append(run)
    nearest = {}
    for group in analysis.groups:
        for optimum in group.optima:
            key, best = (group.label, optimum.curve.size), _best_lr(optimum)
            if best is not None and runs[key]:
                distances = [(abs(run.log2_lr - best), run.seed) for run in runs[key]]
                nearest[key] = runs[key][distances.index(min(distances))]
    return nearest


def _best_lr(optimum: Optimum) -> float | None:
    """The fitted best LR, or else the best one that was trained, or None."""
    if optimum.log2_lr is not None:
        return optimum.log2_lr
    return min(optimum.curve.usable, key=lambda p: p.mean).log2_lr if optimum.curve.usable else None
