"""The cache of prepared corpora: where they lie, which there are, and that one process writes each.

    <cache>/<name>-<tokenizer>-<12 digits of the content id>/            shards (see shards.py)
    <cache>/.<the same>.partial/                                         one that is being prepared, or was interrupted
    <cache>/.<the same>.lock                                             held while it is prepared

The content id is known before anything is written, so a folder is prepared once, and what a name means never changes.
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
    """A corpus of the cache, or what there is of it.

    Attributes:
        state: ready; busy (a process prepares it now), partial (preparing it again goes on), or damaged.
        bytes: of text.
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


def content_id(config: DataConfig, fingerprint: str) -> str:
    """sha256 of all that the prepared tokens and their split depend on."""
    parts = [
        shards.FORMAT,
        fingerprint,
        tokenizers.digest(config.tokenizer),
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
    """Where the corpus with the content id `content` is, or will be, prepared."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", config.name).lstrip(".")
    return root(config) / f"{name}-{config.tokenizer}-{content[:12]}"


def partial(folder: Path) -> Path:
    """Where a corpus grows until it is complete."""
    return folder.with_name(f".{folder.name}.partial")


def entries(config: DataConfig) -> list[Entry]:
    """The corpora of the cache that `config` names, by name; what is not complete comes last."""
    complete = sorted(p for p in root(config).glob("[!.]*") if p.is_dir())
    begun = sorted(root(config).glob(".*.partial"))
    return [_complete(p) for p in complete] + [_begun(p) for p in begun]


@contextlib.contextmanager
def lock(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds the lock of a corpus; the kernel frees it when the process ends, however it ends."""
    import fcntl

    with open(_lock_file(folder), "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _complete(folder: Path) -> Entry:
    try:
        found = shards.meta(folder)
        shards.segments(folder)
    except DataError:
        return _entry({}, DAMAGED, folder)
    return _entry(found, READY, folder)


def _begun(partial: Path) -> Entry:
    folder = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
    try:
        found = json.loads((partial / CHECKPOINT).read_bytes())
    except (OSError, ValueError):
        found = {}
    return _entry(found, BUSY if _is_locked(folder) else PARTIAL, folder)


def _entry(found: dict[str, Any], state: str, folder: Path) -> Entry:
    match = re.fullmatch(r"(.+)-(bytes|gpt2(?:-\d+)?)-([0-9a-f]{12})", folder.name)
    name, tokenizer, content = match.groups() if match else (folder.name, "", "")
    splits = found.get("splits", {split: {} for split in shards.SPLITS})
    return Entry(
        name=found.get("name", name),
        tokenizer=found.get("tokenizer", tokenizer),
        state=state,
        train_tokens=splits["train"].get("tokens", 0),
        validation_tokens=splits["validation"].get("tokens", 0),
        documents=sum(split.get("documents", 0) for split in splits.values()),
        bytes=sum(split.get("bytes", 0) for split in splits.values()),
        content_id=found.get("content_id", content),
        folder=str(folder),
    )


def _is_locked(folder: Path) -> bool:
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
    return folder.with_name(f".{folder.name}.lock")
