"""Enough: the smallest part of a sweep that had given its answer, and what twice the effort would buy.

A part has fewer seeds, every second or third LR, or fewer sizes. It gives the answer of the whole if its verdict is the
same and its best LR at the largest size, measured or forecast from smaller sizes, is within NEAR octaves. A lucky
choice of LRs and seeds proves nothing, so every way to choose them has to.

More effort is judged before it is spent: losses of the new runs are drawn from the posterior of the runs there are, and
the ladder is fitted anew with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mupsweep.analysis.config import AnalysisConfig
from mupsweep.analysis.curves import LossCurve, Point
from mupsweep.analysis.estimate import Estimate
from mupsweep.analysis.loss_curve import DRAWS, CurveDraws
from mupsweep.analysis.transfer import LadderResult, judge_ladders, training_work
from mupsweep.analysis.verdict import INCONCLUSIVE

NEAR = 0.25  # octaves between two best LRs that are the same answer
STRIDES = (1, 2, 3)  # every LR, every second, every third
PRETENDED = 5  # draws of what more runs would show

AddedRuns = Callable[[LossCurve], list[tuple[float, int]]]  # the log2 LRs and seeds that a curve gets


@dataclass(frozen=True)
class Part:
    """Some of the runs of a ladder.

    Attributes:
        seeds: how many of them at every LR.
        stride: 2 for every second LR.
        sizes: indices into the ladder's sizes.
        ways: the curves of every way to choose these seeds and LRs.
        share: of the ladder's FLOPs, in the mean over the ways.
    """

    seeds: int
    stride: int
    sizes: tuple[int, ...]
    ways: tuple[tuple[LossCurve, ...], ...]
    share: float

    @property
    def n_runs(self) -> int:
        """The most runs of a way."""
        return max(sum(curve.n_runs for curve in curves) for curves in self.ways)


@dataclass(frozen=True)
class MoreEffort:
    """What the same effort once more would buy.

    Attributes:
        what: the runs that are added.
        optimum: octaves, half the width of the interval of the largest size's optimum; None where it keeps an open end.
        total_drift: octaves, half the width of its interval.
        decided: the chance that the verdict is decided then.
    """

    what: str
    optimum: float | None
    total_drift: float | None
    decided: float


@dataclass(frozen=True)
class Enough:
    """What a ladder's answer took, and what more would do for it.

    Attributes:
        part: the cheapest that gives the ladder's answer; the ladder itself where nothing less does; None where there
            is no answer, since the verdict is inconclusive or the largest size's optimum is not known.
        seeds, sizes: of the whole ladder.
        n_runs: of the whole ladder.
        more: ways to spend as much again.
    """

    part: Part | None
    seeds: int
    sizes: int
    n_runs: int
    more: tuple[MoreEffort, ...]


def enough(ladder: LadderResult, config: AnalysisConfig | None = None) -> Enough:
    """The smallest part of a ladder that had given its answer, and what as much effort again would buy."""
    config = config or AnalysisConfig()
    curves = tuple(optimum.curve for optimum in ladder.optima)
    seeds = max(len(point.losses) + point.diverged for curve in curves for point in curve.points)
    known = ladder.verdict != INCONCLUSIVE and ladder.optima[-1].log2_lr is not None
    part = None
    if known:
        part = next(part for part in _parts(ladder, curves, seeds) if _answers_alike(part, ladder, config))
    more = tuple(_more(ladder, what, add, config) for what, add in MORE.items())
    return Enough(part, seeds, len(curves), sum(curve.n_runs for curve in curves), more)


def _parts(ladder: LadderResult, curves: Sequence[LossCurve], seeds: int) -> list[Part]:
    """Every part, the cheapest first; the last one is the whole."""
    whole = sum(map(_work, curves))
    parts = []
    for sizes in _choices_of_sizes(len(curves), ladder.optima.index(ladder.base)):
        chosen = [curves[k] for k in sizes]
        for count in range(1, seeds + 1):
            for stride in STRIDES:
                ways = tuple(_ways(chosen, count, seeds, stride))
                share = float(np.mean([sum(map(_work, way)) for way in ways])) / whole
                parts.append(Part(count, stride, sizes, ways, share))
    return sorted(parts, key=lambda part: part.share)


def _choices_of_sizes(n: int, base: int) -> Iterator[tuple[int, ...]]:
    """Indices of the sizes up to each above the base; the base and the largest; every second size and the largest."""
    upto = [tuple(range(k)) for k in range(base + 2, n + 1)]
    yield from dict.fromkeys([*upto, (base, n - 1), (*range(base, n - 1, 2), n - 1)])


def _ways(curves: Sequence[LossCurve], count: int, seeds: int, stride: int) -> Iterator[tuple[LossCurve, ...]]:
    """The curves with `count` of the seeds and every `stride`-th LR, for every first seed and first LR."""
    names = sorted({seed for curve in curves for point in curve.points for seed in point.losses})
    lrs = sorted({point.log2_lr for curve in curves for point in curve.points})
    for first_seed in range(seeds if count < seeds else 1):
        chosen = {names[(first_seed + k) % len(names)] for k in range(count)} if names else set()
        for first in range(stride):
            kept = set(lrs[first::stride])
            yield tuple(_thinned(curve, kept, chosen, count) for curve in curves)


def _thinned(curve: LossCurve, log2_lrs: set[float], seeds: set[int], count: int) -> LossCurve:
    """An LR at which a seed diverged stays one, whichever seeds are kept: the records do not say which it was."""
    points = [
        Point(
            point.log2_lr,
            {seed: loss for seed, loss in point.losses.items() if seed in seeds},
            min(point.diverged, count),
        )
        for point in curve.points
        if point.log2_lr in log2_lrs
    ]
    return replace(curve, points=tuple(point for point in points if point.losses or point.diverged))


def _work(curve: LossCurve) -> float:
    return training_work(curve) * curve.n_runs


def _answers_alike(part: Part, ladder: LadderResult, config: AnalysisConfig) -> bool:
    if part.share == 1.0:
        return True
    whole = ladder.optima[-1]
    position = math.log2(ladder.ratio(whole.curve))
    for curves in part.ways:
        if not all(curve.points for curve in curves):
            return False
        found = judge_ladders([(ladder.axis, curves)], config)[0]
        if found.verdict != ladder.verdict:
            return False
        if found.optima[-1].curve.size == whole.curve.size:
            log2_lr = found.optima[-1].log2_lr
        else:
            expected = found.forecast(position)
            log2_lr = None if expected is None else expected.optimum.value
        if log2_lr is None or whole.log2_lr is None or abs(log2_lr - whole.log2_lr) > NEAR:
            return False
    return True


def _more(ladder: LadderResult, what: str, add: AddedRuns, config: AnalysisConfig) -> MoreEffort:
    """The median of what PRETENDED draws of the added runs lead to."""
    rng = np.random.default_rng(5)
    draws = [optimum.draws for optimum in ladder.optima]
    found: list[LadderResult] = []
    for row in rng.integers(DRAWS, size=PRETENDED):
        curves = [_with_runs(o.curve, add(o.curve), of, row, rng) for o, of in zip(ladder.optima, draws, strict=True)]
        found += judge_ladders([(ladder.axis, curves)], config)
    return MoreEffort(
        what,
        _median_half_width([one.optima[-1].estimate for one in found]),
        _median_half_width([one.total_drift for one in found]),
        float(np.mean([one.verdict != INCONCLUSIVE for one in found])),
    )


def _another_of_each(curve: LossCurve) -> list[tuple[float, int]]:
    """As many new seeds of every LR as it has."""
    first = 1 + max((seed for point in curve.points for seed in point.losses), default=0)
    return [(point.log2_lr, first + k) for point in curve.points for k in range(len(point.losses) + point.diverged)]


def _between(curve: LossCurve) -> list[tuple[float, int]]:
    """LRs halfway between those of the grid, with the seeds of the lower one."""
    pairs = zip(curve.points, curve.points[1:], strict=False)
    return [((low.log2_lr + high.log2_lr) / 2, seed) for low, high in pairs for seed in low.losses]


MORE: dict[str, AddedRuns] = {"twice the seeds": _another_of_each, "LRs halfway between": _between}


def _with_runs(
    curve: LossCurve, runs: list[tuple[float, int]], draws: CurveDraws | None, row: int, rng: np.random.Generator
) -> LossCurve:
    """A curve with runs of some LRs and seeds, whose losses are those of a draw and its noise."""
    if draws is None or not runs:
        return curve
    one = draws.take(np.array([row]))
    log2_lrs = sorted({log2_lr for log2_lr, _ in runs})
    losses = dict(zip(log2_lrs, (one.floor[:, None] + one.rise(np.array([log2_lrs])))[0].tolist(), strict=True))
    noise = {log2_lr: math.sqrt(one.noise_variance(log2_lr)) for log2_lr in log2_lrs}
    points = {point.log2_lr: point for point in curve.points}
    for log2_lr, seed in runs:
        point = points.get(log2_lr, Point(log2_lr, {}, 0))
        if math.isfinite(losses[log2_lr]):
            loss = losses[log2_lr] + noise[log2_lr] * rng.standard_normal()
            points[log2_lr] = replace(point, losses={**point.losses, seed: loss})
        else:
            points[log2_lr] = replace(point, diverged=point.diverged + 1)
    return replace(curve, points=tuple(points[log2_lr] for log2_lr in sorted(points)))


def _median_half_width(estimates: Sequence[Estimate]) -> float | None:
    """None where an end stays open in most of them."""
    half_widths = [estimate.half_width for estimate in estimates]
    median = float(np.median([math.inf if width is None else width for width in half_widths]))
    return median if math.isfinite(median) else None
