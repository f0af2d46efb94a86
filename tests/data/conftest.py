"""A loopback hub with small sets in their real layouts, and processes that use it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub import Hub, write_card, write_fineweb, write_openwebtext, write_parquet, write_script, write_wikitext
from loopback import ARTICLES, TEXTS, TOKEN, VALIDATION, Client


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    write_fineweb(root, TEXTS)
    write_openwebtext(root, TEXTS)
    write_wikitext(root, ARTICLES, VALIDATION)
    write_script(root, "old/scripted")
    write_script(root, "old/converted")
    write_parquet(root / "closed/gated/data.parquet", {"text": TEXTS})
    write_parquet(root / "odd/columns/data.parquet", {"body": TEXTS, "n": list(range(60))})
    write_parquet(root / "odd/gaps/data.parquet", {"text": ["one", None, "", "two"]})
    (root / "odd/json").mkdir()
    (root / "odd/json/data.jsonl").write_text("".join(json.dumps({"text": t, "n": 1}) + "\n" for t in TEXTS))
    (root / "odd/broken").mkdir()
    (root / "odd/broken/data.parquet").write_bytes(b"PAR1 this is none PAR1")
    write_card(root / "odd/empty", {})
    with Hub(root) as served:
        served.repositories["closed/gated"].gated = True
        served.token = TOKEN
        served.repositories["old/converted"].refs.add("refs/convert/parquet")
        yield served


@pytest.fixture(scope="session")
def client(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    shared_client = Client(tmp_path_factory.mktemp("home"), hub.endpoint, IMPATIENT="1")
    yield shared_client
    shared_client.close()


@pytest.fixture
def other(hub: Hub, tmp_path: Path) -> Iterator[Callable[..., Client]]:
    """Makes clients with an environment of their own."""
    clients: list[Client] = []

    def make(endpoint: str = hub.endpoint, **environment: str) -> Client:
        clients.append(Client(tmp_path / f"home{len(clients)}", endpoint, **environment))
        return clients[-1]

    yield make
    for each in clients:
        each.close()
