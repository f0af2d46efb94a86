"""What every test runs under: one torch thread, no network, a cache of its own."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from command_line import mupsweep
from hypothesis import settings

from mupsweep.sweep import config
from mupsweep.training.signals import STOPS

os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

settings.register_profile("mupsweep", deadline=None, derandomize=True)
settings.load_profile("mupsweep")

compose = config.compose


@cache
def compose_shipped(*overrides: str) -> dict[str, Any]:
    return compose(list(overrides), None)


def compose_once(overrides: list[str], config_dir: str | None) -> dict[str, Any]:
    """Hydra takes 0.3 s to compose a config; a session composes equal overrides of the shipped yamls only once."""
    return compose(overrides, config_dir) if config_dir else deepcopy(compose_shipped(*overrides))


config.compose = compose_once


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Token shards are prepared once per test session, outside the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths, such as the default folder of sweeps, point into the test's own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def _signals_as_before() -> Iterator[None]:
    """What a test has stop signals do ends with it."""
    handlers = {number: signal.getsignal(number) for number in STOPS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def cli() -> Callable[..., tuple[int, str, str]]:
    """The command line in this process: (exit code, stdout, stderr)."""
    return mupsweep
