"""Distributed training: the processes that train one run together, one per device, and how they agree.

Each learns its place from torchrun's variables, whoever started it: `session.supervise` on one machine, srun over
several nodes, or torchrun. Rank 0 holds the lease of a run and alone writes records. Every rank computes the gradient
of its rows of the global batch, and DistributedDataParallel or FSDP sums it over the ranks. A rank that fails ends its
process, with which every collective of the others fails: whoever started them starts them again, from the checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from mupsweep.errors import ConfigError

BUCKET = 2**24  # numbers that are sent in one collective, as a rule: 64 MiB in fp32
TORCHRUN_ENV = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
RUN_WAIT_TIMEOUT = timedelta(days=30)  # how long a rank waits for its next run
SIOCGIFADDR = 0x8915  # netdevice(7)


class Signal(IntEnum):
    """What a rank would do before a step; the largest of all ranks is what every rank does."""

    OK = 0
    SAVE = 1
    STOP = 2
    LEASE_LOST = 3


@dataclass
class DistributedContext:
    """One process's view of the processes that train a run together.

    Attributes:
        rank: the number of this process; 0 is the main process.
        size: the number of processes.
        store: the key-value store that the ranks share outside of training; None for a single process.
        run_counter: the number of runs that were started together so far.
    """

    rank: int = 0
    size: int = 1
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

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def gather_object(self, value: Any) -> list[Any]:
        """Return the values of all ranks on rank 0, and an empty list elsewhere."""
        gathered = [None] * self.size if self.is_main_process else None
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


SINGLE_PROCESS = DistributedContext()


class SignalExchange:
    """The signals of all ranks, exchanged in the background of a step, between CPUs, so that no rank waits for them."""

    def __init__(self, ranks: DistributedContext) -> None:
        self.is_alone = ranks.size == 1
        self.pending: tuple[dist.Work, Tensor] | None = None

    def __call__(self, signal: Signal) -> Signal:
        """Pass this rank's signal and return the largest that the ranks passed a step ago; one alone gets its own."""
        if self.is_alone:
            return signal
        largest = Signal.OK
        if self.pending is not None:
            work, passed = self.pending
            work.wait()
            largest = Signal(int(passed))
        # a signal that is acted upon now is not passed once more
        passed = torch.tensor(int(signal if signal > largest else Signal.OK))
        work = dist.all_reduce(passed, dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self.pending = work, passed
        return largest


def torchrun_env() -> dict[str, str]:
    """Return torchrun's variables as torchrun, a job script or a supervisor set them; empty for a single process.

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


def rank_envs(size: int, port: int) -> list[dict[str, str]]:
    """Return torchrun's variables for each of `size` processes on this machine, whose store the caller serves."""
    shared = {
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,  # rank 0 serves no store
        "TORCHELASTIC_RESTART_COUNT": 0,
    }
    return [{k: str(v) for k, v in {"RANK": i, "LOCAL_RANK": i, **shared}.items()} for i in range(size)]


@contextlib.contextmanager
def process_group(env: Mapping[str, str], device: torch.device) -> Iterator[DistributedContext]:
    """Form a process group with one rank per device: gloo between CPUs, NCCL between GPUs.

    Args:
        env: torchrun's variables, which are also in the environment; empty for a single process, which needs no group.
        device: the device of this rank.
    """
    if not env:
        yield SINGLE_PROCESS
        return
    if interface := interface_to(env["MASTER_ADDR"]):
        # gloo would choose the interface that this machine's name resolves to, which is often a loopback
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
    try:
        store, _, _ = next(rendezvous("env://"))
    except dist.DistError as error:
        where = f"MASTER_ADDR={env['MASTER_ADDR']} and MASTER_PORT={env['MASTER_PORT']}"
        raise ConfigError(f"the processes of this run do not meet at {where}: {str(error).splitlines()[0]}") from error
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    ranks = DistributedContext(rank, size, store)
    if device.type == "cuda":  # NCCL allocates at its first sum; this one comes before torch has taken all memory
        dist.all_reduce(torch.zeros(BUCKET, device=device))
    try:
        yield ranks
    finally:  # also after an error, or the others would wait for a run until they are killed
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
