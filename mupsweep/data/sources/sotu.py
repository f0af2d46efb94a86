"""The embedded corpus: the State of the Union addresses 1790-2021 (10.8 MB, CC0; see NOTICE.md)."""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Iterator
from pathlib import Path

from mupsweep.data.config import DataConfig
from mupsweep.data.sources import Source
from mupsweep.errors import DataError

CORPUS = Path(__file__).parents[1] / "corpora" / "sotu.jsonl.xz"
SHA256_XZ = "7077b62ae30c3ed8c28cfe7807cc3574c138cc4e4ed13ed87d641093f51792ce"


class Sotu(Source):
    """The 233 addresses, oldest first; no key of the config changes them."""

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        if config.path is not None:
            raise DataError(f"data.path={config.path} is not read by data=sotu: add data=local to train on your files")

    def documents(self) -> Iterator[str]:
        """The addresses, each ending in a newline.

        Raises:
            DataError: the shipped file is damaged.
        """
        raw = CORPUS.read_bytes() if CORPUS.is_file() else b""
        if hashlib.sha256(raw).hexdigest() != SHA256_XZ:
            raise DataError(f"{CORPUS} is damaged: its sha256 is not {SHA256_XZ}; install mupsweep again")
        for line in lzma.decompress(raw).splitlines():
            yield json.loads(line)["text"]

    def fingerprint(self) -> str:
        """The sha256 of the shipped file, which `documents` verifies."""
        return SHA256_XZ
