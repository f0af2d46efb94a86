"""What `transfer` prints: lines that a terminal of any width can show, numbers that say which LR to take."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from run_results import results

from mupsweep.analysis.analysis import analyse
from mupsweep.analysis.comparison import Comparison
from mupsweep.analysis.estimate import UNKNOWN, Estimate
from mupsweep.report.terminal import verdicts
from mupsweep.report.terminal.console import PIPE_COLUMNS, PipeConsole, console_of, table_of
from mupsweep.report.terminal.verdicts import advice_on, comparison_line, show_analysis
from mupsweep.sweep import plan
from mupsweep.sweep.config import load

LINE = "the optimum moves -0.05 [-0.18, +0.06] octaves from width 16 to width 32: within +-0.5"
NAMES = ("nanogpt", "adamw", "mup"), ("nanogpt", "adamw", "sp")


def printed_lines(line: str, width: int, terminal: bool) -> list[str]:
    console = PipeConsole(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    console.say(line, indent=2)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [30, 40, 80])
def test_a_line_goes_on_below_further_to_the_right_and_keeps_intervals_whole(width: int) -> None:
    lines = printed_lines(LINE, width, terminal=True)
    assert len(lines) > 1
    assert max(map(len, lines)) <= width
    assert [re.match(" *", line)[0] for line in lines] == ["  ", *["    "] * (len(lines) - 1)]  # type: ignore[index]
    assert " ".join(line.strip() for line in lines) == LINE
    assert any("[-0.18, +0.06]" in line for line in lines)


def test_a_path_is_never_cut() -> None:
    path = "/a-long-folder/" * 8
    assert printed_lines(f"wrote {path}", 40, terminal=True) == ["  wrote", f"    {path}"]


def test_a_pipe_gets_whole_lines(rows: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    assert console_of().width == PIPE_COLUMNS
    show_analysis(analyse(results(rows(widths=(32, 64, 128)))), [], [])
    lines = capsys.readouterr().out.splitlines()
    for start in ("  the optimum moves", "  held out: ", "loss at width", "nanogpt/adamw/mup against"):
        assert any(line.startswith(start) and len(line) > 70 for line in lines)
    assert max(map(len, lines)) > 160


def test_a_bound_in_brackets_is_no_markup() -> None:
    console = PipeConsole(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    table = table_of("width", "optimal log2 LR")
    table.add_row("16", f"{Estimate(-4.68, -9.0, None):.2f}")
    console.show(table)
    console.print(f"log2 {Estimate(-4.68, None, -3.0):.2f}")
    assert re.findall(r"-4.68 \[at \w+ [-.\d]+]", console.file.getvalue()) == [  # type: ignore[attr-defined]
        "-4.68 [at least -9.00]",
        "-4.68 [at most -3.00]",
    ]


@pytest.mark.parametrize("width", [24, 40, 60])
def test_a_narrow_terminal_gets_a_narrow_chart(rows: Callable, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    console = PipeConsole(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(verdicts, "console_of", lambda: console)
    show_analysis(analyse(results(rows(widths=(32, 64)))), [], [])
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    plotted = [line for line in lines if re.match(r" *[\d.]* [┤│└]", line)]
    assert len(plotted) == 2 * (14 + 1)
    assert max(map(len, plotted)) <= width


def test_the_verdict_says_which_lr_is_best_and_what_it_costs_later(
    rows: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    analysis = analyse(results(rows(widths=(32, 128), parametrizations=["sp"])))
    (group,) = analysis.groups
    base, last = group.optima
    show_analysis(analysis, [], [])
    out = capsys.readouterr().out
    assert f"  best LR at width 32: {2**base.log2_lr:.3g}, log2 {base.log2_lr:.2f} [" in out  # type: ignore[operator]
    sentence = (
        f"drift {group.drift} octaves per doubling, {group.total_drift} from width 32 to width 128, "
        f"where the base's LR costs {group.regret:.4f} nats"
    )
    assert sentence in out
    table = [line.split() for line in out.splitlines() if re.match(r"(32|128) +4 ", line)]
    assert table[0][-1] == "base"
    assert table[1][-3] == f"{group.regret.value:.4f}"
    assert f"{last.loss.value:.4f}" in table[1]


def test_what_is_unknown_makes_no_line_of_unknowns(rows: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    show_analysis(analyse(results(rows(widths=(32, 64), log2_lrs=[-10, -9, -8], parametrizations=["sp"]))), [], [])
    verdict = capsys.readouterr().out.partition("INCONCLUSIVE")[2]
    assert "unknown" not in verdict
    assert verdict.count("train higher ones") == 2


def test_an_undecided_grid_is_told_to_search_and_a_search_is_not(tmp_path: Path, rows: Callable) -> None:
    edge = analyse(results(rows(widths=(32, 64), log2_lrs=[-10, -9, -8], parametrizations=["sp"])))
    decided = analyse(results(rows(widths=(32, 64), parametrizations=["mup"])))
    grid, search = (
        plan.save(load(["experiment=smoke", f"out={tmp_path}", f"sweep.name={how}", f"sweep.search={how}"]), "")[0]
        for how in ("grid", "adaptive")
    )
    further = "further sizes, LRs or seeds: the same mupsweep run with longer lists trains only what is new"
    first, second = advice_on(edge, grid)
    assert "the same mupsweep run with sweep.search=adaptive" in first
    assert second.startswith("no optimum is known at both ends yet: add LRs")
    assert list(advice_on(edge, search)) == [further, second]
    assert list(advice_on(decided, grid)) == [
        further,
        f"for the LR of a larger model: mupsweep transfer {tmp_path}/grid --to width=N",
    ]


@pytest.mark.parametrize(
    ("lower", "penalty", "expected"),
    [
        (Estimate(0.05, 0.04, 0.06), UNKNOWN, "0.0500 [0.0400, 0.0600] nats lower"),
        (Estimate(-0.05, -0.06, -0.04), UNKNOWN, "0.0500 [0.0400, 0.0600] nats higher"),
        (
            Estimate(0.01, -0.01, 0.03),
            Estimate(0.02, -0.01, 0.03),
            "0.0100 [-0.0100, 0.0300] nats lower; extrapolated to infinite size: 0.0200 [-0.0100, 0.0300] nats higher",
        ),
    ],
)
def test_a_comparison_says_its_direction_in_words(lower: Estimate, penalty: Estimate, expected: str) -> None:
    compared = Comparison(*NAMES, "width", 128, 4, lower, UNKNOWN, penalty)
    assert comparison_line(compared).partition("each at its optimum: ")[2] == expected
    faster = comparison_line(replace(compared, speed_up=Estimate(1.5, 1.25, None)))
    assert f"{lower.value and abs(lower.value):.4f}" in faster
    assert ", compute-equivalent speed-up 1.50 [at least 1.25]" in faster


@pytest.mark.parametrize("width", [70, 60, 50, 30])
def test_a_table_is_never_cut_and_its_titles_take_two_lines_first(width: int) -> None:
    table = table_of("role", "weight decay", "LR x decay", "memory/run", "LR")
    table.add_row("hidden_vector", "0.0004908", "6.25e-14", "5.8MB", "0.007853")
    console = PipeConsole(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.show(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[-1].split() == ["hidden_vector", "0.0004908", "6.25e-14", "5.8MB", "0.007853"]
    two_lines = [["weight", "LR", "x", "memory"], ["role", "decay", "decay", "/run", "LR"]]
    one_line = [["role", "weight", "decay", "LR", "x", "decay", "memory/run", "LR"]]
    assert [line.split() for line in lines[:-1]] == (two_lines if width < 70 else one_line)
    assert (len(lines[-1]) <= width) == (width > 30)


def test_a_table_of_horizons_fits_80_columns_and_its_title_tells_the_size(
    rows: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = PipeConsole(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr(verdicts, "console_of", lambda: console)
    trained = rows(widths=[32], parametrizations=["sp"])
    show_analysis(
        analyse(results([{**row, "horizon": tokens} for row in trained for tokens in (102400, 204800)])), [], []
    )
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "nanogpt/adamw/sp, horizon ladder at width 32, depth 4" in lines
    table = [line for line in lines if re.match(r"(tokens|102k|205k) ", line)]
    assert len(table) == 3
    assert max(map(len, table)) <= 80


def test_a_table_of_optima_fits_80_columns(rows: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    console = PipeConsole(file=file, width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr("mupsweep.report.terminal.verdicts.console_of", lambda: console)
    show_analysis(analyse(results(rows(widths=(32, 1024), depths=(4, 16)))), [], [])
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in file.getvalue()


def test_a_comparison_names_both_variants_whole_and_its_horizon() -> None:
    lions = [tuple(name.replace("adamw", "lion") for name in label) for label in NAMES]
    compared = [
        Comparison(lion, label, "width", 128, 4, Estimate(0.1, 0.0, 0.2), UNKNOWN, UNKNOWN, 4000)
        for lion, label in zip(lions, NAMES, strict=True)
    ]  # type: ignore[arg-type]
    names = [comparison_line(comparison).partition(", each")[0] for comparison in compared]
    assert names == [
        f"nanogpt/lion/{p} against nanogpt/adamw/{p} at width 128, depth 4, 4k tokens" for p in ("mup", "sp")
    ]


def test_a_small_speed_up_is_not_rounded_to_nothing() -> None:
    small = Comparison(*NAMES, "width", 128, 4, Estimate(-1.0, -1.1, -0.9), Estimate(0.004, 0.0031, 0.005), UNKNOWN)
    assert comparison_line(small).endswith("speed-up 0.004 [0.0031, 0.005]")


@pytest.mark.parametrize(
    ("grid", "target"),
    [
        ({"widths": (32, 64)}, "width=N"),
        ({"widths": [32], "depths": (4, 8)}, "depth=N"),
        ({"widths": (32, 64), "depths": (4, 8)}, "width=N depth=N"),
        ({"widths": [32, 64], "noise": 0.0, "log2_lrs": [-11, -10, -9]}, None),  # bounds give no recipe
    ],
)
def test_the_target_that_is_proposed_is_on_an_axis_that_has_an_optimum(
    tmp_path: Path, rows: Callable, grid: dict, target: str | None
) -> None:
    sweep = plan.save(load(["experiment=smoke", f"out={tmp_path}", "sweep.search=adaptive"]), "")[0]
    advice = list(advice_on(analyse(results(rows(parametrizations=["mup"], **grid))), sweep))
    targets = [line.partition(" --to ")[2] for line in advice if " --to " in line]
    assert targets == ([] if target is None else [target])


def test_a_search_is_not_proposed_where_no_size_is_larger_than_the_base(tmp_path: Path, rows: Callable) -> None:
    sweep = plan.save(load(["experiment=smoke", f"out={tmp_path}"]), "")[0]
    advice = list(advice_on(analyse(results(rows(widths=(16, 32), parametrizations=["mup"]))), sweep))
    assert not any("sweep.search" in line for line in advice)


def test_the_table_says_diverges_and_the_interval_of_a_loss(rows: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    analysis = analyse(results(rows(widths=(32, 256), parametrizations=["sp"], seeds=1)))
    dead = [replace(r, status="diverged", val_loss=None) if r.width == 256 else r for r in analysis.runs]
    show_analysis(analyse(dead), [], [])
    table = [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r"(32|256) +4 ", line)]
    assert table[1][-1] == "diverges"
    assert re.fullmatch(r"±0\.\d{4}", table[0][-2])
