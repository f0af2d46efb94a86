"""Your own files: text to encode, or token files to read as they are.

    .txt                            one document a file; a lone file is cut in two, its end is the validation split
    .jsonl .jsonl.gz .jsonl.xz      one document a line, under the key data.text_column
    .parquet                        one document a row, in the column data.text_column
    .bin                            uint16 tokens: nanoGPT's (no header) or llm.c's (header of 1024 bytes)

A folder is read whole, in the order of the relative names; it must hold one of the four kinds, others are
passed over. Token files keep a split that their names declare (nanoGPT's train.bin and val.bin, llm.c's
*_train_* and *_val_*); without one the last `data.validation_fraction` of the tokens is the validation split.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mupsweep.data import tokenizers
from mupsweep.data.config import DataConfig
from mupsweep.data.sources import ReadyTokens, Source
from mupsweep.data.streams import Segment, segment
from mupsweep.errors import DataError

FORMATS = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.xz": "jsonl",
    ".parquet": "parquet",
}
FORMATS[".bin"] = "bin"
CHUNKS, CHUNK_BYTES = 64, 64 * 1024  # what the fingerprint and the check of ids read of a file


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
        self._files, self._format = _find(path)

    @property
    def _alone(self) -> bool:
        """Whether all there is is one text, so that no hash of documents can split it."""
        return self._format == "txt" and len(self._files) == 1

    def split(self, index: int) -> str | None:
        return ("train", "validation")[index] if self._alone else None

    def fingerprint(self) -> str:
        """sha256 over the name, size and 64 evenly spaced 64-KiB chunks of each file, and how it is read."""
        column = self.config.text_column if self._format in ("jsonl", "parquet") else None
        hasher = hashlib.sha256(json.dumps(["local", 1, self._format, column]).encode())
        for path in self._files:
            size = path.stat().st_size
            hasher.update(json.dumps([path.relative_to(self._root).as_posix(), size]).encode())
            try:
                with open(path, "rb") as handle:
                    for offset in _spread(size):
                        handle.seek(offset)
                        hasher.update(handle.read(CHUNK_BYTES))
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}") from error
        return hasher.hexdigest()

    def documents(self) -> Iterator[str]:
        """The documents that are not empty, in the order of the files.

        Raises:
            DataError: an unreadable file, a missing column, a text that is no string, or no document at all.
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
                        yield from _in_two(text, self.config.validation_fraction) if self._alone else (text,)
            except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
                raise DataError(f"{path} cannot be read as .{self._format} in UTF-8: {error}") from error
        if empty:
            raise DataError(f"data.path={self.config.path} holds no text: every document is empty")

    def ready_tokens(self) -> ReadyTokens | None:
        """The token files with their split; None where the files hold text.

        Raises:
            DataError: a damaged file, or ids that `data.tokenizer` does not have.
        """
        if self._format != "bin":
            return None
        segments = [segment(path) for path in self._files]
        for part in segments:
            self._check_ids(part)
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

    def _check_ids(self, part: Segment) -> None:
        """Reads a sample only: batches are checked again as they are read."""
        import numpy as np

        size = tokenizers.vocab_size(self.config.tokenizer)
        tokens = part.open()
        offsets = [o // 2 for o in _spread(2 * part.tokens)]
        largest = max((int(np.max(tokens[o : o + CHUNK_BYTES // 2])) for o in offsets), default=0)
        if largest >= size:
            raise DataError(
                f"{part.path} holds token {largest}, but data.tokenizer={self.config.tokenizer} ends at "
                f"{size - 1}: set data.tokenizer to the one that wrote the file, gpt2 for nanoGPT and llm.c"
            )


def _find(path: Path) -> tuple[list[Path], str]:
    """(files in order, their format): one format only."""
    if path.is_file():
        found = _format(path)
        if found is None:
            raise DataError(f"data.path={path} is of no known kind: valid are {' '.join(FORMATS)}")
        twin = path.with_name("val.bin")
        return ([path, twin] if path.name == "train.bin" and twin.is_file() else [path]), found
    names = [p.relative_to(path) for p in path.rglob("*") if p.is_file()]
    visible = [n for n in names if not any(part.startswith(".") for part in n.parts)]
    files = [path / n for n in sorted(visible, key=lambda n: n.as_posix()) if _format(n)]
    kinds = {_format(f): f for f in reversed(files)}
    if not files:
        raise DataError(f"data.path={path} holds no file of a known kind: valid are {' '.join(FORMATS)}")
    if len(kinds) > 1:
        examples = ", ".join(f.relative_to(path).as_posix() for f in sorted(kinds.values()))
        raise DataError(f"data.path={path} mixes kinds of files ({examples}): name one file, or a folder of one kind")
    return files, str(_format(files[0]))


def _format(path: Path) -> str | None:
    name = path.name.lower()
    return next((kind for suffix, kind in FORMATS.items() if name.endswith(suffix)), None)


def _spread(size: int) -> list[int]:
    """Offsets of the chunks that stand for a file of `size` bytes; all of it where it is small."""
    if size <= CHUNKS * CHUNK_BYTES:
        return list(range(0, size, CHUNK_BYTES))
    last = size - CHUNK_BYTES
    return [last * i // (CHUNKS - 1) for i in range(CHUNKS)]


def _window(segments: list[Segment], start: int, stop: int) -> list[Segment]:
    """The tokens start..stop of the segments laid end to end."""
    cut, begin = [], 0
    for s in segments:
        a, b = max(start - begin, 0), min(stop - begin, s.tokens)
        if a < b:
            cut.append(Segment(s.path, s.offset + 2 * a, b - a))
        begin += s.tokens
    return cut


def _read_txt(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    yield str(path), path.read_bytes().decode()


def _in_two(text: str, fraction: float) -> Iterator[str]:
    """The text, and its last `fraction`, cut at the end of a line where there is one."""
    cut = len(text) - round(len(text) * fraction)
    cut = text.rfind("\n", 0, cut) + 1 or cut
    yield from filter(None, (text[:cut], text[cut:]))


def _read_jsonl(path: Path, column: str) -> Iterator[tuple[str, Any]]:
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
    names = ", ".join(map(str, valid)) or "(it has none)"
    return f"{where} has no '{column}': set data.text_column to one of {names}"
