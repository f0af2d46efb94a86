"""Monomials: exact exponents, how they print, and what they evaluate to."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mupsweep.scaling.monomial import ONE, R_L, R_N, Monomial, maximum, sqrt

exponents = st.fractions(min_value=-4, max_value=4, max_denominator=12)
monomials = st.builds(Monomial, exponents, exponents)
ratios = st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0, 16.0])


@given(monomials, monomials, monomials)
def test_products_form_an_abelian_group(a: Monomial, b: Monomial, c: Monomial) -> None:
    assert a * b == b * a
    assert (a * b) * c == a * (b * c)
    assert a * ONE == a
    assert a / a == ONE
    assert a / b == a * b**-1
    assert 1 / a == a**-1


@given(monomials, exponents, exponents)
def test_powers_multiply_exponents(a: Monomial, x: Fraction, y: Fraction) -> None:
    assert (a**x) ** y == a ** (x * y)
    assert a**x * a**y == a ** (x + y)
    assert a**0 == ONE


@given(monomials)
def test_sqrt_is_exact(a: Monomial) -> None:
    assert sqrt(a) * sqrt(a) == a


@given(monomials)
def test_constants_are_dropped(a: Monomial) -> None:
    assert 0.2 * a == a * 0.2 == a / 0.2 == a
    assert 0.2 / a == a**-1


@given(monomials, monomials, ratios, ratios)
def test_at_is_a_homomorphism(a: Monomial, b: Monomial, r_n: float, r_L: float) -> None:  # noqa: N803
    assert (a * b).at(r_n, r_L) == pytest.approx(a.at(r_n, r_L) * b.at(r_n, r_L), rel=1e-12)


@given(monomials)
def test_at_the_base_is_exactly_one(a: Monomial) -> None:
    assert a.at(1.0, 1.0) == 1.0


@pytest.mark.parametrize(
    ("monomial", "r_n", "r_L", "value"),
    [
        (ONE, 8, 32, 1.0),
        (R_N, 8, 32, 8.0),
        (R_L, 8, 32, 32.0),
        (R_N**-2 * R_L, 8, 32, 0.5),
        (R_N ** Fraction(-1, 2), 16, 32, 0.25),
        (R_N ** Fraction(3, 2) / R_L**2, 4, 2, 2.0),
    ],
    ids=str,
)
def test_at_evaluates(monomial: Monomial, r_n: float, r_L: float, value: float) -> None:  # noqa: N803
    assert monomial.at(r_n, r_L) == value


@pytest.mark.parametrize(
    ("monomial", "text", "machine"),
    [
        (ONE, "1", {"r_n": "0", "r_L": "0"}),
        (R_N, "r_n", {"r_n": "1", "r_L": "0"}),
        (R_L**-1, "r_L^-1", {"r_n": "0", "r_L": "-1"}),
        (R_N ** Fraction(-1, 2) * R_L, "r_n^-1/2 r_L", {"r_n": "-1/2", "r_L": "1"}),
        (R_N**2 * R_L ** Fraction(-3, 4), "r_n^2 r_L^-3/4", {"r_n": "2", "r_L": "-3/4"}),
        (R_N**-0.5, "r_n^-1/2", {"r_n": "-1/2", "r_L": "0"}),
    ],
    ids=str,
)
def test_prints_for_people_and_for_machines(monomial: Monomial, text: str, machine: dict[str, str]) -> None:
    assert str(monomial) == text
    assert monomial.exponents == machine


@given(monomials)
def test_exponents_give_the_monomial_back(a: Monomial) -> None:
    assert Monomial(Fraction(a.exponents["r_n"]), Fraction(a.exponents["r_L"])) == a


@given(monomials, monomials)
def test_the_text_identifies_the_monomial(a: Monomial, b: Monomial) -> None:
    assert (str(a) == str(b)) == (a == b)


def test_maximum_of_monomials_is_the_one_that_wins_as_the_width_grows() -> None:
    assert maximum(R_N, ONE) == maximum(ONE, R_N) == R_N
    assert maximum(R_N**-1, 1.0) == maximum(1.0, R_N**-1) == ONE
    assert maximum(R_N, R_N) == R_N


def test_maximum_and_sqrt_of_numbers_are_the_usual_ones() -> None:
    assert maximum(2.0, 3.0) == maximum(3.0, 2.0) == 3.0
    assert sqrt(9.0) == 3.0
