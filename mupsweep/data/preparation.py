"""Preparing a corpus: documents in, token shards out, once, whoever asks and however often it is interrupted.

A document belongs to the validation split when its source or the hash of its text says so, whatever stands beside it;
each is followed by the end of text. `data.max_tokens` cuts the training split inside the document that reaches it,
and nothing is read beyond: the validation split then holds the documents that came before the cut.

Everything is written into a hidden folder, under a lock, and renamed when it is complete. Now and then a checkpoint
says what is safely on the disk and where the reading stands: a later process goes on from there and ends with the same
bytes.
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

from mupsweep.data import cache, shards, tokenizers
from mupsweep.data.config import DataConfig
from mupsweep.data.shards import SPLITS, SplitWriter
from mupsweep.errors import DataError
from mupsweep.formatting import counted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mupsweep.data.sources import Document, Reader, Source

BATCH_CHARACTERS = 1 << 20  # what a thread encodes at a time
MAX_THREADS = 16  # one thread reads and writes: more would wait for it
REPORT_SECONDS = 2.0
CHECKPOINT_SECONDS = 20.0

Progress = Callable[[str], None]


def prepare(
    source: Source,
    config: DataConfig,
    content: str,
    progress: Progress | None = None,
    shard_tokens: int = shards.SHARD_TOKENS,
) -> Path:
    """Encodes the documents of `source` once, whoever asks and how many at a time; returns the folder.

    Raises:
        DataError: the source's own, a split without documents, or a cache that cannot be written.
    """
    say = progress or (lambda text: None)
    target = cache.folder(config, content)
    if (target / "meta.json").is_file():
        return target
    partial = cache.partial(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with cache.lock(target, lambda: say(f"waiting: another process prepares {target}")):
            if not target.exists():
                if not (partial / "meta.json").is_file():
                    _write(_Unfinished.open(partial, say, shard_tokens), source, config, content, say)
                for leftover in partial.glob(f"{Path(cache.CHECKPOINT).stem}.*"):
                    leftover.unlink()
                os.replace(partial, target)
                _fsync(target.parent)
    except OSError as error:
        raise DataError(_told(error, target.parent, kept=partial.exists())) from error
    return target


class _Unfinished:
    """A corpus that grows in a hidden folder: its shards, and the checkpoint to go on from."""

    def __init__(self, folder: Path, shard_tokens: int, checkpoint: dict[str, Any] | None = None) -> None:
        splits = checkpoint["splits"] if checkpoint else dict.fromkeys(SPLITS)
        self.folder = folder
        self.position = checkpoint["position"] if checkpoint else None
        self.writers = {split: SplitWriter(folder, split, shard_tokens, splits[split]) for split in SPLITS}
        self._saved = time.monotonic()

    @classmethod
    def open(cls, folder: Path, say: Progress, shard_tokens: int) -> _Unfinished:
        """What an interrupted process left, or an empty folder. Nobody else writes while the lock is held."""
        try:
            checkpoint = json.loads((folder / cache.CHECKPOINT).read_bytes())
            found = cls(folder, shard_tokens, checkpoint)
            say(f"going on after {sum(w.documents for w in found.writers.values()):,} documents")
            return found
        except FileNotFoundError:
            pass  # nothing was begun, or it was stopped before its first checkpoint
        except (ValueError, KeyError, TypeError):
            say(f"{folder} is damaged: beginning anew")
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        return cls(folder, shard_tokens)

    def save(self, header: dict[str, Any], position: Any) -> None:
        """Remember in `checkpoint.json` what is on the disk, unless that was done a moment ago."""
        if time.monotonic() - self._saved < CHECKPOINT_SECONDS:
            return
        splits = {split: writer.state() for split, writer in self.writers.items()}
        _write_json(self.folder / cache.CHECKPOINT, {**header, "splits": splits, "position": position})
        self._saved = time.monotonic()

    def let_go(self) -> None:
        """Close the files; without a checkpoint to go on from they are of no use."""
        for writer in self.writers.values():
            writer.discard()
        if not (self.folder / cache.CHECKPOINT).is_file():
            shutil.rmtree(self.folder, ignore_errors=True)


def _write(unfinished: _Unfinished, source: Source, config: DataConfig, content: str, say: Progress) -> None:
    """The shards and meta.json of a corpus, in the order of its documents."""
    tokenizer = tokenizers.load(config.tokenizer)
    header = {
        "format": shards.FORMAT,
        "name": config.name,
        "content_id": content,
        "source": config.kind,
        **source.describe(),
        "fingerprint": source.fingerprint(),
        "tokenizer": tokenizer.name,
        "tokenizer_digest": tokenizer.digest,
        "validation_fraction": config.validation_fraction,
        "max_tokens": config.max_tokens,
    }
    try:
        report = _Report(say, config, source.rows(), unfinished.writers)
        reader = source.reader(unfinished.position)
        with contextlib.closing(_encoded(reader, tokenizer, config.validation_fraction)) as batches:
            for batch, position in batches:
                if _add(batch, unfinished.writers, config.max_tokens, tokenizer):
                    break
                unfinished.save(header, position)
                report()
        splits = {split: writer.close() for split, writer in unfinished.writers.items()}
        _refuse_empty(config, unfinished)
        _write_json(unfinished.folder / "meta.json", {**header, "splits": splits})
    except BaseException:
        unfinished.let_go()
        raise
    train, validation = (unfinished.writers[split].tokens for split in SPLITS)
    say(f"prepared {config.name}: {train:,} training and {validation:,} validation tokens")


class _Encoded(NamedTuple):
    """A document as tokens, its end of text included; `size` in bytes of text."""

    split: str
    size: int
    tokens: NDArray[np.uint16]


def _add(
    batch: list[_Encoded],
    writers: dict[str, SplitWriter],
    limit: int | None,
    tokenizer: tokenizers.Tokenizer,
) -> bool:
    """Append a batch; True when the training split has `limit` tokens and the rest was left out."""
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
        mine = [document for document in kept if document.split == split]
        if mine:
            writer.add(np.concatenate([d.tokens for d in mine]), len(mine), sum(d.size for d in mine))
    return full


def _encoded(
    reader: Reader, tokenizer: tokenizers.Tokenizer, fraction: float
) -> Generator[tuple[list[_Encoded], Any], None, None]:
    """Batches of encoded documents, in order, each with the position of the reader after it.

    Threads do: tiktoken and hashlib work outside the interpreter's lock. Only a few batches are in flight.
    """

    def encode(documents: list[Document]) -> list[_Encoded]:
        texts = [tokenizers.well_formed(document.text) for document in documents]
        found = []
        for document, text, tokens in zip(documents, texts, tokenizer.encode_documents(texts), strict=True):
            raw, split = text.encode(), document.split
            if split is None:
                share = (int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") >> 11) / 2**53  # exact as a float
                split = "validation" if share < fraction else "train"
            found.append(_Encoded(split, len(raw), tokens))
        return found

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, MAX_THREADS)
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[tuple[Future[list[_Encoded]], Any]] = deque()
        for batch, position in _batches(reader):
            pending.append((pool.submit(encode, batch), position))
            if len(pending) > 2 * workers:
                future, reached = pending.popleft()
                yield future.result(), reached
        for future, reached in pending:
            yield future.result(), reached


def _batches(reader: Reader) -> Iterator[tuple[list[Document], Any]]:
    batch, size = [], 0
    for document in reader:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch, reader.position()
            batch, size = [], 0
    if batch:
        yield batch, reader.position()


class _Report:
    """Says now and then how far the writers are."""

    def __init__(self, say: Progress, config: DataConfig, rows: int | None, writers: dict[str, SplitWriter]) -> None:
        self._say, self._config, self._rows, self._writers = say, config, rows, writers
        self._begin = self._last = time.monotonic()
        self._had = self._share()

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self._last < REPORT_SECONDS:
            return
        self._last = now
        tokens = sum(writer.tokens for writer in self._writers.values())
        line = f"encoding {self._config.name}: {self._documents():,} documents, {tokens:,} tokens"
        share = self._share()
        if share - self._had > 0.001:  # less is too little to go by
            minutes = (now - self._begin) / 60 * max(0.0, 1 - share) / (share - self._had)
            line += f", {share:.1%}, {minutes:.0f} min left"
        self._say(line)

    def _documents(self) -> int:
        return sum(writer.documents for writer in self._writers.values())

    def _share(self) -> float:
        """How much is done; 0 where nobody knows."""
        limit = self._config.max_tokens
        return max(
            self._writers["train"].tokens / limit if limit else 0.0,
            self._documents() / self._rows if self._rows else 0.0,
        )


def _refuse_empty(config: DataConfig, unfinished: _Unfinished) -> None:
    """Both splits hold documents; what has none is not worth keeping."""
    total = sum(writer.documents for writer in unfinished.writers.values())
    more = ", raise data.max_tokens" if config.max_tokens else ""
    for split, writer in unfinished.writers.items():
        if not writer.documents:
            (unfinished.folder / cache.CHECKPOINT).unlink(missing_ok=True)
            cure = f"{'lower' if split == 'train' else 'raise'} the fraction{more} or add documents"
            if total == 1 and not more:
                cure = "cut the document into several, one a line"
            raise DataError(
                f"data={config.name}: none of its {counted(total, 'document')} is in the {split} split "
                f"(data.validation_fraction={config.validation_fraction}, data.max_tokens={config.max_tokens}): {cure}"
            )


def _told(error: OSError, folder: Path, kept: bool) -> str:
    """What a user can do about a cache that cannot be written."""
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
    """Replace `path` in one step, durably."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as handle:
        handle.write(json.dumps(content, indent=1) + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    _fsync(path.parent)


def _fsync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
