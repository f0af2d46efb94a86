"""Verdict: whether the base's LR transfers along a ladder, how far the optimum moves, what it costs, what would decide.

Everything is asked of the draws of optima and curves (see loss_curve.py); "surely" means at CONFIDENCE of them, and the
base's LR is each draw's own optimum of the base.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mupsweep.analysis.config import VerdictBounds
from mupsweep.analysis.estimate import CONFIDENCE, QUANTILES, UNKNOWN, Array, Estimate, Indices
from mupsweep.analysis.loss_curve import CurveDraws, LadderPosterior, SizeOptimum, SizeRuns, bracket

TRANSFERS, DRIFTS, INCONCLUSIVE = "transfers", "drifts", "inconclusive"
SLICES = 8  # equal parts of the draws by what a size's optimum may turn out to be
NEW_LR = 0.26  # octaves from every trained LR


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
        largest: the index of the size that the base is compared with; None where there is none.
        total_drift: octaves from the base's optimum to that of the largest size.
        drift: octaves per doubling: the least-squares line through the optima.
        regret: nats lost at the largest size by the base's LR; infinite where runs diverge.
        regrets: of every other size with a curve, by its index.
        deciding_runs: the cheapest runs that would probably decide; none where the verdict is decided.
    """

    name: str
    reason: str
    largest: int | None
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
        of: what it is whose optimum is looked for.
    """

    moved: Array
    lost: Array
    doublings: float
    bounded_down: bool
    bounded_up: bool
    covered: bool
    known_ends: tuple[int, ...]
    of: str

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
            return DRIFTS, f"the optimum moves by more than {bound:.3g} octaves"
        if self.covered and np.mean(lost.max(axis=0) <= bounds.harmless) >= CONFIDENCE:
            return TRANSFERS, f"the base's {self.of} costs at most {bounds.harmless:g} nats at every size"
        if len(directions) == 2 and np.mean(near & (lost.max(axis=0) <= bounds.costly)) >= CONFIDENCE:
            limits = f"at most {bound:.3g} octaves and costs at most {bounds.costly:g} nats"
            return TRANSFERS, f"the optimum moves by {limits}"
        moves = any(np.mean(sign * moved > 0) > 0.5 for sign in directions)
        if moves and np.mean(lost[-1] > bounds.costly) >= CONFIDENCE:
            return DRIFTS, f"the base's {self.of} costs more than {bounds.costly:g} nats at the largest size"
        return INCONCLUSIVE, ""


def judge(
    ladder: LadderPosterior,
    bounds: VerdictBounds | None = None,
    cost: Callable[[Runs], float] | None = None,
    of: str = "LR",
) -> Verdict:
    """The verdict of a ladder.

    Args:
        cost: of some runs, to choose the cheapest; infinite where they are not to be had. By default that of a run
            grows with the square of the size.
        of: what it is whose optimum is looked for.
    """
    bounds = bounds or VerdictBounds()
    judged = _judged(ladder)
    lost = {
        k: curve.regret(judged[0].curve.optimum)
        for k, curve in enumerate(ladder.curves)
        if curve is not None and k != judged[0].index
    }
    regrets = {k: Estimate.among(draws) for k, draws in lost.items()}
    diverged = _diverged_largest(ladder, judged) if judged else None
    if diverged is not None:
        return _judge_diverged(ladder.sizes[diverged], diverged, judged[0], regrets, bounds, of)
    if len(judged) < 2:
        reason = f"fewer than two sizes have {of}s enough for a curve"
        return Verdict(INCONCLUSIVE, reason, None, UNKNOWN, UNKNOWN, UNKNOWN, regrets, ())
    base, *larger = judged
    largest = larger[-1]
    doublings = largest.runs.position - base.runs.position
    moved = largest.curve.optimum - base.curve.optimum
    total_drift = difference(base.curve, base.optimum.estimate, largest.curve, largest.optimum.estimate)
    evidence = _Evidence(
        moved,
        np.array([lost[size.index] for size in larger]),
        doublings,
        bounded_down=total_drift.high is not None,
        bounded_up=total_drift.low is not None,
        covered=_is_covered(base, judged),
        known_ends=tuple(k for k in (0, len(judged) - 1) if judged[k].optimum.reason is None),
        of=of,
    )
    name, reason = evidence.decide(bounds)
    runs: tuple[Runs, ...] = ()
    if doublings < bounds.span:
        name, reason = (
            INCONCLUSIVE,
            f"the sizes span {doublings:.2g} doublings, of {bounds.span:g} that a verdict needs",
        )
    elif name == INCONCLUSIVE:
        reason = _open_reason(judged, total_drift, evidence, bounds)
        runs = _deciding_runs(judged, evidence, bounds, cost)
    drift = _drift(ladder, total_drift)
    return Verdict(name, reason, largest.index, total_drift, drift, regrets[largest.index], regrets, runs)


@dataclass(frozen=True)
class _Judged:
    """A size of the ladder that the verdict looks at."""

    index: int
    runs: SizeRuns
    curve: CurveDraws
    optimum: SizeOptimum


def _judged(ladder: LadderPosterior) -> list[_Judged]:
    """The sizes with curves from the base on, or from the smallest one if the base has no curve."""
    everything = zip(ladder.sizes, ladder.curves, ladder.optima, strict=True)
    fitted = [_Judged(k, runs, curve, at) for k, (runs, curve, at) in enumerate(everything) if curve is not None]
    start = next((i for i, size in enumerate(fitted) if size.runs.position == 0), 0)
    return fitted[start:]


def _diverged_largest(ladder: LadderPosterior, judged: Sequence[_Judged]) -> int | None:
    """The index of the largest size that has runs, if it is above those with curves and no LR there has a loss."""
    trained = [k for k, size in enumerate(ladder.sizes) if len(size.log2_lrs)]
    last = ladder.sizes[trained[-1]]
    beyond = last.position > judged[-1].runs.position and last.diverged.any() and not last.usable.any()
    return trained[-1] if beyond else None


def _judge_diverged(
    size: SizeRuns, index: int, base: _Judged, regrets: dict[int, Estimate], bounds: VerdictBounds, of: str
) -> Verdict:
    """The verdict of a ladder whose largest size has no LR with a loss: its optimum lies below all of them."""
    lowest, step = float(size.log2_lrs[0]), float(np.median(np.diff(base.runs.log2_lrs)))
    at, doublings = base.curve.optimum, size.position - base.runs.position
    bound = bounds.total(doublings)
    most = Estimate.of(lowest - at).high if base.optimum.estimate.low is not None else None
    runs: tuple[Runs, ...] = ()
    if most is not None and most < -bound:
        name, reason = DRIFTS, f"the optimum moves by more than {bound:.3g} octaves"
    elif most is not None and most <= 0:
        name, reason = DRIFTS, f"the base's {of} diverges at the largest size"
    else:
        name, reason = INCONCLUSIVE, f"the largest size: {bracket(size).reason}"
        runs = (Runs(index, (lowest - 2 * step, lowest - step)),)
    drift = Estimate(None, None, None if most is None else most / doublings)
    return Verdict(name, reason, index, Estimate(None, None, most), drift, UNKNOWN, regrets, runs)


def difference(curve: CurveDraws, optimum: Estimate, other_curve: CurveDraws, other: Estimate) -> Estimate:
    """Octaves from one optimum of a ladder to another, as far as both grids bound it."""
    low, middle, high = map(float, np.quantile(other_curve.optimum - curve.optimum, QUANTILES))
    return Estimate(
        None if None in (optimum.value, other.value) else middle,
        None if None in (other.low, optimum.high) else low,
        None if None in (other.high, optimum.low) else high,
    )


def _drift(ladder: LadderPosterior, total: Estimate) -> Estimate:
    """Slope of the least-squares line through the optima of every draw, as far as the grids bound the total drift."""
    positions = np.array([size.position for size, _ in ladder.fitted])
    centered = positions - positions.mean()
    if not centered.any():
        return UNKNOWN
    slope = Estimate.among(centered @ np.array([curve.optimum for _, curve in ladder.fitted]) / (centered @ centered))
    return Estimate(
        None if total.value is None else slope.value,
        None if total.low is None else slope.low,
        None if total.high is None else slope.high,
    )


def _is_covered(base: _Judged, judged: Sequence[_Judged]) -> bool:
    """Whether the base's optimum has both ends and lies between trained LRs at every size."""
    middle = float(np.median(base.curve.optimum))
    trained = (size.runs.log2_lrs[size.runs.usable] for size in judged)
    has_ends = base.optimum.estimate.low is not None and base.optimum.estimate.high is not None
    return has_ends and all(x[0] <= middle <= x[-1] for x in trained)


def _open_reason(judged: Sequence[_Judged], total: Estimate, evidence: _Evidence, bounds: VerdictBounds) -> str:
    """The one thing that keeps a verdict from being decided."""
    if total.low is None or total.high is None:
        for name, size in (("the base", judged[0]), ("the largest size", judged[-1])):
            if size.optimum.reason is not None:
                return f"{name}: {size.optimum.reason}"
    worst = evidence.lost.max(axis=0)
    bound = bounds.total(evidence.doublings)
    far = float(np.mean(np.abs(evidence.moved) > bound))
    if 1 - CONFIDENCE < far < CONFIDENCE:
        return f"whether the optimum moves by more than {bound:.3g} octaves is open (probability {far:.0%})"
    for where, lost in (("at the largest size", evidence.lost[-1]), ("at every size", worst)):
        costly = float(np.mean(lost > bounds.costly))
        if 1 - CONFIDENCE < costly < CONFIDENCE:
            return (
                f"whether the base's {evidence.of} costs at most {bounds.costly:g} nats {where} is open "
                f"(probability {1 - costly:.0%})"
            )
    return f"the base's {evidence.of} costs more than {bounds.costly:g} nats, but not at the largest size"


@dataclass(frozen=True)
class _Candidate:
    """Runs that might decide.

    Attributes:
        sizes: indices into the judged sizes, whose optima would be known.
        outcomes: (k, draws) what the runs would show.
    """

    runs: tuple[Runs, ...]
    sizes: tuple[int, ...]
    outcomes: tuple[Array, ...]


def _deciding_runs(
    judged: Sequence[_Judged], evidence: _Evidence, bounds: VerdictBounds, cost: Callable[[Runs], float] | None
) -> tuple[Runs, ...]:
    """The runs with the best chance to decide for what they cost.

    The draws are cut into slices by what the runs would show; the chance is the share of slices that have a verdict.
    """
    positions = {size.index: size.runs.position for size in judged}
    cost = cost or (lambda runs: 4.0 ** positions[runs.size] * len(runs.log2_lrs))
    candidates, chances, costs = [], [], []
    for candidate in _candidates(judged, evidence):
        price = sum(map(cost, candidate.runs))
        if price < math.inf:
            candidates.append(candidate)
            chances.append(_chance_to_decide(candidate, evidence, bounds, last=len(judged) - 1))
            costs.append(price)
    likely = [k for k, chance in enumerate(chances) if chance >= 0.5]
    if likely:
        return candidates[min(likely, key=lambda k: costs[k])].runs
    return candidates[int(np.argmax(chances))].runs if candidates and max(chances) > 0 else ()


def _candidates(judged: Sequence[_Judged], evidence: _Evidence) -> Iterator[_Candidate]:
    around = []
    for k, size in enumerate(judged):
        runs = Runs(size.index, _lrs_around(size.runs, size.curve, size.optimum.estimate))
        around.append(_Candidate((runs,), (k,), (size.curve.optimum,)))
    base_lr = float(np.median(judged[0].curve.optimum))
    for k, size in enumerate(judged[1:]):
        if np.abs(size.runs.log2_lrs - base_lr).min() > NEW_LR:
            yield _Candidate((Runs(size.index, (base_lr,)),), (), (evidence.lost[k],))
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
