"""How often the intervals of optimum and drift hold the truth, on synthetic sweeps: `python scripts/calibrate.py 60`.

Four sizes; valleys that are parabolic, lopsided or log-cosh; seeds shift whole curves, noise grows above the optimum
and runs far above it diverge. Each line is one setting with the fraction of intervals that cover, and the verdicts.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from mupsweep.transfer import analyse

SIZES = 4
CASES = ((3, 1.0, 0.005), (2, 0.5, 0.01), (3, 1.0, 0.01))  # seeds, octaves between LRs, noise in nats
DRIFTS = (0.0, -0.77)  # octaves per doubling


def parabola(d: float) -> float:
    return 0.04 * d * d


def lopsided(d: float) -> float:
    return 0.03 * d * d + 0.004 * abs(d) ** 3 if d < 0 else 0.05 * d * d + 0.01 * d**3


def log_cosh(d: float) -> float:
    return 0.06 * math.log(math.cosh(1.2 * d)) + 0.01 * math.exp(min(1.5 * d, 6.0)) - 0.015 * d - 0.01


def sweep(
    random: np.random.Generator, valley: Callable[[float], float], drift: float, seeds: int, step: float, noise: float
) -> list[dict[str, Any]]:
    """The runs of one synthetic sweep."""
    rows = []
    for k in range(SIZES):
        optimum = -7.3 + drift * k
        for seed in range(seeds):
            shift = random.normal(0, 2 * noise)
            for x in np.arange(-13.0, -2.9, step):
                d = float(x) - optimum
                loss = 2.5 - 0.1 * k + valley(d) + shift + random.normal(0, noise * (1 + 0.5 * max(0.0, d)))
                rows.append(
                    {
                        "model": "m",
                        "optimizer": "o",
                        "parametrization": "p",
                        "width": 32 * 2**k,
                        "depth": 4,
                        "width_ratio": 2.0**k,
                        "depth_ratio": 1.0,
                        "log2_lr": float(x),
                        "seed": seed,
                        "status": "diverged" if d > 3.2 else "done",
                        "val_loss": None if d > 3.2 else loss,
                    }
                )
    return rows


def main(count: int) -> None:
    for valley in (parabola, lopsided, log_cosh):
        grid = np.linspace(-1, 1, 4001)
        offset = float(min(grid, key=lambda d: valley(float(d))))
        for seeds, step, noise in CASES:
            for drift in DRIFTS:
                random = np.random.default_rng(1)
                optimum, slope, verdicts = [], [], Counter[str]()
                for _ in range(count):
                    [group] = analyse(sweep(random, valley, drift, seeds, step, noise)).groups
                    for k, o in enumerate(group.optima):
                        truth = -7.3 + drift * k + offset
                        optimum.append(o.low is not None and o.high is not None and o.low <= truth <= o.high)
                    low, high = group.drift.low, group.drift.high
                    slope.append(low is not None and high is not None and low <= drift <= high)
                    verdicts[group.verdict] += 1
                print(
                    f"{valley.__name__:9} seeds {seeds}, step {step:g}, noise {noise:g}, drift {drift:+.2f}: optimum "
                    f"{np.mean(optimum):.0%}, drift {np.mean(slope):.0%}, {dict(verdicts)}",
                    flush=True,
                )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
