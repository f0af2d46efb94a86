"""The law of the best LR: one power law over size, tokens and batch, through the optima of all curves of a variant.

A curve is loss against LR at one setting: N parameters, D tokens of training, a batch of B. With n, d and b the log2 of
these above their means over the curves, the best LR of curve i is, in octaves,

    log2 LR_i = a + c_N n_i + c_D d_i + c_B b_i + e b_i^2 + scatter_i + error_i,
    scatter_i ~ Normal(0, tau^2),      error_i ~ Normal(0, s_i^2),

a random-effects meta-regression (Berkey et al. 1995, doi 10.1002/sim.4780140406).

- Curves: each is fitted alone (setting_curve.py); s_i is the standard deviation of its posterior. A best LR at an end
  of a grid is no optimum: such curves are left out and counted.
- Coefficients have flat priors and are integrated in closed form. That leaves the restricted likelihood of tau, which
  is summed over on a grid under a half-Cauchy prior (Gelman 2006, doi 10.1214/06-BA117A). Draws are the answer.
- Axes: what never varied has no exponent, nor has what varies along with the axes before it, as D = 20 N does. At a
  target, what such an axis is off its course counts with an exponent that others published (ASSUMED).
- Curvature: e is kept where its interval has no 0 in it; c_B is the exponent at the mean of b.
- Forecast: all coefficients' uncertainty, which grows with distance, and the scatter. The largest size is held out and
  forecast from the others, to see what such an interval is worth.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from mupsweep.analysis.config import CurvePrior
from mupsweep.analysis.estimate import QUANTILES, UNKNOWN, Array, Estimate
from mupsweep.analysis.forecast import Forecast, losses_at_target
from mupsweep.analysis.loss_curve import DRAWS
from mupsweep.analysis.run_result import RunResult
from mupsweep.analysis.setting_curve import Setting, SettingCurve, Variant, curves_of
from mupsweep.errors import RecordError
from mupsweep.formatting import counted

AXES = ("parameters", "tokens", "batch_size")
BATCH = AXES.index("batch_size")
SCATTERS = np.geomspace(0.01, 4.0, 60)  # octaves: grid of tau
TYPICAL_SCATTER = 0.3  # octaves: scale of tau's prior
OWN_COURSE = 0.1  # octaves, root mean square, by which an axis must leave the course of the axes before it
MIN_BATCHES = 3  # batch sizes, below which the law is straight


class Assumed(NamedTuple):
    """An exponent that stands in for one that was not measured; `sd` is how far published ones differ."""

    exponent: float
    sd: float
    source: str


ASSUMED: Mapping[str, Assumed] = {
    "parameters": Assumed(0.0, 0.1, "the parametrization, whose base LR is meant to fit every size"),
    "tokens": Assumed(-0.16, 0.16, "between 0 at a fixed batch (arXiv 2503.04715) and -0.32 (arXiv 2603.28743)"),
    "batch_size": Assumed(0.5, 0.15, "the square-root rule of Adam (arXiv 2205.10287)"),
}
UNSCALED = {"parameters": Assumed(-0.7, 0.2, "Step Law (arXiv 2503.04715)")}
ASSUMED_OF: Mapping[str, Mapping[str, Assumed]] = {  # name of a parametrization or optimizer -> where it differs
    "sp": UNSCALED,
    "given": UNSCALED,  # that of a table without a column
    "sgd": {"batch_size": Assumed(1.0, 0.25, "the linear rule of SGD (arXiv 2512.22382)")},
}


# ---- the regression


@dataclass(frozen=True)
class PowerLaw:
    """Draws of the regression through the optima of some curves.

    Attributes:
        axes: that have an exponent.
        missing: axis -> why it has none.
        center: (3,) mean log2 of every axis of AXES; 0 where it is not known.
        courses: axis without an exponent -> (1 + axes,) the line along which its values lie, where they are known.
        coefficients: (1 + axes, draws) at the center; one more, of the squared batch, where the law is curved.
        scatter: (draws,) tau.
    """

    axes: tuple[str, ...]
    missing: Mapping[str, str]
    center: Array
    courses: Mapping[str, Array]
    coefficients: Array
    scatter: Array

    @classmethod
    def of(cls, settings: Sequence[Setting], optima: Array, sds: Array) -> PowerLaw | None:
        """The law through some optima; None where there are too few for the axes that vary.

        Args:
            optima, sds: (n,) log2 LRs and their standard deviations.
        """
        values = log2_of(settings)
        center = np.where(np.isnan(values).any(axis=0), 0.0, values.mean(axis=0))
        values = values - center
        axes, missing, courses = _axes(values)
        x = _columns(values, axes)
        if len(settings) <= x.shape[1]:
            return None
        law = cls(axes, missing, center, courses, *_regression(x, optima, sds))
        batch = values[:, BATCH]
        if "batch_size" not in axes or len(np.unique(batch)) < MIN_BATCHES or len(settings) <= x.shape[1] + 1:
            return law
        coefficients, scatter = _regression(np.column_stack([x, batch**2]), optima, sds)
        low, _, high = np.quantile(coefficients[-1], QUANTILES)
        return replace(law, coefficients=coefficients, scatter=scatter) if low > 0 or high < 0 else law

    @property
    def curvature(self) -> Estimate | None:
        """Octaves per squared octave of batch; None where the law is straight."""
        return Estimate.of(self.coefficients[-1]) if len(self.coefficients) > 1 + len(self.axes) else None

    def exponent(self, axis: str) -> Estimate:
        """The power of an axis, at the center of the batches where the law is curved; unknown where it has none."""
        return Estimate.of(self.coefficients[1 + self.axes.index(axis)]) if axis in self.axes else UNKNOWN

    def optima(self, settings: Sequence[Setting]) -> Array:
        """(n, draws) log2 LR on the law, where every axis without an exponent keeps its course."""
        values = log2_of(settings) - self.center
        x = _columns(values, self.axes)
        if self.curvature is not None:
            x = np.column_stack([x, values[:, BATCH] ** 2])
        return x @ self.coefficients

    def off_course(self, axis: str, setting: Setting) -> float:
        """Octaves by which an axis without an exponent is off its course; 0 where no course is known."""
        if axis not in self.courses or getattr(setting, axis) is None:
            return 0.0
        values = log2_of([setting]) - self.center
        return float(values[0, AXES.index(axis)] - _columns(values, self.axes)[0] @ self.courses[axis])


def log2_of(settings: Sequence[Setting]) -> Array:
    """(n, 3) of every axis of AXES; nan where it is not known."""
    return np.log2([[np.nan if value is None else value for value in setting] for setting in settings])


def _columns(values: Array, axes: Sequence[str]) -> Array:
    """(n, 1 + axes) of the regression."""
    return np.column_stack([np.ones(len(values)), *(values[:, AXES.index(axis)] for axis in axes)])


def _axes(values: Array) -> tuple[tuple[str, ...], dict[str, str], dict[str, Array]]:
    """The axes that vary on their own, why the others have no exponent, and the courses of these."""
    axes: tuple[str, ...] = ()
    missing: dict[str, str] = {}
    courses: dict[str, Array] = {}
    for axis, value in zip(AXES, values.T, strict=True):
        if np.isnan(value).any():
            missing[axis] = "is not known"
            continue
        x = _columns(values, axes)
        course = np.linalg.lstsq(x, value, rcond=None)[0]
        if math.sqrt(np.mean((value - x @ course) ** 2)) > OWN_COURSE:
            axes = (*axes, axis)
        else:
            courses[axis] = course
            has_varied = axes and value.std() > OWN_COURSE
            missing[axis] = f"varied only along with {' and '.join(axes)}" if has_varied else "never varied"
    return axes, missing, {axis: np.pad(line, (0, 1 + len(axes) - len(line))) for axis, line in courses.items()}


def _regression(x: Array, optima: Array, sds: Array) -> tuple[Array, Array]:
    """(columns, DRAWS) coefficients and (DRAWS,) scatters, drawn from their posterior.

    Args:
        x: (n, columns), n above columns.
        optima, sds: (n,) of the curves.
    """
    log_evidence, means, roots = [], [], []
    for scatter in SCATTERS:
        weights = 1 / (scatter**2 + sds**2)
        precision = (x.T * weights) @ x
        mean = np.linalg.solve(precision, x.T @ (weights * optima))
        rest = optima - x @ mean
        restricted = 0.5 * (np.log(weights).sum() - np.linalg.slogdet(precision)[1] - (weights * rest**2).sum())
        prior_of_cell = math.log(scatter) - math.log1p((scatter / TYPICAL_SCATTER) ** 2)
        log_evidence.append(restricted + prior_of_cell)
        means.append(mean)
        roots.append(np.linalg.inv(np.linalg.cholesky(precision)).T)
    evidence = np.exp(np.array(log_evidence) - max(log_evidence))
    rng = np.random.default_rng(0)
    which = rng.choice(len(SCATTERS), DRAWS, p=evidence / evidence.sum())
    deviates = rng.standard_normal((DRAWS, x.shape[1], 1))
    return (np.array(means)[which] + (np.array(roots)[which] @ deviates)[..., 0]).T, SCATTERS[which]


# ---- the law of a variant


@dataclass(frozen=True)
class HeldOut:
    """The curves at the top of an axis, forecast from all others.

    Attributes:
        value: of the axis there.
        octaves: root mean square of what the optima are off the forecast.
        inside: how many of them lie in their interval, which has their own error in it.
    """

    axis: str
    value: float
    curves: int
    octaves: float
    inside: int


@dataclass(frozen=True)
class Law:
    """What the optima of one variant follow.

    Attributes:
        curves: those with an optimum between their LRs.
        left_out: how many others there are.
        held_out: None where no axis can be fitted without its top.
        best_batch: the law over parameters and tokens at the best batch of each pair of them; None where few are known.
        best_batches: how many pairs have one.
    """

    variant: Variant
    curves: tuple[SettingCurve, ...]
    left_out: int
    power: PowerLaw
    held_out: HeldOut | None
    best_batch: PowerLaw | None
    best_batches: int

    def values(self, axis: str) -> list[float]:
        """What an axis was trained at, rising."""
        return sorted({value for curve in self.curves if (value := getattr(curve.setting, axis)) is not None})

    def assumed(self, axis: str, rules: Mapping[str, str]) -> Assumed:
        """What stands in for an exponent that was not measured.

        Args:
            rules: axis -> what carries LRs along it already, so that the base LR is meant to stay.
        """
        if axis in rules:
            return Assumed(0.0, ASSUMED[axis].sd, f"beside {rules[axis]}, which carries the LR")
        of_names = {**ASSUMED_OF.get(self.variant.parametrization, {}), **ASSUMED_OF.get(self.variant.optimizer, {})}
        return of_names.get(axis, ASSUMED[axis])

    def forecast(self, setting: Setting, rules: Mapping[str, str] | None = None) -> Forecast:
        """The optimum at a setting, and the LR to use there if its valley is that of the nearest curve.

        Args:
            rules: as in `assumed`.
        """
        rng = np.random.default_rng(2)
        draws = self.power.optima([setting])[0] + self.power.scatter * rng.standard_normal(DRAWS)
        for axis in self.power.missing:
            assumed = self.assumed(axis, rules or {})
            draws = draws + self.power.off_course(axis, setting) * rng.normal(assumed.exponent, assumed.sd, DRAWS)
        apart = log2_of([curve.setting for curve in self.curves]) - log2_of([setting])
        nearest = self.curves[int(np.nansum(np.abs(apart), axis=1).argmin())]
        log2_lrs, lost = losses_at_target(nearest.posterior, 0.0, draws)
        expected = lost.mean(axis=0)
        best = int(expected.argmin())
        return Forecast(float(log2_lrs[best]), float(expected[best]), Estimate.of(draws), draws)


def fit_laws(results: Iterable[RunResult], prior: CurvePrior | None = None) -> tuple[list[Law], list[str]]:
    """The law of every variant that has one, and why others have none.

    Raises:
        RecordError: none has.
    """
    laws: list[Law] = []
    refused: list[str] = []
    for variant, curves in curves_of(results, prior).items():
        try:
            laws.append(_law(variant, curves))
        except RecordError as error:
            refused.append(str(error))
    if not laws:
        raise RecordError("; ".join(refused) or "no finished runs, so there is no law: mupsweep run first")
    return laws, refused


def _law(variant: Variant, curves: Sequence[SettingCurve]) -> Law:
    inner = tuple(curve for curve in curves if curve.is_inner)
    power = _through(inner)
    if len(curves) == 1 or (power is not None and not power.axes):
        raise RecordError(
            f"{variant.name}: every curve is of one size, horizon and batch size, so there is no law: train several, "
            "or name the columns that tell them apart, --columns parameters=NAME,tokens=NAME,batch_size=NAME"
        )
    if power is None:
        raise RecordError(
            f"{variant.name}: of {counted(len(curves), 'curve')}, {len(inner)} "
            f"{'has' if len(inner) == 1 else 'have'} the best LR between two others, too few for a law: train more "
            "LRs, or more sizes, horizons or batch sizes"
        )
    best = _best_batches(inner)
    at_best = _through(best)
    if at_best is not None and not at_best.axes:
        at_best = None
    return Law(variant, inner, len(curves) - len(inner), power, _held_out(inner, power), at_best, len(best))


def _through(curves: Sequence[SettingCurve]) -> PowerLaw | None:
    """The law through the optima of some curves; None where there are too few."""
    if not curves:
        return None
    optima, sds = np.array([[curve.optimum, curve.sd] for curve in curves]).T
    return PowerLaw.of([curve.setting for curve in curves], optima, sds)


def _held_out(curves: Sequence[SettingCurve], power: PowerLaw) -> HeldOut | None:
    """The largest size, or else the longest training or the largest batch, if the others have a law over its axes."""
    rng = np.random.default_rng(3)
    for axis in power.axes:
        top = max(getattr(curve.setting, axis) for curve in curves)
        others = [curve for curve in curves if getattr(curve.setting, axis) < top]
        law = _through(others)
        if law is None or law.axes != power.axes:
            continue
        tops = [curve for curve in curves if getattr(curve.setting, axis) == top]
        drawn = law.optima([curve.setting for curve in tops])
        optima = np.array([curve.optimum for curve in tops])
        sds = np.hypot(law.scatter, [[curve.sd] for curve in tops])
        low, middle, high = np.quantile(drawn + sds * rng.standard_normal(drawn.shape), QUANTILES, axis=1)
        errors, inside = optima - middle, (low <= optima) & (optima <= high)
        return HeldOut(axis, top, len(tops), math.sqrt(np.mean(errors**2)), int(inside.sum()))
    return None


def _best_batches(curves: Sequence[SettingCurve]) -> list[SettingCurve]:
    """The curve of the best batch of every size and horizon, where it lies between two others."""
    by_pair: dict[tuple[float | None, float | None], list[SettingCurve]] = defaultdict(list)
    for curve in curves:
        if curve.setting.batch_size is not None:
            by_pair[curve.setting[:2]].append(curve)
    best = []
    for members in by_pair.values():
        members.sort(key=lambda curve: curve.setting.batch_size or 0)
        losses = [curve.loss for curve in members]
        k = losses.index(min(losses))
        if 0 < k < len(members) - 1:
            best.append(replace(members[k], setting=members[k].setting._replace(batch_size=None)))
    return best
