"""A worker: takes the runs of a sweep that nobody trains yet, trains them and records what happened.

execute -> lease -> build -> train -> summary.json -> status.json
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain

import torch

from mupsweep.data import Dataset, prepare
from mupsweep.errors import MupsweepError, RecordError
from mupsweep.formatting import nearest, si
from mupsweep.store.lease import MAX_WORKER_DEATHS, Lease
from mupsweep.store.run_dir import FAILED, FINISHED, PENDING, RUNNING, RunDir
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.sweep.tensor_rules import role_records
from mupsweep.trackers.live import LiveTracker
from mupsweep.training.build import TrainingSetup, build, group_records
from mupsweep.training.devices import choose_devices, choose_precision, configure, device_name, is_alive
from mupsweep.training.distributed import SINGLE_PROCESS, DistributedContext, StopRequested, launch_ranks, torchrun_env
from mupsweep.training.microbatch import free_memory, is_out_of_memory
from mupsweep.training.signals import StopSignal
from mupsweep.training.trainer import train

log = logging.getLogger("mupsweep")


def execute(
    sweep: SweepDir,
    run_ids: Sequence[str] = (),
    device: str = "auto",
    threads: int = 1,
    on_finished: Callable[[], None] = lambda: None,
    shard: bool = False,
    stop: StopSignal | None = None,
) -> bool:
    """Train the pending runs of a sweep that no other worker holds a lease of, the longest first.

    Args:
        run_ids: the runs to train, or names of sizes whose runs to train; all runs where empty.
        device: a torch device, "auto", or several separated by commas, which train every run together. Where torchrun
            started this process and others, the device of each on this machine, or one name for all.
        threads: CPU threads of every process.
        on_finished: called after every run.
        shard: divide weights, gradients and optimizer state among several devices.
        stop: the flag that asks for an end; None installs one that stop signals set.

    Returns:
        False if it was asked to stop before every run was taken.
    """
    stop = stop or StopSignal.install()
    env = torchrun_env()
    devices = choose_devices(device, int(env.get("LOCAL_WORLD_SIZE", 1)))
    own_device = devices[int(env.get("LOCAL_RANK", 0))]
    configure(threads, own_device, shard)  # before the process group forms, when NCCL picks its algorithms for good
    arguments = [str(sweep.path), *run_ids, "--device", device, "--threads", str(threads)]
    arguments += ["--shard"] * shard + ["--allow-imports"] * sweep.allow_imports
    with launch_ranks(devices, [sys.executable, "-m", "mupsweep", "worker", *arguments], shard) as ranks:
        if not ranks.is_main_process:
            return run_replica(sweep, own_device, stop, ranks)
        with LiveTracker(sweep) as tracker:
            return run_main(sweep, run_ids, own_device, stop, ranks, on_finished, tracker)


def run_main(
    sweep: SweepDir,
    run_ids: Sequence[str],
    device: torch.device,
    stop: StopSignal,
    ranks: DistributedContext,
    on_finished: Callable[[], None],
    tracker: LiveTracker,
) -> bool:
    """Train runs as rank 0, which holds their leases and writes their records; return False if asked to stop."""
    runs = select(plan.load(sweep), run_ids)
    deferred: list[RunSpec] = []
    datasets: dict[str, Dataset] = {}
    for run in chain(runs, deferred):
        folder = sweep.run(run.run_id)
        if folder.status()["status"] in (*FINISHED, FAILED):
            continue
        lease = folder.claim()
        if lease is None:
            continue
        try:
            # Another worker may have finished the run between the first check and the lease.
            if folder.status()["status"] in (*FINISHED, FAILED):
                continue
            if stop.signalled:
                return False
            # A run that keeps killing its workers comes last, or the other runs would never be trained.
            if lease.deaths() >= MAX_WORKER_DEATHS and run not in deferred:
                deferred.append(run)
                continue
            if run.resolved.digest not in datasets:
                datasets[run.resolved.digest] = prepare(run.resolved.variant.data)
            with tracker.track(folder):
                execute_run(run, folder, datasets[run.resolved.digest], device, LeaseControl(lease, stop), ranks)
        except StopRequested:
            if lease.is_held():
                folder.write_status(PENDING)
            return False
        finally:
            lease.release()
        if device.type != "cpu":
            free_memory()
        on_finished()
    return True


def run_replica(sweep: SweepDir, device: torch.device, stop: StopSignal, ranks: DistributedContext) -> bool:
    """Train the runs that rank 0 starts, as another rank: it writes nothing, and rank 0 records its failures."""
    runs: dict[str, RunSpec] = {}
    while run_id := ranks.wait_for_run_id():
        try:
            with ranks.collective_run():
                # Loaded after rank 0 has started its first run, since the plan may be written while this rank waits.
                runs = runs or {run.run_id: run for run in plan.load(sweep)}
                run = runs[run_id]
                data = prepare(run.resolved.variant.data)
                setup = build_for(ranks, run, device)
                train(run, setup, data, sweep.run(run_id), device, ReplicaControl(stop), ranks)
        except Exception:  # `collective_run` has announced it to rank 0
            if not is_alive(device):
                os.abort()
        if device.type != "cpu":
            free_memory()
    return True


def execute_run(
    run: RunSpec,
    folder: RunDir,
    data: Dataset,
    device: torch.device,
    control: LeaseControl,
    ranks: DistributedContext = SINGLE_PROCESS,
) -> None:
    """Train one run under its lease and write its records, `status.json` last. A failure is recorded, not raised.

    Raises:
        StopRequested: it was asked to stop; the run is checkpointed.
        RecordError: not even the failure can be recorded.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(log_to(folder))
            ranks.broadcast_run_id(run.run_id)
            with ranks.collective_run():
                folder.write_status(RUNNING, durable=False, step=0, steps=run.resolved.steps)
                setup = build_for(ranks, run, device)
                config = run.row() | asdict(run.resolved.variant) | {"rules": role_records(run)}
                folder.write_rules(config, group_records(setup))
                summary = train(run, setup, data, folder, device, control, ranks)
                control.check()
                folder.write_summary(summary)
                folder.write_status(summary["status"])
                folder.remove_checkpoints()
        except StopRequested:
            log.info("stopped as asked; checkpointed")
            raise
        except LeaseLost:
            log.warning("another worker took this run over meanwhile; leaving the records to it")
        except Exception as error:
            log.error("%s", error if isinstance(error, MupsweepError) else traceback.format_exc())
            if not is_alive(device):
                os.abort()  # every later run of this process would fail too; the launcher starts another worker
            if control.lease.is_held():
                folder.write_status(FAILED, error=failure_message(error, run, device))


def build_for(ranks: DistributedContext, run: RunSpec, device: torch.device) -> TrainingSetup:
    """Build the network and its optimizers, in full or this rank's shards of them."""
    if not ranks.shard:
        return build(run, device)
    from mupsweep.training.fsdp import build_sharded  # late, since importing FSDP takes a while

    bf16 = choose_precision(run.resolved.training.precision, device) == "bf16"
    return build_sharded(run, device, ranks, torch.bfloat16 if bf16 else None)


def failure_message(error: Exception, run: RunSpec, device: torch.device) -> str:
    """Why a run failed, in one line."""
    first_line = (str(error).splitlines() or [""])[0]
    if not is_out_of_memory(error):
        return str(error) if isinstance(error, MupsweepError) else f"{type(error).__name__}: {first_line}"
    capacity = f" of {si(torch.cuda.mem_get_info(device)[1])}B" if device.type == "cuda" else ""
    return (
        f"out of memory on {device_name(device)}{capacity}: {si(run.cost.parameters)} parameters take roughly "
        f"{si(run.resolved.least_memory(run.size))}B with one sequence at a time; use a larger device, several that "
        f"share the runs of this size ('launcher.sizes={{{run.size.name}:{{devices_per_run:2,shard:true}}}}'), fewer "
        f"launcher.slots_per_device, a shorter model.context or smaller sizes ({first_line})"
    )


@contextlib.contextmanager
def log_to(folder: RunDir) -> Iterator[None]:
    """Write log messages to the run's log for the duration of the context."""
    try:
        handler = LogFile(folder.log_path)
    except OSError as error:
        raise RecordError(f"cannot write {folder.log_path}: {error.strerror}") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()


class LogFile(logging.FileHandler):
    """A log whose own write errors are ignored: on a full disk the records decide whether the run can go on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        pass


class LeaseLost(Exception):
    """Another worker took the run over, so nothing of the run may be written here any more."""


@dataclass(frozen=True)
class LeaseControl:
    """The control of a run on rank 0: renews the lease, and ends the run when the lease is lost."""

    lease: Lease
    stop: StopSignal

    def stop_requested(self) -> bool:
        return self.stop.signalled

    def heartbeat(self) -> None:
        if self.lease.heartbeat():
            self.check()

    def check(self) -> None:
        """Raise LeaseLost where another host took this process for dead."""
        if not self.lease.is_held():
            raise LeaseLost


@dataclass(frozen=True)
class ReplicaControl:
    """The control of a run on the other ranks, which hold no lease."""

    stop: StopSignal

    def stop_requested(self) -> bool:
        return self.stop.signalled

    def heartbeat(self) -> None:
        pass


def select(runs: list[RunSpec], names: Sequence[str]) -> list[RunSpec]:
    """Return the runs with these ids, or of sizes with these names; all runs where no name is given."""
    valid = {run.run_id for run in runs} | {run.size.name for run in runs}
    for name in names:
        if name not in valid:
            hint = nearest(name, valid) if len(valid) < 20 else "see mupsweep status SWEEP --runs"
            raise RecordError(f"no run '{name}' in this sweep; {hint}")
    selected = set(names) or valid
    return [run for run in runs if run.run_id in selected or run.size.name in selected]
