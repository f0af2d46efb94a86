"""Tokenizers: byte values, GPT-2, GPT-2 truncated to any smaller vocabulary, tiktoken's, and those of a tokenizer.json.

    bytes        256 byte values; 0x00 is the end of text (a NUL inside a document is encoded as a space)
    gpt2         50257 tokens, end of text 50256 (Radford et al. 2019)
    gpt2-V       the V-1 lowest ranks of GPT-2, end of text V-1, for V from 257 to 50256
    cl100k_base  100277 ids, end of text 100257: tiktoken's, from its cache or its download
    o200k_base   200019 ids, end of text 199999: likewise
    PATH.json    the file of Hugging Face's tokenizers (tokenizer_json.py)

Byte-pair merges apply in the order of their ranks, so a prefix of the list is a valid tokenizer by itself. The small
vocabularies are thus nested in the big one, and a sweep on a CPU need not compute 50257 logits.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mupsweep.data import tokenizer_json
from mupsweep.data.streams import token_dtype
from mupsweep.errors import DataError, reason
from mupsweep.formatting import nearest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tiktoken import Encoding

END = "<|endoftext|>"
SHIPPED = ("bytes", "gpt2", "gpt2-1024", "gpt2-4096")


class Published(NamedTuple):
    """An encoding of tiktoken: its number of ids, not all of them in use, its end of text, and its ranks' sha256."""

    vocab_size: int
    end_of_text: int
    sha256: str


# tiktoken_ext/openai_public.py of tiktoken 0.14, which compares the digests with its files
TIKTOKEN = {
    "cl100k_base": Published(100277, 100257, "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"),
    "o200k_base": Published(200019, 199999, "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"),
}
GPT2_VOCAB = 50257
MERGES = Path(__file__).parent / "corpora" / "gpt2-vocab.bpe"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# GPT-2's pre-tokenization, before bytes are merged: contractions, letters, digits, punctuation, white space.
PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LONG_BLANK = re.compile(r"\s{4096}(?=\s)")


def vocab_size(name: str) -> int:
    """The number of ids of the tokenizer `name`, without loading it.

    Raises:
        DataError: an unknown tokenizer, with the valid names, or a file that is no tokenizer.
    """
    if is_file(name):
        return tokenizer_json.read(name).vocab_size
    if name in TIKTOKEN:
        return TIKTOKEN[name].vocab_size
    if name == "bytes":
        return 256
    if name == "gpt2":
        return GPT2_VOCAB
    match = re.fullmatch(r"gpt2-([1-9][0-9]{2,4})", name)
    if match and 257 <= int(match[1]) < GPT2_VOCAB:
        return int(match[1])
    raise DataError(
        f"data.tokenizer={name}: no such tokenizer; {nearest(name, (*SHIPPED, *TIKTOKEN))}, gpt2-V for "
        f"any V from 257 to {GPT2_VOCAB - 1}, or the path of a tokenizer.json"
    )


def is_file(name: str) -> bool:
    """Whether `data.tokenizer` names a file, or a folder with one."""
    return name.endswith(".json") or "/" in name


def identity(name: str) -> str:
    """What stands for the tokenizer `name` in the identity of a run: its name, or of a file its digest."""
    return tokenizer_json.read(name).sha256 if is_file(name) else name


def digest(name: str, end_of_text: str | None = None) -> str:
    """sha256 of the definition of the tokenizer `name`: tokenizers of one digest give identical ids.

    Args:
        end_of_text: `data.end_of_text`, the token that follows every document.

    Raises:
        DataError: an unknown tokenizer, or an end of text that it does not have.
    """
    size = vocab_size(name)
    if is_file(name):
        definition: list[Any] = ["tokenizer.json", 1, identity(name), tokenizer_json.end_of_text(name, end_of_text)]
    elif end_of_text is not None:
        raise DataError(
            f"data.end_of_text={end_of_text}: {name} has an end of text of its own, set data.end_of_text=null"
        )
    elif name in TIKTOKEN:
        definition = ["tiktoken", 1, name, TIKTOKEN[name].sha256]
    else:
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
    _encode: Callable[[Sequence[str]], list[NDArray[np.integer]]]  # the ids of every text
    _encode_joined: Callable[[str], NDArray[np.integer]] | None = None  # reads END as the end of text

    def encode(self, text: str) -> NDArray[np.integer]:
        """The ids (n,) of one document, without the end of text; the name of a special token is read as plain text."""
        return self._encode([well_formed(text)])[0].astype(token_dtype(self.vocab_size))

    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """The ids of several well-formed texts, each followed by the end of text.

        Equal to encoding the texts one by one, but a tenth faster, since they are encoded joined where possible.
        """
        import numpy as np

        dtype = token_dtype(self.vocab_size)
        if self._encode_joined is not None and not any(END in text for text in texts):
            with contextlib.suppress(ValueError):  # some text has to be cut: then each is encoded on its own, below
                ids = self._encode_joined("".join(text + END for text in texts)).astype(dtype)
                return np.split(ids, np.flatnonzero(ids == self.end_of_text)[:-1] + 1)
        end = np.array([self.end_of_text], dtype=dtype)
        return [np.concatenate([ids, end], dtype=dtype, casting="unsafe") for ids in self._encode(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; the end of text decodes to nothing, incomplete UTF-8 to U+FFFD."""
        return b"".join(self._pieces[i] for i in ids).decode("utf-8", "replace")

    @cached_property
    def byte_lengths(self) -> NDArray[np.int64]:
        """(vocab_size,) bytes of text that each id encodes; 0 for the end of text and other special tokens."""
        import numpy as np

        return np.array([len(piece) for piece in self._pieces], dtype=np.int64)


def load(name: str, end_of_text: str | None = None) -> Tokenizer:
    """The tokenizer `name`.

    Args:
        end_of_text: `data.end_of_text`, the token that follows every document.

    Raises:
        DataError: an unknown tokenizer, a file that is none, or ranks that cannot be had.
    """
    return _load(name, end_of_text, digest(name, end_of_text))


@lru_cache
def _load(name: str, end_of_text: str | None, digest: str) -> Tokenizer:
    """The tokenizer `name` of the given digest, which changes with a file."""
    size = vocab_size(name)
    if is_file(name):
        end = tokenizer_json.end_of_text(name, end_of_text)
        return Tokenizer(name, size, end, digest, *tokenizer_json.load(name, end))
    if name == "bytes":
        pieces = (b"", *(bytes([b]) for b in range(1, 256)))
        return Tokenizer(name, size, 0, digest, pieces, lambda texts: [_encode_bytes(text) for text in texts])
    if name in TIKTOKEN:
        end, definition = TIKTOKEN[name].end_of_text, _tiktoken_definition(name)
        pieces = [b""] * size
        for piece, rank in definition["mergeable_ranks"].items():
            pieces[rank] = piece
    else:
        end = size - 1
        pieces = [*gpt2_pieces()[:end], b""]
        definition = {
            "name": name,
            "pat_str": PATTERN,
            "mergeable_ranks": {piece: rank for rank, piece in enumerate(pieces[:end])},
            "special_tokens": {END: end},
            "explicit_n_vocab": size,
        }
    encoding = _encoding_of_this_thread(definition)
    return Tokenizer(
        name,
        size,
        end,
        digest,
        tuple(pieces),
        lambda texts: [_encode_plain(encoding, text) for text in texts],
        partial(_encode_joined, encoding),
    )


def _tiktoken_definition(name: str) -> dict[str, Any]:
    """The arguments of tiktoken.Encoding for one of its own, whose ranks are read from its cache or downloaded."""
    from tiktoken_ext.openai_public import ENCODING_CONSTRUCTORS

    try:
        return ENCODING_CONSTRUCTORS[name]()
    except Exception as error:  # of requests, of the disk, or of a download that is damaged
        where = os.environ.get("TIKTOKEN_CACHE_DIR")
        raise DataError(
            f"data.tokenizer={name}: its ranks are not in tiktoken's cache ("
            f"{f'TIKTOKEN_CACHE_DIR={where}' if where else 'TIKTOKEN_CACHE_DIR is not set'}) and cannot be downloaded "
            f"({type(error).__name__}: {reason(error):.120}): on a machine with a network set TIKTOKEN_CACHE_DIR to a "
            f"folder that this one reads and run python -c \"import tiktoken; tiktoken.get_encoding('{name}')\" there"
        ) from error


def _encode_bytes(text: str) -> NDArray[np.integer]:
    """The UTF-8 bytes of a text as ids."""
    import numpy as np

    ids = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)
    ids[ids == 0] = ord(" ")  # 0 is the end of text
    return ids


def _encode_plain(encoding: Callable[[], Encoding], text: str) -> NDArray[np.integer]:
    """The ids of a text; the names of special tokens are read as plain text."""
    import numpy as np

    def encode(part: str) -> NDArray[np.integer]:
        return encoding().encode_to_numpy(part, disallowed_special=())

    try:
        return encode(text)
    except ValueError:
        # the regular expression overflows its stack on a very long run of white space, so such runs are cut
        cuts = [0, *(match.end() for match in LONG_BLANK.finditer(text)), len(text)]
        if len(cuts) == 2:
            raise
        return np.concatenate([encode(text[a:b]) for a, b in itertools.pairwise(cuts)])


def _encode_joined(encoding: Callable[[], Encoding], text: str) -> NDArray[np.integer]:
    """The ids of a text in which '<|endoftext|>' is the end of text."""
    return encoding().encode_to_numpy(text, allowed_special={END}, disallowed_special=())


def _encoding_of_this_thread(definition: dict[str, Any]) -> Callable[[], Encoding]:
    """A function that returns the calling thread's own encoding.

    A regular expression runs a fifth slower in threads other than the one that used it first.
    """
    import tiktoken

    thread_local = threading.local()

    def encoding() -> Encoding:
        if not hasattr(thread_local, "encoding"):
            thread_local.encoding = tiktoken.Encoding(**definition)
        return thread_local.encoding

    return encoding


@lru_cache(maxsize=1)
def gpt2_pieces() -> tuple[bytes, ...]:
    """The bytes of GPT-2's 50256 ranks: 256 byte values, printable ones first, then the merges in file order."""
    raw = MERGES.read_bytes()
    if hashlib.sha256(raw).hexdigest() != MERGES_SHA256:
        raise DataError(f"{MERGES} is damaged: its sha256 is not {MERGES_SHA256}; install mupsweep again")
    value = tokenizer_json.byte_of_character()
    merges = (line.replace(" ", "") for line in raw.decode().splitlines()[1:])
    return (
        *(bytes([byte]) for byte in value.values()),
        *(bytes(value[c] for c in merge) for merge in merges),
    )
