"""Token files and the streams that read them by memory map.

Tokens are little-endian and lie end to end. What says their type:

    llm.c        a header of 256 int32, the first three of which are magic number, version and number of tokens: uint16
                 after GPT-2's magic number, uint32 after Llama 3's
    Megatron-LM  the index NAME.idx beside NAME.bin, which holds the type and the length of every sequence
    nanoGPT      nothing: uint16
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

HEADER_BYTES = 1024
UINT16, UINT32 = "<u2", "<u4"
LLM_C = {UINT16: (20240520, 1), UINT32: (20240801, 7)}  # (magic, version): llm.c, dev/data/data_common.py at 16635d4
WIDE = 65_536  # a vocabulary of so many ids or more is stored in uint32

# The index of Megatron-LM (megatron/core/datasets/indexed_dataset.py at 00caa53): this text, the version 1 as uint64,
# the code of a type as uint8, the numbers of sequences and of documents as uint64, the length of every sequence as
# int32, and offsets of 8 bytes per sequence and per document.
MEGATRON_HEAD, MEGATRON_HEAD_BYTES = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1), 34
MEGATRON_TYPES = {1: "|u1", 3: "<i2", 4: "<i4", 5: "<i8", 8: UINT16}


def item_bytes(dtype: str) -> int:
    """The bytes of a token of a type."""
    return int(dtype[-1])


def token_dtype(vocab_size: int) -> str:
    """The type of the tokens of a vocabulary in our shards, as numpy spells it."""
    return UINT16 if vocab_size < WIDE else UINT32


@dataclass(frozen=True)
class Segment:
    """`tokens` tokens of the type `dtype` in the file `path`, from byte `offset` on."""

    path: Path
    offset: int
    tokens: int
    dtype: str = UINT16

    def open(self) -> NDArray[np.integer]:
        """The tokens (tokens,), memory-mapped and read-only."""
        import numpy as np

        if not self.tokens:
            return np.zeros(0, dtype=self.dtype)
        # A plain array over the mapping: slicing the memmap subclass costs ten times as much.
        return np.asarray(np.memmap(self.path, dtype=self.dtype, mode="r", offset=self.offset, shape=(self.tokens,)))


def segment(path: Path, vocab_size: int = 0) -> Segment:
    """A token file: with llm.c's header, with Megatron-LM's index, or with neither as nanoGPT writes it.

    Args:
        vocab_size: of the tokenizer that wrote the file, which tells whether a file can be nanoGPT's; 0 for a shard.

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
        for dtype, (known_magic, known_version) in LLM_C.items():
            if magic != known_magic:
                continue
            if version != known_version:
                raise DataError(
                    f"{path} has llm.c's header in version {version}: only version {known_version} is known"
                )
            expected = HEADER_BYTES + item_bytes(dtype) * count
            if size != expected:
                raise DataError(f"{path} is damaged: {size} bytes, but its header promises {expected}")
            return Segment(path, HEADER_BYTES, count, dtype)
    index = megatron_index(path)
    if index is not None:
        return _indexed(path, size, index)
    if vocab_size >= WIDE:
        raise DataError(
            f"{path} has neither llm.c's header nor Megatron's index {path.with_suffix('.idx').name} beside it, so its "
            f"tokens are uint16, but data.tokenizer has {vocab_size:,} ids: put the index there, or write llm.c's "
            f"header of magic {LLM_C[UINT32][0]} before uint32 tokens"
        )
    if size == 0 or size % 2:
        raise DataError(f"{path} is no token file: {size} bytes cannot be uint16 tokens")
    return Segment(path, 0, size // 2)


@dataclass(frozen=True)
class MegatronIndex:
    """An index of Megatron-LM: the type of the tokens, as numpy spells it, and their number."""

    dtype: str
    tokens: int


def megatron_index(path: Path) -> MegatronIndex | None:
    """The index beside the token file `path`; None where there is none.

    Raises:
        DataError: it cannot be read, is no such index, or is cut.
    """
    index_path = path.with_suffix(".idx")
    if not index_path.is_file():
        return None
    try:
        with open(index_path, "rb") as file:
            head = file.read(MEGATRON_HEAD_BYTES)
        size = index_path.stat().st_size
    except OSError as error:
        raise DataError(f"{index_path} cannot be read: {error.strerror}") from error
    if len(head) < MEGATRON_HEAD_BYTES or not head.startswith(MEGATRON_HEAD):
        raise DataError(
            f"{index_path} is no index of Megatron-LM, version 1: move it away if {path.name} is no file of Megatron-LM"
        )
    code, sequences, documents = struct.unpack("<BQQ", head[len(MEGATRON_HEAD) :])
    if code not in MEGATRON_TYPES:
        raise DataError(f"{index_path} says that its tokens have type {code}: valid are {sorted(MEGATRON_TYPES)}")
    expected = MEGATRON_HEAD_BYTES + 12 * sequences + 8 * documents
    if size < expected:  # it is longer where it also has a byte per sequence, of multimodal data
        raise DataError(f"{index_path} is damaged: {size} bytes, but it promises {expected}")
    lengths = Segment(index_path, MEGATRON_HEAD_BYTES, sequences, "<i4").open()
    return MegatronIndex(MEGATRON_TYPES[code], int(lengths.sum(dtype="int64")))


def _indexed(path: Path, size: int, index: MegatronIndex) -> Segment:
    """The tokens of a file of Megatron-LM, its sequences end to end."""
    expected = item_bytes(index.dtype) * index.tokens
    if size != expected:
        raise DataError(f"{path} is damaged: {size} bytes, but {path.with_suffix('.idx').name} promises {expected}")
    return Segment(path, 0, index.tokens, index.dtype)


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
