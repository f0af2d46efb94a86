"""Token files and the streams that read them by memory map.

A token file holds uint16, little-endian: without a header, as nanoGPT writes it, or after llm.c's header of 256 int32,
the first three of which are magic number, version and number of tokens.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mupsweep.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
MAGIC_LLAMA3 = 20240801  # of llm.c's uint32 token files


@dataclass(frozen=True)
class Segment:
    """`tokens` uint16 tokens of the file `path`, from byte `offset` on."""

    path: Path
    offset: int
    tokens: int

    def open(self) -> NDArray[np.uint16]:
        """The tokens (tokens,), memory-mapped and read-only."""
        import numpy as np

        if not self.tokens:
            return np.zeros(0, dtype=np.uint16)
        # A plain array over the mapping: slicing the memmap subclass costs ten times as much.
        return np.asarray(np.memmap(self.path, dtype="<u2", mode="r", offset=self.offset, shape=(self.tokens,)))


def segment(path: Path) -> Segment:
    """A token file: with llm.c's header, or headerless as nanoGPT writes it.

    Raises:
        DataError: an unreadable file, an unknown version or kind of header, or a size that contradicts the header.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            head = handle.read(12)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if len(head) == 12:
        magic, version, count = struct.unpack("<3i", head)
        if magic == MAGIC:
            if version != VERSION:
                raise DataError(f"{path} has llm.c's header in version {version}: only version {VERSION} is known")
            if size != HEADER_BYTES + 2 * count:
                raise DataError(f"{path} is damaged: {size} bytes, but its header promises {HEADER_BYTES + 2 * count}")
            return Segment(path, HEADER_BYTES, count)
        if magic == MAGIC_LLAMA3:
            raise DataError(f"{path} holds Llama 3 tokens in uint32 (llm.c): only uint16 tokens are read")
    if size == 0 or size % 2:
        raise DataError(f"{path} is no token file: {size} bytes cannot be uint16 tokens")
    return Segment(path, 0, size // 2)


class TokenStream:
    """The tokens of several files laid end to end, memory-mapped."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._files = [s.open() for s in segments]
        self._starts = [0]  # the position at which every file begins, and the total
        for tokens in self._files:
            self._starts.append(self._starts[-1] + len(tokens))

    def __len__(self) -> int:
        return self._starts[-1]

    def n_blocks(self, context: int) -> int:
        """The number of blocks of `context` tokens; the last target of a block is the first input of the next."""
        return max(0, (len(self) - 1) // context)

    def blocks(self, indices: Iterable[int] | NDArray[np.int64], context: int) -> NDArray[np.int64]:
        """(B, context + 1): block b is the tokens b * context to b * context + context, both included.

        Raises:
            IndexError: a block that is not in [0, n_blocks(context)).
        """
        import numpy as np

        block_indices = [int(i) for i in indices]
        total = self.n_blocks(context)
        out = np.empty((len(block_indices), context + 1), dtype=np.int64)
        for row, index in zip(out, block_indices, strict=True):
            if not 0 <= index < total:
                raise IndexError(f"block {index} of {total}")
            self._copy(index * context, row)
        return out

    def _copy(self, start: int, out: NDArray[np.int64]) -> None:
        """Fill `out` with the tokens from position `start` on, across the ends of files."""
        file = bisect.bisect_right(self._starts, start) - 1
        filled = 0
        while filled < len(out):
            tokens = self._files[file][start + filled - self._starts[file] :][: len(out) - filled]
            out[filled : filled + len(tokens)] = tokens
            filled, file = filled + len(tokens), file + 1
