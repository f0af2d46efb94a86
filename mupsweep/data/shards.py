"""Token shards: the prepared form of a corpus on disk, written once.

    <cache>/<name>-<tokenizer>-<12 digits of the content id>/
        train-00000.bin ...       at most 100 M tokens each, in llm.c's format (see streams.py)
        validation-00000.bin ...
        meta.json                 what it was made from, and per shard its tokens and sha256

A document belongs to the validation split when the hash of its text says so, whatever stands beside it; each
is followed by the end of text. The content id is known before anything is written, so a folder is prepared
once: under a lock, into a temporary folder, renamed last. A process that dies midway leaves a temporary
folder that the next one removes, and no lock, for the kernel drops it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mupsweep.config import DataConfig
from mupsweep.data import tokenizers
from mupsweep.data.streams import HEADER_BYTES, MAGIC, VERSION, Segment, TokenStream, segment
from mupsweep.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mupsweep.data.sources import Source

FORMAT = 1
SPLITS = ("train", "validation")
SHARD_TOKENS = 100_000_000
BATCH_CHARACTERS = 1 << 20  # what a thread encodes at a time
MAX_THREADS = 16  # one thread writes: more would wait for it
REPORT_SECONDS = 2.0

Progress = Callable[[str], None]


def content_id(config: DataConfig, fingerprint: str) -> str:
    """sha256 of all that the prepared tokens and their split depend on."""
    parts = [
        FORMAT,
        fingerprint,
        tokenizers.digest(config.tokenizer),
        config.validation_fraction,
        config.max_tokens,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def cache_root(config: DataConfig) -> Path:
    """The folder that holds the prepared corpora: `data.cache`, else mupsweep/ in the user's cache folder."""
    if config.cache is not None:
        return Path(config.cache).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mupsweep"


def folder(config: DataConfig, content: str) -> Path:
    """Where the corpus with the content id `content` is, or will be, prepared."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", config.name).lstrip(".")
    return cache_root(config) / f"{name}-{config.tokenizer}-{content[:12]}"


def prepared(config: DataConfig) -> list[Path]:
    """The prepared corpora in the cache that `config` names, by name."""
    return sorted(p.parent for p in cache_root(config).glob("[!.]*/meta.json"))


def meta(folder: Path) -> dict[str, Any]:
    """The `meta.json` of a prepared corpus.

    Raises:
        DataError: missing or unreadable.
    """
    try:
        found = json.loads((folder / "meta.json").read_bytes())
        assert found["format"] == FORMAT
        assert set(found["splits"]) == set(SPLITS)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise DataError(
            f"{folder} is no prepared corpus (meta.json is missing or damaged): {_again(folder)}"
        ) from error
    return found


def streams(folder: Path) -> tuple[TokenStream, TokenStream]:
    """(train, validation) of a prepared corpus; checks the size of every shard.

    Raises:
        DataError: a missing, cut or damaged shard.
    """
    found = meta(folder)
    segments: dict[str, list[Segment]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for shard in found["splits"][split]["shards"]:
            path = folder / shard["file"]
            size = path.stat().st_size if path.is_file() else 0
            expected = HEADER_BYTES + 2 * shard["tokens"]
            if size != expected:
                raise DataError(f"{path} is damaged: {size} bytes instead of {expected}; {_again(folder)}")
            segments[split].append(segment(path))
    return TokenStream(segments["train"]), TokenStream(segments["validation"])


def verify(folder: Path) -> dict[str, Any]:
    """Reads every shard of a prepared corpus and compares its sha256; returns its meta data.

    Raises:
        DataError: naming the shards that are not what was written.
    """
    found = meta(folder)
    streams(folder)
    shards = [shard for split in SPLITS for shard in found["splits"][split]["shards"]]
    bad = [shard["file"] for shard in shards if _sha256(folder / shard["file"]) != shard["sha256"]]
    if bad:
        raise DataError(f"{folder}: damaged, the sha256 of {', '.join(bad)} differs from meta.json; {_again(folder)}")
    return found


def prepare(
    source: Source,
    config: DataConfig,
    content: str,
    progress: Progress | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Path:
    """Encodes the documents of `source` once, whoever asks and how many at a time; returns the folder.

    Raises:
        DataError: the source's own, a split without documents, or a cache that cannot be written.
    """
    say = progress or (lambda text: None)
    target = folder(config, content)
    if (target / "meta.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(
            target.with_name(f".{target.name}.lock"),
            lambda: say(f"waiting: another process prepares {target}"),
        ):
            if not target.exists():
                partial = target.with_name(f".{target.name}.partial")
                if partial.exists():
                    shutil.rmtree(partial)  # left by a process that died: nobody else writes while we hold the lock
                partial.mkdir()
                try:
                    _write(partial, source, config, content, say, shard_tokens)
                except BaseException:
                    shutil.rmtree(partial, ignore_errors=True)
                    raise
                os.replace(partial, target)
                _fsync(target.parent)
    except OSError as error:
        raise DataError(
            f"cannot prepare tokens in {target.parent} ({error.strerror or error}): "
            "set data.cache to a writable folder with free space"
        ) from error
    return target


def _write(partial: Path, source: Source, config: DataConfig, content: str, say: Progress, shard_tokens: int) -> None:
    """The shards and meta.json of a corpus, in the order of its documents."""
    import numpy as np

    tokenizer = tokenizers.load(config.tokenizer)
    end = np.array([tokenizer.end_of_text], dtype=np.uint16)
    limit = config.max_tokens
    writers = {split: _SplitWriter(partial, split, shard_tokens) for split in SPLITS}
    train, validation = writers["train"], writers["validation"]
    reported = time.monotonic()
    with contextlib.closing(_encoded(source.documents(), tokenizer)) as encoded:
        for position, size, tokens in encoded:
            writer = validation if position < config.validation_fraction else train
            tokens = np.concatenate([tokens, end])
            if writer is train and limit is not None:
                tokens = tokens[: limit - train.tokens]
            writer.add(tokens, size)
            if train.tokens == limit:
                break
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                say(f"encoding {config.name}: {train.tokens + validation.tokens:,} tokens")
    splits = {split: writer.close() for split, writer in writers.items()}
    total = train.documents + validation.documents
    for split, writer in writers.items():
        if not writer.documents:
            raise DataError(
                f"data={config.name}: none of its {total} documents is in the {split} split "
                f"(data.validation_fraction={config.validation_fraction}, data.max_tokens={limit}): "
                f"{'lower' if split == 'train' else 'raise'} the fraction or add documents (.txt: one a file)"
            )
    found = {
        "format": FORMAT,
        "content_id": content,
        "source": config.kind,
        "fingerprint": source.fingerprint(),
        "tokenizer": tokenizer.name,
        "tokenizer_digest": tokenizer.digest,
        "validation_fraction": config.validation_fraction,
        "max_tokens": limit,
        "splits": splits,
    }
    with open(partial / "meta.json", "w", encoding="utf-8") as handle:
        handle.write(json.dumps(found, indent=1) + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    _fsync(partial)
    say(f"prepared {config.name}: {train.tokens:,} training and {validation.tokens:,} validation tokens")


def _encoded(
    documents: Iterator[str], tokenizer: tokenizers.Tokenizer
) -> Generator[tuple[float, int, NDArray[np.uint16]], None, None]:
    """(hash position in [0, 1), bytes, tokens) of each document, in order.

    Threads do: tiktoken and hashlib work outside the interpreter's lock. Only a few batches are in flight.
    """

    def encode(texts: list[str]) -> list[tuple[float, int, NDArray[np.uint16]]]:
        found = []
        for text in map(tokenizers.well_formed, texts):
            raw = text.encode()
            position = (int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") >> 11) / 2**53  # exact as a float
            found.append((position, len(raw), tokenizer.encode(text)))
        return found

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, MAX_THREADS)
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[list[tuple[float, int, NDArray[np.uint16]]]]] = deque()
        for batch in _batches(documents):
            pending.append(pool.submit(encode, batch))
            if len(pending) > 2 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _SplitWriter:
    """Writes the shards of one split."""

    def __init__(self, folder: Path, split: str, shard_tokens: int) -> None:
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._file: BinaryIO | None = None
        self._shards: list[dict[str, Any]] = []
        self.tokens = self.documents = self.bytes = 0

    def add(self, tokens: NDArray[np.uint16], size: int) -> None:
        """One document of `size` bytes of text, its end of text included in `tokens`."""
        self.documents += 1
        self.bytes += size
        while len(tokens):
            if self._file is None:
                path = self._folder / f"{self._split}-{len(self._shards):05d}.bin"
                self._file = open(path, "w+b", buffering=1 << 20)  # noqa: SIM115
                self._file.write(bytes(HEADER_BYTES))
                self._shards.append({"file": path.name, "tokens": 0})
            shard = self._shards[-1]
            part, tokens = (
                tokens[: self._shard_tokens - shard["tokens"]],
                tokens[self._shard_tokens - shard["tokens"] :],
            )
            self._file.write(part.astype("<u2").tobytes())
            shard["tokens"] += len(part)
            self.tokens += len(part)
            if shard["tokens"] == self._shard_tokens:
                self._finish()

    def close(self) -> dict[str, Any]:
        self._finish()
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "tokens": self.tokens,
            "shards": self._shards,
        }

    def _finish(self) -> None:
        """The header comes last: only now is the number of tokens known."""
        if self._file is None:
            return
        self._file.seek(0)
        self._file.write(struct.pack("<3i", MAGIC, VERSION, self._shards[-1]["tokens"]))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self._shards[-1]["sha256"] = _sha256(self._folder / self._shards[-1]["file"])


@contextlib.contextmanager
def _lock(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds the lock file `path`; the kernel frees it when the process ends, however it ends."""
    import fcntl

    with open(path, "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _fsync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _again(folder: Path) -> str:
    return f"delete the folder {folder} and run `mupsweep data prepare` again"
