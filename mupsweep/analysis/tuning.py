"""Tuning: what the other base hyperparameters are worth, and which of them closes the gap between parametrizations.

Every value of `sweep.axes` has LRs of its own, and what is compared are the losses at their optima. The best value of
a size is the minimum of these over the log2 of the value, found and judged along the ladder as the optimal LR is. All
numbers are quantiles of draws (see optimum), those of different variants independent of one another. The best of some
values is chosen by its loss, which flatters it by as much as noise can tell them apart.

The best LR moves with the value, along the ridge of the pair. A line through the optimal LRs of the best value and of
its neighbours, over the log2 of the value, has the ridge's slope there and the LR of the pair's optimum.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from mupsweep.analysis.comparison import STANDARD, Comparison, Flops, compare, pairs, shared
from mupsweep.analysis.config import AnalysisConfig
from mupsweep.analysis.curves import LossCurve, Point
from mupsweep.analysis.estimate import UNKNOWN, Array, Estimate
from mupsweep.analysis.labels import Label
from mupsweep.analysis.loss_curve import fit_ladder
from mupsweep.analysis.optimum import Optimum, runs_of, shuffled
from mupsweep.analysis.run_result import Size
from mupsweep.analysis.transfer import HORIZON, LadderResult, judge_ladder, ladder_optima
from mupsweep.analysis.verdict import INCONCLUSIVE, TRANSFERS
from mupsweep.formatting import counted

DECAYS = ("beta", "momentum")  # in the last words of keys whose octaves are those of 1 - value
SHARPEST = 0.01  # octaves squared: the least variance of an optimal LR that a line is weighted by
NEGLIGIBLE_NATS = 0.0005  # nats: a gap below the last printed digit is none to close


@dataclass(frozen=True)
class Ridge:
    """The best LRs around the best value of a hyperparameter, as draws.

    Attributes:
        slopes: (draws,) octaves of the best LR per octave of the value.
        log2_lrs: (draws,) the best LR at the best value; None where the values do not bracket it.
    """

    slopes: Array
    log2_lrs: Array | None

    @property
    def slope(self) -> Estimate:
        return Estimate.of(self.slopes)

    @property
    def log2_lr(self) -> Estimate:
        return UNKNOWN if self.log2_lrs is None else Estimate.of(self.log2_lrs)


@dataclass(frozen=True)
class SizeTuning:
    """The values of one hyperparameter at one size.

    Attributes:
        losses: at each value's own optimal LR, by value, the default's too; None stands for a default of null.
        best: the value of the lowest.
        optimum: of the LR at the best value.
        gain: nats per token by which the best value ends below the default.
        regret: nats per token by which the base's best value ends above this size's.
        minimum: the best value between those trained; its value is None where these do not bracket it.
        unbounded: values whose best LR lies beyond those trained, and that end below the best value already.
        edge: "lowest" or "highest" where the best value is that of those trained: a better one may lie beyond it.
        optima: of the LR, by value, as far as it was trained here.
        ridge: None with fewer than two values whose best LR is known around the best.
    """

    width: int
    depth: int
    horizon: int | None
    losses: Mapping[float | None, Estimate]
    best: float | None
    optimum: Optimum
    gain: Estimate
    regret: Estimate
    minimum: Estimate
    unbounded: tuple[float | None, ...] = ()
    edge: str | None = None
    optima: Mapping[float | None, Optimum] = field(default_factory=dict)
    ridge: Ridge | None = None


@dataclass(frozen=True)
class Tuning:
    """One hyperparameter of one variant along one ladder.

    Attributes:
        default: the value that the variant has; None where that is null.
        sizes: those at which the default and another value have an optimal LR, by rising ratio.
        total_drift: octaves by which the best value moves from the base to the largest size.
        verdict, reasons: whether the best value transfers.
    """

    names: Label
    hyperparameter: str
    default: float | None
    axis: str
    sizes: tuple[SizeTuning, ...]
    total_drift: Estimate
    verdict: str
    reasons: tuple[str, ...]

    @property
    def lr_drift(self) -> Estimate:
        """Octaves by which the LR of the pair's optimum moves from the first size to the last."""
        ends = [at.ridge.log2_lrs for at in (self.sizes[0], self.sizes[-1]) if at.ridge is not None]
        if len(self.sizes) < 2 or len(ends) < 2 or ends[0] is None or ends[1] is None:
            return UNKNOWN
        return Estimate.of(shuffled(ends[1]) - ends[0])


@dataclass(frozen=True)
class GapAfterTuning:
    """What tuning one hyperparameter of both does to the gap between a parametrization and SP.

    Attributes:
        before, after: the comparisons at every size where they are known, each at its own optimal LR: at the defaults,
            and each at its own best value too.
    """

    hyperparameter: str
    before: tuple[Comparison, ...]
    after: tuple[Comparison, ...]

    @property
    def share(self) -> float | None:
        """Of the gap at the largest size, how much is gone: above 1 where the order is reversed. None without a gap."""
        gap, left = self.before[-1].lower.value, self.after[-1].lower.value
        return None if gap is None or left is None or gap > -NEGLIGIBLE_NATS else (left - gap) / -gap


def tunings(groups: Sequence[LadderResult], changed: Sequence[LossCurve], config: AnalysisConfig) -> list[Tuning]:
    """Every hyperparameter that was changed, of every variant and ladder.

    Args:
        groups: the ladders of the defaults.
        changed: the curves of variants in which a hyperparameter is not the default's.
    """
    by_key: dict[tuple[Label, str], dict[float, list[LossCurve]]] = defaultdict(lambda: defaultdict(list))
    for curve in changed:
        assert curve.change is not None
        by_key[curve.names, curve.change.hyperparameter][curve.change.value].append(curve)
    all_tunings: list[Tuning] = []
    for (names, key), curves in by_key.items():
        change = next(iter(curves.values()))[0].change
        assert change is not None
        ladders = [_tuning(group, key, change.default, curves, config) for group in groups if group.label == names]
        all_tunings += [tuning for tuning in ladders if tuning.sizes]
    return all_tunings


def gaps_after_tuning(groups: Sequence[LadderResult], tuned: Sequence[Tuning], flops: Flops) -> list[GapAfterTuning]:
    """What each hyperparameter does to the gap of every parametrization to SP, the one that closes most of it first."""
    gaps: list[GapAfterTuning] = []
    for ladder, standard in pairs([group for group in groups if group.axis != HORIZON]):
        if ladder.label[:2] != standard.label[:2] or standard.parametrization != STANDARD:
            continue
        for key in dict.fromkeys(tuning.hyperparameter for tuning in tuned):
            ours, theirs = _tuned(ladder, key, tuned), _tuned(standard, key, tuned)
            if ours is ladder and theirs is standard:
                continue
            after = _along(ours, theirs, flops)
            sizes = {(c.width, c.depth) for c in after}
            before = tuple(c for c in _along(ladder, standard, flops) if (c.width, c.depth) in sizes)
            if len(before) == len(after) > 0:
                gaps.append(GapAfterTuning(key, before, after))
    return sorted(gaps, key=lambda gap: (gap.before[-1].of, gap.before[-1].axis, -(gap.share or -math.inf)))


def remarks(gaps: Sequence[GapAfterTuning], harmless: float) -> list[str]:
    """For every parametrization that ends above SP at the largest size, the hyperparameter that changes that most.

    Args:
        gaps: as `gaps_after_tuning` sorts them.
        harmless: nats that a gap may have to be none.
    """
    closing_most: dict[tuple[Label, str], GapAfterTuning] = {}
    for gap in gaps:
        if gap.share is not None:
            closing_most.setdefault((gap.before[-1].of, gap.before[-1].axis), gap)
    lines = []
    for gap in closing_most.values():
        last, share = gap.after[-1], gap.share or 0.0
        who = f"{last.of[2]} to {last.over[2]} at width {last.width}, depth {last.depth}"
        if share < 0.5:
            lines.append(f"no hyperparameter of this sweep closes the gap of {who}; {gap.hyperparameter}: {share:.0%}")
            continue
        certain = gap.after[-1].lower.low is not None and gap.after[-1].lower.low >= -harmless
        how = "closes" if share >= 0.9 else "closes most of"
        lines.append(
            f"{gap.hyperparameter} {how} the gap of {who} ({share:.0%} of it)"
            + ("" if certain else "; the interval still allows a gap: add seeds")
        )
    return lines


def _tuning(
    group: LadderResult,
    key: str,
    default: float | None,
    curves: Mapping[float, Sequence[LossCurve]],
    config: AnalysisConfig,
) -> Tuning:
    """One hyperparameter along one ladder of the default."""
    sizes = [o.curve.size for o in group.optima]
    by_value: dict[float | None, dict[Size, Optimum]] = {default: {o.curve.size: o for o in group.optima}}
    for value, curves_of_value in sorted(curves.items()):
        ladder = sorted((c for c in curves_of_value if c.size in sizes), key=lambda c: sizes.index(c.size))
        by_value[value] = {o.curve.size: o for o in ladder_optima(group.axis, ladder, config.curve)}
    drawn = {
        size: {
            value: _losses(at[size], i)
            for i, (value, at) in enumerate(by_value.items())
            if size in at and at[size].log2_lr is not None
        }
        for size in sizes
    }
    kept = [size for size in sizes if default in drawn[size] and len(drawn[size]) > 1]
    if not kept:
        return Tuning(group.label, key, default, group.axis, (), UNKNOWN, INCONCLUSIVE, ())
    best_values = _over_values(group, key, kept, by_value, drawn, config)
    base = kept[next((i for i, o in enumerate(best_values.optima) if best_values.ratio(o.curve) == 1), 0)]
    first = _best(drawn[base])
    sizes_tuned = []
    for size, minimum in zip(kept, best_values.optima, strict=True):
        losses = drawn[size]
        best = _best(losses)
        bar = float(np.median(losses[best]))
        edges = {value: at[size].curve.usable for value, at in by_value.items() if size in at and value not in losses}
        sizes_tuned.append(
            SizeTuning(
                *size,
                losses={value: Estimate.of(x) for value, x in losses.items()},
                best=best,
                optimum=by_value[best][size],
                gain=Estimate.of(losses[default] - losses[best]),
                regret=Estimate.of(losses[first] - losses[best]) if first in losses else UNKNOWN,
                minimum=minimum.estimate.map(partial(_at, key)),
                unbounded=tuple(value for value, points in edges.items() if any(p.mean < bar for p in points)),
                edge=_edge(best, losses),
                optima={value: at[size] for value, at in by_value.items() if size in at},
                ridge=_ridge(key, best, {value: by_value[value][size] for value in losses}, minimum),
            )
        )
    verdict, reasons = best_values.verdict, best_values.reasons
    if missing := [group.optima[i].curve.place(group.axis) for i, size in enumerate(sizes) if size not in kept]:
        reason = f"at {', '.join(missing)} the default or every other value has no optimum: add LRs"
        reasons = (reason, *reasons[1:]) if len(kept) == 1 else (*reasons, reason)
    if edge := [f"{key}={value_text(v)} at {at.width}x{at.depth}" for at in sizes_tuned for v in at.unbounded]:
        reason = f"lower already, with a best LR beyond those trained: {', '.join(edge)}; add LRs"
        return Tuning(
            group.label, key, default, group.axis, tuple(sizes_tuned), UNKNOWN, INCONCLUSIVE, (reason, *reasons)
        )
    harmless = config.verdict.harmless
    costs_little = all(
        one.edge is None and one.regret.high is not None and one.regret.high <= harmless for one in sizes_tuned
    )
    if verdict == INCONCLUSIVE and costs_little and len(kept) == len(sizes) > 1:
        verdict = TRANSFERS
        reason = f"the base's best value, {value_text(first)}, costs at most {harmless:g} nats at every size"
        reasons = (reason, *reasons)
    return Tuning(group.label, key, default, group.axis, tuple(sizes_tuned), best_values.total_drift, verdict, reasons)


def _over_values(
    group: LadderResult,
    key: str,
    sizes: Sequence[Size],
    by_value: Mapping[float | None, Mapping[Size, Optimum]],
    drawn: Mapping[Size, Mapping[float | None, Array]],
    config: AnalysisConfig,
) -> LadderResult:
    """The ladder of the best values: curves of the losses at the optimal LRs over the log2 of the value."""
    curves, runs = [], []
    own = {o.curve.size: o.curve for o in group.optima}
    for size in sizes:
        points: dict[float, Array] = {}
        for value in by_value:
            place = place_of(key, value)
            if place is not None and value in drawn[size]:
                points[place] = drawn[size][value]
        losses = tuple(Point(place, {0: float(np.median(points[place]))}, 0) for place in sorted(points))
        curves.append(replace(own[size], points=losses))
        variances = np.array([points[place].var() for place in sorted(points)])
        position = math.log2(group.ratio(own[size]))
        runs.append(replace(runs_of(curves[-1], position), variances=variances))
    ladder = judge_ladder(group.axis, curves, fit_ladder(runs, config.curve), config.verdict, "value")
    optima = tuple(replace(o, reason=_reason(key, o)) for o in ladder.optima)
    unknown = [f"{o.curve.place(group.axis)}: {o.reason}" for o in optima if o.reason is not None]
    reasons = unknown if unknown and ladder.verdict == INCONCLUSIVE else [ladder.reasons[0], *unknown]
    return replace(ladder, optima=optima, reasons=tuple(reasons))


def _ridge(key: str, best: float | None, optima: Mapping[float | None, Optimum], minimum: Optimum) -> Ridge | None:
    """The line through the optimal LRs of the best value and its neighbours, each as good as its draws are narrow."""
    places = {value: place for value in optima if (place := place_of(key, value)) is not None}
    row = sorted(places, key=places.__getitem__)
    if best not in places or len(row) < 2:
        return None
    at = row.index(best)
    around = row[max(at - 1, 0) : at + 2]
    draws = [optima[value].draws for value in around]
    log2_lrs = np.array([shuffled(one.optimum, 2 + i) for i, one in enumerate(draws) if one is not None])
    x = np.array([places[value] for value in around])
    weights = 1 / np.maximum(log2_lrs.var(axis=1), SHARPEST)
    weights /= weights.sum()
    middle, height = weights @ x, weights @ log2_lrs
    away = x - middle
    slopes = (weights * away) @ log2_lrs / (weights @ away**2)
    if minimum.draws is None or minimum.log2_lr is None:
        return Ridge(slopes, None)
    return Ridge(slopes, height + slopes * (minimum.draws.optimum - middle))


def _reason(key: str, optimum: Optimum) -> str | None:
    """Why there is no best value, or no interval of it."""
    points = optimum.curve.usable
    if optimum.reason is None or len(points) < 3:
        return optimum.reason and f"{counted(len(points), 'value')} on a log scale; a minimum needs at least 3"
    best = min(points, key=lambda p: p.mean)
    for end, word in ((points[0], "lowest"), (points[-1], "highest")):
        if best is end:
            return f"the best value is the {word}, {_at(key, end.log2_lr):.4g}: add values beyond it"
    return "too flat or too noisy to bound the best value: add seeds or values"


def _tuned(group: LadderResult, key: str, tuned: Iterable[Tuning]) -> LadderResult:
    """A ladder with the optima at the best values of one hyperparameter, where it was tuned; without the sizes where
    the best value is not known."""
    for tuning in tuned:
        if (tuning.names, tuning.axis, tuning.hyperparameter) == (group.label, group.axis, key):
            best = {at.optimum.curve.size: at for at in tuning.sizes}
            optima_ = [(o, best.get(o.curve.size)) for o in group.optima]
            kept = tuple(o if at is None else at.optimum for o, at in optima_ if at is None or not at.unbounded)
            return replace(group, optima=kept)
    return group


def _along(a: LadderResult, b: LadderResult, flops: Flops) -> tuple[Comparison, ...]:
    """The comparison at every size at which both have an optimum."""
    ours = [optimum for optimum, _ in shared(a, b)]
    return tuple(compare(replace(a, optima=tuple(ours[: i + 1])), b, flops) for i in range(len(ours)))


def _losses(optimum: Optimum, seed: int) -> Array:
    """(draws,) losses at the optimum, permuted, since the draws of two ladders are independent."""
    assert optimum.draws is not None
    return shuffled(optimum.draws.floor, seed)


def _best(losses: Mapping[float | None, Array]) -> float | None:
    return min(losses, key=lambda value: float(np.median(losses[value])))


def _edge(best: float | None, values: Iterable[float | None]) -> str | None:
    """Which end of the values the best is; of null there is none, and nothing lies below 0."""
    trained = [value for value in values if value is not None]
    if not best:
        return None
    return "lowest" if best == min(trained) else "highest" if best == max(trained) else None


def place_of(key: str, value: float | None) -> float | None:
    """Where a value lies on its log scale, in octaves; None for a value that has no place, such as 0."""
    positive = 1 - value if value is not None and _decays(key) else value
    return None if positive is None or positive <= 0 else -math.log2(positive) if _decays(key) else math.log2(positive)


def _at(key: str, place: float) -> float:
    """The inverse of `place_of`."""
    return 1 - 2.0**-place if _decays(key) else 2.0**place


def _decays(key: str) -> bool:
    return any(word in part for part in key.split(".")[-2:] for word in DECAYS)


def value_text(value: float | None) -> str:
    """A hyperparameter's value as people read it."""
    return "null" if value is None else f"{value:g}"
