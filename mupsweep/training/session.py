"""Runs of mupsweep's own trainer, in the process of a worker or in several ranks that a worker supervises."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.multiprocessing.spawn import ProcessException, start_processes

from mupsweep.data import Dataset, prepare
from mupsweep.errors import MupsweepError
from mupsweep.formatting import si
from mupsweep.store.run_dir import RunDir
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.sweep.settings import run_config
from mupsweep.training.build import Builder, TrainingSetup, group_records
from mupsweep.training.devices import choose_devices, choose_precision, configure, device_name, is_alive
from mupsweep.training.distributed import SINGLE_PROCESS, DistributedContext, process_group, rank_envs, torchrun_env
from mupsweep.training.microbatch import MicroBatchTooLarge, OutOfMemory, free_memory, is_out_of_memory
from mupsweep.training.signals import STOPPED, LeaseLost, StopRequested, StopSignal, defer_signals, exit_reason
from mupsweep.training.slot import Slot
from mupsweep.training.trainer import TrainControl, train
from mupsweep.training.worker import Session, execute, one_line

log = logging.getLogger("mupsweep")

POLL_SECONDS = 0.3  # between two looks at whether a supervisor was asked to stop


@dataclass
class TorchSession:
    """Trains runs on the device of this process, alone or as one of several ranks.

    Attributes:
        shard: whether weights, gradients and optimizer state are divided among the ranks.
        datasets: the corpus of every variant so far, by its digest.
    """

    device: torch.device
    ranks: DistributedContext = field(default_factory=lambda: SINGLE_PROCESS)
    shard: bool = False
    datasets: dict[str, Dataset] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.builder = Builder(self.device)

    def prepare(self, run: RunSpec) -> None:
        if run.resolved.digest not in self.datasets:
            self.datasets[run.resolved.digest] = prepare(run.resolved.variant.data)

    def train(self, run: RunSpec, folder: RunDir, control: TrainControl) -> dict[str, Any]:
        if self.ranks.is_main_process:
            self.ranks.broadcast_run_id(run.run_id)
        with self.ends_its_process(run, folder):
            self.prepare(run)  # on the other ranks, since rank 0 has done so
            setup = self.build(run)
            if self.ranks.is_main_process:
                folder.write_rules(run_config(run), group_records(setup))
            return train(run, setup, self.datasets[run.resolved.digest], folder, self.device, control, self.ranks)

    def build(self, run: RunSpec) -> TrainingSetup:
        """Build the network and its optimizers, in full or this rank's shards of them."""
        if not self.shard:
            return self.builder.build(run)
        from mupsweep.training.fsdp import build_sharded  # late, since importing FSDP takes a while

        bf16 = choose_precision(run.resolved.training.precision, self.device) == "bf16"
        return build_sharded(run, self.device, self.ranks, torch.bfloat16 if bf16 else None)

    @contextlib.contextmanager
    def ends_its_process(self, run: RunSpec, folder: RunDir) -> Iterator[None]:
        """Context of a run on one of several ranks: an error ends the process, since the others cannot go on without.

        Why is recorded, for rank 0 of the processes that are started next.
        """
        try:
            yield
        except (StopRequested, LeaseLost):  # on all ranks at once
            raise
        except Exception as error:
            if self.ranks.size == 1:
                raise
            log.error("%s", error if isinstance(error, MupsweepError) else traceback.format_exc())
            fitting = error.fitting if isinstance(error, MicroBatchTooLarge) else None
            try:
                reason = f"rank {self.ranks.rank}: {failure_message(error, run, self.device)}"
                folder.record_failure(reason, fitting, final=isinstance(error, OutOfMemory))
            finally:  # also where nothing can be written, or this rank would go on to the next run without the others
                os.abort()

    def failure_message(self, error: Exception, run: RunSpec) -> str:
        if not is_alive(self.device):
            os.abort()  # every later run of this process would fail too; the launcher starts another worker
        self.builder.forget()
        return failure_message(error, run, self.device)

    def tidy(self) -> None:
        if self.device.type != "cpu":
            free_memory()


def work(sweep: SweepDir, slot: Slot, stop: StopSignal, take_runs: Callable[[Session], bool]) -> bool:
    """Take runs on the device of a slot, also as one of several ranks, or start a rank on each of its devices."""
    env = torchrun_env()
    devices = choose_devices(slot.device, int(env.get("LOCAL_WORLD_SIZE", 1)))
    if len(devices) > 1 and not env:
        return supervise(sweep, slot, len(devices), stop)
    own_device = devices[int(env.get("LOCAL_RANK", 0))]
    # Before the process group forms, since NCCL picks its algorithms for good.
    configure(slot.threads, own_device, slot.shard, slot.workers)
    with process_group(env, own_device) as ranks:
        session = TorchSession(own_device, ranks, slot.shard)
        return take_runs(session) if ranks.is_main_process else run_replica(sweep, session, stop)


def supervise(sweep: SweepDir, slot: Slot, size: int, stop: StopSignal) -> bool:
    """Have ranks train the runs of a slot together, and start all of them again where one has failed its run.

    Returns:
        False if they were asked to stop.
    """
    # a server that imports once what each rank needs seconds for
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, "mupsweep.training.fsdp"])
    while True:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        arguments = rank_envs(size, store.port), sweep, slot
        with defer_signals():
            ranks: Any = start_processes(run_rank, arguments, size, join=False, start_method="forkserver")
        signalled = False
        try:
            while not ranks.join(timeout=POLL_SECONDS):
                if stop.signalled and not signalled:
                    signalled = True
                    for process in ranks.processes:
                        process.terminate()
            return True
        except ProcessException as error:
            code = ranks.processes[error.error_index].exitcode
            if code == STOPPED or stop.signalled:
                return False
            run = sweep.held_by(ranks.processes[0].pid)
            if run is None:
                log.error("%s", error)  # no run was begun: the launcher decides whether to try again
                if code < 0:
                    os.abort()
                sys.exit(code)
            log.error("rank %d of %s ended: all start again from its checkpoint", error.error_index, run.run_id)
            # a rank that failed has recorded why and aborted; of another's end they know only that they lost it
            reason = f"rank {error.error_index} was ended by {exit_reason(code)}"
            run.record_failure(reason, replace=code != -signal.SIGABRT)
        finally:
            for process in ranks.processes:
                process.kill()


def run_rank(local_rank: int, environments: Sequence[Mapping[str, str]], sweep: SweepDir, slot: Slot) -> None:
    """Be one of the ranks that a supervisor started."""
    os.environ.update(environments[local_rank])
    try:
        took_all = execute(sweep, slot, programs=False)
    except MupsweepError as error:
        print(f"mupsweep: {error}", file=sys.stderr)
        sys.exit(2)
    if not took_all:
        sys.exit(STOPPED)


def run_replica(sweep: SweepDir, session: TorchSession, stop: StopSignal) -> bool:
    """Train the runs that rank 0 starts, as another rank, which writes nothing but why it failed."""
    runs: dict[str, RunSpec] = {}
    while run_id := session.ranks.wait_for_run_id():
        # Loaded after rank 0 has started its first run, since the plan may be written while this rank waits.
        runs = runs or {run.run_id: run for run in plan.load(sweep)}
        with contextlib.suppress(StopRequested, LeaseLost):
            session.train(runs[run_id], sweep.run(run_id), ReplicaControl(stop))
        session.tidy()
    return True


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

    def lease_lost(self) -> bool:
        return False
