"""Sets of the hub: shipped configs and documented calls against a loopback hub, and interruptions."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hub import Hub, digest
from loopback import ARTICLES, TEXTS, VALIDATION, Client

from mupsweep.data import cache, shards, sources, tokenizers
from mupsweep.data.config import DataConfig
from mupsweep.sweep.config import load


def held_out(text: str, fraction: float) -> bool:
    """sha256 / 2^256 < fraction."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256 < fraction


def prepared(overrides: list[str]) -> dict[str, list[str]]:
    """The texts of both splits of a prepared corpus."""
    config = load(overrides).variants[0].data
    folder = cache.folder(config, cache.content_id(config, sources.load(config).fingerprint()))
    shards.verify(folder)
    tokenizer = tokenizers.load(config.tokenizer)
    texts_of: dict[str, list[str]] = {}
    for split, segments in zip(shards.SPLITS, shards.segments(folder), strict=True):
        texts, open_ = [], []
        for token in (int(t) for segment in segments for t in segment.open()):
            if token == tokenizer.end_of_text:
                texts.append(tokenizer.decode(open_))
                open_ = []
            else:
                open_.append(token)
        assert open_ == []
        texts_of[split] = texts
    return texts_of


def test_the_documented_calls_run_against_the_loopback_hub(client: Client) -> None:
    result = client(literal=["fineweb", "openwebtext", "wikitext103"])
    assert result["fineweb"] == result["openwebtext"] == {"train": TEXTS}
    assert list(result["wikitext103"]) == ["test", "train", "validation"]
    for split, articles in (("train", ARTICLES), ("validation", VALIDATION), ("test", VALIDATION[:1])):
        assert "".join(row or " \n" for row in result["wikitext103"][split]) == "".join(articles)


@pytest.mark.parametrize("name", ["fineweb", "openwebtext"])
def test_a_shipped_config_reads_its_set_and_holds_documents_out_by_hash(
    name: str, client: Client, tmp_path: Path
) -> None:
    overrides = [f"data={name}", "data.validation_fraction=0.2", f"data.cache={tmp_path}"]
    answer = client.prepare(*overrides)
    assert (answer["code"], answer["err"]) == (0, "")
    assert prepared(overrides) == {
        "train": [t for t in TEXTS if not held_out(t, 0.2)],
        "validation": [t for t in TEXTS if held_out(t, 0.2)],
    }
    (meta,) = (json.loads(p.read_text()) for p in tmp_path.glob("*/meta.json"))
    config = load(overrides).variants[0].data
    assert (meta["hub_id"], meta["revision"]) == (config.hub_id, config.revision)
    assert meta["splits"]["train"]["documents"] + meta["splits"]["validation"]["documents"] == 60
    assert client(cli=["data", "verify", *overrides])["code"] == 0


def test_wikitext_is_articles_again_with_its_own_validation_split(client: Client, tmp_path: Path) -> None:
    overrides = ["data=wikitext103", f"data.cache={tmp_path}"]
    assert client.prepare(*overrides)["code"] == 0
    assert prepared(overrides) == {"train": ARTICLES, "validation": VALIDATION}
    limited = [*overrides, "data.max_tokens=100"]
    assert client.prepare(*limited)["code"] == 0
    config = load(limited).variants[0].data
    entry = next(e for e in cache.entries(config) if e.train_tokens == 100)
    assert entry.validation_tokens == sum(len(tokenizers.load("gpt2").encode(t)) + 1 for t in VALIDATION)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data=fineweb"],
        ["data=wikitext103"],
        pytest.param(["data=openwebtext", "data.held_out=nanogpt", "data.rows=60"], marks=pytest.mark.slow),
        [f"data.revision={digest('odd/json')}", "data=openwebtext", "data.hub_config=null", "data.hub_id=odd/json"],
        [f"data.revision={digest('odd/gaps')}", "data=openwebtext", "data.hub_config=null", "data.hub_id=odd/gaps"],
    ],
    ids=["fineweb", "wikitext103", "nanogpt", "json", "gaps"],
)
def test_reading_goes_on_from_every_position(overrides: list[str], client: Client) -> None:
    result = client(read=overrides)
    assert result["wrong"] == []
    expected = {"data=wikitext103": ARTICLES, "data.hub_id=odd/gaps": ["one", "two"]}.get(overrides[-1], TEXTS)
    assert [text for text, _ in result["documents"] if text not in VALIDATION] == expected


def test_a_position_of_another_version_of_the_library_is_understood(client: Client) -> None:
    position = client(read=["data=fineweb"])["position"]
    assert (position["row"], position["skipped"]) == (59, 0)
    assert position["state"] is not None
    for row in (59, 37):
        changed = {**position, "row": row, "library": "1.0", "state": {"unknown": 3}}
        assert client(go_on=[changed, "data=fineweb"]) == [[text, row] for text in TEXTS[row:]]


def test_nanogpts_split_holds_out_the_rows_that_the_library_does(client: Client) -> None:
    for ours, theirs in client(held_out=[60, 2001, 50_000]).values():
        assert ours == theirs
        assert ours


def test_nanogpts_split_of_a_set(client: Client, tmp_path: Path) -> None:
    overrides = ["data=openwebtext", "data.held_out=nanogpt", "data.rows=60", f"data.cache={tmp_path}"]
    assert client.prepare(*overrides)["code"] == 0
    (row,) = client(held_out=[60])["60"][0]
    assert prepared(overrides) == {"train": [t for i, t in enumerate(TEXTS) if i != row], "validation": [TEXTS[row]]}


def test_only_some_files_of_a_set(client: Client, tmp_path: Path) -> None:
    overrides = ["data=fineweb", "data.data_files=[sample/10BT/001_00000.parquet]", f"data.cache={tmp_path}"]
    overrides += ["data.validation_fraction=0.2"]
    assert client.prepare(*overrides)["code"] == 0
    assert prepared(overrides)["train"] == [t for t in TEXTS[20:40] if not held_out(t, 0.2)]


def contents(folder: Path) -> dict[str, bytes]:
    assert not list(folder.glob(".*.partial"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.glob("[!.]*/*")}


@pytest.mark.parametrize("name", ["fineweb", pytest.param("wikitext103", marks=pytest.mark.slow)])
def test_a_reader_that_is_killed_goes_on_in_another_process(
    name: str, hub: Hub, client: Client, other: Callable[..., Client], tmp_path: Path
) -> None:
    overrides = [f"data={name}", "data.validation_fraction=0.2"]
    assert client.prepare(*overrides, f"data.cache={tmp_path / 'undisturbed'}")["code"] == 0
    dying = other()

    def kill(path: str) -> None:
        if path.rpartition("/")[2].startswith(("002_", "train-00001")):  # the last file of the training split
            dying.process.send_signal(signal.SIGKILL)

    with asked(hub, kill), pytest.raises(EOFError):
        dying.prepare(*overrides, f"data.cache={tmp_path / 'killed'}")
    assert dying.process.returncode == -signal.SIGKILL
    answer = client.prepare(*overrides, f"data.cache={tmp_path / 'killed'}")
    assert answer["out"].startswith("going on after ")
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("times", [3, 10**6])
def test_a_hub_that_stumbles_is_asked_again_and_one_that_is_gone_is_one_line(
    times: int, hub: Hub, client: Client, tmp_path: Path
) -> None:
    overrides = ["data=fineweb", "data.validation_fraction=0.2"]
    assert client.prepare(*overrides, f"data.cache={tmp_path / 'whole'}")["code"] == 0

    def stumble(path: str) -> None:
        if "/002_" in path and hub.on_request:
            hub.on_request, hub.refuse_times = None, times

    with asked(hub, stumble):
        answer = client.prepare(*overrides, f"data.cache={tmp_path / 'disturbed'}")
    if times > 100:
        assert answer["code"] == 2
        assert answer["err"].startswith(f"mupsweep: the hub {hub.endpoint} ")
        assert "run the same command again" in answer["err"]
        answer = client.prepare(*overrides, f"data.cache={tmp_path / 'disturbed'}")
        assert answer["out"].startswith("going on after ")
    assert (answer["code"], answer["err"]) == (0, "")
    assert contents(tmp_path / "disturbed") == contents(tmp_path / "whole")


@contextmanager
def asked(hub: Hub, call: Callable[[str], None]) -> Iterator[None]:
    """Calls `call` with each path that the hub is asked for; then the hub is as it was."""
    hub.on_request = call
    try:
        yield
    finally:
        hub.on_request, hub.refuse_times = None, 0


def test_the_fingerprint_follows_what_decides_the_documents() -> None:
    tree: dict[str, Any] = {"kind": "mupsweep.data.sources.hub.Hub", "hub_id": "a/b", "revision": "0" * 40}
    base = sources.load(DataConfig(**tree)).fingerprint()
    assert base == "e0bce70250dddc0df59a93818de8d371252a2d9adf11a985da139b7a836049b9"
    changes: list[dict[str, Any]] = [
        {"hub_id": "a/c"},
        {"hub_config": "x"},
        {"revision": "1" * 40},
        {"data_files": ("x",)},
        {"split": "x"},
        {"validation_split": "x"},
        {"text_column": "x"},
        {"held_out": "nanogpt", "rows": 5},
        {"held_out": "nanogpt", "rows": 6},
        {"kind": "mupsweep.data.sources.wikitext.WikiText"},
    ]
    others = [sources.load(DataConfig(**{**tree, **change})).fingerprint() for change in changes]
    assert len({base, *others}) == len(changes) + 1
    assert sources.load(DataConfig(**{**tree, "rows": 5, "name": "y", "cache": "z"})).fingerprint() == base


def test_a_set_of_ones_own_is_one_yaml(client: Client, tmp_path: Path) -> None:
    (tmp_path / "mine" / "data").mkdir(parents=True)
    (tmp_path / "mine" / "data" / "columns.yaml").write_text(
        f"defaults: [_hub, _self_]\nname: columns\nhub_id: odd/columns\nrevision: {digest('odd/columns')}\n"
        "text_column: body\ntokenizer: bytes\nvalidation_fraction: 0.2\n"
    )
    overrides = ["data=columns", f"data.cache={tmp_path / 'cache'}", "--config-dir", str(tmp_path / "mine")]
    answer = client.prepare(*overrides)
    assert (answer["code"], answer["err"]) == (0, "")
    (entry,) = cache.entries(DataConfig(cache=str(tmp_path / "cache")))
    assert (entry.name, entry.documents, entry.bytes) == ("columns", 60, sum(len(t.encode()) for t in TEXTS))
