"""Launchers decide where runs are trained, and nothing else: one file and one yaml each.

A launcher starts workers on a sweep folder and waits for them, or has a scheduler do so. Each worker acquires the lease
of a run before it trains it, so a launcher needs to know nothing of training, and two launchers on one sweep do no
harm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from mupsweep.schema import require
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.training.signals import MOST_THREADS

SLOTS = ("slots_per_device", "workers", "devices_per_run", "gpus")
MOST_SLOTS = 1024  # of one device or task; each is a process


class Launcher(Protocol):
    """Where runs are trained: a dataclass whose fields are the keys of its yaml."""

    @property
    def name(self) -> str: ...

    def launch(self, sweep: SweepDir, run_ids: Sequence[str]) -> bool:
        """Train the named runs, longest first; return False if the user stopped it. Finished runs are recorded."""
        ...


@runtime_checkable
class Detached(Launcher, Protocol):
    """A launcher that hands the runs, and the analysis after them, to a scheduler and does not wait for either."""

    def preview(self, sweep: SweepDir, run_ids: Sequence[str]) -> None:
        """Write and print the scripts that `launch` would submit."""
        ...


def check_counts(launcher: Any, *keys: str, least: int = 1) -> None:
    """Refuse counts below `least`, and more threads than a process or processes than a machine may have.

    Raises:
        ConfigError: naming the key.
    """
    for key in keys:
        value: int | None = getattr(launcher, key)
        if value is not None:
            require(value >= least, f"launcher.{key}", value, f"at least {least}")
            require(key not in SLOTS or value <= MOST_SLOTS, f"launcher.{key}", value, f"at most {MOST_SLOTS}")
            require(key != "threads" or value <= MOST_THREADS, f"launcher.{key}", value, f"at most {MOST_THREADS}")
