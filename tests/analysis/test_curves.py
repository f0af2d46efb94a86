"""Curves from runs, and the optimum of one size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from run_results import results

from mupsweep.analysis.curves import LossCurve, collect
from mupsweep.analysis.estimate import UNKNOWN, Estimate
from mupsweep.analysis.optimum import Optimum
from mupsweep.analysis.transfer import ladder_optima

GRID = [-11.0, -10.0, -9.0, -8.0, -7.0, -6.0, -5.0, -4.0]


def parabola(x: float) -> float:
    return 0.04 * x * x


def rows(
    optimum: float = -7.3,
    valley: Callable[[float], float] = parabola,
    noise: float = 0.0,
    seeds: int = 1,
    grid: list[float] = GRID,
    cliff: float = math.inf,
) -> list[dict[str, Any]]:
    """Runs at one size; LRs more than `cliff` octaves above the optimum diverge, seeds shift whole curves."""
    random = np.random.default_rng(0)
    made = []
    for seed in range(seeds):
        shift = random.normal(0, 2 * noise)
        for x in grid:
            diverged = x - optimum > cliff
            loss = 2.5 + valley(x - optimum) + shift + random.normal(0, noise)
            made.append(
                {
                    "model": "m",
                    "optimizer": "o",
                    "parametrization": "p",
                    "width": 64,
                    "depth": 4,
                    "width_ratio": 1.0,
                    "depth_ratio": 1.0,
                    "log2_lr": x,
                    "seed": seed,
                    "status": "diverged" if diverged else "done",
                    "val_loss": None if diverged else loss,
                }
            )
    return made


def best(curve_rows: list[dict[str, Any]]) -> Optimum:
    [found] = ladder_optima("width", collect(results(curve_rows)))
    return found


def test_the_optimum_of_a_parabola_is_found_with_its_loss() -> None:
    found = best(rows(optimum=-7.3))
    assert (found.bracketed, found.known, found.reason) == (True, True, None)
    assert found.log2_lr == pytest.approx(-7.3, abs=0.1)
    assert found.low is not None
    assert found.high is not None
    assert found.low < -7.3 < found.high
    assert found.high - found.low < 1.0
    assert found.loss.value == pytest.approx(2.5, abs=0.002)
    assert found.loss.low is not None
    assert found.loss.high is not None
    assert found.loss.low <= 2.5 <= found.loss.high
    assert found.center == found.log2_lr


@pytest.mark.parametrize(
    ("grid", "low", "high", "words"),
    [
        ([-7.0, -6.0, -5.0, -4.0], None, -6.0, "train lower ones"),
        ([-11.0, -10.0, -9.0, -8.0], -9.0, None, "train higher ones"),
    ],
)
def test_a_best_lr_at_the_edge_is_a_bound_and_no_optimum(
    grid: list[float], low: float | None, high: float | None, words: str
) -> None:
    found = best(rows(optimum=-7.4, grid=grid, seeds=3, noise=0.001))
    assert (found.bracketed, found.known, found.log2_lr) == (False, False, None)
    assert [found.low is None, found.high is None] == [low is None, high is None]
    assert low is None or found.low >= low  # type: ignore[operator]
    assert high is None or found.high <= high  # type: ignore[operator]
    assert found.loss == UNKNOWN
    assert found.reason is not None
    assert words in found.reason


def test_a_diverged_seed_censors_its_point_and_is_counted() -> None:
    made = rows(seeds=3, noise=0.001)
    made[-1] |= {"status": "diverged", "val_loss": None}
    [curve] = collect(results(made))
    assert [p.censored for p in curve.points] == [False] * 7 + [True]
    assert (curve.n_runs, curve.n_diverged) == (24, 1)
    assert ladder_optima("width", [curve])[0].bracketed


def test_where_every_lr_diverges_the_lowest_bounds_the_optimum() -> None:
    found = best(rows(cliff=-10.0))
    assert found.estimate == Estimate(None, None, -11.0)
    assert found.reason == "no LR has a loss: train lower ones"


def test_two_points_are_no_curve() -> None:
    found = best(rows(grid=[-8.0, -7.0]))
    assert (found.bracketed, found.draws, found.log2_lr) == (False, None, None)
    assert found.reason == "2 LRs with a loss: an optimum needs at least 3"
    assert found.center == -7.0


def test_sem_and_mean_are_those_of_the_seeds() -> None:
    [curve] = collect(results(rows(seeds=2, noise=0.01, grid=[-7.0])))
    assert isinstance(curve, LossCurve)
    losses = list(curve.points[0].losses.values())
    assert curve.points[0].mean == pytest.approx(sum(losses) / 2)
    assert curve.points[0].sem == pytest.approx(abs(losses[0] - losses[1]) / 2)
