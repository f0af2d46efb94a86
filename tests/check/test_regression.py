"""Exponents and their intervals against scipy and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from mupsweep.check.regression import Exponent, regress, slope

TOLERANCE = {"fit": 1e-10}
SIZES = (32, 64, 128, 256)


def test_a_power_law_has_its_exponent_and_no_width() -> None:
    exponent = slope(SIZES, [3.0 * n**-0.75 for n in SIZES])
    assert (exponent.value, exponent.low, exponent.high) == pytest.approx((-0.75, -0.75, -0.75), abs=1e-7)


def test_a_slope_has_the_interval_of_simple_regression() -> None:
    values = [1.0, 2.3, 3.7, 9.1]
    exponent = slope(SIZES, values)
    expected = stats.linregress(np.log2(SIZES), np.log2(values))
    half = stats.t.ppf(0.975, 2) * expected.stderr
    assert exponent.value == pytest.approx(expected.slope, rel=TOLERANCE["fit"])
    assert exponent.high - exponent.value == pytest.approx(half, rel=TOLERANCE["fit"])
    assert exponent.value - exponent.low == pytest.approx(half, rel=TOLERANCE["fit"])


def test_intervals_cover_the_truth_in_nineteen_of_twenty_cases() -> None:
    random = np.random.default_rng(0)
    x, covered = np.arange(6.0), 0
    for _ in range(2000):
        found = regress([x], 0.3 * x + random.normal(size=6))[0]
        covered += found.away_from(0.3) == 0
    assert covered / 2000 == pytest.approx(0.95, abs=4 * math.sqrt(0.05 * 0.95 / 2000))


def test_columns_are_told_apart_and_groups_have_intercepts_of_their_own() -> None:
    x = np.array([0.0, 1.0, 2.0, 0.0, 1.0, 2.0])
    y = np.array([0.0, 0.0, 1.0, 1.0, 3.0, 1.0])
    offset = np.array([0.0, 0.0, 0.0, 7.0, 7.0, 7.0])
    exponents = regress([x, y], 0.5 * x - 2 * y + offset, groups=list("aaabbb"))
    assert [e.value for e in exponents] == pytest.approx([0.5, -2.0])
    assert regress([x, y], 0.5 * x - 2 * y + offset)[0].value != pytest.approx(0.5, abs=0.1)


def test_two_points_leave_an_endless_interval() -> None:
    exponent = slope((1, 2), (1.0, 4.0))
    assert exponent.value == pytest.approx(2)
    assert (exponent.low, exponent.high) == (-math.inf, math.inf)


def test_the_distance_to_an_expected_value_begins_at_the_interval() -> None:
    e = Exponent(0.5, 0.4, 0.6)
    assert e.away_from(0.45) == 0
    assert e.away_from(0.0) == pytest.approx(0.4)
    assert e.away_from(1.0) == pytest.approx(0.4)
    assert e.widened(0.2) == Exponent(0.5, 0.3, 0.7)
    assert e.widened(0.01) == e
    assert e.shifted(1.0) == Exponent(1.5, 1.4, 1.6)
    assert str(e) == "+0.50 [+0.40, +0.60]"
    assert str(Exponent(-1e-9, -0.12, 0.0)) == "+0.00 [-0.12, +0.00]"
