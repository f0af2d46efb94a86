"""The main path: take the runs of a sweep that nobody trains yet, train them, record what happened.

execute -> claim -> build -> train -> summary.json -> status.json
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
    """Train every run of the sweep, or the named ones, that is pending and claimed by nobody; longest first.

    Args:
        run_ids: of the runs to train, or names of their sizes.
        device: a torch device, "auto", or several separated by commas, which train every run together. Where torchrun
            started this process and others, the device of each on this machine, or one name for all.
        shard: divide weights, gradients and optimizer state among several devices.
        stop: whether to stop; None is told by signals from now on.

    Returns:
        False if it was asked to stop before all of them were taken.
    """
    stop = stop or StopSignal.install()
    place = torchrun_env()
    devices = choose_devices(device, int(place.get("LOCAL_WORLD_SIZE", 1)))
    chosen = devices[int(place.get("LOCAL_RANK", 0))]
    configure(threads, chosen, shard)  # before the ranks meet: NCCL is as reproducible as it is told to be then
    words = [str(sweep.path), *run_ids, "--device", device, "--threads", str(threads), *["--shard"] * shard]
    with launch_ranks(devices, [sys.executable, "-m", "mupsweep", "worker", *words], shard) as ranks:
        if not ranks.is_main_process:
            return run_replica(sweep, chosen, stop, ranks)
        with LiveTracker(sweep) as tracker:
            return run_main(sweep, run_ids, chosen, stop, ranks, on_finished, tracker)


def run_main(
    sweep: SweepDir,
    run_ids: Sequence[str],
    device: torch.device,
    stop: StopSignal,
    ranks: DistributedContext,
    on_finished: Callable[[], None],
    tracker: LiveTracker,
) -> bool:
    """`execute` on rank 0, which is all there is on one device."""
    runs = select(plan.load(sweep), run_ids)
    deadly: list[RunSpec] = []
    data: dict[str, Dataset] = {}
    for run in chain(runs, deadly):
        folder = sweep.run(run.run_id)
        if folder.status()["status"] in (*FINISHED, FAILED):
            continue
        claim = folder.claim()
        if claim is None:
            continue
        try:
            if folder.status()["status"] in (*FINISHED, FAILED):  # finished between the look and the claim
                continue
            if stop.signalled:
                return False
            if (
                claim.deaths() >= MAX_WORKER_DEATHS and run not in deadly
            ):  # the others first, or none of them ever has its turn
                deadly.append(run)
                continue
            if run.recipe.digest not in data:
                data[run.recipe.digest] = prepare(run.recipe.variant.data)
            with tracker.showing(folder):
                execute_run(run, folder, data[run.recipe.digest], device, LeaseControl(claim, stop), ranks)
        except StopRequested:
            if claim.is_held():
                folder.write_status(PENDING)
            return False
        finally:
            claim.release()
        if device.type != "cpu":
            free_memory()
        on_finished()
    return True


def run_replica(sweep: SweepDir, device: torch.device, stop: StopSignal, ranks: DistributedContext) -> bool:
    """`execute` on the other ranks: train what rank 0 begins, and write nothing. What fails is for rank 0 to record."""
    runs: dict[str, RunSpec] = {}
    while run_id := ranks.wait_for_run_id():
        try:
            with ranks.together():
                runs = runs or {run.run_id: run for run in plan.load(sweep)}  # not before rank 0 knows its runs
                run = runs[run_id]
                data = prepare(run.recipe.variant.data)
                train(run, built_on(ranks, run, device), data, sweep.run(run_id), device, ReplicaControl(stop), ranks)
        except Exception:  # `together` has told rank 0
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
    owner: LeaseControl,
    ranks: DistributedContext = SINGLE_PROCESS,
) -> None:
    """Train one claimed run and write its records, `status.json` last. A failure is recorded, not raised.

    Raises:
        RecordError: not even the failure can be recorded.
    """
    with contextlib.ExitStack() as opened:
        try:
            opened.enter_context(logged(folder))
            ranks.broadcast_run_id(run.run_id)
            with ranks.together():
                folder.write_status(RUNNING, durable=False, step=0, steps=run.recipe.steps)
                built = built_on(ranks, run, device)
                config = run.row() | asdict(run.recipe.variant) | {"rules": role_records(run)}
                folder.write_rules(config, group_records(built))
                summary = train(run, built, data, folder, device, owner, ranks)
                owner.check()
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
            if owner.claim.is_held():
                folder.write_status(FAILED, error=told(error, run, device))


def built_on(ranks: DistributedContext, run: RunSpec, device: torch.device) -> TrainingSetup:
    """The network and its optimizers, whole or this rank's shard of them."""
    if not ranks.shard:
        return build(run, device)
    from mupsweep.training.fsdp import build_sharded  # imports FSDP, which takes a while

    bf16 = choose_precision(run.recipe.training.precision, device) == "bf16"
    return build_sharded(run, device, ranks, torch.bfloat16 if bf16 else None)


def told(error: Exception, run: RunSpec, device: torch.device) -> str:
    """Why a run failed, in one line."""
    first = (str(error).splitlines() or [""])[0]
    if not is_out_of_memory(error):
        return str(error) if isinstance(error, MupsweepError) else f"{type(error).__name__}: {first}"
    room = f" of {si(torch.cuda.mem_get_info(device)[1])}B" if device.type == "cuda" else ""
    return (
        f"out of memory on {device_name(device)}{room}: {si(run.cost.parameters)} parameters take roughly "
        f"{si(run.recipe.least_memory(run.size))}B with one sequence at a time; use a larger device, several that "
        f"share the runs of this size ('launcher.sizes={{{run.size.name}:{{devices_per_run:2,shard:true}}}}'), fewer "
        f"launcher.slots_per_device, a shorter model.context or smaller sizes ({first})"
    )


@contextlib.contextmanager
def logged(folder: RunDir) -> Iterator[None]:
    """What happens meanwhile stands in the run's log."""
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
    """A log that a full disk cuts short; the records say whether the run can go on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        pass


class LeaseLost(Exception):
    """The run belongs to another worker now; nothing of it may be written here any more."""


@dataclass(frozen=True)
class LeaseControl:
    """What the training loop asks at every step: whether to stop, and a sign of life for other hosts."""

    claim: Lease
    stop: StopSignal

    def stop_requested(self) -> bool:
        return self.stop.signalled

    def heartbeat(self) -> None:
        if self.claim.heartbeat():
            self.check()

    def check(self) -> None:
        """Raise LeaseLost where another host believed this process dead."""
        if not self.claim.is_held():
            raise LeaseLost


@dataclass(frozen=True)
class ReplicaControl:
    """The same for a rank that owns no claim."""

    stop: StopSignal

    def stop_requested(self) -> bool:
        return self.stop.signalled

    def heartbeat(self) -> None:
        pass


def select(runs: list[RunSpec], names: Sequence[str]) -> list[RunSpec]:
    """The runs of these names, or of sizes of these names; all where there are none."""
    known = {run.run_id for run in runs} | {run.size.name for run in runs}
    for name in names:
        if name not in known:
            hint = nearest(name, known) if len(known) < 20 else "see mupsweep status SWEEP --runs"
            raise RecordError(f"no run '{name}' in this sweep; {hint}")
    wanted = set(names) or known
    return [run for run in runs if run.run_id in wanted or run.size.name in wanted]
