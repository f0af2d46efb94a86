"""The command line in this process, which has imported already what a process of its own needs seconds for."""

from __future__ import annotations

import contextlib
import io
import signal
import sys

import pytest

from mupsweep.cli import main
from mupsweep.training.signals import STOPS


def mupsweep(*arguments: str) -> tuple[int, str, str]:
    """Run a command; return its exit code, stdout and stderr."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    handlers = {number: signal.getsignal(number) for number in STOPS}
    code = 0
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        monkeypatch.setattr(sys, "argv", ["mupsweep", *arguments])
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    out_text, err_text = (stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]
    return code, out_text, err_text
