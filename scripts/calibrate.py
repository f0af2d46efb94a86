"""How often intervals hold the truth and verdicts are wrong, on synthetic ladders: `python scripts/calibrate.py 2000`.

A ladder has three to six sizes with a known optimum each. What it looks like is drawn at random: the valley (parabola,
V, lopsided, cosh, a plateau on the left, flat at the bottom), where its right side ends (nowhere, at a cliff, at LRs
that diverge), how far the optimum moves per doubling and whether that bends, the grid, seeds, noise that is even, grows
with the LR or with the height, seeds that shift whole curves, single runs that went badly, holes. None of it is drawn
from the model that is tested (mupsweep/analysis/loss_curve.py).

Printed are, for all ladders and for every value of every property (margins, not cells): the share of 95 % intervals
that hold the truth for the sizes' optima, total drift, drift per doubling, and targets 2, 8 and 32 times the largest
size; the share of sizes with both ends; the share of verdicts that are called, and of those that are wrong (DRIFTS
although the optimum moves less than half the bound and the base's LR costs less than the harmless bound, or TRANSFERS
although it moves more than twice the bound and costs more than the costly one); median widths; and in the mean what the
LR for a target 8 times as large loses, beside what it was expected to.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes with a thread each are faster than one with two
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from mupsweep.analysis.config import VerdictBounds
from mupsweep.analysis.estimate import Estimate
from mupsweep.analysis.forecast import forecast
from mupsweep.analysis.loss_curve import LadderPosterior, SizeRuns, fit_ladder
from mupsweep.analysis.verdict import DRIFTS, INCONCLUSIVE, TRANSFERS, Verdict, judge

TARGETS = (1, 3, 5)  # doublings beyond the largest size
LOWEST, HIGHEST = -5.5, 3.5  # octaves from the middle of the sizes' optima: ends of the grids
BOUNDS = VerdictBounds()

VALLEYS: dict[str, Callable[[float], float]] = {  # of octaves from the optimum, about 1 an octave away
    "parabola": lambda u: u * u,
    "V": lambda u: 1.2 * (math.hypot(u, 0.2) - 0.2),
    "lopsided": lambda u: abs(u) ** 1.5 if u < 0 else 1.5 * u**2.4,
    "cosh": lambda u: 1.85 * (math.cosh(u) - 1),
    "plateau": lambda u: 4 * (1 - math.exp(-u * u / 4)) if u < 0 else u * u,
    "flat": lambda u: 2 * u**4 / (1 + u * u),
}
MOVES: dict[str, Callable[[float], float]] = {  # doublings of steady drift by which an optimum moved after t doublings
    "steady": lambda t: t,
    "slows": lambda t: 5 * (1 - math.exp(-t / 5)),
    "quickens": lambda t: t + 0.04 * t * t,
}


@dataclass(frozen=True)
class Setting:
    """What one ladder is drawn as; every field is a property with margins.

    Attributes:
        drift: octaves per doubling.
        gap: doublings between sizes.
        step: octaves between LRs.
        noise: nats of a run at the optimum.
        holes: share of runs that are missing.
    """

    valley: str
    right: str
    drift: float
    move: str
    sizes: int
    gap: float
    step: float
    seeds: int
    noise: float
    noise_kind: str
    holes: float = 0.03

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Setting:
        def one(*values):
            return values[rng.integers(len(values))]

        return cls(
            valley=one(*VALLEYS),
            right=one("open", "cliff", "diverges"),
            drift=one(0.0, -0.1, -0.2, -0.5, -1.0),
            move=one("steady", *MOVES),
            sizes=one(3, 4, 5, 6),
            gap=one(0.5, 1.0, 1.0, 2.0),
            step=one(0.5, 1.0),
            seeds=one(1, 2, 3),
            noise=one(0.001, 0.002, 0.004, 0.008),
            noise_kind=one("even", "by LR", "by height"),
        )

    def optimum(self, doublings: float) -> float:
        """Octaves from the base's optimum."""
        return self.drift * MOVES[self.move](doublings)


@dataclass(frozen=True)
class Ladder:
    """A drawn ladder with its truth.

    Attributes:
        optima: log2 LR, of the sizes and then of the targets.
        regret: nats that the base's optimum costs at the largest size.
        heights: nats an octave away, of the targets.
        edge: octaves right of the optimum where the valley ends; infinite where it does not.
    """

    setting: Setting
    sizes: tuple[SizeRuns, ...]
    optima: tuple[float, ...]
    regret: float
    heights: tuple[float, ...]
    edge: float

    def lost(self, target: int, log2_lr: float) -> float:
        """Nats above the lowest loss of a target, one at most."""
        u = log2_lr - self.optima[len(self.sizes) + target]
        return 1.0 if u > self.edge else min(1.0, self.heights[target] * VALLEYS[self.setting.valley](u))


def draw_ladder(rng: np.random.Generator, setting: Setting) -> Ladder:
    positions = [setting.gap * k for k in range(setting.sizes)]
    height, trend = 0.03 * 2 ** rng.uniform(-1.5, 1.5), rng.uniform(-0.2, 0.2)
    start = rng.uniform(-8, -6)
    places = [start + setting.optimum(t) for t in (*positions, *(positions[-1] + t for t in TARGETS))]
    middle = rng.uniform(-0.5, 0.5) + np.mean(places[: setting.sizes])
    grid = np.arange(math.floor((middle + LOWEST) / setting.step), (middle + HIGHEST) / setting.step) * setting.step
    edge = rng.uniform(1.2, 3.0)  # octaves right of the optimum where the valley ends
    sizes = []
    for position, optimum in zip(positions, places, strict=False):
        tall = height * math.exp(trend * position + rng.normal(0, 0.1))
        end = edge + rng.normal(0, 0.15)
        sizes.append(_draw_size(rng, setting, position, grid - optimum, optimum, tall, end))
    edge = math.inf if setting.right == "open" else edge
    moved = places[0] - places[setting.sizes - 1]
    largest = height * math.exp(trend * positions[-1])
    regret = math.inf if moved > edge else largest * VALLEYS[setting.valley](moved)
    heights = tuple(largest * math.exp(trend * doublings) for doublings in TARGETS)
    return Ladder(setting, tuple(sizes), tuple(places), regret, heights, edge)


def _draw_size(rng, setting: Setting, position: float, offsets, optimum: float, height: float, end: float) -> SizeRuns:
    lrs, losses, seeds = [], [], []
    for seed in range(setting.seeds):
        shift = rng.normal(0, 2 * setting.noise)
        for u in offsets:
            if rng.random() < setting.holes:
                continue
            rise = height * VALLEYS[setting.valley](float(u))
            noise = setting.noise * (4 if rng.random() < 0.02 else 1)
            if setting.noise_kind == "by LR":
                noise *= 1 + 0.5 * max(0.0, u)
            elif setting.noise_kind == "by height":
                noise = math.hypot(noise, 0.1 * rise)
            loss = 3.0 - 0.1 * position + rise + shift + rng.normal(0, noise)
            if setting.right == "cliff" and u > end:
                loss += rng.uniform(1, 3)
            lrs.append(optimum + float(u))
            losses.append(math.nan if setting.right == "diverges" and u > end + rng.normal(0, 0.1) else loss)
            seeds.append(seed)
    return SizeRuns.of(position, np.round(lrs, 6).tolist(), losses, seeds)


Row = dict[str, float]  # a measure of one ladder; nan where it has none


def measure(ladder: Ladder, posterior: LadderPosterior, verdict: Verdict) -> Row:
    """What one ladder adds to the table."""
    n = len(ladder.sizes)
    truth = np.array(ladder.optima)
    positions = np.array([size.position for size in ladder.sizes])
    centered = positions - positions.mean()
    moved = truth[n - 1] - truth[0]
    bound = BOUNDS.total(positions[-1])
    harmless = abs(moved) < bound / 2 and ladder.regret < BOUNDS.harmless
    harmful = abs(moved) > 2 * bound and ladder.regret > BOUNDS.costly
    sizes = [hold(optimum.estimate, at) for optimum, at in zip(posterior.optima, truth, strict=False)]
    bounded = [(held, width) for held, width in sizes if math.isfinite(width)]
    held, width = map(float, (np.mean(bounded, axis=0)) if bounded else (math.nan, math.nan))
    row: Row = {"sizes": held, "width": width, "ends": len(bounded) / n}
    row["total"], row["total width"] = hold(verdict.total_drift, moved)
    row["drift"], row["drift width"] = hold(verdict.drift, float(centered @ truth[:n] / (centered @ centered)))
    for k, (doublings, at) in enumerate(zip(TARGETS, truth[n:], strict=True)):
        expected = forecast(posterior, positions[-1] + doublings)
        name = f"x{2**doublings}"
        if expected is not None:
            row[name], row[name + " width"] = hold(expected.optimum, float(at))
            row[name + " lost"], row[name + " expected"] = ladder.lost(k, expected.log2_lr), expected.expected_regret
    row["called"] = verdict.name != INCONCLUSIVE
    row["wrong"] = (verdict.name == DRIFTS and harmless) or (verdict.name == TRANSFERS and harmful)
    return row


def hold(estimate: Estimate, truth: float) -> tuple[float, float]:
    """Whether an interval holds the truth, and its width; nan where it lacks an end."""
    if estimate.low is None or estimate.high is None:
        return math.nan, math.nan
    return float(estimate.low <= truth <= estimate.high), estimate.high - estimate.low


def one_ladder(seed: int, number: int) -> tuple[Setting, Row]:
    rng = np.random.default_rng((seed, number))
    ladder = draw_ladder(rng, Setting.draw(rng))
    posterior = fit_ladder(ladder.sizes)
    return ladder.setting, measure(ladder, posterior, judge(posterior, BOUNDS))


def calibrate(count: int, seed: int = 1, processes: int = 2) -> list[tuple[Setting, Row]]:
    """Settings and measures of `count` ladders; the numbers do not depend on the processes."""
    if processes == 1:
        return [one_ladder(seed, number) for number in range(count)]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(partial(one_ladder, seed), range(count), chunksize=4))


SHARES = ("sizes", "total", "drift", *(f"x{2**t}" for t in TARGETS), "ends", "called", "wrong")
WIDTHS = ("width", "total width", "x8 width")
LOSSES = ("x8 lost", "x8 expected")


def report(found: list[tuple[Setting, Row]]) -> str:
    """The table of margins."""
    lines = [
        f"{'':22}"
        + "".join(f"{name:>8}" for name in ("ladders", *SHARES))
        + "".join(f"{n:>13}" for n in (*WIDTHS, *LOSSES))
    ]
    groups = {"all": [row for _, row in found]}
    for property_ in fields(Setting):
        values = sorted({getattr(setting, property_.name) for setting, _ in found})
        for value in values if len(values) > 1 else ():
            rows = [row for setting, row in found if getattr(setting, property_.name) == value]
            groups[f"{property_.name} {value}"] = rows
    for name, rows in groups.items():
        column = {key: np.array([row.get(key, math.nan) for row in rows], float) for key in (*SHARES, *WIDTHS, *LOSSES)}
        shares = "".join(f"{np.nanmean(column[key]):8.1%}" for key in SHARES)
        widths = "".join(f"{np.nanmedian(column[key]):13.2f}" for key in WIDTHS)
        losses = "".join(f"{np.nanmean(column[key]):13.4f}" for key in LOSSES)
        lines.append(f"{name:22}{len(rows):8d}{shares}{widths}{losses}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Coverage and verdicts on synthetic ladders.")
    parser.add_argument("ladders", type=int, nargs="?", default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    print(report(calibrate(given.ladders, given.seed, given.processes)))
