"""Validation: train a target at the LR that smaller sizes transfer to it and at its neighbours, and judge that LR.

The LR comes from the sizes below the target alone. It stays the same while the target's own runs come in, so a command
that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mupsweep.analysis.analysis import Analysis, analyse
from mupsweep.analysis.curves import collect
from mupsweep.analysis.estimate import UNKNOWN, Estimate
from mupsweep.analysis.optimum import Optimum
from mupsweep.analysis.run_result import RunResult
from mupsweep.analysis.transfer import OPEN
from mupsweep.errors import ConfigError, RecordError
from mupsweep.models.shape import Size
from mupsweep.recipes import recipe
from mupsweep.store.results import read_runs
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.config import analysis_config
from mupsweep.sweep.run_spec import ResolvedVariant, RunSpec

LR_ROUNDING = 8  # parts of an octave that a transferred LR is rounded to: a refit that moves less plans no new runs
STEPS = (0.5, 1.0)  # octaves between neighbours, at least and at most; the spacing of the sweep's grid between them
MAX_TARGET_LRS = 7  # LRs at the target


@dataclass(frozen=True)
class Trial:
    """A target of one variant that is to be trained.

    Attributes:
        log2_lr: the transferred LR.
        step: octaves to its neighbours.
        seeds: those of the sweep.
    """

    resolved: ResolvedVariant
    size: Size
    log2_lr: float
    step: float
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class TargetOutcome:
    """What the transferred LR was worth at a target.

    Attributes:
        log2_lr: the transferred LR.
        forecast: log2 of where the smaller sizes expected the optimum.
        optimum: log2 of the best LR there, or a bound.
        regret: nats per token lost by the transferred LR.
        outcome: whether the forecast is CONFIRMED, REFUTED or still OPEN.
        reasons: what keeps them from being known.
    """

    label: tuple[str, str, str]
    size: Size
    log2_lr: float
    forecast: Estimate
    optimum: Estimate
    regret: Estimate
    outcome: str
    reasons: tuple[str, ...]


def trials(
    sweep: SweepDir, target: Mapping[str, int], optimizer: str | None, parametrization: str | None
) -> list[Trial]:
    """What is to be trained at the target, for every chosen variant.

    Raises:
        ConfigError: a target that is no multiple of the base, not larger than it, or of another horizon.
        RecordError: the sizes below the target give no LR.
    """
    runs = plan.load(sweep)
    results, config = read_runs([sweep]), analysis_config(sweep.read_config())
    trials = []
    for resolved in {run.resolved.digest: run.resolved for run in runs}.values():
        names = resolved.variant.names
        if resolved.variant.change or optimizer not in (None, names[1]) or parametrization not in (None, names[2]):
            continue
        width, depth = target.get("width", resolved.model.width), target.get("depth", resolved.model.depth)
        size = resolved.size(width / resolved.model.width, depth / resolved.model.depth)
        _check(target, resolved, size)
        of_variant = [run for run in results if run.label == names and not run.validation]
        smaller = [run for run in of_variant if _ratio(run) < _ratio(size) - 1e-9]
        groups = analyse(smaller, config).groups
        if not groups:
            raise RecordError(
                f"{sweep.path} has no finished runs of {'/'.join(names)} below width {width}, depth "
                f"{depth}, so there is no LR to validate: mupsweep run first"
            )
        choice = recipe.recommend_at(groups, size.width_ratio, size.depth_ratio)
        variant_runs = [run for run in runs if run.resolved.digest == resolved.digest]
        seeds = tuple(sorted({run.seed for run in variant_runs}))
        trials.append(
            Trial(resolved, size, round(choice.log2_lr * LR_ROUNDING) / LR_ROUNDING, _step(variant_runs), seeds)
        )
    if not trials:
        analyse(results).select(optimizer, parametrization)  # raises an error that lists the names there are
        raise RecordError(f"{sweep.path} has no finished runs: mupsweep run first")
    return trials


def first_runs(trial: Trial) -> list[RunSpec]:
    """The runs with which a trial begins: the transferred LR and its neighbours."""
    ratios = trial.size.width_ratio, trial.size.depth_ratio
    return plan.validation_runs(trial.resolved, ratios, neighbours(trial.log2_lr, trial.step, {}), trial.seeds)


def extend(sweep: SweepDir, trial: Trial, results: Sequence[RunResult]) -> list[RunSpec]:
    """Plan the runs of a trial: the transferred LR, its neighbours, and further ones until its optimum is bounded."""
    ratios = trial.size.width_ratio, trial.size.depth_ratio
    points = [p for curve in collect(_of(trial, results))[-1:] for p in curve.points]  # of the longest horizon
    whole = [p for p in points if len(p.losses) + p.diverged >= len(trial.seeds)]
    losses = {p.log2_lr: math.inf if p.censored else p.mean for p in whole}
    wanted = neighbours(trial.log2_lr, trial.step, losses)
    if all(lr in losses for lr in wanted):
        wanted += _unbounded(
            judge(analyse(results, analysis_config(sweep.read_config())), trial).optimum, losses, trial.step
        )
    return plan.extend(sweep, trial.resolved, ratios, wanted, trial.seeds)


def neighbours(log2_lr: float, step: float, losses: Mapping[float, float]) -> list[float]:
    """The LRs to train, given the losses so far (inf: diverged): three, and more on a side where the last is best."""
    wanted = [log2_lr - step, log2_lr, log2_lr + step]
    while len(wanted) < MAX_TARGET_LRS and all(lr in losses for lr in wanted):
        best = min(wanted, key=lambda lr: losses[lr])
        if best == wanted[0]:
            wanted.insert(0, best - step)
        elif best == wanted[-1]:
            wanted.append(best + step)
        else:
            break
    return wanted


def _unbounded(best: Estimate, losses: Mapping[float, float], step: float) -> list[float]:
    """An LR further out on every side where the losses so far do not bound the best one."""
    ends = [(best.low, min(losses), -step), (best.high, max(losses), step)]
    further = [end + out for bound, end, out in ends if bound is None and math.isfinite(losses[end])]
    return further if len(losses) + len(further) <= MAX_TARGET_LRS else []


def judge(analysis: Analysis, trial: Trial) -> TargetOutcome:
    """The best LR at the target and the regret of the transferred one, from all runs so far."""
    label, shape = trial.resolved.variant.names, (trial.size.width, trial.size.depth)
    found = [
        one
        for group in analysis.groups
        if group.label == label
        for one in group.validations
        if (one.optimum.curve.width, one.optimum.curve.depth) == shape
    ]
    if not found:
        reason = f"no run of width {trial.size.width}, depth {trial.size.depth} is finished yet"
        return TargetOutcome(label, trial.size, trial.log2_lr, UNKNOWN, UNKNOWN, UNKNOWN, OPEN, (reason,))
    [one] = found
    reasons = () if one.optimum.reason is None else (one.optimum.reason,)
    lost = regret(one.optimum, trial.log2_lr)
    expected = one.forecast.optimum
    return TargetOutcome(label, trial.size, trial.log2_lr, expected, one.optimum.estimate, lost, one.outcome, reasons)


def regret(there: Optimum, log2_lr: float) -> Estimate:
    """Nats per token that an LR loses against the best of a size; unknown without a curve, and no more than a bound
    where the best may lie beyond the trained LRs."""
    if there.draws is None:
        return UNKNOWN
    lost = Estimate.among(there.draws.regret(log2_lr)).finite
    return lost if there.known else Estimate(None, lost.low or None, None)


def to_json(outcome: TargetOutcome) -> dict[str, Any]:
    """As results/validation-*.json holds it."""
    model, optimizer, parametrization = outcome.label
    return {
        "model": model,
        "optimizer": optimizer,
        "parametrization": parametrization,
        "width": outcome.size.width,
        "depth": outcome.size.depth,
        "log2_lr": outcome.log2_lr,
        "forecast": outcome.forecast.record("log2_lr"),
        "outcome": outcome.outcome,
        "log2_lr_optimum": outcome.optimum.value,
        "log2_lr_low": outcome.optimum.low,
        "log2_lr_high": outcome.optimum.high,
        "regret": outcome.regret.record("nats"),
        "reasons": list(outcome.reasons),
    }


def _check(target: Mapping[str, int], resolved: ResolvedVariant, size: Size) -> None:
    tokens = resolved.at(size).tokens
    if target.get("tokens", tokens) != tokens:
        raise ConfigError(
            f"--validate with tokens={target['tokens']}: the sweep's runs train on {tokens} tokens, and a verdict "
            f"compares runs of one horizon; leave tokens out, or make a sweep with training.tokens={target['tokens']}"
        )
    if _ratio(size) <= 1:
        raise ConfigError(
            f"--validate at width {size.width}, depth {size.depth}: not larger than the base, width "
            f"{resolved.model.width}, depth {resolved.model.depth}; give a target that the LR is transferred to"
        )


def _step(runs: Sequence[RunSpec]) -> float:
    """The spacing of the sweep's LRs at its base, within STEPS."""
    lrs = sorted({run.log2_lr for run in runs if run.size.width_ratio == run.size.depth_ratio == 1})
    spacing = min((b - a for a, b in pairwise(lrs)), default=STEPS[1])
    return min(max(spacing, STEPS[0]), STEPS[1])


def _of(trial: Trial, results: Sequence[RunResult]) -> list[RunResult]:
    """The runs of a trial's variant and size."""
    names, shape = trial.resolved.variant.names, (trial.size.width, trial.size.depth)
    return [run for run in results if run.label == names and (run.width, run.depth) == shape]


def _ratio(size: Size | RunResult) -> float:
    return size.width_ratio * size.depth_ratio
