"""The workers of a launcher on this machine: those that die are replaced, and all are stopped together."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from mupsweep.atomic_files import make_folder
from mupsweep.errors import RecordError
from mupsweep.launchers.worker_pool import POLL_SECONDS, WorkerPool
from mupsweep.report.terminal.progress import Progress
from mupsweep.store.lease import MAX_WORKER_DEATHS
from mupsweep.store.run_dir import FAILED, RUNNING
from mupsweep.training.signals import STOPPED, exit_reason


@dataclass
class LocalPool(WorkerPool):
    """Workers that share some runs of a sweep; a run that kills too many of them has failed.

    Attributes:
        run_ids: the runs to train.
        deaths: how many workers each run has killed.
        idle_deaths: how many workers died in a row before they took a run.
        retired: slots whose worker ended with an error, such as a GPU that is gone.
        looks_again: whether a worker has to look for what such a slot has left.
    """

    run_ids: Sequence[str] = ()
    deaths: dict[str, int] = field(default_factory=dict)
    idle_deaths: int = 0
    retired: set[int] = field(default_factory=set)
    looks_again: bool = False

    def train(self, progress: Progress) -> bool:
        """Start the workers and wait for them; return False if they were stopped."""
        try:
            self.start()
            while self.is_alive():
                polled = time.process_time()
                progress.refresh()
                # A poll over many open runs takes a while itself: never spend more than a tenth of the time on it.
                time.sleep(max(POLL_SECONDS, 9 * (time.process_time() - polled)))
        except KeyboardInterrupt:
            print(
                "stopping: each run finishes its step and is checkpointed; Ctrl-C again to stop at once",
                file=sys.stderr,
            )
            return False
        finally:
            self.stop()
        return not any(worker.returncode == STOPPED for worker in self.workers)

    def start(self) -> None:
        """Start a worker per slot, but no more than there are runs."""
        make_folder(self.sweep.logs)
        self.slots = self.slots[: max(1, len(self.run_ids))]
        super().start()

    def output(self, index: int) -> IO[bytes]:
        """Open the log of a slot's workers."""
        return self.log_path(index).open("ab")

    def is_alive(self) -> bool:
        """Return whether any worker still works, after replacing those that died.

        Raises:
            RecordError: every slot's worker ended with an error, or too many died before they took a run.
        """
        codes = {i: worker.poll() for i, worker in enumerate(self.workers) if i not in self.retired}
        for index, code in codes.items():
            if code in (None, 0, STOPPED):
                continue
            self.idle_deaths = 0 if self.record_death(self.workers[index].pid, code) else self.idle_deaths + 1
            if self.idle_deaths > MAX_WORKER_DEATHS * len(self.slots):
                raise RecordError(self.last_words(index, code))
            if code > 0:
                self.retire(index, code)
            else:
                self.spawn(index)
        if self.looks_again and set(codes.values()) == {0}:
            # The others may have passed the run that a retired slot has left.
            self.looks_again = False
            self.spawn(next(iter(codes)))
            return True
        return any(code not in (0, STOPPED) for code in codes.values())

    def retire(self, index: int, code: int) -> None:
        """Start no more workers on a slot.

        Raises:
            RecordError: it was the last slot.
        """
        self.retired.add(index)
        if len(self.retired) == len(self.slots):
            raise RecordError(self.last_words(index, code))
        self.looks_again = True
        print(f"{self.last_words(index, code)}; going on without {self.slots[index]}", file=sys.stderr)

    def record_death(self, pid: int, code: int) -> bool:
        """Count a worker's death against the run that it held and return whether it held one.

        A run that killed MAX_WORKER_DEATHS workers has failed.
        """
        held_a_run = False
        for folder in (self.sweep.run(run_id) for run_id in self.run_ids):
            if folder.status()["status"] != RUNNING or not folder.is_owned_by(pid):
                continue
            held_a_run = True
            self.deaths[folder.run_id] = self.deaths.get(folder.run_id, 0) + 1
            if self.deaths[folder.run_id] >= MAX_WORKER_DEATHS:
                hint = ""
                if code == -signal.SIGKILL:  # as the kernel does where memory runs out
                    hint = "; out of memory? lower launcher.slots_per_device or training.batch_size"
                reason = f"its worker died {MAX_WORKER_DEATHS} times ({exit_reason(code)}){hint}"
                folder.write_status(FAILED, error=reason)
        return held_a_run

    def last_words(self, index: int, code: int) -> str:
        """Return how a slot's worker ended, and what it said."""
        return f"a worker ended with {exit_reason(code)}: {self.log_tail(index)}"

    def log_path(self, index: int) -> Path:
        """Return where the workers of a slot print to."""
        return self.sweep.logs / f"worker-{index}.log"

    def log_tail(self, index: int) -> str:
        """Return the last line of a dead worker's log, and where the log is."""
        path = self.log_path(index)
        lines = path.read_text(errors="replace").strip().splitlines()
        free = shutil.disk_usage(path).free
        return f"{lines[-1] if lines else f'no output, with {free} bytes left on the disk'} (see {path})"

    def stop(self) -> None:
        """Ask every worker that still works to checkpoint and end, and wait; a second Ctrl-C kills them."""
        try:
            self.signal(signal.SIGINT)
            for worker in self.workers:
                worker.wait()
        except KeyboardInterrupt:
            self.signal(signal.SIGKILL)
