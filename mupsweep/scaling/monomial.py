"""Monomials r_n^x r_L^y: what every rule is, as exact exponents of the width and the depth ratio."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar, cast


@dataclass(frozen=True)
class Monomial:
    """r_n ** width * r_L ** depth. Constants are dropped: they cancel in a ratio of target to base."""

    width: Fraction = Fraction(0)
    depth: Fraction = Fraction(0)

    def __mul__(self, other: Monomial | float) -> Monomial:
        if not isinstance(other, Monomial):
            return self
        return Monomial(self.width + other.width, self.depth + other.depth)

    __rmul__ = __mul__

    def __truediv__(self, other: Monomial | float) -> Monomial:
        return self * other**-1 if isinstance(other, Monomial) else self

    def __rtruediv__(self, other: float) -> Monomial:
        return self**-1

    def __pow__(self, power: Fraction | float) -> Monomial:
        exact = Fraction(power)
        return Monomial(self.width * exact, self.depth * exact)

    def at(self, r_n: float, r_L: float) -> float:  # noqa: N803
        """The value at width ratio `r_n` and depth ratio `r_L`."""
        return float(r_n) ** float(self.width) * float(r_L) ** float(self.depth)

    def __str__(self) -> str:
        parts = [_power("r_n", self.width), _power("r_L", self.depth)]
        return " ".join(p for p in parts if p) or "1"

    @property
    def exponents(self) -> dict[str, str]:
        """Exact exponents for machines: {"r_n": "-1/2", "r_L": "0"}."""
        return {"r_n": str(self.width), "r_L": str(self.depth)}


def _power(symbol: str, exponent: Fraction) -> str:
    if exponent == 0:
        return ""
    return symbol if exponent == 1 else f"{symbol}^{exponent}"


ONE = Monomial()
R_N = Monomial(width=Fraction(1))
R_L = Monomial(depth=Fraction(1))

Number = TypeVar("Number", float, Monomial)


def maximum(a: Number | float, b: Number | float) -> Number:
    """The larger of two numbers, or of two monomials in width as the width grows."""
    if isinstance(a, Monomial) or isinstance(b, Monomial):
        first = a if isinstance(a, Monomial) else ONE
        second = b if isinstance(b, Monomial) else ONE
        return cast(Number, first if first.width >= second.width else second)
    return cast(Number, max(a, b))


def minimum(a: Number | float, b: Number | float) -> Number:
    """The smaller of two numbers, or of two monomials in width as the width grows."""
    if isinstance(a, Monomial) or isinstance(b, Monomial):
        return cast(Number, a * b / maximum(a, b))
    return cast(Number, min(a, b))


def sqrt(a: Number) -> Number:
    """Square root of a number or a monomial."""
    return cast(Number, a ** Fraction(1, 2) if isinstance(a, Monomial) else a**0.5)
