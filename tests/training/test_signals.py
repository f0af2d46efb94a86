"""Stop signals: every process that has to stop receives them, whenever they come."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from mupsweep.training import signals
from mupsweep.training.signals import STOPS, StopSignal, defer_signals, interrupt_on_stop

PRINT_BLOCKED = "import os, signal as s; print(*sorted(s.pthread_sigmask(s.SIG_BLOCK, [])), os.environ['WORD'])"


@pytest.mark.parametrize("number", STOPS)
def test_a_stop_signal_sets_the_flag_or_interrupts(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_DFL)  # nohup ignores one
    flag = StopSignal.install()
    assert not flag.signalled
    os.kill(os.getpid(), number)
    assert flag.signalled
    interrupt_on_stop()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)


def test_under_nohup_a_closed_terminal_stops_nothing() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    flag = StopSignal.install()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not flag.signalled
    interrupt_on_stop()
    os.kill(os.getpid(), signal.SIGHUP)


def test_a_deferred_signal_comes_afterwards() -> None:
    done: list[str] = []

    def work() -> None:
        with defer_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            with defer_signals():
                done.append("inner")
            done.append("outer")  # the end of the inner context does not deliver the signal

    interrupt_on_stop()
    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["inner", "outer"]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []).isdisjoint(STOPS)


def test_a_signal_is_deferred_also_where_another_thread_could_take_it() -> None:
    over = threading.Event()
    listening = threading.Thread(target=over.wait)

    def work() -> None:
        with defer_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            over.set()
            listening.join()  # the system had the time to deliver the signal to that thread
            done.append("held")

    done: list[str] = []
    interrupt_on_stop()
    listening.start()
    with pytest.raises(KeyboardInterrupt):
        work()
    over.set()
    assert done == ["held"]


def test_a_flag_is_set_by_a_signal_that_was_deferred_before_it() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # as in a process that was started with them blocked
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
    assert StopSignal.install().signalled


def test_a_process_is_started_with_stop_signals_blocked_and_more_in_its_environment(tmp_path: Path) -> None:
    with (tmp_path / "output").open("wb") as output:
        assert signals.start([sys.executable, "-c", PRINT_BLOCKED], {"WORD": "heard"}, output).wait(30) == 0
    *blocked, word = (tmp_path / "output").read_text().split()
    assert (set(map(int, blocked)), word) == ({int(number) for number in STOPS}, "heard")
    assert "WORD" not in os.environ
