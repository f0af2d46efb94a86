"""Exponents along a ladder, what is promised of them, and what a broken promise points at."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import product

import pytest

from mupsweep.check.exponents import (
    DEPTH,
    WIDTH,
    WRONG_RULE,
    Coordinates,
    Point,
    Row,
    expected_exponents,
    family,
    fit,
    kind_of_blocks,
)
from mupsweep.check.measure import ATTENTION, CHANGE, FEATURES, LOGITS, UPDATE, WEIGHT
from mupsweep.errors import ConfigError
from mupsweep.scaling import Parametrization, Role
from mupsweep.schema import instantiate
from mupsweep.sweep import config

SIZES = (32, 64, 128, 256)
HALF = Fraction(1, 2)
ROLES = {"head.weight": Role.OUTPUT, "blocks.*.up.weight": Role.HIDDEN, "blocks.*.down.weight": Role.HIDDEN}


def parametrization(*overrides: str) -> Parametrization:
    return instantiate(config.load(overrides).variants[0].parametrization, "parametrization")


def powers(axis: str, exponents: dict[tuple[str, str], float], early: dict[tuple[str, str], float] | None = None,
           wobble: float = 0.0) -> list[Point]:  # fmt: skip
    """Points whose values are exact powers of the size after 10 steps, and others (`early`) after 2."""
    points = []
    for i, (size, seed) in enumerate(product(SIZES, (0, 1))):
        shake = 1 + wobble * (-1) ** (i // 2)

        def at(powers: dict[tuple[str, str], float], size: int = size, shake: float = shake) -> dict:
            return {key: 0.1 * size**power * shake for key, power in powers.items()}

        moved = {k: v for k, v in exponents.items() if k[0] != WEIGHT}
        starts = {k: v for k, v in exponents.items() if k[0] == WEIGHT}
        points.append(Point(axis, size, seed, {0: at(starts), 2: at(moved | (early or {})), 10: at(moved)}))
    return points


def coordinates(points: list[Point], *overrides: str) -> Coordinates:
    rule = parametrization(*overrides)
    promised = {axis: expected_exponents(rule, axis) for axis in (WIDTH, DEPTH)}
    return fit(("nanogpt", "adamw", rule.name), -8.0, points, ROLES, promised)


def rows(points: list[Point]) -> tuple[Row, ...]:
    return fit(("nanogpt", "adamw", "sp"), -8.0, points, ROLES, {}).rows


HEALTHY = {
    (CHANGE + FEATURES, ""): 0.0,
    (CHANGE + LOGITS, ""): 0.0,
    (UPDATE, "head.weight"): 1.0,
    (UPDATE, "blocks.0.up.weight"): 0.0,
    (UPDATE, "blocks.1.up.weight"): 0.0,
    (UPDATE, "blocks.0.down.weight"): 0.0,
    (WEIGHT, "head.weight"): 1.0,
    (WEIGHT, "blocks.0.up.weight"): 0.0,
}


# Expected exponents.

WEIGHTS_ALONG_WIDTH = {Role.OUTPUT: Fraction(1)}


@pytest.mark.parametrize(
    ("overrides", "axis", "hidden_update"),
    [
        (["parametrization=mup"], WIDTH, 0),
        (["parametrization=spectral"], WIDTH, 0),
        (["parametrization=spectral"], DEPTH, 0),
        (["parametrization=spectral", "parametrization.depth_exponent=3/4"], DEPTH, Fraction(-1, 4)),
        (["parametrization=depth_mup"], DEPTH, -HALF),
        (["parametrization=sp_per_layer"], WIDTH, 0),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else str(value),
)
def test_a_claim_is_a_promise_of_stable_coordinates_and_of_its_updates(
    overrides: list[str], axis: str, hidden_update: Fraction
) -> None:
    expectations = expected_exponents(parametrization(*overrides), axis)
    assert expectations[CHANGE + FEATURES, None] == expectations[CHANGE + LOGITS, None] == 0
    assert ((CHANGE + ATTENTION, None) in expectations) == (axis == WIDTH)
    assert expectations[UPDATE, Role.HIDDEN] == expectations[UPDATE, Role.HIDDEN_VECTOR] == hidden_update
    assert expectations[UPDATE, Role.INPUT] == expectations[UPDATE, Role.INPUT_VECTOR] == 0
    head = (1, 1) if axis == WIDTH else (0, 0)
    if overrides == ["parametrization=sp_per_layer"]:
        head = (0, HALF)  # no multiplier: the head moves by 1 and starts at sqrt(r_n)
    assert (expectations[UPDATE, Role.OUTPUT], expectations[WEIGHT, Role.OUTPUT]) == head


@pytest.mark.parametrize(
    ("overrides", "axis"),
    [
        (["parametrization=sp"], WIDTH),
        (["parametrization=sp"], DEPTH),
        (["parametrization=mup"], DEPTH),
        (["parametrization=sp_per_layer"], DEPTH),
        (["parametrization=sp_per_layer", "parametrization.alignment=none"], WIDTH),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else value,
)
def test_nothing_is_promised_where_features_may_grow(overrides: list[str], axis: str) -> None:
    assert expected_exponents(parametrization(*overrides), axis) == {}


# Rows.


def test_blocks_are_one_family_and_seeds_one_value() -> None:
    points = [
        Point(WIDTH, size, seed, {10: {(UPDATE, f"blocks.{i}.up.weight"): size * 2.0**seed * 4.0**i for i in (0, 1)}})
        for size, seed in product(SIZES, (0, 1))
    ]
    (row,) = rows(points)
    assert (row.tensor, row.role, row.sizes) == ("blocks.*.up.weight", Role.HIDDEN, SIZES)
    assert row.values[10] == pytest.approx([size * 2**0.5 * 2 for size in SIZES])
    assert row.final_exponent.value == pytest.approx(1)
    assert family("blocks.12.attention.0.weight") == "blocks.*.attention.*.weight"


def test_what_is_zero_at_a_size_has_no_exponent() -> None:
    points = [
        Point(WIDTH, n, 0, {0: {(WEIGHT, "head.weight"): 0.0}, 10: {(WEIGHT, "head.weight"): 1.0}}) for n in SIZES
    ]
    assert rows(points) == ()


def test_a_ladder_of_two_sizes_is_refused() -> None:
    points = [Point(DEPTH, n, 0, {10: {(CHANGE + LOGITS, ""): 1.0}}) for n in (2, 4)]
    with pytest.raises(ConfigError, match=r"2 sizes on the depth axis.*sweep\.depth_ratios=\[1,2,4,8\]"):
        rows(points)


def test_tensors_of_a_role_are_shown_as_their_mean() -> None:
    check = coordinates(powers(WIDTH, HEALTHY | {(UPDATE, "blocks.0.down.weight"): 0.5}), "parametrization=mup")
    hidden = check.row(WIDTH, UPDATE, Role.HIDDEN)
    assert hidden.final_exponent.value == pytest.approx(0.25)
    assert check.row(WIDTH, UPDATE, Role.OUTPUT).final_exponent.value == pytest.approx(1)


def test_a_size_that_diverges_leaves_the_counts_before_and_fails_what_promises() -> None:
    points = powers(WIDTH, HEALTHY)
    points[-1] = replace(points[-1], traced={c: v for c, v in points[-1].traced.items() if c < 10})
    for name, passes in (("mup", False), ("sp", True)):
        check = coordinates(points, f"parametrization={name}")
        assert check.diverged == ("width 256",)
        assert check.passed is passes
        assert {max(row.exponents) for row in check.rows if row.quantity != WEIGHT} == {2}
        assert "width 256 diverged: give a lower LR" in check.causes()[-1]


# Verdicts.


@pytest.mark.parametrize("overrides", [["parametrization=mup"], ["parametrization=spectral"]], ids=" ".join)
def test_promises_that_are_kept_pass(overrides: list[str]) -> None:
    check = coordinates(powers(WIDTH, HEALTHY), *overrides)
    assert check.passed
    assert check.causes() == []


@pytest.mark.parametrize(("exponent", "passes"), [(0.09, True), (-0.09, True), (0.11, False), (-0.11, False)])
def test_an_exponent_may_miss_by_a_tenth(exponent: float, passes: bool) -> None:
    check = coordinates(powers(WIDTH, HEALTHY | {(CHANGE + LOGITS, ""): exponent}), "parametrization=mup")
    assert check.passed is passes


def test_a_wide_interval_neither_passes_nor_fails() -> None:
    bent = HEALTHY | {(CHANGE + LOGITS, ""): 0.2}
    known = coordinates(powers(WIDTH, bent), "parametrization=mup")
    assert (known.failed, known.passed, known.inconclusive) == (True, False, [])
    unknown = coordinates(powers(WIDTH, bent, wobble=0.2), "parametrization=mup")
    assert (unknown.failed, unknown.passed) == (False, False)
    intervals = [row.final_exponent for row in unknown.inconclusive]
    assert len(intervals) == len([row for row in unknown.by_role(WIDTH) if row.expected is not None])
    assert min(exponent.high - exponent.low for exponent in intervals) > WRONG_RULE
    (line,) = unknown.causes()
    assert line.startswith("inconclusive, add sizes or seeds: ")
    assert "change of logits goes as width^+0.08 [-0.63, +0.79], promised 0" in line  # the wobble takes 0.12
    slightly = coordinates(powers(WIDTH, HEALTHY, wobble=0.02), "parametrization=mup")
    assert (slightly.failed, slightly.passed, slightly.inconclusive) == (False, True, [])


def test_no_multiplier_is_blamed_while_an_update_is_not_known() -> None:
    """Features that fall may follow from the updates of hidden matrices, whose interval holds a wrong rule."""
    broken = HEALTHY | {(CHANGE + FEATURES, ""): 0.8}
    unsteady = powers(WIDTH, {key: v for key, v in broken.items() if key[0] == UPDATE}, wobble=0.2)
    points = []
    for steady, other in zip(powers(WIDTH, broken), unsteady, strict=True):
        traced = {count: {**values, **other.traced.get(count, {})} for count, values in steady.traced.items()}
        points.append(replace(steady, traced=traced))
    (blamed,) = coordinates(powers(WIDTH, broken), "parametrization=mup").causes()
    assert "the multiplier on the residual branches" in blamed
    check = coordinates(points, "parametrization=mup")
    assert check.failed
    described, unknown = check.causes()
    assert described.startswith("change of features goes as width^+0.80")
    described_update = "||dW||_R of hidden tensors goes as width^-0.12 [-0.83, "
    assert unknown.startswith(f"inconclusive, add sizes or seeds: {described_update}")


def test_the_start_is_judged_for_weights_and_the_end_for_all_else() -> None:
    early = {(CHANGE + LOGITS, ""): 0.7}
    assert coordinates(powers(WIDTH, HEALTHY, early), "parametrization=mup").passed
    check = coordinates(powers(WIDTH, HEALTHY | {(WEIGHT, "blocks.0.up.weight"): 0.5}), "parametrization=mup")
    assert [(row.quantity, row.tensor) for row in check.violations] == [(WEIGHT, "blocks.*.up.weight")]


# Causes.


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        ({(UPDATE, "blocks.0.up.weight"): 1.0}, "hidden: its LR or eps does not fit its updates: ||dW||_R of blocks.*"),
        ({(UPDATE, "head.weight"): 0.0}, "output: its LR or eps does not fit its updates: ||dW||_R of head.weight"),
        ({(WEIGHT, "head.weight"): 0.0}, "output: its init std: ||W||_R of head.weight goes as width^+0.00"),
        ({(CHANGE + LOGITS, ""): -1.0}, "the multiplier on the logits: change of logits goes as width^-1.00"),
        (
            {(CHANGE + FEATURES, ""): 1.0, (CHANGE + LOGITS, ""): 1.0},
            "the multiplier on the residual branches: change of features goes as width^+1.00",
        ),
        ({(CHANGE + ATTENTION, ""): 0.5}, "the attention scale: change of attention logits goes as width^+0.50"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "+".join(f"{q} {n}".strip() for q, n in value),
)
def test_a_broken_promise_names_its_cause(broken: dict[tuple[str, str], float], expected: str) -> None:
    check = coordinates(powers(WIDTH, HEALTHY | broken), "parametrization=mup")
    (line,) = check.causes()
    assert expected in line
    assert not check.passed


def test_an_update_that_goes_astray_later_follows_from_a_multiplier() -> None:
    late = {(UPDATE, f"blocks.{i}.up.weight"): -0.5 for i in (0, 1)} | {(CHANGE + FEATURES, ""): 0.8}
    early = {(UPDATE, f"blocks.{i}.up.weight"): 0.0 for i in (0, 1)}
    (line,) = coordinates(powers(WIDTH, HEALTHY | late, early), "parametrization=mup").causes()
    assert "the multiplier on the residual branches" in line
    (line,) = coordinates(powers(WIDTH, HEALTHY | late), "parametrization=mup").causes()
    assert line.startswith("hidden: its LR")


def test_one_matrix_may_miss_by_more_than_its_role() -> None:
    key, other = (UPDATE, "blocks.0.up.weight"), (UPDATE, "blocks.0.down.weight")
    assert coordinates(powers(WIDTH, HEALTHY | {key: 0.19}), "parametrization=mup").passed
    assert not coordinates(powers(WIDTH, HEALTHY | {key: 0.19, other: 0.19}), "parametrization=mup").passed
    check = coordinates(powers(WIDTH, HEALTHY | {key: 0.5, other: -0.5}), "parametrization=mup")
    assert sorted(row.tensor for row in check.violations) == ["blocks.*.down.weight", "blocks.*.up.weight"]


def test_the_worst_miss_comes_first() -> None:
    broken = {(UPDATE, "blocks.0.up.weight"): 0.3, (UPDATE, "blocks.0.down.weight"): 0.6, (UPDATE, "head.weight"): 0.5}
    check = coordinates(powers(WIDTH, HEALTHY | broken), "parametrization=mup")
    assert [row.tensor for row in check.violations] == ["blocks.*.down.weight", "head.weight", "blocks.*.up.weight"]
    assert any("blocks.*.down.weight" in line and line.endswith("1 more of this role") for line in check.causes())


@pytest.mark.parametrize(
    ("exponent", "expected"),
    [(-0.5, "(k = 1)"), (-0.45, "(k = 1)"), (0.0, "(k >= 2)"), (-0.25, "as for no depth rule")],
)
def test_updates_of_hidden_matrices_tell_one_matrix_from_two(exponent: float, expected: str) -> None:
    hidden = {key: exponent for key in HEALTHY if key[0] == UPDATE and "blocks" in key[1]}
    check = coordinates(powers(DEPTH, HEALTHY | hidden), "parametrization=spectral")
    assert expected in str(kind_of_blocks(check))


def test_a_parametrization_without_a_depth_rule_has_no_kind_of_blocks() -> None:
    assert kind_of_blocks(coordinates(powers(DEPTH, HEALTHY), "parametrization=mup")) is None
