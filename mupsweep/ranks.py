"""Ranks: the processes that train one run together, a device each, and how they agree.

Rank 0 is the worker: it claims runs, starts the other ranks and alone writes records. Every rank computes the gradient
of its rows of the global batch, and sums it with the others'; all weights and optimizer state are on each, unless they
are sharded. What only one of them knows (a signal, an error, memory that ran out) is told in `exchange`, which comes
before whatever takes all of them, and at the end of every run: so nobody waits for a rank that has left the run.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mupsweep.errors import ConfigError

log = logging.getLogger("mupsweep")

T = TypeVar("T")

OK, SAVE, STOP, OUT_OF_MEMORY, FAILED = range(5)  # the worst of the ranks' words is everybody's
BUCKET = 2**24  # numbers that are summed at once: 64 MiB in fp32
RANK, PORT = "MUPSWEEP_RANK", "MUPSWEEP_PORT"  # of the environment that rank 0 gives to the others
LONG = timedelta(days=30)  # how long a rank waits for its next run
PR_SET_PDEATHSIG = 1  # prctl(2)


class Interrupted(Exception):
    """The run was asked to stop; it is checkpointed and goes on when it is started again."""


class Agreed(Exception):
    """Every rank leaves the run at the same place, so nobody needs to be told."""


class PeerFailed(Agreed):
    """Another rank cannot go on, with its reason."""


class PeerLacksMemory(Exception):
    """Another rank has too little memory for the step that all are at; nothing is left to be exchanged about it."""


class OutOfMemory(Agreed):
    """Some device has too little memory for a step with the smallest pieces."""


@dataclass
class Ranks:
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
    def leads(self) -> bool:
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

    def exchange(self, word: int = OK) -> int:
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

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replace every tensor by its sum over the ranks; they are of one dtype and one device."""
        if self.size == 1:
            return
        for bucket in packed(tensors, Tensor.numel):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(flat)
            for tensor, total in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(total.view_as(tensor))

    def go_on(self) -> None:
        """Find out, before anything that takes all of them, whether all of them come.

        Raises:
            PeerFailed: a rank left the run.
            PeerLacksMemory: a rank left this step.
        """
        if self.exchange() == OUT_OF_MEMORY:
            raise PeerLacksMemory

    def trade(self, parcels: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send every rank the next `sent` numbers of `parcels`; what came from each, `received` of them, in order."""
        came = parcels.new_empty(sum(received))
        self.go_on()
        dist.all_to_all_single(came, parcels, list(received), list(sent))
        return came

    def collect(self, value: Any) -> list[Any]:
        """Everybody's value on rank 0, and nothing elsewhere."""
        everybody = [None] * self.size if self.leads else None
        self.go_on()
        dist.gather_object(value, everybody)
        return everybody or []

    def tell(self, run_id: str) -> None:
        """Begin a run on every other rank; "" ends them."""
        if self.size > 1:
            self.told += 1
            self.store.set(f"run-{self.told}", run_id)

    def next_run(self) -> str:
        """The run that rank 0 begins next; "" for none."""
        self.told += 1
        self.store.wait([f"run-{self.told}"], LONG)
        return self.store.get(f"run-{self.told}").decode()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """One run: when it ends on one rank, it ends on all of them.

        Raises:
            PeerFailed: another rank left the run with an error.
        """
        try:
            yield
        except (Agreed, Interrupted) as end:
            if isinstance(end, Interrupted):
                self.exchange()
            raise
        except Exception as error:
            if self.size > 1:
                self._leave(error)
            raise
        self.exchange()

    def _leave(self, error: Exception) -> None:
        """Tell the others, wherever they are, that this rank cannot go on."""
        try:
            first = (str(error).splitlines() or [""])[0]
            self.store.set(f"failure-{self.told}", f"rank {self.rank}: {type(error).__name__}: {first}")
            self._worst(FAILED)
        except Exception:
            log.error("the other ranks cannot be reached any more (%s): this worker ends", error)
            os.abort()  # a launcher starts another worker, which goes on from the last checkpoint

    def _worst(self, word: int) -> int:
        words = torch.tensor(word)
        dist.all_reduce(words, dist.ReduceOp.MAX)
        return int(words)


ALONE = Ranks()


@contextlib.contextmanager
def gathered(devices: Sequence[torch.device], command: Sequence[str], shard: bool = False) -> Iterator[Ranks]:
    """This process among those of `devices`: rank 0, which starts the others, or one that rank 0 started.

    Args:
        devices: one per rank.
        command: starts this program; the other ranks are told theirs by the environment.
        shard: as in `Ranks`.
    """
    if len(devices) == 1:
        yield ALONE
        return
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    if RANK in os.environ:
        _die_with_parent()
        rank = int(os.environ[RANK])
        with connected(rank, devices, TCPStore("127.0.0.1", int(os.environ[PORT])), shard) as ranks:
            yield ranks
        return
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    followers = Followers()
    try:
        for rank in range(1, len(devices)):
            followers.start(rank, command, store.port)
        with connected(0, devices, store, shard) as ranks:
            try:
                yield ranks
            finally:
                followers.ending = True
                ranks.tell("")
    finally:
        followers.wait()


@contextlib.contextmanager
def connected(rank: int, devices: Sequence[torch.device], store: Any, shard: bool = False) -> Iterator[Ranks]:
    """A process group with a rank per device: gloo between CPUs, and for words; NCCL between GPUs."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
    backend = "cpu:gloo,cuda:nccl" if devices[rank].type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=len(devices))
    try:
        yield Ranks(rank, len(devices), shard, store)
    finally:
        dist.destroy_process_group()


class Followers:
    """The processes of the other ranks. If one of them dies, so does this one: alone it cannot go on."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ending = False

    def start(self, rank: int, command: Sequence[str], port: int) -> None:
        """One more."""
        environment = {**os.environ, RANK: str(rank), PORT: str(port)}
        process = subprocess.Popen(list(command), stdin=subprocess.DEVNULL, env=environment)
        self.processes.append(process)
        threading.Thread(target=self._watch, args=(rank, process), daemon=True).start()

    def wait(self) -> None:
        """Until all have ended, as they were told to; where they could not be told, they are killed."""
        for process in self.processes:
            if not self.ending:
                process.kill()
            process.wait()

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if not self.ending:
            log.error("rank %d ended with exit code %d: this worker ends, its run is kept to go on", rank, code)
            os.abort()


def packed(things: Iterable[T], numbers: Callable[[T], int]) -> Iterator[list[T]]:
    """Things in order, as many at a time as their numbers fill a bucket."""
    bucket: list[T] = []
    for thing in things:
        if bucket and sum(map(numbers, bucket)) + numbers(thing) > BUCKET:
            yield bucket
            bucket = []
        bucket.append(thing)
    if bucket:
        yield bucket


def _die_with_parent() -> None:
    """No rank outlives rank 0, however that ends; where the system cannot promise it, the next exchange fails."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
