"""How often intervals hold the truth and verdicts are wrong, on synthetic sweeps: `python scripts/calibrate.py 2000`.

A sweep is a ladder of three or four sizes with a known optimum each. What it looks like is drawn: the valley
(parabolic, lopsided, log-cosh, or a parabola that breaks at a cliff), its curvature, the place of the optimum between
the LRs, no drift or one octave per doubling or half of it, the grid's step, seeds, noise that grows towards the cliff
and now and then hits one run hard, seeds that shift and tilt whole curves, runs that are missing and runs that diverge.

Printed are the coverage of nominal 95 % intervals per valley and setting, and the verdicts per true drift.
"""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mupsweep.analysis.analysis import analyse
from mupsweep.analysis.labels import DIVERGED, DONE
from mupsweep.analysis.run_result import RunResult
from mupsweep.analysis.transfer import DRIFTS, INCONCLUSIVE, TRANSFERS

DRIFT = {"none": 0.0, "half": -0.5, "one": -1.0}  # octaves per doubling
LOWEST, HIGHEST = -13.0, -3.0  # log2 LR
CLIFF = 3.2  # octaves above the optimum, where runs diverge


def parabola(d: float) -> float:
    return 0.04 * d * d


def lopsided(d: float) -> float:
    return 0.03 * d * d + 0.004 * abs(d) ** 3 if d < 0 else 0.05 * d * d + 0.01 * d**3


def log_cosh(d: float) -> float:
    return 0.06 * math.log(math.cosh(1.2 * d)) + 0.01 * math.exp(min(1.5 * d, 6.0)) - 0.015 * d - 0.01


def broken(d: float) -> float:
    return 0.04 * d * d + 1.0 * max(0.0, d - 2.2) ** 2


VALLEYS: tuple[Callable[[float], float], ...] = (parabola, lopsided, log_cosh, broken)
GRID = np.linspace(-1, 1, 4001)
LOWEST_OF: dict[Callable[[float], float], float] = {
    v: float(GRID[np.argmin([v(float(d)) for d in GRID])]) for v in VALLEYS
}


@dataclass(frozen=True)
class Setting:
    """What one synthetic sweep is drawn as."""

    valley: Callable[[float], float]
    drift: str
    start: float  # log2 LR of the base's optimum
    steepness: float
    sizes: int
    seeds: int
    step: float
    noise: float  # nats, of one run at the optimum

    def optimum(self, size: int) -> float:
        return self.start + DRIFT[self.drift] * size + LOWEST_OF[self.valley]


def drawn(random: np.random.Generator) -> Setting:
    """A setting at random."""
    return Setting(
        valley=VALLEYS[random.integers(len(VALLEYS))],
        drift=str(random.choice(list(DRIFT))),
        start=float(random.uniform(-7.5, -6.5)),
        steepness=float(2 ** random.uniform(-1, 1)),
        sizes=int(random.integers(3, 5)),
        seeds=int(random.integers(1, 4)),
        step=float(random.choice([0.5, 1.0])),
        noise=float(2 ** random.uniform(-9, -6)),
    )


def sweep(random: np.random.Generator, s: Setting, missing: float = 0.03) -> list[RunResult]:
    """The runs of one synthetic sweep, some of them missing."""
    rows = []
    for k in range(s.sizes):
        optimum = s.start + DRIFT[s.drift] * k
        for seed in range(s.seeds):
            shift, tilt = random.normal(0, 2 * s.noise), random.normal(0, 0.2 * s.noise)
            for x in np.arange(LOWEST, HIGHEST + 0.1, s.step):
                d = float(x) - optimum
                noise = s.noise * (1 + 0.5 * max(0.0, d)) * (4 if random.random() < 0.02 else 1)
                loss = 2.5 - 0.1 * k + s.steepness * s.valley(d) + shift + tilt * d + random.normal(0, noise)
                diverged = d > CLIFF + random.normal(0, 0.2)
                if random.random() < missing:
                    continue
                rows.append(
                    RunResult(
                        run_id="",
                        model="m",
                        optimizer="o",
                        parametrization="p",
                        width=32 * 2**k,
                        depth=4,
                        width_ratio=2.0**k,
                        depth_ratio=1.0,
                        log2_lr=float(x),
                        seed=seed,
                        status=DIVERGED if diverged else DONE,
                        val_loss=None if diverged else loss,
                    )
                )
    return rows


@dataclass
class Tally:
    """What many sweeps came to; keys are valleys and settings in words."""

    optimum: dict[str, list[bool]]
    drift: dict[str, list[bool]]
    total: dict[str, list[bool]]
    verdicts: dict[str, Counter[str]]
    half_widths: list[float]

    def print(self) -> None:
        for key in self.optimum:
            columns = (
                f"{name} {np.mean(found[key]):.1%} of {len(found[key])}" if found[key] else f"{name} -"
                for name, found in (("optimum", self.optimum), ("drift", self.drift), ("total", self.total))
            )
            print(f"{key:14}", ", ".join(columns))
        print(f"median half-width of an optimum's interval: {np.median(self.half_widths):.2f} octaves")
        for drift, counts in self.verdicts.items():
            called = sum(n for verdict, n in counts.items() if verdict != INCONCLUSIVE)
            print(f"true drift {drift:5}", dict(counts), f"called {called}")
        for drift, wrong in (("one", TRANSFERS), ("none", DRIFTS)):
            counts = self.verdicts[drift]
            called = sum(n for verdict, n in counts.items() if verdict != INCONCLUSIVE)
            print(f"true drift {drift}, called {wrong!r}: {counts[wrong] / max(1, called):.1%} of the called")


def calibrate(count: int, seed: int = 1) -> Tally:
    """Analyse `count` synthetic sweeps."""
    random = np.random.default_rng(seed)
    tally = Tally(defaultdict(list), defaultdict(list), defaultdict(list), defaultdict(Counter), [])
    for _ in range(count):
        s = drawn(random)
        [group] = analyse(sweep(random, s)).groups
        keys = ("all", s.valley.__name__, f"seeds {s.seeds}", f"step {s.step:g}", f"drift {s.drift}")
        tally.verdicts[s.drift][group.verdict] += 1
        for k, found in enumerate(group.optima):
            if found.low is not None and found.high is not None:
                tally.half_widths.append((found.high - found.low) / 2)
                for key in keys:
                    tally.optimum[key].append(found.low <= s.optimum(k) <= found.high)
        for estimate, truth, table in (
            (group.drift, DRIFT[s.drift], tally.drift),
            (group.total_drift, DRIFT[s.drift] * (s.sizes - 1), tally.total),
        ):
            if estimate.low is not None and estimate.high is not None:
                for key in keys:
                    table[key].append(estimate.low <= truth <= estimate.high)
    return tally


if __name__ == "__main__":
    calibrate(int(sys.argv[1]) if len(sys.argv) > 1 else 2000).print()
