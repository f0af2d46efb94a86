"""The cache of prepared corpora: their folders, and the lock by which one process writes each of them.

    <cache>/FOLDER/            shards (see shards.py); FOLDER is <name>-<tokenizer>-<12 digits of the content id>, where
                               a tokenizer of one's own is called by the name of its file
    <cache>/.FOLDER.partial/   a corpus that is being prepared, or whose preparation was interrupted
    <cache>/.FOLDER.lock       locked while the corpus is being prepared

The content id is known before anything is written, so a folder is prepared once and its content never changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mupsweep.data import shards, tokenizers
from mupsweep.data.config import DataConfig
from mupsweep.errors import DataError

CHECKPOINT = "checkpoint.json"
READY, BUSY, PARTIAL, DAMAGED = "ready", "busy", "partial", "damaged"


@dataclass(frozen=True)
class Entry:
    """A corpus in the cache, complete or not.

    Attributes:
        state: "ready", "busy" (a process is preparing it), "partial" (preparing it again continues) or "damaged".
        bytes: size of the text.
        disk_bytes: size of the files in the folder.
        path: of the text, where it is of files of the user's; empty otherwise.
        cuts_documents: whether the end of every document is in the validation split.
    """

    name: str
    tokenizer: str
    state: str
    train_tokens: int
    validation_tokens: int
    documents: int
    bytes: int
    content_id: str
    folder: str
    disk_bytes: int
    path: str
    cuts_documents: bool


def content_id(config: DataConfig, fingerprint: str) -> str:
    """sha256 of everything that the prepared tokens and their split depend on."""
    parts = [
        shards.FORMAT,
        fingerprint,
        tokenizers.digest(config.tokenizer, config.end_of_text),
        config.validation_fraction,
        config.max_tokens,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def root(config: DataConfig) -> Path:
    """The folder that holds the prepared corpora: `data.cache`, else mupsweep/ in the user's cache folder."""
    if config.cache is not None:
        return Path(config.cache).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mupsweep"


def folder(config: DataConfig, content: str) -> Path:
    """The folder of the corpus with the content id `content`, whether it is prepared yet or not."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", config.name).lstrip(".")
    return root(config) / f"{name}-{Path(config.tokenizer).name}-{content[:12]}"


def partial(folder: Path) -> Path:
    """The folder in which a corpus is written until it is complete."""
    return folder.with_name(f".{folder.name}.partial")


def entries(config: DataConfig) -> list[Entry]:
    """The corpora of the cache that `config` names, sorted by name, with incomplete ones last."""
    complete = sorted(p for p in root(config).glob("[!.]*") if p.is_dir())
    incomplete = sorted(root(config).glob(".*.partial"))
    return [_complete_entry(p) for p in complete] + [_partial_entry(p) for p in incomplete]


@contextlib.contextmanager
def lock(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a corpus; the kernel frees it when the process ends, however it ends.

    Args:
        waiting: called once where another process holds the lock.
    """
    import fcntl

    with open(_lock_file(folder), "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _complete_entry(folder: Path) -> Entry:
    """The entry of a complete corpus, from its meta.json."""
    try:
        meta = shards.meta(folder)
        shards.segments(folder)
    except DataError:
        return _entry({}, DAMAGED, folder)
    return _entry(meta, READY, folder)


def _partial_entry(partial: Path) -> Entry:
    """The entry of an incomplete corpus, from its checkpoint."""
    folder = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
    try:
        checkpoint = shards.read_header(partial / CHECKPOINT)
    except (OSError, ValueError):
        checkpoint = {}
    return _entry(checkpoint, BUSY if _is_locked(folder) else PARTIAL, folder)


def _entry(meta: dict[str, Any], state: str, folder: Path) -> Entry:
    """An Entry from a corpus's meta data; what these lack comes from the folder's name."""
    match = re.fullmatch(r"(.+)-(bytes|gpt2(?:-\d+)?|[co]\w+_base|.*\.json)-([0-9a-f]{12})", folder.name)
    name, tokenizer, content = match.groups() if match else (folder.name, "", "")
    splits = meta.get("splits", {split: {} for split in shards.SPLITS})
    return Entry(
        name=meta.get("name", name),
        tokenizer=meta.get("tokenizer", tokenizer),
        state=state,
        train_tokens=splits["train"].get("tokens", 0),
        validation_tokens=splits["validation"].get("tokens", 0),
        documents=sum(split.get("documents", 0) for split in splits.values()),
        bytes=sum(split.get("bytes", 0) for split in splits.values()),
        content_id=meta.get("content_id", content),
        folder=str(folder),
        disk_bytes=_disk_bytes(partial(folder) if state in (BUSY, PARTIAL) else folder),
        path=meta.get("path", ""),
        cuts_documents=meta.get("cuts_documents") is True,
    )


def _disk_bytes(folder: Path) -> int:
    """The size of the files in a folder; one that a process removes meanwhile does not count."""
    total = 0
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            with contextlib.suppress(OSError):
                total += path.stat().st_size
    return total


def _is_locked(folder: Path) -> bool:
    """Whether a process holds the lock of a corpus."""
    import fcntl

    try:
        with open(_lock_file(folder)) as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _lock_file(folder: Path) -> Path:
    """The lock file of a corpus."""
    return folder.with_name(f".{folder.name}.lock")
