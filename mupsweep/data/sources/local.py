"""Your own files: text to encode, or token files to read as they are.

    .txt                            one document per file; a single file is cut in two, its end is the validation split
    .jsonl .jsonl.gz .jsonl.xz      one document per line, under the key data.text_column
    .parquet                        one document per row, in the column data.text_column
    .bin                            tokens: nanoGPT's (uint16 without a header), llm.c's (a header of 1024 bytes, uint16
                                    or uint32), Megatron-LM's (beside its .idx)

A folder is read whole, in the order of the relative names. It must hold files of one of the four kinds; files of other
kinds are ignored. Token files keep a split that their names declare (nanoGPT's train.bin and val.bin, llm.c's *_train_*
and *_val_*); without one, the last `data.validation_fraction` of the tokens is the validation split.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mupsweep.data import tokenizers
from mupsweep.data.config import DataConfig
from mupsweep.data.sources import ReadyTokens, Source
from mupsweep.data.streams import LLM_C, UINT16, UINT32, Segment, item_bytes, megatron_index, segment
from mupsweep.errors import DataError

FORMATS = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.xz": "jsonl",
    ".parquet": "parquet",
    ".bin": "bin",
}
ENOUGH = 64  # tokens of which every second one is 0 by no accident
CHUNKS, CHUNK_BYTES = 64, 64 * 1024  # the sample of a file that the fingerprint and the check of ids read


class Local(Source):
    """A file or a folder named by `data.path`."""

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        if config.path is None:
            raise DataError(f"data=local needs data.path=FILE_OR_FOLDER with {' '.join(FORMATS)} files")
        path = Path(config.path).expanduser()
        if not path.exists():
            raise DataError(f"data.path={config.path} does not exist: give a file or a folder with {' '.join(FORMATS)}")
        self._root = path if path.is_dir() else path.parent
        self._files, self._format = _files_and_format(path)

    @property
    def _is_single_text(self) -> bool:
        """Whether the corpus is one text file, which no hash of documents can split."""
        return self._format == "txt" and len(self._files) == 1

    def split(self, index: int) -> str | None:
        return ("train", "validation")[index] if self._is_single_text else None

    def fingerprint(self) -> str:
        """sha256 of the format, the text column, and each file's name, size and 64 evenly spaced chunks of 64 KiB."""
        column = self.config.text_column if self._format in ("jsonl", "parquet") else None
        hasher = hashlib.sha256(json.dumps(["local", 1, self._format, column]).encode())
        for path in self._files:
            size = path.stat().st_size
            hasher.update(json.dumps([path.relative_to(self._root).as_posix(), size]).encode())
            try:
                with open(path, "rb") as handle:
                    for offset in _sample_offsets(size):
                        handle.seek(offset)
                        hasher.update(handle.read(CHUNK_BYTES))
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}") from error
            index = megatron_index(path) if self._format == "bin" else None
            if index is not None and index.dtype != UINT16:  # uint16 is what it would be read as without the index
                hasher.update(index.dtype.encode())
        return hasher.hexdigest()

    def describe(self) -> dict[str, Any]:
        """The path, which is no part of the corpus's identity: the same files elsewhere are the same corpus."""
        return {"path": str(Path(str(self.config.path)).expanduser().resolve())}

    def documents(self) -> Iterator[str]:
        """The documents that are not empty, in the order of the files.

        Raises:
            DataError: an unreadable file, a missing column, a text that is no string, or a corpus without documents.
        """
        if self._format == "bin":
            raise DataError(f"{self._files[0]} holds tokens, not text: they are read as they are")
        read = {"txt": _read_txt, "jsonl": _read_jsonl, "parquet": _read_parquet}[self._format]
        empty = True
        for path in self._files:
            try:
                for where, text in read(path, self.config.text_column):
                    if text is not None and not isinstance(text, str):
                        raise DataError(
                            f"{where}: '{self.config.text_column}' is {type(text).__name__}, not text; "
                            "set data.text_column to one that is"
                        )
                    if text:
                        empty = False
                        if self._is_single_text:
                            yield from _cut_in_two(text, self.config.validation_fraction)
                        else:
                            yield text
            except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
                raise DataError(f"{path} cannot be read as .{self._format} in UTF-8: {error}") from error
        if empty:
            raise DataError(f"data.path={self.config.path} holds no text: every document is empty")

    def ready_tokens(self) -> ReadyTokens | None:
        """The token files with their split; None where the files hold text.

        Raises:
            DataError: a damaged file, or ids beyond the vocabulary of `data.tokenizer`.
        """
        if self._format != "bin":
            return None
        size = tokenizers.vocab_size(self.config.tokenizer)
        segments = [segment(path, size) for path in self._files]
        for token_file in segments:
            self._check_ids(token_file, size)
        validation = [s for s in segments if re.search(r"(^|[^a-z])val(idation)?([^a-z]|$)", s.path.stem.lower())]
        train = [s for s in segments if s not in validation]
        if not validation:
            total = sum(s.tokens for s in segments)
            cut = total - round(total * self.config.validation_fraction)
            train, validation = _window(segments, 0, cut), _window(segments, cut, total)
        if not sum(s.tokens for s in train) or not sum(s.tokens for s in validation):
            raise DataError(
                f"data.path={self.config.path}: the token files give no "
                f"{'validation' if train else 'training'} tokens; put train.bin and val.bin into one folder"
            )
        limit = self.config.max_tokens
        return ReadyTokens(tuple(train if limit is None else _window(train, 0, limit)), tuple(validation))

    def _check_ids(self, token_file: Segment, vocab_size: int) -> None:
        """Refuse ids beyond the vocabulary in a sample of the file; batches are checked again as they are read."""
        import numpy as np

        width = item_bytes(token_file.dtype)
        tokens = token_file.open()
        starts = [offset // (2 * width) * 2 for offset in _sample_offsets(width * len(tokens))]
        chunks = [tokens[start : start + CHUNK_BYTES // width] for start in starts]
        headerless = token_file.offset == 0 and token_file.dtype == UINT16
        even, odd = (any(np.any(chunk[first::2]) for chunk in chunks) for first in (0, 1))
        if headerless and len(tokens) >= ENOUGH and even and not odd:
            raise DataError(
                f"{token_file.path} has no header, so its tokens are uint16, but every second one is 0, as of wider "
                f"tokens: write uint16, llm.c's header of magic {LLM_C[UINT32][0]} before uint32, or Megatron's .idx"
            )
        smallest = min((int(np.min(chunk)) for chunk in chunks), default=0)
        largest = max((int(np.max(chunk)) for chunk in chunks), default=0)
        if smallest < 0 or largest >= vocab_size:
            raise DataError(
                f"{token_file.path} holds token {min(smallest, 0) or largest}, but "
                f"data.tokenizer={self.config.tokenizer} ends at {vocab_size - 1}: set data.tokenizer to the one that "
                "wrote the file, gpt2 for nanoGPT and llm.c"
            )


def _files_and_format(path: Path) -> tuple[list[Path], str]:
    """The files of the corpus, in order, and their one format."""
    if path.is_file():
        file_format = _format(path)
        if file_format is None:
            raise DataError(f"data.path={path} is of no known kind: valid are {' '.join(FORMATS)}")
        validation = path.with_name("val.bin")
        return ([path, validation] if path.name == "train.bin" and validation.is_file() else [path]), file_format
    names = [p.relative_to(path) for p in path.rglob("*") if p.is_file()]
    visible = [n for n in names if not any(part.startswith(".") for part in n.parts)]
    files = [path / n for n in sorted(visible, key=lambda n: n.as_posix()) if _format(n)]
    first_of_format = {_format(file): file for file in reversed(files)}
    if not files:
        raise DataError(f"data.path={path} holds no file of a known kind: valid are {' '.join(FORMATS)}")
    if len(first_of_format) > 1:
        examples = ", ".join(f.relative_to(path).as_posix() for f in sorted(first_of_format.values()))
        raise DataError(f"data.path={path} mixes kinds of files ({examples}): name one file, or a folder of one kind")
    return files, str(_format(files[0]))


def _format(path: Path) -> str | None:
    """The format of a file by its suffix; None where it is unknown."""
    name = path.name.lower()
    return next((file_format for suffix, file_format in FORMATS.items() if name.endswith(suffix)), None)


def _sample_offsets(size: int) -> list[int]:
    """Offsets of the chunks that are read of a file of `size` bytes; they cover all of a small file."""
    if size <= CHUNKS * CHUNK_BYTES:
        return list(range(0, size, CHUNK_BYTES))
    last = size - CHUNK_BYTES
    return [last * i // (CHUNKS - 1) for i in range(CHUNKS)]


def _window(segments: list[Segment], start: int, stop: int) -> list[Segment]:
    """The tokens from `start` to `stop` of the segments laid end to end."""
    window, begin = [], 0
    for s in segments:
        first, last = max(start - begin, 0), min(stop - begin, s.tokens)
        if first < last:
            window.append(replace(s, offset=s.offset + item_bytes(s.dtype) * first, tokens=last - first))
        begin += s.tokens
    return window


def _read_txt(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    """(where, text) of the one document of a text file."""
    yield str(path), path.read_bytes().decode()


def _cut_in_two(text: str, fraction: float) -> Iterator[str]:
    """The text without its last `fraction`, and that fraction, cut at the end of a line where there is one."""
    cut = len(text) - round(len(text) * fraction)
    cut = text.rfind("\n", 0, cut) + 1 or cut
    yield from filter(None, (text[:cut], text[cut:]))


def _read_jsonl(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    """(where, text) of every line of a file of json objects."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower(), open)
    with opener(path, "rb") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{where} is not JSON: {error.msg}; .jsonl holds one object a line") from error
            if not isinstance(row, dict):
                raise DataError(f"{where} is {type(row).__name__}, not an object; .jsonl holds one object a line")
            if column not in row:
                raise DataError(_no_column(where, column, list(row)))
            yield where, row[column]


def _read_parquet(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    """(where, text) of every row of a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise DataError(_no_column(str(path), column, file.schema_arrow.names))
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(1024, row_groups=[group], columns=[column]):
                    for text in batch.column(0).to_pylist():
                        yield f"{path}, row group {group}", text
    except pa.ArrowException as error:
        raise DataError(f"{path} cannot be read as .parquet: {str(error).splitlines()[0]}") from error


def _no_column(where: str, column: str, valid: list[str]) -> str:
    """The message for a missing text column."""
    names = ", ".join(map(str, valid)) or "(it has none)"
    return f"{where} has no '{column}': set data.text_column to one of {names}"
