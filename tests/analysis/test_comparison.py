"""The numbers beside a verdict, on sweeps whose truth is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from run_results import results

from mupsweep.analysis.analysis import analyse
from mupsweep.analysis.estimate import Estimate
from mupsweep.report.results_files import to_json

GRID = np.arange(-11.0, -3.9, 0.5)
ASYMPTOTE = 2.0


def ladder(
    optimizer: str = "adamw",
    parametrization: str = "mup",
    drift: float = 0.0,
    steeper: float = 0.0,
    lower: float = 0.0,
    power: float = 1.0,
    sizes: int = 4,
) -> list[dict[str, Any]]:
    """Parabolas whose curvature grows as ratio^steeper, on a floor that falls to ASYMPTOTE - lower as ratio^-power."""
    random = np.random.default_rng(len(optimizer) + len(parametrization))
    made = []
    for k in range(sizes):
        floor = ASYMPTOTE - lower + 0.4 * 2.0 ** (-power * k)
        for seed in (0, 1, 2):
            for x in GRID:
                distance = x + 7.4 - drift * k
                loss = floor + 0.05 * 2.0 ** (steeper * k) * distance**2 + random.normal(0, 1e-4)
                size = {"width": 32 * 2**k, "depth": 4, "width_ratio": 2.0**k, "depth_ratio": 1.0}
                names = {"model": "nanogpt", "optimizer": optimizer, "parametrization": parametrization}
                rest = {"log2_lr": float(x), "seed": seed, "status": "done", "val_loss": float(loss)}
                made.append({**names, **size, **rest, "flops": 1e9 * 4.0**k})
    return made


def covers(estimate: Estimate, truth: float, within: float) -> bool:
    """The interval holds the truth, and is no wider than `within` on each side."""
    if estimate.low is None or estimate.high is None:
        return False
    return estimate.low - 1e-9 <= truth <= estimate.high + 1e-9 and estimate.high - estimate.low < 2 * within


def test_robustness_is_the_power_with_which_a_missed_octave_costs_more() -> None:
    for steeper in (-0.5, 0.0, 0.5):
        [group] = analyse(results(ladder(steeper=steeper))).groups
        assert covers(group.quality.robustness, steeper, within=0.05)


def test_the_fit_error_is_the_distance_of_the_optima_from_their_line() -> None:
    rows = ladder(drift=-0.5)
    [straight] = analyse(results(rows)).groups
    assert straight.quality.fit_error.value == pytest.approx(0.0, abs=0.03)
    for row in rows:  # the two sizes in the middle half an octave aside: the best line leaves 0.25 everywhere
        row["log2_lr"] += 0.5 * (row["width"] in (64, 128))
    [bent] = analyse(results(rows)).groups
    assert bent.quality.fit_error.value == pytest.approx(0.25, abs=0.01)


def test_the_asymptotic_loss_covers_the_truth_whatever_the_power_of_the_correction() -> None:
    for power in (0.6, 1.0, 1.8):
        [group] = analyse(results(ladder(power=power))).groups
        assert covers(group.quality.asymptotic_loss, ASYMPTOTE, within=0.15)


def test_the_largest_size_is_predicted_from_the_smaller_ones() -> None:
    [group] = analyse(results(ladder(drift=-0.5))).groups
    held_out = group.quality.held_out
    assert held_out is not None
    assert covers(held_out.predicted, -7.4 - 1.5, within=1.0)
    assert covers(held_out.error, 0.0, within=1.0)
    assert held_out.log2_lr == pytest.approx(-7.4 - 1.5, abs=0.15)
    rows = [row for row in ladder(drift=-0.5) if row["width"] < 256]
    rows += [row for row in ladder(drift=0.0) if row["width"] == 256]
    [group] = analyse(results(rows)).groups  # the largest size breaks the law: 1.5 octaves, 0.05 * 1.5^2 nats
    held_out = group.quality.held_out
    assert held_out is not None
    assert covers(held_out.error, -1.5, within=1.0)
    assert covers(held_out.regret, 0.05 * (held_out.log2_lr - (-7.4)) ** 2, within=0.02)


def test_two_sizes_predict_nothing_and_say_so() -> None:
    found = analyse(results(ladder(sizes=2))).groups[0].quality
    assert found.held_out is None
    assert found.fit_error.value is None
    assert found.asymptotic_loss.value is None
    assert found.robustness.value is not None


def test_the_speed_up_is_the_compute_the_other_needs_for_the_same_loss() -> None:
    """Muon lies 0.05 nats below; AdamW's losses 2.4, 2.2, 2.1, 2.05 fall by 0.115 per factor 4 of compute."""
    [found] = analyse(results([*ladder("muon", lower=0.05), *ladder("adamw")])).comparisons
    assert (found.of[1], found.over[1], found.width) == ("muon", "adamw", 256)
    assert covers(found.lower, 0.05, within=0.0015)
    x = np.arange(4.0)  # in factors of 4
    losses = ASYMPTOTE + 0.4 * 2.0**-x
    slope, intercept = np.polyfit(x, losses, 1)
    expected = 4.0 ** ((losses[-1] - 0.05 - intercept) / slope - 3)
    assert covers(found.speed_up, float(expected), within=0.05)
    assert found.asymptotic_penalty.value == pytest.approx(-0.05, abs=0.02)


def test_a_loss_beyond_the_measured_sizes_gives_a_bound_and_no_number() -> None:
    [found] = analyse(results([*ladder("muon", lower=1.0), *ladder("adamw")])).comparisons
    assert found.speed_up == Estimate(None, 2.0, None)  # an octave beyond the largest size
    [found] = analyse(results([*ladder("muon", lower=-1.0), *ladder("adamw")])).comparisons
    assert found.speed_up.high == pytest.approx(2.0**-7)
    assert found.speed_up.value is None


def test_without_compute_there_is_no_speed_up_but_the_rest() -> None:
    rows = [{k: v for k, v in row.items() if k != "flops"} for row in [*ladder("muon", lower=0.05), *ladder("adamw")]]
    [found] = analyse(results(rows)).comparisons
    assert found.speed_up.value is None
    assert found.lower.value is not None


def test_parametrizations_are_compared_with_sp_and_written_for_scripts() -> None:
    rows = [*ladder(parametrization="sp", drift=-1.0), *ladder(parametrization="mup")]
    content = to_json(analyse(results(rows)))
    [compared] = content["comparisons"]
    assert (compared["of"][2], compared["over"][2]) == ("mup", "sp")
    assert compared["speed_up"]["factor"] == pytest.approx(1.0, abs=0.6)
    assert {"fit_error", "robustness", "asymptotic_loss", "held_out"} == set(content["groups"][0]["quality"])


def test_a_prediction_of_the_largest_size_needs_its_optimum() -> None:
    rows = [row for row in ladder(sizes=4) if row["width"] < 256 or row["log2_lr"] >= -7.5]  # its best LR is the lowest
    (group,) = analyse(results(rows)).groups
    assert not group.optima[-1].known
    assert group.quality.held_out is None
    assert replace(group, optima=group.optima[:-1]).quality.held_out is not None
