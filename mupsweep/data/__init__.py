"""Data: a corpus in, batches of token ids out, identical for every run of a sweep.

    DataConfig -> source (documents) -> tokenizer -> token shards on disk -> Dataset -> batches

`prepare` does the steps up to the shards once per machine and opens the result; `fingerprint` identifies that result
without making it. A batch is a pure function of (content id, context, batch size, seed, step): there is no worker, no
state and no shuffle buffer, so resuming needs only a step number. `byte_count` turns losses into bits per byte, which
compare across vocabularies.

    sources/        where documents come from, one file per source; local.py also reads ready token files
    tokenizers.py   bytes, gpt2 and gpt2 truncated to V tokens, tiktoken's encodings
    tokenizer_json.py  tokenizers of Hugging Face's tokenizers: the target's own
    preparation.py  documents -> shards: in parallel, once, resumable after an interruption
    shards.py       the prepared corpus on disk: its format and digests
    cache.py        the folder of prepared corpora: its entries, and the lock of a corpus that is being prepared
    streams.py      token files read by memory map, ours and other people's
    sampler.py      the permutation of the blocks of an epoch

Nothing here imports torch; importing this module, `vocab_size` and `fingerprint` import no numpy either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mupsweep.data import cache, preparation, shards, sources, tokenizers
from mupsweep.data.config import DataConfig
from mupsweep.data.streams import TokenStream
from mupsweep.data.tokenizers import vocab_size
from mupsweep.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EVEN = 16  # a multiple of the validation blocks that an evaluation reads

__all__ = ["Dataset", "TokenStream", "epochs_remark", "fingerprint", "prepare", "vocab_size"]


def prepare(config: DataConfig, progress: Callable[[str], None] | None = None) -> Dataset:
    """The corpus of `config` as tokens: prepared on the first call, opened afterwards.

    Args:
        config: the `data` section.
        progress: called with a line of text now and then while the corpus is prepared; never where it is ready.

    Raises:
        DataError: anything wrong with the corpus, its files, the tokenizer or the cache, in one line.
    """
    size = tokenizers.vocab_size(config.tokenizer)
    source = sources.load(config)
    content = cache.content_id(config, source.fingerprint())
    ready = source.ready_tokens()
    if ready is not None:
        folder, (train, validation) = None, (TokenStream(ready.train), TokenStream(ready.validation))
    else:
        folder = preparation.prepare(source, config, content, progress)
        train, validation = shards.streams(folder)
    return Dataset(content, config.tokenizer, size, train, validation, folder, config.end_of_text)


def fingerprint(config: DataConfig) -> str:
    """The content id (sha256, hexadecimal) of the tokens and split that `prepare` returns, without preparing them.

    Raises:
        DataError: an unknown tokenizer or source, or a corpus that does not exist.
    """
    tokenizers.vocab_size(config.tokenizer)
    return cache.content_id(config, sources.load(config).fingerprint())


def epochs_remark(config: DataConfig, tokens: int) -> str | None:
    """A remark on a run that trains on `tokens` tokens where its corpus has fewer; None where it has enough.

    None also for a corpus that is not prepared yet, whose size is unknown.
    """
    source = sources.load(config)
    ready = source.ready_tokens()
    if ready is not None:
        size = sum(segment.tokens for segment in ready.train)
    else:
        folder = cache.folder(config, cache.content_id(config, source.fingerprint()))
        if not folder.exists():
            return None
        size = shards.meta(folder)["splits"]["train"]["tokens"]
    if tokens <= size or not size:  # of an empty corpus the training itself says what is wrong
        return None
    return (
        f"a run trains on {tokens:,} tokens, {tokens / size:.1f} times the {size:,} training tokens of "
        f"data={config.name}: text repeats after the first epoch"
    )


@dataclass(frozen=True)
class Dataset:
    """A prepared corpus. Token ids are int64 below `vocab_size`.

    Attributes:
        content_id: sha256 of everything that the tokens and the split depend on.
        tokenizer: name of the tokenizer.
        vocab_size: number of ids.
        train: the training tokens.
        validation: the validation tokens.
        folder: of the shards; None where token files are read as they are.
        end_of_text: `data.end_of_text`.
    """

    content_id: str
    tokenizer: str
    vocab_size: int
    train: TokenStream
    validation: TokenStream
    folder: Path | None = None
    end_of_text: str | None = None

    def require(self, context: int, batch_size: int) -> None:
        """Refuse a corpus that is too small for a batch.

        Raises:
            DataError: naming the split.
        """
        self._blocks_of("train", self.train, context, batch_size)
        self._blocks_of("validation", self.validation, context, batch_size)

    def train_batch(self, context: int, batch_size: int, seed: int, step: int) -> NDArray[np.int64]:
        """(batch_size, context + 1) tokens of optimizer step `step`; inputs are [:, :-1], targets [:, 1:].

        Raises:
            DataError: the training split is smaller than one batch, or holds an id beyond the vocabulary.
        """
        from mupsweep.data.sampler import batch_blocks

        total = self._blocks_of("train", self.train, context, batch_size)
        return self._checked(self.train.blocks(batch_blocks(total, batch_size, seed, step), context))

    def validation_blocks(self, context: int, tokens: int) -> list[int]:
        """The blocks of about `tokens` validation tokens, evenly spaced over the whole split; all of a smaller one.

        No batch size decides which they are. Their number is a multiple of EVEN, so that devices have equal shares,
        unless the split has fewer blocks.
        """
        total = self.validation.n_blocks(context)
        wanted = min(total, -(-tokens // (EVEN * context)) * EVEN)
        count = wanted - wanted % EVEN or wanted
        return [k * total // count for k in range(count)]

    def first_validation_blocks(self, context: int, batch_size: int, batches: int) -> list[int]:
        """The blocks of the first whole batches of the validation split.

        Raises:
            DataError: the validation split is smaller than one batch.
        """
        total = self._blocks_of("validation", self.validation, context, batch_size)
        return list(range(min(batches, total // batch_size) * batch_size))

    def validation_batch(self, context: int, blocks: Iterable[int]) -> NDArray[np.int64]:
        """(blocks, context + 1) tokens of some validation blocks; inputs are [:, :-1], targets [:, 1:]."""
        return self._checked(self.validation.blocks(blocks, context))

    def byte_count(self, targets: NDArray[np.integer]) -> int:
        """Bytes of text that the target ids encode: bits per byte = summed nats / ln 2 / bytes."""
        return round(float(self._byte_lengths[targets].sum()))

    @cached_property
    def _byte_lengths(self) -> NDArray[np.number]:
        """(vocab_size,) bytes of text per id: stored with the shards, which then need no tokenizer, or from it."""
        stored = None if self.folder is None else shards.byte_lengths(self.folder, self.vocab_size)
        return tokenizers.load(self.tokenizer, self.end_of_text).byte_lengths if stored is None else stored

    def _blocks_of(self, split: str, stream: TokenStream, context: int, batch_size: int) -> int:
        """The number of blocks of a split, which must be at least one batch of them."""
        blocks = stream.n_blocks(context)
        if blocks < batch_size:
            more = "raise data.validation_fraction" if split == "validation" else "use a larger corpus"
            raise DataError(
                f"the {split} split has {len(stream)} tokens, {blocks} blocks of context {context}: one "
                f"batch of {batch_size} needs {batch_size * context + 1}; lower training.batch_size or "
                f"model.context, or {more}"
            )
        return blocks

    def _checked(self, batch: NDArray[np.int64]) -> NDArray[np.int64]:
        """The batch, after a check that its ids are in the vocabulary."""
        smallest, largest = int(batch.min()), int(batch.max())
        if smallest < 0 or largest >= self.vocab_size:  # token files are only sampled when they are opened
            raise DataError(
                f"the corpus holds token {min(smallest, 0) or largest}, but data.tokenizer={self.tokenizer} ends at "
                f"{self.vocab_size - 1}: set data.tokenizer to the one that wrote the file"
            )
        return batch
