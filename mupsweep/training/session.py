"""Runs of mupsweep's own trainer in the process of a worker, alone or as rank 0 of several, and as another rank."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from mupsweep.data import Dataset, prepare
from mupsweep.formatting import si
from mupsweep.store.run_dir import RunDir
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.sweep.settings import run_config
from mupsweep.training.build import Builder, TrainingSetup, group_records
from mupsweep.training.devices import choose_devices, choose_precision, configure, device_name, is_alive
from mupsweep.training.distributed import SINGLE_PROCESS, DistributedContext, launch_ranks, torchrun_env
from mupsweep.training.microbatch import free_memory, is_out_of_memory
from mupsweep.training.signals import StopSignal
from mupsweep.training.slot import Slot
from mupsweep.training.trainer import train
from mupsweep.training.worker import LeaseControl, Session, one_line


@dataclass
class TorchSession:
    """Trains runs on the devices of this process and of its replicas, as rank 0.

    Attributes:
        datasets: the corpus of every variant so far, by its digest.
    """

    device: torch.device
    ranks: DistributedContext = field(default_factory=lambda: SINGLE_PROCESS)
    datasets: dict[str, Dataset] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.builder = Builder(self.device)

    def prepare(self, run: RunSpec) -> None:
        if run.resolved.digest not in self.datasets:
            self.datasets[run.resolved.digest] = prepare(run.resolved.variant.data)

    @contextlib.contextmanager
    def running(self, run: RunSpec) -> Iterator[None]:
        """Start a run on every rank, and have every rank leave it where one fails."""
        self.ranks.broadcast_run_id(run.run_id)
        with self.ranks.collective_run():
            yield

    def train(self, run: RunSpec, folder: RunDir, control: LeaseControl) -> dict[str, Any]:
        setup = build_for(self.ranks, run, self.builder)
        folder.write_rules(run_config(run), group_records(setup))
        return train(run, setup, self.datasets[run.resolved.digest], folder, self.device, control, self.ranks)

    def failure_message(self, error: Exception, run: RunSpec) -> str:
        if not is_alive(self.device):
            os.abort()  # every later run of this process would fail too; the launcher starts another worker
        self.builder.forget()
        return failure_message(error, run, self.device)

    def tidy(self) -> None:
        if self.device.type != "cpu":
            free_memory()


def work(sweep: SweepDir, slot: Slot, stop: StopSignal, take_runs: Callable[[Session], bool]) -> bool:
    """Set the devices of a slot up and take runs as rank 0, or train the runs of rank 0 as another rank."""
    env = torchrun_env()
    devices = choose_devices(slot.device, int(env.get("LOCAL_WORLD_SIZE", 1)))
    own_device = devices[int(env.get("LOCAL_RANK", 0))]
    # Before the process group forms, since NCCL picks its algorithms for good.
    configure(slot.threads, own_device, slot.shard, slot.workers)
    with launch_ranks(devices, slot.command(sweep), slot.shard) as ranks:
        if not ranks.is_main_process:
            return run_replica(sweep, own_device, stop, ranks)
        return take_runs(TorchSession(own_device, ranks))


def run_replica(sweep: SweepDir, device: torch.device, stop: StopSignal, ranks: DistributedContext) -> bool:
    """Train the runs that rank 0 starts, as another rank: it writes nothing, and rank 0 records its failures."""
    runs: dict[str, RunSpec] = {}
    builder = Builder(device)
    while run_id := ranks.wait_for_run_id():
        try:
            with ranks.collective_run():
                # Loaded after rank 0 has started its first run, since the plan may be written while this rank waits.
                runs = runs or {run.run_id: run for run in plan.load(sweep)}
                run = runs[run_id]
                data = prepare(run.resolved.variant.data)
                setup = build_for(ranks, run, builder)
                train(run, setup, data, sweep.run(run_id), device, ReplicaControl(stop), ranks)
        except Exception:  # `collective_run` has announced it to rank 0
            if not is_alive(device):
                os.abort()
            builder.forget()
        if device.type != "cpu":
            free_memory()
    return True


def build_for(ranks: DistributedContext, run: RunSpec, builder: Builder) -> TrainingSetup:
    """Build the network and its optimizers, in full or this rank's shards of them."""
    if not ranks.shard:
        return builder.build(run)
    from mupsweep.training.fsdp import build_sharded  # late, since importing FSDP takes a while

    bf16 = choose_precision(run.resolved.training.precision, builder.device) == "bf16"
    return build_sharded(run, builder.device, ranks, torch.bfloat16 if bf16 else None)


def failure_message(error: Exception, run: RunSpec, device: torch.device) -> str:
    """Why a run failed, in one line."""
    if not is_out_of_memory(error):
        return one_line(error)
    first_line = (str(error).splitlines() or [""])[0]
    capacity = f" of {si(torch.cuda.mem_get_info(device)[1])}B" if device.type == "cuda" else ""
    return (
        f"out of memory on {device_name(device)}{capacity}: {si(run.cost.parameters)} parameters take roughly "
        f"{si(run.resolved.least_memory(run.size))}B with one sequence at a time; use a larger device, several that "
        f"share the runs of this size ('launcher.sizes={{{run.size.name}:{{devices_per_run:2,shard:true}}}}'), fewer "
        f"launcher.slots_per_device, a shorter model.context or smaller sizes ({first_line})"
    )


@dataclass(frozen=True)
class ReplicaControl:
    """The control of a run on the other ranks, which hold no lease."""

    stop: StopSignal

    def stop_requested(self) -> bool:
        return self.stop.signalled

    def check_lease(self) -> None:
        pass
