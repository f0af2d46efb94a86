"""Shards and datasets: prepared once whatever happens, read back exactly, damage found."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mupsweep import data
from mupsweep.config import DataConfig
from mupsweep.data import shards, sources, tokenizers
from mupsweep.errors import DataError

# A source that dies, waits or refuses half-way, for the processes below.
PROBE = """
import os, signal, sys
from mupsweep import data
from mupsweep.config import DataConfig
from mupsweep.data import shards
from mupsweep.data.sources import Source

shards.BATCH_CHARACTERS = 1

class Words(Source):
    def documents(self):
        mode = os.environ.get("MODE")
        assert mode != "refuse", "prepared twice"
        for i in range(400):
            if i == 200 and mode == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if i == 200 and mode == "wait":
                print("halfway", flush=True)
                sys.stdin.readline()
            yield f"document {i} " * 50

    def fingerprint(self):
        return "words-1"

if __name__ == "__main__":
    config = DataConfig(name="words", kind="__main__.Words", tokenizer="bytes", cache=sys.argv[1])
    found = data.prepare(config, lambda line: print(line, flush=True))
    print(len(found.train), len(found.validation), flush=True)
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "probe.py"
    path.write_text(PROBE)
    return path


@pytest.fixture(scope="module")
def sotu(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return DataConfig(cache=str(tmp_path_factory.mktemp("cache")))


def lengths() -> str:
    """Tokens in the two splits of PROBE: bytes and an end, split by sha256 / 2^256 < 0.05."""
    texts = [(f"document {i} " * 50).encode() for i in range(400)]
    chosen = [int(hashlib.sha256(text).hexdigest(), 16) / 2**256 < 0.05 for text in texts]
    validation = sum(len(text) + 1 for text, is_chosen in zip(texts, chosen, strict=True) if is_chosen)
    return f"{sum(len(text) + 1 for text in texts) - validation} {validation}"


LENGTHS = lengths()


def start(probe: Path, cache: Path, mode: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(probe), str(cache)],
        env={**os.environ, "MODE": mode},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(cache: Path) -> dict[str, bytes]:
    """Every prepared file by its name; nothing but locks may stand beside the folders."""
    assert all(p.is_dir() or p.suffix == ".lock" for p in cache.iterdir())
    return {str(p.relative_to(cache)): p.read_bytes() for p in cache.glob("[!.]*/*")}


@pytest.fixture(scope="module")
def expected(probe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed process prepares."""
    cache = tmp_path_factory.mktemp("undisturbed")
    out, error = start(probe, cache).communicate()
    assert out.splitlines()[-1] == LENGTHS, error
    found = contents(cache)
    assert [name.split("/")[1] for name in sorted(found)] == [
        "meta.json",
        "train-00000.bin",
        "validation-00000.bin",
    ]
    return found


def test_the_embedded_corpus_in_numbers(sotu: DataConfig) -> None:
    lines: list[str] = []
    found = data.prepare(sotu, lines.append)
    assert lines == ["prepared sotu: 3,735,616 training and 136,331 validation tokens"]
    assert (len(found.train), len(found.validation)) == (3_735_616, 136_331)
    assert found.content_id == data.fingerprint(sotu)
    assert (found.vocab_size, found.tokenizer) == (1024, "gpt2-1024")
    meta = shards.verify(shards.folder(sotu, found.content_id))
    assert sum(meta["splits"][s]["bytes"] for s in shards.SPLITS) == 10_761_390
    assert sum(meta["splits"][s]["documents"] for s in shards.SPLITS) == 233
    assert shards.prepared(sotu) == [shards.folder(sotu, found.content_id)]
    assert shards.folder(sotu, found.content_id).name == f"sotu-gpt2-1024-{found.content_id[:12]}"


def test_streams_hold_the_documents_with_their_ends(sotu: DataConfig) -> None:
    found, tokenizer = data.prepare(sotu), tokenizers.load("gpt2-1024")
    documents = list(sources.load(sotu).documents())
    total = len(found.validation)
    tokens = found.validation.blocks([0], total - 1)[0]
    ends = np.flatnonzero(tokens == tokenizer.end_of_text)
    assert ends[-1] == total - 1
    texts = [tokenizer.decode(piece[piece != 1023]) for piece in np.split(tokens, ends[:-1] + 1)]
    assert len(texts) == 9
    assert [text for text in documents if text in set(texts)] == texts
    first = found.train.blocks([0], 2000)[0]
    assert documents[0].startswith(tokenizer.decode(first))


def test_batches_are_pinned(sotu: DataConfig) -> None:
    found = data.prepare(sotu)
    batch = found.train_batch(context=8, batch_size=2, seed=0, step=0)
    assert batch.tolist() == [
        [341, 355, 284, 304, 620, 12, 292, 284, 399],
        [984, 276, 13, 370, 258, 490, 262, 850, 325],
    ]
    assert batch.dtype == np.int64
    assert (found.train_batch(8, 2, 0, 0) == data.prepare(sotu).train_batch(8, 2, 0, 0)).all()
    assert (found.train_batch(8, 2, 0, 1) != batch).any()
    assert (found.train_batch(8, 2, 1, 0) != batch).any()


def test_validation_batches_run_through_the_split_in_order(sotu: DataConfig) -> None:
    found = data.prepare(sotu)
    assert found.validation_batches(128, 16) == 136_330 // 128 // 16 == 66
    both = np.concatenate([found.validation_batch(128, 16, i) for i in range(2)])
    assert (both == found.validation.blocks(range(32), 128)).all()
    assert (both[:-1, -1] == both[1:, 0]).all()  # the last target is the next first input
    with pytest.raises(DataError, match=r"validation batch 66 of 66: 136331 tokens .* lower training\.eval_batches"):
        found.validation_batch(128, 16, 66)


def test_bytes_and_epochs(sotu: DataConfig) -> None:
    found = data.prepare(sotu)
    meta = shards.meta(shards.folder(sotu, found.content_id))
    tokens = found.validation.blocks([0], len(found.validation) - 1)
    assert found.byte_count(tokens) == meta["splits"]["validation"]["bytes"]
    assert found.byte_count(np.array([1023, 1023])) == 0
    assert found.epochs(context=128, batch_size=16, steps=1824) == pytest.approx(1.0, abs=1e-3)


def test_a_corpus_smaller_than_a_batch_is_one_line(sotu: DataConfig) -> None:
    found = data.prepare(sotu)
    with pytest.raises(DataError, match=r"train split has 3735616 tokens, 3 blocks of context 1000000: one batch of 4"):
        found.train_batch(1_000_000, 4, 0, 0)
    with pytest.raises(DataError, match=r"validation split .* needs 204801; .* or raise data\.validation_fraction"):
        found.validation_batches(1024, 200)


def test_small_shards_give_the_same_stream(sotu: DataConfig, tmp_path: Path) -> None:
    config = DataConfig(cache=str(tmp_path), max_tokens=50_000, validation_fraction=0.2, tokenizer="gpt2-512")
    source, content = sources.load(config), data.fingerprint(config)
    folder = shards.prepare(source, config, content, shard_tokens=7_000)
    meta = shards.verify(folder)
    assert [s["tokens"] for s in meta["splits"]["train"]["shards"]] == [7_000] * 7 + [1_000]
    other = DataConfig(**{**vars(config), "cache": str(tmp_path / "whole")})
    whole, _ = shards.streams(shards.prepare(source, other, content))
    parts, _ = shards.streams(folder)
    assert len(whole) == len(parts) == 50_000
    assert (whole.blocks(range(49), 1000) == parts.blocks(range(49), 1000)).all()
    assert (whole.blocks([0], 49_999) == parts.blocks([0], 49_999)).all()  # one block over all shards


def test_shards_carry_the_header_of_llm_c(sotu: DataConfig) -> None:
    found = data.prepare(sotu)
    path = shards.folder(sotu, found.content_id) / "train-00000.bin"
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


def test_prepared_twice_is_byte_identical(probe: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    start(probe, tmp_path).communicate()
    assert contents(tmp_path) == expected


def test_a_killed_preparer_leaves_nothing_in_the_way(probe: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    dying = start(probe, tmp_path, "die")
    dying.communicate()
    assert dying.returncode == -signal.SIGKILL
    (partial,) = tmp_path.glob(".*.partial")
    assert (partial / "train-00000.bin").is_file()
    assert not list(tmp_path.glob("[!.]*"))
    out, _ = start(probe, tmp_path).communicate()
    assert out.splitlines()[-1] == LENGTHS
    assert contents(tmp_path) == expected


def test_two_processes_at_once_prepare_once(probe: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    first = start(probe, tmp_path, "wait")
    assert first.stdout is not None
    assert first.stdout.readline() == "halfway\n"
    second = start(probe, tmp_path, "refuse")  # fails if it reads a single document
    assert second.stdout is not None
    assert second.stdout.readline().startswith("waiting: another process prepares ")
    out, _ = first.communicate("go on\n")
    assert out.splitlines()[-1] == LENGTHS
    out, error = second.communicate()
    assert out.splitlines() == [LENGTHS], error
    assert contents(tmp_path) == expected


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
    return config, shards.folder(config, content)


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


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (1e-9, r"none of its 2 documents is in the validation split .*: raise the fraction or add documents"),
        (1 - 1e-9, r"none of its 2 documents is in the train split .*: lower the fraction or add documents"),
    ],
)
def test_a_split_without_documents_is_one_line(tmp_path: Path, fraction: float, expected: str) -> None:
    write_texts(2, tmp_path / "texts")
    kind = "mupsweep.data.sources.local.Local"
    config = DataConfig(
        "x", kind, path=str(tmp_path / "texts"), cache=str(tmp_path / "cache"), validation_fraction=fraction
    )
    with pytest.raises(DataError, match=expected):
        data.prepare(config)
    assert contents(tmp_path / "cache") == {}


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot prepare tokens in .*: set data\.cache to a writable folder"):
        data.prepare(DataConfig(cache=str(tmp_path / "file")))


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert shards.cache_root(DataConfig()) == Path("/x/mupsweep")
    assert shards.cache_root(DataConfig(cache="/y")) == Path("/y")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert shards.cache_root(DataConfig()) == Path.home() / ".cache" / "mupsweep"
