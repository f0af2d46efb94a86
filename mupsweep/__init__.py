"""mupsweep: pick the learning rate of a model you cannot afford to sweep, and know how far to trust it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mupsweep.recipes.param_groups import param_groups
    from mupsweep.report.notebook import load

__all__ = ["__version__", "load", "param_groups"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Public functions are imported when they are asked for, so that no command waits for what it does not use."""
    if name == "param_groups":
        from mupsweep.recipes.param_groups import param_groups

        return param_groups
    if name == "load":
        from mupsweep.report.notebook import load

        return load
    raise AttributeError(f"module 'mupsweep' has no attribute {name!r}")
