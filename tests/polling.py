"""Waiting for what another process brings about."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

from forked import Forked

DEADLINE = 240.0
PAUSE = 0.01  # seconds between two looks


def until(condition: Callable[[], bool], process: Forked | subprocess.Popen[bytes] | None = None) -> None:
    """Wait until a condition holds, while the process that has to bring it about lives."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        if process is None:
            time.sleep(PAUSE)
            continue
        try:
            process.wait(PAUSE)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"the process ended early: {process.communicate()}")
