"""All devices of this machine: a persistent worker process per slot, each taking the longest run that is left."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mupsweep.atomic_files import make_folder
from mupsweep.errors import ConfigError, RecordError
from mupsweep.formatting import si
from mupsweep.launchers import check_counts, size_overrides
from mupsweep.report.terminal.progress import Progress
from mupsweep.store.environment import cores, device_memory, find_devices
from mupsweep.store.lease import MAX_WORKER_DEATHS
from mupsweep.store.run_dir import FAILED, RUNNING
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.training import signals
from mupsweep.training.signals import defer_signals, interrupt_on_stop

POLL_SECONDS = 0.3
USABLE = 0.8  # of a device's memory, as far as estimates go


@dataclass(frozen=True)
class Local:
    """Worker processes on the devices of this machine.

    Attributes:
        devices: torch devices; "auto" finds them.
        slots_per_device: workers per device; None is one per accelerator, and cores / threads on a CPU.
        devices_per_run: how many train a run together, each its share of every batch.
        shard: divide the weights, gradients and optimizer state of a run among its devices.
        threads: CPU threads per device's process.
        device_memory: GB of a device; None asks CUDA devices. Runs that need more are sharded over several.
        sizes: other values of these keys for some sizes, by the size's name; the widest groups of devices come first.
    """

    name: str = "local"
    devices: Any = "auto"
    slots_per_device: int | None = None
    devices_per_run: int = 1
    shard: bool = False
    threads: int = 1
    device_memory: float | None = None
    sizes: Any = None

    def __post_init__(self) -> None:
        if not self._named() or not all(isinstance(d, str) and d.strip() and "," not in d for d in self._named()):
            raise ConfigError(f"launcher.devices={self.devices}: expected auto or a list, such as [cuda:0,cuda:1]")
        check_counts(self, "slots_per_device", "devices_per_run", "threads")
        if self.device_memory is not None and self.device_memory <= 0:
            raise ConfigError(f"launcher.device_memory={self.device_memory:g}: expected more than 0 GB")
        if self.shard and self.devices_per_run == 1:
            raise ConfigError("launcher.shard=true: expected launcher.devices_per_run to be at least 2")
        size_overrides.check(self)

    def launch(self, sweep: SweepDir, run_ids: Sequence[str]) -> bool:
        pools = self.pools(sweep, run_ids)
        interrupt_on_stop()  # the workers must not outlive us
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
        made = size_overrides.for_size(self, size.name)
        if memory is None or made.devices_per_run > 1:
            return made
        recipes = {run.resolved.digest: run.resolved for run in runs}.values()
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
        return find_devices() if self.devices == "auto" else self._named()

    def _named(self) -> list[Any]:
        """What `devices` says; a word is a list of one."""
        return list(self.devices) if isinstance(self.devices, list | tuple) else [self.devices]

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
    idle_deaths: int = 0  # of workers without a run, one after the other

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
        for index in range(len(self.slots)):
            self.spawn(index)

    def spawn(self, index: int) -> None:
        """Start a worker on slot `index`, or another in its place; what it prints goes to logs/."""
        count = str(self.launcher.threads)
        command = [sys.executable, "-m", "mupsweep", "worker", str(self.sweep.path), *self.sizes]
        command += ["--device", self.slots[index], "--threads", count, *["--shard"] * self.launcher.shard]
        environment = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
        with (self.sweep.logs / f"worker-{index}.log").open("ab") as output, defer_signals():  # until it can be stopped
            self.workers[index : index + 1] = [signals.start(command, environment, output)]

    def is_alive(self) -> bool:
        """Whether any worker still works; one that died is replaced while runs are left."""
        codes = [worker.poll() for worker in self.workers]
        for index, (worker, code) in enumerate(zip(self.workers, codes, strict=True)):
            if code in (None, 0, STOPPED):
                continue
            # workers that die without a run would be replaced forever: a slot is given as many as a run
            self.idle_deaths = 0 if self.record_death(worker.pid, code) else self.idle_deaths + 1
            if self.idle_deaths > MAX_WORKER_DEATHS * len(self.slots) or code > 0:
                raise RecordError(f"a worker ended with {ending(code)}: {self.last_words(index)}")
            self.spawn(index)
        return any(code not in (0, STOPPED) for code in codes)

    def record_death(self, pid: int, code: int) -> bool:
        """Count a worker's death against the run that it held, if any; a run that keeps killing workers has failed."""
        held = False
        for folder in (self.sweep.run(run_id) for run_id in self.run_ids):
            if folder.status()["status"] == RUNNING and folder.is_owned_by(pid):
                held = True
                self.deaths[folder.run_id] = self.deaths.get(folder.run_id, 0) + 1
                if self.deaths[folder.run_id] >= MAX_WORKER_DEATHS:
                    hint = (
                        "; out of memory? lower launcher.slots_per_device or training.batch_size" if code == -9 else ""
                    )
                    folder.write_status(
                        FAILED, error=f"its worker died {MAX_WORKER_DEATHS} times ({ending(code)}){hint}"
                    )
        return held

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


def ending(code: int) -> str:
    """How a process ended, in words."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


STOPPED = 130  # a worker's exit code when a signal asked it to stop
