"""What every test runs under: one torch thread, no network, a cache of its own."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import composition
import hydra
import pytest
from command_line import mupsweep
from forked import start_worker
from hypothesis import settings

from mupsweep.sweep import config
from mupsweep.training import signals
from mupsweep.training.signals import STOPS

os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["LC_ALL"] = "C.UTF-8"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each of a hundred processes compiles the package anew

settings.register_profile("mupsweep", deadline=None, derandomize=True)
settings.load_profile("mupsweep")

config.compose = composition.compose_once
hydra.compose = composition.compose_groups_once
gc.disable()  # until the tests are collected: what imports and collection make stays


LONGEST = (
    "test_accelerator.py",
    "test_full_disk.py",
    "test_launchers.py",
    "test_fsdp.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """The process that starts the others gives all of them a folder for composed configs."""
    if composition.FOLDER not in os.environ:
        folder = tempfile.TemporaryDirectory()
        os.environ[composition.FOLDER] = folder.name
        config.add_cleanup(folder.cleanup)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests begin first, so that no process is alone with one of them at the end."""
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONGEST))


def pytest_collection_finish() -> None:
    """What is there before the first test is no garbage, and no collection of garbage looks through it again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Token shards are prepared once per test session, outside the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths, such as the default folder of sweeps, point into the test's own folder."""
    monkeypatch.chdir(tmp_path)


HANDLERS = {number: signal.getsignal(number) for number in STOPS}


@pytest.fixture(autouse=True)
def _signals_as_at_first() -> Iterator[None]:
    """What a test, or a fixture of many tests, has stop signals do ends before the next test."""
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture
def _forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher in this process forks its workers from one that has imported what they need seconds for."""
    monkeypatch.setattr(signals, "start", start_worker)


@pytest.fixture
def cli() -> Callable[..., tuple[int, str, str]]:
    """The command line in this process: (exit code, stdout, stderr)."""
    return mupsweep
