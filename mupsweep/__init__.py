"""mupsweep: pick the learning rate of a model you cannot afford to sweep, and know how far to trust it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mupsweep.recipes.param_groups import param_groups
    from mupsweep.report.notebook import load
    from mupsweep.sweep.ask import Search, Size, ask, tell

__all__ = ["Search", "Size", "__version__", "ask", "load", "param_groups", "tell"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Public functions are imported when they are asked for, so that no command waits for what it does not use."""
    if name == "param_groups":
        from mupsweep.recipes.param_groups import param_groups

        return param_groups
    if name == "load":
        from mupsweep.report.notebook import load

        return load
    if name in ("Search", "Size", "ask", "tell"):
        from mupsweep.sweep import ask as asking

        return getattr(asking, name)
    raise AttributeError(f"module 'mupsweep' has no attribute {name!r}")
