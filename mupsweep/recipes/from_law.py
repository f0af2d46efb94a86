"""The recipe of a target from a law over size, tokens and batch, which may all differ from what was trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mupsweep.analysis.estimate import Estimate
from mupsweep.analysis.law import AXES, Law, PowerLaw
from mupsweep.analysis.setting_curve import Setting
from mupsweep.errors import ConfigError
from mupsweep.formatting import counted, si
from mupsweep.sweep.run_spec import ResolvedVariant
from mupsweep.sweep.settings import settings

LAW = "law"  # what stands in a recipe where others have the verdict of a ladder


def formula(power: PowerLaw) -> str:
    """LR ~ parameters^-0.64 [-0.70, -0.58] batch_size^+0.31 [+0.28, +0.34]"""
    return "LR ~ " + " ".join(f"{axis}^{power.exponent(axis)}" for axis in power.axes)


def law_json(law: Law) -> dict[str, Any]:
    """The stable form that scripts read; mupsweep/report/README.md describes it."""
    power = law.power
    exponents = {}
    for axis in AXES:
        trained = law.values(axis) or [None]
        range_ = {"smallest": trained[0], "largest": trained[-1]}
        exponents[axis] = {**power.exponent(axis).record(), **range_, "reason": power.missing.get(axis)}
    at_center = {axis: 2**log2 for axis, log2 in zip(AXES, power.center.tolist(), strict=True) if log2}
    return {
        "models": list(law.variant.models),
        "optimizer": law.variant.optimizer,
        "parametrization": law.variant.parametrization,
        "curves": len(law.curves),
        "left_out": law.left_out,
        "exponents": exponents,
        "curvature": power.curvature and power.curvature.record(),
        "center": {**at_center, "log2_lr": Estimate.of(power.coefficients[0]).record()},
        "scatter": Estimate.of(power.scatter).record(),
        "held_out": law.held_out
        and {
            "axis": law.held_out.axis,
            "value": law.held_out.value,
            "curves": law.held_out.curves,
            "octaves": law.held_out.octaves,
            "inside": law.held_out.inside,
        },
        "best_batch": law.best_batch
        and {
            "pairs": law.best_batches,
            "exponents": {axis: law.best_batch.exponent(axis).record() for axis in AXES[:2]},
        },
    }


def table_law_recipe(law: Law, target: Mapping[str, int], resolved: ResolvedVariant | None = None) -> dict[str, Any]:
    """The LR of a target by the law of runs that were trained elsewhere; with a base, every tensor's numbers too.

    Args:
        resolved: the base.

    Raises:
        ConfigError: the target does not say where it lies on an axis that varied.
    """
    given: dict[str, float | None] = {axis: target.get(axis) for axis in AXES}
    shape = {**base_shape(law), **{key: target[key] for key in ("width", "depth") if key in target}}
    if given["parameters"] is None and ("width" in target or "depth" in target):
        given["parameters"] = _parameters(law, shape["width"], shape["depth"])
    for axis, value in given.items():
        trained = law.values(axis)
        if value is None and len(set(trained)) > 1:
            name = "width=N depth=N, or parameters=N" if axis == "parameters" else f"{axis}=N"
            raise ConfigError(
                f"--to lacks {name}: {si(trained[0])} to {si(trained[-1])} were trained, so the target has to say which"
            )
        if value is None and trained:
            given[axis] = trained[0]
    if resolved is not None:
        lengths = {axis: int(value) for axis, value in given.items() if value is not None and axis != "parameters"}
        return law_recipe(law, resolved, {**shape, **lengths, **target})
    found = _record(law, Setting(**given))
    return {**found, "target": {**target, **given}, "base_lr": 2.0 ** found["log2_lr"]}


def base_shape(law: Law) -> dict[str, int]:
    """Width and depth of the smallest size that the law rests on."""
    smallest = min(law.curves, key=lambda curve: (curve.width * curve.depth, curve.width))
    return {"width": smallest.width, "depth": smallest.depth}


def law_recipe(law: Law, resolved: ResolvedVariant, target: Mapping[str, int]) -> dict[str, Any]:
    """How to train a target by a law, with every tensor's numbers; what the target lacks is the base's.

    Raises:
        ConfigError: a target that is no multiple of the base shape.
    """
    if "parameters" in target:
        raise ConfigError(
            f"--to parameters={target['parameters']} is of a table without --base: name width and depth of the target"
        )
    model, training = resolved.model, resolved.training
    width, depth = target.get("width", model.width), target.get("depth", model.depth)
    batch_size = target.get("batch_size", training.batch_size)
    size = resolved.size(width / model.width, depth / model.depth)
    tokens = target.get("tokens", resolved.at(size).tokens)
    final = replace(training.on_tokens(tokens), batch_size=batch_size)
    rules = {"batch_size": f"training.batch_rule={training.batch_rule}"} if training.base_batch_size else {}
    if training.base_tokens:
        exponent = f"training.horizon_exponent={training.horizon_exponent:g}"
        rules["tokens"] = rules["batch_size"] if training.batch_rule_has_tokens else exponent
    parameters = _parameters(law, width, depth, resolved)
    found = _record(law, Setting(parameters, tokens, batch_size), rules)
    if batch_size != training.batch_size and not training.base_batch_size:
        found["basis"] += f"; betas and weight decay are those of a batch of {training.batch_size}"
    trained = replace(resolved, variant=replace(resolved.variant, training=final))
    return {**found, **settings(trained, size, 2.0 ** found["log2_lr"])}


def _parameters(law: Law, width: int, depth: int, resolved: ResolvedVariant | None = None) -> float | None:
    """Those of a trained size, or what the base's model counts, or the largest size's scaled by width^2 depth."""
    for curve in law.curves:
        if (curve.width, curve.depth) == (width, depth):
            return curve.setting.parameters
    largest = max(law.curves, key=lambda curve: curve.setting.parameters or 0)
    if largest.setting.parameters is None:
        return None
    if resolved is not None:
        base = resolved.model
        costs = [
            resolved.cost(resolved.size(w / base.width, d / base.depth))
            for w, d in ((width, depth), (largest.width, largest.depth))
        ]
        if costs[1].known and costs[1].parameters == largest.setting.parameters:
            return costs[0].parameters
    return largest.setting.parameters * width**2 * depth / (largest.width**2 * largest.depth)


def _record(law: Law, setting: Setting, rules: Mapping[str, str] | None = None) -> dict[str, Any]:
    rules = rules or {}
    forecast = law.forecast(setting, rules)
    model = law.variant.models[0] if len(law.variant.models) == 1 else counted(len(law.variant.models), "model")
    tokens = law.values("tokens")
    return {
        "model": model,
        "optimizer": law.variant.optimizer,
        "parametrization": law.variant.parametrization,
        "verdict": LAW,
        "basis": "; ".join(_basis(law, setting, rules)),
        "log2_lr": forecast.log2_lr,
        "log2_lr_optimum": forecast.optimum.value,
        "log2_lr_low": forecast.optimum.low,
        "log2_lr_high": forecast.optimum.high,
        "expected_regret": forecast.expected_regret,
        "horizon": {
            "tokens": setting.tokens,
            "measured_tokens": tokens[-1] if tokens else None,
            "note": f"for {_amount(setting.tokens)} tokens of training in batches of {_amount(setting.batch_size)}",
        },
        "law": law_json(law),
    }


def _basis(law: Law, setting: Setting, rules: Mapping[str, str]) -> Iterator[str]:
    """What the LR of a target rests on: the law, how far beyond its curves the target lies, and what is assumed."""
    yield f"law of {counted(len(law.curves), 'curve')}: {formula(law.power)}"
    for axis, value in setting._asdict().items():
        trained = law.values(axis)
        if value is not None and trained and value > trained[-1]:
            yield f"the target's {axis}: {value / trained[-1]:.3g} times the largest trained"
        elif value is not None and trained and value < trained[0]:
            yield f"the target's {axis}: {value / trained[0]:.3g} times the smallest trained"
    batches, batch_size = law.values("batch_size"), setting.batch_size
    if law.power.curvature is not None and batch_size is not None and not batches[0] <= batch_size <= batches[-1]:
        yield "the law's curve in batch_size goes on there, which no run shows"
    for axis, why in law.power.missing.items():
        off = law.power.off_course(axis, setting)
        if abs(off) > 0.01:
            assumed = law.assumed(axis, rules)
            yield (
                f"{axis} {why}: {off:+.2f} octaves are carried by the assumed {axis}^{assumed.exponent:g} "
                f"± {assumed.sd:g}, {assumed.source}"
            )
        elif why == "is not known" and getattr(setting, axis) is not None:
            yield f"{axis} of the runs is not known, so the target's changes nothing"


def _amount(value: float | None) -> str:
    return "as many" if value is None else si(value)
