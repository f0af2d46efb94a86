"""The plot in the terminal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from run_results import results

from mupsweep.analysis.analysis import analyse
from mupsweep.analysis.estimate import UNKNOWN, Estimate
from mupsweep.analysis.optimum import Optimum
from mupsweep.report.names import loss_range
from mupsweep.report.terminal.curve_plot import curve_text

GOLDEN = """\
     │ ^      ^                                    x      x
3.04 ┤            ⠈⠙⢦⡀                             ⣰⠃
     │               a⠓⠦⣄⡀                     ⢀⣠⠴⠚a
2.91 ┤                   ⠉⠙⠲⢤a⣀⡀          ⣀⣀a⠴⠚⠉
     │                         ⠉⠉⠉⠙⠒A⠒⠚⠉⠉⠉⠁⢀b
     │ b⠦⣄⡀                             ⢀⡤⠞⠉
2.73 ┤    ⠉⠳⢤⡀                       ⣠⠴⠚⠉
     │       ⠉b⠲⠤⣄⣀⡀           ⢀⣠⠤⠴⠚b⠁
2.61 ┤             ⠉⠙b⠒⠒⠒B⠒⠒⠒b⠉⠉
     └────────┬──────────────┬──────────────┬─────────────┬─
            2^-10          2^-8           2^-6          2^-4
a width 32: best 2^-7.0 ±0.4   b width 128: best 2^-8.5 ±0.3
capital: optimum   x: diverged   ^: higher loss
"""


def optima_of(rows: list[dict]) -> list[Optimum]:
    """The optima of all ladders of some rows."""
    return [optimum for group in analyse(results(rows)).groups for optimum in group.optima]


def test_a_small_plot_is_as_recorded(rows: Callable) -> None:
    optima = optima_of(rows(widths=(32, 128), parametrizations=["sp"], noise=0.0))
    plain = curve_text(optima, width=60, height=9).plain
    assert [line.rstrip() for line in plain.splitlines()] == GOLDEN.splitlines()


@pytest.mark.parametrize(("width", "height"), [(24, 4), (40, 8), (72, 14), (80, 20)])
def test_width_and_height_are_respected(rows: Callable, width: int, height: int) -> None:
    lines = curve_text(optima_of(rows()), width, height).plain.splitlines()
    assert max(map(len, lines)) <= width
    assert lines[height].lstrip()[0] == "└"


def test_diverged_and_optimal_rates_are_marked(rows: Callable) -> None:
    lines = curve_text(optima_of(rows(parametrizations=["sp"]))).plain.splitlines()
    assert "x" in lines[0]
    assert all(any(letter in line for line in lines[1:14]) for letter in "ABCD")


def test_degenerate_curves_are_drawn(rows: Callable) -> None:
    assert "no finished runs" in curve_text([]).plain
    diverged, alone = {"log2_lrs": [-1]}, {"log2_lrs": [-7], "widths": [32]}
    for grid, expected in ((diverged, "best at most 2^-1.0"), (alone, "no optimum")):
        assert expected in curve_text(optima_of(rows(**grid))).plain


def test_the_legend_tells_intervals_and_bounds_and_cuts_no_number(rows: Callable) -> None:
    (curve,) = analyse(results(rows(widths=[32], parametrizations=["sp"]))).curves

    def legend(value: float | None, low: float | None, high: float | None, width: int = 60) -> str:
        optimum = Optimum(curve, Estimate(value, low, high), UNKNOWN, None, None)
        return curve_text([optimum], width=width).plain.splitlines()[-2]

    assert legend(-7.0, -7.04, -6.88) == "a width 32: best 2^-7.0 ±0.2"
    assert legend(-7.0, -9.0, None) == "a width 32: best 2^-7.0 ±?"
    assert legend(None, -9.0, None) == "a width 32: best at least 2^-9.0"
    assert legend(None, None, -9.0) == "a width 32: best at most 2^-9.0"
    assert legend(None, -9.0, -7.0) == "a width 32: best 2^-9.0 to 2^-7.0"
    assert legend(-7.0, -7.04, -6.88, width=24) == "a width 32"


def test_an_exploding_loss_does_not_flatten_the_valleys(rows: Callable) -> None:
    runs = rows(noise=0.0)
    low, high = loss_range(optima_of(runs))
    next(row for row in runs if row["log2_lr"] == -11)["val_loss"] = 1e9
    runs.append({**runs[0], "log2_lr": -12.0, "val_loss": 50.0, "status": "done"})
    assert loss_range(optima_of(runs)) == pytest.approx((low, high), abs=0.1)


def test_the_axis_holds_the_error_bars_of_the_minimum(rows: Callable) -> None:
    noisy = optima_of(rows(widths=[32], parametrizations=["sp"], log2_lrs=range(-9, -4), noise=0.05))
    ends = [p.mean - p.sem for o in noisy for p in o.curve.usable if p.sem is not None]
    assert loss_range(noisy)[0] < min(ends)
