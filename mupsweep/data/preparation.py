"""Preparation of a corpus: documents in, token shards out, once, however often it is requested or interrupted.

The split of a document is decided by its source or by the hash of its text, independent of the other documents. Every
document is followed by the end of text. `data.max_tokens` cuts the training split inside the document that reaches it,
and nothing is read beyond that: the validation split then holds the documents that came before the cut.

Where a split would stay empty, since there are few documents, it begins anew and cuts every document in two: its end is
in the validation split.

Everything is written into a hidden folder, under a lock, and renamed when it is complete. Now and then a checkpoint
records what is safely on the disk and the position of the reader: a later process continues from there and ends with
the bytes of an uninterrupted preparation.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mupsweep.atomic_files import replace_file
from mupsweep.data import cache, shards, tokenizers
from mupsweep.data.config import DataConfig
from mupsweep.data.shards import SPLITS, SplitWriter
from mupsweep.data.sources import Document
from mupsweep.data.streams import UINT16, token_dtype
from mupsweep.errors import DataError
from mupsweep.formatting import counted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mupsweep.data.sources import Reader, Source

BATCH_CHARACTERS = 1 << 20  # characters that a thread encodes at a time
MAX_THREADS = 16  # that encode; one thread reads and writes, and more encoders would wait for it
REPORT_SECONDS = 2.0  # between two lines of progress
CHECKPOINT_SECONDS = 20.0  # between two checkpoints

Progress = Callable[[str], None]


def prepare(
    source: Source,
    config: DataConfig,
    content: str,
    progress: Progress | None = None,
    shard_tokens: int = shards.SHARD_TOKENS,
) -> Path:
    """Encode the documents of `source` unless that was done before, and return the folder of the corpus.

    Several processes may call this at once; one of them encodes and the others wait.

    Raises:
        DataError: an error of the source, a split without documents, or a cache that cannot be written.
    """
    say = progress or (lambda text: None)
    dtype = token_dtype(tokenizers.vocab_size(config.tokenizer))
    target = cache.folder(config, content)
    if (target / "meta.json").is_file():
        return target
    partial = cache.partial(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with cache.lock(target, lambda: say(f"waiting: another process prepares {target}")):
            if not target.exists():
                if not (partial / "meta.json").is_file():
                    corpus = _PartialCorpus.open(partial, source, say, shard_tokens, dtype)
                    if not _write(corpus, source, config, content, say):
                        corpus = _PartialCorpus.new(partial, shard_tokens, dtype, cuts_documents=True)
                        _write(corpus, source, config, content, say)
                # the checkpoint, and temporary files of a process that was killed while it wrote
                for leftover in (*partial.glob(f"{Path(cache.CHECKPOINT).stem}.*"), *partial.glob(".*.tmp")):
                    leftover.unlink()
                os.replace(partial, target)
                _fsync(target.parent)
    except OSError as error:
        raise DataError(_write_failure(error, target.parent, kept=partial.exists())) from error
    return target


class _PartialCorpus:
    """A corpus that is being written into a hidden folder: its shards, and the checkpoint to resume from.

    Attributes:
        dtype: the type of its tokens.
        cuts_documents: whether every document is cut in two, one part for each split.
        hashed: whether the hash of some document decided its split.
    """

    def __init__(
        self,
        folder: Path,
        shard_tokens: int,
        dtype: str,
        checkpoint: dict[str, Any] | None = None,
        cuts_documents: bool = False,
    ) -> None:
        splits = checkpoint["splits"] if checkpoint else dict.fromkeys(SPLITS)
        self.folder = folder
        self.dtype = dtype
        self.position = checkpoint["position"] if checkpoint else None
        self.writers = {split: SplitWriter(folder, split, shard_tokens, splits[split], dtype) for split in SPLITS}
        self.cuts_documents = checkpoint.get("cuts_documents") is True if checkpoint else cuts_documents
        self.hashed = False
        self._saved = time.monotonic()

    @classmethod
    def new(cls, folder: Path, shard_tokens: int, dtype: str, cuts_documents: bool = False) -> _PartialCorpus:
        """An empty corpus, in place of whatever is in the folder."""
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        return cls(folder, shard_tokens, dtype, cuts_documents=cuts_documents)

    @classmethod
    def open(cls, folder: Path, source: Source, say: Progress, shard_tokens: int, dtype: str) -> _PartialCorpus:
        """The corpus of an interrupted process, or a new one; the caller holds the corpus's lock."""
        try:
            checkpoint = shards.read_header(folder / cache.CHECKPOINT)
            source.reader(checkpoint["position"])  # refuses one that cannot be
            resumed = cls(folder, shard_tokens, dtype, checkpoint)
            say(f"going on after {sum(w.documents for w in resumed.writers.values()):,} documents")
            return resumed
        except FileNotFoundError:
            pass  # no process began before, or it was stopped before its first checkpoint
        except (ValueError, KeyError):
            say(f"{folder} is damaged: beginning anew")
        return cls.new(folder, shard_tokens, dtype)

    def save(self, header: dict[str, Any], position: Any) -> None:
        """Write a checkpoint of what is on the disk, unless the last one is recent."""
        if time.monotonic() - self._saved < CHECKPOINT_SECONDS:
            return
        splits = {split: writer.state() for split, writer in self.writers.items()}
        _write_json(self.folder / cache.CHECKPOINT, {**header, "splits": splits, "position": position})
        self._saved = time.monotonic()

    def abandon(self) -> None:
        """Close the files, and delete them where there is no checkpoint to resume from."""
        for writer in self.writers.values():
            writer.discard()
        if not (self.folder / cache.CHECKPOINT).is_file():
            shutil.rmtree(self.folder, ignore_errors=True)


def _write(corpus: _PartialCorpus, source: Source, config: DataConfig, content: str, say: Progress) -> bool:
    """Write the shards and meta.json of a corpus, in the order of its documents.

    Returns:
        False where nothing is kept, since a split is empty that has something once documents are cut in two.
    """
    tokenizer = tokenizers.load(config.tokenizer, config.end_of_text)
    header = {
        "format": shards.FORMAT,
        "name": config.name,
        "content_id": content,
        "source": config.kind,
        **source.describe(),
        "fingerprint": source.fingerprint(),
        "tokenizer": tokenizer.name,
        "tokenizer_digest": tokenizer.digest,
        **({"dtype": corpus.dtype} if corpus.dtype != UINT16 else {}),
        "validation_fraction": config.validation_fraction,
        "max_tokens": config.max_tokens,
        **({"cuts_documents": True} if corpus.cuts_documents else {}),
    }
    try:
        report = _Report(say, config, source.rows(), corpus.writers)
        reader = source.reader(corpus.position)
        with contextlib.closing(_encoded(reader, tokenizer, config.validation_fraction, corpus)) as batches:
            for batch, position in batches:
                if _add(batch, corpus.writers, config.max_tokens, tokenizer):
                    break
                corpus.save(header, position)
                report()
        splits = {split: writer.close() for split, writer in corpus.writers.items()}
        empty = [split for split, writer in corpus.writers.items() if not writer.documents]
        if empty and corpus.hashed and not corpus.cuts_documents:
            total = counted(sum(writer.documents for writer in corpus.writers.values()), "document")
            say(
                f"{config.name}: none of its {total} is in the {empty[0]} split, so every document is cut: its last "
                f"{config.validation_fraction:.1%} are for validation"
            )
            return False
        _refuse_empty(config, corpus)
        digest = shards.write_byte_lengths(corpus.folder, tokenizer.byte_lengths, splits["validation"], corpus.dtype)
        _write_json(corpus.folder / "meta.json", {**header, "splits": splits, "byte_lengths_sha256": digest})
    except BaseException:
        corpus.abandon()
        raise
    train, validation = (corpus.writers[split].tokens for split in SPLITS)
    say(f"prepared {config.name}: {train:,} training and {validation:,} validation tokens")
    return True


class _Encoded(NamedTuple):
    """A document as tokens, the end of text included; `size` is the number of bytes of its text."""

    split: str
    size: int
    tokens: NDArray[np.integer]


def _add(
    batch: list[_Encoded],
    writers: dict[str, SplitWriter],
    limit: int | None,
    tokenizer: tokenizers.Tokenizer,
) -> bool:
    """Append a batch to the shards; True when the training split has reached `limit` tokens, at which it is cut."""
    import numpy as np

    room = None if limit is None else limit - writers["train"].tokens
    full = False
    kept: list[_Encoded] = []
    for document in batch:
        if room is not None and document.split == "train":
            if len(document.tokens) >= room:
                cut = document.tokens[:room]
                kept.append(_Encoded("train", int(tokenizer.byte_lengths[cut].sum()), cut))
                full = True
                break
            room -= len(document.tokens)
        kept.append(document)
    for split, writer in writers.items():
        documents = [document for document in kept if document.split == split]
        if documents:
            tokens = np.concatenate([document.tokens for document in documents])
            writer.add(tokens, len(documents), sum(document.size for document in documents))
    return full


def _encoded(
    reader: Reader, tokenizer: tokenizers.Tokenizer, fraction: float, corpus: _PartialCorpus
) -> Generator[tuple[list[_Encoded], Any], None, None]:
    """Batches of encoded documents, in order, each with the position of the reader after it.

    Threads suffice, since tiktoken, tokenizers and hashlib release the interpreter's lock. Only a few batches are in
    flight.
    """

    def encode(documents: list[Document]) -> list[_Encoded]:
        texts = [tokenizers.well_formed(document.text) for document in documents]
        encoded = []
        for document, text, tokens in zip(documents, texts, tokenizer.encode_documents(texts), strict=True):
            raw, split = text.encode(), document.split
            if split is None:
                uniform = (int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") >> 11) / 2**53  # exact as a float
                split = "validation" if uniform < fraction else "train"
            encoded.append(_Encoded(split, len(raw), tokens))
        return encoded

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, MAX_THREADS)
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[tuple[Future[list[_Encoded]], Any]] = deque()
        for batch, position in _batches(reader):
            corpus.hashed |= any(document.split is None for document in batch)
            if corpus.cuts_documents:
                batch = [part for document in batch for part in _cut(document, fraction)]
            pending.append((pool.submit(encode, batch), position))
            if len(pending) > 2 * workers:
                future, position_after = pending.popleft()
                yield future.result(), position_after
        for future, position_after in pending:
            yield future.result(), position_after


def _batches(reader: Reader) -> Iterator[tuple[list[Document], Any]]:
    """Batches of about BATCH_CHARACTERS characters, each with the position of the reader after it."""
    batch, size = [], 0
    for document in reader:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch, reader.position()
            batch, size = [], 0
    if batch:
        yield batch, reader.position()


def _cut(document: Document, fraction: float) -> Iterator[Document]:
    """The two parts of a document whose split nothing decides; at the end of a line where one is near the cut."""
    if document.split is not None:
        yield document
        return
    text = document.text
    cut = len(text) - round(fraction * len(text))
    cut = text.rfind("\n", max(0, 2 * cut - len(text)), cut) + 1 or cut
    # the end first, since nothing is read once the training split has its `data.max_tokens`
    for part, split in ((text[cut:], "validation"), (text[:cut], "train")):
        if part:
            yield Document(part, split)


class _Report:
    """Reports progress now and then, with an estimate of the remaining time."""

    def __init__(self, say: Progress, config: DataConfig, rows: int | None, writers: dict[str, SplitWriter]) -> None:
        self._say, self._config, self._rows, self._writers = say, config, rows, writers
        self._begin = self._last = time.monotonic()
        self._share_at_begin = self._share()

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self._last < REPORT_SECONDS:
            return
        self._last = now
        tokens = sum(writer.tokens for writer in self._writers.values())
        line = f"encoding {self._config.name}: {self._documents():,} documents, {tokens:,} tokens"
        share = self._share()
        done = share - self._share_at_begin
        if done > 0.001:  # less is too little for an estimate
            minutes = (now - self._begin) / 60 * max(0.0, 1 - share) / done
            line += f", {share:.1%}, {minutes:.0f} min left"
        self._say(line)

    def _documents(self) -> int:
        """The number of documents that are written."""
        return sum(writer.documents for writer in self._writers.values())

    def _share(self) -> float:
        """The share of the corpus that is prepared; 0 where the total is unknown."""
        limit = self._config.max_tokens
        return max(
            self._writers["train"].tokens / limit if limit else 0.0,
            self._documents() / self._rows if self._rows else 0.0,
        )


def _refuse_empty(config: DataConfig, corpus: _PartialCorpus) -> None:
    """Refuse a corpus with a split without documents, and delete its checkpoint, so that nothing is kept of it."""
    total = sum(writer.documents for writer in corpus.writers.values())
    more = ", raise data.max_tokens" if config.max_tokens else ""
    for split, writer in corpus.writers.items():
        if not writer.documents:
            (corpus.folder / cache.CHECKPOINT).unlink(missing_ok=True)
            cure = f"{'lower' if split == 'train' else 'raise'} the fraction{more} or add documents"
            if total == 1 and not more:
                cure = "cut the document into several, one a line"
            raise DataError(
                f"data={config.name}: none of its {counted(total, 'document')} is in the {split} split "
                f"(data.validation_fraction={config.validation_fraction}, data.max_tokens={config.max_tokens}): {cure}"
            )


def _write_failure(error: OSError, folder: Path, kept: bool) -> str:
    """The message for a cache that cannot be written, with what a user can do about it.

    Args:
        kept: whether the tokens prepared so far are on the disk.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        goes_on = "it goes on where it stopped" if kept else "nothing was kept"
        return (
            f"no space left in {folder}: free some and run the same command again ({goes_on}), or set data.cache to "
            "a folder with more"
        )
    return (
        f"cannot prepare tokens in {folder} ({error.strerror or error}): "
        "set data.cache to a writable folder with free space"
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace `path` in one step, and wait until it is on the disk."""
    replace_file(path, [(json.dumps(content, indent=1) + "\n").encode()])
    _fsync(path.parent)


def _fsync(folder: Path) -> None:
    """Wait until the entries of a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
