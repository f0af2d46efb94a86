"""Drift, regret and verdicts of sweeps whose truth is known, and the recipe of a target."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_results import results

from mupsweep.analysis.analysis import Analysis, analyse
from mupsweep.analysis.estimate import UNKNOWN, Estimate
from mupsweep.analysis.verdict import DRIFTS, INCONCLUSIVE, TRANSFERS
from mupsweep.recipes.recipe import target_recipe
from mupsweep.report.results_files import to_json, write_results
from mupsweep.store.results import read_runs
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan, run_spec
from mupsweep.sweep.config import load


def rows(
    drift: float = 0.0,
    noise: float = 0.005,
    seeds: int = 3,
    sizes: int = 4,
    step: float = 1.0,
    lowest: float = -13.0,
    curvature: float = 0.04,
    axis: str = "width",
    parametrization: str = "mup",
    floor: float = 2.5,
    random: np.random.Generator | None = None,
) -> list[dict[str, Any]]:
    """A ladder of parabolas whose optimum moves by `drift` octaves per doubling; far above it, runs diverge."""
    random = random or np.random.default_rng(0)
    made = []
    for k in range(sizes):
        optimum = -7.3 + drift * k
        for seed in range(seeds):
            shift = random.normal(0, 2 * noise)
            for x in np.arange(lowest, -2.9, step):
                diverged = x - optimum > 4
                loss = floor - 0.1 * k + curvature * (x - optimum) ** 2 + shift + random.normal(0, noise)
                r_n, r_L = (2.0**k, 1.0) if axis == "width" else (1.0, 2.0**k)
                made.append(
                    {
                        "run_id": f"{axis}-{k}-{seed}-{x}",
                        "model": "nanogpt",
                        "optimizer": "adamw",
                        "parametrization": parametrization,
                        "width": int(32 * r_n),
                        "depth": int(4 * r_L),
                        "width_ratio": r_n,
                        "depth_ratio": r_L,
                        "log2_lr": float(x),
                        "seed": seed,
                        "status": "diverged" if diverged else "done",
                        "val_loss": None if diverged else float(loss),
                    }
                )
    return made


def verdict(analysis: Analysis) -> str:
    [group] = analysis.groups
    return group.verdict


@pytest.mark.parametrize(
    ("sizes", "advice"),
    [
        ((1.0,), "train ratios above 1, or add them"),
        ((2.0,), "the other sizes, the base among them, are not trained yet"),
    ],
)
def test_one_size_says_which_are_missing(sizes: tuple[float, ...], advice: str) -> None:
    trained = [row for row in rows(sizes=2) if row["width_ratio"] in sizes]
    [group] = analyse(results(trained)).groups
    assert group.verdict == INCONCLUSIVE
    assert group.reasons[0] == f"no size larger than the base has LRs enough for a curve: {advice}"


def test_no_drift_transfers_and_the_numbers_say_so() -> None:
    [group] = analyse(results(rows(drift=0.0))).groups
    assert group.verdict == TRANSFERS
    assert group.drift.value == pytest.approx(0.0, abs=0.05)
    assert group.total_drift.low is not None
    assert group.total_drift.high is not None
    assert -0.5 <= group.total_drift.low <= 0.0 <= group.total_drift.high <= 0.5
    assert "octaves per doubling" in group.reasons[0]
    assert "where the base's LR costs " in group.reasons[0]


def test_a_drift_of_an_octave_per_doubling_is_measured() -> None:
    [group] = analyse(results(rows(drift=-1.0))).groups
    assert group.verdict == DRIFTS
    assert group.drift.value == pytest.approx(-1.0, abs=0.05)
    assert group.total_drift.value == pytest.approx(-3.0, abs=0.1)
    # The base's optimum lies 3 octaves above the largest size's, 0.04 * 3^2 nats, and there the valley ends: the next
    # LR has lost 0.44 nats, and nobody knows where between the two it does.
    assert group.regret.value is not None
    assert 0.36 <= group.regret.value <= 0.45
    assert group.regret.low is not None
    assert group.regret.high is not None
    assert group.regret.low <= 0.36 <= group.regret.high


def test_too_little_data_is_inconclusive_and_says_what_to_add() -> None:
    for little in (
        rows(sizes=1),
        rows(noise=0.2, seeds=1, curvature=0.005),
        [r for r in rows() if r["log2_lr"] < -9],
        [r for r in rows() if r["log2_lr"] in (-8.0, -7.0)],
    ):
        [group] = analyse(results(little)).groups
        assert group.verdict == INCONCLUSIVE
        assert any(word in " ".join(group.reasons) for word in ("add ", "train ", "needs at least"))


def test_a_largest_size_whose_best_lr_is_the_lowest_still_drifts() -> None:
    """The bound alone excludes transfer: the optimum of the largest size lies below the grid."""
    [group] = analyse(results(rows(drift=-1.5, lowest=-10.0))).groups
    assert group.optima[-1].log2_lr is None
    assert group.total_drift.value is None
    assert group.total_drift.high is not None
    assert group.total_drift.high < -0.5
    assert group.verdict == DRIFTS


def test_a_valley_so_flat_that_the_lr_does_not_matter_transfers_by_its_regret() -> None:
    [group] = analyse(results(rows(drift=0.25, curvature=0.004, noise=0.0005))).groups
    assert group.verdict == TRANSFERS
    assert "costs at most" in group.reasons[0]


def test_half_finished_sweeps_are_judged_by_what_they_have() -> None:
    everything = rows(drift=-1.0)
    half = everything[: len(everything) * 3 // 4]  # the largest size is missing
    [group] = analyse(results(half)).groups
    assert [o.curve.width for o in group.optima] == [32, 64, 128]
    assert group.verdict == DRIFTS


def test_width_and_depth_ladders_are_judged_apart() -> None:
    deeper = [r for r in rows(drift=-1.0, axis="depth", sizes=3) if r["depth"] > 4]  # the base is the width ladder's
    found = {group.axis: group.verdict for group in analyse(results([*rows(drift=0.0), *deeper])).groups}
    assert found == {"width": TRANSFERS, "depth": DRIFTS}


def test_the_lower_loss_of_sp_is_told_beside_its_drift() -> None:
    both = [*rows(drift=-1.0, parametrization="sp", floor=2.45), *rows(drift=0.0, parametrization="mup")]
    [remark] = analyse(results(both)).remarks
    assert remark.startswith("loss at width 256, depth 4, each at its own optimum: adamw/sp ")
    assert "sp tuned at this size ends lowest, although its LR does not transfer" in remark


def test_the_same_records_always_give_the_same_numbers() -> None:
    table_rows = rows(drift=-0.4, noise=0.02)
    assert to_json(analyse(results(table_rows))) == to_json(analyse(results(list(reversed(table_rows)))))


def test_results_have_the_documented_keys(tmp_path: Path) -> None:
    sweep = SweepDir(tmp_path)
    write_results(sweep.results, analyse(results(rows())))
    written = json.loads((sweep.results / "transfer.json").read_text())
    assert set(written) == {"groups", "comparisons", "remarks", "confidence", "tolerance"}
    assert written["tolerance"] == {
        "octaves": 0.5,
        "octaves_per_doubling": 0.25,
        "nats": 0.01,
        "costly": 0.03,
        "span": 0.5,
    }
    [group] = written["groups"]
    assert {"model", "optimizer", "parametrization", "axis", "sizes", "drift", "total_drift", "regret"} <= set(group)
    assert set(group["drift"]) == {"octaves_per_doubling", "low", "high"}
    assert set(group["total_drift"]) == {"octaves", "low", "high"}
    assert set(group["regret"]) == {"nats", "low", "high"}
    assert {"ratio", "n_runs", "n_diverged", "bracketed", "log2_lr_optimum", "loss_optimum"} <= set(group["sizes"][0])
    header = (sweep.results / "curves.csv").read_text().splitlines()[0]
    assert header == (
        "model,parametrization,optimizer,width,depth,width_ratio,depth_ratio,log2_lr,n_seeds,loss_mean,loss_sem,censored"
        ",horizon,hyperparameter,value,default"
    )
    assert (sweep.results / "runs.csv").read_text().startswith("run_id,model,parametrization,optimizer,width,depth,")


def test_the_recipe_of_a_target_holds_the_rules_at_the_transferred_lr() -> None:
    [variant] = load(["parametrization=spectral", "optimizer=adamw", "model.width=32", "model.head_dim=16"]).variants
    [group] = analyse(results([{**r, "parametrization": "spectral"} for r in rows()])).groups
    recipe = target_recipe([group], run_spec.resolve(variant), {"width": 1024})
    assert recipe["basis"].startswith("transfers")
    assert recipe["log2_lr_low"] < -7.3 < recipe["log2_lr_high"]
    assert recipe["log2_lr_optimum"] == pytest.approx(-7.3, abs=0.2)
    assert recipe["log2_lr"] == pytest.approx(recipe["log2_lr_optimum"], abs=0.2)  # that of the least expected loss
    assert recipe["output_multiplier"] == 1 / 32  # 1 / r_n
    tensors = {t["name"]: t for t in recipe["tensors"]}
    query = tensors["blocks.3.attention.query.weight"]
    assert query["lr"] == pytest.approx(recipe["base_lr"] / 32)
    assert query["init_std"] == pytest.approx(0.02 / math.sqrt(32))
    assert query["eps_ratio"] == pytest.approx(1 / 32)
    assert tensors["token_embedding.weight"]["lr"] == pytest.approx(recipe["base_lr"])


def test_a_target_on_an_axis_that_was_never_trained_is_told_so() -> None:
    """A width ladder says nothing about depth: its drift is not extrapolated along it."""
    [variant] = load(["parametrization=spectral", "model.width=32", "model.head_dim=16"]).variants
    [group] = analyse(results([{**r, "parametrization": "spectral"} for r in rows(drift=-1.0)])).groups
    recipe = target_recipe([group], run_spec.resolve(variant), {"depth": 64})
    assert recipe["basis"].startswith("untested: the target lies on the depth axis, but only width was measured")
    assert recipe["block_multiplier"] == 1 / 16  # the rule is known all the same
    wider = target_recipe([group], run_spec.resolve(variant), {"width": 512})
    assert recipe["log2_lr"] > wider["log2_lr"] + 0.5


def test_a_drifting_recipe_extrapolates_and_says_so() -> None:
    [variant] = load(["parametrization=sp", "model.width=32", "model.head_dim=16"]).variants
    [group] = analyse(results([{**r, "parametrization": "sp"} for r in rows(drift=-1.0)])).groups
    recipe = target_recipe([group], run_spec.resolve(variant), {"width": 1024})
    assert recipe["basis"].startswith("drifts: the LR of the least expected loss, with the drift of -1.0")
    assert recipe["log2_lr_optimum"] == pytest.approx(-7.3 - 5, abs=0.4)
    assert recipe["expected_regret"] > 0
    assert recipe["log2_lr_low"] <= -12.3 <= recipe["log2_lr_high"]


def test_runs_of_several_sweeps_are_read_together(tmp_path: Path) -> None:
    overrides = ["experiment=smoke", f"out={tmp_path}", "sweep.width_ratios=[1]"]
    for name, lrs in (("a", "[-9,-7]"), ("b", "[-7,-5]")):
        sweep, runs = plan.save(load([*overrides, f"sweep.name={name}", f"sweep.log2_lrs={lrs}"]), "")
        for run in runs:
            folder = sweep.run(run.run_id)
            folder.path.mkdir(parents=True)
            folder.write_summary({"run_id": run.run_id, **run.label_columns(), "status": "done", "val_loss": 2.0})
            folder.write_status("done")
    table = read_runs([SweepDir.open(tmp_path / "a"), SweepDir.open(tmp_path / "b")])
    assert [run.log2_lr for run in table] == [-9.0, -7.0, -5.0]  # the run that both planned counts once


def test_horizons_are_a_ladder_of_their_own_and_the_longest_stands_for_a_size() -> None:
    """The optimum falls by 0.3 octaves per doubling of the tokens and by none per doubling of the width."""
    made = []
    for doublings in range(3):
        horizon = 100_000 * 2**doublings
        for row in rows(sizes=2, step=0.5):
            made.append(row | {"log2_lr": row["log2_lr"] - 0.3 * doublings, "horizon": horizon})
    width, horizon = analyse(results(made)).groups
    assert (width.axis, horizon.axis) == ("width", "horizon")
    assert [o.curve.horizon for o in width.optima] == [400_000, 400_000]
    assert [horizon.ratio(o.curve) for o in horizon.optima] == [1, 2, 4]
    assert {o.curve.width for o in horizon.optima} == {32}
    assert horizon.drift.value == pytest.approx(-0.3, abs=0.03)
    assert "from 100k tokens to 400k tokens" in horizon.reasons[0]
    sizes = to_json(analyse(results(made)))["groups"][1]["sizes"]
    assert [size["horizon"] for size in sizes] == [100_000, 200_000, 400_000]


def row_of(width: int, x: float, seed: int, best: float, cliff: float = 9.0, par: str = "mup") -> dict[str, Any]:
    """A run of a parabola that diverges above a cliff; its noise is a tenth of a milli-nat, up and down."""
    loss = 3.0 + 0.06 * (x - best) ** 2 + 1e-4 * (-1) ** (seed + round(x))
    outcome = {"status": "diverged", "val_loss": None} if x > cliff else {"status": "done", "val_loss": loss}
    names = {"model": "nanogpt", "optimizer": "adamw", "parametrization": par, "depth": 4, "depth_ratio": 1.0}
    return {**names, "width": width, "width_ratio": width / 32, "log2_lr": x, "seed": seed, **outcome}


def runs_of(best: dict[int, float], cliff: dict[int, float] | None = None, lowest: int = -9) -> list[dict[str, Any]]:
    grid = [(w, float(x), s) for w in best for x in range(lowest, -2) for s in (0, 1)]
    return [row_of(w, x, s, best[w], (cliff or {}).get(w, 9.0)) for w, x, s in grid]


def test_a_slope_says_how_many_sizes_it_is_of() -> None:
    [group] = analyse(results(runs_of({32: -5.0, 64: -7.0, 128: -11.0}))).groups
    assert [o.curve.width for o in group.fitted] == [32, 64]
    assert to_json(analyse(results(runs_of({32: -5.0, 64: -7.0, 128: -11.0}))))["groups"][0]["drift_sizes"] == 2


def test_the_moves_end_in_the_total_drift_and_know_nothing_of_an_unknown_base() -> None:
    [group] = analyse(results(runs_of({32: -5.0, 64: -7.0, 128: -11.0}))).groups
    assert group.shifts[0] == Estimate(0.0, 0.0, 0.0)
    assert group.shifts[-1] == group.total_drift
    [edge] = analyse(results(runs_of({32: 0.0, 64: -5.0, 128: -7.0}))).groups
    assert edge.shifts[0] == UNKNOWN
    assert edge.regrets[0] == UNKNOWN
    assert edge.shifts[-1] == edge.total_drift


def test_where_the_bases_lr_diverges_the_reasons_say_so() -> None:
    [group] = analyse(results(runs_of({32: -4.0, 64: -6.0, 128: -6.0}, cliff={64: -6.0, 128: -20.0}))).groups
    assert [r for r in group.reasons[1:] if "diverges there" in r] == [
        "width 64, depth 4: the base's LR diverges there",
        "width 128, depth 4: the base's LR diverges there",
    ]


def test_a_size_that_stands_for_a_missing_base_is_named() -> None:
    [group] = analyse(results(runs_of({64: -6.0, 128: -6.0}))).groups
    assert "nothing is known at the base: width 64 stands for it" in group.reasons


def test_runs_that_do_not_quite_compare_are_named() -> None:
    alike = runs_of({32: -6.0})
    assert analyse(results(alike)).remarks == ()
    apart = [
        dict(row, precision="fp32" if k else "bf16", micro_batch=2 if k < 3 else None) for k, row in enumerate(alike)
    ]
    assert analyse(results(apart)).remarks == (
        "the runs differ in precision (bf16, fp32), which shifts losses a little",
        "3 runs ran out of memory and went on in smaller micro-batches, which rounds sums otherwise; "
        "training.micro_batch makes them equal for all runs",
    )


def test_a_lowest_loss_is_told_only_where_the_interval_says_so() -> None:
    """SP ends a thousandth lower, its seeds differ by ten times that."""
    close = [*rows(drift=-1.0, parametrization="sp", floor=2.499, noise=0.02), *rows(drift=0.0, noise=0.005)]
    [remark] = analyse(results(close)).remarks
    assert "ends lowest" not in remark
    sp, mup = (
        g.optima[-1].loss for g in sorted(analyse(results(close)).groups, key=lambda g: g.parametrization != "sp")
    )
    assert f"adamw/sp {sp:.4f}" in remark
    assert f"adamw/mup {mup:.4f}" in remark
