"""What planning needs to know of the trainer of a sweep's runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from mupsweep.sweep.run_spec import RunSpec


class PlannedTrainer(Protocol):
    """What trains the runs of a variant: a dataclass under `trainers/`, whose fields are the keys of its yaml."""

    @property
    def name(self) -> str: ...

    @property
    def runs_program(self) -> bool:
        """Whether a program of the user's trains, which reads a corpus and spends time and memory of its own."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """Return the keys that decide what a run computes, beside the other sections of its variant."""
        ...

    def check(self, runs: Iterable[RunSpec]) -> None:
        """Refuse, before anything is trained, runs of a variant that the trainer could not start.

        Raises:
            ConfigError: what is wrong with the config.
        """
        ...
