"""The search: which runs it wants next, that it finds optima, that it ends, and that interruptions change nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
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
from mupsweep.sweep.size_search import Proposal, lr_grid, propose, search_state

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


def searched(grid: GridConfig, train: Callable[[Proposal], Row]) -> list[Row]:
    """Every run of a search."""
    rows: dict[Proposal, Row] = {}
    for _ in range(ENOUGH):
        proposals = propose(results(rows.values()), grid)
        if not proposals:
            return list(rows.values())
        assert not set(proposals) & set(rows)
        rows |= {run: train(run) for run in proposals}
    raise AssertionError("the search does not end")


@pytest.mark.parametrize("drift", [0.0, -1.0])
def test_the_optimum_of_every_size_is_found_for_two_fifths_of_the_grid(drift: float) -> None:
    rows = searched(LADDER, drifting(-6.7, drift))
    for k, fitted in enumerate(ladder_optima("width", collect(results(rows)))):
        assert fitted.log2_lr == pytest.approx(-6.7 + drift * k, abs=0.25)
        assert fitted.low is not None
        assert fitted.high is not None
        assert fitted.high - fitted.low <= 0.5
    grid = len(LADDER.log2_lrs) * LADDER.max_seeds * (1 + 4 + 16)
    assert sum(r["width_ratio"] ** 2 for r in rows) / grid < 0.4


@pytest.mark.parametrize("optimum", [-13.2, 0.4])
def test_it_walks_beyond_the_given_lrs(optimum: float) -> None:
    one = GridConfig(log2_lrs=LADDER.log2_lrs, search=ADAPTIVE)
    (fitted,) = ladder_optima("width", collect(results(searched(one, valley(optimum)))))
    assert fitted.log2_lr == pytest.approx(optimum, abs=0.25)


def test_it_stops_six_octaves_beyond_them() -> None:
    rows = searched(GridConfig(log2_lrs=(-8.0, -7.0), search=ADAPTIVE), valley(-30.0))
    assert min(r["log2_lr"] for r in rows) == -14.0


def test_a_cliff_beside_the_minimum_is_approached_and_not_crossed_again() -> None:
    rows = searched(GridConfig(log2_lrs=LADDER.log2_lrs, search=ADAPTIVE), valley(-6.2, cliff=1.0))
    (fitted,) = ladder_optima("width", collect(results(rows)))
    assert fitted.log2_lr == pytest.approx(-6.2, abs=0.25)
    assert len({r["log2_lr"] for r in rows if r["status"] == "diverged"}) <= 3  # two of the first runs, one beside


def test_runs_that_all_diverge_end_the_search_at_its_limit() -> None:
    rows = searched(GridConfig(log2_lrs=(-4.0, -3.0), search=ADAPTIVE), lambda run: row(run, None))
    assert min(r["log2_lr"] for r in rows) == -10.0


def test_noise_calls_for_seeds_and_bend_for_lrs() -> None:
    one = GridConfig(log2_lrs=LADDER.log2_lrs, search=ADAPTIVE, max_runs=40)
    quiet, noisy = (searched(one, valley(-6.7, noise=n)) for n in (1e-4, 0.02))
    assert {r["seed"] for r in quiet} == {0, 1}
    assert {r["seed"] for r in noisy} == {0, 1, 2}


def test_it_stops_at_its_budget_and_says_so() -> None:
    one = GridConfig(log2_lrs=LADDER.log2_lrs, search=ADAPTIVE, max_runs=16)
    rows = searched(one, valley(-6.7, noise=0.05))
    assert len(rows) <= 16
    (last,) = search_state(results(rows), one)
    assert last.reason.startswith("stopped at sweep.max_runs=16: ")


def test_its_proposals_do_not_depend_on_the_order_of_the_records() -> None:
    rows = searched(LADDER, drifting(-6.7, -0.5))[:20]
    assert propose(results(rows), LADDER) == propose(results(rows[::-1]), LADDER)


def test_a_larger_size_begins_around_what_the_smaller_ones_predict() -> None:
    rows = searched(LADDER, drifting(-5.0, -1.0))
    first = [r for r in rows if r["width_ratio"] == 4.0][:6]
    lrs = sorted({r["log2_lr"] for r in first})
    assert len(lrs) == 3
    assert lrs[0] <= -7.0 <= lrs[-1]  # the optima before it lie at -5 and -6


@pytest.mark.parametrize(("half_width", "step"), [(0.25, 0.5), (0.1, 0.125), (0.125, 0.25), (1.0, 1.0), (3.0, 1.0)])
def test_the_lr_grid_follows_from_the_half_width(half_width: float, step: float) -> None:
    assert lr_grid(half_width) == step


@pytest.mark.parametrize(
    "override", ["sweep.search=greedy", "sweep.half_width=0", "sweep.max_seeds=0", "sweep.max_runs=0"]
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


def test_plan_shows_the_first_round_and_says_that_more_follow(cli: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = cli("plan", *SEARCH)
    assert code == 0
    assert "only the first round is shown" in out
    _, out, _ = cli("plan", *SEARCH, "--json")
    document = json.loads(out)
    assert document["search"] == "adaptive"
    assert {(r["width"], r["log2_lr"], r["seed"]) for r in document["runs"]} == {
        (16, x, s) for x in (-9.0, -7.0, -5.0) for s in (0,)
    }
