"""What a user sees while runs are trained: a live table in a terminal, a line per finished run elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from mupsweep.cost import duration
from mupsweep.records import FAILED, FINISHED, RUNNING, RunDir, SweepDir


class Progress:
    """Follows the records of some runs; `refresh` looks at them again."""

    def __init__(self, sweep: SweepDir, run_ids: Sequence[str], console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.folders = [sweep.run(run_id) for run_id in run_ids]
        self.open = {f.run_id: f for f in self.folders if f.status()["status"] not in FINISHED}
        self.total = len(self.open)
        self.flops = {row["run_id"]: row["flops"] for row in sweep.read_plan()}
        self.flops_done = 0.0
        self.started = time.monotonic()
        self.bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
        )
        self.task = self.bar.add_task("runs", total=self.total, left="")
        self.live = Live(console=self.console, transient=True, auto_refresh=False)

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refresh()
        self.live.stop()

    def refresh(self) -> None:
        """Read the open runs' status, tell of those that ended since, redraw the live ones."""
        running = []
        for run_id, folder in list(self.open.items()):
            status = folder.status()
            if status["status"] == RUNNING:
                running.append((run_id, status))
            elif status["status"] in (*FINISHED, FAILED):
                del self.open[run_id]
                self.flops_done += self.flops.get(run_id, 0.0)
                self.tell(folder, status)
        if self.live.is_started:
            self.bar.update(self.task, completed=self.total - len(self.open), left=self.time_left(running))
            self.live.update(Group(self.bar, _table(running)), refresh=True)

    def tell(self, folder: RunDir, status: dict[str, Any]) -> None:
        """One line for a run that ended."""
        count = f"[{self.total - len(self.open):>{len(str(self.total))}}/{self.total}]"
        summary = folder.summary() or {}
        if status["status"] == FAILED:
            detail = f"{status.get('error', '')}  (see {folder.log_path})"
        elif summary.get("val_loss") is None:
            detail = f"at step {summary.get('diverged_at_step')}"
        else:
            detail = f"val_loss {summary['val_loss']:.4f}"
        speed = f"  {summary['seconds']:.1f}s  {summary['tokens_per_second']:,.0f} tok/s" if summary else ""
        self.console.print(
            f"{count} {folder.run_id}  {status['status']}  {detail}{speed}", markup=False, soft_wrap=True
        )

    def time_left(self, running: list[tuple[str, dict[str, Any]]]) -> str:
        """How long the rest takes at the speed so far, by FLOPs."""
        partial = sum(self.flops.get(r, 0.0) * s.get("step", 0) / max(1, s.get("steps", 1)) for r, s in running)
        done = self.flops_done + partial
        if done == 0:
            return ""
        left = sum(self.flops.get(r, 0.0) for r in self.open) - partial
        return f"about {duration((time.monotonic() - self.started) * left / done)} left"


def _table(running: list[tuple[str, dict[str, Any]]]) -> Table:
    table = Table(box=None, header_style="dim")
    for column in ("run", "step", "loss", "tok/s"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for run_id, status in running:
        loss = status.get("train_loss")
        table.add_row(
            run_id,
            f"{status.get('step', 0)}/{status.get('steps', '?')}",
            "" if loss is None else f"{loss:.3f}",
            f"{status.get('tokens_per_second') or 0:,.0f}",
        )
    return table
