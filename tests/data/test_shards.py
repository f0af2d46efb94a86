"""Shards and datasets: prepared once whatever happens, read back exactly, damage found."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from mupsweep import data
from mupsweep.data import cache, preparation, shards, sources, tokenizers
from mupsweep.data.config import DataConfig
from mupsweep.errors import DataError


@pytest.fixture(scope="module")
def sotu(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return DataConfig(cache=str(tmp_path_factory.mktemp("cache")))


def test_the_embedded_corpus_in_numbers(sotu: DataConfig) -> None:
    lines: list[str] = []
    dataset = data.prepare(sotu, lines.append)
    assert lines[-1:] == ["prepared sotu: 3,735,616 training and 136,331 validation tokens"]
    assert (len(dataset.train), len(dataset.validation)) == (3_735_616, 136_331)
    assert dataset.content_id == data.fingerprint(sotu)
    assert (dataset.vocab_size, dataset.tokenizer) == (1024, "gpt2-1024")
    meta = shards.verify(cache.folder(sotu, dataset.content_id))
    assert sum(meta["splits"][s]["bytes"] for s in shards.SPLITS) == 10_761_390
    assert sum(meta["splits"][s]["documents"] for s in shards.SPLITS) == 233
    (entry,) = cache.entries(sotu)
    assert entry == cache.Entry(
        name="sotu",
        tokenizer="gpt2-1024",
        state=cache.READY,
        train_tokens=3_735_616,
        validation_tokens=136_331,
        documents=233,
        bytes=10_761_390,
        content_id=dataset.content_id,
        folder=str(cache.folder(sotu, dataset.content_id)),
        disk_bytes=entry.disk_bytes,
        path=entry.path,
        cuts_documents=False,
    )
    assert cache.folder(sotu, dataset.content_id).name == f"sotu-gpt2-1024-{dataset.content_id[:12]}"


def test_streams_hold_the_documents_with_their_ends(sotu: DataConfig) -> None:
    dataset, tokenizer = data.prepare(sotu), tokenizers.load("gpt2-1024")
    documents = list(sources.load(sotu).documents())
    total = len(dataset.validation)
    tokens = dataset.validation.blocks([0], total - 1)[0]
    ends = np.flatnonzero(tokens == tokenizer.end_of_text)
    assert ends[-1] == total - 1
    texts = [tokenizer.decode(ids[ids != 1023]) for ids in np.split(tokens, ends[:-1] + 1)]
    assert len(texts) == 9
    assert [text for text in documents if text in set(texts)] == texts
    first = dataset.train.blocks([0], 2000)[0]
    assert documents[0].startswith(tokenizer.decode(first))


def test_batches_are_pinned(sotu: DataConfig) -> None:
    dataset = data.prepare(sotu)
    batch = dataset.train_batch(context=8, batch_size=2, seed=0, step=0)
    assert batch.tolist() == [
        [341, 355, 284, 304, 620, 12, 292, 284, 399],
        [984, 276, 13, 370, 258, 490, 262, 850, 325],
    ]
    assert batch.dtype == np.int64
    assert (dataset.train_batch(8, 2, 0, 0) == data.prepare(sotu).train_batch(8, 2, 0, 0)).all()
    assert (dataset.train_batch(8, 2, 0, 1) != batch).any()
    assert (dataset.train_batch(8, 2, 1, 0) != batch).any()


def test_the_first_validation_batches_run_through_the_split_in_order(sotu: DataConfig) -> None:
    dataset = data.prepare(sotu)
    assert dataset.first_validation_blocks(128, 16, 2) == list(range(32))
    assert len(dataset.first_validation_blocks(128, 16, 1000)) // 16 == 136_330 // 128 // 16 == 66
    both = dataset.validation_batch(128, range(32))
    assert (both == dataset.validation.blocks(range(32), 128)).all()
    assert (both[:-1, -1] == both[1:, 0]).all()  # the last target is the next first input


@pytest.mark.parametrize(
    ("context", "tokens", "count"), [(128, 32_768, 256), (128, 1, 16), (128, 2_049, 32), (128, 10**9, 1056), (50, 0, 0)]
)
def test_validation_blocks_are_spaced_over_the_whole_split(
    sotu: DataConfig, context: int, tokens: int, count: int
) -> None:
    """1,065 blocks of 128 tokens: whichever number is read, the gaps differ by one at most and reach to the end."""
    dataset = data.prepare(sotu)
    blocks = dataset.validation_blocks(context, tokens) if tokens else []
    assert len(blocks) == count
    if blocks:
        gaps = set(np.diff([*blocks, 1065]).tolist())
        assert blocks[0] == 0
        assert max(gaps) - min(gaps) <= 1


def test_a_split_of_few_blocks_is_read_whole(sotu: DataConfig) -> None:
    dataset = data.prepare(sotu)
    assert dataset.validation_blocks(136_330 // 5, 10**9) == [0, 1, 2, 3, 4]
    assert dataset.validation_blocks(136_330 // 20, 1) == [k * 20 // 16 for k in range(16)]


def test_the_bytes_of_tokens_are_those_of_their_text(sotu: DataConfig) -> None:
    dataset = data.prepare(sotu)
    meta = shards.meta(cache.folder(sotu, dataset.content_id))
    tokens = dataset.validation.blocks([0], len(dataset.validation) - 1)
    assert dataset.byte_count(tokens) == meta["splits"]["validation"]["bytes"]
    assert dataset.byte_count(np.array([1023, 1023])) == 0


def test_a_corpus_smaller_than_a_batch_is_one_line(sotu: DataConfig) -> None:
    dataset = data.prepare(sotu)
    with pytest.raises(DataError, match=r"train split has 3735616 tokens, 3 blocks of context 1000000: one batch of 4"):
        dataset.train_batch(1_000_000, 4, 0, 0)
    with pytest.raises(DataError, match=r"validation split .* needs 204801; .* or raise data\.validation_fraction"):
        dataset.first_validation_blocks(1024, 200, 1)


def test_small_shards_give_the_same_stream(sotu: DataConfig, tmp_path: Path) -> None:
    config = DataConfig(cache=str(tmp_path), max_tokens=50_000, validation_fraction=0.2, tokenizer="gpt2-512")
    source, content = sources.load(config), data.fingerprint(config)
    folder = preparation.prepare(source, config, content, shard_tokens=7_000)
    meta = shards.verify(folder)
    assert [s["tokens"] for s in meta["splits"]["train"]["shards"]] == [7_000] * 7 + [1_000]
    other = DataConfig(**{**vars(config), "cache": str(tmp_path / "whole")})
    whole, _ = shards.streams(preparation.prepare(source, other, content))
    sharded, _ = shards.streams(folder)
    assert len(whole) == len(sharded) == 50_000
    assert (whole.blocks(range(49), 1000) == sharded.blocks(range(49), 1000)).all()
    assert (whole.blocks([0], 49_999) == sharded.blocks([0], 49_999)).all()  # one block over all shards


def test_shards_carry_the_header_of_llm_c(sotu: DataConfig) -> None:
    dataset = data.prepare(sotu)
    path = cache.folder(sotu, dataset.content_id) / "train-00000.bin"
    header = np.fromfile(path, dtype="<i4", count=256)
    assert header[:3].tolist() == [20240520, 1, 3_735_616]
    assert not header[3:].any()
    assert path.stat().st_size == 1024 + 2 * 3_735_616


@pytest.mark.parametrize(
    "change", [{"tokenizer": "gpt2-512"}, {"validation_fraction": 0.1}, {"max_tokens": 100}, {"path": None}]
)
def test_the_content_id_follows_what_matters(sotu: DataConfig, change: dict[str, object]) -> None:
    changed = DataConfig(**{**vars(sotu), "name": "other", "cache": None, **change})
    assert (data.fingerprint(changed) == data.fingerprint(sotu)) == (change == {"path": None})


def test_the_content_id_is_pinned(sotu: DataConfig) -> None:
    assert data.fingerprint(sotu) == "d6a25d4a47b31a4fdf176dbb86f83b06a51839a4f893a534b124074db446eb7f"


def write_texts(count: int, path: Path) -> None:
    path.mkdir()
    for i in range(count):
        (path / f"{i}.txt").write_text(f"text number {i}")


@pytest.fixture
def small(tmp_path: Path) -> tuple[DataConfig, Path]:
    write_texts(40, tmp_path / "texts")
    config = DataConfig(
        name="a b/c",
        kind="mupsweep.data.sources.local.Local",
        path=str(tmp_path / "texts"),
        tokenizer="bytes",
        validation_fraction=0.3,
        cache=str(tmp_path / "cache"),
    )
    content = data.prepare(config).content_id
    return config, cache.folder(config, content)


def test_verify_finds_a_changed_byte(small: tuple[DataConfig, Path]) -> None:
    config, folder = small
    assert folder.name.startswith("a-b-c-bytes-")
    assert shards.verify(folder)["tokenizer"] == "bytes"
    path = folder / "validation-00000.bin"
    raw = bytearray(path.read_bytes())
    raw[1030] ^= 1
    path.write_bytes(raw)
    data.prepare(config)  # the size is right: opening does not read it
    with pytest.raises(DataError, match=r"the sha256 of validation-00000\.bin differs .* run `mupsweep data prepare`"):
        shards.verify(folder)


def test_opening_finds_a_cut_or_missing_shard(small: tuple[DataConfig, Path]) -> None:
    config, folder = small
    path = folder / "train-00000.bin"
    os.truncate(path, path.stat().st_size - 2)
    with pytest.raises(DataError, match=r"train-00000\.bin is damaged: \d+ bytes instead of \d+; delete the folder"):
        data.prepare(config)
    path.unlink()
    with pytest.raises(DataError, match=r"train-00000\.bin is damaged: 0 bytes instead of"):
        shards.verify(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"format": 0, "splits": {}})])
def test_damaged_meta_data_is_one_line(small: tuple[DataConfig, Path], text: str) -> None:
    config, folder = small
    (folder / "meta.json").write_text(text)
    with pytest.raises(DataError, match=r"is no prepared corpus \(meta\.json is missing or damaged\): delete"):
        data.prepare(config)


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.root(DataConfig()) == Path("/x/mupsweep")
    assert cache.root(DataConfig(cache="/y")) == Path("/y")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.root(DataConfig()) == Path.home() / ".cache" / "mupsweep"
