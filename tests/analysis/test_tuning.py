"""Other base hyperparameters: their best values, what these gain, whether they transfer, and which closes the gap."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from run_results import results

from mupsweep.analysis.analysis import analyse
from mupsweep.analysis.estimate import UNKNOWN, Estimate
from mupsweep.analysis.tuning import Tuning, remarks
from mupsweep.analysis.verdict import DRIFTS, INCONCLUSIVE, TRANSFERS
from mupsweep.report.results_files import to_json
from mupsweep.report.terminal.tuning import ridge_line, tuning_line

LRS = np.arange(-10.0, -4.9, 0.5)
RATIO, STD, BETA = "optimizer.lr_ratio", "model.init_std", "optimizer.betas.1"
DEFAULTS = {RATIO: 1.0, STD: 0.06, BETA: 0.95}
VALUES = {RATIO: (0.5, 2.0, 4.0, 8.0), STD: (0.03, 0.12), BETA: (0.9, 0.975, 0.9875)}
RATIOS = {RATIO: VALUES[RATIO]}


def places(key: str, value: float) -> float:
    return float(-np.log2(1 - value) if key == BETA else np.log2(value))


def rows(
    parametrization: str = "mup",
    lower: float = 0.0,
    best: dict[str, float] | None = None,
    moves: float = 0.0,
    bend: float = 0.01,
    noise: float = 1e-4,
    values: dict[str, tuple[float, ...]] | None = None,
    sizes: int = 3,
) -> list[dict[str, Any]]:
    """Valleys in log2 LR whose floor is a valley in every hyperparameter: lowest at `best`, which moves per doubling.

    A hyperparameter that is not in `best` makes no difference; where it does, the best LR moves with it. Without
    `values`, those of `best` are tried, or all where nothing makes a difference.
    """
    random = np.random.default_rng(len(parametrization))
    best = best or {}
    values = {key: VALUES[key] for key in best or VALUES} if values is None else values
    variants = [{}, *({"hyperparameter": k, "value": v, "default": DEFAULTS[k]} for k in values for v in values[k])]
    made = []
    for change in variants:
        for k in range(sizes):
            floor, optimum = 2.0 + 0.4 * 2.0**-k - lower, -7.4
            for key, lowest in best.items():
                value = change["value"] if change.get("hyperparameter") == key else DEFAULTS[key]
                away = places(key, value) - places(key, lowest) - moves * k
                floor += bend * away**2
                optimum += 0.25 * away
            for seed in (0, 1):
                for x in LRS:
                    loss = floor + 0.05 * (x - optimum) ** 2 + random.normal(0, noise)
                    size = {"width": 32 * 2**k, "depth": 4, "width_ratio": 2.0**k, "depth_ratio": 1.0, "seed": seed}
                    names = {"model": "nanogpt", "optimizer": "adamw", "parametrization": parametrization, **change}
                    rest = {"log2_lr": float(x), "status": "done", "val_loss": float(loss), "flops": 1e9 * 4.0**k}
                    made.append({**names, **size, **rest})
    return made


def of(found: list[Tuning], key: str) -> Tuning:
    [one] = [one for one in found if one.hyperparameter == key]
    return one


def covers(estimate: Estimate, truth: float, within: float) -> bool:
    """The interval holds the truth, and is no wider than `within` on each side."""
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low <= truth <= estimate.high and estimate.high - estimate.low < 2 * within


def test_a_best_value_is_found_between_those_trained_with_what_it_gains() -> None:
    one = of(analyse(results(rows(best={RATIO: 3.0}))).tunings, RATIO)
    assert [at.width for at in one.sizes] == [32, 64, 128]
    for at in one.sizes:
        assert at.best in (2.0, 4.0)
        assert set(at.losses) == {0.5, 1.0, 2.0, 4.0, 8.0}
        assert covers(at.minimum, 3.0, within=0.7)
        gain = 0.01 * (np.log2(3) ** 2 - np.log2(4 / 3) ** 2)
        assert covers(at.gain, float(gain), within=0.002)
        assert at.ridge is not None
        assert covers(at.ridge.slope, 0.25, within=0.2)  # as `rows` has it
        assert covers(at.ridge.log2_lr, -7.4, within=0.2)
    assert one.verdict == TRANSFERS
    assert covers(one.total_drift, 0.0, within=0.5)
    assert covers(one.lr_drift, 0.0, within=0.3)


def test_a_best_value_that_moves_with_width_drifts() -> None:
    one = of(analyse(results(rows(best={RATIO: 1.2}, moves=1.0))).tunings, RATIO)
    assert one.verdict == DRIFTS
    assert covers(one.total_drift, 2.0, within=0.5)
    assert [at.best for at in one.sizes] == [1.0, 2.0, 4.0]
    assert one.sizes[-1].regret.value == pytest.approx(0.01 * ((np.log2(4.8)) ** 2 - np.log2(1.2) ** 2), abs=0.001)


def test_octaves_of_a_decay_are_those_of_what_it_leaves() -> None:
    one = of(analyse(results(rows(best={BETA: 0.97}))).tunings, BETA)
    assert covers(one.sizes[0].minimum, 0.97, within=0.01)


def test_a_best_value_at_the_end_of_its_list_is_a_bound() -> None:
    one = of(analyse(results(rows(best={RATIO: 32.0}))).tunings, RATIO)
    assert [at.best for at in one.sizes] == [8.0, 8.0, 8.0]
    assert one.sizes[0].minimum.value is None
    assert one.sizes[0].ridge is not None
    assert one.sizes[0].ridge.log2_lr == UNKNOWN
    assert ridge_line(one) == ""
    assert "the best value is the highest, 8: add values beyond it" in " ".join(one.reasons)
    assert [at.edge for at in one.sizes] == ["highest"] * 3
    assert one.verdict == INCONCLUSIVE  # that the base's best value costs nothing later is so of those trained only
    assert "best 8 (the highest tried) at 32x4, 8 (the highest tried) at 128x4" in tuning_line(one)


def test_the_best_value_is_told_with_the_minimum_between_those_trained() -> None:
    one = of(analyse(results(rows(best={RATIO: 3.0}))).tunings, RATIO)
    first, last = one.sizes[0], one.sizes[-1]
    assert f"best {first.best:g} (minimum {first.minimum:.3g}) at 32x4" in tuning_line(one)
    assert first.ridge is not None
    assert last.ridge is not None
    assert ridge_line(one) == (
        f"adamw/mup, LR and {RATIO} together: 2^{first.ridge.log2_lr:.2f} with {first.minimum:.3g} at 32x4, "
        f"{first.ridge.slope:+.2f} octaves of LR per octave of it; 2^{last.ridge.log2_lr:.2f} with {last.minimum:.3g} "
        f"at 128x4, {last.ridge.slope:+.2f} octaves of LR per octave of it; from the first to the last the LR moves by "
        f"{one.lr_drift}, the value by {one.total_drift} octaves"
    )


def test_a_size_without_an_optimum_is_no_lack_of_larger_sizes() -> None:
    made = [r for r in rows(best={RATIO: 3.0}, sizes=2) if r["width"] == 32 or r["log2_lr"] < -8.5 or "value" in r]
    one = of(analyse(results(made)).tunings, RATIO)
    assert [at.width for at in one.sizes] == [32]
    assert one.reasons[0] == "at width 64 the default or every other value has no optimum: add LRs"
    assert not any("larger than the base" in reason for reason in one.reasons)


def test_two_values_or_a_zero_have_losses_and_a_gain_but_no_minimum_between_them() -> None:
    changed = [r for r in rows(best={RATIO: 0.5}, values={RATIO: (0.5,)}) if "value" in r]
    zero = [{**r, "hyperparameter": "optimizer.weight_decay", "value": 0.0, "default": 0.1} for r in changed]
    plain = rows(best={RATIO: 0.5}, values={})
    one = of(analyse(results([*plain, *zero])).tunings, "optimizer.weight_decay")
    assert one.sizes[0].best == 0.0
    assert covers(one.sizes[0].gain, 0.01, within=0.0015)
    assert one.sizes[0].minimum.value is None
    assert one.verdict == TRANSFERS  # the same value is the best of every size
    assert "the base's best value, 0, costs at most 0.01 nats at every size" in one.reasons


def test_a_value_that_is_lower_already_at_the_edge_of_its_lrs_leaves_the_best_unknown() -> None:
    mup = [r for r in rows(best={RATIO: 4.0}) if r.get("value") != 4.0 or r["width"] < 128 or r["log2_lr"] < -7.4]
    analysis = analyse(results([*rows("sp", values=RATIOS), *mup]))
    one = next(one for one in analysis.tunings if one.names[2] == "mup" and one.hyperparameter == RATIO)
    assert [at.unbounded for at in one.sizes] == [(), (), (4.0,)]
    assert one.verdict == INCONCLUSIVE
    assert one.reasons[0].startswith(
        "lower already, with a best LR beyond those trained: optimizer.lr_ratio=4 at 128x4"
    )
    [ratio] = [c for c in analysis.gaps_after_tuning if c.hyperparameter == RATIO]
    assert [[c.width for c in sizes] for sizes in (ratio.before, ratio.after)] == [[32, 64], [32, 64]]


def test_values_that_make_no_difference_gain_nothing() -> None:
    one = of(analyse(results(rows(noise=1e-3, values={STD: VALUES[STD]}))).tunings, STD)
    for at in one.sizes:
        assert at.gain.high is not None
        assert at.gain.high < 0.003
    assert one.verdict in (INCONCLUSIVE, TRANSFERS)


def test_a_value_that_only_the_base_has_is_judged_there_alone() -> None:
    made = [r for r in rows(best={RATIO: 3.0}) if r["width"] == 32 or r.get("value") in (None, 2.0)]
    one = of(analyse(results(made)).tunings, RATIO)
    assert [set(at.losses) for at in one.sizes] == [{0.5, 1.0, 2.0, 4.0, 8.0}, {1.0, 2.0}, {1.0, 2.0}]


def test_the_hyperparameter_that_closes_the_gap_is_named() -> None:
    """SP is tuned as it is; muP's LR ratio is two octaves low, which costs 0.04, its init std one, which costs 0.01."""
    sp, mup = rows("sp", lower=0.0), rows("mup", best={RATIO: 4.0, STD: 0.12}, values=VALUES)
    analysis = analyse(results([*sp, *mup]))
    found = analysis.gaps_after_tuning
    assert [c.hyperparameter for c in found] == [RATIO, STD, BETA]
    assert [c.before[-1].width for c in found] == [128] * 3
    assert found[0].before[-1].lower.value == pytest.approx(-0.05, abs=0.001)
    assert found[0].after[-1].lower.value == pytest.approx(-0.01, abs=0.001)
    assert found[1].after[-1].lower.value == pytest.approx(-0.04, abs=0.001)
    assert [c.share for c in found] == [pytest.approx(s, abs=0.03) for s in (0.8, 0.2, 0.0)]
    assert [len(c.after) for c in found] == [3, 3, 3]  # every size
    [message] = remarks(found, 0.02)
    share = f"{found[0].share:.0%}"
    assert message == f"optimizer.lr_ratio closes most of the gap of mup to sp at width 128, depth 4 ({share} of it)"
    before, after = (c.speed_up.value for c in (found[0].before[-1], found[0].after[-1]))
    assert before is not None
    assert after is not None
    assert before < after < 1.0


def test_both_sides_are_tuned_so_that_what_helps_both_closes_nothing() -> None:
    sp, mup = rows("sp", lower=0.03, best={RATIO: 4.0}), rows("mup", best={RATIO: 4.0})
    analysis = analyse(results([*sp, *mup]))
    found = analysis.gaps_after_tuning
    assert found[0].share == pytest.approx(0.0, abs=0.05)
    [message] = remarks(found, 0.012)
    assert message.startswith("no hyperparameter of this sweep closes the gap of mup to sp at width 128, depth 4")


def test_without_a_gap_there_is_nothing_to_close() -> None:
    analysis = analyse(results([*rows("sp", values=RATIOS), *rows("mup", lower=0.05, best={RATIO: 4.0})]))
    assert [c.share for c in analysis.gaps_after_tuning] == [None]
    assert remarks(analysis.gaps_after_tuning, 0.01) == []


def test_changed_runs_are_no_part_of_the_verdict_on_the_lr() -> None:
    everything = rows(best={RATIO: 3.0}, values=VALUES)
    plain = [r for r in everything if "value" not in r]
    with_, without = to_json(analyse(results(everything))), to_json(analyse(results(plain)))
    assert with_["groups"] == without["groups"]
    assert set(with_) - set(without) == {"tuning", "closings", "tuning_remarks"}
    assert [one["hyperparameter"] for one in with_["tuning"]] == [STD, BETA, RATIO]
    ridge = with_["tuning"][2]["sizes"][0]["ridge"]
    assert ridge["slope"]["octaves_per_octave"] == pytest.approx(0.25, abs=0.1)
    assert ridge["log2_lr"]["log2_lr"] == pytest.approx(-7.4, abs=0.1)
