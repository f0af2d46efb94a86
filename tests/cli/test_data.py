"""The data commands: what is prepared and in which state, in 80 columns and as JSON; messages that say what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mupsweep import data
from mupsweep.data import cache, shards
from mupsweep.formatting import si
from mupsweep.sweep.config import load

Cli = Callable[..., tuple[int, str, str]]
KEYS = [
    *("name", "tokenizer", "state", "train_tokens", "validation_tokens", "documents", "bytes", "content_id", "folder"),
    *("disk_bytes", "path", "cuts_documents"),
]


@pytest.fixture(autouse=True)
def _cache_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """The keys of 300 short documents."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i:03d}"}) + "\n" for i in range(300)))
    return ["data=local", f"data.path={path}", "data.tokenizer=bytes", "data.validation_fraction=0.2"]


def test_a_prepared_corpus_is_listed_with_its_size_and_state(cli: Cli, texts: list[str]) -> None:
    code, out, err = cli("data", "prepare", *texts)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith("local: 2,214 training and 486 validation tokens, bytes, content ")
    code, out, err = cli("data", "list")
    assert (code, err) == (0, "")
    header, row, place = out.splitlines()
    content = data.fingerprint(load(texts).variants[0].data)
    assert header.split() == ["name", "tokenizer", "tokens", "documents", "bytes", "content", "state"]
    assert row.split() == ["local", "bytes", "2.7k", "300", "2.4k", content[:12], "ready"]
    (entry,) = json.loads(cli("data", "list", "--json")[1])
    assert list(entry) == KEYS
    assert [entry[key] for key in KEYS[:8]] == ["local", "bytes", "ready", 2214, 486, 300, 2400, content]
    assert Path(entry["folder"]).is_dir()
    on_disk = sum(path.stat().st_size for path in Path(entry["folder"]).iterdir())
    assert (entry["disk_bytes"], entry["path"], entry["cuts_documents"]) == (
        on_disk,
        texts[1][len("data.path=") :],
        False,
    )
    assert place == f"{entry['folder']}: {si(on_disk)}B on disk, of {entry['path']}"


def test_the_list_of_a_large_set_fits_into_80_columns(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "mupsweep" / ".wikitext103-gpt2-50256-0123456789ab.partial"
    folder.mkdir(parents=True)
    sizes = {"tokens": 123_456_789_012, "documents": 123_456_789, "bytes": 999_456_789_012, "shards": []}
    found = {"name": "wikitext103", "tokenizer": "gpt2-50256", "content_id": 64 * "f"}
    splits = {"train": sizes, "validation": sizes}
    (folder / cache.CHECKPOINT).write_text(json.dumps({"format": shards.FORMAT, **found, "splits": splits}))
    table = cli("data", "list")[1].splitlines()[:2]
    assert max(map(len, table)) <= 80
    assert table[1].split() == ["wikitext103", "gpt2-50256", "247G", "247M", "2T", "ffffffffffff", "partial"]


def test_nothing_prepared_says_how_to_begin(cli: Cli, tmp_path: Path) -> None:
    message = f"nothing is prepared in {tmp_path / 'cache' / 'mupsweep'}; start with mupsweep data prepare\n"
    assert cli("data", "list") == (0, message, "")
    assert cli("data", "list", "--json") == (0, "[]\n", "")


def test_a_damaged_corpus_is_listed_as_damaged_and_refused(cli: Cli, texts: list[str]) -> None:
    cli("data", "prepare", *texts)
    (entry,) = json.loads(cli("data", "list", "--json")[1])
    folder = Path(entry["folder"])
    assert cli("data", "verify", *texts) == (0, f"{folder}: 2 shards, each with its digest\n", "")
    os.truncate(folder / "train-00000.bin", 2000)
    code, out, err = cli("data", "list")
    assert (code, err) == (0, "")
    assert out.splitlines()[1].split() == ["local", "bytes", "0", "0", "0", entry["content_id"][:12], "damaged"]
    assert out.splitlines()[2].startswith(f"{folder}: ")
    assert out.splitlines()[3] == f"damaged: {folder}: delete the folder and prepare it again"
    for command in ("verify", "prepare"):
        code, out, err = cli("data", command, *texts)
        assert code == 2
        assert err.startswith(f"mupsweep: {folder / 'train-00000.bin'} is damaged: 2000 bytes instead of 5452; delete")


def test_verifying_what_is_not_prepared_says_to_prepare_it(cli: Cli, texts: list[str]) -> None:
    code, _, err = cli("data", "verify", *texts)
    assert code == 2
    assert "local with bytes is not prepared: " in err
    assert err.endswith("run mupsweep data prepare with the same keys\n")


def test_token_files_are_ready_as_they_are(cli: Cli, tmp_path: Path) -> None:
    for name in ("train", "val"):
        (tmp_path / f"{name}.bin").write_bytes(bytes(2000))
    overrides = ["data=local", f"data.path={tmp_path / 'train.bin'}", "data.tokenizer=gpt2"]
    assert cli("data", "prepare", *overrides)[:2] == (0, "local: 1,000 training and 1,000 validation tokens, gpt2, " + (
        f"content {data.fingerprint(load(overrides).variants[0].data)[:12]}\n"
    ))  # fmt: skip
    assert cli("data", "verify", *overrides)[1].startswith("2 token files, not encoded: ")
    assert cli("data", "list", "--json")[1] == "[]\n"


def test_a_plan_of_more_than_one_epoch_has_a_note(cli: Cli, texts: list[str]) -> None:
    overrides = ["experiment=smoke", *texts]
    assert "note: " not in cli("plan", *overrides)[1]  # not prepared: nobody knows its size
    cli("data", "prepare", *texts)
    assert (
        "note: a run trains on 3,840 tokens, 1.7 times the 2,214 training tokens of data=local: text repeats after the "
        "first epoch"
    ) in cli("plan", *overrides)[1]
    assert "note: " not in cli("plan", *overrides, "training.steps=10")[1]
