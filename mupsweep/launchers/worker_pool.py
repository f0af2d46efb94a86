"""Worker processes of one machine, one per slot: their command line, how they start and how they are signalled.

When to replace a dead worker is decided by the pools that extend this one: a launcher's (`local_pool`), which knows the
runs, and that of a job's task (`task_pool`), whose machine may be at fault.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from mupsweep.store.sweep_dir import SweepDir
from mupsweep.training import signals
from mupsweep.training.signals import defer_signals
from mupsweep.training.slot import Slot

POLL_SECONDS = 0.3


@dataclass
class WorkerPool:
    """Processes that train runs of a sweep.

    Attributes:
        sweep: the sweep of the runs.
        slots: the device of every worker, or its devices separated by commas.
        names: ids of the runs to train, or names of their sizes; all runs where empty.
        threads: CPU threads of each device's process.
        shard: whether the devices of a worker divide the weights, gradients and optimizer state of its run.
        workers: the process of every slot.
    """

    sweep: SweepDir
    slots: Sequence[str]
    names: Sequence[str] = ()
    threads: int = 1
    shard: bool = False
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        """Start a worker per slot."""
        for index in range(len(self.slots)):
            self.spawn(index)

    def spawn(self, index: int) -> None:
        """Start a worker on a slot, the first or a replacement."""
        environment = {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        # A signal waits until the worker is in the list, from which it can be stopped.
        with self.output(index) as output, defer_signals():
            self.workers[index : index + 1] = [signals.start(self.command(index), environment, output)]

    def command(self, index: int) -> list[str]:
        """Return the command line of a slot's worker."""
        device = self.slots[index]
        workers = self.slots.count(device) if device.startswith("cuda") else 1
        return Slot(self.names, device, self.threads, self.shard, workers).command(self.sweep)

    def output(self, index: int) -> contextlib.AbstractContextManager[IO[Any] | None]:
        """Open what a slot's workers print to; None is where this process prints."""
        return contextlib.nullcontext()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every worker that still works."""
        for worker in self.workers:
            with contextlib.suppress(ProcessLookupError):
                worker.send_signal(number)
