"""Intervals hold the truth as often as they say, and verdicts are hardly ever wrong, on synthetic ladders."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import calibrate

LEAST = {"sizes": 0.93, "total": 0.93, "drift": 0.93, "x2": 0.9, "x8": 0.9, "x32": 0.9, "ends": 0.85}
MOST_WRONG = 0.02
CONFIDENT = 2.6  # standard errors of a share over the ladders of one test: 99 %


@pytest.mark.slow
@pytest.mark.parametrize("count", [24, 600])
def test_intervals_and_verdicts_are_calibrated(count: int) -> None:
    rows = [row for _, row in calibrate.calibrate(count, processes=1 if count < 100 else 2)]
    for name, least in LEAST.items():
        share = float(np.nanmean([row[name] for row in rows]))
        assert share >= least - CONFIDENT * math.sqrt(least * (1 - least) / count), name
    wrong = sum(row["wrong"] for row in rows)
    assert wrong <= MOST_WRONG * count + CONFIDENT * math.sqrt(MOST_WRONG * count)
