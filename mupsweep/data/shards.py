"""Token shards: the prepared form of a corpus on disk.

train-00000.bin ...       at most 100 M tokens each, in llm.c's format (see streams.py): uint16, or uint32 where the
validation-00000.bin ...  vocabulary has 65,536 ids or more
byte-lengths.npy          (vocabulary,) float64: bytes of text that an id stands for
meta.json                 the source and tokenizer of the corpus, and the number of tokens and sha256 of every shard
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mupsweep.atomic_files import replace_file
from mupsweep.data.streams import HEADER_BYTES, LLM_C, UINT16, Segment, TokenStream, item_bytes, segment
from mupsweep.documents import parse_json
from mupsweep.errors import DataError, reason

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FORMAT = 1
SPLITS = ("train", "validation")
SHARD_TOKENS = 100_000_000
LARGEST_COUNT = 10**18  # of tokens, documents or bytes
SHARD_NAME = re.compile(r"(train|validation)-[0-9]{5,}\.bin")
BYTE_LENGTHS = "byte-lengths.npy"


def meta(folder: Path) -> dict[str, Any]:
    """The `meta.json` of a prepared corpus.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        return read_header(folder / "meta.json")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder} is no prepared corpus (meta.json is missing or damaged): {_prepare_again(folder)}"
        ) from error


def read_header(path: Path) -> dict[str, Any]:
    """The content of a meta.json, or of the checkpoint of one; a disk or somebody else may have changed it.

    Raises:
        OSError: the file cannot be read.
        ValueError: no corpus has such values. In particular a shard's name leads out of no folder.
    """
    content = parse_json(path.read_bytes())
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError("another format")
    for key in ("name", "tokenizer", "content_id", "path"):
        if not isinstance(text := content.get(key, ""), str) or not text.isprintable():
            raise ValueError(f"{key}={text!r:.80}")
    if content.get("dtype", UINT16) not in LLM_C:
        raise ValueError("an unknown type of tokens")
    splits = content.get("splits")
    if not isinstance(splits, dict) or set(splits) != set(SPLITS):
        raise ValueError("no splits")
    for split in splits.values():
        if not isinstance(split, dict) or not isinstance(split.get("shards"), list):
            raise ValueError("a split without shards")
        if not all(_is_count(split.get(key)) for key in ("documents", "bytes", "tokens")):
            raise ValueError("a split without counts")
        if not all(map(_is_shard, split["shards"])):
            raise ValueError("a shard without a name or a number of tokens")
    return content


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_COUNT


def _is_shard(value: Any) -> bool:
    """Whether a value describes a shard; one that is being written has no digest yet."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("file"), str)
        and SHARD_NAME.fullmatch(value["file"]) is not None
        and _is_count(value.get("tokens"))
        and isinstance(value.get("sha256", ""), str)
    )


def streams(folder: Path) -> tuple[TokenStream, TokenStream]:
    """The token streams (train, validation) of a prepared corpus, after a check of the size of every shard.

    Raises:
        DataError: a missing or damaged shard.
    """
    train, validation = segments(folder)
    return TokenStream(train), TokenStream(validation)


def segments(folder: Path) -> tuple[list[Segment], list[Segment]]:
    """The shards of (train, validation), after a check of the size of each.

    Raises:
        DataError: a missing or damaged shard.
    """
    content = meta(folder)
    splits, token_bytes = content["splits"], item_bytes(content.get("dtype", UINT16))
    by_split: dict[str, list[Segment]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for shard in splits[split]["shards"]:
            path = folder / shard["file"]
            size = path.stat().st_size if path.is_file() else 0
            expected = HEADER_BYTES + token_bytes * shard["tokens"]
            if size != expected:
                raise DataError(f"{path} is damaged: {size} bytes instead of {expected}; {_prepare_again(folder)}")
            by_split[split].append(segment(path))
    return by_split["train"], by_split["validation"]


def verify(folder: Path) -> dict[str, Any]:
    """Read every shard of a prepared corpus, compare its sha256, and return the corpus's meta data.

    Raises:
        DataError: naming the shards whose content has changed.
    """
    content = meta(folder)
    segments(folder)
    shards = [shard for split in SPLITS for shard in content["splits"][split]["shards"]]
    bad = [shard["file"] for shard in shards if sha256(folder / shard["file"]) != shard.get("sha256")]
    lengths, digest = folder / BYTE_LENGTHS, content.get("byte_lengths_sha256")
    if digest is not None and (not lengths.is_file() or sha256(lengths) != digest):
        bad.append(lengths.name)
    if bad:
        raise DataError(
            f"{folder}: damaged, the sha256 of {', '.join(bad)} differs from meta.json; {_prepare_again(folder)}"
        )
    return content


def write_byte_lengths(folder: Path, lengths: NDArray[np.int64], validation: dict[str, Any], dtype: str) -> str:
    """Write the bytes of text per id, such that those of the validation split's tokens add up to its text.

    They do so by themselves for a tokenizer of bytes. Others add a space before a document or normalize its text, and
    their lengths are stretched evenly.

    Args:
        lengths: (vocabulary,) bytes that each id decodes to.
        validation: the split's entry in meta.json.

    Returns:
        The sha256 of the file.
    """
    import numpy as np

    total = 0
    for shard in validation["shards"]:
        tokens = Segment(folder / shard["file"], HEADER_BYTES, shard["tokens"], dtype).open()
        total += sum(int(lengths[tokens[i : i + (1 << 20)]].sum()) for i in range(0, len(tokens), 1 << 20))
    content = io.BytesIO()
    np.save(content, lengths * (validation["bytes"] / total if total else 1.0))
    replace_file(folder / BYTE_LENGTHS, [content.getvalue()])
    return hashlib.sha256(content.getvalue()).hexdigest()


def byte_lengths(folder: Path, vocab_size: int) -> NDArray[np.float64] | None:
    """(vocab_size,) bytes of text per id; None for a corpus from before they were stored.

    Raises:
        DataError: the file is damaged.
    """
    import numpy as np

    path = folder / BYTE_LENGTHS
    if not path.is_file():
        return None
    try:
        lengths = np.load(path)
        if lengths.shape != (vocab_size,) or lengths.dtype != np.float64:
            raise ValueError("another shape")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is damaged ({reason(error)}): {_prepare_again(folder)}") from error
    return lengths


class SplitWriter:
    """Writes the shards of one split, from the beginning or from the `state` of an interrupted process."""

    def __init__(
        self, folder: Path, split: str, shard_tokens: int, state: dict[str, Any] | None = None, dtype: str = UINT16
    ) -> None:
        """
        Raises:
            ValueError: the files in the folder contradict `state`.
        """
        self._folder, self._split, self._shard_tokens, self._dtype = folder, split, shard_tokens, dtype
        self._file: BinaryIO | None = None
        state = state or {"documents": 0, "bytes": 0, "tokens": 0, "shards": []}
        self.documents, self.bytes, self.tokens = state["documents"], state["bytes"], state["tokens"]
        self._shards: list[dict[str, Any]] = state["shards"]
        for shard in self._shards:
            path, size = folder / shard["file"], HEADER_BYTES + item_bytes(dtype) * shard["tokens"]
            if not path.is_file() or path.stat().st_size < size:
                raise ValueError(f"{path} is shorter than it was")
            if "sha256" not in shard:
                self._file = open(path, "r+b", buffering=1 << 20)  # noqa: SIM115
                self._file.truncate(size)
                self._file.seek(size)
            elif sha256(path) != shard["sha256"]:
                raise ValueError(f"{path} has changed")
        for path in folder.glob(f"{split}-*.bin"):
            if path.name not in {shard["file"] for shard in self._shards}:
                path.unlink()  # begun after the checkpoint that holds the state

    def add(self, tokens: NDArray[np.integer], documents: int, size: int) -> None:
        """Append documents.

        Args:
            tokens: the tokens of all documents, each with its end of text.
            documents: number of documents.
            size: bytes of their text.
        """
        self.documents += documents
        self.bytes += size
        while len(tokens):
            if self._file is None:
                path = self._folder / f"{self._split}-{len(self._shards):05d}.bin"
                self._file = open(path, "w+b", buffering=1 << 20)  # noqa: SIM115
                self._file.write(bytes(HEADER_BYTES))
                self._shards.append({"file": path.name, "tokens": 0})
            shard = self._shards[-1]
            room = self._shard_tokens - shard["tokens"]
            part, tokens = tokens[:room], tokens[room:]
            self._file.write(part.astype(self._dtype, copy=False).data)
            shard["tokens"] += len(part)
            self.tokens += len(part)
            if shard["tokens"] == self._shard_tokens:
                self._finish()

    def state(self) -> dict[str, Any]:
        """The state after a flush to the disk: the split's entry in meta.json, and what a later writer resumes from."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "tokens": self.tokens,
            "shards": self._shards,
        }

    def close(self) -> dict[str, Any]:
        """Finish the last shard and return the split's entry in meta.json."""
        self._finish()
        return self.state()

    def discard(self) -> None:
        """Close the open shard without finishing it."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk may refuse the last bytes once more
                self._file.close()
            self._file = None

    def _finish(self) -> None:
        """Write the header of the open shard, whose number of tokens is known only now, and close it."""
        if self._file is None:
            return
        self._file.seek(0)
        self._file.write(struct.pack("<3i", *LLM_C[self._dtype], self._shards[-1]["tokens"]))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self._shards[-1]["sha256"] = sha256(self._folder / self._shards[-1]["file"])


def sha256(path: Path) -> str:
    """The sha256 of a file, hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _prepare_again(folder: Path) -> str:
    """The advice for a damaged corpus."""
    return f"delete the folder {folder} and run `mupsweep data prepare` again"
