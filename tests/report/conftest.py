"""Synthetic sweeps: quadratic valleys of loss over log2 LR, a cliff to their right, divergence beyond it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest

Rows = list[dict[str, Any]]
DRIFT = {"sp": -0.76, "mup": 0.05}  # octaves per doubling of width


def valley(
    widths: Iterable[int] = (16, 32, 64, 128),
    log2_lrs: Iterable[float] = (-11, -10, -9, -8, -7, -6, -5, -4),
    seeds: int = 3,
    parametrizations: Iterable[str] = ("sp", "mup"),
    optimizer: str = "adamw",
    model: str = "nanogpt",
    noise: float = 0.01,
    depths: Iterable[int] = (4,),
) -> Rows:
    """The rows of a sweep whose optimum is at 2^-7 at width 32, depth 4."""
    draw = random.Random(0)
    rows: Rows = []
    for parametrization in parametrizations:
        for width, depth in ((w, d) for w in widths for d in depths if w == 32 or d == 4):
            best = -7 + DRIFT.get(parametrization, 0.0) * math.log2(width / 32)
            floor = 2.9 - 0.13 * math.log2(width / 32) + (0.05 if parametrization == "mup" else 0.0) - 0.01 * depth
            for log2_lr in log2_lrs:
                beyond = log2_lr - best - 2.2
                for seed in range(seeds):
                    loss = floor + 0.035 * (log2_lr - best) ** 2 + 2.0 * max(0.0, beyond) ** 2 + draw.gauss(0, noise)
                    diverged = beyond + 0.2 * seed > 1.2
                    rows.append(
                        {
                            "run_id": f"{optimizer}-{parametrization}-w{width}-d{depth}-lr{log2_lr}-s{seed}",
                            "model": model,
                            "parametrization": parametrization,
                            "optimizer": optimizer,
                            "width": width,
                            "depth": depth,
                            "width_ratio": width / 32,
                            "depth_ratio": depth / 4,
                            "log2_lr": float(log2_lr),
                            "seed": seed,
                            "status": "diverged" if diverged else "done",
                            "steps": 300,
                            "tokens": 153600,
                            "train_loss": None if diverged else loss - 0.02,
                            "val_loss": None if diverged else loss,
                            "val_bits_per_byte": None if diverged else loss / math.log(2),
                            "diverged_at_step": 40 if diverged else None,
                            "seconds": 3.5,
                            "tokens_per_second": 44000.0,
                            "device": "cpu",
                        }
                    )
    return rows


@pytest.fixture
def rows() -> Callable[..., Rows]:
    """Makes the rows of a sweep: `rows(widths=..., log2_lrs=..., seeds=..., ...)`."""
    return valley
