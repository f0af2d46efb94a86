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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("mupsweep.cli", "mupsweep.launchers.driver", "mupsweep.launchers.inline", "mupsweep.launchers.local"),
        *("mupsweep.training.session", "mupsweep.training.fsdp"),
        *("hydra", "hypothesis", "pytest", "torch._dynamo.testing"),
    ]
)


def run_command(
    arguments: tuple[str, ...],
    folder: str,
    environment: dict[str, str],
    output: tuple[Path, Path],
    first: Callable[[], None] | None,
) -> None:
    """Be the process of a command: a group of its own, what it prints in files."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate(output, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.path.insert(0, folder)  # as `python -m` does
    sys.argv = ["mupsweep", *arguments]
    from mupsweep.cli import main

    if first is not None:
        first()
    main()


class Forked:
    """A running command with the interface of a `subprocess.Popen`; its process does something else `first`."""

    def __init__(
        self,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
        first: Callable[[], None] | None = None,
    ) -> None:
        folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.output = (log, log) if log else (folder / "out", folder / "err")
        job = (arguments, os.getcwd(), {**os.environ, **(environment or {})}, self.output, first)
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
        out, err = (path.read_text() for path in self.output)
        return out, err

    def send_signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start_worker(command: Sequence[str], environment: Mapping[str, str], output: IO[Any] | None = None) -> Forked:
    """In place of `signals.start`, where it is not the claim how a launcher in this process starts its workers."""
    assert output is not None
    python, dash_m, package, *arguments = command
    assert (python, dash_m, package, arguments[0]) == (sys.executable, "-m", "mupsweep", "worker")
    return Forked(*arguments, environment=environment, log=Path(output.name))
