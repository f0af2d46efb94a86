"""Optima and their intervals, against sweeps whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from run_results import results

from mupsweep.analysis.curves import LossCurve, collect
from mupsweep.analysis.optimum import Optimum, optima

GRID = [-11.0, -10.0, -9.0, -8.0, -7.0, -6.0, -5.0, -4.0]


def parabola(x: float) -> float:
    return 0.04 * x * x


def lopsided(x: float) -> float:
    """Steeper towards the cliff; its minimum is at 0."""
    return 0.05 * math.exp(0.8 * x) - 0.04 * x - 0.05


def rows(
    optimum: float = -7.3,
    valley: Callable[[float], float] = parabola,
    noise: float = 0.0,
    seeds: int = 1,
    grid: list[float] = GRID,
    cliff: float = math.inf,
    random: np.random.Generator | None = None,
) -> list[dict[str, Any]]:
    """Runs at one size; LRs more than `cliff` octaves above the optimum diverge, seeds shift whole curves."""
    random = random or np.random.default_rng(0)
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
    [found] = optima(collect(results(curve_rows)))
    return found


def test_a_noiseless_parabola_is_solved_within_what_a_bend_could_hide() -> None:
    found = best(rows(optimum=-7.3, grid=GRID))
    assert found.log2_lr == pytest.approx(-7.3, abs=1e-3)
    assert found.loss == pytest.approx(2.5, abs=1e-5)
    assert found.low == pytest.approx(-7.3, abs=0.1)
    assert found.high == pytest.approx(-7.3, abs=0.1)


def test_the_optimum_of_a_lopsided_valley_lies_in_its_interval() -> None:
    steep = min(np.linspace(-1, 1, 2001), key=lopsided)
    found = best(rows(optimum=-7.3, valley=lopsided, noise=0.003, seeds=3))
    assert found.low is not None
    assert found.high is not None
    assert found.low <= -7.3 + steep <= found.high


@pytest.mark.parametrize(("valley", "nominal"), [(parabola, 0.95), (lopsided, 0.90)])
@pytest.mark.parametrize(("seeds", "step", "noise"), [(3, 1.0, 0.005), (2, 0.5, 0.01), (1, 1.0, 0.005)])
def test_intervals_cover_the_truth(
    valley: Callable[[float], float], nominal: float, seeds: int, step: float, noise: float
) -> None:
    """120 sweeps a case; the bound is three standard errors of a proportion below the nominal coverage."""
    random = np.random.default_rng(7)
    steep = float(min(np.linspace(-1, 1, 4001), key=valley))
    covered = []
    for _ in range(120):
        truth = -7.3 + random.uniform(-0.5, 0.5)
        grid = list(np.arange(-12.0, -3.0 + 1e-9, step))
        found = best(rows(truth, valley, noise, seeds, grid, cliff=4.0, random=random))
        covered.append(found.low is not None and found.high is not None and found.low <= truth + steep <= found.high)
    assert np.mean(covered) >= nominal - 3 * math.sqrt(nominal * (1 - nominal) / 120)


def test_more_seeds_give_a_narrower_interval() -> None:
    def half_width(seeds: int) -> float:
        widths = []
        for i in range(20):
            found = best(rows(noise=0.01, seeds=seeds, random=np.random.default_rng(i)))
            assert found.low is not None
            assert found.high is not None
            widths.append(found.high - found.low)
        return float(np.median(widths))

    assert half_width(8) < 0.7 * half_width(2)


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
    assert not found.bracketed
    assert found.log2_lr is None
    assert (found.low, found.high) == (low, high)
    assert found.reason is not None
    assert words in found.reason


def test_a_luckily_lowest_lr_before_the_edge_of_a_falling_curve_is_no_optimum() -> None:
    """Noise of 0.05 hides that the last LR is the best; the drawn minima lie at the edge, and so might beyond it."""
    falling = {-11.0: 3.5, -10.0: 3.3, -9.0: 3.1, -8.0: 2.9, -7.0: 2.7, -6.0: 2.5, -5.0: 2.29, -4.0: 2.3}
    made = rows(grid=list(falling), seeds=2)
    for row in made:
        i = int(row["log2_lr"])
        row["val_loss"] = falling[i] + (0.05 if (row["seed"] + i) % 2 else -0.05) * (1 + i % 3)
    found = best(made)
    assert found.bracketed
    assert (found.log2_lr, found.loss, found.high) == (None, None, None)
    assert found.low is not None
    assert found.center == pytest.approx(-4.0, abs=0.1)  # where a search looks further


def test_four_lrs_of_one_seed_bound_less_than_three_seeds_do() -> None:
    """How large noise is, four losses hardly tell: only an LR that is much worse counts as worse."""
    found = best(rows(optimum=-7.4, grid=[-7.0, -6.0, -5.0, -4.0]))
    assert (found.low, found.high) == (None, -5.0)


def test_an_optimum_next_to_the_cliff_is_bounded_by_it() -> None:
    found = best(rows(optimum=-7.0, grid=[-10.0, -9.0, -8.0, -7.0, -6.0], cliff=0.5, seeds=3, noise=0.001))
    assert not found.bracketed
    assert (found.low, found.high) == (-8.0, -6.0)
    assert found.reason is not None
    assert "diverges: train LRs between" in found.reason


def test_a_diverged_seed_censors_its_point_and_is_counted() -> None:
    made = rows(seeds=3, noise=0.001)
    made[-1] |= {"status": "diverged", "val_loss": None}
    [curve] = collect(results(made))
    assert [p.censored for p in curve.points] == [False] * 7 + [True]
    assert (curve.n_runs, curve.n_diverged) == (24, 1)
    assert optima([curve])[0].bracketed


def test_where_every_lr_diverges_the_lowest_bounds_the_optimum() -> None:
    found = best(rows(cliff=-10.0))
    assert (found.log2_lr, found.low, found.high) == (None, None, -11.0)
    assert found.reason == "every LR diverges: train lower ones"


def test_two_points_are_no_curve() -> None:
    found = best(rows(grid=[-8.0, -7.0]))
    assert (found.bracketed, found.log2_lr) == (False, None)
    assert found.reason == "2 LRs with a loss; a minimum needs at least 3"


def test_a_flat_noisy_curve_has_no_narrow_interval() -> None:
    found = best(rows(valley=lambda x: 0.0005 * x * x, noise=0.02, seeds=2))
    assert found.low is None or found.high is None or found.high - found.low > 2


def test_sem_and_mean_are_those_of_the_seeds() -> None:
    [curve] = collect(results(rows(seeds=2, noise=0.01, grid=[-7.0])))
    assert isinstance(curve, LossCurve)
    losses = list(curve.points[0].losses.values())
    assert curve.points[0].mean == pytest.approx(sum(losses) / 2)
    assert curve.points[0].sem == pytest.approx(abs(losses[0] - losses[1]) / 2)
