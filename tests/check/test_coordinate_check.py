"""The coordinate check of real runs: right rules pass, and every planted bug is found and named.

Bugs are planted where a run is built, in its rules or its multipliers; the check itself is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from mupsweep.check import coordinate_check
from mupsweep.check.exponents import DEPTH, TOLERANCE, WIDTH, Coordinates
from mupsweep.check.measure import ATTENTION, CHANGE, FEATURES, LOGITS, UPDATE, WEIGHT
from mupsweep.errors import ConfigError
from mupsweep.models import Multipliers
from mupsweep.models.shape import Size
from mupsweep.scaling import Role
from mupsweep.sweep import tensor_rules
from mupsweep.sweep.config import SweepConfig
from mupsweep.sweep.run_spec import ResolvedVariant
from mupsweep.sweep.tensor_rules import TensorRule
from mupsweep.training import build

LRS = {"adamw": -9, "sgd": -4, "muon": -5}  # what `suitable_log2_lr` finds
every_optimizer = pytest.mark.parametrize(
    "optimizer", ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sgd", "muon"))]
)
ALONG_WIDTH = ("sweep.depth_ratios=[1]",)
ALONG_DEPTH = ("sweep.width_ratios=[1]",)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def chosen(*overrides: str, optimizer: str = "adamw") -> SweepConfig:
    """A small check: width 16, one seed, a given LR."""
    small = ("model.width=16", "sweep.seeds=[0]", f"sweep.log2_lrs=[{LRS[optimizer]}]", f"optimizer={optimizer}")
    return coordinate_check.load([*small, *overrides], None)


def checked(*overrides: str, optimizer: str = "adamw") -> dict[str, Coordinates]:
    """By parametrization, without SP."""
    config = chosen(*overrides, optimizer=optimizer)
    found = [coordinate_check.coordinates_of(variant, config.sweep, LRS[optimizer]) for variant in config.variants[1:]]
    return {one.label[2]: one for one in found}


@cache
def healthy(optimizer: str) -> dict[str, Coordinates]:
    """Without a bug, at the sizes that the command takes."""
    overrides = (f"optimizer={optimizer}", f"sweep.log2_lrs=[{LRS[optimizer]}]", "sweep.seeds=[0]")
    return {one.label[2]: one for one in coordinate_check.check(coordinate_check.load([*overrides], None))}


@every_optimizer
def test_what_the_rules_promise_is_measured(optimizer: str) -> None:
    made = healthy(optimizer)["spectral"]
    assert not made.failed, made.causes()
    # with one seed alone, attention logits of a few widths may be all that is not known, and SGD's updates of the input
    unsure = [row for row in made.inconclusive if row.role not in (Role.INPUT, Role.INPUT_VECTOR)]
    assert {row.quantity for row in unsure} <= {CHANGE + ATTENTION}
    for axis in (WIDTH, DEPTH):
        assert made.has_expectation(axis)
        for quantity in (CHANGE + FEATURES, CHANGE + LOGITS):
            assert abs(made.row(axis, quantity).final_exponent.value) < TOLERANCE
        assert abs(made.row(axis, UPDATE, Role.HIDDEN).final_exponent.value) < TOLERANCE
    assert made.row(WIDTH, UPDATE, Role.OUTPUT).final_exponent.value == pytest.approx(1, abs=TOLERANCE)


@every_optimizer
def test_sp_grows_with_width_and_depth_and_promises_nothing(optimizer: str) -> None:
    made = healthy(optimizer)["sp"]
    assert made.passed
    assert not made.has_expectation(WIDTH)
    assert made.row(WIDTH, CHANGE + FEATURES).final_exponent.low > TOLERANCE
    assert made.row(WIDTH, CHANGE + LOGITS).final_exponent.low > TOLERANCE
    assert made.row(DEPTH, CHANGE + FEATURES).final_exponent.low > TOLERANCE


def test_both_kinds_of_blocks_are_flat_and_told_apart_by_their_updates() -> None:
    coordinates_by_name = checked("parametrization=depth_mup,spectral", *ALONG_DEPTH)
    for name, exponent in (("depth_mup", -0.5), ("spectral", 0.0)):
        assert not coordinates_by_name[name].failed, coordinates_by_name[name].causes()
        assert coordinates_by_name[name].row(DEPTH, UPDATE, Role.HIDDEN).final_exponent.value == pytest.approx(
            exponent, abs=TOLERANCE
        )


# Planted bugs.

Alter = Callable[[TensorRule], TensorRule]


def plant(monkeypatch: pytest.MonkeyPatch, alter: Alter) -> None:
    """Every rule that runs are built from, altered."""
    right = tensor_rules.rules

    def wrong(resolved: ResolvedVariant, size: Size, base_lr: float) -> tuple[TensorRule, ...]:
        return tuple(alter(row) for row in right(resolved, size, base_lr))

    monkeypatch.setattr(build, "rules", wrong)


def of(role: Role, alter: Alter) -> Alter:
    return lambda row: alter(row) if row.role is role else row


def dropped_lr_rule(row: TensorRule) -> TensorRule:
    return replace(row, lr=row.lr / row.lr_ratio)


def dropped_init_rule(row: TensorRule) -> TensorRule:
    return replace(row, init_std=row.init_std / row.init_var_ratio**0.5)


def init_of_another_form(row: TensorRule) -> TensorRule:
    """The head's variance falls as in the form without a multiplier, which stays."""
    return replace(row, init_std=row.init_std / row.shape[1])


def swapped_shapes(row: TensorRule) -> TensorRule:
    """Base and target exchanged: every ratio is its inverse."""
    return replace(
        row,
        init_std=row.init_std / row.init_var_ratio,
        lr=row.lr / row.lr_ratio**2,
        eps=row.eps / row.eps_ratio**2,
    )


def large_eps(row: TensorRule) -> TensorRule:
    return replace(row, eps=1e-2)


BUGS = {
    "dropped LR rule": (of(Role.HIDDEN, dropped_lr_rule), "adamw", (UPDATE, Role.HIDDEN)),
    "dropped LR rule of a head": (of(Role.OUTPUT, dropped_lr_rule), "sgd", (UPDATE, Role.OUTPUT)),
    "dropped LR rule of embeddings": (of(Role.INPUT, dropped_lr_rule), "sgd", (UPDATE, Role.INPUT)),
    "dropped init rule": (of(Role.HIDDEN, dropped_init_rule), "adamw", (WEIGHT, Role.HIDDEN)),
    "init of another form": (of(Role.OUTPUT, init_of_another_form), "adamw", (WEIGHT, Role.OUTPUT)),
    "eps far too large": (of(Role.HIDDEN, large_eps), "adamw", (UPDATE, Role.HIDDEN)),
    "swapped base and target": (swapped_shapes, "adamw", (UPDATE, Role.HIDDEN)),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_wrong_rule_is_found_and_its_tensor_named(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alter, optimizer, (quantity, role) = BUGS[bug]
    plant(monkeypatch, alter)
    made = checked("parametrization=mup", *ALONG_WIDTH, optimizer=optimizer)["mup"]
    assert not made.passed
    worst = next(row for row in made.violations if row.quantity in (UPDATE, WEIGHT))
    assert (worst.quantity, worst.role) == (quantity, role)
    assert any(line.startswith(f"{role.value}: ") and worst.tensor in line for line in made.causes()), made.causes()


@pytest.mark.parametrize("matrix", ["mlp.up", "attention.value"])
def test_one_wrong_matrix_among_many_is_named(matrix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, lambda row: dropped_lr_rule(row) if matrix in row.name else row)
    made = checked("parametrization=mup", *ALONG_WIDTH)["mup"]
    updates = [row for row in made.violations if row.quantity == UPDATE]
    assert updates[0].tensor == f"blocks.*.{matrix}.weight"


MULTIPLIERS: dict[str, tuple[Callable[[Multipliers, ResolvedVariant], Multipliers], tuple[str, ...], str, str]] = {
    "logits twice": (
        lambda m, _: replace(m, output=m.output**2),
        ALONG_WIDTH,
        CHANGE + LOGITS,
        "the multiplier on the logits",
    ),
    "logits never": (
        lambda m, _: replace(m, output=1.0),
        ALONG_WIDTH,
        CHANGE + LOGITS,
        "the multiplier on the logits",
    ),
    "branches twice": (
        lambda m, resolved: replace(m, block=m.block**2 / resolved.model.block_multiplier),
        ALONG_DEPTH,
        CHANGE + FEATURES,
        "the multiplier on the residual branches",
    ),
    "branches never": (
        lambda m, resolved: replace(m, block=resolved.model.block_multiplier),
        ALONG_DEPTH,
        CHANGE + FEATURES,
        "the multiplier on the residual branches",
    ),
}


@pytest.mark.parametrize(
    "bug", [pytest.param(bug, marks=pytest.mark.slow if bug.endswith("never") else ()) for bug in MULTIPLIERS]
)
def test_a_wrong_multiplier_is_found_and_named(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alter, ladder, quantity, message = MULTIPLIERS[bug]
    right = tensor_rules.multipliers
    monkeypatch.setattr(build, "multipliers", lambda resolved, size: alter(right(resolved, size), resolved))
    made = checked("parametrization=spectral", "sweep.seeds=[0,1,2]", *ladder)["spectral"]
    assert quantity in [row.quantity for row in made.violations]
    (line,) = made.causes()
    assert message in line


# Settings.


def test_sp_stands_beside_what_is_asked_for_and_small_models_are_taken() -> None:
    config = coordinate_check.load(["optimizer=muon"], None)
    assert [v.parametrization["name"] for v in config.variants] == ["sp", "spectral"]
    assert config.variants[0].model["width"] == 32
    config = coordinate_check.load(["parametrization=mup,sp", "experiment=smoke"], None)
    assert [v.parametrization["name"] for v in config.variants] == ["sp", "mup"]
    assert config.variants[0].model["width"] == 16


def test_the_lr_that_is_found_moves_the_logits_of_the_base() -> None:
    config = chosen("parametrization=mup")
    found = coordinate_check.suitable_log2_lr(config.variants[0])
    moved = []
    for log2_lr in (found - 1, found):
        grid = replace(config.sweep, width_ratios=(1.0,), depth_ratios=(1.0,), log2_lrs=(log2_lr,))
        (run,) = coordinate_check.runs_of(config.variants[0], grid)
        moved.append(coordinate_check.measure(coordinate_check.subject(run), (10,))[10][CHANGE + LOGITS, ""])
    assert moved[0] < coordinate_check.MOVED <= moved[1]


def test_the_middle_of_given_lrs_is_taken() -> None:
    config = chosen("parametrization=sp", *ALONG_WIDTH, "sweep.width_ratios=[1,2,4]")
    (one,) = coordinate_check.check(config)
    assert one.log2_lr == LRS["adamw"]


def test_one_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"one width and one depth: give sweep\.width_ratios"):
        list(coordinate_check.check(chosen(*ALONG_WIDTH, *ALONG_DEPTH)))
