"""Sources: what each kind of file gives, and the one line that each bad input costs."""

from __future__ import annotations

import gzip
import json
import lzma
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mupsweep import data
from mupsweep.data import sources
from mupsweep.data.config import DataConfig
from mupsweep.data.sources.local import Local
from mupsweep.data.sources.sotu import Sotu
from mupsweep.errors import DataError

TEXTS = ["first", "zweite Ä", "third\r\nwith lines", "vierte"]


def local(path: Path, **keys: object) -> DataConfig:
    tree = {"name": "local", "kind": "mupsweep.data.sources.local.Local", "path": str(path), **keys}
    return DataConfig(**tree)  # type: ignore[arg-type]


def read(config: DataConfig) -> None:
    source = sources.load(config)
    if source.ready_tokens() is None:
        list(source.documents())


def one_line(config: DataConfig) -> str:
    """The message of the DataError that reading `config` raises."""
    with pytest.raises(DataError) as caught:
        read(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, key: text}) + "\n" for text in texts).encode()


def write_tokens(path: Path, tokens: np.ndarray, header: bool = False) -> None:
    head = struct.pack("<3i", 20240520, 1, len(tokens)).ljust(1024, b"\0") if header else b""
    path.write_bytes(head + tokens.astype("<u2").tobytes())


def index(dtype: int, lengths: list[int]) -> bytes:
    """Megatron-LM's index of sequences of the given lengths, each a document."""
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, dtype, len(lengths), len(lengths) + 1)
    offsets = np.cumsum([0, *lengths[:-1]]) * (2 if dtype == 8 else 4)
    documents = np.arange(len(lengths) + 1)
    return head + b"".join([np.int32(lengths).tobytes(), np.int64(offsets).tobytes(), np.int64(documents).tobytes()])


def test_the_embedded_corpus() -> None:
    documents = list(Sotu(DataConfig()).documents())
    assert len(documents) == 233
    assert sum(len(d.encode()) for d in documents) == 10_761_390
    assert documents[0].startswith("Fellow-Citizens of the Senate")
    assert all(d.endswith("\n") for d in documents)
    assert Sotu(DataConfig()).fingerprint().startswith("7077b62a")


def test_every_text_format_gives_the_same_documents(tmp_path: Path) -> None:
    (tmp_path / "txt" / "sub").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (tmp_path / "txt" / ("sub" if i > 1 else ".") / f"{i}.txt").write_bytes(text.encode())
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS) + b"\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS)))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(jsonl(TEXTS)))
    pq.write_table(pa.table({"text": [*TEXTS, None, ""], "n": range(6)}), tmp_path / "a.parquet", row_group_size=3)
    for name in ("txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.parquet"):
        assert list(Local(local(tmp_path / name)).documents()) == TEXTS, name


@pytest.mark.parametrize(
    ("text", "train", "validation"),
    [
        ("a b\n" * 100, "a b\n" * 95, "a b\n" * 5),
        ("ab" * 100, "ab" * 95, "ab" * 5),
        ("a\n" + 98 * "b", "a\n", 98 * "b"),
    ],
)
def test_the_end_of_a_lone_text_from_a_line_on_is_the_validation_split(
    text: str, train: str, validation: str, tmp_path: Path
) -> None:
    (tmp_path / "input.txt").write_text(text)
    documents = list(Local(local(tmp_path / "input.txt")).reader())
    assert documents == [(train, "train"), (validation, "validation")]
    prepared = data.prepare(local(tmp_path / "input.txt", tokenizer="bytes", cache=str(tmp_path / "cache")))
    assert prepared.train.blocks([0], len(train))[0].tolist()[:-1] == list(train.encode())


def test_a_folder_is_read_in_the_order_of_names_and_passes_over_other_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c/a.txt", "README.md", ".hidden.txt", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(Local(local(tmp_path)).documents()) == ["a.txt", "b.txt", "c/a.txt"]


def test_the_fingerprint_follows_content_names_and_column(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(TEXTS))
    first = Local(local(path)).fingerprint()
    assert Local(local(tmp_path)).fingerprint() == first  # the folder above holds the same files
    assert Local(local(path, text_column="id")).fingerprint() != first
    path.write_bytes(jsonl(TEXTS).replace(b"first", b"First"))
    assert Local(local(path)).fingerprint() != first
    path.write_bytes(jsonl(TEXTS))
    assert Local(local(path)).fingerprint() == first
    path.rename(tmp_path / "b.jsonl")
    assert Local(local(tmp_path)).fingerprint() != first


def test_the_fingerprint_sees_both_ends_of_a_large_file(tmp_path: Path) -> None:
    path, size = tmp_path / "a.bin", 6_000_000
    seen = set()
    for where in (None, 0, size - 1):
        raw = bytearray(size)
        if where is not None:
            raw[where] = 1
        path.write_bytes(raw)
        seen.add(Local(local(path)).fingerprint())
    assert len(seen) == 3


@pytest.mark.parametrize("header", [False, True])
def test_train_bin_and_val_bin_keep_their_split(tmp_path: Path, header: bool) -> None:
    write_tokens(tmp_path / "train.bin", np.arange(1000) % 500, header)
    write_tokens(tmp_path / "val.bin", np.arange(100) + 1, header)
    (tmp_path / "meta.pkl").write_bytes(b"nanoGPT's")
    for path in (tmp_path, tmp_path / "train.bin"):
        dataset = data.prepare(local(path, tokenizer="gpt2-1024"))
        assert (len(dataset.train), len(dataset.validation)) == (1000, 100)
        assert dataset.validation.blocks([1], 4).tolist() == [[5, 6, 7, 8, 9]]
        assert dataset.train.blocks([124], 4).tolist() == [[496, 497, 498, 499, 0]]


def test_a_lone_bin_is_split_by_its_tail(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens.bin", np.arange(1000))
    dataset = data.prepare(local(tmp_path / "tokens.bin", tokenizer="gpt2", validation_fraction=0.1))
    assert (len(dataset.train), len(dataset.validation)) == (900, 100)
    assert dataset.validation.blocks([0], 3).tolist() == [[900, 901, 902, 903]]
    capped = data.prepare(local(tmp_path / "tokens.bin", tokenizer="gpt2", validation_fraction=0.1, max_tokens=50))
    assert (len(capped.train), len(capped.validation)) == (50, 100)
    assert capped.content_id != dataset.content_id


def test_shards_of_several_files_are_one_stream(tmp_path: Path) -> None:
    tokens = np.arange(3000) % 1000
    write_tokens(tmp_path / "fineweb_val_000000.bin", tokens[:64], header=True)
    for i in range(3):
        write_tokens(tmp_path / f"fineweb_train_{i:06d}.bin", tokens[1000 * i : 1000 * i + 1000], header=True)
    dataset = data.prepare(local(tmp_path, tokenizer="gpt2"))
    assert dataset.train.n_blocks(700) == 4
    assert (dataset.train.blocks([3, 1], 700) == np.stack([tokens[2100:2801], tokens[700:1401]])).all()
    with pytest.raises(IndexError, match="block 4 of 4"):
        dataset.train.blocks([4], 700)


def test_ids_beyond_the_vocabulary_are_an_error(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.bin", np.arange(2000))
    text = one_line(local(tmp_path / "a.bin", tokenizer="gpt2-1024"))
    assert "holds token 1999, but data.tokenizer=gpt2-1024 ends at 1023" in text


def test_an_id_that_the_sample_missed_is_an_error_when_read(tmp_path: Path) -> None:
    tokens = np.zeros(8_000_000, dtype=np.uint16)
    tokens[50_000] = 1500  # between the first two chunks that are looked at
    write_tokens(tmp_path / "a.bin", tokens)
    dataset = data.prepare(local(tmp_path / "a.bin", tokenizer="gpt2-1024"))
    with pytest.raises(DataError, match=r"holds token 1500, but data\.tokenizer=gpt2-1024 ends at 1023"):
        dataset.train_batch(7_000_000, 1, seed=0, step=0)


@pytest.mark.parametrize(("dtype", "code"), [("<u2", 8), ("<i4", 4)])
def test_megatrons_files_are_read_as_they_are(dtype: str, code: int, tmp_path: Path) -> None:
    tokens = np.arange(1000, dtype=dtype)
    (tmp_path / "mine_text_document.bin").write_bytes(tokens.tobytes())
    (tmp_path / "mine_text_document.idx").write_bytes(index(code, [400, 1, 599]))
    for path in (tmp_path, tmp_path / "mine_text_document.bin"):
        dataset = data.prepare(local(path, tokenizer="gpt2", validation_fraction=0.1))
        assert dataset.train.blocks([0], 899)[0].tolist() == list(range(900))
        assert dataset.validation.blocks([0], 99)[0].tolist() == list(range(900, 1000))


def test_a_uint16_index_changes_no_identity_and_an_int32_one_does(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(64))
    bare = Local(local(path)).fingerprint()
    (tmp_path / "a.idx").write_bytes(index(8, [32]))
    assert Local(local(path)).fingerprint() == bare
    (tmp_path / "a.idx").write_bytes(index(4, [16]))
    assert Local(local(path)).fingerprint() != bare


def test_tokens_of_llama_3_are_read_as_llm_c_writes_them(tmp_path: Path) -> None:
    tokens = np.array([128_000, 9906, 1917, 128_001] * 250, dtype="<u4")
    head = struct.pack("<3i", 20240801, 7, len(tokens)).ljust(1024, b"\0")
    for split in ("train", "val"):
        (tmp_path / f"tinyshakespeare_{split}.bin").write_bytes(head + tokens.tobytes())
    dataset = data.prepare(local(tmp_path, tokenizer="o200k_base"))  # which has more ids
    assert (len(dataset.train), len(dataset.validation)) == (1000, 1000)
    assert dataset.validation.blocks([1], 4).tolist() == [[128_000, 9906, 1917, 128_001, 128_000]]
    assert "holds token 128001, but data.tokenizer=cl100k_base ends at 100276" in one_line(
        local(tmp_path, tokenizer="cl100k_base")
    )


def test_a_file_without_a_header_cannot_be_of_a_large_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "mine.bin").write_bytes(np.arange(500, dtype="<u4").tobytes())
    assert "mine.bin has neither llm.c's header nor Megatron's index mine.idx beside it" in one_line(
        local(tmp_path, tokenizer="cl100k_base")
    )


BAD = {
    "none": (None, {}, "data=local needs data.path=FILE_OR_FOLDER with .txt .jsonl"),
    "missing": ("nowhere", {}, "nowhere does not exist: give a file or a folder with .txt"),
    "kind": ("a.csv", {"a.csv": b"x"}, "a.csv is of no known kind: valid are .txt .jsonl"),
    "folder without": (".", {"a.csv": b"x"}, "holds no file of a known kind: valid are .txt"),
    "mixed": (
        ".",
        {"a.txt": b"x", "train.bin": b"xx"},
        "mixes kinds of files (a.txt, train.bin): name one file",
    ),
    "empty": (".", {"a.txt": b"", "b.txt": b""}, "holds no text: every document is empty"),
    "column": (
        "a.jsonl",
        {"a.jsonl": jsonl(["x"], "body")},
        "line 1 has no 'text': set data.text_column to one of id, body",
    ),
    "number": (
        "a.jsonl",
        {"a.jsonl": b'{"text": 3}'},
        "line 1: 'text' is int, not text; set data.text_column",
    ),
    "not json": (
        "a.jsonl",
        {"a.jsonl": b'{"text": "x"}\nhello'},
        "line 2 is not JSON: Expecting value; .jsonl holds",
    ),
    "no object": ("a.jsonl", {"a.jsonl": b"[1]"}, "line 1 is list, not an object"),
    "cut gzip": (
        "a.jsonl.gz",
        {"a.jsonl.gz": gzip.compress(jsonl(TEXTS))[:-9]},
        "cannot be read as .jsonl in UTF-8",
    ),
    "no gzip": (
        "a.jsonl.gz",
        {"a.jsonl.gz": b"hello"},
        "cannot be read as .jsonl in UTF-8: Not a gzipped file",
    ),
    "no xz": (
        "a.jsonl.xz",
        {"a.jsonl.xz": b"hello"},
        "cannot be read as .jsonl in UTF-8: Input format not supported",
    ),
    "latin-1": (
        "a.txt",
        {"a.txt": "Ä".encode("latin-1") + b"x"},
        "cannot be read as .txt in UTF-8: 'utf-8' codec",
    ),
    "latin-1 json": (
        "a.jsonl",
        {"a.jsonl": b'{"text": "\xc4x"}'},
        "cannot be read as .jsonl in UTF-8: 'utf-8' codec",
    ),
    "no parquet": ("a.parquet", {"a.parquet": b"hello, hello"}, "a.parquet cannot be read as .parquet: "),
    "odd": ("a.bin", {"a.bin": b"abc"}, "a.bin is no token file: 3 bytes cannot be uint16 tokens"),
    "empty bin": ("a.bin", {"a.bin": b""}, "a.bin is no token file: 0 bytes"),
    "version": (
        "a.bin",
        {"a.bin": struct.pack("<3i", 20240520, 2, 0)},
        "llm.c's header in version 2: only version 1",
    ),
    "version of uint32": (
        "a.bin",
        {"a.bin": struct.pack("<3i", 20240801, 1, 0)},
        "llm.c's header in version 1: only version 7",
    ),
    "cut uint32": (
        "a.bin",
        {"a.bin": struct.pack("<3i", 20240801, 7, 9).ljust(1024 + 4 * 8, b"\0")},
        "1056 bytes, but its header promises 1060",
    ),
    "uint32 without a header": (
        "a.bin",
        {"a.bin": np.arange(500, dtype="<u4").tobytes()},
        "has no header, so its tokens are uint16, but every second one is 0, as of wider tokens: write uint16, llm.c's",
    ),
    "no index": ("a.bin", {"a.bin": b"abcd", "a.idx": b"MMIDIDX"}, "a.idx is no index of Megatron-LM, version 1: move"),
    "another index": ("a.bin", {"a.bin": b"abcd", "a.idx": b"TNTIDX\0\0".ljust(99)}, "is no index of Megatron-LM"),
    "floats": ("a.bin", {"a.bin": bytes(64), "a.idx": index(7, [16])}, "type 7: valid are [1, 3, 4, 5, 8]"),
    "cut index": (
        "a.bin",
        {"a.bin": bytes(64), "a.idx": index(4, [16])[:-1]},
        "a.idx is damaged: 61 bytes, but it pro",
    ),
    "cut indexed": ("a.bin", {"a.bin": bytes(63), "a.idx": index(4, [9, 7])}, "63 bytes, but a.idx promises 64"),
    "negative": (
        "a.bin",
        {"a.bin": np.array([3, -1], dtype="<i4").tobytes(), "a.idx": index(4, [2])},
        "holds token -1, but data.tokenizer=gpt2-1024 ends at 1023",
    ),
    "index alone": ("a.idx", {"a.idx": index(4, [2])}, "a.idx is of no known kind: valid are .txt .jsonl"),
    "cut bin": (
        "a.bin",
        {"a.bin": struct.pack("<3i", 20240520, 1, 9)},
        "12 bytes, but its header promises 1042",
    ),
    "val only": (
        "val.bin",
        {"val.bin": bytes(64)},
        "give no training tokens; put train.bin and val.bin into one folder",
    ),
    "tiny bin": ("a.bin", {"a.bin": bytes(2)}, "give no validation tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_costs_one_line(tmp_path: Path, case: str) -> None:
    path, files, expected = BAD[case]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    config = local(tmp_path / path) if path else DataConfig(kind="mupsweep.data.sources.local.Local")
    assert expected in one_line(config)


def test_a_parquet_column_that_is_not_there(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": TEXTS, "n": range(4)}), tmp_path / "a.parquet")
    assert "a.parquet has no 'text': set data.text_column to one of body, n" in one_line(local(tmp_path / "a.parquet"))
    assert "'n' is int, not text" in one_line(local(tmp_path / "a.parquet", text_column="n"))


def test_the_embedded_corpus_refuses_a_path() -> None:
    assert "data.path=x is not read by data=sotu: add data=local" in one_line(DataConfig(path="x"))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mupsweep.data.sources.nowhere.X", "cannot be imported (No module named"),
        (
            "mupsweep.data.sources.sotu.Soto",
            "cannot be imported (module 'mupsweep.data.sources.sotu' has no attribute",
        ),
        ("Sotu", "it names a source as package.module.Class"),
        (
            "mupsweep.data.config.DataConfig",
            "is no data source: make it a subclass of mupsweep.data.sources.Source",
        ),
    ],
)
def test_a_kind_that_is_no_source(kind: str, expected: str) -> None:
    assert expected in one_line(DataConfig(kind=kind))
