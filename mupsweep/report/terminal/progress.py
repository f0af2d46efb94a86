"""The display while runs are trained: a live board in a terminal, a line per finished run elsewhere."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live

from mupsweep.analysis.labels import DIVERGED, Label, label_of
from mupsweep.errors import visible
from mupsweep.formatting import counted
from mupsweep.report.terminal.board import Board
from mupsweep.store.run_dir import FAILED, PENDING, RUNNING
from mupsweep.store.sweep_dir import SweepDir

if TYPE_CHECKING:
    from mupsweep.report.terminal.board_view import BoardText

POLL_SECONDS = 1.0
IDLE_POLLS = 10  # polls without a running run after which nobody seems to train the sweep or to add runs to it


class Progress:
    """Displays the runs of a sweep, with those that are planned meanwhile; `refresh` updates the display."""

    def __init__(self, sweep: SweepDir, console: Console | None = None, keep: bool = False) -> None:
        self.console = console or Console(highlight=False)
        self.board = Board(sweep)
        self.text: BoardText | None = None
        self._round = 0
        # the last drawing stays on the screen only where nothing else is printed after it
        self.live = Live(console=self.console, transient=not keep, auto_refresh=False)

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            from mupsweep.report.terminal.board_view import BoardText  # which imports scipy

            self.text = BoardText(self.board)
            self.live.start()
        self._print_round()
        self._draw()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refresh()
        self.live.stop()

    def refresh(self) -> None:
        """Poll the open runs, print a line for those that ended or failed, and redraw the board."""
        ended = self.board.poll()
        self._print_round()
        first = self.board.finished + self.board.counts[FAILED] - len(ended) + 1
        for count, (run_id, status) in enumerate(ended, first):
            if status["status"] == FAILED or not self.live.is_started:  # the board already shows the others
                self._print_ended(count, run_id, status)
        self._draw()

    def _draw(self) -> None:
        if self.text is not None:
            self.live.update(self.text.draw(*self.console.size), refresh=True)

    def _print_ended(self, count: int, run_id: str, status: Mapping[str, Any]) -> None:
        """Print a line for a run that ended."""
        folder, total = self.board.sweep.run(run_id), len(self.board.planned)
        summary = folder.summary() or {}
        if status["status"] == FAILED:
            detail = f"{status.get('error', '')}  (see {folder.log_path})"
        elif summary.get("val_loss") is None:
            detail = f"at step {summary.get('diverged_at_step')}"
        else:
            detail = f"val_loss {summary['val_loss']:.4f}"
        parts = [run_id, status["status"], detail]
        if (seconds := summary.get("seconds")) is not None:
            parts.append(f"{seconds:.1f}s")
        if (speed := summary.get("tokens_per_second")) is not None:
            parts.append(f"{speed:,.0f} tok/s")
        if variant := self._variant(self.board.label(run_id)):
            parts.insert(0, variant)
        if left := self.board.time_left():
            parts.append(left)
        self._print(f"[{count:>{len(str(total))}}/{total}] {'  '.join(parts)}")

    def _print_round(self) -> None:
        """Print which round of a search began, and why it trains its runs, where no board shows the runs."""
        if self.board.round == self._round or self.live.is_started:
            return
        self._round = self.board.round
        rows = [row for row in self.board.planned.values() if row.get("round") == self._round]
        self._print(f"round {self._round} of the search: {counted(len(rows), 'run')}")
        runs_of: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
        for row in sorted(rows, key=lambda row: (label_of(row), row["width"] * row["depth"])):
            runs_of[label_of(row), row["width"], row["depth"], row["reason"]].append(row)
        for (label, width, depth, reason), runs in runs_of.items():
            lrs = ", ".join(f"2^{log2_lr:g}" for log2_lr in sorted({row["log2_lr"] for row in runs}))
            where = ", ".join([*filter(None, [self._variant(label)]), f"width {width}", f"depth {depth}"])
            self._print(f"  {where}: {counted(len(runs), 'run')} at {lrs}: {reason}")

    def _variant(self, label: Label) -> str:
        """What tells a variant from the others of the sweep; empty where there are none."""
        if len(self.board.labels) == 1:
            return ""
        from mupsweep.report.names import variant_name  # which imports scipy

        return variant_name(label, list(self.board.labels))

    def _print(self, line: str) -> None:
        self.console.print(visible(line), markup=False, soft_wrap=True)


def watch(
    sweep: SweepDir,
    is_over: Callable[[], bool],
    console: Console | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Display a sweep that other processes train, until all its runs have ended and none are added.

    Args:
        sweep: the sweep to display.
        console: where it is displayed; a new console by default.
        pause: waits a number of seconds between two polls.
        is_over: whether a sweep without open runs is known to be complete.
    """
    with Progress(sweep, console, keep=True) as progress:
        board, idle_polls = progress.board, 0

        def say(line: str) -> None:
            if not progress.live.is_started:  # a board on a terminal shows everything itself
                progress._print(line)

        say(_counts_text(board))
        while board.open or (idle_polls < IDLE_POLLS and not is_over()):
            began = time.process_time()
            progress.refresh()
            idle_polls = 0 if board.running else idle_polls + 1
            if idle_polls == IDLE_POLLS and board.open:
                remaining = counted(board.open, "open run")
                say(f"nobody trains the {remaining} now; waiting (mupsweep run goes on with them)")
            # polling many open runs takes a while itself, but must not take more than a tenth of the time
            pause(max(POLL_SECONDS, 9 * (time.process_time() - began)))
        say(_counts_text(board))


def _counts_text(board: Board) -> str:
    """How many runs are finished, and how many are in each other state."""
    states = (RUNNING, PENDING, DIVERGED, FAILED)
    counts = [f"{board.finished} of {counted(len(board.planned), 'run')} finished"]
    counts += [f"{board.counts[state]} {state}" for state in states if board.counts[state]]
    return f"{board.sweep.name}: {', '.join(counts)}"
