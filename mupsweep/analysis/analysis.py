"""The analysis of some runs: everything that the views of a sweep show, each part computed once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from mupsweep.analysis.comparison import Comparison, Flops, comparisons
from mupsweep.analysis.config import AnalysisConfig
from mupsweep.analysis.curves import LossCurve, collect
from mupsweep.analysis.estimate import QUANTILES
from mupsweep.analysis.labels import DONE, Label
from mupsweep.analysis.optimum import Optimum, shuffled
from mupsweep.analysis.run_result import RunResult
from mupsweep.analysis.transfer import HORIZON, LadderResult, axis_to, judge_ladders, ladders
from mupsweep.analysis.tuning import GapAfterTuning, Tuning, gaps_after_tuning, tunings
from mupsweep.analysis.tuning import remarks as remarks_on_gaps
from mupsweep.analysis.verdict import TRANSFERS
from mupsweep.errors import ConfigError
from mupsweep.formatting import counted, nearest, si


@dataclass(frozen=True)
class Analysis:
    """Everything that is known of some runs.

    Attributes:
        runs: those of the defaults.
        curves: of the defaults.
        groups: one verdict each.
        remarks: what a reader should know beyond the verdicts, such as SP ending lower at the largest size.
        changed: runs in which a hyperparameter is not the default's: see mupsweep/analysis/tuning.py.
        config: what the answers rest on beside the runs.
    """

    runs: tuple[RunResult, ...]
    curves: tuple[LossCurve, ...]
    groups: tuple[LadderResult, ...]
    remarks: tuple[str, ...]
    changed: tuple[RunResult, ...] = ()
    config: AnalysisConfig = field(default_factory=AnalysisConfig)

    @cached_property
    def flops(self) -> Flops:
        """The cost of a run by variant and size, where it is known."""
        return {(run.label, run.size): run.flops for run in (*self.runs, *self.changed) if run.flops}

    @cached_property
    def changed_curves(self) -> list[LossCurve]:
        """The curves of the changed runs."""
        return collect(self.changed)

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Every optimizer against AdamW and every parametrization against SP, or against the first there is."""
        return comparisons(self.groups, self.flops)

    @cached_property
    def tunings(self) -> list[Tuning]:
        """Every hyperparameter that was changed, of every variant and ladder."""
        return tunings(self.groups, self.changed_curves, self.config)

    @cached_property
    def gaps_after_tuning(self) -> list[GapAfterTuning]:
        """What each hyperparameter does to the gap of every parametrization to SP."""
        return gaps_after_tuning(self.groups, self.tunings, self.flops)

    @cached_property
    def tuning_remarks(self) -> list[str]:
        """Which hyperparameter closes most of each gap to SP."""
        return remarks_on_gaps(self.gaps_after_tuning, self.config.verdict.harmless)

    def select(self, optimizer: str | None, parametrization: str | None) -> Analysis:
        """The part with the verdicts of one optimizer, one parametrization, or both.

        Raises:
            ConfigError: no verdict is of that name.
        """
        groups = self.groups
        for key, name in (("optimizer", optimizer), ("parametrization", parametrization)):
            names = {getattr(group, key) for group in groups}
            if name is not None and name not in names:
                raise ConfigError(f"no {key} '{name}' in this sweep; {nearest(name, names)}")
            groups = tuple(group for group in groups if name in (None, getattr(group, key)))
        return self if groups == self.groups else replace(self, groups=groups)


def analyse(results: Iterable[RunResult], config: AnalysisConfig | None = None) -> Analysis:
    """Curves, optima, drift, regret and verdict of every ladder; half-finished sweeps are welcome."""
    config = config or AnalysisConfig()
    everything = tuple(results)
    runs = tuple(run for run in everything if run.change is None)
    changed = tuple(run for run in everything if run.change is not None)
    curves = collect(run for run in runs if not run.validation)
    by_label: dict[Label, list[LossCurve]] = defaultdict(list)
    for curve in curves:
        by_label[curve.label].append(curve)
    of_all = [ladder for of_variant in by_label.values() for ladder in ladders(of_variant) if ladder[1]]
    groups = _validated(judge_ladders(of_all, config), runs)
    remarks = *_moving_tokens(runs), *_losses_at_largest_size(groups), *_mixed_hardware(runs)
    return Analysis(runs, tuple(curves), groups, remarks, changed, config)


def _validated(groups: Iterable[LadderResult], runs: Sequence[RunResult]) -> tuple[LadderResult, ...]:
    """Ladders with the forecasts that targets on their axis validate."""
    sizes = {(run.label, run.width, run.depth) for run in runs if run.validation}
    targets = collect(run for run in runs if (run.label, run.width, run.depth) in sizes)
    validated = []
    for group in groups:
        ours = [
            curve
            for curve in targets
            if curve.label == group.label
            and axis_to(curve.width_ratio, curve.depth_ratio) == group.axis
            and curve.horizon == group.optima[-1].curve.horizon
        ]
        found = [group.validate(curve) for curve in ours]
        validated.append(replace(group, validations=tuple(one for one in found if one is not None)))
    return tuple(validated)


def _losses_at_largest_size(groups: Sequence[LadderResult]) -> Iterable[str]:
    """Remarks that compare variants at the largest size, each at its own optimum.

    Transfer and the lowest loss are two questions.
    """
    ends: dict[tuple[Any, ...], list[tuple[LadderResult, Optimum]]] = defaultdict(list)
    for group in groups:
        last = group.optima[-1]
        if last.loss.value is not None and group.axis != HORIZON:
            ends[group.axis, *last.curve.size].append((group, last))
    for (_, width, depth, _), members in ends.items():
        if len(members) < 2:
            continue
        ranked = sorted(members, key=lambda member: member[1].loss.value or 0.0)
        first = 0 if len({group.model for group, _ in ranked}) > 1 else 1
        losses = ", ".join(f"{'/'.join(group.label[first:])} {optimum.loss:.4f}" for group, optimum in ranked)
        best, lowest = ranked[0]
        line = f"loss at width {width}, depth {depth}, each at its own optimum: {losses}"
        transferring = next((optimum for group, optimum in ranked if group.verdict == TRANSFERS), None)
        if best.verdict != TRANSFERS and transferring is not None and _is_lower(lowest, transferring):
            line += (
                f"; {best.parametrization} tuned at this size ends lowest, although its LR does not transfer: "
                "a transferred LR and the lowest loss are two questions, so tune the base's init and multipliers too"
            )
        yield line


def _is_lower(optimum: Optimum, other: Optimum) -> bool:
    """Whether the loss at an optimum is below that at another variant's, its interval included."""
    if optimum.draws is None or other.draws is None or not (optimum.known and other.known):
        return False
    return bool(np.quantile(shuffled(other.draws.floor) - optimum.draws.floor, QUANTILES[0]) > 0)


def _moving_tokens(runs: Sequence[RunResult]) -> Iterable[str]:
    """A remark where larger sizes train on more tokens, so that a ladder is one of both."""
    tokens: dict[Label, dict[tuple[int, int], set[int]]] = defaultdict(lambda: defaultdict(set))
    for run in runs:
        if run.status == DONE and run.horizon is None and run.tokens:
            tokens[run.label][run.width, run.depth].add(run.tokens)
    ladders_of_both = {}
    for label, by_size in tokens.items():
        lengths = [next(iter(of_size)) for of_size in by_size.values() if len(of_size) == 1]
        if len(lengths) == len(by_size) == len(set(lengths)) > 1:
            ladders_of_both[label] = f"{si(min(lengths))} to {si(max(lengths))}"
    for span in dict.fromkeys(ladders_of_both.values()):
        yield (
            f"size and training tokens move together, {span} tokens: drift and regret are those of both, and the LR of "
            "a target is for as many tokens as its size would have on this ladder"
        )


def _mixed_hardware(runs: Sequence[RunResult]) -> Iterable[str]:
    """Remarks on runs that do not quite compare, since they ran on different devices or in different precisions."""
    precisions, devices = {run.precision for run in runs}, {run.device for run in runs}
    for setting, values in (("precision", precisions), ("device", devices)):
        names = sorted(value for value in values if value is not None)
        if len(names) > 1:
            yield f"the runs differ in {setting} ({', '.join(names)}), which shifts losses a little"
    if halved := sum(run.micro_batch is not None for run in runs):
        yield (
            f"{counted(halved, 'run')} ran out of memory and went on in smaller micro-batches, which rounds sums "
            "otherwise; training.micro_batch makes them equal for all runs"
        )
