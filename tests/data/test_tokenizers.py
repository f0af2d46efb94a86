"""Tokenizers: published ids, nesting, round trips, and what names are valid."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mupsweep.data import tokenizers
from mupsweep.data.config import DataConfig
from mupsweep.data.sources.sotu import Sotu
from mupsweep.errors import DataError

NAMES = ("bytes", "gpt2-257", "gpt2-512", "gpt2-1024", "gpt2-4096", "gpt2")


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return list(Sotu(DataConfig()).documents())


@pytest.mark.parametrize(
    ("name", "size", "end"),
    [
        ("bytes", 256, 0),
        ("gpt2-257", 257, 256),
        ("gpt2-1024", 1024, 1023),
        ("gpt2-50256", 50256, 50255),
        ("gpt2", 50257, 50256),
    ],
)
def test_sizes_and_ends_of_text(name: str, size: int, end: int) -> None:
    tokenizer = tokenizers.load(name)
    assert (tokenizers.vocab_size(name), tokenizer.vocab_size, tokenizer.end_of_text) == (size, size, end)
    assert tokenizer.byte_lengths.shape == (size,)
    assert tokenizer.byte_lengths[end] == 0
    assert tokenizer.byte_lengths.min() == 0
    assert (tokenizer.byte_lengths == 0).sum() == 1


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("gpt2", [15496, 995]),
        ("bytes", [72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100]),
        # ASCII "!" is rank 0, a letter its code minus 33; space is the 33rd byte without a glyph: 220
        ("gpt2-257", [39, 68, 75, 75, 78, 220, 86, 78, 81, 75, 67]),
    ],
)
def test_hello_world(name: str, ids: list[int]) -> None:
    encoded = tokenizers.load(name).encode("Hello world")
    assert encoded.tolist() == ids
    assert encoded.dtype == np.uint16


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bytes", 1.00),
        ("gpt2-257", 1.00),
        ("gpt2-512", 2.17),
        ("gpt2-1024", 2.78),
        ("gpt2-4096", 3.86),
        ("gpt2", 5.19),
    ],
)
def test_bytes_per_token_on_the_corpus(corpus: list[str], name: str, expected: float) -> None:
    tokenizer = tokenizers.load(name)
    ids = np.concatenate([tokenizer.encode(text) for text in corpus])
    assert tokenizer.byte_lengths[ids].sum() == 10_761_390
    assert round(10_761_390 / len(ids), 2) == expected


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")))
def test_text_survives_the_round_trip(name: str, text: str) -> None:
    tokenizer = tokenizers.load(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert tokenizer.end_of_text not in ids


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text("ab \n'<|endoftext|>", max_size=30) | st.just("a<|endoftext|>b"), min_size=1))
def test_documents_together_are_documents_one_by_one(name: str, texts: list[str]) -> None:
    tokenizer = tokenizers.load(name)
    together = tokenizer.encode_documents(texts)
    assert [ids.tolist() for ids in together] == [[*tokenizer.encode(t).tolist(), tokenizer.end_of_text] for t in texts]
    assert {ids.dtype for ids in together} == {np.dtype(np.uint16)}


def test_a_document_that_must_be_cut_leaves_its_neighbours_alone() -> None:
    tokenizer = tokenizers.load("gpt2")
    texts = ["before", "x" + " " * 1_000_000, " " * 5000 + "after"]
    for together, text in zip(tokenizer.encode_documents(texts), texts, strict=True):
        assert together.tolist() == [*tokenizer.encode(text).tolist(), 50256]


def test_special_names_in_text_are_text() -> None:
    assert tokenizers.load("gpt2").encode("<|endoftext|>").tolist() == [27, 91, 437, 1659, 5239, 91, 29]


def test_a_nul_becomes_a_space_in_bytes_only() -> None:
    assert tokenizers.load("bytes").encode("a\0b").tolist() == [97, 32, 98]
    assert tokenizers.load("gpt2").decode(tokenizers.load("gpt2").encode("a\0b")) == "a\0b"


@pytest.mark.parametrize("name", NAMES)
def test_a_lone_surrogate_becomes_the_replacement_character(name: str) -> None:
    tokenizer = tokenizers.load(name)
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("text", [" " * 1_000_000, "x" + "\n" * 1_000_000 + "y", "z" * 100_000])
def test_long_runs_are_encoded(text: str) -> None:
    tokenizer = tokenizers.load("gpt2")
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_end_of_text_decodes_to_nothing() -> None:
    assert tokenizers.load("gpt2").decode([15496, 50256, 995]) == "Hello world"


def test_digests_tell_tokenizers_apart_and_are_pinned() -> None:
    assert len({tokenizers.digest(name) for name in NAMES}) == len(NAMES)
    assert tokenizers.digest("gpt2-1024").startswith("f615e58aa2e3b570")
    assert tokenizers.load("gpt2-1024").digest == tokenizers.digest("gpt2-1024")


@pytest.mark.parametrize("name", ["gtp2", "gpt2-256", "gpt2-50257", "gpt2-0512", "gpt2-", "", "byte"])
def test_unknown_names_name_the_valid_ones(name: str) -> None:
    with pytest.raises(
        DataError,
        match=r"^data\.tokenizer=.*bytes, cl100k_base, gpt2, gpt2-1024, gpt2-4096, o200k_base, gpt2-V for any V",
    ):
        tokenizers.vocab_size(name)


def test_names_sizes_and_fingerprints_import_nothing_heavy() -> None:
    code = (
        "import sys, mupsweep.data as d; from mupsweep.sweep.config import DataConfig; d.vocab_size('gpt2-1024');"
        "d.fingerprint(DataConfig());"
        "print([m for m in ('numpy', 'tiktoken', 'pyarrow', 'torch') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
