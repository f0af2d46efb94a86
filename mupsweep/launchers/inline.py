"""Runs one after the other in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mupsweep.errors import ConfigError
from mupsweep.launchers.progress import Progress
from mupsweep.records import SweepDir


@dataclass(frozen=True)
class Inline:
    """One run after the other in this process, for debugging.

    Attributes:
        device: a torch device, or "auto".
        threads: CPU threads.
    """

    name: str = "inline"
    device: str = "auto"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ConfigError(f"launcher.threads={self.threads}: expected at least 1")

    def launch(self, sweep: SweepDir, run_ids: Sequence[str]) -> bool:
        from mupsweep.worker import execute

        with Progress(sweep) as progress:
            return execute(sweep, run_ids, self.device, self.threads, on_finished=progress.refresh)
