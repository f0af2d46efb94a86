"""A tokenizer.json of Hugging Face's `tokenizers`, as Llama 3, Qwen 3 and Mistral come with.

The file itself says how many ids there are, what each of them decodes to and which special tokens end a document, so
that only encoding needs the package. A document is encoded without what a post-processor adds, such as a begin of text,
and without truncation; the names of special tokens inside it are plain text.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mupsweep.documents import parse_json
from mupsweep.errors import DataError, reason

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# What ends a document in pretraining: of Llama 3, of GPT-2, Qwen, OLMo and Phi, of Llama 2 and Mistral, of Gemma, of
# DeepSeek. The end of a turn of a chat (<|eot_id|>, <|im_end|>) is none, though an instruct model names it as its eos.
ENDS_OF_TEXT = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")
HIDDEN = "\uffff"  # no character: before the name of a token that no text may become
PARALLELISM = "TOKENIZERS_PARALLELISM"  # the package's own switch


@dataclass(frozen=True)
class TokenizerFile:
    """What a tokenizer.json says before it is loaded.

    Attributes:
        sha256: of the file.
        vocab_size: number of ids.
        added: content -> id of the tokens that are no part of the model's vocabulary.
    """

    path: Path
    sha256: str
    vocab_size: int
    added: Mapping[str, int]


def read(name: str) -> TokenizerFile:
    """The tokenizer.json at the path `name`.

    Raises:
        DataError: no such file, no json, no tokenizer of that package, or ids without a token.
    """
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            raise DataError(f"data.tokenizer={name} is a folder: name the file in it, {path / 'tokenizer.json'}")
        stat = os.stat(path)
        return _read(name, path, stat.st_mtime_ns, stat.st_size)
    except FileNotFoundError as error:
        raise DataError(f"data.tokenizer={name}: there is no such file; give the path of a tokenizer.json") from error
    except OSError as error:
        raise DataError(f"data.tokenizer={name} cannot be read: {reason(error)}") from error


@lru_cache(maxsize=8)
def _read(name: str, path: Path, mtime_ns: int, size: int) -> TokenizerFile:
    """The file of the given time and size; what is kept of it is small, where the whole takes a tenth of a GB."""
    raw = path.read_bytes()
    tokens = _tokens(_tree(name, raw), name)
    ids = sorted(set(tokens.ids))
    if ids != list(range(len(ids))):
        hole = next(i for i in range(ids[-1] + 1) if i >= len(ids) or ids[i] != i)
        raise DataError(
            f"data.tokenizer={name}: its vocabulary has holes, no token has id {hole} although ids reach {ids[-1]}: "
            "add tokens for the missing ids to its added_tokens, as the target's own file should have"
        )
    return TokenizerFile(path, hashlib.sha256(raw).hexdigest(), len(ids), tokens.added)


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a tokenizer.json: those of its model, as (content, id), and the added ones."""

    model: list[tuple[str, int]]
    added: dict[str, int]
    special: frozenset[int]

    @property
    def ids(self) -> list[int]:
        return [*(i for _, i in self.model), *self.added.values()]


def _tree(name: str, raw: bytes) -> dict[str, Any]:
    """The content of a tokenizer.json.

    Raises:
        DataError: it is no json, or no tokenizer.
    """
    try:
        tree = parse_json(raw)
    except ValueError as error:
        raise DataError(f"data.tokenizer={name} is no json, or damaged: {reason(error):.120}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict) or "vocab" not in tree["model"]:
        raise DataError(
            f"data.tokenizer={name} is no tokenizer.json of Hugging Face's tokenizers: it has no model.vocab"
        )
    return tree


def _tokens(tree: dict[str, Any], name: str) -> _Tokens:
    """The tokens of a tokenizer.json.

    Raises:
        DataError: its vocabulary is none.
    """
    vocab, added = tree["model"]["vocab"], tree.get("added_tokens") or []
    try:
        # of Unigram a list of [content, score], of the others a mapping content -> id
        model = [(t, i) for i, (t, _) in enumerate(vocab)] if isinstance(vocab, list) else list(vocab.items())
        contents = {token["content"]: token["id"] for token in added}
        special = frozenset(token["id"] for token in added if token.get("special"))
        tokens = _Tokens(model, contents, special)
        pairs = [*model, *contents.items()]
        if not pairs or not all(type(token) is str and type(i) is int and i >= 0 for token, i in pairs):
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"data.tokenizer={name} is damaged: model.vocab and added_tokens must give every token a number"
        ) from error
    return tokens


def end_of_text(name: str, chosen: str | None) -> int:
    """The id that ends a document.

    It is that of `data.end_of_text`, else of the one name in the file that is known to end documents, else of the
    eos_token in the tokenizer_config.json beside it.

    Raises:
        DataError: the token does not exist, or nothing says which it is.
    """
    file = read(name)
    listed = ", ".join(list(file.added)[:8]) + (", ..." if len(file.added) > 8 else "") or "(it has none)"
    if chosen is not None:
        if chosen not in file.added:
            raise DataError(f"data.end_of_text={chosen}: none of the added tokens of {name}; valid are {listed}")
        return file.added[chosen]
    known = [token for token in ENDS_OF_TEXT if token in file.added]
    if len(known) == 1:
        return file.added[known[0]]
    eos = _configured_eos(file.path.with_name("tokenizer_config.json"))
    if eos in file.added:
        return file.added[eos]
    raise DataError(
        f"data.tokenizer={name} does not say which token ends a document: set data.end_of_text to one of {listed}"
    )


def _configured_eos(path: Path) -> str:
    """The eos_token of a tokenizer_config.json; empty where there is none."""
    try:
        config = parse_json(path.read_bytes())
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({reason(error):.120}): mend it, or set data.end_of_text") from error
    eos = config.get("eos_token") if isinstance(config, dict) else None
    return str(eos.get("content", "") if isinstance(eos, dict) else eos or "")


Encode = Callable[[Sequence[str]], list["NDArray[np.integer]"]]


def load(name: str, end: int) -> tuple[tuple[bytes, ...], Encode]:
    """The bytes that each id decodes to, and the function that encodes texts.

    Args:
        end: the id that ends a document, which no text may contain.

    Raises:
        DataError: the package cannot load the file.
    """
    definition = read(name).path.read_bytes()
    tree = _tree(name, definition)
    tokens = _tokens(tree, name)
    pieces, vocab = _pieces(tree, tokens, end), tree["model"]["vocab"]
    is_unigram = isinstance(vocab, list)
    if end not in tokens.special or is_unigram:
        for token in tree["added_tokens"]:
            token["special"] = token["id"] in tokens.special | {end}
            if (
                is_unigram and token["special"] and token["id"] < len(vocab)
            ):  # whose name the model would find in a text
                token["content"] = vocab[token["id"]][0] = HIDDEN + token["content"]
        definition = json.dumps(tree).encode()
    return pieces, _encoder(name, definition, {token["content"]: token["id"] for token in tree["added_tokens"]})


def _encoder(name: str, definition: bytes, added: Mapping[str, int]) -> Encode:
    """The function that encodes texts, several at a time and without the interpreter's lock."""
    from tokenizers import Tokenizer

    # Our threads encode several batches at once. The package's own pool would make a process that is forked later, as
    # workers are, print a warning.
    os.environ.setdefault(PARALLELISM, "false")
    try:
        tokenizer = Tokenizer.from_buffer(definition)
    except Exception as error:  # the package raises plain Exceptions
        raise DataError(f"data.tokenizer={name}: the package tokenizers refuses it: {reason(error):.160}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # as text
    renumbered = next((token for token, i in added.items() if tokenizer.token_to_id(token) != i), None)
    if renumbered is not None:
        raise DataError(f"data.tokenizer={name}: the package tokenizers gives {renumbered} another id than the file")

    def encode(texts: Sequence[str]) -> list[NDArray[np.integer]]:
        import numpy as np

        try:
            encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:
            raise DataError(f"data.tokenizer={name} cannot encode a document: {reason(error):.160}") from error
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    return encode


def _pieces(tree: dict[str, Any], tokens: _Tokens, end: int) -> tuple[bytes, ...]:
    """The bytes of text that each id decodes to; none for special tokens.

    A vocabulary of bytes writes a byte as one character, a sentencepiece one a space as U+2581 and a byte that no token
    covers as <0x0A>.
    """
    value = byte_of_character() if '"ByteLevel"' in json.dumps([tree.get("pre_tokenizer"), tree.get("decoder")]) else {}
    falls_back = bool(tree["model"].get("byte_fallback"))
    pieces = [b""] * (max(tokens.ids) + 1)
    for token, i in tokens.model:
        if value and all(c in value for c in token):
            pieces[i] = bytes(value[c] for c in token)
        elif falls_back and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            pieces[i] = bytes([int(token[3:5], 16)])
        else:
            pieces[i] = token.replace("\u2581", " ").encode("utf-8", "replace")
    for token, i in tokens.added.items():
        pieces[i] = b"" if i in tokens.special or i == end else token.encode("utf-8", "replace")
    return tuple(pieces)


@lru_cache(maxsize=1)
def byte_of_character() -> dict[str, int]:
    """The byte that a character stands for in a vocabulary of bytes: itself where it has a glyph, else U+0100 onwards.

    Those with a glyph come first, which is the order of GPT-2's ids.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
