"""The solver: what must hold for every law, role and parametrization, beyond the published tables."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mupsweep.errors import ConfigError
from mupsweep.scaling import (
    WEIGHT_DECAY_RULES,
    Parametrization,
    Role,
    RoleScaling,
    Rule,
    TensorSpec,
    UpdateLaw,
    numeric,
    symbolic,
)
from mupsweep.scaling.laws import ENTRYWISE, GRADIENT, entries, jordan, match_rms_adamw, one, spectral_ratio
from mupsweep.scaling.monomial import ONE, R_N, Monomial, sqrt
from mupsweep.scaling.parametrizations.parametrization import OUTPUT_FORMS
from mupsweep.scaling.parametrizations.sp import Standard
from mupsweep.scaling.parametrizations.spectral import Spectral

REL = 1e-12  # a dozen float64 operations

MONOMIAL_LAWS = {
    "sgd": GRADIENT,
    "adamw": ENTRYWISE,
    "lion": UpdateLaw(blocks=entries, eps_power=None),
    "muon": UpdateLaw(),
    "muon_bernstein": UpdateLaw(shape_factor=spectral_ratio),
    "shampoo": UpdateLaw(eps_power=2),
    "shampoo2": UpdateLaw(degree=Fraction(-1), eps_power=2),
    "shampoo2_blocks": UpdateLaw(degree=Fraction(-1), blocks=entries, eps_power=2),
    "shampoo_one_side": UpdateLaw(degree=Fraction(1, 2), eps_power=2),
    "row_norm": UpdateLaw(blocks=lambda n_out, n_in: n_out),
}
MAX_LAWS = {
    "muon_kimi": UpdateLaw(shape_factor=match_rms_adamw),
    "muon_jordan": UpdateLaw(shape_factor=jordan),
}


def blocks_of(size: int) -> Callable[[float, float], float]:
    """Square blocks of a fixed size, the last of an axis smaller."""
    return lambda n_out, n_in: math.ceil(n_out / size) * math.ceil(n_in / size)


NUMERIC_LAWS = {
    "soap_block_128": UpdateLaw(blocks=blocks_of(128)),
    "shampoo2_block_512": UpdateLaw(degree=Fraction(-1), blocks=blocks_of(512), eps_power=2),
}
SYMBOLIC_LAWS = MONOMIAL_LAWS | MAX_LAWS
LAWS = SYMBOLIC_LAWS | NUMERIC_LAWS

DEPTHS = [None, "0", "1/2", "3/4", "1"]
SPECTRAL = [
    Spectral(f"a={depth},{output},{rule}", depth, output, rule)
    for depth in DEPTHS
    for output in OUTPUT_FORMS
    for rule in WEIGHT_DECAY_RULES
]
PARAMETRIZATIONS: list[Parametrization] = [Standard(), *SPECTRAL]

some_law = st.sampled_from(sorted(LAWS)).map(LAWS.__getitem__)
some_symbolic_law = st.sampled_from(sorted(SYMBOLIC_LAWS)).map(SYMBOLIC_LAWS.__getitem__)
some_monomial_law = st.sampled_from(sorted(MONOMIAL_LAWS)).map(MONOMIAL_LAWS.__getitem__)
some_role = st.sampled_from(Role)
some_spectral = st.sampled_from(SPECTRAL)
depth_exponent = st.fractions(min_value=0, max_value=1, max_denominator=8)
ratio = st.floats(min_value=0.1, max_value=64)


def spec(role: Role, n_out: int, n_in: int) -> TensorSpec:
    """A tensor of this role, stored as its module stores it: an embedding has a row per token."""
    stored = {Role.INPUT: (n_in, n_out), Role.INPUT_VECTOR: (n_out,), Role.HIDDEN_VECTOR: (n_out,)}
    return TensorSpec("tensor", stored.get(role, (n_out, n_in)), role)


def scaled(role: Role, width: int, fixed: int) -> TensorSpec:
    """A tensor whose growing dimensions are `width` and whose others are `fixed`."""
    grows_out, grows_in = role.grows
    return spec(role, width if grows_out else fixed, width if grows_in else fixed)


def close(a: Rule, b: Rule) -> bool:
    return astuple(a) == pytest.approx(astuple(b), rel=REL)


def evaluated(rule: Rule, r_n: float, r_L: float) -> Rule:  # noqa: N803
    """A symbolic rule at numbers."""
    return Rule(*(entry.at(r_n, r_L) for entry in symbols(rule)))


def symbols(rule: Rule) -> list[Monomial]:
    return [rule.multiplier, rule.init_std, rule.lr, rule.weight_decay, rule.eps]


def test_dims_read_an_embedding_as_the_matrix_it_stands_for() -> None:
    assert spec(Role.INPUT, 256, 50_304).shape == (50_304, 256)
    assert [spec(role, 256, 512).dims for role in Role] == [(256, 512)] * 3 + [(256, 1)] * 2 + [(256, 512)]


@given(st.sampled_from(PARAMETRIZATIONS), some_law, some_role, st.integers(1, 200_000), st.integers(1, 200_000))
def test_base_shape_is_a_fixed_point(
    parametrization: Parametrization, law: UpdateLaw, role: Role, n_out: int, n_in: int
) -> None:
    base = spec(role, n_out, n_in)
    assert numeric(parametrization, law, base, base, 1.0, 1.0) == Rule(1.0, 1.0, 1.0, 1.0, 1.0)


@given(some_law, some_role, st.integers(1, 5000), st.integers(1, 5000), ratio, ratio)
def test_standard_parametrization_scales_nothing(
    law: UpdateLaw,
    role: Role,
    n_out: int,
    n_in: int,
    r_n: float,
    r_L: float,  # noqa: N803
) -> None:
    rule = numeric(Standard(), law, spec(role, n_out, n_in), spec(role, 64, 64), r_n, r_L)
    assert rule == Rule(1.0, 1.0, 1.0, 1.0, 1.0)


@given(
    some_spectral,
    some_monomial_law,
    some_role,
    st.integers(1, 512),
    st.integers(1, 64),
    st.integers(1, 60_000),
    ratio,
)
def test_numbers_agree_with_symbols_where_shapes_scale_exactly(
    parametrization: Spectral,
    law: UpdateLaw,
    role: Role,
    width: int,
    r_n: int,
    fixed: int,
    r_L: float,  # noqa: N803
) -> None:
    target, base = scaled(role, width * r_n, fixed), scaled(role, width, fixed)
    numbers = numeric(parametrization, law, target, base, r_n, r_L)
    assert close(numbers, evaluated(symbolic(parametrization, law, role), r_n, r_L))


@pytest.mark.parametrize("law", MAX_LAWS)
@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (1, 4), (3, 1)], ids=str)
def test_a_law_with_a_maximum_agrees_with_its_symbols_on_hidden_matrices(law: str, shape: tuple[int, int]) -> None:
    out, in_ = shape
    parametrization = Spectral("spectral")
    numbers = numeric(
        parametrization,
        MAX_LAWS[law],
        spec(Role.HIDDEN, 1024 * out, 1024 * in_),
        spec(Role.HIDDEN, 256 * out, 256 * in_),
        4,
        8,
    )
    assert close(numbers, evaluated(symbolic(parametrization, MAX_LAWS[law], Role.HIDDEN), 4, 8))


@pytest.mark.parametrize(
    ("law", "role", "real", "symbol"),
    [
        # max(n_out, n_in) is the vocabulary: Kimi's factor is a constant, so the rows are plain Muon's.
        ("muon_kimi", Role.INPUT, 2.0, "1"),
        ("muon_kimi", Role.OUTPUT, 2.0, "1"),
        # max(1, n_out / n_in): an embedding never gets the factor, a head always does, as in Bernstein's.
        ("muon_jordan", Role.INPUT, 2.0, "1"),
        ("muon_jordan", Role.OUTPUT, 4.0, "r_n^1/2"),
    ],
)
def test_a_vocabulary_wider_than_the_model_decides_a_maximum(law: str, role: Role, real: float, symbol: str) -> None:
    parametrization = Spectral("spectral")
    target, base = scaled(role, 1024, 50_304), scaled(role, 256, 50_304)
    assert numeric(parametrization, MAX_LAWS[law], target, base, 4, 1).lr == pytest.approx(real, rel=REL)
    assert str(symbolic(parametrization, MAX_LAWS[law], role).lr) == symbol


@pytest.mark.parametrize("law", MAX_LAWS)
@pytest.mark.parametrize("role", [Role.INPUT, Role.OUTPUT])
def test_symbols_of_a_maximum_hold_for_models_wider_than_the_vocabulary(law: str, role: Role) -> None:
    parametrization = Spectral("spectral")
    numbers = numeric(parametrization, MAX_LAWS[law], scaled(role, 1024, 65), scaled(role, 256, 65), 4, 8)
    assert close(numbers, evaluated(symbolic(parametrization, MAX_LAWS[law], role), 4, 8))


@given(some_spectral.filter(lambda p: p.output == "multiplier"), some_symbolic_law)
def test_both_output_forms_are_the_same_function(form: Spectral, law: UpdateLaw) -> None:
    other = Spectral(form.name, form.depth_exponent, "init", form.weight_decay_rule)
    a, b = symbolic(form, law, Role.OUTPUT), symbolic(other, law, Role.OUTPUT)
    assert b.multiplier == ONE
    assert a.multiplier * a.init_std == b.init_std
    # The raw gradient carries the multiplier, the update its power degree, the logits one more.
    assert a.multiplier ** (1 + law.degree) * a.lr == b.lr
    if law.eps_power is not None:
        assert a.eps == a.multiplier**law.eps_power * b.eps
    if form.weight_decay_rule != "unscaled":
        assert a.lr * a.weight_decay == b.lr * b.weight_decay


def test_both_output_forms_change_the_logits_alike_under_adamw() -> None:
    target, base = spec(Role.OUTPUT, 50_304, 2048), spec(Role.OUTPUT, 50_304, 256)
    rules = [numeric(Spectral("mup", None, form), ENTRYWISE, target, base, 8, 1) for form in OUTPUT_FORMS]
    assert [rule.multiplier for rule in rules] == [1 / 8, 1.0]
    assert [rule.multiplier * rule.lr for rule in rules] == pytest.approx([1 / 8, 1 / 8], rel=REL)
    assert [rule.multiplier * rule.init_std for rule in rules] == pytest.approx([1 / 8, 1 / 8], rel=REL)
    assert [rule.lr * rule.weight_decay for rule in rules] == pytest.approx([1.0, 1.0], rel=REL)


@given(depth_exponent, st.sampled_from(OUTPUT_FORMS), some_symbolic_law, some_role)
def test_weight_decay_rules(a: Fraction, output: str, law: UpdateLaw, role: Role) -> None:
    rules = {name: symbolic(Spectral(name, str(a), output, name), law, role) for name in WEIGHT_DECAY_RULES}
    scaling = Spectral("spectral", str(a), output).role_scalings()[role]
    assert isinstance(scaling, RoleScaling)
    for name in ("coupled_constant", "independent", "timescale"):
        assert rules[name].lr * rules[name].weight_decay == scaling.update / scaling.weight
    assert rules["inverse_width"].weight_decay == rules["independent"].weight_decay / R_N
    assert rules["sqrt_width"].weight_decay == rules["coupled_constant"].weight_decay / sqrt(R_N)
    assert rules["unscaled"].weight_decay == ONE
    assert len(rules) == 6


@pytest.mark.parametrize("rule", WEIGHT_DECAY_RULES)
@pytest.mark.parametrize("parametrization", SPECTRAL, ids=lambda p: p.name)
def test_the_weight_decay_rule_moves_nothing_else(parametrization: Spectral, rule: str) -> None:
    other = Spectral("other", parametrization.depth_exponent, parametrization.output, rule)
    for role in Role:
        a, b = symbolic(parametrization, ENTRYWISE, role), symbolic(other, ENTRYWISE, role)
        assert (a.multiplier, a.init_std, a.lr, a.eps) == (b.multiplier, b.init_std, b.lr, b.eps)


@given(depth_exponent, st.sampled_from(OUTPUT_FORMS))
def test_every_role_spends_its_loss_share_at_any_depth_exponent(a: Fraction, output: str) -> None:
    for scaling in Spectral("family", str(a), output).role_scalings().values():
        assert isinstance(scaling, RoleScaling)
        assert scaling.multiplier * scaling.update == scaling.loss_share


@given(depth_exponent, st.sampled_from(OUTPUT_FORMS), some_symbolic_law, some_role, ratio)
def test_width_only_mup_is_the_depth_family_at_depth_ratio_one(
    a: Fraction, output: str, law: UpdateLaw, role: Role, r_n: float
) -> None:
    width_only = symbolic(Spectral("mup", None, output), law, role)
    family = symbolic(Spectral("family", str(a), output), law, role)
    assert [m.width for m in symbols(width_only)] == [m.width for m in symbols(family)]
    assert close(evaluated(width_only, r_n, 1.0), evaluated(family, r_n, 1.0))


@given(some_law, some_role, st.integers(1, 4096), st.integers(1, 4096), ratio)
def test_width_only_mup_leaves_depth_alone(
    law: UpdateLaw,
    role: Role,
    n_out: int,
    n_in: int,
    r_L: float,  # noqa: N803
) -> None:
    mup, target, base = Spectral("mup", None), spec(role, n_out, n_in), spec(role, 64, 64)
    assert numeric(mup, law, target, base, 2.0, r_L) == numeric(mup, law, target, base, 2.0, 1.0)


@given(some_spectral, some_symbolic_law)
def test_depth_moves_only_tensors_inside_the_blocks(parametrization: Spectral, law: UpdateLaw) -> None:
    for role in (Role.INPUT, Role.OUTPUT, Role.INPUT_VECTOR):
        assert {m.depth for m in symbols(symbolic(parametrization, law, role))} == {0}


@given(
    some_spectral,
    some_symbolic_law,
    st.sampled_from([(4, 1), (1, 4), (3, 1), (1, 2), (8, 3)]),
    st.integers(1, 64),
    ratio,
)
def test_constants_of_ffn_and_grouped_queries_cancel(
    parametrization: Spectral,
    law: UpdateLaw,
    shape: tuple[int, int],
    r_n: int,
    r_L: float,  # noqa: N803
) -> None:
    def hidden(out: int, in_: int) -> Rule:
        target, base = (
            spec(Role.HIDDEN, 64 * r_n * out, 64 * r_n * in_),
            spec(Role.HIDDEN, 64 * out, 64 * in_),
        )
        return numeric(parametrization, law, target, base, r_n, r_L)

    assert close(hidden(*shape), hidden(1, 1))


@pytest.mark.parametrize(
    ("target", "base", "size", "blocks"),
    [
        ((1024, 1024), (256, 256), 128, (8 * 8, 2 * 2)),
        ((700, 700), (256, 256), 128, (6 * 6, 2 * 2)),
        ((1280, 1280), (320, 320), 512, (3 * 3, 1 * 1)),
        ((1400, 350), (400, 100), 128, (11 * 3, 4 * 1)),
        ((512, 512), (128, 128), 512, (1 * 1, 1 * 1)),
    ],
)
def test_block_counts_are_those_of_the_real_shapes(
    target: tuple[int, int], base: tuple[int, int], size: int, blocks: tuple[int, int]
) -> None:
    """SOAP on square blocks: lr and eps fall as the root of the count; a smaller last block counts as one."""
    law, r_n = UpdateLaw(blocks=blocks_of(size)), target[0] / base[0]
    rule = numeric(Spectral("mup", None), law, spec(Role.HIDDEN, *target), spec(Role.HIDDEN, *base), r_n, 1.0)
    expected = math.sqrt(blocks[1] / blocks[0])
    assert rule.lr == pytest.approx(expected, rel=REL)
    assert rule.eps == pytest.approx(expected, rel=REL)
    assert rule.weight_decay == pytest.approx(1 / expected, rel=REL)


@given(some_symbolic_law.filter(lambda law: law.degree == 0), some_role, ratio)
def test_a_normalised_update_does_not_feel_the_loss_share(law: UpdateLaw, role: Role, r_L: float) -> None:  # noqa: N803
    """At a = 1 every layer updates by Theta(1): without the gradient's size, depth cannot enter the LR."""
    assert symbolic(Spectral("spectral", "1"), law, role).lr.at(1.0, r_L) == 1.0


@given(some_spectral, some_role)
def test_one_block_per_entry_makes_muon_adam(parametrization: Spectral, role: Role) -> None:
    assert symbolic(parametrization, UpdateLaw(blocks=entries), role) == symbolic(parametrization, ENTRYWISE, role)


@given(some_spectral, some_role)
def test_laws_without_eps_leave_eps_alone(parametrization: Spectral, role: Role) -> None:
    assert symbolic(parametrization, GRADIENT, role).eps == ONE
    assert numeric(parametrization, GRADIENT, scaled(role, 512, 64), scaled(role, 64, 64), 8, 2).eps == 1.0


def test_the_base_law_is_one_block_of_degree_zero() -> None:
    assert UpdateLaw() == UpdateLaw(degree=Fraction(0), blocks=one, shape_factor=one, eps_power=1)


@pytest.mark.parametrize(("law", "lr"), [(ENTRYWISE, R_N ** Fraction(-1, 2)), (GRADIENT, R_N ** Fraction(1, 2))])
def test_embeddings_of_a_large_vocabulary_take_steps_that_fall_as_the_root_of_the_width(
    law: UpdateLaw, lr: Monomial
) -> None:
    """Hayou and Liu (2506.15025): LR of embeddings / LR of hidden matrices as sqrt(width) under AdamW, not as width."""
    usual, large = (Spectral("mup", None, embedding_exponent=exponent) for exponent in ("0", "-1/2"))
    assert symbolic(large, law, Role.INPUT).lr == lr
    assert symbolic(large, law, Role.INPUT).eps == symbolic(usual, law, Role.INPUT).eps
    for role in set(Role) - {Role.INPUT}:
        assert symbolic(large, law, role) == symbolic(usual, law, role)
    with pytest.raises(ConfigError, match=r"parametrization\.embedding_exponent=-2: expected a fraction from -1 to 0"):
        Spectral("mup", None, embedding_exponent="-2")


@pytest.mark.parametrize("exponent", ["2", "-1/2", "deep", "1/0"])
def test_a_depth_exponent_outside_the_family_is_refused(exponent: str) -> None:
    with pytest.raises(ConfigError, match="depth_exponent"):
        Spectral("spectral", exponent)


@pytest.mark.parametrize("key", ["output", "weight_decay_rule"])
def test_an_unknown_option_is_refused_with_the_valid_ones(key: str) -> None:
    with pytest.raises(ConfigError, match=f"parametrization.{key}=no.*valid: "):
        Spectral("spectral", **{key: "no"})
