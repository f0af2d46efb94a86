"""Verdict: whether the base's LR transfers along a ladder, how far the optimum moves, what it costs, what would decide.

Everything is asked of the draws of optima and curves (see loss_curve.py); "surely" means at CONFIDENCE of them, and the
base's LR is each draw's own optimum of the base.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mupsweep.analysis.estimate import UNKNOWN, Estimate
from mupsweep.analysis.loss_curve import (
    CONFIDENCE,
    QUANTILES,
    CurveDraws,
    LadderPosterior,
    SizeRuns,
)

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

TRANSFERS, DRIFTS, INCONCLUSIVE = "transfers", "drifts", "inconclusive"
SLICES = 8  # equal parts of the draws by what a size's optimum may turn out to be
NEW_LR = 0.26  # octaves from every trained LR


@dataclass(frozen=True)
class VerdictBounds:
    """When an optimum has moved, and when that matters.

    Attributes:
        octaves: that an optimum may move in all.
        octaves_per_doubling: that it may move, where this is more.
        harmless: nats per token that the base's LR may cost whatever the optimum does.
        costly: nats per token above which it surely should not be used.
    """

    octaves: float = 0.5
    octaves_per_doubling: float = 0.25
    harmless: float = 0.01
    costly: float = 0.03

    def total(self, doublings: float) -> float:
        """Octaves that an optimum may move over a ladder."""
        return max(self.octaves, self.octaves_per_doubling * abs(doublings))


@dataclass(frozen=True)
class Runs:
    """LRs to train at one size."""

    size: int
    log2_lrs: tuple[float, ...]


@dataclass(frozen=True)
class Verdict:
    """What a ladder's runs say of transfer.

    Attributes:
        name: TRANSFERS, DRIFTS or INCONCLUSIVE.
        reason: what decided, or what kept it from being decided.
        total_drift: octaves from the base's optimum to that of the largest size.
        drift: octaves per doubling: the least-squares line through the optima.
        regret: nats lost at the largest size by the base's LR; infinite where runs diverge.
        regrets: of every size above the base that has a curve, by its index.
        deciding_runs: the cheapest runs that would probably decide; none where the verdict is decided.
    """

    name: str
    reason: str
    total_drift: Estimate
    drift: Estimate
    regret: Estimate
    regrets: dict[int, Estimate]
    deciding_runs: tuple[Runs, ...]


@dataclass(frozen=True)
class _Evidence:
    """The draws that a verdict is made of.

    Attributes:
        moved: (draws,) octaves from the base's optimum to the largest size's.
        lost: (sizes, draws) nats lost at every larger size by the base's optimum.
        bounded_down, bounded_up: whether the grids bound how far it moves down, up.
        covered: whether the base's optimum has both ends and lies between trained LRs at every size.
        known_ends: of the base (0) and the largest size (its index), those whose optimum has both ends.
    """

    moved: Array
    lost: Array
    doublings: float
    bounded_down: bool
    bounded_up: bool
    covered: bool
    known_ends: tuple[int, ...]

    def decide(self, bounds: VerdictBounds, draws: Indices | slice = slice(None)) -> tuple[str, str]:
        """The verdict of some draws, all by default, and what decided.

        The order is that of certainty: a move beyond the bound in a direction that the grids bound; the base's LR costs
        nothing anywhere, however far the optimum of a wide valley moves; a little moved costs little; costs too much.
        """
        moved, lost = self.moved[draws], self.lost[:, draws]
        bound = bounds.total(self.doublings)
        near = np.abs(moved) <= bound
        directions = [sign for sign, known in ((1, self.bounded_up), (-1, self.bounded_down)) if known]
        if any(np.mean(~near & (sign * moved > 0)) >= CONFIDENCE for sign in directions):
            return DRIFTS, f"the optimum moves by more than {bound:g} octaves"
        if self.covered and np.mean(lost.max(axis=0) <= bounds.harmless) >= CONFIDENCE:
            return TRANSFERS, f"the base's LR costs at most {bounds.harmless:g} nats at every size"
        if len(directions) == 2 and np.mean(near & (lost.max(axis=0) <= bounds.costly)) >= CONFIDENCE:
            return TRANSFERS, f"the optimum moves by at most {bound:g} octaves and costs at most {bounds.costly:g} nats"
        moves = any(np.mean(sign * moved > 0) > 0.5 for sign in directions)
        if moves and np.mean(lost[-1] > bounds.costly) >= CONFIDENCE:
            return DRIFTS, f"the base's LR costs more than {bounds.costly:g} nats at the largest size"
        return INCONCLUSIVE, ""


def judge(
    ladder: LadderPosterior,
    bounds: VerdictBounds | None = None,
    cost: Callable[[SizeRuns], float] = lambda size: 4.0**size.position,
) -> Verdict:
    """The verdict of a ladder; its base is its smallest size with a curve.

    Args:
        cost: of one run of a size, to choose the cheapest runs; by default it grows with the square of the width.
    """
    bounds = bounds or VerdictBounds()
    fitted = ladder.fitted
    if len(fitted) < 2:
        reason = "fewer than two sizes have LRs enough for a curve"
        return Verdict(INCONCLUSIVE, reason, UNKNOWN, UNKNOWN, UNKNOWN, {}, ())
    (base, base_curve), (largest, largest_curve) = fitted[0], fitted[-1]
    by_size = dict(zip(map(id, ladder.sizes), ladder.optima, strict=True))
    base_optimum, largest_optimum = by_size[id(base)], by_size[id(largest)]
    lost = np.array([curve.rise(base_curve.optimum[:, None])[:, 0] for _, curve in fitted[1:]])
    moved = largest_curve.optimum - base_curve.optimum
    total_drift = _total_drift(moved, base_optimum.estimate, largest_optimum.estimate)
    evidence = _Evidence(
        moved,
        lost,
        largest.position - base.position,
        bounded_down=total_drift.high is not None,
        bounded_up=total_drift.low is not None,
        covered=_is_covered(base_optimum.estimate, float(np.median(base_curve.optimum)), [size for size, _ in fitted]),
        known_ends=tuple(k for k, end in ((0, base_optimum), (len(fitted) - 1, largest_optimum)) if end.reason is None),
    )
    name, reason = evidence.decide(bounds)
    runs: tuple[Runs, ...] = ()
    if name == INCONCLUSIVE:
        reason = _open_reason(ladder, total_drift, evidence, bounds)
        runs = _deciding_runs(ladder, evidence, bounds, cost)
    indices = [k for k, curve in enumerate(ladder.curves) if curve is not None]
    regrets = {k: quantiles(row) for k, row in zip(indices[1:], lost, strict=True)}
    return Verdict(name, reason, total_drift, _drift(ladder), regrets[indices[-1]], regrets, runs)


def quantiles(draws: Array) -> Estimate:
    """Median and interval of draws, some of which may be infinite."""
    low, middle, high = map(float, np.quantile(draws, QUANTILES, method="inverted_cdf"))
    return Estimate(middle, low, high)


def _total_drift(moved: Array, base: Estimate, largest: Estimate) -> Estimate:
    """How far the optimum moves, as far as both grids bound it."""
    low, middle, high = map(float, np.quantile(moved, QUANTILES))
    return Estimate(
        middle if largest.value is not None and base.value is not None else None,
        low if largest.low is not None and base.high is not None else None,
        high if largest.high is not None and base.low is not None else None,
    )


def _drift(ladder: LadderPosterior) -> Estimate:
    """Slope of the least-squares line through the optima of every draw."""
    positions = np.array([size.position for size, _ in ladder.fitted])
    centered = positions - positions.mean()
    if not centered.any():
        return UNKNOWN
    return quantiles(centered @ np.array([curve.optimum for _, curve in ladder.fitted]) / (centered @ centered))


def _is_covered(base_optimum: Estimate, middle: float, sizes: Sequence[SizeRuns]) -> bool:
    trained = (size.log2_lrs[size.usable] for size in sizes)
    has_ends = base_optimum.low is not None and base_optimum.high is not None
    return has_ends and all(x[0] <= middle <= x[-1] for x in trained)


def _open_reason(ladder: LadderPosterior, total: Estimate, evidence: _Evidence, bounds: VerdictBounds) -> str:
    """The one thing that keeps a verdict from being decided."""
    if total.low is None or total.high is None:
        for size, optimum in zip(ladder.sizes, ladder.optima, strict=True):
            if optimum.reason is not None and (size is ladder.fitted[0][0] or size is ladder.fitted[-1][0]):
                return f"{'the base' if size is ladder.fitted[0][0] else 'the largest size'}: {optimum.reason}"
    bound = bounds.total(evidence.doublings)
    questions = [
        (
            evidence.lost[-1] > bounds.costly,
            f"the base's LR costs more than {bounds.costly:g} nats at the largest size",
        ),
        (np.abs(evidence.moved) > bound, f"the optimum moves by more than {bound:g} octaves"),
        (
            evidence.lost.max(axis=0) > bounds.harmless,
            f"the base's LR costs more than {bounds.harmless:g} nats anywhere",
        ),
    ]
    for is_so, question in questions:
        chance = float(np.mean(is_so))
        if 1 - CONFIDENCE < chance < CONFIDENCE:
            return f"whether {question} is open: it does with a chance of {chance:.0%}"
    return "the base's LR is costly, but which way the optimum moves is open"


@dataclass(frozen=True)
class _Candidate:
    """Runs that might decide.

    Attributes:
        sizes: indices into the fitted sizes, whose optima would be known.
        outcomes: (k, draws) what the runs would show.
    """

    runs: tuple[Runs, ...]
    sizes: tuple[int, ...]
    outcomes: tuple[Array, ...]


def _deciding_runs(
    ladder: LadderPosterior, evidence: _Evidence, bounds: VerdictBounds, cost: Callable[[SizeRuns], float]
) -> tuple[Runs, ...]:
    """The runs with the best chance to decide for what they cost.

    The draws are cut into slices by what the runs would show; the chance is the share of slices that have a verdict.
    """
    fitted = ladder.fitted
    candidates = list(_candidates(ladder, evidence))
    chances, costs = [], []
    for candidate in candidates:
        chances.append(_chance_to_decide(candidate, evidence, bounds, last=len(fitted) - 1))
        costs.append(sum(cost(ladder.sizes[runs.size]) * len(runs.log2_lrs) for runs in candidate.runs))
    likely = [k for k, chance in enumerate(chances) if chance >= 0.5]
    if likely:
        return candidates[min(likely, key=lambda k: costs[k])].runs
    return candidates[int(np.argmax(chances))].runs if candidates and max(chances) > 0 else ()


def _candidates(ladder: LadderPosterior, evidence: _Evidence) -> Iterator[_Candidate]:
    fitted = ladder.fitted
    indices = [k for k, curve in enumerate(ladder.curves) if curve is not None]
    around = []
    for k, (size, curve) in enumerate(fitted):
        runs = Runs(indices[k], _lrs_around(size, curve, ladder.optima[indices[k]].estimate))
        around.append(_Candidate((runs,), (k,), (curve.optimum,)))
    base_lr = float(np.median(fitted[0][1].optimum))
    for k, (size, _) in enumerate(fitted[1:]):
        if np.abs(size.log2_lrs - base_lr).min() > NEW_LR:
            yield _Candidate((Runs(indices[k + 1], (base_lr,)),), (), (evidence.lost[k],))
    yield from around
    for first, second in itertools.combinations(around, 2):
        yield _Candidate(first.runs + second.runs, first.sizes + second.sizes, first.outcomes + second.outcomes)


def _lrs_around(size: SizeRuns, curve: CurveDraws, optimum: Estimate) -> tuple[float, ...]:
    """LRs to find a size's optimum: beyond an end that does not bound it, or where it may lie between others."""
    x: list[float] = size.log2_lrs.tolist()
    step = float(np.median(np.diff(x)))
    if optimum.low is None:
        return x[0] - step, x[0] - 2 * step
    if optimum.high is None:
        return x[-1] + step, x[-1] + 2 * step
    wanted: list[float] = []
    for log2_lr in np.quantile(curve.optimum, (0.5, 0.1, 0.9)):
        if np.abs(np.array([*x, *wanted]) - log2_lr).min() > NEW_LR:
            wanted.append(float(log2_lr))
    if wanted:
        return tuple(sorted(wanted))
    middle = float(np.median(curve.optimum))
    return tuple(sorted(sorted(x, key=lambda log2_lr: abs(log2_lr - middle))[:3]))  # another seed of the LRs around it


def _chance_to_decide(candidate: _Candidate, evidence: _Evidence, bounds: VerdictBounds, last: int) -> float:
    slices = max(2, SLICES // len(candidate.outcomes) ** 2)
    rank = np.zeros(len(evidence.moved), dtype=np.intp)
    for outcome in candidate.outcomes:
        order = np.argsort(np.argsort(outcome, kind="stable"), kind="stable")
        rank = rank * slices + order * slices // len(order)
    known = replace(
        evidence,
        bounded_down=evidence.bounded_down or {0, last} <= {*candidate.sizes, *evidence.known_ends},
        bounded_up=evidence.bounded_up or {0, last} <= {*candidate.sizes, *evidence.known_ends},
        covered=evidence.covered or 0 in candidate.sizes,
    )
    decided = 0.0
    for value in np.unique(rank):
        rows = np.flatnonzero(rank == value)
        decided += len(rows) / len(rank) * (known.decide(bounds, rows)[0] != INCONCLUSIVE)
    return decided
