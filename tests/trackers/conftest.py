"""Fixtures: a W&B server of this process, and a client that is configured for it alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from wandb_server import API_KEY, WandbServer, serving

from mupsweep.trackers import live
from mupsweep.trackers.wandb import shut_down


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WandbServer]:
    pytest.importorskip("wandb")
    with serving() as server:
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", API_KEY)
        monkeypatch.setenv("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", "1")  # seconds, the least there is
        for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
            monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "client"))
        monkeypatch.setattr(live, "POLL", 0.02)
        shut_down()
        yield server
        shut_down()
        assert server.unknown == []
