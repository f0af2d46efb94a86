"""Preparation: once whatever happens, the same bytes after every interruption, exact limits, useful errors.

Processes are really killed and files really cannot be written; only sizes and intervals are smaller than in earnest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mupsweep import data
from mupsweep.data import cache, preparation, shards, sources, tokenizers
from mupsweep.data.config import DataConfig
from mupsweep.errors import DataError

DOCUMENTS = 400
# A source that dies, waits or refuses half-way, and a process that can be killed at the N-th call of an os function.
PROBE = """
import os, resource, signal, sys
from mupsweep.sweep.config import DataConfig
from mupsweep.data import cache, preparation, sources
from mupsweep.data.sources import Source

preparation.BATCH_CHARACTERS = 12_000
preparation.CHECKPOINT_SECONDS = 0
what, _, number = os.environ.get("KILL", "").partition(":")

class Words(Source):
    def documents(self):
        mode = os.environ.get("MODE")
        assert mode != "refuse", "prepared twice"
        for i in range(400):
            if what == "document" and i == int(number):
                os.kill(os.getpid(), signal.SIGKILL)
            if i == 200 and mode == "wait":
                print("halfway", flush=True)
                sys.stdin.readline()
            yield f"document {i} " * 50

    def fingerprint(self):
        return "words-1"

def killing(call):
    count = 0
    def counted(*arguments):
        nonlocal count
        count += 1
        if count == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments)
    return counted

if __name__ == "__main__":
    if what in ("fsync", "replace", "unlink"):
        setattr(os, what, killing(getattr(os, what)))
    if "FILE_SIZE" in os.environ:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["FILE_SIZE"]), resource.RLIM_INFINITY))
    config = DataConfig(name="words", kind="__main__.Words", tokenizer="bytes", cache=sys.argv[1])
    source = sources.load(config)
    content = cache.content_id(config, source.fingerprint())
    try:
        preparation.prepare(source, config, content, lambda line: print(line, flush=True), shard_tokens=50_000)
    except preparation.DataError as error:
        print("refused:", error)
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "probe.py"
    path.write_text(PROBE)
    return path


def start(probe: Path, folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(probe), str(folder)],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def texts() -> list[str]:
    return [f"document {i} " * 50 for i in range(DOCUMENTS)]


def held_out(text: str, fraction: float) -> bool:
    """sha256 / 2^256 < fraction."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256 < fraction


def last_line() -> str:
    """What PROBE says in the end: bytes and an end of text of each document of the two splits."""
    validation = sum(len(t) + 1 for t in texts() if held_out(t, 0.05))
    train = sum(len(t) + 1 for t in texts()) - validation
    return f"prepared words: {train:,} training and {validation:,} validation tokens"


def lines(out: str) -> list[str]:
    """The lines of a process but for its progress, which it reports only where it takes more than two seconds."""
    return [line for line in out.splitlines() if not line.startswith("encoding ")]


def contents(folder: Path) -> dict[str, bytes]:
    """Every prepared file by its name; nothing but locks may stand beside the folders."""
    assert all(p.is_dir() or p.suffix == ".lock" for p in folder.iterdir())
    assert not list(folder.glob(".*.partial"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.glob("[!.]*/*")}


@pytest.fixture(scope="module")
def expected(probe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed process prepares."""
    folder = tmp_path_factory.mktemp("undisturbed")
    out, error = start(probe, folder).communicate()
    assert lines(out) == [last_line()], error
    files = contents(folder)
    names = [name.split("/")[1] for name in sorted(files)]
    assert names == ["byte-lengths.npy", "meta.json", *(f"train-0000{i}.bin" for i in range(5)), "validation-00000.bin"]
    return files


def test_prepared_twice_is_byte_identical(probe: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    start(probe, tmp_path).communicate()
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("kill", ["document:3", "document:399", "fsync:2", "replace:1", "replace:14", "unlink:1"])
def test_a_killed_preparation_goes_on_and_ends_with_the_same_bytes(
    kill: str, probe: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    dying = start(probe, tmp_path, KILL=kill)
    dying.communicate()
    assert dying.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("[!.]*"))  # nothing that could be taken for complete
    out, error = start(probe, tmp_path).communicate()
    assert error == ""
    assert contents(tmp_path) == expected
    went_on = re.match(r"going on after (\d+) documents", out)
    assert bool(went_on) == (kill in ("document:399", "replace:14"))
    if went_on:
        assert 250 < int(went_on[1]) < DOCUMENTS


def test_a_preparation_that_is_killed_again_and_again_gets_there(
    probe: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    reached = []
    for _ in range(20):
        process = start(probe, tmp_path, KILL="fsync:13")
        out, _ = process.communicate()
        reached += [int(n) for n in re.findall(r"going on after (\d+) documents", out)]
        if process.returncode == 0:
            break
    assert len(reached) >= 5
    assert reached == sorted(reached)
    assert contents(tmp_path) == expected


def test_two_processes_at_once_prepare_once(probe: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    first = start(probe, tmp_path, MODE="wait")
    assert first.stdout is not None
    assert next(line for line in first.stdout if not line.startswith("encoding ")) == "halfway\n"
    (entry,) = cache.entries(DataConfig(cache=str(tmp_path)))
    assert entry.state == cache.BUSY
    second = start(probe, tmp_path, MODE="refuse")  # fails if it reads a single document
    assert second.stdout is not None
    assert second.stdout.readline().startswith("waiting: another process prepares ")
    out, _ = first.communicate("go on\n")
    assert lines(out) == [last_line()]
    assert second.communicate() == ("", "")
    assert contents(tmp_path) == expected


def interrupted(probe: Path, folder: Path) -> Path:
    """The hidden folder of a preparation that was killed near its end."""
    start(probe, folder, KILL="document:399").communicate()
    (partial,) = folder.glob(".*.partial")
    return partial


@pytest.mark.parametrize("damage", ["checkpoint", "finished", "cut", "missing"])
def test_what_is_left_of_a_preparation_is_checked_before_it_is_used(
    damage: str, probe: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    partial = interrupted(probe, tmp_path)
    state = json.loads((partial / "checkpoint.json").read_text())["splits"]["train"]["shards"]
    if damage == "checkpoint":
        (partial / "checkpoint.json").write_text('{"splits": {')
    elif damage == "finished":
        raw = bytearray((partial / state[0]["file"]).read_bytes())
        raw[2000] ^= 1
        (partial / state[0]["file"]).write_bytes(raw)
    elif damage == "cut":
        os.truncate(partial / state[-1]["file"], 1024 + 2 * state[-1]["tokens"] - 2)
    else:
        (partial / state[0]["file"]).unlink()
    out, _ = start(probe, tmp_path).communicate()
    assert lines(out) == [f"{partial} is damaged: beginning anew", last_line()]
    assert contents(tmp_path) == expected


def test_an_interrupted_preparation_is_listed_as_partial(probe: Path, tmp_path: Path) -> None:
    interrupted(probe, tmp_path)
    (entry,) = cache.entries(DataConfig(cache=str(tmp_path)))
    assert (entry.name, entry.tokenizer, entry.state) == ("words", "bytes", cache.PARTIAL)
    assert 300 < entry.documents < DOCUMENTS
    assert entry.train_tokens + entry.validation_tokens == entry.bytes + entry.documents  # a byte a token, and an end
    assert Path(entry.folder).name == f"words-bytes-{entry.content_id[:12]}"


def test_a_file_system_that_takes_no_more_keeps_what_it_has(
    probe: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    out, error = start(probe, tmp_path, FILE_SIZE="60000").communicate()
    refusal = f"refused: cannot prepare tokens in {tmp_path} (File too large): set data.cache to a writable folder"
    assert lines(out)[0].startswith(refusal), out + error
    assert error == ""
    out, _ = start(probe, tmp_path).communicate()
    assert out.startswith("going on after ")
    assert contents(tmp_path) == expected


def test_a_full_disk_is_one_line_and_the_command_goes_on_when_there_is_space(
    probe: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(tmp_path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip("may not mount a small file system")
    try:
        out, error = start(probe, tmp_path).communicate()
        assert lines(out) == [
            f"refused: no space left in {tmp_path}: free some and run the same command again (it goes on where it "
            "stopped), or set data.cache to a folder with more"
        ]
        assert error == ""
        subprocess.run(["mount", "-o", "remount,size=2m", str(tmp_path)], check=True)
        out, _ = start(probe, tmp_path).communicate()
        assert out.startswith("going on after ")
        assert contents(tmp_path) == expected
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot prepare tokens in .*: set data\.cache to a writable folder"):
        data.prepare(DataConfig(cache=str(tmp_path / "file")))


def local(folder: Path, documents: list[str], **keys: object) -> DataConfig:
    """A jsonl file of `documents`, bytes as tokens."""
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    tree: dict[str, object] = {"name": "x", "kind": "mupsweep.data.sources.local.Local", "tokenizer": "bytes"}
    return DataConfig(**{**tree, "path": str(path), "cache": str(folder / "cache"), **keys})  # type: ignore[arg-type]


def stored(config: DataConfig) -> list[np.ndarray]:
    """The prepared tokens of (train, validation)."""
    folder = cache.folder(config, data.fingerprint(config))
    return [np.concatenate([s.open() for s in part]) for part in shards.segments(folder)]


def as_bytes(tokens: np.ndarray) -> bytes:
    return tokens.astype(np.uint8).tobytes()


@pytest.mark.parametrize("limit", [900, 901, 908, 909, 10**9])
def test_max_tokens_cuts_the_training_split_and_ends_the_reading(tmp_path: Path, limit: int) -> None:
    documents = [f"text {i:03d}" for i in range(300)]  # 8 bytes and an end of text: 9 tokens each
    config = local(tmp_path, documents, validation_fraction=0.2, max_tokens=limit)
    data.prepare(config)
    train, validation = stored(config)
    training = [t for t in documents if not held_out(t, 0.2)]
    assert as_bytes(train) == "".join(t + "\0" for t in training).encode()[:limit]
    last = training[-(-limit // 9) - 1] if limit < 9 * len(training) else documents[-1]  # the document that reaches it
    before = [t for t in documents[: documents.index(last) + 1] if held_out(t, 0.2)]
    assert as_bytes(validation) == "".join(t + "\0" for t in before).encode()


def test_a_limit_does_not_depend_on_how_documents_are_batched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [f"text {i} " * (i % 7 + 1) for i in range(300)]
    shards_of = []
    for characters in (1, 100, 10_000):
        monkeypatch.setattr(preparation, "BATCH_CHARACTERS", characters)
        folder = tmp_path / str(characters)
        folder.mkdir()
        config = local(folder, documents, validation_fraction=0.2, max_tokens=3000)
        dataset = data.prepare(config)
        assert len(dataset.train) == 3000
        shards_of.append({p.name: p.read_bytes() for p in (folder / "cache").glob("[!.]*/*.bin")})
        meta = shards.meta(cache.folder(config, dataset.content_id))
        assert meta["splits"]["train"]["bytes"] == np.count_nonzero(stored(config)[0])
    assert shards_of[0] == shards_of[1] == shards_of[2]


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (1e-9, r"none of its 2 documents is in the validation split .*: raise the fraction or add documents"),
        (1 - 1e-9, r"none of its 2 documents is in the train split .*: lower the fraction or add documents"),
    ],
)
def test_a_split_without_documents_is_one_line(tmp_path: Path, fraction: float, expected: str) -> None:
    config = local(tmp_path, ["one", "two"], validation_fraction=fraction)
    with pytest.raises(DataError, match=expected):
        data.prepare(config)
    assert contents(tmp_path / "cache") == {}


def test_few_documents_are_split_inside_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [f"line {i}\n" * 100 + "x" * 100 for i in range(6)]  # no hash of these is below 0.1
    said: list[str] = []
    config = local(tmp_path, documents, validation_fraction=0.1)
    identity = data.fingerprint(config)
    dataset = data.prepare(config, said.append)
    assert said[0] == (
        "x: none of its 6 documents is in the validation split, so every document is cut: its last 10.0% are for "
        "validation"
    )
    train, validation = stored(config)
    end_of_text = int(train[-1])
    parts = [(text[:-100].encode(), text[-100:].encode()) for text in documents]  # at the end of a line near 10 %
    assert validation.tolist() == [token for _, end in parts for token in (*end, end_of_text)]
    assert train.tolist() == [token for begin, _ in parts for token in (*begin, end_of_text)]
    assert dataset.content_id == identity
    (entry,) = cache.entries(config)
    assert (entry.cuts_documents, entry.state, entry.documents) == (True, cache.READY, 12)

    # an interruption of the second pass goes on in it
    before = {path.name: path.read_bytes() for path in Path(entry.folder).glob("*.bin")}
    monkeypatch.setattr(preparation, "REPORT_SECONDS", 0)
    monkeypatch.setattr(preparation, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(preparation, "BATCH_CHARACTERS", 1)
    again = replace(config, cache=str(tmp_path / "other"))

    def interrupt(line: str) -> None:
        said.append(line)
        if "encoding x: 6 documents" in line and any("is cut" in earlier for earlier in said):
            raise KeyboardInterrupt

    said.clear()
    with pytest.raises(KeyboardInterrupt):
        data.prepare(again, interrupt)
    said.clear()
    data.prepare(again, said.append)
    assert said[0] == "going on after 6 documents"
    (entry,) = cache.entries(again)
    assert {path.name: path.read_bytes() for path in Path(entry.folder).glob("*.bin")} == before


def test_one_document_and_a_limit_leave_something_to_validate(tmp_path: Path) -> None:
    dataset = data.prepare(local(tmp_path, ["word " * 1000], validation_fraction=0.2, max_tokens=500))
    assert (len(dataset.train), len(dataset.validation)) == (500, 1001)


def test_a_cut_prefers_the_end_of_a_line_that_is_near() -> None:
    cut = {part.split: part.text for part in preparation._cut(sources.Document("a" * 85 + "\n" + "b" * 14), 0.1)}
    assert cut == {"train": "a" * 85 + "\n", "validation": "b" * 14}
    cut = {part.split: part.text for part in preparation._cut(sources.Document("title\n" + "b" * 94), 0.1)}
    assert cut == {"train": "title\n" + "b" * 84, "validation": "b" * 10}
    decided = sources.Document("text", "train")
    assert list(preparation._cut(decided, 0.5)) == [decided]


def test_progress_tells_the_share_that_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "REPORT_SECONDS", 0)
    monkeypatch.setattr(preparation, "BATCH_CHARACTERS", 100)
    lines: list[str] = []
    config = local(tmp_path, [f"text {i:03d}" for i in range(300)], validation_fraction=0.2, max_tokens=1800)
    data.prepare(config, lines.append)
    assert re.fullmatch(r"encoding x: 13 documents, 117 tokens, 5\.\d%, 0 min left", lines[0])
    shares = [float(share) for line in lines for share in re.findall(r"([\d.]+)%", line)]
    assert shares == sorted(shares)
    assert 90 < shares[-1] < 100
    assert lines[-1].startswith("prepared x: 1,800 training and ")


def test_every_source_has_bytes_behind_its_validation_tokens(tmp_path: Path) -> None:
    """Bits per byte need them: the same text under two tokenizers counts the same bytes."""
    documents = [f"text number {i}, with ünïcode" for i in range(200)]
    counts = []
    for name in ("bytes", "gpt2-300", "gpt2"):
        config = local(tmp_path, documents, tokenizer=name, validation_fraction=0.3)
        counts.append(data.prepare(config).byte_count(stored(config)[1]))
    expected = sum(len(t.encode()) for t in documents if held_out(t, 0.3))
    assert counts == [expected] * 3
    tokens = np.concatenate([tokenizers.load("gpt2").encode(t) for t in documents]).astype("<u2")
    (tmp_path / "bin").mkdir()
    for name, some in (("train", tokens), ("val", tokens[:500])):
        (tmp_path / "bin" / f"{name}.bin").write_bytes(some.tobytes())
    ready = data.prepare(local(tmp_path, [], tokenizer="gpt2", path=str(tmp_path / "bin")))
    text = tokenizers.load("gpt2").decode(tokens[:500])
    assert ready.byte_count(ready.validation.blocks([0], 499)) == len(text.encode())


def test_a_run_of_more_than_one_epoch_is_remarked(tmp_path: Path) -> None:
    config = local(tmp_path, [f"text {i:03d}" for i in range(300)], validation_fraction=0.2, max_tokens=1000)
    assert data.epochs_remark(config, 10**9) is None  # nobody knows its size before it is prepared
    data.prepare(config)
    assert data.epochs_remark(config, 1000) is None
    assert data.epochs_remark(config, 2500) == (
        "a run trains on 2,500 tokens, 2.5 times the 1,000 training tokens of data=x: "
        "text repeats after the first epoch"
    )
    assert sources.load(config).rows() is None
