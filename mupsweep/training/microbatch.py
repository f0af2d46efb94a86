"""A global batch in pieces that fit: this rank's rows, in micro-batches, with the gradient and loss of the whole."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from mupsweep.training.distributed import (
    OK,
    OUT_OF_MEMORY,
    SINGLE_PROCESS,
    DistributedContext,
    OutOfMemory,
    PeerOutOfMemory,
)

log = logging.getLogger("mupsweep")

T = TypeVar("T")
OUT_OF_MEMORY_TEXTS = (  # what is said of it in other RuntimeErrors
    "DefaultCPUAllocator",
    "MPS backend out of memory",
    ": out of memory",  # CUDA's and Triton's, where they load a kernel beside a full allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
)


@dataclass
class MicroBatcher:
    """How global batches are computed.

    Attributes:
        ranks: who shares them.
        micro_batch: the most sequences of a piece; None for no limit.
        forced: the same, found by running out of memory.
        rewrap: of a sharded run (`TrainingSetup.rewrap`).
    """

    ranks: DistributedContext = field(default_factory=lambda: SINGLE_PROCESS)
    micro_batch: int | None = None
    forced: int | None = None
    reapply_fsdp: Callable[[], None] | None = None

    def pieces(self, *tensors: Any) -> Iterator[tuple[Any, ...]]:
        """This rank's rows of some tensors, piece by piece."""
        step = self._rows(len(tensors[0]))
        for start in range(0, len(tensors[0]), step):
            yield tuple(tensor[start : start + step] for tensor in tensors)

    def backward(self, parameters: Iterable[Parameter], loss_of: Callable[..., Tensor], *mine: Tensor) -> Tensor:
        """Leave the gradient of the global batch's mean loss in the parameters, or in this rank's shards of them.

        Args:
            loss_of: the mean loss of a piece, given its rows of `mine`.
            mine: this rank's rows.

        Returns:
            The mean loss of the global batch.
        """
        weights, n_rows = list(parameters), len(mine[0]) * self.ranks.size

        def compute() -> Tensor:
            total = torch.zeros((), device=mine[0].device)
            for parameter in weights:
                parameter.grad = None  # a try before may have left a part
            for piece in self.pieces(*mine):
                loss = loss_of(*piece) * (len(piece[0]) / n_rows)
                loss.backward()
                total += loss.detach()
            return total

        loss = self.fitting(compute, len(mine[0]))
        whole = [] if self.reapply_fsdp else [w.grad for w in weights if w.grad is not None]
        self.ranks.add([*whole, loss])
        return loss

    def fitting(self, compute: Callable[[], T], n_rows: int) -> T:
        """What `compute` returns for `n_rows` rows of this rank, in smaller pieces while any rank lacks memory.

        Raises:
            OutOfMemory: pieces of one row do not fit.
        """
        while True:
            made, word, cause = None, OK, ""
            try:
                made = compute()
            except PeerOutOfMemory:
                word = None
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                word, cause = OUT_OF_MEMORY, f"{type(error).__name__}: {error}".splitlines()[0]
            # what the failed try held is free from here on
            if word is not None and self.ranks.all_reduce_max(word) != OUT_OF_MEMORY:
                return made  # type: ignore[return-value]
            if self.reapply_fsdp:
                self.reapply_fsdp()
            if self._rows(n_rows) == 1:
                raise OutOfMemory(cause or "on another rank")
            self.forced = self._rows(n_rows) // 2
            log.warning("out of memory (%s): going on with micro-batches of %d", cause or "another rank", self.forced)
            free_memory()

    def _rows(self, n_rows: int) -> int:
        return min(rows for rows in (n_rows, self.micro_batch, self.forced) if rows is not None)


def free_memory() -> None:
    """Give up memory that nothing uses any more: reference cycles keep whole networks, and torch what it ever had, also
    from another process on the same GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that a device or the host has too little memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError | OutOfMemory):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY_TEXTS)
