"""What a user sees while runs are trained: a live board in a terminal, a line per finished run elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live

from mupsweep.analysis.labels import DIVERGED
from mupsweep.formatting import counted
from mupsweep.report.terminal.board import Board
from mupsweep.store.run_dir import FAILED, PENDING, RUNNING
from mupsweep.store.sweep_dir import SweepDir

if TYPE_CHECKING:
    from mupsweep.report.terminal.board_view import BoardText

POLL_SECONDS = 1.0
STILL_POLLS = 10  # whoever trains a sweep may add runs when all have ended; looks after which it seems that nobody does


class Progress:
    """Follows the runs of a sweep, those that are planned meanwhile included; `refresh` looks at them again."""

    def __init__(self, sweep: SweepDir, console: Console | None = None, keep: bool = False) -> None:
        self.console = console or Console(highlight=False)
        self.board = Board(sweep)
        self.text: BoardText | None = None
        # what is drawn last stays only where nothing else is printed after it
        self.live = Live(console=self.console, transient=not keep, auto_refresh=False)

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            from mupsweep.report.terminal.board_view import BoardText  # which imports scipy

            self.text = BoardText(self.board)
            self.live.start()
        self._draw()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refresh()
        self.live.stop()

    def refresh(self) -> None:
        """Look at the open runs again, tell of those that ended since, redraw the board."""
        ended = self.board.look()
        first = self.board.finished + self.board.counts[FAILED] - len(ended) + 1
        for count, (run_id, status) in enumerate(ended, first):
            if status["status"] == FAILED or not self.live.is_started:  # the board shows the others
                self._tell(count, run_id, status)
        self._draw()

    def _draw(self) -> None:
        if self.text is not None:
            self.live.update(self.text.draw(*self.console.size), refresh=True)

    def _tell(self, count: int, run_id: str, status: Mapping[str, Any]) -> None:
        """One line for a run that ended."""
        folder, total = self.board.sweep.run(run_id), len(self.board.planned)
        summary = folder.summary() or {}
        if status["status"] == FAILED:
            detail = f"{status.get('error', '')}  (see {folder.log_path})"
        elif summary.get("val_loss") is None:
            detail = f"at step {summary.get('diverged_at_step')}"
        else:
            detail = f"val_loss {summary['val_loss']:.4f}"
        speed = f"  {summary['seconds']:.1f}s  {summary['tokens_per_second']:,.0f} tok/s" if summary else ""
        line = f"[{count:>{len(str(total))}}/{total}] {run_id}  {status['status']}  {detail}{speed}"
        self.console.print(line, markup=False, soft_wrap=True)


def watch(
    sweep: SweepDir,
    is_over: Callable[[], bool],
    console: Console | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Show a sweep, whoever trains it, until all its runs have ended and none are added.

    Args:
        is_over: whether a sweep without open runs is known to be complete.
    """
    with Progress(sweep, console, keep=True) as progress:
        board, still = progress.board, 0
        say = _silent if progress.live.is_started else partial(progress.console.print, markup=False, soft_wrap=True)
        say(_counts(board))
        while board.open or (still < STILL_POLLS and not is_over()):
            looked = time.process_time()
            progress.refresh()
            still = 0 if board.running else still + 1
            if still == STILL_POLLS and board.open:
                left = counted(board.open, "open run")
                say(f"nobody trains the {left} now; waiting (mupsweep run goes on with them)")
            # a look at many open runs takes a while itself: never spend more than a tenth of the time on it
            pause(max(POLL_SECONDS, 9 * (time.process_time() - looked)))
        say(_counts(board))


def _silent(line: str) -> None:
    """A board says everything itself."""


def _counts(board: Board) -> str:
    states = (RUNNING, PENDING, DIVERGED, FAILED)
    told = [f"{board.finished} of {counted(len(board.planned), 'run')} finished"]
    told += [f"{board.counts[state]} {state}" for state in states if board.counts[state]]
    return f"{board.sweep.name}: {', '.join(told)}"
