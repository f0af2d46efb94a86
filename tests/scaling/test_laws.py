"""Laws of combined optimizers, and of those that move a weight by a fraction of its norm."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from mupsweep.scaling import Monomial, Role, TensorSpec, UpdateLaw, numeric, symbolic
from mupsweep.scaling.laws import (
    ENTRYWISE,
    GRADIENT,
    SPECTRAL_NORMALISED,
    blocked,
    columns,
    entries,
    frobenius_normalised,
    match_rms_adamw,
    rows,
    spectral_ratio,
)
from mupsweep.scaling.monomial import ONE, R_N
from mupsweep.scaling.parametrizations.sp import PerLayer, Standard
from mupsweep.scaling.parametrizations.spectral import Spectral

REL = 1e-12  # a dozen float64 operations
SHAPES = [(64.0, 64.0), (100.0, 64.0), (1000.0, 300.0), (16.0, 4096.0)]
MUP = Spectral("mup", None)
ORTHOGONAL = UpdateLaw(full_rank=True)


def at(power: str) -> Monomial:
    return R_N ** Fraction(power)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("law", [UpdateLaw(), ENTRYWISE, UpdateLaw(blocks=rows)], ids=["whole", "entries", "rows"])
def test_blocks_that_hold_the_whole_matrix_change_nothing(law: UpdateLaw, shape: tuple[float, float]) -> None:
    assert blocked(law, (4096, 4096)).blocks(*shape) == law.blocks(*shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_of_one_entry_make_every_optimizer_entrywise(shape: tuple[float, float]) -> None:
    assert blocked(UpdateLaw(), (1, 1)).blocks(*shape) == entries(*shape)
    assert blocked(ENTRYWISE, (7, 7)).blocks(*shape) >= entries(*shape)  # a remainder counts as a whole block


@pytest.mark.parametrize(("size", "count"), [(512, 2 * 1), (300, 4 * 1), (299, 4 * 2), (128, 8 * 3)])
def test_blocks_are_counted_with_the_real_shape(size: int, count: int) -> None:
    assert blocked(UpdateLaw(), (size, size)).blocks(1000.0, 300.0) == count


def test_a_shape_factor_in_blocks_is_that_of_a_block() -> None:
    law = blocked(UpdateLaw(shape_factor=match_rms_adamw), (128, 128))
    assert law.shape_factor(1024.0, 512.0) == pytest.approx(0.2 * math.sqrt(128), rel=REL)
    assert law.shape_factor(R_N, R_N) == ONE
    tall = blocked(UpdateLaw(shape_factor=spectral_ratio), (128, 128))
    assert tall.shape_factor(1024.0, 32.0) == pytest.approx(2.0, rel=REL)


@pytest.mark.parametrize(
    "law", [UpdateLaw(), UpdateLaw(degree=Fraction(-1), eps_power=2)], ids=["degree 0", "degree -1"]
)
def test_blocks_of_a_fixed_size_turn_into_entries_as_the_width_grows(law: UpdateLaw) -> None:
    """Qiu, Table 1: with fixed blocks a matrix optimizer scales as its entry-wise relative."""
    entrywise = UpdateLaw(law.degree, entries, law.shape_factor, law.eps_power)
    for role in (Role.INPUT, Role.HIDDEN, Role.OUTPUT):
        assert symbolic(MUP, blocked(law, (128, 128)), role) == symbolic(MUP, entrywise, role)


@pytest.mark.parametrize(("untracked", "dims"), [(columns, (64.0, 1000.0)), (rows, (1000.0, 64.0))])
def test_one_sided_blocks_count_entries_of_the_untracked_axis(untracked, dims: tuple[float, float]) -> None:
    assert blocked(UpdateLaw(blocks=untracked), (50, 50)).blocks(*dims) == 2 * 20 * 50


def test_an_axis_that_is_left_whole_is_not_counted() -> None:
    assert blocked(UpdateLaw(), (50, None)).blocks(120.0, 1000.0) == 3
    assert blocked(UpdateLaw(), (None, 50)).blocks(120.0, 1000.0) == 20


@pytest.mark.parametrize(
    ("weight_norm", "hidden", "head"),
    [("spectral", "0", "0"), ("frobenius", "-1/2", "0")],
)
def test_an_update_in_proportion_to_the_weight(weight_norm: str, hidden: str, head: str) -> None:
    """LAMB: Gupta's rule takes ||W||_F for ||W||_2; of a Gaussian matrix it is sqrt(n) times that."""
    law = UpdateLaw(weight_norm=weight_norm)
    assert [symbolic(MUP, law, role).lr for role in (Role.INPUT, Role.HIDDEN, Role.OUTPUT)] == [
        ONE,
        at(hidden),
        at(head),
    ]


@pytest.mark.parametrize(("law", "hidden"), [(ENTRYWISE, "-1/2"), (GRADIENT, "-1/2"), (ORTHOGONAL, "0")])
def test_a_frobenius_normalised_update_depends_on_its_rank_alone(law: UpdateLaw, hidden: str) -> None:
    """Hyperball: ||A||_F = ||W||_F ~ sqrt(n); a full-rank update has ||A||_2 = ||A||_F / sqrt(n)."""
    normalised = frobenius_normalised(law)
    assert symbolic(MUP, normalised, Role.HIDDEN).lr == at(hidden)
    assert symbolic(MUP, normalised, Role.HIDDEN).eps == ONE
    assert normalised == frobenius_normalised(normalised)


@pytest.mark.parametrize("role", [Role.INPUT, Role.HIDDEN, Role.OUTPUT])
def test_a_spectrally_normalised_update_has_the_lr_of_what_is_promised(role: Role) -> None:
    """Qiu, section 3.2: the LR is not scaled; the head's raw weight in the multiplier form moves by r_n."""
    for form, head in (("init", ONE), ("multiplier", R_N)):
        rule = symbolic(Spectral("mup", None, form), SPECTRAL_NORMALISED, role)
        assert rule.lr == (head if role is Role.OUTPUT else ONE)


def test_a_law_may_differ_between_target_and_base_shape() -> None:
    """SOAP whose long axis is no longer rotated normalises it entry by entry: sqrt(n_in) times the update."""
    big, small = (TensorSpec("w", shape, Role.HIDDEN) for shape in ((256, 4096), (256, 256)))
    rule = numeric(MUP, UpdateLaw(blocks=columns), big, small, 1.0, 1.0, base_law=UpdateLaw())
    rms = math.sqrt((256 / 4096) / (256 / 256))
    assert rule.lr == pytest.approx(rms / math.sqrt(4096), rel=REL)


FORMS = [
    # Zheng: nothing scales; Qiu and torch: init std 1/sqrt(n_in); Everett: that, and Adam's LR 1/r_n but in the input
    (Standard(), {"std": ["0", "0", "0"], "lr": ["0", "0", "0"]}),
    (Standard("sp_fan_in", "fan_in"), {"std": ["0", "-1/2", "-1/2"], "lr": ["0", "0", "0"]}),
    (PerLayer(), {"std": ["0", "-1/2", "-1/2"], "lr": ["0", "-1", "-1"]}),
    (PerLayer("unaligned", "none"), {"std": ["0", "-1/2", "-1/2"], "lr": ["0", "-1/2", "-1/2"]}),
]


@pytest.mark.parametrize(("parametrization", "printed"), FORMS, ids=lambda form: getattr(form, "name", ""))
def test_the_published_meanings_of_sp(parametrization: Standard | PerLayer, printed: dict[str, list[str]]) -> None:
    for i, role in enumerate((Role.INPUT, Role.HIDDEN, Role.OUTPUT)):
        rule = symbolic(parametrization, ENTRYWISE, role)
        assert rule.multiplier == ONE
        assert (rule.init_std, rule.lr) == (at(printed["std"][i]), at(printed["lr"][i]))


@pytest.mark.parametrize("parametrization", [form for form, _ in FORMS], ids=lambda form: form.name)
def test_no_sp_depends_on_the_depth(parametrization: Standard | PerLayer) -> None:
    for role in Role:
        for law in (ENTRYWISE, GRADIENT, UpdateLaw()):
            rule = symbolic(parametrization, law, role)
            assert {rule.lr.depth, rule.init_std.depth, rule.eps.depth} == {0}
