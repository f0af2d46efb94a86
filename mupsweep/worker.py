"""The main path: take the runs of a sweep that nobody trains yet, train them, record what happened.

execute -> claim -> build -> train -> summary.json -> status.json
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import torch

from mupsweep import plan
from mupsweep.batches import is_out_of_memory, make_room
from mupsweep.build import Built, build, group_records, role_records
from mupsweep.claims import Claim
from mupsweep.cost import si
from mupsweep.data import Dataset, prepare
from mupsweep.errors import ConfigError, MupsweepError, RecordError, nearest
from mupsweep.plan import RunSpec
from mupsweep.processes import StopFlag
from mupsweep.ranks import ALONE, Interrupted, Ranks, gathered, own_place
from mupsweep.records import FAILED, FINISHED, PENDING, RUNNING, RunDir, SweepDir
from mupsweep.trackers.live import Live
from mupsweep.train import choose_precision, device_name, train

log = logging.getLogger("mupsweep")

DEADLY = 2  # a run of which so many workers died is trained last
LITTLE, MUCH = 2**20, 2**31 - 1  # bytes; of `set_kept_memory`


def execute(
    sweep: SweepDir,
    run_ids: Sequence[str] = (),
    device: str = "auto",
    threads: int = 1,
    on_finished: Callable[[], None] = lambda: None,
    shard: bool = False,
    stop: StopFlag | None = None,
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
    stop = stop or StopFlag.install()
    place = own_place()
    devices = choose_devices(device, int(place.get("LOCAL_WORLD_SIZE", 1)))
    chosen = devices[int(place.get("LOCAL_RANK", 0))]
    configure(threads, chosen, shard)  # before the ranks meet: NCCL is as reproducible as it is told to be then
    words = [str(sweep.path), *run_ids, "--device", device, "--threads", str(threads), *["--shard"] * shard]
    with gathered(devices, [sys.executable, "-m", "mupsweep", "worker", *words], shard) as ranks:
        if not ranks.leads:
            return follow(sweep, chosen, stop, ranks)
        with Live(sweep) as tracker:
            return lead(sweep, run_ids, chosen, stop, ranks, on_finished, tracker)


def lead(
    sweep: SweepDir,
    run_ids: Sequence[str],
    device: torch.device,
    stop: StopFlag,
    ranks: Ranks,
    on_finished: Callable[[], None],
    tracker: Live,
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
            if claim.deaths() >= DEADLY and run not in deadly:  # the others first, or none of them ever has its turn
                deadly.append(run)
                continue
            if run.recipe.digest not in data:
                data[run.recipe.digest] = prepare(run.recipe.variant.data)
            with tracker.showing(folder):
                execute_run(run, folder, data[run.recipe.digest], device, Owner(claim, stop), ranks)
        except Interrupted:
            if claim.is_held():
                folder.write_status(PENDING)
            return False
        finally:
            claim.release()
        if device.type != "cpu":
            make_room()
        on_finished()
    return True


def follow(sweep: SweepDir, device: torch.device, stop: StopFlag, ranks: Ranks) -> bool:
    """`execute` on the other ranks: train what rank 0 begins, and write nothing. What fails is for rank 0 to record."""
    runs: dict[str, RunSpec] = {}
    while run_id := ranks.next_run():
        try:
            with ranks.together():
                runs = runs or {run.run_id: run for run in plan.load(sweep)}  # not before rank 0 knows its runs
                run = runs[run_id]
                data = prepare(run.recipe.variant.data)
                train(run, built_on(ranks, run, device), data, sweep.run(run_id), device, Follower(stop), ranks)
        except Exception:  # `together` has told rank 0
            if not is_alive(device):
                os.abort()
        if device.type != "cpu":
            make_room()
    return True


def execute_run(
    run: RunSpec, folder: RunDir, data: Dataset, device: torch.device, owner: Owner, ranks: Ranks = ALONE
) -> None:
    """Train one claimed run and write its records, `status.json` last. A failure is recorded, not raised.

    Raises:
        RecordError: not even the failure can be recorded.
    """
    with contextlib.ExitStack() as opened:
        try:
            opened.enter_context(logged(folder))
            ranks.tell(run.run_id)
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
        except Interrupted:
            log.info("stopped as asked; checkpointed")
            raise
        except TakenOver:
            log.warning("another worker took this run over meanwhile; leaving the records to it")
        except Exception as error:
            log.error("%s", error if isinstance(error, MupsweepError) else traceback.format_exc())
            if not is_alive(device):
                os.abort()  # every later run of this process would fail too; the launcher starts another worker
            if owner.claim.is_held():
                folder.write_status(FAILED, error=told(error, run, device))


def built_on(ranks: Ranks, run: RunSpec, device: torch.device) -> Built:
    """The network and its optimizers, whole or this rank's shard of them."""
    if not ranks.shard:
        return build(run, device)
    from mupsweep.sharding import build_sharded  # imports FSDP, which takes a while

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


class TakenOver(Exception):
    """The run belongs to another worker now; nothing of it may be written here any more."""


@dataclass(frozen=True)
class Owner:
    """What the training loop asks at every step: whether to stop, and a sign of life for other hosts."""

    claim: Claim
    stop: StopFlag

    def stop_requested(self) -> bool:
        return self.stop.signalled

    def heartbeat(self) -> None:
        if self.claim.heartbeat():
            self.check()

    def check(self) -> None:
        """Raise TakenOver where another host believed this process dead."""
        if not self.claim.is_held():
            raise TakenOver


@dataclass(frozen=True)
class Follower:
    """The same for a rank that owns no claim."""

    stop: StopFlag

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


def choose_devices(device: str, processes: int = 1) -> list[torch.device]:
    """The device of every rank, each of the kind of the first.

    Args:
        processes: that were started on this machine; for several, one device without a number stands for all.
    """
    names = [name.strip() for name in device.split(",") if name.strip()] or [device]
    first = choose_device(names[0])
    if processes > 1 and device in ("auto", first.type):
        names = [f"{first.type}:{i}" if first.type == "cuda" else first.type for i in range(processes)]
    if processes > 1 and len(names) != processes:
        raise ConfigError(
            f"device {device}: {processes} processes of a run were started on this machine (LOCAL_WORLD_SIZE); name a "
            "device for each, or auto"
        )
    devices = [first, *(_parsed(name) for name in names[1:])]
    seen = [d.index or 0 for d in devices if d.type != "cpu"]
    there = torch.cuda.device_count()
    for other in devices[1:]:
        if other.type != first.type or first.type not in ("cpu", "cuda") or (other.index or 0) >= max(1, there):
            raise ConfigError(f"device {device}: a run takes several CUDA devices that are there, or several cpu")
    if len(set(seen)) < len(seen):
        raise ConfigError(f"device {device}: each rank of a run needs a GPU of its own")
    return devices


def _parsed(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name} is not there ({str(error).splitlines()[0]})") from error


def choose_device(device: str) -> torch.device:
    """`auto` is the first accelerator there is, else the CPU."""
    if device != "auto":
        try:
            made = torch.device(device)
            if made.type == "cuda" and torch.cuda.is_available() and (made.index or 0) < torch.cuda.device_count():
                return torch.device("cuda", made.index or 0)  # to try it would take memory there: it may be another's
            made = torch.empty(0, device=made).device
            if made.type == "meta":
                raise RuntimeError("it computes nothing")
            return made
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"device {device} is not there ({str(error).splitlines()[0]}): use auto, cpu, cuda:0 or another that is"
            ) from error
    if torch.cuda.is_available():
        return torch.device("cuda:0")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def configure(threads: int, device: torch.device, shard: bool = False) -> None:
    """Settings of the process that make runs reproducible, and fast, or small where they are sharded."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    set_kept_memory(LITTLE if shard else MUCH)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # pinned memory and capability checks use the current device
    torch.set_float32_matmul_precision("highest")  # containers may turn TF32 on
    if device.type != "cpu":  # CPU kernels are deterministic anyhow, and asking for it imports half of torch
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs a fixed workspace for it
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # switches that add up take the numbers as they come
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def is_alive(device: torch.device) -> bool:
    """False after an error that leaves a CUDA context unusable for good."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def set_kept_memory(size: int) -> None:
    """From which size on glibc returns freed blocks to the kernel.

    To return them at every step doubles it at large vocabularies. To keep them leaves holes between the weights that a
    sharded run gathers and frees, block by block, and in the end as much memory as whole weights would take.
    """
    if Path("/proc/self").exists():
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, size)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, size)  # M_TRIM_THRESHOLD
