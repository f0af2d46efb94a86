"""Curves of loss against LR at any mixture of sizes, horizons and batch sizes, each fitted alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from mupsweep.analysis.config import CurvePrior
from mupsweep.analysis.labels import DONE
from mupsweep.analysis.loss_curve import LadderPosterior, SizeRuns, fit_ladder
from mupsweep.analysis.run_result import RunResult
from mupsweep.formatting import counted

BATCH_KEY = "training.batch_size"  # the hyperparameter of a sweep that is a part of the setting
BLOCK = 12  # parameters of a block over width^2 (Kaplan et al. 2020, arXiv 2001.08361), where nobody counted them


class Setting(NamedTuple):
    """What a curve was trained at; None where nobody knows."""

    parameters: float | None
    tokens: float | None
    batch_size: float | None


class Variant(NamedTuple):
    """Runs of which one law is asked."""

    optimizer: str
    parametrization: str
    models: tuple[str, ...]

    @property
    def name(self) -> str:
        models = self.models[0] if len(self.models) == 1 else counted(len(self.models), "model")
        return f"{models}/{self.optimizer}/{self.parametrization}"


@dataclass(frozen=True)
class SettingCurve:
    """The posterior of one setting's curve, from its own runs alone."""

    setting: Setting
    width: int
    depth: int
    posterior: LadderPosterior

    @classmethod
    def of(
        cls, setting: Setting, width: int, depth: int, runs: Sequence[RunResult], prior: CurvePrior | None = None
    ) -> SettingCurve:
        """The curve through some runs."""
        losses = [run.val_loss if run.status == DONE and run.val_loss is not None else math.nan for run in runs]
        size = SizeRuns.of(0.0, [run.log2_lr for run in runs], losses, [run.seed for run in runs])
        return cls(setting, width, depth, fit_ladder([size], prior))

    @property
    def is_counted(self) -> bool:
        """Whether somebody counted the parameters."""
        return self.setting.parameters != BLOCK * self.width**2 * self.depth

    @cached_property
    def is_inner(self) -> bool:
        """Whether the best LR, and the middle of where the optimum may be, lie between two that were trained."""
        return self.posterior.curves[0] is not None and self.posterior.optima[0].estimate.value is not None

    @cached_property
    def optimum(self) -> float:
        """The mean of its log2 LR."""
        return float(self.posterior.fitted[0][1].optimum.mean())

    @cached_property
    def sd(self) -> float:
        """The standard deviation of the optimum."""
        return float(self.posterior.fitted[0][1].optimum.std())

    @cached_property
    def loss(self) -> float:
        """Nats at the optimum."""
        return float(np.median(self.posterior.fitted[0][1].floor))


Runs = dict[tuple[Setting, int, int], list[RunResult]]  # of every setting, width and depth


def curves_of(results: Iterable[RunResult], prior: CurvePrior | None = None) -> dict[Variant, list[SettingCurve]]:
    """The curves of every variant, by rising setting."""
    variants: dict[Variant, list[SettingCurve]] = {}
    for variant, by_place in by_variant(results).items():
        places = sorted(by_place, key=lambda place: ([value or 0.0 for value in place[0]], place[1:]))
        variants[variant] = [SettingCurve.of(*place, by_place[place], prior) for place in places]
    return variants


def by_variant(results: Iterable[RunResult]) -> dict[Variant, Runs]:
    """The runs of every variant.

    Models are one where their names only tell settings apart, as gpt-124m and gpt-350m do, or a name for every batch.
    """
    by_rule: dict[tuple[str, str], list[RunResult]] = defaultdict(list)
    for run in results:
        if not run.validation and run.hyperparameter in (None, "", BATCH_KEY):
            by_rule[run.optimizer, run.parametrization].append(run)
    variants: dict[Variant, Runs] = {}
    for rule, runs in sorted(by_rule.items()):
        by_model: dict[str, Runs] = defaultdict(lambda: defaultdict(list))
        models_at: dict[tuple[object, ...], set[str]] = defaultdict(set)
        for run, setting in zip(runs, _settings(runs), strict=True):
            model = run.model.removesuffix(f" bs{run.batch_size}")  # which tells the ladders of a table apart
            by_model[model][setting, run.width, run.depth].append(run)
            models_at[run.width, run.depth, setting.tokens, setting.batch_size].add(model)
        models = sorted(by_model)
        if all(len(names) == 1 for names in models_at.values()):
            variants[Variant(*rule, tuple(models))] = {k: v for model in models for k, v in by_model[model].items()}
        else:
            variants |= {Variant(*rule, (model,)): by_model[model] for model in models}
    return variants


def _settings(runs: Sequence[RunResult]) -> list[Setting]:
    """The setting of every run; one that diverged was meant for the tokens of one that finished."""
    are_counted = all(run.parameters for run in runs)
    meant: dict[tuple[object, ...], set[int]] = defaultdict(set)
    for run in runs:
        if run.status == DONE and run.tokens:
            meant[run.model, run.width, run.depth, run.parameters, run.batch_size].add(run.tokens)
    settings = []
    for run in runs:
        lengths = meant[run.model, run.width, run.depth, run.parameters, run.batch_size]
        tokens = run.horizon or min((n for n in lengths if n >= (run.tokens or 0)), default=run.tokens)
        parameters = run.parameters if are_counted else BLOCK * run.width**2 * run.depth
        settings.append(Setting(parameters, tokens, run.batch_size))
    return settings
