"""Atomic files, either whole or absent: written under a temporary name, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mupsweep.documents import parse_json
from mupsweep.errors import RecordError


def write_text(path: Path, text: str, durable: bool = True) -> None:
    """Replace `path` by `text` in one step; with `durable`, wait until it is on the disk.

    A name of a file keeps its bytes that are no UTF-8; other surrogates, which json can hold, are spelled out.
    """
    try:
        content = text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        content = text.encode(errors="backslashreplace")
    write_bytes(path, content, durable)


def write_bytes(path: Path, content: bytes, durable: bool = True) -> None:
    """Replace `path` by `content` in one step; with `durable`, wait until it is on the disk."""
    write_chunks(path, (content,), durable)


def write_chunks(path: Path, chunks: Iterable[bytes], durable: bool = True) -> None:
    """Replace `path` in one step by chunks of bytes, which need not fit into memory together."""
    try:
        replace_file(path, chunks, durable)
    except OSError as error:
        raise RecordError(
            f"cannot write {path}: {error.strerror}; free space or choose another folder with out=DIR, or with "
            "--results DIR"
        ) from error


def replace_file(path: Path, chunks: Iterable[bytes], durable: bool = True) -> None:
    """Replace `path` in one step, as `write_chunks` does.

    Raises:
        OSError: the file cannot be written; nothing is left of it.
    """
    temporary = temporary_beside(path)
    try:
        with temporary.open("wb") as file:
            file.writelines(chunks)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def create_text(path: Path, text: str) -> bool:
    """Create `path` with its whole content; return False where it exists.

    Raises:
        RecordError: the file cannot be written.
    """
    temporary = temporary_beside(path)
    try:
        temporary.write_text(text)
        try:
            os.link(temporary, path)
        except FileExistsError:
            # Where NFS loses an answer it asks again, and finds the link that it made itself.
            return temporary.stat().st_nlink > 1
        except OSError:  # a file system without hard links
            try:
                with path.open("x") as file:
                    file.write(text)
            except FileExistsError:
                return False
        return True
    except OSError as error:
        raise RecordError(
            f"cannot write {path}: {error.strerror}; is the sweep folder writable and the disk not full?"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def temporary_beside(path: Path) -> Path:
    """A unique name for a temporary file in the folder of `path`; no other process or host uses it."""
    return path.with_name(f".{path.name[:64]}.{uuid.uuid4().hex[:12]}.tmp")


def make_folder(path: Path) -> None:
    """Make a folder and its parents, unless they exist."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecordError(
            f"cannot make the folder {path}: {error.strerror}; choose another one with out=DIR, or with --results DIR"
        ) from error


def write_json(path: Path, content: Any, durable: bool = True) -> None:
    """Replace `path` by indented json in one step; a float that is not finite becomes null."""
    write_text(path, json.dumps(finite(content), indent=2) + "\n", durable)


def read_json(path: Path) -> dict[str, Any] | None:
    """The mapping in a json file; None where the file is missing or holds no mapping."""
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def finite(value: Any) -> Any:
    """`value` with None for every float that json cannot represent."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value
