"""Nominal 95 % intervals hold the truth in 93 to 97 % of sweeps, and called verdicts are wrong in under 5 %."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import numpy as np
import pytest

from mupsweep.analysis.transfer import DRIFTS, INCONCLUSIVE, TRANSFERS

COVERAGE = (0.93, 0.97)
WRONG = 0.05  # of the sweeps that are called at all
CONFIDENT = 2.6  # standard errors of a share over the sweeps of one test: 99 %
SCRIPT = Path(__file__).parents[2] / "scripts" / "calibrate.py"


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_intervals_and_verdicts_are_calibrated(count: int) -> None:
    tally = runpy.run_path(str(SCRIPT))["calibrate"](count)
    for name in ("optimum", "drift", "total"):
        found = getattr(tally, name)["all"]
        assert len(found) > 0.9 * count
        # three or four optima of one sweep share its noise: no more freedom than sweeps
        error = CONFIDENT * math.sqrt(COVERAGE[1] * (1 - COVERAGE[1]) / count)
        assert COVERAGE[0] - error <= np.mean(found) <= COVERAGE[1] + error, name
    for drift, wrong in (("one", TRANSFERS), ("none", DRIFTS)):
        verdicts = tally.verdicts[drift]
        called = sum(n for verdict, n in verdicts.items() if verdict != INCONCLUSIVE)
        assert called > 0.5 * verdicts.total()
        assert verdicts[wrong] < WRONG * called + 1e-9
