"""Distributed training: the processes that train one run together, one per device, and how they agree.

Rank 0 is the worker: it holds the lease of a run and alone writes records. It starts the other ranks, unless torchrun
or a job script started all of them, on one machine or on several. Every rank computes the gradient of its rows of the
global batch and sums it with those of the others; each holds all weights and optimizer state, unless they are sharded.
What only one rank knows (a signal, an error, memory that ran out) reaches the others in `all_reduce_max`, which
precedes every other collective and ends every run, so no rank waits for one that has left the run.
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
from enum import IntEnum
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mupsweep.errors import ConfigError
from mupsweep.training import signals
from mupsweep.training.signals import StopRequested

log = logging.getLogger("mupsweep")

T = TypeVar("T")

BUCKET = 2**24  # numbers that are summed in one collective: 64 MiB in fp32
TORCHRUN_ENV = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MAIN_PID_ENV = "MUPSWEEP_FOLLOWS"  # environment variable that holds rank 0's pid in the ranks that it started
RUN_WAIT_TIMEOUT = timedelta(days=30)  # how long a rank waits for its next run
SHUTDOWN_TIMEOUT = 60.0  # seconds that rank 0 waits for the others to end; all they did is recorded by then
PR_SET_PDEATHSIG = 1  # prctl(2)
SIOCGIFADDR = 0x8915  # netdevice(7)


class Signal(IntEnum):
    """What a rank announces to the others; the largest value of all ranks is what every rank acts on."""

    OK = 0
    SAVE = 1
    STOP = 2
    OUT_OF_MEMORY = 3
    FAILED = 4


class CollectiveExit(Exception):
    """An error that ends the run on every rank at the same point, so no rank has to announce it."""


class PeerFailed(CollectiveExit):
    """Another rank left the run with an error, which the message quotes."""


class PeerOutOfMemory(Exception):
    """Another rank ran out of memory in the current step, and every rank knows it."""


class OutOfMemory(CollectiveExit):
    """Some device has too little memory even for micro-batches of one sequence."""


@dataclass
class DistributedContext:
    """One process's view of the processes that train a run together.

    Attributes:
        rank: the number of this process; 0 is the main process.
        size: the number of processes.
        shard: whether weights, gradients and optimizer state are divided among the ranks instead of whole on each.
        store: the key-value store that the ranks share outside of training; None for a single process.
        run_counter: the number of runs that were started together so far.
    """

    rank: int = 0
    size: int = 1
    shard: bool = False
    store: Any = None
    run_counter: int = 0

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the records."""
        return self.rank == 0

    def local_shard(self, batch: Any) -> Any:
        """Return this rank's rows of a global batch; every rank has equally many.

        Raises:
            ConfigError: the batch is no multiple of the number of ranks.
        """
        if len(batch) % self.size:
            raise ConfigError(
                f"training.batch_size={len(batch)} cannot be divided among {self.size} devices: choose a multiple, "
                "or another launcher.devices_per_run"
            )
        n_local = len(batch) // self.size
        return batch[self.rank * n_local : (self.rank + 1) * n_local]

    def all_reduce_max(self, signal: Signal = Signal.OK) -> Signal:
        """Return the largest signal of all ranks.

        Raises:
            PeerFailed: a rank left the run.
        """
        if self.size == 1:
            return signal
        largest = self._exchange(signal)
        if largest == Signal.FAILED:
            raise PeerFailed(self.store.get(f"failure-{self.run_counter}").decode())
        return largest

    def all_equal(self, number: int) -> bool:
        """Whether every rank passes the same number."""
        if self.size == 1:
            return True
        self.all_reduce_max()
        largest_and_smallest = torch.tensor([number, -number])
        dist.all_reduce(largest_and_smallest, dist.ReduceOp.MAX)
        return bool(largest_and_smallest.sum() == 0)

    def all_reduce_sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace every tensor by its sum over the ranks; all must have one dtype and one device."""
        if self.size == 1:
            return
        for bucket in bucketed(tensors, Tensor.numel):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            self.check_peers()  # after the allocation: a rank that had no memory for it does not come to the sum
            dist.all_reduce(flat)
            for tensor, total in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def check_peers(self) -> None:
        """Make sure that every rank reaches the collective that follows.

        Raises:
            PeerFailed: a rank left the run.
            PeerOutOfMemory: a rank left this step.
        """
        if self.all_reduce_max() == Signal.OUT_OF_MEMORY:
            raise PeerOutOfMemory

    def all_to_all(self, send_buffer: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]) -> Tensor:
        """Send consecutive pieces of `send_buffer` to the ranks in turn; return the pieces received, likewise in order.

        Args:
            send_counts: how many numbers each rank is sent.
            recv_counts: how many numbers each rank sends to this one.
        """
        recv_buffer = send_buffer.new_empty(sum(recv_counts))
        self.check_peers()
        dist.all_to_all_single(recv_buffer, send_buffer, list(recv_counts), list(send_counts))
        return recv_buffer

    def gather_object(self, value: Any) -> list[Any]:
        """Return the values of all ranks on rank 0, and an empty list elsewhere."""
        gathered = [None] * self.size if self.is_main_process else None
        self.check_peers()
        dist.gather_object(value, gathered)
        return gathered or []

    def broadcast_run_id(self, run_id: str) -> None:
        """Start a run on every other rank; an empty id ends them."""
        if self.size > 1:
            self.run_counter += 1
            self.store.set(f"run-{self.run_counter}", run_id)

    def wait_for_run_id(self) -> str:
        """Wait for the next run that rank 0 starts; an empty id means that there is none."""
        self.run_counter += 1
        self.store.wait([f"run-{self.run_counter}"], RUN_WAIT_TIMEOUT)
        return self.store.get(f"run-{self.run_counter}").decode()

    @contextlib.contextmanager
    def collective_run(self) -> Iterator[None]:
        """Context of one run: when it ends on one rank, it ends on all of them.

        Raises:
            PeerFailed: another rank left the run with an error.
        """
        try:
            yield
        except StopRequested:
            self.all_reduce_max()
            raise
        except CollectiveExit:
            raise
        except Exception as error:
            if self.size > 1:
                self._announce_failure(error)
            raise
        self.all_reduce_max()

    def _announce_failure(self, error: Exception) -> None:
        """Announce to the other ranks, at whatever collective they are, that this rank cannot go on."""
        first_line = (str(error).splitlines() or [""])[0]
        try:
            self.store.set(f"failure-{self.run_counter}", f"rank {self.rank}: {type(error).__name__}: {first_line}")
        except Exception as lost:
            _give_up(lost)
        self._exchange(Signal.FAILED)

    def _exchange(self, signal: Signal) -> Signal:
        largest = torch.tensor(int(signal))
        try:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        except RuntimeError as lost:
            _give_up(lost)
        return Signal(int(largest))


def _give_up(lost: Exception) -> NoReturn:
    """End this process in the middle of its run: a launcher starts another, which goes on from the last checkpoint."""
    log.error("the other ranks cannot be reached any more (%s): this worker ends", lost)
    os.abort()


SINGLE_PROCESS = DistributedContext()


def torchrun_env() -> dict[str, str]:
    """Return torchrun's variables as torchrun, a job script or rank 0 set them; empty for a single process.

    Raises:
        ConfigError: a variable is missing, is not a number or is out of range.
    """
    env = {name: os.environ.get(name, "") for name in TORCHRUN_ENV}
    if not env["RANK"] or env["WORLD_SIZE"] in ("", "1"):
        return {}  # some clusters set a few of them for every job
    if missing := [name for name, value in env.items() if not value]:
        raise _misplaced("RANK", env["RANK"], f"comes without {', '.join(missing)}")
    size = _number(env, "WORLD_SIZE", 1, 2**31)
    local_size = _number(env, "LOCAL_WORLD_SIZE", 1, size + 1)
    for name, low, end in (("RANK", 0, size), ("LOCAL_RANK", 0, local_size), ("MASTER_PORT", 1, 2**16)):
        _number(env, name, low, end)
    return env


def _number(env: Mapping[str, str], name: str, low: int, end: int) -> int:
    """Parse one of torchrun's variables, a number from `low` to below `end`."""
    value = env[name]
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
    """Join the ranks that torchrun started, or become rank 0 and start the others; a single device needs neither.

    Args:
        devices: the devices of the processes on this machine, one each.
        command: the command line of this program, which starts another rank.
        shard: whether weights, gradients and optimizer state are divided among the ranks.
    """
    if env := torchrun_env():
        from torch.distributed.rendezvous import rendezvous

        if MAIN_PID_ENV in os.environ:
            set_parent_death_signal(int(os.environ[MAIN_PID_ENV]))
        try:
            store, _, _ = next(rendezvous("env://"))
        except dist.DistError as error:
            where = f"MASTER_ADDR={env['MASTER_ADDR']} and MASTER_PORT={env['MASTER_PORT']}"
            raise ConfigError(
                f"the processes of this run do not meet at {where}: {str(error).splitlines()[0]}"
            ) from error
        with init_process_group(env, devices[int(env["LOCAL_RANK"])], store, shard) as ranks:
            yield ranks
        return
    if len(devices) == 1:
        yield SINGLE_PROCESS
        return
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    main_env, *other_envs = rank_envs(len(devices), store.port)
    processes = RankProcesses()
    try:
        for env in other_envs:
            processes.start(env, command)
        with init_process_group(main_env, devices[0], store, shard) as ranks:
            try:
                yield ranks
            finally:
                processes.ending = True
    finally:
        processes.wait()


def rank_envs(size: int, port: int) -> list[dict[str, str]]:
    """Return torchrun's variables for each of `size` processes on this machine."""
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{k: str(v) for k, v in {"RANK": i, "LOCAL_RANK": i, **shared}.items()} for i in range(size)]


@contextlib.contextmanager
def init_process_group(
    env: Mapping[str, str], device: torch.device, store: Any, shard: bool = False
) -> Iterator[DistributedContext]:
    """Form a process group with one rank per device: gloo between CPUs and for signals, NCCL between GPUs."""
    if interface := interface_to(env["MASTER_ADDR"]):
        # gloo would choose the interface that this machine's name resolves to, which is often a loopback
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    ranks = DistributedContext(rank, size, shard, store)
    try:
        if device.type == "cuda":  # NCCL allocates at its first sum; this one comes before torch has taken all memory
            dist.all_reduce(torch.zeros(BUCKET, device=device))
        yield ranks
    finally:
        if ranks.is_main_process:
            ranks.broadcast_run_id("")
        dist.destroy_process_group()


def interface_to(host: str) -> str | None:
    """Return the network interface by which this machine reaches a host; None where it cannot be found out."""
    if sys.platform != "linux":
        return None
    import fcntl

    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        own_address = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                if fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))[20:24] == own_address:
                    return name
    return None


class RankProcesses:
    """The processes of the other ranks. When one of them dies, this process aborts, since it cannot train alone."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ending = False

    def start(self, env: Mapping[str, str], command: Sequence[str]) -> None:
        """Start the rank that torchrun's variables in `env` describe."""
        process = signals.start(command, {**env, MAIN_PID_ENV: str(os.getpid())})
        self.processes.append(process)
        threading.Thread(target=self._watch, args=(env["RANK"], process), daemon=True).start()

    def wait(self) -> None:
        """Wait until all have ended; kill those that do not, or all at once where no end was announced to them."""
        deadline = time.monotonic() + SHUTDOWN_TIMEOUT * self.ending
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _watch(self, rank: str, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if not self.ending:
            log.error("rank %s ended with exit code %d: this worker ends, its run is kept to go on", rank, code)
            os.abort()


def bucketed(items: Iterable[T], numel: Callable[[T], int]) -> Iterator[list[T]]:
    """Group items in order into buckets of at most BUCKET numbers; a larger item has a bucket of its own."""
    bucket: list[T] = []
    for item in items:
        if bucket and sum(map(numel, bucket)) + numel(item) > BUCKET:
            yield bucket
            bucket = []
        bucket.append(item)
    if bucket:
        yield bucket


def set_parent_death_signal(main_pid: int) -> None:
    """Let the kernel kill this process when rank 0 ends, however it ends.

    Where the system cannot do that, the next collective fails.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != main_pid:  # rank 0 ended before
            os.kill(os.getpid(), signal.SIGKILL)
