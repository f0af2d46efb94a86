"""mupsweep's own trainer: the models and optimizers of the config, trained in the worker's process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mupsweep.store.sweep_dir import SweepDir
    from mupsweep.sweep.run_spec import RunSpec
    from mupsweep.training.signals import StopSignal
    from mupsweep.training.slot import Slot
    from mupsweep.training.worker import Session


@dataclass(frozen=True)
class Mupsweep:
    """The training loop of mupsweep (mupsweep/training/trainer.py)."""

    name: str = "mupsweep"

    @property
    def runs_program(self) -> bool:
        return False

    def identity(self) -> Mapping[str, Any]:
        return {}

    def check(self, runs: Iterable[RunSpec]) -> None:
        pass

    def work(self, sweep: SweepDir, slot: Slot, stop: StopSignal, take_runs: Callable[[Session], bool]) -> bool:
        from mupsweep.training.session import work  # late, since torch takes seconds

        return work(sweep, slot, stop, take_runs)
