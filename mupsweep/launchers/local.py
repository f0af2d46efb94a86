"""All devices of this machine: a persistent worker process per slot, each taking the longest run that is left."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mupsweep import plan
from mupsweep.cost import si
from mupsweep.environment import cores, device_memory, find_devices
from mupsweep.errors import ConfigError, RecordError
from mupsweep.files import make_folder
from mupsweep.launchers import by_size
from mupsweep.launchers.progress import Progress
from mupsweep.plan import RunSpec
from mupsweep.records import FAILED, RUNNING, SweepDir

POLL_SECONDS = 0.3
USABLE = 0.8  # of a device's memory, as far as estimates go
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
        device_memory: GB of a device; None asks CUDA devices. Runs that need more are sharded over several.
        sizes: other values of these keys for some sizes, by the size's name; the widest groups of devices come first.
    """

    name: str = "local"
    devices: str = "auto"
    slots_per_device: int | None = None
    devices_per_run: int = 1
    shard: bool = False
    threads: int = 1
    device_memory: float | None = None
    sizes: Any = None

    def __post_init__(self) -> None:
        for key in ("slots_per_device", "devices_per_run", "threads"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"launcher.{key}={value}: expected at least 1")
        if self.device_memory is not None and self.device_memory <= 0:
            raise ConfigError(f"launcher.device_memory={self.device_memory:g}: expected more than 0 GB")
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
        memory = self._device_memory()
        if not self.sizes and memory is None:
            return [Pool(sweep, run_ids, self, self.slots())]
        wanted, sizes = set(run_ids), defaultdict[str, list[RunSpec]](list)
        for run in plan.load(sweep):
            if run.run_id in wanted:
                sizes[run.size.name].append(run)
        alike: list[tuple[Local, list[str]]] = []
        for size, runs in sizes.items():
            mine = self.for_runs(runs, memory)
            found = next((names for other, names in alike if other == mine), None)
            if found is None:
                alike.append((mine, [size]))
            else:
                found.append(size)
        alike.sort(key=lambda entry: -entry[0].devices_per_run)
        return [
            Pool(sweep, [run.run_id for name in names for run in sizes[name]], made, made.slots(), names)
            for made, names in alike
        ]

    def for_runs(self, runs: Sequence[RunSpec], memory: float | None = None) -> Local:
        """The launcher that the runs of one size are given to; what does not fit on a device is divided among several.

        Args:
            memory: bytes of a device, where that is a limit.
        """
        size = runs[0].size
        made = by_size.for_size(self, size.name)
        if memory is None or made.devices_per_run > 1:
            return made
        recipes = {run.recipe.digest: run.recipe for run in runs}.values()
        there = len(self.found())
        shared = [n for n in range(1, there + 1) if not (there % n or any(r.training.batch_size % n for r in recipes))]
        least = {n: max(recipe.least_memory(size, n) for recipe in recipes) for n in shared}
        width = next((n for n in shared if least[n] <= USABLE * memory), shared[-1])
        if width == 1:
            return made
        need, room = f"{si(least[1])}B", f"{si(memory)}B"
        print(f"{size.name}: roughly {need} at least and {room} on a device: {width} share each run", file=sys.stderr)
        return replace(made, devices_per_run=width, shard=True)

    def found(self) -> list[str]:
        """The devices to use."""
        found = find_devices() if self.devices == "auto" else [d.strip() for d in self.devices.split(",") if d.strip()]
        if not found:
            raise ConfigError(f"launcher.devices={self.devices}: expected auto or a list such as cuda:0,cuda:1")
        return found

    def slots(self) -> list[str]:
        """The device of every worker, or its devices separated by commas."""
        found, width = self.found(), self.devices_per_run
        if "cpu" in found:  # as many ranks as there are threads for
            return [",".join([d] * width) for d in found for _ in range(self._slots(d))]
        if len(found) % width:
            raise ConfigError(
                f"launcher.devices_per_run={width}: the {len(found)} devices ({', '.join(found)}) do not divide so; "
                "choose another number, or name those to use in launcher.devices"
            )
        groups = [",".join(found[i : i + width]) for i in range(0, len(found), width)]
        return [group for group in groups for _ in range(self._slots(group))]

    def _device_memory(self) -> float | None:
        """Bytes of a device; None where runs need not be divided among several."""
        if self.device_memory is not None:
            return 1e9 * self.device_memory
        several = len(self.found()) > 1 and self.found()[0].startswith("cuda")
        return device_memory() if several else None

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
