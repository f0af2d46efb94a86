"""The search: which runs it wants next, that it finds optima, that it ends, and that interruptions change nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_results import results

from mupsweep.analysis.curves import collect
from mupsweep.analysis.transfer import ladder_optima
from mupsweep.errors import ConfigError
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan, run_spec
from mupsweep.sweep.config import ADAPTIVE, GridConfig, load
from mupsweep.sweep.size_search import Proposal, search_state

Row = Mapping[str, Any]
LADDER = GridConfig(
    width_ratios=(1.0, 2.0, 4.0),
    log2_lrs=tuple(np.arange(-10.0, -3.5, 0.5).tolist()),
    search=ADAPTIVE,
)
ENOUGH = 40  # rounds


def valley(optimum: float, noise: float = 0.002, cliff: float = math.inf) -> Callable[[Proposal], Row]:
    """What training comes to where the loss is a lopsided valley; beyond the cliff runs diverge."""

    def train(run: Proposal) -> Row:
        random = np.random.default_rng([round(run.width_ratio * 8), round(run.log2_lr * 8) % 1000, run.seed])
        d = run.log2_lr - optimum
        loss = 2.0 + 0.03 * d * d + 0.004 * max(d, 0.0) ** 3 + 0.01 * run.seed + noise * random.standard_normal()
        return row(run, None if d > cliff else float(loss))

    return train


def drifting(start: float, drift: float, **keys: float) -> Callable[[Proposal], Row]:
    return lambda run: valley(start + drift * math.log2(run.width_ratio), **keys)(run)


def row(run: Proposal, loss: float | None) -> Row:
    shape = {"width": round(32 * run.width_ratio), "depth": 4, "model": "m", "optimizer": "o", "parametrization": "p"}
    return {**shape, **run._asdict(), "status": "diverged" if loss is None else "done", "val_loss": loss}


def proposals(rows: Iterable[Row], grid: GridConfig) -> list[Proposal]:
    return [run for state in search_state(results(rows), grid) for run in state.proposals]


def searched(grid: GridConfig, train: Callable[[Proposal], Row]) -> list[Row]:
    """Every run of a search."""
    rows: dict[Proposal, Row] = {}
    for _ in range(ENOUGH):
        runs = proposals(rows.values(), grid)
        if not runs:
            return list(rows.values())
        assert not set(runs) & set(rows)
        rows |= {run: train(run) for run in runs}
    raise AssertionError("the search does not end")


@pytest.mark.parametrize("drift", [0.0, -1.0])
def test_the_optimum_of_every_size_is_found_for_an_eighth_of_the_grid(drift: float) -> None:
    rows = searched(LADDER, drifting(-6.7, drift))
    for k, fitted in enumerate(ladder_optima("width", collect(results(rows)))):
        assert fitted.log2_lr == pytest.approx(-6.7 + drift * k, abs=0.25)
    grid = len(LADDER.log2_lrs) * LADDER.max_seeds * (1 + 4 + 16)
    assert sum(r["width_ratio"] ** 2 for r in rows) / grid < 0.125


@pytest.mark.parametrize("optimum", [-13.2, 0.4])
def test_it_walks_beyond_the_given_lrs(optimum: float) -> None:
    one = GridConfig(log2_lrs=LADDER.log2_lrs, search=ADAPTIVE)
    (fitted,) = ladder_optima("width", collect(results(searched(one, valley(optimum)))))
    assert fitted.log2_lr == pytest.approx(optimum, abs=0.25)


def test_it_stops_six_octaves_beyond_them() -> None:
    grid = GridConfig(log2_lrs=(-8.0, -7.0), search=ADAPTIVE)
    rows = searched(grid, valley(-30.0))
    assert min(r["log2_lr"] for r in rows) == -14.0
    [state] = search_state(results(rows), grid)
    assert state.reason == "the optimum may lie below 2^-14, the lowest LR of the search"


def test_a_cliff_beside_the_minimum_is_approached_and_not_crossed_again() -> None:
    rows = searched(GridConfig(log2_lrs=LADDER.log2_lrs, search=ADAPTIVE), valley(-6.2, cliff=1.0))
    (fitted,) = ladder_optima("width", collect(results(rows)))
    assert fitted.low is not None
    assert fitted.high is not None
    assert fitted.low < -6.2 < fitted.high
    assert len({r["log2_lr"] for r in rows if r["status"] == "diverged"}) <= 2


def test_runs_that_all_diverge_end_the_search_at_its_limit() -> None:
    rows = searched(GridConfig(log2_lrs=(-4.0, -3.0), search=ADAPTIVE), lambda run: row(run, None))
    assert min(r["log2_lr"] for r in rows) == -10.0


def test_a_larger_size_begins_below_what_diverged_at_a_smaller_one() -> None:
    grid = GridConfig(width_ratios=(1.0, 2.0), log2_lrs=(-4.0, -3.0), search=ADAPTIVE)
    rows = [row(Proposal(1.0, 1.0, x, 0), None) for x in (-10.0, -7.0, -3.5)]
    first, second = search_state(results(rows), grid)
    assert (first.proposals, first.reason) == ((), "every LR diverges")
    assert second.proposals[0].log2_lr == -10.0


def test_one_seed_is_enough_unless_noise_decides() -> None:
    two = replace(LADDER, width_ratios=(1.0, 2.0), regret=1e-4, half_width=0.1)
    quiet, noisy = (searched(two, valley(-6.7, noise=n)) for n in (1e-4, 0.02))
    assert {r["seed"] for r in quiet} == {0}
    assert {r["seed"] for r in noisy} > {0}
    assert len(noisy) > len(quiet)


def test_the_seeds_of_the_sweep_are_trained_at_every_lr() -> None:
    rows = searched(replace(LADDER, seeds=(3, 5)), drifting(-6.7, 0.0))
    by_lr: dict[tuple[float, float], set[int]] = {}
    for r in rows:
        by_lr.setdefault((r["width_ratio"], r["log2_lr"]), set()).add(r["seed"])
    assert all(seeds >= {3, 5} for seeds in by_lr.values())


def test_it_stops_at_its_budget_and_says_so() -> None:
    one = GridConfig(log2_lrs=LADDER.log2_lrs, search=ADAPTIVE, max_runs=2)
    rows = searched(one, valley(-6.7))
    assert len(rows) == 2
    (last,) = search_state(results(rows), one)
    assert last.reason.startswith("stopped at sweep.max_runs=2: ")


def test_a_verdict_that_is_open_asks_for_runs_at_the_sizes_that_it_is_about() -> None:
    """The optimum moves by half an octave in all, which is the bound of the verdict."""
    decided, either = (
        searched(replace(LADDER, half_width=4.0), drifting(-6.7, drift, noise=0.004)) for drift in (0.0, -0.25)
    )
    assert len(either) > len(decided)


def test_a_verdict_that_small_sizes_cannot_decide_any_more_asks_for_runs_at_larger_ones() -> None:
    """At the smaller sizes every LR that may decide has all the seeds that it may have."""
    rows = searched(replace(LADDER, half_width=4.0, max_seeds=2), drifting(-6.7, -0.25, noise=0.006))
    assert sum(row["width_ratio"] == 4.0 for row in rows) > 5


def test_its_proposals_do_not_depend_on_the_order_of_the_records() -> None:
    rows = searched(LADDER, drifting(-6.7, -0.5))[:8]
    assert proposals(rows, LADDER) == proposals(rows[::-1], LADDER)


def test_a_larger_size_begins_at_what_the_smaller_ones_forecast() -> None:
    rows = searched(replace(LADDER, at_once=1), drifting(-5.0, -1.0))
    first = next(r for r in rows if r["width_ratio"] == 4.0)
    assert first["log2_lr"] == pytest.approx(-7.0, abs=0.5)  # the optima before it lie at -5 and -6


def test_runs_at_once_are_chosen_together_and_cost_little_more() -> None:
    one, four = (searched(replace(LADDER, at_once=n), drifting(-6.7, -0.5)) for n in (1, 4))
    first = proposals([], LADDER)
    assert {run.log2_lr for run in first} == {-8.0, -7.0, -6.0}
    assert sum(r["width_ratio"] ** 2 for r in four) <= 1.35 * sum(r["width_ratio"] ** 2 for r in one)


@pytest.mark.parametrize(
    "override",
    [
        *("sweep.search=greedy", "sweep.half_width=0", "sweep.max_seeds=0", "sweep.max_runs=0", "sweep.at_once=0"),
        "sweep.regret=-1",
    ],
)
def test_a_bad_key_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        load(["experiment=smoke", override])


SEARCH = [
    "experiment=smoke",
    "sweep.search=adaptive",
    "sweep.width_ratios=[1]",
    "parametrization=sp,mup",
    "sweep.log2_lrs=[-9,-7,-5]",
]


def trained(sweep: SweepDir, run: run_spec.RunSpec, optimum: Mapping[str, float]) -> None:
    """Records of a run as a worker leaves them."""
    name = run.resolved.parametrization.name
    one = Proposal(run.size.width_ratio, run.size.depth_ratio, run.log2_lr, run.seed)
    summary = {**run.row(), **run.label_columns(), **{k: valley(optimum[name])(one)[k] for k in ("status", "val_loss")}}
    folder = sweep.run(run.run_id)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write_summary(summary)
    folder.write_status("done")


def test_every_variant_is_searched_on_its_own_and_interruptions_change_nothing(tmp_path: Path) -> None:
    optimum = {"sp": -9.3, "mup": -5.2}
    plans = []
    for name, stop in (("straight", 0), ("interrupted", 3)):  # stop: runs trained before each command ends
        config = load([*SEARCH, f"out={tmp_path}", f"sweep.name={name}"])
        for _ in range(400):
            sweep, runs = plan.save(config, "")
            open_ = [run for run in runs if sweep.run(run.run_id).is_open()]
            if not open_:
                break
            for run in open_[: stop or None]:
                trained(sweep, run, optimum)
        plans.append(sorted(row["run_id"] for row in sweep.read_plan()))
    assert plans[0] == plans[1]
    rows = [sweep.run(run_id).summary() for run_id in plans[1]]
    for curve in collect(results([r for r in rows if r is not None])):
        assert ladder_optima("width", [curve])[0].log2_lr == pytest.approx(optimum[curve.parametrization], abs=0.25)


def test_a_sweep_holds_the_variants_that_a_later_round_comes_to() -> None:
    config = load([*SEARCH, "parametrization=mup", "sweep.axes={model.init_std:[0.04]}"])
    sweep, runs = plan.save(config, "")
    assert {run.resolved.variant.change for run in runs} == {None}
    while all(run.resolved.variant.change is None for run in runs):
        for run in runs:
            trained(sweep, run, {"mup": -7.2})
        sweep, runs = plan.save(config, "")
    assert [run.run_id for run in plan.load(sweep)] == [run.run_id for run in runs]


def test_plan_shows_the_first_round_and_says_that_more_follow(cli: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = cli("plan", *SEARCH)
    assert code == 0
    assert "only the first round is shown" in out
    _, out, _ = cli("plan", *SEARCH, "--json")
    document = json.loads(out)
    assert document["search"] == "adaptive"
    assert {(r["width"], r["log2_lr"]) for r in document["runs"]} >= {(16, -7.0), (16, -8.0), (16, -6.0)}
