"""Hyperparameters that a sweep varies beside the LR (`sweep.axes`): one variant per value.

The values form a star: each value of each key alone, all other keys at their defaults. That answers which
hyperparameter matters, at a cost that grows with the sum of the lists and not with their product.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mupsweep.analysis.labels import HyperparameterOverride
from mupsweep.errors import ConfigError
from mupsweep.scaling.group_lr import GROUPS
from mupsweep.sweep.compose import nearest_key

GROUP_LR = "optimizer.group_lr."  # followed by a role, a branch or a pattern of names
SECTIONS = ("model", "optimizer", "parametrization", "training")
NOT_TUNABLE = {  # keys that are no hyperparameters of the base -> the key that varies them instead, or None
    "model.width": "sweep.width_ratios",
    "model.depth": "sweep.depth_ratios",
    "training.steps": "training.branches",
    "training.tokens": "training.branches",
    "training.tokens_per_parameter": None,
    "training.micro_batch": None,
    "training.eval_tokens": None,
    "training.eval_batches": None,
    "training.evals": None,
    "training.checkpoint_minutes": None,
    "training.norm_points": None,
}


def expand(variants: Sequence[Mapping[str, Any]], hyperparameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each variant, followed by the variants that differ from it in one value.

    A value that a variant has already makes no further variant.

    Args:
        variants: section name -> section, as composed. A key that only some of the variants have is varied in those.
        hyperparameters: dotted key -> values.

    Raises:
        ConfigError: a key that no variant has or that holds no number, or a list without numbers.
    """
    for key, values in hyperparameters.items():
        _check(key, values, variants)
    expanded: list[dict[str, Any]] = []
    for variant in variants:
        expanded.append(dict(variant))
        defaults = _defaults(variant, hyperparameters)
        for key, values in hyperparameters.items():
            for value in values if key in defaults else ():
                if value != defaults[key]:
                    change = HyperparameterOverride(key, float(value), defaults[key])
                    expanded.append({**_with(variant, key, value), "change": asdict(change)})
    return expanded


def _check(key: str, values: Any, variants: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a key that no variant can vary, and values that are not different finite numbers."""
    where = f"sweep.axes: {key}"
    if key in NOT_TUNABLE:
        alternative = NOT_TUNABLE[key]
        raise ConfigError(
            f"{where} is no hyperparameter to tune" + (f"; {alternative} varies it" if alternative else "")
        )
    tunable = {k for variant in variants for k in _defaults(variant, [key])} - set(NOT_TUNABLE)
    if key not in tunable:
        raise ConfigError(f"{where} is no key with a number; {nearest_key(key, tunable)}")
    is_list = isinstance(values, list | tuple) and all(_is_number(v) and math.isfinite(v) for v in values)
    if not is_list or not values or len(set(values)) < len(values):
        raise ConfigError(f"{where}={values}: expected a list of different numbers, such as sweep.axes={{{key}:[1,2]}}")


def _defaults(variant: Mapping[str, Any], hyperparameters: Iterable[str]) -> dict[str, float | None]:
    """What can be varied, with its value in a variant; a group of tensors whose LR has no factor has the factor 1."""
    groups = [*(GROUP_LR + group for group in GROUPS), *(k for k in hyperparameters if k.startswith(GROUP_LR))]
    return dict.fromkeys(groups, 1.0) | _numeric(variant)


def _numeric(variant: Mapping[str, Any]) -> dict[str, float | None]:
    """Dotted key -> value of every key that holds a number, or null, which may stand for a number."""
    numeric: dict[str, float | None] = {}
    for section in SECTIONS:
        for key, value in _nodes(variant[section], section):
            if (value is None or _is_number(value)) and "log2_lr_range" not in key and not key.endswith(".group_lr"):
                numeric[key] = value
    return numeric


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _nodes(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested mappings and lists, the inner nodes included."""
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for key, value in items:
        yield f"{prefix}.{key}", value
        yield from _nodes(value, f"{prefix}.{key}")


def _with(variant: Mapping[str, Any], key: str, value: float) -> dict[str, Any]:
    """A variant with one value replaced; a whole number stays whole where the key did not hold a float."""
    changed = copy.deepcopy(dict(variant))
    if key.startswith(GROUP_LR):  # the names of tensors have dots
        optimizer = changed["optimizer"]
        optimizer["group_lr"] = {**(optimizer.get("group_lr") or {}), key.removeprefix(GROUP_LR): float(value)}
        return changed
    *path, last = key.split(".")
    node: Any = changed
    for name in path:
        node = node[int(name) if isinstance(node, list) else name]
    index: Any = int(last) if isinstance(node, list) else last
    is_whole = not isinstance(node[index], float) and float(value).is_integer()
    node[index] = int(value) if is_whole else float(value)
    return changed
