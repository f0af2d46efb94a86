"""Gradient accumulation: a rank's rows of the global batch in micro-batches that fit in memory."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from mupsweep.training.distributed import SINGLE_PROCESS, DistributedContext

log = logging.getLogger("mupsweep")

T = TypeVar("T")
OUT_OF_MEMORY_TEXTS = (  # by which a RuntimeError that is no OutOfMemoryError means one
    "DefaultCPUAllocator",
    "MPS backend out of memory",
    ": out of memory",  # CUDA and Triton, when they load a kernel while the allocator holds all memory
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # a handle that is made when no memory is left for it
    "CUSOLVER_STATUS_NOT_INITIALIZED",
)


class OutOfMemory(Exception):
    """The device has too little memory even for micro-batches of one sequence."""


class MicroBatchTooLarge(Exception):
    """A micro-batch did not fit in the memory of this rank's device, so that all ranks have to take smaller ones.

    Attributes:
        fitting: the size to go on with.
    """

    def __init__(self, cause: str, fitting: int) -> None:
        super().__init__(cause)
        self.fitting = fitting


@dataclass
class MicroBatcher:
    """Computes global batches in micro-batches, smaller ones after memory ran out.

    Attributes:
        ranks: the processes that share every global batch.
        micro_batch: the most sequences of a micro-batch; None for no limit.
        oom_micro_batch: the largest micro-batch that fitted in memory; None where memory never ran out.
        no_sync: makes the context of a backward pass that leaves the gradients of this rank alone
            (`DistributedDataParallel.no_sync`); those of all ranks are averaged in the pass of the last micro-batch.
    """

    ranks: DistributedContext = field(default_factory=lambda: SINGLE_PROCESS)
    micro_batch: int | None = None
    oom_micro_batch: int | None = None
    no_sync: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext

    def micro_batches(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Split tensors of this rank's rows into micro-batches, the same rows of each tensor."""
        return zip(*(tensor.split(self._size(len(tensor))) for tensor in tensors), strict=True)

    def backward(self, parameters: Iterable[Parameter], loss_of: Callable[..., Tensor], *local: Tensor) -> Tensor:
        """Leave the gradient of the global batch's mean loss in the parameters, or in this rank's shards of them.

        The network in `loss_of` averages gradients over the ranks, as DistributedDataParallel and FSDP do.

        Args:
            loss_of: the mean loss of a micro-batch, given its rows of each of the tensors `local`.
            local: this rank's rows of the global batch.

        Returns:
            This rank's part of the mean loss of the global batch, which is the sum of all parts.
        """
        weights, n_local = list(parameters), len(local[0])

        def accumulate() -> Tensor:
            total = torch.zeros((), device=local[0].device)
            for parameter in weights:
                parameter.grad = None  # an attempt that ran out of memory may have left part of a gradient
            micro_batches = list(self.micro_batches(*local))
            for number, micro_batch in enumerate(micro_batches, start=1):
                with contextlib.nullcontext() if number == len(micro_batches) else self.no_sync():
                    loss = loss_of(*micro_batch) * (len(micro_batch[0]) / n_local)
                    loss.backward()
                total += loss.detach()
            return total / self.ranks.size

        return self.retry_on_oom(accumulate, n_local)

    def retry_on_oom(self, compute: Callable[[], T], n_rows: int) -> T:
        """Return `compute()` for this rank's `n_rows` rows, halving the micro-batch while it runs out of memory.

        Raises:
            OutOfMemory: a micro-batch of one row does not fit.
            MicroBatchTooLarge: the other ranks have to take smaller micro-batches too.
        """
        while True:
            try:
                return compute()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                cause = f"{type(error).__name__}: {error}".splitlines()[0]
            # outside of the handler, which holds the tensors of the failed attempt through the traceback
            failed_size = self._size(n_rows)
            if failed_size == 1:
                raise OutOfMemory(cause)
            self.oom_micro_batch = failed_size // 2
            log.warning("out of memory (%s): going on with micro-batches of %d", cause, self.oom_micro_batch)
            if self.ranks.size > 1:
                raise MicroBatchTooLarge(cause, self.oom_micro_batch)
            free_memory()

    def _size(self, n_rows: int) -> int:
        """The size of a micro-batch of `n_rows` rows."""
        return min(rows for rows in (n_rows, self.micro_batch, self.oom_micro_batch) if rows is not None)


def free_memory() -> None:
    """Return unused memory to the system, which other processes on the GPU may need.

    Reference cycles keep whole networks alive, and torch's allocator keeps what it ever had.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that a device or the host has too little memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError | OutOfMemory):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY_TEXTS)
