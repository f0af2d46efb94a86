"""When a run has diverged, whatever trains it."""

from __future__ import annotations

import math
from collections.abc import Sequence

DIVERGED_RATIO = 1.05  # losses above the first step's by this factor are divergence, not noise


def diverged_at(losses: Sequence[float], patience: float, total: int) -> int | None:
    """The step (from 1) at which a run has diverged, or None.

    A run has diverged when a loss is not finite, or when most of the last `patience` losses (a fraction of the run
    below 1, else steps) exceed DIVERGED_RATIO times the loss of the first step. Their mean would not do: a spike
    during warm-up, of twice the first loss, lifts it after the run has recovered.
    """
    for step, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            return step
    window = max(1, round(patience * total) if patience < 1 else round(patience))
    high = sum(loss > DIVERGED_RATIO * losses[0] for loss in losses[-window:])
    return len(losses) if len(losses) > window and 2 * high > window else None
