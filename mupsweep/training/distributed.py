"""Ranks: the processes that train one run together, a device each, and how they agree.

Rank 0 is the worker: it holds the lease of a run and alone writes records. It starts the other ranks, unless torchrun
or a job script started all of them, on one machine or on several. Every rank computes the gradient of its rows of the
global batch, and sums it with the others'; all weights and optimizer state are on each, unless they are sharded. What
only one rank knows (a signal, an error, memory that ran out) reaches the others in `all_reduce_max`, which comes before
every other collective and at the end of every run: so no rank waits for one that has left the run.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mupsweep.errors import ConfigError
from mupsweep.training import signals

log = logging.getLogger("mupsweep")

T = TypeVar("T")

OK, SAVE, STOP, OUT_OF_MEMORY, FAILED = range(5)  # the worst of the ranks' words is everybody's
BUCKET = 2**24  # numbers that are summed at once: 64 MiB in fp32
TORCHRUN_ENV = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)  # torchrun's variables
MAIN_PID_ENV = "MUPSWEEP_FOLLOWS"  # of the environment of a rank that rank 0 started: its pid
RUN_WAIT_TIMEOUT = timedelta(days=30)  # how long a rank waits for its next run
SHUTDOWN_TIMEOUT = 60.0  # seconds that rank 0 waits for the others to end; all they did is recorded by then
PR_SET_PDEATHSIG = 1  # prctl(2)
SIOCGIFADDR = 0x8915  # netdevice(7)


class StopRequested(Exception):
    """The run was asked to stop; it is checkpointed and goes on when it is started again."""


class CollectiveExit(Exception):
    """Every rank leaves the run at the same place, so nobody needs to be told."""


class PeerFailed(CollectiveExit):
    """Another rank cannot go on, with its reason."""


class PeerOutOfMemory(Exception):
    """Another rank has too little memory for the step that all are at; nothing is left to be exchanged about it."""


class OutOfMemory(CollectiveExit):
    """Some device has too little memory for a step with the smallest pieces."""


@dataclass
class DistributedContext:
    """One process's view of those that train a run together.

    Attributes:
        rank: of this process; 0 leads.
        size: how many there are.
        shard: whether weights, gradients and optimizer state are divided among them, or else are whole on each.
        store: what they read and write outside of training; None for a process alone.
        told: how many runs were begun.
    """

    rank: int = 0
    size: int = 1
    shard: bool = False
    store: Any = None
    told: int = 0

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the records."""
        return self.rank == 0

    def rows(self, batch: Any) -> Any:
        """This rank's rows of a global batch, the same number for each.

        Raises:
            ConfigError: the batch cannot be divided so.
        """
        if len(batch) % self.size:
            raise ConfigError(
                f"training.batch_size={len(batch)} cannot be divided among {self.size} devices: choose a multiple, "
                "or another launcher.devices_per_run"
            )
        share = len(batch) // self.size
        return batch[self.rank * share : (self.rank + 1) * share]

    def all_reduce_max(self, word: int = OK) -> int:
        """The worst word that any rank says here.

        Raises:
            PeerFailed: a rank left the run.
        """
        if self.size == 1:
            return word
        worst = self._worst(word)
        if worst == FAILED:
            raise PeerFailed(self.store.get(f"failure-{self.told}").decode())
        return worst

    def differ(self, number: int) -> bool:
        """Whether some ranks name another number than others."""
        if self.size == 1:
            return False
        self.all_reduce_max()
        ends = torch.tensor([number, -number])
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        return bool(ends.sum() != 0)

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replace every tensor by its sum over the ranks; they are of one dtype and one device."""
        if self.size == 1:
            return
        for bucket in bucketed(tensors, Tensor.numel):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            self.go_on()  # or the others would wait for a rank that had no room for this
            dist.all_reduce(flat)
            for tensor, total in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def go_on(self) -> None:
        """Find out, before anything that takes all of them, whether all of them come.

        Raises:
            PeerFailed: a rank left the run.
            PeerOutOfMemory: a rank left this step.
        """
        if self.all_reduce_max() == OUT_OF_MEMORY:
            raise PeerOutOfMemory

    def all_to_all(self, send_buffer: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send every rank the next `sent` numbers of `send_buffer`; return `received` numbers from each, in order."""
        came = send_buffer.new_empty(sum(received))
        self.go_on()
        dist.all_to_all_single(came, send_buffer, list(received), list(sent))
        return came

    def collect(self, value: Any) -> list[Any]:
        """Everybody's value on rank 0, and nothing elsewhere."""
        everybody = [None] * self.size if self.is_main_process else None
        self.go_on()
        dist.gather_object(value, everybody)
        return everybody or []

    def broadcast_run_id(self, run_id: str) -> None:
        """Begin a run on every other rank; "" ends them."""
        if self.size > 1:
            self.told += 1
            self.store.set(f"run-{self.told}", run_id)

    def wait_for_run_id(self) -> str:
        """The run that rank 0 begins next; "" for none."""
        self.told += 1
        self.store.wait([f"run-{self.told}"], RUN_WAIT_TIMEOUT)
        return self.store.get(f"run-{self.told}").decode()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """One run: when it ends on one rank, it ends on all of them.

        Raises:
            PeerFailed: another rank left the run with an error.
        """
        try:
            yield
        except (CollectiveExit, StopRequested) as end:
            if isinstance(end, StopRequested):
                self.all_reduce_max()
            raise
        except Exception as error:
            if self.size > 1:
                self._leave(error)
            raise
        self.all_reduce_max()

    def _leave(self, error: Exception) -> None:
        """Tell the others, wherever they are, that this rank cannot go on."""
        first = (str(error).splitlines() or [""])[0]
        try:
            self.store.set(f"failure-{self.told}", f"rank {self.rank}: {type(error).__name__}: {first}")
        except Exception as lost:
            _give_up(lost)
        self._worst(FAILED)

    def _worst(self, word: int) -> int:
        words = torch.tensor(word)
        try:
            dist.all_reduce(words, dist.ReduceOp.MAX)
        except RuntimeError as lost:
            _give_up(lost)
        return int(words)


def _give_up(lost: Exception) -> NoReturn:
    """End this process in the middle of its run: a launcher starts another, which goes on from the last checkpoint."""
    log.error("the other ranks cannot be reached any more (%s): this worker ends", lost)
    os.abort()


SINGLE_PROCESS = DistributedContext()


def torchrun_env() -> dict[str, str]:
    """What torchrun, a job script or rank 0 said to this process of its place among several; empty for one alone.

    Raises:
        ConfigError: a number that is none or out of range, or a place of which only a part was told.
    """
    said = {name: os.environ.get(name, "") for name in TORCHRUN_ENV}
    if not said["RANK"] or said["WORLD_SIZE"] in ("", "1"):
        return {}  # some clusters set a few of them for every job
    if missing := [name for name, value in said.items() if not value]:
        raise _misplaced("RANK", said["RANK"], f"comes without {', '.join(missing)}")
    size = _number(said, "WORLD_SIZE", 1, 2**31)
    local = _number(said, "LOCAL_WORLD_SIZE", 1, size + 1)
    for name, low, end in (("RANK", 0, size), ("LOCAL_RANK", 0, local), ("MASTER_PORT", 1, 2**16)):
        _number(said, name, low, end)
    return said


def _number(said: Mapping[str, str], name: str, low: int, end: int) -> int:
    """One of torchrun's variables, a number from `low` to below `end`."""
    value = said[name]
    if not (value.isascii() and value.isdecimal() and low <= int(value) < end):
        raise _misplaced(name, value, f"is no whole number from {low} to {end - 1}")
    return int(value)


def _misplaced(name: str, value: str, why: str) -> ConfigError:
    return ConfigError(
        f"{name}={value} in the environment {why}: torchrun or a job script sets {', '.join(TORCHRUN_ENV)} for the "
        "processes of one run; for a process alone, unset RANK and WORLD_SIZE"
    )


@contextlib.contextmanager
def launch_ranks(
    devices: Sequence[torch.device], command: Sequence[str], shard: bool = False
) -> Iterator[DistributedContext]:
    """This process among those that train together: one that was told its place, or rank 0, which starts the others.

    Args:
        devices: of the processes on this machine, one each.
        command: starts this program.
        shard: as in `DistributedContext`.
    """
    if place := torchrun_env():
        from torch.distributed.rendezvous import rendezvous

        if MAIN_PID_ENV in os.environ:
            set_parent_death_signal(int(os.environ[MAIN_PID_ENV]))
        try:
            store, _, _ = next(rendezvous("env://"))
        except dist.DistError as error:
            where = f"MASTER_ADDR={place['MASTER_ADDR']} and MASTER_PORT={place['MASTER_PORT']}"
            raise ConfigError(
                f"the processes of this run do not meet at {where}: {str(error).splitlines()[0]}"
            ) from error
        with connected(place, devices[int(place["LOCAL_RANK"])], store, shard) as ranks:
            yield ranks
        return
    if len(devices) == 1:
        yield SINGLE_PROCESS
        return
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    leader, *others = places(len(devices), store.port)
    followers = RankProcesses()
    try:
        for place in others:
            followers.start(place, command)
        with connected(leader, devices[0], store, shard) as ranks:
            try:
                yield ranks
            finally:
                followers.ending = True
    finally:
        followers.wait()


def places(size: int, port: int) -> list[dict[str, str]]:
    """What each of several processes on this machine is told."""
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{k: str(v) for k, v in {"RANK": i, "LOCAL_RANK": i, **shared}.items()} for i in range(size)]


@contextlib.contextmanager
def connected(
    place: Mapping[str, str], device: torch.device, store: Any, shard: bool = False
) -> Iterator[DistributedContext]:
    """A process group with a rank per device: gloo between CPUs, and for words; NCCL between GPUs."""
    if interface := interface_to(place["MASTER_ADDR"]):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)  # or the one of this machine's name: often a loopback
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    rank, size = int(place["RANK"]), int(place["WORLD_SIZE"])
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    ranks = DistributedContext(rank, size, shard, store)
    try:
        if device.type == "cuda":  # NCCL takes memory of its own at the first sum: while torch has not taken all of it
            dist.all_reduce(torch.zeros(BUCKET, device=device))
        yield ranks
    finally:
        if ranks.is_main_process:
            ranks.broadcast_run_id("")
        dist.destroy_process_group()


def interface_to(host: str) -> str | None:
    """The network interface by which this machine reaches a host; None where that cannot be told."""
    if sys.platform != "linux":
        return None
    import fcntl

    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no address
                if fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))[20:24] == own:
                    return name
    return None


class RankProcesses:
    """The processes of the other ranks. If one of them dies, so does this one: alone it cannot go on."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ending = False

    def start(self, place: Mapping[str, str], command: Sequence[str]) -> None:
        """One more."""
        process = signals.start(command, {**place, MAIN_PID_ENV: str(os.getpid())})
        self.processes.append(process)
        threading.Thread(target=self._watch, args=(place["RANK"], process), daemon=True).start()

    def wait(self) -> None:
        """Until all have ended, as they were told to; those that could not be told, or do not end, are killed."""
        until = time.monotonic() + SHUTDOWN_TIMEOUT * self.ending
        for process in self.processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _watch(self, rank: str, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if not self.ending:
            log.error("rank %s ended with exit code %d: this worker ends, its run is kept to go on", rank, code)
            os.abort()


def bucketed(things: Iterable[T], numbers: Callable[[T], int]) -> Iterator[list[T]]:
    """Things in order, as many at a time as their numbers fill a bucket."""
    bucket: list[T] = []
    for thing in things:
        if bucket and sum(map(numbers, bucket)) + numbers(thing) > BUCKET:
            yield bucket
            bucket = []
        bucket.append(thing)
    if bucket:
        yield bucket


def set_parent_death_signal(leader: int) -> None:
    """No rank outlives rank 0, however that ends; where the system cannot promise it, the next exchange fails."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != leader:  # it ended before
            os.kill(os.getpid(), signal.SIGKILL)
