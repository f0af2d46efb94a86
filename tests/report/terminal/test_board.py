"""The board knows every run's state, reads only what may have changed, and draws it at any size of the terminal."""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mupsweep.analysis.labels import DIVERGED, DONE
from mupsweep.atomic_files import write_json
from mupsweep.formatting import counted, duration
from mupsweep.report.terminal.board import Board
from mupsweep.report.terminal.board_view import BoardText
from mupsweep.report.terminal.progress import Progress, watch
from mupsweep.report.terminal.status import is_over, time_left
from mupsweep.store.run_dir import FAILED, PENDING, RUNNING, RunDir
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.config import load

Rows = list[dict[str, Any]]


def finish(sweep: SweepDir, rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        run = sweep.run(row["run_id"])
        run.path.mkdir(parents=True, exist_ok=True)
        write_json(run.summary_path, row, durable=False)
        run.write_status(row["status"], durable=False)


def begin(run: RunDir, step: int = 30) -> None:
    """Leave a run in the hands of this process."""
    run.path.mkdir(parents=True, exist_ok=True)
    assert run.is_claimed() or run.claim()
    run.write_status(RUNNING, step=step, steps=300, train_loss=3.25, tokens_per_second=1000.0)


def text(board: Board, width: int = 80, height: int = 24) -> list[str]:
    console = Console(width=width, height=height, file=io.StringIO(), force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(BoardText(board).draw(width, height))
    return captured.get().splitlines()


@pytest.fixture
def planned(rows: Callable[..., Rows], save_sweep: Callable[..., SweepDir]) -> tuple[SweepDir, Rows]:
    """SP and muP at two widths, four LRs, one seed; nothing is trained yet."""
    results = rows(widths=(32, 64), log2_lrs=(-9, -8, -7, -3), seeds=1)
    sweep = save_sweep(results)
    for row in results:
        sweep.run(row["run_id"]).metrics_path.unlink()
        sweep.run(row["run_id"]).path.rmdir()
    return sweep, results


def test_states_counts_and_what_ended_follow_the_records(planned: tuple[SweepDir, Rows]) -> None:
    sweep, rows = planned
    board = Board(sweep)
    assert (board.counts[PENDING], board.open, board.finished, board.poll()) == (16, 16, 0, [])
    finish(sweep, rows[:3])
    begin(sweep.run(rows[4]["run_id"]))
    sweep.run(rows[5]["run_id"]).path.mkdir()
    sweep.run(rows[5]["run_id"]).write_status(FAILED, error="ouch")
    assert {run_id for run_id, _ in board.poll()} == {row["run_id"] for row in [*rows[:3], rows[5]]}
    assert dict(+board.counts) == {DONE: 3, RUNNING: 1, FAILED: 1, PENDING: 11}
    finish(sweep, rows[3:4])  # the largest LR diverges
    assert [run_id for run_id, _ in board.poll()] == [rows[3]["run_id"]]
    assert board.counts[DIVERGED] == 1
    assert board.losses == {row["run_id"]: row["val_loss"] for row in rows[:4]}
    assert board.poll() == []


def test_a_run_whose_owner_died_waits_again(planned: tuple[SweepDir, Rows]) -> None:
    sweep, rows = planned
    run = sweep.run(rows[0]["run_id"])
    begin(run)
    board = Board(sweep)
    assert list(board.running) == [run.run_id]
    claim = next(run.claims.glob("*.json"))
    claim.write_text(claim.read_text().replace(f'"pid": {os.getpid()}', '"pid": 4194305'))
    board.poll()
    assert not board.running
    assert board.counts[PENDING] == 16


def test_runs_that_are_planned_meanwhile_are_followed(planned: tuple[SweepDir, Rows]) -> None:
    sweep, rows = planned
    board = Board(sweep)
    plan = sweep.read_plan()
    sweep.write_plan([*plan, {**plan[0], "run_id": "later", "log2_lr": -7.5}])
    assert board.poll() == []
    assert len(board.planned) == 17
    finish(sweep, [{**rows[0], "run_id": "later", "log2_lr": -7.5}])
    assert [run_id for run_id, _ in board.poll()] == ["later"]


def test_a_poll_reads_neither_finished_runs_nor_those_without_a_folder(
    planned: tuple[SweepDir, Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, rows = planned
    finish(sweep, rows[:8])
    begin(sweep.run(rows[8]["run_id"]))
    old = time.time() - 60
    for path in [sweep.plan_path, sweep.runs, *sweep.runs.glob("*/status.json")]:
        os.utime(path, (old, old))
    board = Board(sweep)
    read: list[Path] = []
    monkeypatch.setattr(RunDir, "status", lambda run: read.append(run.path) or {"status": RUNNING})
    monkeypatch.setattr(RunDir, "summary", lambda run: read.append(run.path))
    monkeypatch.setattr(SweepDir, "read_plan", lambda sweep: read.append(sweep.path) or [])
    monkeypatch.setattr(SweepDir, "started", lambda sweep: read.append(sweep.path) or [])
    assert board.poll() == []
    assert read == []
    os.utime(sweep.run(rows[8]["run_id"]).status_path)
    board.poll()
    assert read == [sweep.run(rows[8]["run_id"]).path]


def test_time_left_follows_from_speed_and_flops(planned: tuple[SweepDir, Rows]) -> None:
    sweep, rows = planned
    board = Board(sweep)
    assert board.seconds_left() is None
    begin(sweep.run(rows[0]["run_id"]), step=0)
    board.poll()
    assert board.run_seconds_left(rows[0]["run_id"]) == pytest.approx(153.6)  # 153,600 tokens at 1,000 a second
    assert board.seconds_left() == pytest.approx((8 + 8 * 4) * 153.6)  # a run of twice the width costs four times
    begin(sweep.run(rows[0]["run_id"]), step=150)
    board.poll()
    assert board.run_seconds_left(rows[0]["run_id"]) == pytest.approx(76.8)
    assert (board.seconds_left() or 0.0) > 0  # measured by now


def test_the_grid_tells_losses_and_states_by_size_and_lr(planned: tuple[SweepDir, Rows]) -> None:
    sweep, rows = planned
    finish(sweep, rows[:4])
    begin(sweep.run(rows[4]["run_id"]))
    lines = text(Board(sweep), 80, 40)
    best = min(row["val_loss"] for row in rows[:3])
    assert "4/16, 1 running, 1 diverged, 1,000 tok/s" in lines[0]
    header, first, second = (next(line for line in lines if m in line) for m in ("2^-9", "SP width 32", "SP width 64"))
    assert header.split() == ["2^-9", "2^-8", "2^-7", "2^-3"]
    losses = [f"{row['val_loss']:.3f}" + ("*" if row["val_loss"] == best else "") for row in rows[:3]]
    assert first.split()[3:] == [*losses, "x"]
    assert second.split()[3:] == [">", "·", "·", "·"]
    run = next(line for line in lines if rows[4]["run_id"] in line)
    assert run.split()[1:] == ["SP", "30/300", "3.250", "1,000", "2m", "18s"]
    assert any("loss so far: SP, by width" in line for line in lines)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 10), (20, 5), (200, 60)])
def test_it_fits_into_the_terminal(rows: Callable, save_sweep: Callable, width: int, height: int) -> None:
    results = rows(widths=[2**i for i in range(4, 12)], log2_lrs=[x / 8 for x in range(-96, 0)], seeds=1)
    sweep = save_sweep(results, pending=40)
    finish(sweep, results[::16])
    for row in results[1:400:30]:
        begin(sweep.run(row["run_id"]))
    lines = text(Board(sweep), width, height)
    assert len(lines) <= max(height, 10)
    assert max(map(len, lines)) <= width


def test_watching_ends_with_the_sweep_and_leaves_plain_lines_where_there_is_no_terminal(
    planned: tuple[SweepDir, Rows],
) -> None:
    sweep, rows = planned
    finish(sweep, rows[:2])
    console = Console(file=io.StringIO(), width=40)
    pauses = 0

    def pause(seconds: float) -> None:
        nonlocal pauses
        pauses += 1
        if pauses == 13:
            finish(sweep, rows[2:])

    watch(sweep, lambda: is_over(sweep), console, pause)
    assert pauses == 14
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0] == "demo: 2 of 16 runs finished, 14 pending"
    assert lines[1] == "nobody trains the 14 open runs now; waiting (mupsweep run goes on with them)"
    assert [line.split("]")[0] for line in lines[2:-1]] == [f"[{i:2}/16" for i in range(3, 17)]
    diverged = sum(row["status"] == DIVERGED for row in rows)
    assert lines[-1] == f"demo: 16 of 16 runs finished, {diverged} diverged"
    ended = f"] SP  {rows[2]['run_id']}  done  val_loss {rows[2]['val_loss']:.4f}  3.5s  44,000 tok/s"
    assert any(line.endswith(ended) for line in lines)
    assert "\x1b" not in "\n".join(lines)


def test_in_a_terminal_the_board_is_drawn_and_only_failures_are_told(planned: tuple[SweepDir, Rows]) -> None:
    sweep, rows = planned
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True, color_system=None)
    with Progress(sweep, console) as progress:
        finish(sweep, rows[:2])
        sweep.run(rows[2]["run_id"]).path.mkdir()
        sweep.run(rows[2]["run_id"]).write_status(FAILED, error="ouch\x1b[31m")
        progress.refresh()
    printed = [line for line in console.file.getvalue().splitlines() if "/16] " in line]  # type: ignore[attr-defined]
    assert len(printed) == 1
    assert f"{rows[2]['run_id']}  failed  ouch\\x1b[31m  (see " in printed[0]


def test_a_line_of_a_pipe_says_the_variant_where_they_differ_and_the_time_left(
    planned: tuple[SweepDir, Rows],
) -> None:
    sweep, results = planned
    begin(sweep.run(results[4]["run_id"]), step=0)
    console = Console(file=io.StringIO(), width=40)
    with Progress(sweep, console) as progress:
        finish(sweep, results[8:9])
        progress.refresh()
    [line] = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert line.startswith(f"[ 1/16] μP  {results[8]['run_id']}  done  val_loss ")
    assert re.search(r"44,000 tok/s  about \d+s left$", line)


def test_a_line_of_a_pipe_names_no_variant_where_there_is_one(
    rows: Callable[..., Rows], save_sweep: Callable[..., SweepDir]
) -> None:
    alone = rows(widths=(32,), log2_lrs=(-8,), seeds=1, parametrizations=("mup",))
    sweep = save_sweep(alone, pending=1)
    console = Console(file=io.StringIO(), width=40)
    with Progress(sweep, console) as progress:
        finish(sweep, alone)
        progress.refresh()
    [line] = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert line.startswith(f"[1/2] {alone[0]['run_id']}  done  val_loss ")
    assert re.search(r"44,000 tok/s  about \d+s left$", line)


def test_status_says_the_time_left_at_the_speed_of_the_running_runs(
    planned: tuple[SweepDir, Rows], cli: Callable[..., tuple[int, str, str]]
) -> None:
    sweep, results = planned
    assert "left" not in cli("status", str(sweep.path))[1]
    begin(sweep.run(results[0]["run_id"]), step=150)
    finish(sweep, results[1:4])
    # half a run and four of four times its cost, and so for muP: each costs 153,600 tokens at 1,000 a second
    seconds = (0.5 + 4 * 4 + 4 + 4 * 4) * 153.6
    assert f"pending 12  failed 0  about {duration(seconds)} left\n" in cli("status", str(sweep.path))[1]


def test_the_time_left_of_a_program_of_unknown_cost_counts_its_runs() -> None:
    running = {"status": RUNNING, "step": 5, "steps": 10, "tokens_per_second": 100.0}
    states = [({"tokens": 1000}, RunDir(Path()), status) for status in (running, {"status": PENDING})]
    assert time_left(states) == f"about {duration(15)} left"


def test_a_search_says_its_round_and_why_on_a_pipe_and_in_the_plan(
    tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    words = ["experiment=smoke", "sweep.search=adaptive", "sweep.width_ratios=[1]", f"out={tmp_path}"]
    config = load([*words, "parametrization=mup", "sweep.log2_lrs=[-8,-6]"])
    sweep, first = plan.save(config, "")
    assert {run.round for run in first} == {1}
    (reason,) = {run.reason for run in first}
    assert reason
    finish(sweep, [{**run.row(), "status": DONE, "val_loss": 3 + 0.1 * run.log2_lr} for run in first])
    console = Console(file=io.StringIO(), width=40)
    with Progress(sweep, console) as progress:
        second = [run for run in plan.save(config, "", sweep)[1] if run.round == 2]
        progress.refresh()
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    size = f"width {first[0].size.width}, depth {first[0].size.depth}"
    expected = []
    for number, runs in enumerate((first, second), 1):
        lrs = ", ".join(f"2^{log2_lr:g}" for log2_lr in sorted({run.log2_lr for run in runs}))
        expected.append(f"round {number} of the search: {counted(len(runs), 'run')}")
        expected.append(f"  {size}: {counted(len(runs), 'run')} at {lrs}: {runs[0].reason}")
    assert lines == expected
    assert sorted(run.round for run in plan.load(sweep)) == [1] * len(first) + [2] * len(second)
    assert (
        f"adaptive search: {counted(len(second), 'run')} of round 2 left; more may follow"
        in cli("status", str(sweep.path))[1]
    )
    assert "round" not in plan.save(load([*words, "sweep.search=grid", "sweep.name=grid"]), "")[1][0].row()


@pytest.mark.parametrize(
    ("width", "facts"),
    [(32, "5/16, 2m 18s left"), (40, "5/16, about"), (60, "1 failed"), (80, "1 running"), (100, "1,000 tok/s")],
)
def test_a_narrow_terminal_keeps_the_time_left(
    planned: tuple[SweepDir, Rows], monkeypatch: pytest.MonkeyPatch, width: int, facts: str
) -> None:
    sweep, rows = planned
    finish(sweep, rows[:5])
    begin(sweep.run(rows[6]["run_id"]))
    sweep.run(rows[7]["run_id"]).path.mkdir()
    sweep.run(rows[7]["run_id"]).write_status(FAILED, error="ouch")
    board = Board(sweep)
    monkeypatch.setattr(board, "seconds_left", lambda: 138.0)
    lines = text(board, width, 40)
    assert max(map(len, lines)) <= width
    assert "2m 18s left" in lines[0]
    assert facts in lines[0]
    run = next(line for line in lines if rows[6]["run_id"][:10] in line)
    assert run.rstrip().endswith(" 2m 18s")  # of 153,600 tokens at 1,000 a second, a tenth is done
