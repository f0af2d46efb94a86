"""Processes of a sweep: how one starts another, and what each does when it is told to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
MOST_THREADS = 1024  # of a process; OpenMP dies where the system has not so many to give


@dataclass
class StopSignal:
    """Set by the first stop signal; the run in progress finishes its step and checkpoints."""

    signalled: bool = False

    @classmethod
    def install(cls) -> StopSignal:
        """The flag that stop signals set from now on, those included that were held back."""
        flag = cls()

        def handle(signum: int, frame: FrameType | None) -> None:
            flag.signalled = True

        _answer(handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        return flag


def interrupt_on_stop() -> None:
    """From now on every stop signal is a KeyboardInterrupt, as Ctrl-C is."""
    _answer(signal.default_int_handler)


def _answer(handler: Callable[[int, FrameType | None], object]) -> None:
    for number in STOPS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup: the terminal may close
            signal.signal(number, handler)


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Stop signals wait until the end of this, and in a process that is started here until it installs a StopSignal."""
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in STOPS}
    _answer(lambda number, _: came.append(number))  # a mask is of one thread: the system would choose another
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # which that process inherits
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in dict.fromkeys(came):
            signal.raise_signal(number)


def start(
    command: Sequence[str], environment: Mapping[str, str], output: IO[Any] | None = None
) -> subprocess.Popen[bytes]:
    """A process with this one's environment and more, which hears stop signals once it can stop."""
    told = {**os.environ, **environment}
    with defer_signals():
        return subprocess.Popen(list(command), stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=told)
