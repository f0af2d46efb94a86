"""Signals of a sweep's processes: how they react to stop signals, and how one process starts another."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import IO, Any

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
STOPPED = 130  # exit code of a worker that a signal asked to stop
MOST_THREADS = 1024  # the most threads that a process may ask for; OpenMP dies where the system cannot start them


class StopRequested(Exception):
    """The run was asked to stop; it is checkpointed and goes on when it is started again."""


class LeaseLost(Exception):
    """Another worker took the run over, so nothing of the run may be written here any more."""


@dataclass
class StopSignal:
    """A flag that the first stop signal sets; the run in progress then finishes its step and checkpoints.

    Attributes:
        signalled: whether a stop signal came.
        received: the stop signals that came.
    """

    signalled: bool = False
    received: set[int] = field(default_factory=set)

    @classmethod
    def install(cls) -> StopSignal:
        """Return a flag that stop signals set from now on, deferred ones included."""
        flag = cls()

        def handle(signum: int, frame: FrameType | None) -> None:
            flag.signalled = True
            flag.received.add(signum)

        _handle_stops(handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        return flag


def interrupt_on_stop() -> None:
    """Let every stop signal raise KeyboardInterrupt from now on, as Ctrl-C does."""
    _handle_stops(signal.default_int_handler)


def _handle_stops(handler: Callable[[int, FrameType | None], object]) -> None:
    """Install a handler of every stop signal."""
    for number in STOPS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # under nohup the terminal may close
            signal.signal(number, handler)


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Defer stop signals to the end of the context, and in processes started in it until they install a StopSignal."""
    deferred: list[int] = []
    handlers = {number: signal.getsignal(number) for number in STOPS}
    # A handler, since a mask is of one thread and the system would deliver the signal to another. The mask is for the
    # processes started here, which inherit it.
    _handle_stops(lambda number, _: deferred.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in dict.fromkeys(deferred):
            signal.raise_signal(number)


def start(
    command: Sequence[str], environment: Mapping[str, str], output: IO[Any] | None = None
) -> subprocess.Popen[bytes]:
    """Start a process with `environment` added to this one's; it receives stop signals once it can handle them."""
    with defer_signals():
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **environment},
        )


def exit_reason(code: int) -> str:
    """Return how a process ended: the signal that killed it, or its exit code."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
