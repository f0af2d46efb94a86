"""Axes: hyperparameters that a sweep varies beside the LR, and the names by which its variants are told apart.

The values form a star: each value of each key alone, all other keys at their defaults. That is what the question which
hyperparameter matters needs, and its cost grows with the sum of the lists and not with their product.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mupsweep.analysis.labels import HyperparameterOverride
from mupsweep.errors import ConfigError
from mupsweep.sweep.compose import nearest_key

SECTIONS = ("model", "optimizer", "parametrization", "training")
ELSEWHERE = {  # keys that are no hyperparameters of the base, and what varies them instead, if anything does
    "model.width": "sweep.width_ratios",
    "model.depth": "sweep.depth_ratios",
    "training.steps": "training.branches",
    "training.tokens": "training.branches",
    "training.micro_batch": None,
    "training.eval_batches": None,
    "training.evals": None,
    "training.checkpoint_minutes": None,
}


def expand(variants: Sequence[Mapping[str, Any]], axes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each variant, and after it those that differ from it in one value; a value that it has already makes none.

    Args:
        variants: sections by name, as composed. A key that only some of them have is varied in those.

    Raises:
        ConfigError: a key that none has, or that holds no number, or a list without numbers.
    """
    for key, values in axes.items():
        _check(key, values, variants)
    made: list[dict[str, Any]] = []
    for variant in variants:
        made.append(dict(variant))
        for key, values in axes.items():
            keys = _numeric(variant)
            for value in values if key in keys else ():
                if value != keys[key]:
                    change = HyperparameterOverride(key, float(value), keys[key])
                    made.append({**_with(variant, key, value), "change": asdict(change)})
    return made


def _check(key: str, values: Any, variants: Sequence[Mapping[str, Any]]) -> None:
    where = f"sweep.axes: {key}"
    if key in ELSEWHERE:
        other = ELSEWHERE[key]
        raise ConfigError(f"{where} is no hyperparameter to tune" + (f"; {other} varies it" if other else ""))
    known = {k for variant in variants for k in _numeric(variant)} - set(ELSEWHERE)
    if key not in known:
        raise ConfigError(f"{where} is no key with a number; {nearest_key(key, known)}")
    listed = isinstance(values, list | tuple) and all(_is_number(v) and math.isfinite(v) for v in values)
    if not listed or not values or len(set(values)) < len(values):
        raise ConfigError(f"{where}={values}: expected a list of different numbers, such as sweep.axes={{{key}:[1,2]}}")


def _numeric(variant: Mapping[str, Any]) -> dict[str, float | None]:
    """Every dotted key that holds a number, or null, which may stand for one."""
    return {
        key: value
        for section in SECTIONS
        for key, value in _leaves(variant[section], section)
        if value is None or _is_number(value)
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _leaves(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for key, value in items:
        yield f"{prefix}.{key}", value
        yield from _leaves(value, f"{prefix}.{key}")


def _with(variant: Mapping[str, Any], key: str, value: float) -> dict[str, Any]:
    """A variant with one value replaced; a whole number stays one where the key held one."""
    made = copy.deepcopy(dict(variant))
    *path, last = key.split(".")
    place: Any = made
    for name in path:
        place = place[int(name) if isinstance(place, list) else name]
    at: Any = int(last) if isinstance(place, list) else last
    whole = not isinstance(place[at], float) and float(value).is_integer()
    place[at] = int(value) if whole else float(value)
    return made
