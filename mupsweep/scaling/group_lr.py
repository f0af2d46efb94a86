"""LRs per group of tensors (`optimizer.group_lr`): factors on the LR that the rules give, at every size alike.

A key is a role, `attention` or `mlp` (the hidden matrices of these branches), or a pattern of tensors' names such as
blocks.*.attention.query.weight. Where several keys fit a tensor, their factors multiply.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from mupsweep.errors import ConfigError
from mupsweep.formatting import nearest
from mupsweep.scaling.roles import Role, TensorSpec

BRANCHES = {"attention": "*.attention.*", "mlp": "*.mlp.*"}  # of hidden matrices
GROUPS = (*(role.value for role in Role), *BRANCHES)


def check_group_lr(factors: Mapping[str, Any], where: str = "optimizer.group_lr") -> None:
    """Refuse keys that are no group and no pattern of names, and factors that are no positive numbers."""
    for key, factor in factors.items():
        if key not in GROUPS and not any(character in key for character in ".*?["):
            raise ConfigError(f"{where}: no group of tensors '{key}'; {nearest(key, GROUPS)}, or a pattern of names")
        is_number = isinstance(factor, int | float) and not isinstance(factor, bool) and math.isfinite(factor)
        if not is_number or factor <= 0:
            raise ConfigError(f"{where}: {key}={factor!r}: expected a positive number, a factor on the LR")


def factor_of(factors: Mapping[str, float], spec: TensorSpec) -> float:
    """The factor on the LR of a tensor."""
    return math.prod(float(factor) for key, factor in factors.items() if _fits(key, spec))


def check_matches(factors: Mapping[str, float], specs: Iterable[TensorSpec], where: str = "optimizer.group_lr") -> None:
    """Refuse a key that fits no tensor."""
    specs = list(specs)
    for key in factors:
        if not any(_fits(key, spec) for spec in specs):
            raise ConfigError(
                f"{where}: no tensor of the model is '{key}'; {nearest(key, [*GROUPS, *(s.name for s in specs)])}"
            )


def without_ones(factors: Mapping[str, float] | None) -> dict[str, float]:
    """The factors that change anything, as floats."""
    return {key: float(factor) for key, factor in (factors or {}).items() if factor != 1}


def _fits(key: str, spec: TensorSpec) -> bool:
    if key in BRANCHES:
        return spec.role is Role.HIDDEN and fnmatchcase(spec.name, BRANCHES[key])
    return key == spec.role.value or fnmatchcase(spec.name, key)
