"""The joint search of the LR and another hyperparameter: it walks to the best value of every size, and not over all."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from run_results import results

from mupsweep.analysis.labels import HyperparameterOverride, Label
from mupsweep.errors import ConfigError
from mupsweep.sweep.config import from_tree, load, to_tree
from mupsweep.sweep.joint_search import JointSearch
from mupsweep.sweep.size_search import SearchState

KEY, OWN = "optimizer.weight_decay", 0.1
DECAYS = (0.025, 0.05, 0.2, 0.4, 0.8, 1.6)
NAMES: Label = ("nanogpt", "adamw", "mup")
CHANGES = {(*NAMES, f"{KEY}={value:g}"): HyperparameterOverride(KEY, value, OWN) for value in DECAYS}
BASE, DOUBLED = (1.0, 1.0), (2.0, 1.0)
AXES = [f"sweep.axes={{{KEY}:[0.05,0.2]}}", f"sweep.joint=[{KEY}]"]


def runs_of(value: float, width_ratio: float) -> list[dict[str, Any]]:
    """Five LRs around the best of a value: a valley in the pair, lowest at a decay of 0.4 times the width ratio.

    The best LR falls by half an octave per octave of the decay, from 2^-7 at the lowest.
    """
    away = math.log2(value / (0.4 * width_ratio))
    optimum = -7.0 - 0.5 * away
    random = np.random.default_rng(round(value * 1000))
    made = []
    for x in round(4 * optimum) / 4 + np.arange(-2.0, 2.1):
        loss = 2.0 + 0.05 * away**2 + 0.04 * (x - optimum) ** 2 + 1e-4 * random.standard_normal()
        size = {"width": 32 * width_ratio, "depth": 2, "width_ratio": width_ratio, "depth_ratio": 1.0, "seed": 0}
        names = dict(zip(("model", "optimizer", "parametrization"), NAMES, strict=True))
        change = {} if value == OWN else {"hyperparameter": KEY, "value": value, "default": OWN}
        made.append({**names, **change, **size, "log2_lr": float(x), "status": "done", "val_loss": float(loss)})
    return made


def searched(finished: dict[tuple[float, float], tuple[float, ...]]) -> dict[float, list[SearchState]]:
    """The states by value, where some values of some sizes have their runs."""
    rows: dict[Label, list[dict[str, Any]]] = {label: [] for label in (NAMES, *CHANGES)}
    for (width_ratio, _), values in finished.items():
        for value in (OWN, *values):
            rows[NAMES if value == OWN else (*NAMES, f"{KEY}={value:g}")] += runs_of(value, width_ratio)
    grid = load(["experiment=smoke", "sweep.search=adaptive"]).sweep
    joint = JointSearch(NAMES, CHANGES, {label: results(of_label) for label, of_label in rows.items()}, grid)
    states = joint.states([BASE, DOUBLED])
    return {CHANGES[label].value: of_value for label, of_value in states.items()}


def proposed(states: dict[float, list[SearchState]]) -> dict[float, tuple[tuple[float, float], float]]:
    """The size and the middle of the LRs that are trained next, of every value that has any."""
    last = {value: of_value[-1] for value, of_value in states.items() if of_value[-1].proposals}
    return {v: (s.ratios, float(np.median([p.log2_lr for p in s.proposals]))) for v, s in last.items()}


def test_the_walk_begins_beside_the_default() -> None:
    assert {value: ratios for value, (ratios, _) in proposed(searched({BASE: ()})).items()} == {0.05: BASE, 0.2: BASE}


def test_the_walk_goes_to_the_neighbours_of_the_best_value_where_the_best_lrs_point() -> None:
    [(value, (ratios, log2_lr))] = proposed(searched({BASE: (0.05, 0.2)})).items()
    assert (value, ratios) == (0.4, BASE)
    assert log2_lr == pytest.approx(-6.5, abs=1.0)  # the best of 0.2


def test_a_size_ends_with_its_best_value_between_two_that_are_worse_and_the_next_begins_beside_it() -> None:
    states = searched({BASE: (0.05, 0.2, 0.4, 0.8), DOUBLED: ()})
    following = proposed(states)
    assert {value: ratios for value, (ratios, _) in following.items()} == dict.fromkeys((0.2, 0.4, 0.8), DOUBLED)
    for value, (_, log2_lr) in following.items():  # as far from the default's best LR as at the base
        assert log2_lr == pytest.approx(-7.0 - 0.5 * math.log2(value / 0.8), abs=0.6)
    assert [state.reason for value in (0.025, 1.6) for state in states[value]] == [
        "beyond the neighbours of the best value"
    ] * 2


def test_at_a_larger_size_the_walk_follows_the_best_value_to_its_new_place() -> None:
    assert set(proposed(searched({BASE: (0.05, 0.2, 0.4, 0.8), DOUBLED: (0.2, 0.4, 0.8)}))) == {1.6}
    assert not proposed(searched({BASE: (0.05, 0.2, 0.4, 0.8), DOUBLED: (0.2, 0.4, 0.8, 1.6)}))


def test_other_sizes_wait_for_the_base_and_the_base_for_the_default() -> None:
    assert not proposed(searched({}))
    assert all(ratios == BASE for ratios, _ in proposed(searched({BASE: (0.05,), DOUBLED: ()})).values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep.search=adaptive", AXES[1]], r"sweep\.joint: optimizer\.weight_decay has no values; .*sweep\.axes="),
        (["sweep.search=grid", *AXES], r"sweep\.joint=\[optimizer\.weight_decay\] .*: sweep\.search=adaptive"),
    ],
)
def test_a_joint_search_wants_values_and_a_search(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(["experiment=smoke", *words])


def test_a_stored_sweep_says_what_is_joint_only_where_something_is() -> None:
    plain = load(["experiment=smoke", "sweep.search=adaptive", AXES[0]])
    joint = load(["experiment=smoke", "sweep.search=adaptive", *AXES])
    assert "joint" not in to_tree(plain)["sweep"]
    assert from_tree(to_tree(joint)).sweep.joint == (KEY,)
    assert from_tree(to_tree(plain)).sweep.joint == ()
