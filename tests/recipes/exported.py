"""Recipes of small models to export, and snippets run."""

from __future__ import annotations

import json
from typing import Any

from mupsweep import recipes
from mupsweep.recipes import Export, recipe
from mupsweep.sweep import config, plan
from mupsweep.sweep.run_spec import RunSpec

SMALL = ["experiment=smoke", "training.precision=fp32", "sweep.log2_lrs=[-6]"]


def run(*overrides: str, width_ratio: int = 4, depth_ratio: int = 2) -> RunSpec:
    """The one run of a target four times as wide and twice as deep as its base."""
    sizes = [f"sweep.width_ratios=[{width_ratio}]", f"sweep.depth_ratios=[{depth_ratio}]"]
    (made,) = plan.plan(config.load([*SMALL, *sizes, *overrides]))
    return made


def content(made: RunSpec) -> dict[str, Any]:
    """Its recipe, as it is read back from a file."""
    model, optimizer, parametrization = made.resolved.variant.label
    rows = {"basis": "measured", "horizon": {"note": "for the tokens that were trained"}}
    rows |= {"log2_lr": made.log2_lr, "log2_lr_optimum": made.log2_lr}
    rows |= {"log2_lr_low": made.log2_lr - 0.5, "log2_lr_high": made.log2_lr + 0.5}
    found = {"model": model, "optimizer": optimizer, "parametrization": parametrization, **rows}
    return json.loads(json.dumps(found | recipe.settings(made.resolved, made.size, made.base_lr)))


def exported(name: str, made: RunSpec) -> tuple[Export, dict[str, Any]]:
    """An export, and the names that it defines as Python."""
    export = recipes.export(name, content(made))
    space: dict[str, Any] = {}
    exec(compile(export.text, f"<{name}>", "exec"), space)
    return export, space


def by_parameter(optimizers: list[Any], *keys: str) -> dict[Any, dict[str, Any]]:
    """Parameter -> the numbers of its group."""
    return {p: {k: g[k] for k in keys} for o in optimizers for g in o.param_groups for p in g["params"]}
