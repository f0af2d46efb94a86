"""The supervisor of worker processes: it starts one per slot, replaces those that die and stops them all together."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mupsweep.atomic_files import make_folder
from mupsweep.errors import RecordError
from mupsweep.report.terminal.progress import Progress
from mupsweep.store.lease import MAX_WORKER_DEATHS
from mupsweep.store.run_dir import FAILED, RUNNING
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.training import signals
from mupsweep.training.signals import defer_signals

POLL_SECONDS = 0.3
STOPPED = 130  # exit code of a worker that a signal asked to stop


@dataclass
class WorkerPool:
    """The worker processes that train some runs of a sweep.

    Attributes:
        sweep: the sweep of the runs.
        run_ids: the runs to train.
        slots: the device of every worker, or its devices separated by commas.
        threads: CPU threads of each device's process.
        shard: whether the devices of a worker divide the weights, gradients and optimizer state of its run.
        sizes: the sizes of the runs, where workers leave the runs of other sizes alone.
        workers: the process of every slot.
        deaths: how many workers each run has killed.
        idle_deaths: how many workers died in a row before they took a run.
    """

    sweep: SweepDir
    run_ids: Sequence[str]
    slots: Sequence[str]
    threads: int = 1
    shard: bool = False
    sizes: Sequence[str] = ()
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    deaths: dict[str, int] = field(default_factory=dict)
    idle_deaths: int = 0

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
        for index in range(len(self.slots)):
            self.spawn(index)

    def spawn(self, index: int) -> None:
        """Start a worker on a slot, the first or a replacement; what it prints goes to logs/."""
        threads = str(self.threads)
        command = [sys.executable, "-m", "mupsweep", "worker", str(self.sweep.path), *self.sizes]
        command += ["--device", self.slots[index], "--threads", threads, *["--shard"] * self.shard]
        command += ["--allow-imports"] * self.sweep.allow_imports
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        # A signal waits until the worker is in the list, from which it can be stopped.
        with self.log_path(index).open("ab") as output, defer_signals():
            self.workers[index : index + 1] = [signals.start(command, environment, output)]

    def is_alive(self) -> bool:
        """Return whether any worker still works, after replacing those that died.

        Raises:
            RecordError: a worker ended with an error, or too many died before they took a run.
        """
        codes = [worker.poll() for worker in self.workers]
        for index, (worker, code) in enumerate(zip(self.workers, codes, strict=True)):
            if code in (None, 0, STOPPED):
                continue
            self.idle_deaths = 0 if self.record_death(worker.pid, code) else self.idle_deaths + 1
            if self.idle_deaths > MAX_WORKER_DEATHS * len(self.slots) or code > 0:
                raise RecordError(f"a worker ended with {exit_reason(code)}: {self.log_tail(index)}")
            self.spawn(index)
        return any(code not in (0, STOPPED) for code in codes)

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

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every worker that still works."""
        for worker in self.workers:
            with contextlib.suppress(ProcessLookupError):
                worker.send_signal(number)


def exit_reason(code: int) -> str:
    """Return how a process ended: the signal that killed it, or its exit code."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
