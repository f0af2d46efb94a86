"""The posterior of optima and curves: what must not change it, what must, and what it says of public sweeps."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from mupsweep.analysis.config import CurvePrior, VerdictBounds
from mupsweep.analysis.forecast import forecast
from mupsweep.analysis.loss_curve import LadderPosterior, SizeRuns, _fit_ladder, fit_ladder, fit_ladders
from mupsweep.analysis.verdict import DRIFTS, INCONCLUSIVE, TRANSFERS, judge

TABLES = Path(__file__).parents[1] / "tables"
MOVES_LITTLE = 0.1  # octaves that "nearly nothing" may be

Change = Callable[[float, float, int], tuple[float, float] | None]


def valley(u: float) -> float:
    return 0.03 * u * u if u < 0 else 0.05 * u * u


def size(
    position: float,
    optimum: float,
    *,
    step: float = 1.0,
    noise: float = 0.002,
    seeds: int = 1,
    change: Change = lambda log2_lr, loss, seed: (log2_lr, loss),
) -> SizeRuns:
    """Runs of one size around a known optimum, on a fixed grid; `change` alters or drops single runs."""
    rng = np.random.default_rng(int(1000 * (position + 7)))
    rows = []
    for seed in range(seeds):
        for log2_lr in np.arange(-12, -3 + step / 2, step):
            loss = 3.0 - 0.1 * position + valley(log2_lr - optimum) + rng.normal(0, noise)
            changed = change(float(log2_lr), float(loss), seed)
            if changed is not None:
                rows.append((*changed, seed))
    lrs, losses, named = zip(*rows, strict=True)
    return SizeRuns.of(position, lrs, losses, named)


def ladder(drift: float = -0.3, sizes: int = 3, **kwargs) -> list[SizeRuns]:
    return [size(k, -7.2 + drift * k, **kwargs) for k in range(sizes)]


def ends(posterior: LadderPosterior) -> np.ndarray:
    """(sizes, 3) low, middle and high of every optimum."""
    estimates = [optimum.estimate for optimum in posterior.optima]
    return np.array([(e.low, e.value, e.high) for e in estimates], dtype=float)


def test_intervals_hold_the_optima_of_a_clean_ladder() -> None:
    bounds = ends(fit_ladder(ladder()))
    truth = -7.2 - 0.3 * np.arange(3)
    assert np.all((bounds[:, 0] < truth) & (truth < bounds[:, 2]))
    assert np.all(bounds[:, 2] - bounds[:, 0] < 1.0)


def test_the_estimate_is_deterministic() -> None:
    first = ends(fit_ladder(ladder()))
    _fit_ladder.cache_clear()
    assert np.array_equal(ends(fit_ladder(ladder())), first)


def test_a_fit_of_equal_runs_is_kept_and_one_of_other_runs_is_not() -> None:
    assert fit_ladder(ladder()) is fit_ladder(reversed(ladder()))
    for other in (ladder(seeds=2), ladder(change=lambda log2_lr, loss, seed: (log2_lr, loss + 1e-9))):
        assert fit_ladder(other) is not fit_ladder(ladder())
    assert fit_ladder(ladder(), replace(CurvePrior(), noise=0.01)) is not fit_ladder(ladder())


def test_a_shift_of_all_losses_changes_nothing() -> None:
    shifted = ladder(change=lambda log2_lr, loss, seed: (log2_lr, loss + 5.0))
    assert ends(fit_ladder(shifted)) == pytest.approx(ends(fit_ladder(ladder())), abs=1e-6)


def test_a_shift_of_all_lrs_shifts_the_optima() -> None:
    shifted = ladder(change=lambda log2_lr, loss, seed: (log2_lr + 4.0, loss))
    assert ends(fit_ladder(shifted)) == pytest.approx(ends(fit_ladder(ladder())) + 4.0, abs=1e-6)


def test_the_order_of_runs_and_sizes_is_irrelevant() -> None:
    sizes = ladder(seeds=2)
    shuffled = []
    for one in sizes:
        cells = [(x, y, s) for x, row in zip(one.log2_lrs, one.losses, strict=True) for s, y in enumerate(row)]
        lrs, losses, seeds = zip(*[cells[i] for i in np.random.default_rng(0).permutation(len(cells))], strict=True)
        shuffled.append(SizeRuns.of(one.position, lrs, losses, seeds))
    assert np.array_equal(ends(fit_ladder(shuffled[::-1])), ends(fit_ladder(sizes)))


def test_a_shift_of_one_seed_changes_next_to_nothing() -> None:
    shifted = ladder(seeds=2, change=lambda log2_lr, loss, seed: (log2_lr, loss + 0.05 * seed))
    assert ends(fit_ladder(shifted)) == pytest.approx(ends(fit_ladder(ladder(seeds=2))), abs=1e-6)


def test_a_nan_is_worth_a_blow_up() -> None:
    found = [
        ends(
            fit_ladder(ladder(change=lambda log2_lr, loss, seed, high=high: (log2_lr, high if log2_lr > -5 else loss)))
        )
        for high in (math.nan, 7.5, 900.0)
    ]
    assert found[1] == pytest.approx(found[0], abs=1e-6)
    assert found[2] == pytest.approx(found[0], abs=1e-6)


def test_a_run_far_away_changes_next_to_nothing() -> None:
    def without_lowest(log2_lr: float, loss: float, seed: int) -> tuple[float, float] | None:
        return None if log2_lr < -11.5 else (log2_lr, loss)

    assert ends(fit_ladder(ladder(change=without_lowest))) == pytest.approx(
        ends(fit_ladder(ladder())), abs=MOVES_LITTLE
    )


def test_a_run_at_the_optimum_narrows_its_interval() -> None:
    sizes = ladder()
    x, y = sizes[1].log2_lrs, sizes[1].losses[:, 0]
    added = SizeRuns.of(1.0, [*x, -7.5], [*y, 2.9])
    before, after = (ends(fit_ladder([sizes[0], one, sizes[2]]))[1] for one in (sizes[1], added))
    assert after[2] - after[0] < before[2] - before[0]


def test_seeds_narrow_intervals() -> None:
    """On half octaves; on whole ones it is the shape of the valley that is unknown."""
    found = [ends(fit_ladder(ladder(step=0.5, noise=0.004, seeds=n))) for n in (1, 4, 16)]
    one, four, sixteen = ((e[:, 2] - e[:, 0]).mean() for e in found)
    assert one > 1.2 * four > 1.2 * 1.2 * sixteen


def test_equal_sizes_do_not_drift() -> None:
    one = size(0, -7.2)
    same = [SizeRuns.of(k, one.log2_lrs, one.losses[:, 0]) for k in range(4)]
    verdict = judge(fit_ladder(same))
    assert verdict.name == TRANSFERS
    assert verdict.total_drift.value == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize(("optimum", "bounded"), [(-13.0, "high"), (-2.0, "low")])
def test_a_best_lr_at_the_end_of_the_grid_is_a_bound(optimum: float, bounded: str) -> None:
    found = fit_ladder([size(0, -7.2), size(1, -7.2), size(2, optimum)]).optima[-1]
    assert found.estimate.value is None
    assert [name for name in ("low", "high") if getattr(found.estimate, name) is not None] == [bounded]
    assert "train" in (found.reason or "")


def test_few_lrs_give_bounds_only() -> None:
    sizes = [*ladder(), SizeRuns.of(3, [-9, -8, -7], [3.0, 2.8, math.nan])]
    found = fit_ladder(sizes).optima[-1].estimate
    assert (found.low, found.value, found.high) == (-9, None, -7)
    nothing = fit_ladder([SizeRuns.of(0, [-5, -4], [math.nan, math.inf])])
    assert nothing.optima[0].estimate.high == -5
    assert forecast(nothing, 2) is None


def diverged(position: float, lowest: float) -> SizeRuns:
    return SizeRuns.of(position, [lowest + k for k in range(4)], [math.nan] * 4)


@pytest.mark.parametrize(
    ("lowest", "name", "reason"),
    [
        (-8.5, "drifts", "the optimum moves by more than 0.75 octaves"),
        (-7.6, "drifts", "the base's LR diverges at the largest size"),
        (-5.0, "inconclusive", "the largest size: no LR has a loss: train lower ones"),
    ],
)
def test_a_largest_size_where_every_lr_diverges_is_judged_by_the_lowest(lowest: float, name: str, reason: str) -> None:
    without_it = judge(fit_ladder(ladder(drift=0.0)))
    found = judge(fit_ladder([*ladder(drift=0.0), diverged(3.0, lowest)]))
    assert without_it.name == "transfers"
    assert (found.name, found.reason, found.largest) == (name, reason, 3)
    assert found.total_drift.value is None
    assert found.total_drift.high == pytest.approx(lowest + 7.2, abs=0.4)
    assert [(runs.size, runs.log2_lrs) for runs in found.deciding_runs] == (
        [(3, (-7.0, -6.0))] if name == "inconclusive" else []
    )


def test_a_forecast_knows_that_every_lr_of_a_size_diverged() -> None:
    free = forecast(fit_ladder(ladder(drift=0.0)), 4.0)
    bounded = forecast(fit_ladder([*ladder(drift=0.0), diverged(3.0, -8.5)]), 4.0)
    assert free is not None
    assert bounded is not None
    assert free.optimum.value == pytest.approx(-7.2, abs=0.5)
    assert bounded.optimum.value is not None
    assert bounded.optimum.value < -8.3


def test_sizes_that_are_nearly_one_size_have_no_verdict() -> None:
    near = [replace(one, position=0.01 * one.position) for one in ladder(drift=0.0)]
    found = judge(fit_ladder(near))
    assert (found.name, found.deciding_runs) == ("inconclusive", ())
    assert found.reason == "the sizes span 0.02 doublings, of 0.5 that a verdict needs"
    assert judge(fit_ladder(near), VerdictBounds(span=0.01)).name == "transfers"


def test_one_size_has_an_optimum_and_no_verdict() -> None:
    posterior = fit_ladder([size(0, -7.2)])
    low, middle, high = ends(posterior)[0]
    assert low < -7.2 < high
    assert middle == pytest.approx(-7.2, abs=0.3)
    assert judge(posterior).name == INCONCLUSIVE


def test_sizes_of_one_position_and_below_the_base_are_fitted() -> None:
    posterior = fit_ladder([size(0, -7.2), size(-1, -6.9), size(1, -7.5), size(1, -7.5, step=0.5)])
    assert [one.position for one in posterior.sizes] == [-1, 0, 1, 1]
    assert np.isfinite(ends(posterior)).all()


def test_a_forecast_widens_with_distance_and_follows_the_drift() -> None:
    posterior = fit_ladder(ladder(drift=-0.5, sizes=4))
    found = {at: forecast(posterior, at) for at in (-1, 1.5, 4, 6, 8)}
    widths = []
    for at, one in found.items():
        assert one is not None
        assert one.optimum.low is not None
        assert one.optimum.high is not None
        assert one.optimum.low < -7.2 - 0.5 * at < one.optimum.high
        assert one.log2_lr < one.optimum.high
        assert 0 <= one.expected_regret < 0.2
        widths.append(one.optimum.high - one.optimum.low)
    assert widths[1] < widths[2] < widths[3] < widths[4]


def test_the_lr_handed_over_keeps_away_from_a_cliff() -> None:
    def cliff(log2_lr: float, loss: float, seed: int) -> tuple[float, float]:
        return log2_lr, math.nan if log2_lr > -6.6 else loss

    predicted = forecast(fit_ladder(ladder(drift=0.0, change=cliff)), 4)
    assert predicted is not None
    assert predicted.optimum.value is not None
    assert predicted.log2_lr < predicted.optimum.value


def test_ladders_that_share_a_size_agree_on_it() -> None:
    base = size(0, -7.2)
    moving = [base, *(size(k, -7.2 - k) for k in (1, 2, 3))]
    staying = [base, *(size(k + 0.001, -7.2) for k in (1, 2, 3))]
    alone = [fit_ladder(sizes) for sizes in (moving, staying)]
    first, second = fit_ladders([moving, staying])
    assert np.array_equal(ends(first)[0], ends(second)[0])
    assert ends(first)[1:] == pytest.approx(ends(alone[0])[1:], abs=MOVES_LITTLE)
    assert ends(second)[1:] == pytest.approx(ends(alone[1])[1:], abs=MOVES_LITTLE)
    assert judge(first).name == DRIFTS
    assert judge(second).name == TRANSFERS


def test_runs_that_would_decide_decide() -> None:
    """Where the largest size's grid ends too early, the runs that are asked for settle the verdict in a few rounds."""

    def short(log2_lr: float, loss: float, seed: int) -> tuple[float, float] | None:
        return (log2_lr, loss) if log2_lr > -7.6 else None

    optima = (-7.2, -7.3, -7.4)
    sizes = [size(0, optima[0]), size(1, optima[1]), size(2, optima[2], change=short)]
    first = judge(fit_ladder(sizes))
    assert first.name == INCONCLUSIVE
    assert 2 in [runs.size for runs in first.deciding_runs]
    rng = np.random.default_rng(0)
    verdict = first
    for _ in range(4):
        for runs in verdict.deciding_runs:
            known = sizes[runs.size]
            losses = [
                3 - 0.1 * known.position + valley(x - optima[runs.size]) + rng.normal(0, 0.002) for x in runs.log2_lrs
            ]
            lrs = [*known.log2_lrs.repeat(known.seeds), *runs.log2_lrs]
            known_losses = known.losses[np.isfinite(known.losses)]
            sizes[runs.size] = SizeRuns.of(known.position, lrs, [*known_losses, *losses])
        verdict = judge(fit_ladder(sizes))
    assert verdict.name == TRANSFERS


# ---- public sweeps


@cache
def table(name: str) -> dict[str, list[SizeRuns]]:
    """The ladders over width, depth or both of a table, by model/optimizer/parametrization."""
    runs: dict[str, dict[tuple[int, int], list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    with (TABLES / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    longest = {row["model"]: row.get("horizon") for row in sorted(rows, key=lambda row: float(row.get("horizon") or 0))}
    for row in rows:
        if row.get("horizon") == longest[row["model"]]:
            label = "/".join(row[key] for key in ("model", "optimizer", "parametrization"))
            shape = int(row["width"]), int(row["depth"])
            runs[label][shape].append((float(row["log2_lr"]), float(row["val_loss"])))
    found = {}
    for label, shapes in runs.items():
        base = math.prod(min(shapes, key=math.prod))
        sizes = [SizeRuns.of(math.log2(math.prod(s) / base), *zip(*cells, strict=True)) for s, cells in shapes.items()]
        found[label] = sizes
    return found


GOLDEN = {
    ("mup_issue66", "nanogpt/adamw/mup"): DRIFTS,
    ("sso_width", "dense/muon/spectral_mup"): TRANSFERS,
    ("sso_width", "dense/sso/spectral_mup"): TRANSFERS,
    ("steplaw_width_tpp53", "steplaw_bs32/adamw/sp"): DRIFTS,
    ("steplaw_width_tpp53", "steplaw_bs128/adamw/sp"): DRIFTS,
    ("steplaw_width_tpp53", "steplaw_bs512/adamw/sp"): INCONCLUSIVE,
    ("zheng_muon_kimi_width", "nanogpt/muon_kimi/sp"): DRIFTS,
    ("zheng_muon_depth", "nanogpt/muon/sp"): INCONCLUSIVE,
    ("zheng_shampoo_width", "nanogpt/shampoo/sp"): DRIFTS,
    ("zheng_sophia_depth", "nanogpt/sophia/depth_mup"): DRIFTS,
}


@pytest.mark.parametrize(("name", "label"), GOLDEN)
def test_verdicts_of_public_sweeps(name: str, label: str) -> None:
    verdict = judge(fit_ladder(table(name)[label]))
    assert verdict.name == GOLDEN[name, label], verdict
    assert verdict.reason
    if verdict.name == INCONCLUSIVE:
        assert verdict.deciding_runs
