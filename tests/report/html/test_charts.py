"""The charts put every value where their axes say it lies."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from run_results import results

from mupsweep.analysis.analysis import analyse
from mupsweep.analysis.estimate import Estimate
from mupsweep.report.forecasts import from_base
from mupsweep.report.html.charts import MAX_CURVE_POINTS, MAX_SEED_POINTS, Charts, drawn_seeds, estimate_text
from mupsweep.report.html.svg import Plot

NUMBER = r"([−+\d.]+)"


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def scale(svg: str, kind: str) -> np.poly1d:
    """What the labels of an axis say: pixels -> values."""
    place, value = {
        "y": (r'class="end" x="[\d.]+" y="([\d.]+)"', NUMBER),
        "lr": (r'class="middle" x="([\d.]+)" y="275"', rf"2<tspan[^>]*>{NUMBER}</tspan>"),
        "octaves": (r'class="middle" x="([\d.]+)" y="34"', NUMBER),
    }[kind]
    labels = [(float(at), number(label)) for at, label in re.findall(f"<text {place}>{value}<", svg + "<")]
    assert len(labels) >= 3
    slope, start = np.polyfit(*np.array(labels).T, 1)
    return np.poly1d([slope, start])


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(-1.0, -1.25, -0.5), "−1.00 [−1.25, −0.50] octaves"),
        (Estimate(0.5, None, None), "+0.50 [no interval] octaves"),
        (Estimate(0.5, 0.25, None), "+0.50 [at least +0.25] octaves"),
        (Estimate(-0.001, -0.004, 0.004), "+0.00 [+0.00, +0.00] octaves"),  # there is no negative zero
        (Estimate(None, None, -0.5), "at most −0.50 octaves"),
        (Estimate(None, -1.0, -0.5), "at least −1.00 and at most −0.50 octaves"),
        (Estimate(None, None, None), "unknown"),
    ],
)
def test_an_estimate_in_words(estimate: Estimate, text: str) -> None:
    assert estimate_text(estimate, "octaves") == text


def test_points_lie_at_their_rates_and_losses(rows: Callable) -> None:
    (group,) = analyse(results(rows(widths=(32, 64), parametrizations=["sp"], seeds=1))).groups
    svg = Charts(analyse(results(rows(widths=(32, 64), parametrizations=["sp"], seeds=1)))).curves(group, [group])
    losses, lrs = scale(svg, "y"), scale(svg, "lr")
    points = re.findall(r'data-tip="[^"]*LR 2\^(\S+) = [^"]*loss ([\d.]+)[^"]*" cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert len(points) > 8
    for log2_lr, loss, x, y in points:
        assert lrs(float(x)) == pytest.approx(float(log2_lr), abs=0.01)
        assert losses(float(y) + 4) == pytest.approx(float(loss), abs=0.002)  # a label stands 4 pixels lower
    assert len(re.findall(r'class="pt best" data-tip="width \d+\nbest rate', svg)) == 2


def test_of_very_many_seeds_the_first_are_drawn_and_the_page_says_so(
    rows: Callable, save_sweep: Callable, write_html: Callable
) -> None:
    lrs = [-12 + i / 50 for i in range(100)]
    runs = rows(widths=[32], log2_lrs=lrs, parametrizations=["sp"], seeds=MAX_SEED_POINTS // 100 + 5)
    analysis = analyse(results(runs))
    (group,) = analysis.groups
    drawn, seeds = drawn_seeds(group.optima[0].curve)
    assert (drawn, seeds) == (list(range(20)), list(range(25)))
    svg = Charts(analysis).curves(group, [group])
    assert {int(seed) for seed in re.findall(r", seed (\d+)", svg)} == set(drawn)
    text = write_html(save_sweep(runs), analysis).read_text()
    assert ">20 of 25 seeds</button>" in text
    assert "Of 25 seeds, 20 can be shown one by one." in text


def test_of_few_seeds_all_are_drawn(rows: Callable, save_sweep: Callable, write_html: Callable) -> None:
    runs = rows(widths=[32], parametrizations=["sp"], seeds=5)
    analysis = analyse(results(runs))
    assert drawn_seeds(analysis.curves[0]) == (list(range(5)), list(range(5)))
    text = write_html(save_sweep(runs), analysis).read_text()
    assert ">each seed</button>" in text
    assert "one by one" not in text


def test_the_ladder_shows_how_far_the_optimum_moves(rows: Callable) -> None:
    analysis = analyse(results(rows(widths=(32, 64, 128), parametrizations=["sp"])))
    (group,) = analysis.groups
    drift = list(group.shifts)
    assert drift[0].value == 0.0
    assert drift[-1].value == group.total_drift.value
    assert drift[-1].low is not None
    assert drift[-1].high is not None
    assert drift[-1].low <= -1.52 <= drift[-1].high  # as the rows were made
    svg = Charts(analysis).ladder([group], [drift], group.bounds.total, "octaves")
    points = re.findall(r'data-tip="[^"]*\n(\S+) [^"]*" transform="translate\([\d.]+ ([\d.]+)\)"', svg)
    assert [number(value) for value, _ in points] == [pytest.approx(d.value, abs=0.005) for d in drift]
    octaves = scale(svg, "y")
    for value, y in points:
        assert octaves(float(y) + 4) == pytest.approx(number(value), abs=0.02)


def test_the_bar_shows_the_drift_and_its_interval(rows: Callable) -> None:
    analysis = analyse(results(rows(widths=(32, 64, 128))))
    svg = Charts(analysis).bar(Estimate(-1.0, -1.5, -0.25), 0.5)
    octaves = scale(svg, "octaves")
    (dot,) = re.findall(r'class="dot" cx="([\d.]+)"', svg)
    ((low, high),) = re.findall(r'class="range" d="M([\d.]+) 12H([\d.]+)"', svg)
    ((band_left, band_width),) = re.findall(r'class="band" x="([\d.]+)" y="2" width="([\d.]+)"', svg)
    positions = [octaves(float(x)) for x in (dot, low, high, band_left, float(band_left) + float(band_width))]
    assert positions == pytest.approx([-1.0, -1.5, -0.25, -0.5, 0.5], abs=0.01)


@pytest.mark.parametrize(
    ("bound", "range_", "arrows"),
    [
        (Estimate(None, None, 0.0), "M10.0 12H150.0", "M16 8l-6 4l6 4"),
        (Estimate(None, 0.0, None), "M150.0 12H290.0", "M284 8l6 4l-6 4"),
        (Estimate(None, None, None), "", ""),
        (Estimate(0.5, None, None), "", ""),
    ],
)
def test_the_bar_of_a_bound_is_an_arrow(bound: Estimate, range_: str, arrows: str) -> None:
    ranges = re.findall(r'class="range" d="([^"]*)"', Charts(analyse([])).bar(bound, 0.5))
    assert ranges == ([range_ + arrows] if range_ else [])


def test_a_long_training_curve_is_thinned_to_its_last_point(rows: Callable) -> None:
    [run] = results(rows(widths=[32], log2_lrs=[-7], seeds=1, parametrizations=["sp"]))
    metrics = [{"step": step, "val_loss": 3 + math.exp(-step / 500)} for step in range(1, 5001)]
    charts = Charts(analyse([run]))
    svg = charts.training([(run.size, run, metrics)])
    steps = [int(step) for step in re.findall(r"\nstep (\d+): ", svg)]
    assert steps[-1] == 5000
    assert MAX_CURVE_POINTS // 2 < len(steps) <= MAX_CURVE_POINTS
    assert charts.training([(run.size, run, [{"step": 1, "val_loss": math.nan}])]) == ""


def test_a_base_beyond_the_grid_leaves_bounds(rows: Callable) -> None:
    analysis = analyse(results(rows(widths=(32, 256), log2_lrs=[-11, -10, -9, -8], parametrizations=["sp"])))
    (group,) = analysis.groups
    drift = list(group.shifts)
    assert drift == [Estimate(None, None, None), group.total_drift]
    assert drift[1].high is not None
    svg = Charts(analysis).ladder([group], [drift], group.bounds.total, "octaves")
    assert f"at most {drift[1].high:+.2f} octaves".replace("-", "−") in svg


def test_what_is_unknown_is_said_to_be(rows: Callable) -> None:
    analysis = analyse(results(rows(widths=(32, 64), log2_lrs=[-10, -9, -8], parametrizations=["sp"])))
    (group,) = analysis.groups
    assert list(group.shifts) == [Estimate(None, None, None)] * 2
    assert ">unknown</text>" in Charts(analysis).ladder([group], [list(group.shifts)], group.bounds.total, "octaves")


def test_runs_beyond_a_cliff_are_hollow_and_an_optimum_is_a_bar_or_an_arrow(rows: Callable) -> None:
    analysis = analyse(results(rows(widths=(32, 128), parametrizations=["sp"], log2_lrs=range(-9, -4), seeds=1)))
    (group,) = analysis.groups
    largest = group.optima[-1].draws
    assert largest is not None
    assert list(largest.runs.cliff_x) == [-5.0]
    assert largest.band[0][-1] <= -5.0
    svg = Charts(analysis).curves(group, [group])
    assert svg.count('class="cliff"') == 1
    assert re.findall(r'class="pt cross" data-tip="width 128\nLR 2\^(\S+) ', svg) == ["-5"]
    exploded = [replace(r, val_loss=9.0) if r.width == 128 and r.log2_lr == -6 else r for r in analysis.runs]
    cliff = analyse(exploded)
    svg = Charts(cliff).curves(cliff.groups[0], cliff.groups)
    assert re.findall(r'class="pt hollow" data-tip="width 128\nLR 2\^(\S+) ', svg) == ["-6"]
    lrs = scale(svg, "lr")
    for optimum in cliff.groups[0].optima:
        row = rf'class="bar" data-tip="width {optimum.curve.width}\nbest rate [^"]*" d="M([\d.]+) [\d.]+H([\d.]+)'
        ((low, high),) = re.findall(row, svg)
        for x, end in ((low, optimum.low), (high, optimum.high)):
            assert end is None or lrs(float(x)) == pytest.approx(end, abs=0.02)


def test_a_trained_target_stands_beside_its_forecast(rows: Callable) -> None:
    runs = rows(widths=(32, 64, 128, 512), parametrizations=["sp"], seeds=1)
    analysis = analyse(results({**row, "validation": row["width"] == 512} for row in runs))
    (group,) = analysis.groups
    (target,) = group.validations
    svg = Charts(analysis).ladder([group], [group.shifts], group.bounds.total, "octaves")
    octaves = scale(svg, "y")
    base = group.base.log2_lr
    ((top, height),) = re.findall(
        r'class="fit" data-tip="[^"]*width 512[^"]*" x="[\d.]+" y="([\d.]+)" width="10" height="([\d.]+)"', svg
    )
    ends = octaves(float(top) + float(height) + 4), octaves(float(top) + 4)
    expected = target.forecast.optimum
    assert [*ends] == pytest.approx([expected.low - base, expected.high - base], abs=0.03)
    assert f"measured {estimate_text(from_base(target.optimum.estimate, group), 'octaves')}" in svg
    assert re.findall(r'class="fan" d="M([\d.]+)', svg) != []
    assert ">512</text>" in svg


def test_a_value_without_an_interval_is_hollow_and_a_bound_has_no_point() -> None:
    def drawn(*ends: float | None) -> str:
        plot = Plot((0, 1), (-2, 2), "x")
        plot.estimate(100, Estimate(*ends), 'data-tip="said"', "M0 0")
        return "".join(plot.parts)

    assert 'class="pt best"' in drawn(0.0, -1.0, 1.0)
    assert 'class="pt best hollow"' in drawn(0.0, None, None)
    one_sided = drawn(0.0, None, 1.0)
    assert 'class="pt best hollow"' in one_sided
    assert 'class="bar"' in one_sided
    for bound in ((None, -1.0, 1.0), (None, -1.0, None), (None, None, 1.0)):
        assert "pt best" not in drawn(*bound)
        assert 'class="bar" data-tip="said"' in drawn(*bound)
    assert 'class="dot hollow"' in Charts(analyse([])).bar(Estimate(0.5, None, None), 0.5)
