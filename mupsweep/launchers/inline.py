"""Runs one after the other in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mupsweep.launchers import check_counts
from mupsweep.report.terminal.progress import Progress
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.training.signals import StopSignal, interrupt_on_stop


@dataclass(frozen=True)
class Inline:
    """One run after the other in this process, for debugging.

    Attributes:
        name: of the launcher.
        device: a torch device, or "auto".
        threads: CPU threads.
    """

    name: str = "inline"
    device: str = "auto"
    threads: int = 1

    def __post_init__(self) -> None:
        check_counts(self, "threads")

    def launch(self, sweep: SweepDir, run_ids: Sequence[str]) -> bool:
        """Train the runs one after the other; return False if the user stopped it."""
        from mupsweep.training.slot import Slot
        from mupsweep.training.worker import execute

        stop = StopSignal.install()
        try:
            with Progress(sweep) as progress:
                all_taken = execute(sweep, Slot(run_ids, self.device, self.threads), progress.refresh, stop)
            return all_taken and not stop.signalled
        finally:
            interrupt_on_stop()  # nothing reads the flag from here on
