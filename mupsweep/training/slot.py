"""Where a worker trains, and the command line that starts one there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from mupsweep.store.sweep_dir import SweepDir


@dataclass(frozen=True)
class Slot:
    """Where a worker trains.

    Attributes:
        run_ids: the runs to train, or names of sizes whose runs to train; all runs where empty.
        device: a torch device, "auto", or several separated by commas, which train every run together. Where torchrun
            started the worker and others, the device of each on this machine, or one name for all.
        threads: CPU threads of every process.
        shard: whether several devices divide weights, gradients and optimizer state.
        workers: how many workers share the device, each of which may take an equal part of its memory.
    """

    run_ids: Sequence[str] = ()
    device: str = "auto"
    threads: int = 1
    shard: bool = False
    workers: int = 1

    def command(self, sweep: SweepDir) -> list[str]:
        """Return the command line of a worker that trains here."""
        command = [sys.executable, "-m", "mupsweep", "worker", str(sweep.path), *self.run_ids]
        command += ["--device", self.device, "--threads", str(self.threads), *["--shard"] * self.shard]
        command += ["--workers", str(self.workers)] * (self.workers > 1)
        return command + ["--allow-imports"] * bool(sweep.allow_imports)
