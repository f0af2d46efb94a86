"""Commands in processes of their own, forked from one that has imported already what a command needs seconds for."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("mupsweep.cli", "mupsweep.launchers.driver", "mupsweep.launchers.inline", "mupsweep.launchers.local"),
        *("mupsweep.training.worker", "mupsweep.training.fsdp"),
        *("hydra", "hypothesis", "pytest", "torch._dynamo.testing"),
    ]
)


def run_command(arguments: tuple[str, ...], folder: str, environment: dict[str, str], output: Path) -> None:
    """Be the process of a command: a group of its own, what it prints in files."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.path.insert(0, folder)  # as `python -m` does
    sys.argv = ["mupsweep", *arguments]
    from mupsweep.cli import main

    main()


class Forked:
    """A running command with the interface of a `subprocess.Popen`."""

    def __init__(self, *arguments: str) -> None:
        self.output = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, self.output, ignore_errors=True)
        job = (arguments, os.getcwd(), dict(os.environ), self.output)
        self.process = CONTEXT.Process(target=run_command, args=job)
        self.process.start()
        self.pid = self.process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("mupsweep", timeout or 0.0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; return stdout and stderr."""
        self.wait(timeout)
        out, err = ((self.output / name).read_text() for name in ("out", "err"))
        return out, err

    def send_signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
