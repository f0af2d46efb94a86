"""Rounds of several variants: values are searched at the base first, the best go on, and no round passes its budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytest
from run_results import results

from mupsweep.analysis.analysis import analyse
from mupsweep.sweep import plan
from mupsweep.sweep.config import SweepConfig, load
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.sweep.search import base_of, search_states

Row = Mapping[str, Any]
SEARCH = [
    "experiment=smoke",
    "sweep.search=adaptive",
    "sweep.width_ratios=[0.5,1,2]",
    "sweep.log2_lrs=[-10,-8,-6,-4]",
    "sweep.axes={model.init_std:[0.04,0.08,0.16]}",
    "model.init_std=0.02",
]
BEST = 0.08
ENOUGH = 40  # rounds


def train(run: RunSpec) -> Row:
    """The loss is a valley in log2 LR, whose floor is a valley in log2 of the init std and falls with width."""
    random = np.random.default_rng([round(run.size.width_ratio * 8), round(-run.log2_lr * 8), run.seed])
    away = math.log2(run.resolved.variant.model["init_std"] / BEST)
    distance = run.log2_lr + 6.8 - 0.5 * away
    floor = 2.0 - 0.1 * math.log2(run.size.width_ratio) + 0.02 * away**2
    loss = floor + 0.04 * distance**2 + 0.001 * random.standard_normal()
    return {**run.label_columns(), "status": "done", "val_loss": float(loss), "flops": run.cost.flops}


def rounds_of(config: SweepConfig, training: Callable[[RunSpec], Row] = train) -> list[dict[str, Row]]:
    """Every run of a search, round by round."""
    rounds: list[dict[str, Row]] = []
    for _ in range(ENOUGH):
        before = merged(rounds)
        runs = plan.plan(config, results(before.values()))
        if not runs:
            return rounds
        assert not {run.run_id for run in runs} & set(before)
        rounds.append({run.run_id: training(run) for run in runs})
    raise AssertionError("the search does not end")


def merged(rounds: Iterable[Mapping[str, Row]]) -> dict[str, Row]:
    return {run_id: row for rows in rounds for run_id, row in rows.items()}


def searched(*overrides: str) -> dict[str, Row]:
    return merged(rounds_of(load([*SEARCH, *overrides])))


def flops(rows: Mapping[str, Row]) -> float:
    return sum(row["flops"] for row in rows.values())


@pytest.fixture(scope="module")
def whole() -> list[dict[str, Row]]:
    """A search without a budget."""
    return rounds_of(load(SEARCH))


def test_only_values_that_may_be_the_best_at_the_base_go_on(whole: list[dict[str, Row]]) -> None:
    widths: dict[float, set[float]] = {}
    for row in merged(whole).values():
        widths.setdefault(row.get("value", 0.02), set()).add(row["width_ratio"])
    assert widths == {0.02: {0.5, 1.0, 2.0}, BEST: {0.5, 1.0, 2.0}, 0.04: {1.0}, 0.16: {1.0}}
    [one] = analyse(results(merged(whole).values())).tunings
    assert [at.best for at in one.sizes] == [BEST] * 3


def test_a_value_waits_for_the_default_at_the_base_and_begins_around_its_optimum(whole: list[dict[str, Row]]) -> None:
    first = next(i for i, rows in enumerate(whole) if any("value" in row for row in rows.values()))
    assert {row["width_ratio"] for row in merged(whole[:first]).values()} >= {0.5, 1.0}
    begun = [row for row in whole[first].values() if "value" in row]
    assert {row["width_ratio"] for row in begun} == {1.0}
    lrs = {row["log2_lr"] for row in begun}
    middle = sorted(lrs)[len(lrs) // 2]
    assert middle == pytest.approx(-6.8 - 0.5 * 2, abs=0.5)  # the default's init std is two octaves off


def test_a_budget_is_never_passed_and_the_default_comes_first(whole: list[dict[str, Row]]) -> None:
    defaults = {run_id: row for run_id, row in merged(whole).items() if "value" not in row}
    budget = flops(defaults) + 0.3 * (flops(merged(whole)) - flops(defaults))
    rows = searched(f"sweep.max_flops={budget}")
    assert flops(rows) <= budget
    assert {run_id for run_id, row in rows.items() if "value" not in row} == set(defaults)
    assert any("value" in row for row in rows.values())
    assert not plan.plan(load([*SEARCH, f"sweep.max_flops={budget}"]), results(rows.values()))
    assert plan.plan(load(SEARCH), results(rows.values()))  # a larger budget goes on


def test_what_a_default_cannot_afford_is_left_to_the_values() -> None:
    sizes = "sweep.width_ratios=[1,64]"
    one = min(run.cost.flops for run in plan.plan(load([*SEARCH, sizes])))
    rows = searched(sizes, f"sweep.max_flops={one * 12 * 4}")  # max_runs of four variants at the base
    assert {row["width_ratio"] for row in rows.values()} == {1.0}
    assert {row.get("value") for row in rows.values()} == {None, 0.04, 0.08, 0.16}


def test_proposals_do_not_depend_on_the_order_of_the_records(whole: list[dict[str, Row]]) -> None:
    config = load(SEARCH)
    rows = list(merged(whole).values())[:60]
    states = [search_states(config.variants, results(ordered), config.sweep) for ordered in (rows, rows[::-1])]
    assert states[0] == states[1]


def test_a_value_that_diverges_at_every_lr_ends_at_the_base() -> None:
    def diverging(run: RunSpec) -> Row:
        row = train(run)
        return {**row, "status": "diverged", "val_loss": None} if row.get("value") == BEST else row

    overrides = ["sweep.width_ratios=[1,2]", f"sweep.axes={{model.init_std:[{BEST}]}}"]
    rows = merged(rounds_of(load([*SEARCH, *overrides]), diverging))
    assert {row["width_ratio"] for row in rows.values()} == {1.0, 2.0}
    assert {row["width_ratio"] for row in rows.values() if "value" in row} == {1.0}


def test_the_base_is_ratio_one_or_else_the_smallest_size() -> None:
    assert base_of(load(SEARCH).sweep) == (1.0, 1.0)
    assert base_of(load([*SEARCH, "sweep.width_ratios=[4,2]"]).sweep) == (2.0, 1.0)


def test_a_search_begins_with_the_lrs_of_each_optimizer() -> None:
    first = plan.plan(
        load(
            [*SEARCH[:3], "optimizer=adamw,muon", "sweep.log2_lrs={adamw:[-9,-7],muon:[-5,-3]}", "data.tokenizer=bytes"]
        )
    )
    lrs = {name: {run.log2_lr for run in first if run.resolved.optimizer.name == name} for name in ("adamw", "muon")}
    assert lrs == {"adamw": {-9, -8, -7}, "muon": {-5, -4, -3}}


def test_what_one_variant_trains_at_the_base_the_other_has_too() -> None:
    """One drifts and the other does not, so that they ask for other runs once the base is searched."""

    def two(run: RunSpec) -> Row:
        size, is_mup = run.size.width_ratio, run.resolved.variant.parametrization["name"] == "mup"
        random = np.random.default_rng([round(size), round(-run.log2_lr * 8), run.seed, is_mup and size > 1])
        distance = run.log2_lr + 6.8 + (0.25 if is_mup else 1.0) * math.log2(size)
        loss = 2.0 - 0.1 * math.log2(size) + 0.03 * distance**2 + 0.005 * random.standard_normal()
        return {
            **run.label_columns(),
            "run_id": run.run_id,
            "status": "done",
            "val_loss": loss,
            "flops": run.cost.flops,
        }

    sizes = ["sweep.width_ratios=[1,2,4]", "parametrization=sp,mup"]
    config = load(["experiment=smoke", "sweep.search=adaptive", "sweep.log2_lrs=[-10,-8,-6,-4]", *sizes])
    rows = merged(rounds_of(config, two)).values()
    trained = {
        name: [{(r["log2_lr"], r["seed"]) for r in rows if (r["parametrization"], r["width_ratio"]) == (name, ratio)}
               for ratio in (1.0, 4.0)]
        for name in ("sp", "mup")
    }  # fmt: skip
    assert trained["sp"][0] == trained["mup"][0]
    assert trained["sp"][1] != trained["mup"][1]
