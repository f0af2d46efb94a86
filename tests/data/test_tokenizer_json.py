"""A tokenizer.json of one's own, tiktoken's encodings: the library's tokens, ends of text, identity, bad input."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from tiktoken_ext import openai_public
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mupsweep import data
from mupsweep.data import cache, shards, tokenizer_json, tokenizers
from mupsweep.data.config import DataConfig
from mupsweep.data.sources.sotu import Sotu
from mupsweep.errors import DataError
from mupsweep.sweep.config import Variant, load
from mupsweep.sweep.run_identity import digest_of

LLAMA_3 = (  # its pre-tokenization
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMES_OF_TOKENS = "<|endoftext|> <|begin_of_text|> <|end_of_text|>x<s>[INST]</s> <think><|im_end|> <unk> ▁ <0x0A> Ġ"


def every_script() -> Iterator[str]:
    """Every assigned character of Unicode, in documents of 1,500."""
    assigned = [chr(c) for c in range(1, 0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Co", "Cs")]
    for start in range(0, len(assigned), 1500):
        yield "".join(assigned[start : start + 1500])


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    speech = "".join(list(Sotu(DataConfig()).documents())[:5])
    odd = ["", " ", "\n\n", "  two", NAMES_OF_TOKENS, "e\u0301 é ﬁ", "x" * 3000 + " " * 3000, speech]
    return [*list(every_script())[::8], *odd]


def save(tokenizer: Tokenizer, folder: Path) -> str:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The paths of small tokenizers of three kinds."""
    root = tmp_path_factory.mktemp("tokenizers")
    text = [document[:20_000] for document in list(Sotu(DataConfig()).documents())[:5]]

    llama = Tokenizer(models.BPE(ignore_merges=True))
    llama.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    llama.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    llama.train_from_iterator(text, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    llama.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])

    qwen = Tokenizer.from_str(llama.to_str().replace("<|end_of_text|>", "<|endoftext|>").replace("eot_id", "im_end"))
    qwen.normalizer = normalizers.NFC()
    qwen.add_tokens([AddedToken("<think>", special=False, normalized=False)])

    mistral = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    mistral.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    mistral.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    mistral.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False, limit_alphabet=80)
    )
    tree = json.loads(mistral.to_str())
    tree["added_tokens"] = tree["added_tokens"][:3]  # bytes are ordinary tokens
    mistral = Tokenizer.from_str(json.dumps(tree))

    unigram = Tokenizer(models.Unigram())
    unigram.normalizer = normalizers.NFKC()
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.train_from_iterator(
        text,
        trainers.UnigramTrainer(
            vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
        ),
    )
    kinds = {"llama": llama, "qwen": qwen, "mistral": mistral, "unigram": unigram}
    return {kind: save(tokenizer, root / kind) for kind, tokenizer in kinds.items()}


KINDS = ("llama", "qwen", "mistral", "unigram")


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_librarys_own(kind: str, files: dict[str, str], corpus: list[str]) -> None:
    library = Tokenizer.from_file(files[kind])
    library.encode_special_tokens = True
    expected = [encoding.ids for encoding in library.encode_batch(corpus, add_special_tokens=False)]
    tokenizer = tokenizers.load(files[kind])
    together = tokenizer.encode_documents(corpus)
    if kind == "unigram":  # whose model knows the name </s> as a piece, so that the library gives its id
        index = corpus.index(NAMES_OF_TOKENS)
        assert expected[index].count(tokenizer.end_of_text) == 1
        expected[index] = tokenizer.encode(NAMES_OF_TOKENS).tolist()
    assert [ids.tolist() for ids in together] == [[*ids, tokenizer.end_of_text] for ids in expected]
    assert [tokenizer.encode(text).tolist() for text in corpus[-8:]] == expected[-8:]
    assert not any((ids[:-1] == tokenizer.end_of_text).any() for ids in together)  # not even of NAMES_OF_TOKENS
    assert {ids.dtype for ids in together} == {np.dtype("<u2")}
    assert tokenizer.vocab_size == library.get_vocab_size()


def test_bytes_of_a_byte_level_tokenizer_are_those_of_the_text(files: dict[str, str], corpus: list[str]) -> None:
    tokenizer = tokenizers.load(files["llama"])
    for text, ids in zip(corpus, tokenizer.encode_documents(corpus), strict=True):
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
        assert tokenizer.decode(ids) == text
    assert (tokenizer.byte_lengths == 0).sum() == 3  # the special tokens


def test_bytes_of_a_sentencepiece_tokenizer_are_those_of_the_text_and_of_the_space_before_it(
    files: dict[str, str],
) -> None:
    tokenizer = tokenizers.load(files["mistral"])
    for text in ("the Congress", "naïve 漢字\n\t🙂"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == " " + text
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode()) + 1


@pytest.mark.parametrize("kind", KINDS)
def test_prepared_tokens_count_the_bytes_of_the_validation_text(
    kind: str, files: dict[str, str], speeches: str, tmp_path: Path
) -> None:
    config = of_speeches(speeches, tmp_path, files[kind])
    dataset = data.prepare(config)
    folder = cache.folder(config, dataset.content_id)
    assert folder.name == f"speeches-tokenizer.json-{dataset.content_id[:12]}"
    meta = shards.verify(folder)
    assert (meta["tokenizer"], meta["tokenizer_digest"]) == (files[kind], tokenizers.digest(files[kind]))
    tokens = dataset.validation.blocks([0], len(dataset.validation) - 1)
    assert meta["splits"]["validation"]["documents"] > 5
    assert (tokens == tokenizers.load(files[kind]).end_of_text).sum() == meta["splits"]["validation"]["documents"]
    assert dataset.byte_count(tokens) == meta["splits"]["validation"]["bytes"]
    (entry,) = cache.entries(config)
    assert (entry.state, entry.tokenizer) == (cache.READY, files[kind])


def test_stored_byte_lengths_need_no_tokenizer_and_are_verified(
    files: dict[str, str], speeches: str, tmp_path: Path
) -> None:
    path = shutil.copy(files["mistral"], tmp_path / "mine.json")
    config = of_speeches(speeches, tmp_path, str(path))
    dataset = data.prepare(config)
    Path(path).unlink()
    assert dataset.byte_count(np.array([[5 + ord("a")]])) > 0  # that of <0x61>, whose byte is not of a tokenizer
    lengths = cache.folder(config, dataset.content_id) / "byte-lengths.npy"
    os.truncate(lengths, 200)
    with pytest.raises(DataError, match=r"byte-lengths\.npy is damaged .*: delete the folder"):
        data.Dataset("", str(path), dataset.vocab_size, dataset.train, dataset.validation, lengths.parent).byte_count(
            np.array([1])
        )
    with pytest.raises(DataError, match=r"the sha256 of byte-lengths\.npy differs"):
        shards.verify(lengths.parent)


@pytest.fixture(scope="module")
def speeches(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a corpus of 60 documents of 2,000 characters."""
    texts = (text[2000 * i : 2000 * i + 2000] for text in list(Sotu(DataConfig()).documents())[:6] for i in range(10))
    path = tmp_path_factory.mktemp("speeches") / "speeches.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if text))
    return str(path)


def of_speeches(path: str, cache: Path, tokenizer: str, **keys: Any) -> DataConfig:
    kind = "mupsweep.data.sources.local.Local"
    given = {"name": "speeches", "kind": kind, "path": path, "cache": str(cache), "validation_fraction": 0.3}
    return DataConfig(tokenizer=tokenizer, **{**given, **keys})


@pytest.fixture(scope="module")
def wide(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The llama tokenizer with 65,536 ids, most of them of no merge and before the special ones."""
    tree = json.loads(Path(files["llama"]).read_text())
    tree["model"]["vocab"] |= {f"reserved{i}": i for i in range(600, 65_533)}
    for i, token in enumerate(tree["added_tokens"]):
        token["id"] = 65_533 + i
    path = tmp_path_factory.mktemp("wide") / "tokenizer.json"
    path.write_text(json.dumps(tree))
    return str(path)


def test_shards_of_65536_ids_are_llm_cs_uint32(wide: str, files: dict[str, str], speeches: str, tmp_path: Path) -> None:
    config = of_speeches(speeches, tmp_path, wide, max_tokens=20_000)
    dataset = data.prepare(config)
    folder = cache.folder(config, dataset.content_id)
    shard = folder / "train-00000.bin"
    assert np.fromfile(shard, dtype="<i4", count=256)[:4].tolist() == [20240801, 7, 20_000, 0]
    assert shard.stat().st_size == 1024 + 4 * 20_000
    narrow = data.prepare(replace(config, tokenizer=files["llama"])).train.blocks([0], 19_999)
    assert (narrow == 601).sum() > 5
    assert (dataset.train.blocks([0], 19_999) == np.where(narrow == 601, 65_534, narrow)).all()
    assert shards.verify(folder)["dtype"] == "<u4"
    # the shards are token files that anybody may read as they are
    ready = data.prepare(
        DataConfig(kind="mupsweep.data.sources.local.Local", path=str(shard), tokenizer=wide, validation_fraction=0.1)
    )
    assert (len(ready.train), len(ready.validation)) == (18_000, 2_000)
    assert (ready.train.blocks([0], 17_999) == dataset.train.blocks([0], 17_999)).all()
    assert (ready.validation.blocks([0], 1_999) == dataset.train.blocks([0], 19_999)[:, 18_000:]).all()


def test_the_run_follows_the_file_and_not_its_place(files: dict[str, str], tmp_path: Path) -> None:
    ours = load(["experiment=smoke"]).variants[0]
    command = ["trainer=command", "trainer.command=python x.py {lr} {dir}", "trainer.metrics=log.jsonl"]
    program = load(["experiment=smoke", *command]).variants[0]

    def run(tokenizer: str, end_of_text: str | None = None, variant: Variant = ours) -> str:
        return digest_of(replace(variant, data=replace(variant.data, tokenizer=tokenizer, end_of_text=end_of_text)))

    moved = str(shutil.copy(files["llama"], tmp_path / "elsewhere.json"))
    first = run(files["llama"])
    assert run(moved) == first == run(moved, "<|end_of_text|>")
    assert len({first, run(moved, "<|eot_id|>"), run(files["qwen"]), run("gpt2"), run("cl100k_base")}) == 5
    assert run(moved, variant=program) == run(files["llama"], variant=program) != run(files["qwen"], variant=program)
    Path(moved).write_text(Path(moved).read_text() + " ")
    assert run(moved) != first


def test_a_file_that_changes_is_loaded_again(files: dict[str, str], tmp_path: Path) -> None:
    path = str(shutil.copy(files["llama"], tmp_path / "tokenizer.json"))
    before = tokenizers.load(path)
    shutil.copy(files["mistral"], path)
    assert tokenizers.load(path).vocab_size != before.vocab_size


def ends(path: str, chosen: str | None = None) -> str:
    """The token that ends a document."""
    token = Tokenizer.from_file(path).id_to_token(tokenizer_json.end_of_text(path, chosen))
    assert token is not None
    return token


def with_added(path: str, tmp_path: Path, rename: dict[str, str], special: bool = True) -> Path:
    """A copy of a tokenizer whose added tokens have other names."""
    tree = json.loads(Path(path).read_text())
    for token in tree["added_tokens"]:
        token["content"] = rename.get(token["content"], token["content"])
        token["special"] = token["special"] and special
    copy = tmp_path / "tokenizer.json"
    copy.write_text(json.dumps(tree))
    return copy


def test_the_end_of_text_is_the_known_one_the_configured_or_the_chosen_one(
    files: dict[str, str], tmp_path: Path
) -> None:
    assert {kind: ends(path) for kind, path in files.items()} == {
        "llama": "<|end_of_text|>",
        "qwen": "<|endoftext|>",
        "mistral": "</s>",
        "unigram": "</s>",
    }
    Path(files["qwen"]).with_name("tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert ends(files["qwen"]) == "<|endoftext|>"  # and not the end of a turn of a chat
    assert ends(files["qwen"], "<|im_end|>") == "<|im_end|>"
    own = with_added(files["llama"], tmp_path, {"<|end_of_text|>": "<stop>"})
    with pytest.raises(
        DataError, match=r"does not say which token ends a document: set data\.end_of_text to one of <\|b"
    ):
        ends(str(own))
    for eos in ('"<stop>"', '{"content": "<stop>", "special": true}'):
        (tmp_path / "tokenizer_config.json").write_text(f'{{"eos_token": {eos}}}')
        assert ends(str(own)) == "<stop>"
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json cannot be read .* set data\.end_of_text"):
        ends(str(own))
    assert ends(str(own), "<stop>") == "<stop>"
    with pytest.raises(
        DataError, match=r"^data\.end_of_text=<end>: none of the added tokens of .*; valid are <\|begin"
    ):
        ends(str(own), "<end>")


def test_an_end_of_text_that_is_not_special_is_text_in_a_document_all_the_same(
    files: dict[str, str], tmp_path: Path
) -> None:
    plain = with_added(files["llama"], tmp_path, {}, special=False)
    tokenizer = tokenizers.load(str(plain))
    text = "a<|end_of_text|>b"
    assert tokenizer.encode(text).tolist() == tokenizers.load(files["llama"]).encode(text).tolist()


def test_a_tokenizer_that_truncates_and_pads_does_neither(files: dict[str, str], tmp_path: Path) -> None:
    cutting = Tokenizer.from_file(files["llama"])
    cutting.enable_truncation(5)
    cutting.enable_padding(length=9)
    path, texts = save(cutting, tmp_path / "cutting"), ["The Senate of the United States", "x"]
    together = tokenizers.load(path).encode_documents(texts)
    expected = tokenizers.load(files["llama"]).encode_documents(texts)
    assert [ids.tolist() for ids in together] == [ids.tolist() for ids in expected]


def broken(tree: dict[str, Any], change: str) -> str:
    """A tokenizer.json that is none in one way."""
    if change == "hole":
        tree["added_tokens"][-1]["id"] += 5
    elif change == "words":
        tree["model"]["vocab"] = "a b c"
    elif change == "negative":
        tree["added_tokens"][0]["id"] = -1
    elif change == "text ids":
        tree["model"]["vocab"]["a"] = "1"
    elif change == "no content":
        del tree["added_tokens"][0]["content"]
    elif change == "refused":
        tree["pre_tokenizer"] = {"type": "Mine"}
    elif change == "renumbered":
        first, second = tree["added_tokens"][:2]
        first["id"], second["id"] = second["id"], first["id"]
    elif change == "deep":
        return "[" * 100_000
    elif change == "other":
        return json.dumps({"model": "llama"})
    else:
        return json.dumps(tree)[:-2000]
    return json.dumps(tree)


BROKEN = {
    "hole": r"its vocabulary has holes, no token has id 602 although ids reach 607",
    "words": r"is damaged: model\.vocab and added_tokens must give every token a number",
    "negative": r"is damaged: model\.vocab and added_tokens must give every token a number",
    "text ids": r"is damaged: model\.vocab and added_tokens must give every token a number",
    "no content": r"is damaged: model\.vocab and added_tokens must give every token a number",
    "refused": r"the package tokenizers refuses it: ",
    "renumbered": r"the package tokenizers gives <\|begin_of_text\|> another id than the file",
    "deep": r"is no json, or damaged: nested too deeply",
    "other": r"is no tokenizer\.json of Hugging Face's tokenizers: it has no model\.vocab",
    "cut": r"is no json, or damaged: ",
}


@pytest.mark.parametrize("change", BROKEN)
def test_a_damaged_file_costs_one_line(change: str, files: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(broken(json.loads(Path(files["llama"]).read_text()), change))
    with pytest.raises(DataError, match=rf"^data\.tokenizer={path}:? .*{BROKEN[change]}|{BROKEN[change]}") as caught:
        tokenizers.load(str(path))
    assert "\n" not in str(caught.value)


def test_a_path_without_a_tokenizer_costs_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"/nowhere/tokenizer\.json: there is no such file; give the path of"):
        tokenizers.vocab_size("/nowhere/tokenizer.json")
    with pytest.raises(DataError, match=r"is a folder: name the file in it, .*tokenizer\.json"):
        tokenizers.vocab_size(f"{tmp_path}/")
    with pytest.raises(DataError, match=r"^data\.end_of_text=x: gpt2 has an end of text of its own"):
        tokenizers.digest("gpt2", "x")


def test_a_document_that_the_package_cannot_encode_costs_one_line(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="<missing>"))
    words.add_special_tokens(["</s>"])
    with pytest.raises(DataError, match=r"cannot encode a document: WordLevel error: Missing \[UNK\]"):
        tokenizers.load(save(words, tmp_path / "words")).encode("b")


@pytest.mark.parametrize("name", tokenizers.TIKTOKEN)
def test_tiktokens_encodings_have_its_sizes_and_digests(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, str] = {}

    def ranks(path: str, expected_hash: str) -> dict[bytes, int]:
        asked[path] = expected_hash
        return {bytes([byte]): byte for byte in range(256)}

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", ranks)
    definition = openai_public.ENCODING_CONSTRUCTORS[name]()
    published = tokenizers.TIKTOKEN[name]
    assert list(asked.values()) == [published.sha256]
    assert max(definition["special_tokens"].values()) + 1 == published.vocab_size == tokenizers.vocab_size(name)
    assert definition["special_tokens"]["<|endoftext|>"] == published.end_of_text
    assert len({tokenizers.digest(known) for known in ("gpt2", *tokenizers.TIKTOKEN)}) == 3


@pytest.mark.parametrize("name", tokenizers.TIKTOKEN)
def test_tiktokens_tokens_are_its_own(name: str, monkeypatch: pytest.MonkeyPatch, corpus: list[str]) -> None:
    """With the ranks of GPT-2, which are at hand, under the real pattern and special tokens."""
    ranks = {piece: rank for rank, piece in enumerate(tokenizers.gpt2_pieces())}
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda path, expected_hash: ranks)
    tokenizers._load.cache_clear()
    library = tiktoken.Encoding(**openai_public.ENCODING_CONSTRUCTORS[name]())
    tokenizer = tokenizers.load(name)
    texts = [text for text in corpus if " " * 3000 not in text]
    expected = [[*library.encode_ordinary(text), tokenizer.end_of_text] for text in texts]
    assert [ids.tolist() for ids in tokenizer.encode_documents(texts)] == expected
    assert [ids.tolist() for ids in tokenizer.encode_documents(["<|endofprompt|>", ""])] == [
        [*library.encode_ordinary("<|endofprompt|>"), tokenizer.end_of_text],
        [tokenizer.end_of_text],
    ]
    assert tokenizer.encode("x").dtype == np.dtype("<u4")
    assert all(
        tokenizer.byte_lengths[ids].sum() == len(text.encode()) for text, ids in zip(texts, expected, strict=True)
    )
    tokenizers._load.cache_clear()


def test_ranks_that_are_neither_cached_nor_to_be_had_cost_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for variable in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    tokenizers._load.cache_clear()
    message = (
        r"^data\.tokenizer=cl100k_base: its ranks are not in tiktoken's cache \(TIKTOKEN_CACHE_DIR=.*\) and cannot be "
        r"downloaded \(ProxyError: .*get_encoding\('cl100k_base'\)"
    )
    with pytest.raises(DataError, match=message):
        tokenizers.load("cl100k_base")
    assert data.fingerprint(DataConfig(tokenizer="cl100k_base")) != data.fingerprint(
        DataConfig()
    )  # plans need no ranks
