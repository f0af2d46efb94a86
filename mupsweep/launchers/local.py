"""All devices of this machine: a persistent worker process per slot, which takes the longest open run each time."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mupsweep.errors import ConfigError
from mupsweep.formatting import si
from mupsweep.launchers import check_counts, size_overrides
from mupsweep.launchers.local_pool import LocalPool
from mupsweep.report.terminal.progress import Progress
from mupsweep.store.environment import cores, device_memory, find_devices
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.training.signals import interrupt_on_stop

USABLE_MEMORY = 0.8  # the share of a device's memory that estimates may fill


@dataclass(frozen=True)
class Local:
    """Worker processes on the devices of this machine.

    Attributes:
        name: of the launcher.
        devices: torch devices; "auto" finds them.
        slots_per_device: workers per device; None is one per accelerator, and cores / threads on a CPU.
        devices_per_run: how many devices train a run together, each its share of every batch.
        shard: whether those devices divide the weights, gradients and optimizer state of the run.
        threads: CPU threads of each device's process.
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
        names = self._named()
        if not names or not all(isinstance(name, str) and name.strip() and "," not in name for name in names):
            raise ConfigError(f"launcher.devices={self.devices}: expected auto or a list, such as [cuda:0,cuda:1]")
        check_counts(self, "slots_per_device", "devices_per_run", "threads")
        if self.device_memory is not None and self.device_memory <= 0:
            raise ConfigError(f"launcher.device_memory={self.device_memory:g}: expected more than 0 GB")
        if self.shard and self.devices_per_run == 1:
            raise ConfigError("launcher.shard=true: expected launcher.devices_per_run to be at least 2")
        size_overrides.check(self)

    def launch(self, sweep: SweepDir, run_ids: Sequence[str]) -> bool:
        """Train the runs by workers and wait for them; return False if the user stopped it."""
        pools = self.pools(sweep, run_ids)
        interrupt_on_stop()  # the workers must not outlive this process
        with Progress(sweep) as progress:
            return all(pool.train(progress) for pool in pools)

    def pools(self, sweep: SweepDir, run_ids: Sequence[str]) -> list[LocalPool]:
        """Return the workers of all runs: one pool, or where sizes need different workers one pool after the other."""
        memory = self._device_memory()
        if not self.sizes and memory is None:
            return [LocalPool(sweep, self.slots(), (), self.threads, self.shard, run_ids=run_ids)]
        requested = set(run_ids)
        runs_of_size = defaultdict[str, list[RunSpec]](list)
        for run in plan.load(sweep):
            if run.run_id in requested:
                runs_of_size[run.size.name].append(run)

        # Sizes that need the same workers share a pool, so that no device waits for the last run of a size.
        groups: list[tuple[Local, list[str]]] = []
        for size, runs in runs_of_size.items():
            launcher = self.for_runs(runs, memory)
            sharing = next((sizes for other, sizes in groups if other == launcher), None)
            if sharing is None:
                groups.append((launcher, [size]))
            else:
                sharing.append(size)

        pools = []
        for launcher, sizes in sorted(groups, key=lambda group: -group[0].devices_per_run):
            ids = [run.run_id for size in sizes for run in runs_of_size[size]]
            pools.append(LocalPool(sweep, launcher.slots(), sizes, launcher.threads, launcher.shard, run_ids=ids))
        return pools

    def for_runs(self, runs: Sequence[RunSpec], memory: float | None = None) -> Local:
        """Return the launcher for the runs of one size; those too large for a device are sharded over several.

        Args:
            runs: of one size.
            memory: bytes of a device, where that is a limit.
        """
        size = runs[0].size
        launcher = size_overrides.for_size(self, size.name)
        if memory is None or launcher.devices_per_run > 1 or runs[0].resolved.trainer.runs_program:
            return launcher
        variants = {run.resolved.digest: run.resolved for run in runs}.values()

        # Groups of devices must divide all devices, and every batch evenly.
        n_devices = len(self.device_names())
        widths = []
        for width in range(1, n_devices + 1):
            if n_devices % width == 0 and all(variant.training.batch_size % width == 0 for variant in variants):
                widths.append(width)

        # The narrowest group that has the memory is taken, or the widest where none has.
        needed = {width: max(variant.least_memory(size, width) for variant in variants) for width in widths}
        memory /= launcher.slots_per_device or 1
        width = next((width for width in widths if needed[width] <= USABLE_MEMORY * memory), widths[-1])
        if width == 1:
            return launcher
        print(
            f"{size.name}: roughly {si(needed[1])}B at least and {si(memory)}B of a device: {width} share each run",
            file=sys.stderr,
        )
        return replace(launcher, devices_per_run=width, shard=True)

    def device_names(self) -> list[str]:
        """Return the devices to use."""
        return find_devices() if self.devices == "auto" else self._named()

    def _named(self) -> list[Any]:
        """Return `devices` as a list, also where it is a single name."""
        return list(self.devices) if isinstance(self.devices, list | tuple) else [self.devices]

    def slots(self) -> list[str]:
        """Return the device of every worker, or its devices separated by commas."""
        devices, width = self.device_names(), self.devices_per_run
        if "cpu" in devices:  # a CPU has as many ranks as there are threads for
            return [",".join([device] * width) for device in devices for _ in range(self._n_slots(device))]
        if len(devices) % width:
            raise ConfigError(
                f"launcher.devices_per_run={width}: the {len(devices)} devices ({', '.join(devices)}) do not divide "
                "so; choose another number, or name those to use in launcher.devices"
            )
        groups = [",".join(devices[i : i + width]) for i in range(0, len(devices), width)]
        return [group for group in groups for _ in range(self._n_slots(group))]

    def _device_memory(self) -> float | None:
        """Return the bytes of a device; None where runs need not be sharded over several."""
        if self.device_memory is not None:
            return 1e9 * self.device_memory
        devices = self.device_names()
        return device_memory() if len(devices) > 1 and devices[0].startswith("cuda") else None

    def _n_slots(self, device: str) -> int:
        """Return the number of workers on a device or a group of devices."""
        if self.slots_per_device is not None:
            return self.slots_per_device
        return max(1, cores() // (self.threads * self.devices_per_run)) if device == "cpu" else 1
