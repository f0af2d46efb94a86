"""The data room: a corpus in, batches of token ids out, the same for every run of a sweep.

    DataConfig -> source (documents) -> tokenizer -> token shards on disk -> Dataset -> batches

`prepare` does the first four steps once per machine and opens the result; `fingerprint` names that result
without making it. A batch is a pure function of (content id, context, batch size, seed, step): no worker, no
state, no shuffle buffer, so resuming needs only a step number. Losses of different vocabularies compare
through `byte_count`.

    sources/        where documents come from: one file a source; local.py also reads ready token files
    tokenizers.py   bytes, gpt2 and gpt2 truncated to V tokens
    preparation.py  documents -> shards: in parallel, once, and on from where an interruption left it
    shards.py       the prepared corpus on disk: its format, its digests
    cache.py        where prepared corpora lie, which there are, who prepares one now
    streams.py      token files read by memory map, ours and other people's
    sampler.py      the permutation of the blocks of an epoch

Nothing here imports torch; importing this module, `vocab_size` and `fingerprint` import no numpy either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mupsweep.data import cache, preparation, shards, sources, tokenizers
from mupsweep.data.config import DataConfig
from mupsweep.data.streams import TokenStream
from mupsweep.data.tokenizers import vocab_size
from mupsweep.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Dataset", "TokenStream", "epochs_remark", "fingerprint", "prepare", "vocab_size"]


def prepare(config: DataConfig, progress: Callable[[str], None] | None = None) -> Dataset:
    """The corpus of `config` as tokens: prepared on the first call, opened afterwards.

    Args:
        config: the `data` section.
        progress: told in a line now and then what is being done; not called when nothing is to be done.

    Raises:
        DataError: anything wrong with the corpus, its files, the tokenizer or the cache, in one line.
    """
    size = tokenizers.vocab_size(config.tokenizer)
    source = sources.load(config)
    content = cache.content_id(config, source.fingerprint())
    ready = source.ready_tokens()
    if ready is not None:
        train, validation = TokenStream(ready.train), TokenStream(ready.validation)
    else:
        train, validation = shards.streams(preparation.prepare(source, config, content, progress))
    return Dataset(content, config.tokenizer, size, train, validation)


def fingerprint(config: DataConfig) -> str:
    """The content id (sha256, hexadecimal) of the tokens and split that `prepare` gives; makes nothing.

    Raises:
        DataError: an unknown tokenizer or source, or a corpus that is not there.
    """
    tokenizers.vocab_size(config.tokenizer)
    return cache.content_id(config, sources.load(config).fingerprint())


def epochs_remark(config: DataConfig, tokens: int) -> str | None:
    """What to say of a run that trains on `tokens` tokens, more than its corpus has; None where it does not.

    Also None for a corpus that is not prepared yet: nobody knows its size.
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
    if tokens <= size:
        return None
    return (
        f"a run trains on {tokens:,} tokens, {tokens / size:.1f} times the {size:,} training tokens of "
        f"data={config.name}: text repeats after the first epoch"
    )


@dataclass(frozen=True)
class Dataset:
    """A prepared corpus. Token ids are int64 below `vocab_size`.

    Attributes:
        content_id: sha256 of all that the tokens and the split depend on.
        tokenizer: its name.
        vocab_size: number of ids.
        train: the training tokens.
        validation: the validation tokens.
    """

    content_id: str
    tokenizer: str
    vocab_size: int
    train: TokenStream
    validation: TokenStream

    def require(self, context: int, batch_size: int) -> None:
        """Refuse a corpus that is too small for a batch.

        Raises:
            DataError: naming the split.
        """
        self._enough("train", self.train, context, batch_size)
        self._enough("validation", self.validation, context, batch_size)

    def train_batch(self, context: int, batch_size: int, seed: int, step: int) -> NDArray[np.int64]:
        """(batch_size, context + 1) tokens of optimizer step `step`: inputs [:, :-1], targets [:, 1:].

        Raises:
            DataError: the training split is smaller than one batch, or holds an id beyond the vocabulary.
        """
        from mupsweep.data.sampler import batch_blocks

        total = self._enough("train", self.train, context, batch_size)
        return self._checked(self.train.blocks(batch_blocks(total, batch_size, seed, step), context))

    def validation_batches(self, context: int, batch_size: int) -> int:
        """How many whole validation batches there are, at least one.

        Raises:
            DataError: the validation split is smaller than one batch.
        """
        return self._enough("validation", self.validation, context, batch_size) // batch_size

    def validation_batch(self, context: int, batch_size: int, index: int) -> NDArray[np.int64]:
        """(batch_size, context + 1) tokens of validation batch `index`: in order, the same for every run.

        Raises:
            DataError: there is no such batch.
        """
        batches = self.validation_batches(context, batch_size)
        if not 0 <= index < batches:
            raise DataError(
                f"validation batch {index} of {batches}: {len(self.validation)} tokens hold no more at "
                f"context {context} and batch size {batch_size}; lower training.eval_batches or raise "
                "data.validation_fraction"
            )
        return self._checked(self.validation.blocks(range(index * batch_size, (index + 1) * batch_size), context))

    def byte_count(self, targets: NDArray[np.integer]) -> int:
        """Bytes of text that the target ids stand for: bits per byte = summed nats / ln 2 / bytes."""
        return int(tokenizers.load(self.tokenizer).byte_lengths[targets].sum())

    def _enough(self, split: str, stream: TokenStream, context: int, batch_size: int) -> int:
        """The number of blocks of the split, at least one batch of them."""
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
        largest = int(batch.max())
        if largest >= self.vocab_size:  # token files are only sampled when they are opened
            raise DataError(
                f"the corpus holds token {largest}, but data.tokenizer={self.tokenizer} ends at "
                f"{self.vocab_size - 1}: set data.tokenizer to the one that wrote the file"
            )
        return batch
