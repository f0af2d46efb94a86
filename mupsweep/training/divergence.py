"""When a run has diverged, whatever trains it."""

from __future__ import annotations

import math
from collections.abc import Sequence

DIVERGED_RATIO = 1.05  # a mean loss above the first step's by this factor is divergence, not noise


def diverged_at(losses: Sequence[float], patience: float, total: int) -> int | None:
    """The step (from 1) at which a run has diverged, or None.

    A run has diverged when a loss is not finite, or when the mean of the last `patience` losses (a fraction of the run
    below 1, else steps) exceeds DIVERGED_RATIO times the loss of the first step.
    """
    for step, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            return step
    window = max(1, round(patience * total) if patience < 1 else round(patience))
    if len(losses) > window and sum(losses[-window:]) / window > DIVERGED_RATIO * losses[0]:
        return len(losses)
    return None
