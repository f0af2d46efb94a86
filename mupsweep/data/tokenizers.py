"""Tokenizers: byte values, GPT-2, and GPT-2 truncated to any smaller vocabulary.

    bytes     256 byte values; 0x00 is the end of text (a NUL inside a document is encoded as a space)
    gpt2      50257 tokens, end of text 50256 (Radford et al. 2019)
    gpt2-V    the V-1 lowest ranks of GPT-2, end of text V-1, for V from 257 to 50256

Byte-pair merges apply in the order of their ranks, so a prefix of the list is a valid tokenizer by itself. The small
vocabularies are thus nested in the big one, and a sweep on a CPU need not compute 50257 logits.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from mupsweep.errors import DataError
from mupsweep.formatting import nearest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tiktoken import Encoding

END = "<|endoftext|>"
SHIPPED = ("bytes", "gpt2", "gpt2-1024", "gpt2-4096")
GPT2_VOCAB = 50257
MERGES = Path(__file__).parent / "corpora" / "gpt2-vocab.bpe"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# GPT-2's pre-tokenization, before bytes are merged: contractions, letters, digits, punctuation, white space.
PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LONG_BLANK = re.compile(r"\s{4096}(?=\s)")


def vocab_size(name: str) -> int:
    """The number of ids of the tokenizer `name`, without loading it.

    Raises:
        DataError: an unknown tokenizer, with the valid names.
    """
    if name == "bytes":
        return 256
    if name == "gpt2":
        return GPT2_VOCAB
    match = re.fullmatch(r"gpt2-([1-9][0-9]{2,4})", name)
    if match and 257 <= int(match[1]) < GPT2_VOCAB:
        return int(match[1])
    raise DataError(
        f"data.tokenizer={name}: no such tokenizer; {nearest(name, SHIPPED)}, or gpt2-V for "
        f"any V from 257 to {GPT2_VOCAB - 1}"
    )


def digest(name: str) -> str:
    """sha256 of the definition of the tokenizer `name`: tokenizers of one digest give identical ids."""
    size = vocab_size(name)
    definition = ["bytes", 1] if name == "bytes" else ["gpt2", 1, PATTERN, MERGES_SHA256, size]
    return hashlib.sha256(json.dumps(definition).encode()).hexdigest()


def well_formed(text: str) -> str:
    """`text` with every lone surrogate, which UTF-8 cannot hold, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer: text to ids and back. `load` makes it.

    Attributes:
        name: the value of `data.tokenizer`.
        vocab_size: number of ids, the end of text included.
        end_of_text: the id that follows every document.
        digest: sha256 of the tokenizer's definition.
    """

    name: str
    vocab_size: int
    end_of_text: int
    digest: str
    _pieces: tuple[bytes, ...]  # the bytes that each id decodes to
    _encode: Callable[[str], NDArray[np.uint16]]
    _encode_joined: Callable[[str], NDArray[np.uint16]] | None = None  # reads END as the end of text

    def encode(self, text: str) -> NDArray[np.uint16]:
        """The ids (n,) of one document, without the end of text; '<|endoftext|>' is read as plain text."""
        return self._encode(well_formed(text))

    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.uint16]]:
        """The ids of several well-formed texts, each followed by the end of text.

        Equal to encoding the texts one by one, but a tenth faster, since they are encoded joined where possible.
        """
        import numpy as np

        if self._encode_joined is not None and not any(END in text for text in texts):
            with contextlib.suppress(ValueError):  # some text has to be cut: then each is encoded on its own, below
                ids = self._encode_joined("".join(text + END for text in texts))
                return np.split(ids, np.flatnonzero(ids == self.end_of_text)[:-1] + 1)
        end = np.array([self.end_of_text], dtype=np.uint16)
        return [np.concatenate([self._encode(text), end]) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; the end of text decodes to nothing, incomplete UTF-8 to U+FFFD."""
        return b"".join(self._pieces[i] for i in ids).decode("utf-8", "replace")

    @cached_property
    def byte_lengths(self) -> NDArray[np.int64]:
        """(vocab_size,) number of bytes of text that each id encodes; 0 for the end of text."""
        import numpy as np

        return np.array([len(piece) for piece in self._pieces], dtype=np.int64)


@lru_cache
def load(name: str) -> Tokenizer:
    """The tokenizer `name`.

    Raises:
        DataError: an unknown tokenizer, or the shipped merge list is damaged.
    """
    size = vocab_size(name)
    if name == "bytes":
        pieces = (b"", *(bytes([b]) for b in range(1, 256)))
        return Tokenizer(name, size, 0, digest(name), pieces, _encode_bytes)
    end = size - 1
    ranks = {piece: rank for rank, piece in enumerate(gpt2_pieces()[:end])}
    encoding = _encoding_of_this_thread(ranks)
    return Tokenizer(
        name, size, end, digest(name), (*ranks, b""), partial(_encode_gpt2, encoding), partial(_encode_joined, encoding)
    )


def _encode_bytes(text: str) -> NDArray[np.uint16]:
    """The UTF-8 bytes of a text as ids."""
    import numpy as np

    ids = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)
    ids[ids == 0] = ord(" ")  # 0 is the end of text
    return ids


def _encode_gpt2(encoding: Callable[[], Encoding], text: str) -> NDArray[np.uint16]:
    """The ids of a text; '<|endoftext|>' is read as plain text."""
    import numpy as np

    def encode(part: str) -> NDArray[np.uint16]:
        return encoding().encode_to_numpy(part, disallowed_special=()).astype(np.uint16)

    try:
        return encode(text)
    except ValueError:
        # the regular expression overflows its stack on a very long run of white space, so such runs are cut
        cuts = [0, *(match.end() for match in LONG_BLANK.finditer(text)), len(text)]
        if len(cuts) == 2:
            raise
        return np.concatenate([encode(text[a:b]) for a, b in itertools.pairwise(cuts)])


def _encode_joined(encoding: Callable[[], Encoding], text: str) -> NDArray[np.uint16]:
    """The ids of a text in which '<|endoftext|>' is the end of text."""
    import numpy as np

    return encoding().encode_to_numpy(text, allowed_special={END}).astype(np.uint16)


def _encoding_of_this_thread(ranks: dict[bytes, int]) -> Callable[[], Encoding]:
    """A function that returns the calling thread's own encoding.

    A regular expression runs a fifth slower in threads other than the one that used it first.
    """
    import tiktoken

    end, thread_local = len(ranks), threading.local()

    def encoding() -> Encoding:
        if not hasattr(thread_local, "encoding"):
            thread_local.encoding = tiktoken.Encoding(
                f"gpt2-{end + 1}",
                pat_str=PATTERN,
                mergeable_ranks=ranks,
                special_tokens={END: end},
                explicit_n_vocab=end + 1,
            )
        return thread_local.encoding

    return encoding


@lru_cache(maxsize=1)
def gpt2_pieces() -> tuple[bytes, ...]:
    """The bytes of GPT-2's 50256 ranks: 256 byte values, printable ones first, then the merges in file order.

    The merge list writes a byte as one printable character: itself where it has a glyph, else U+0100 onwards.
    """
    raw = MERGES.read_bytes()
    if hashlib.sha256(raw).hexdigest() != MERGES_SHA256:
        raise DataError(f"{MERGES} is damaged: its sha256 is not {MERGES_SHA256}; install mupsweep again")
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    value = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    merges = (line.replace(" ", "") for line in raw.decode().splitlines()[1:])
    return (
        *(bytes([b]) for b in [*printable, *others]),
        *(bytes(value[c] for c in merge) for merge in merges),
    )
