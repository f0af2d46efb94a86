"""All devices of this machine: a persistent worker process per slot, each taking the longest run that is left."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mupsweep.environment import cores, find_devices
from mupsweep.errors import ConfigError, RecordError
from mupsweep.files import make_folder
from mupsweep.launchers import by_size
from mupsweep.launchers.progress import Progress
from mupsweep.records import FAILED, RUNNING, SweepDir
from mupsweep.sizes import size_name

POLL_SECONDS = 0.3
DEATHS = 2  # a run that kills its worker this often is recorded as failed
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Local:
    """Worker processes on the devices of this machine.

    Attributes:
        devices: "auto" finds them, or torch devices separated by commas: "cuda:0,cuda:1".
        slots_per_device: workers per device; None is one per accelerator, and cores / threads on a CPU.
        devices_per_run: how many train a run together, each its share of every batch.
        shard: divide the weights, gradients and optimizer state of a run among its devices.
        threads: CPU threads per device's process.
        sizes: other values of these keys for some sizes, by the size's name; the widest groups of devices come first.
    """

    name: str = "local"
    devices: str = "auto"
    slots_per_device: int | None = None
    devices_per_run: int = 1
    shard: bool = False
    threads: int = 1
    sizes: Any = None

    def __post_init__(self) -> None:
        for key in ("slots_per_device", "devices_per_run", "threads"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"launcher.{key}={value}: expected at least 1")
        if self.shard and self.devices_per_run == 1:
            raise ConfigError("launcher.shard=true: expected launcher.devices_per_run to be at least 2")
        by_size.check(self)

    def launch(self, sweep: SweepDir, run_ids: Sequence[str]) -> bool:
        pools = self.pools(sweep, run_ids)
        for number in STOPS:  # as Ctrl-C: the workers must not outlive us
            signal.signal(number, signal.default_int_handler)
        with Progress(sweep) as progress:
            return all(pool.train(progress) for pool in pools)

    def pools(self, sweep: SweepDir, run_ids: Sequence[str]) -> list[Pool]:
        """Workers for all runs, or one set of workers after the other where sizes want different ones."""
        if not self.sizes:
            return [Pool(sweep, run_ids, self, self.slots())]
        wanted, sizes = set(run_ids), dict[str, list[str]]()
        for row in sweep.read_plan():
            if row["run_id"] in wanted:
                sizes.setdefault(size_name(row["width"], row["depth"]), []).append(row["run_id"])
        alike: list[tuple[Local, list[str]]] = []
        for size in sizes:
            mine = by_size.for_size(self, size)
            found = next((names for other, names in alike if other == mine), None)
            if found is None:
                alike.append((mine, [size]))
            else:
                found.append(size)
        alike.sort(key=lambda entry: -entry[0].devices_per_run)
        return [
            Pool(sweep, [run_id for name in names for run_id in sizes[name]], made, made.slots(), names)
            for made, names in alike
        ]

    def slots(self) -> list[str]:
        """The device of every worker, or its devices separated by commas."""
        found = find_devices() if self.devices == "auto" else [d.strip() for d in self.devices.split(",") if d.strip()]
        if not found:
            raise ConfigError(f"launcher.devices={self.devices}: expected auto or a list such as cuda:0,cuda:1")
        width = self.devices_per_run
        if "cpu" in found:  # as many ranks as there are threads for
            return [",".join([d] * width) for d in found for _ in range(self._slots(d))]
        if len(found) % width:
            raise ConfigError(
                f"launcher.devices_per_run={width}: the {len(found)} devices ({', '.join(found)}) do not divide so; "
                "choose another number, or name those to use in launcher.devices"
            )
        groups = [",".join(found[i : i + width]) for i in range(0, len(found), width)]
        return [group for group in groups for _ in range(self._slots(group))]

    def _slots(self, device: str) -> int:
        """Workers on a device or a group of them."""
        spare = max(1, cores() // (self.threads * self.devices_per_run)) if device == "cpu" else 1
        return self.slots_per_device or spare


@dataclass
class Pool:
    """The worker processes of one launch.

    Attributes:
        run_ids: what they train.
        launcher: what they are like.
        slots: the devices of each.
        sizes: the sizes of the runs, where those of others are not to be trained.
    """

    sweep: SweepDir
    run_ids: Sequence[str]
    launcher: Local
    slots: Sequence[str]
    sizes: Sequence[str] = ()
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    deaths: dict[str, int] = field(default_factory=dict)
    respawns: int = 0

    def train(self, progress: Progress) -> bool:
        """Start the workers and wait for them; False if they were stopped."""
        try:
            self.start()
            while self.is_alive():
                polled = time.process_time()
                progress.refresh()
                # a poll over many open runs takes a while itself: never spend more than a tenth of the time on it
                time.sleep(max(POLL_SECONDS, 9 * (time.process_time() - polled)))
        except KeyboardInterrupt:
            print(
                "stopping: each run finishes its step and is checkpointed; Ctrl-C again to stop at once",
                file=sys.stderr,
            )
            return False
        finally:
            self.stop()
        return not self.was_stopped()

    def start(self) -> None:
        make_folder(self.sweep.logs)
        self.slots = self.slots[: max(1, len(self.run_ids))]
        self.workers = [self.spawn(index) for index in range(len(self.slots))]

    def spawn(self, index: int) -> subprocess.Popen[bytes]:
        """A worker on slot `index`; what it prints goes to logs/."""
        count = str(self.launcher.threads)
        command = [sys.executable, "-m", "mupsweep", "worker", str(self.sweep.path), *self.sizes]
        command += ["--device", self.slots[index], "--threads", count, *["--shard"] * self.launcher.shard]
        environment = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
        with (self.sweep.logs / f"worker-{index}.log").open("ab") as output:
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # a worker that starts hears them when it can stop
            try:
                return subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
                )
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)

    def is_alive(self) -> bool:
        """Whether any worker still works; one that died is replaced while runs are left."""
        for index, worker in enumerate(self.workers):
            code = worker.poll()
            if code is None or code in (0, STOPPED):
                continue
            self.blame(worker.pid, code)
            self.respawns += 1
            if self.respawns > DEATHS * len(self.run_ids) + len(self.slots) or code > 0:
                raise RecordError(f"a worker ended with exit code {code}: {self.last_words(index)}")
            self.workers[index] = self.spawn(index)
        return any(worker.poll() is None for worker in self.workers)

    def blame(self, pid: int, code: int) -> None:
        """Count a worker's death against the run that it held; a run that keeps killing workers has failed."""
        for folder in (self.sweep.run(run_id) for run_id in self.run_ids):
            if folder.status()["status"] == RUNNING and folder.is_owned_by(pid):
                self.deaths[folder.run_id] = self.deaths.get(folder.run_id, 0) + 1
                if self.deaths[folder.run_id] >= DEATHS:
                    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                    hint = (
                        "; out of memory? lower launcher.slots_per_device or training.batch_size" if code == -9 else ""
                    )
                    folder.write_status(FAILED, error=f"its worker died {DEATHS} times ({name}){hint}")

    def last_words(self, index: int) -> str:
        """The end of a dead worker's log."""
        path = self.sweep.logs / f"worker-{index}.log"
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
        for worker in self.workers:
            with contextlib.suppress(ProcessLookupError):
                worker.send_signal(number)

    def was_stopped(self) -> bool:
        return any(worker.returncode == STOPPED for worker in self.workers)


STOPPED = 130  # a worker's exit code when a signal asked it to stop
