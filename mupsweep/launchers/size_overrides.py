"""Overrides by size: `launcher.sizes` gives keys of a launcher other values for the sizes that it names."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from mupsweep.errors import ConfigError
from mupsweep.schema import to_dataclass

L = TypeVar("L")

WHERE = "launcher.sizes"
COMMON_KEYS = ("name", "sizes", "analysis_options")  # a size cannot have its own


def check(launcher: Any) -> None:
    """Refuse overrides of keys or values that the launcher does not take.

    Raises:
        ConfigError: naming the size and the key.
    """
    if launcher.sizes is None:
        return
    if not isinstance(launcher.sizes, dict) or not all(isinstance(v, dict) for v in launcher.sizes.values()):
        raise ConfigError(
            f"{WHERE}={launcher.sizes}: expected keys for sizes, such as {{w512-d4:{{devices_per_run:2}}}}"
        )
    for size, values in launcher.sizes.items():
        if shared := [key for key in COMMON_KEYS if key in values]:
            raise ConfigError(f"{WHERE}.{size}.{shared[0]}: it is the same for all sizes; set launcher.{shared[0]}")
        for_size(launcher, size)


def for_size(launcher: L, size: str) -> L:
    """Return the launcher with the overrides of a size."""
    values = (launcher.sizes or {}).get(size)  # type: ignore[attr-defined]
    if not values:
        return launcher
    common = {f.name: getattr(launcher, f.name) for f in fields(launcher) if f.name != "sizes"}  # type: ignore[arg-type]
    try:
        return to_dataclass(type(launcher), {**common, **values}, f"{WHERE}.{size}")
    except ConfigError as error:
        if str(error).startswith(("unknown key", WHERE)):
            raise
        raise ConfigError(f"{WHERE}.{size}: {error}") from error
