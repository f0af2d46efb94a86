"""Sizes that a sweep lists one by one (`sweep.sizes`), in place of ratios to the base; the first is the base."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mupsweep.errors import ConfigError
from mupsweep.schema import require, to_dataclass, with_whole_numbers

WHERE = "sweep.sizes"
RATIO_KEYS = ("sweep.width_ratios", "sweep.depth_ratios", "sweep.pair")
BASE_KEYS = ("model.width", "model.depth", "model.heads", "model.head_dim")  # that the first size may set


@dataclass(frozen=True)
class ListedSize:
    """One size of the list.

    Attributes:
        heads: attention heads; None leaves them to the model's head_dim or heads.
        name: what {size} stands for in the command of a program; None for the size's own, as w512-d8.
        parameters: how many the model has; None where only the model's own table of tensors says it.
    """

    width: int
    depth: int
    heads: int | None = None
    name: str | None = None
    parameters: int | None = None

    def __post_init__(self) -> None:
        for key in ("width", "depth", "heads", "parameters"):
            value = getattr(self, key)
            require(value is None or value > 0, f"{WHERE}: {key}", value, "a positive number")
        if self.heads is not None and self.width % self.heads:
            raise ConfigError(f"{WHERE}: heads={self.heads} does not divide width={self.width}")
        if self.name is not None and not re.fullmatch(r"[\w.+-]+", self.name):
            raise ConfigError(f"{WHERE}: name={self.name}: use letters, digits, and . + - _")


def parse_sizes(value: Any) -> tuple[ListedSize, ...]:
    """The sizes of a config's list.

    Raises:
        ConfigError: it is no list of sizes, or one of them stands twice.
    """
    if not isinstance(value, list | tuple) or not value or not all(isinstance(entry, Mapping) for entry in value):
        raise ConfigError(f"{WHERE}={value}: expected a list, such as [{{width:512,depth:8}},{{width:1024,depth:8}}]")
    sizes = tuple(to_dataclass(ListedSize, with_whole_numbers(ListedSize, entry), WHERE) for entry in value)
    shapes = [(size.width, size.depth) for size in sizes]
    names = [size.name for size in sizes if size.name is not None]
    if len({*shapes}) < len(shapes) or len({*names}) < len(names):
        raise ConfigError(f"{WHERE}: every width and depth once, and every name once")
    return sizes


def base_shape(sizes: Sequence[ListedSize]) -> dict[str, int | None]:
    """The keys of the model that make the first size the base, and give every other one its heads.

    Raises:
        ConfigError: neither the number of heads nor their dimension is the same for all sizes.
    """
    base: dict[str, int | None] = {"width": sizes[0].width, "depth": sizes[0].depth}
    heads = [size.heads for size in sizes if size.heads is not None]
    if not heads:
        return base
    if len(heads) < len(sizes):
        raise ConfigError(f"{WHERE}: give heads for every size or for none")
    dims = {size.width // (size.heads or 1) for size in sizes}
    if len(dims) == 1:
        return {**base, "head_dim": dims.pop(), "heads": None}
    if len({*heads}) == 1:
        return {**base, "heads": heads[0]}
    pairs = ", ".join(f"{size.heads} at width {size.width}" for size in sizes)
    raise ConfigError(
        f"{WHERE}: heads are {pairs}; rules know ladders of one number of heads, or of one width / heads: keep either"
    )


def refuse_ratios(overrides: Sequence[str]) -> None:
    """Refuse words that give ratios or another base beside a list of sizes."""
    for word in overrides:
        key = word.partition("=")[0]
        if key in RATIO_KEYS:
            raise ConfigError(f"{WHERE} and {key} both say which sizes there are: give one of them")
        if key in BASE_KEYS:
            raise ConfigError(f"{key}: the first of {WHERE} is the base, so say it there")
