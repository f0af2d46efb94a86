"""Update laws: how large the unit-LR update of an optimizer is, as a function of gradient and shape.

    ||A||_2 = ||G||_2^degree * blocks^((1 - degree) / 2) * shape_factor(n_out, n_in)

For an aligned gradient each of `blocks` independently normalised blocks has norm ||G||_2 / sqrt(blocks), is mapped
to its power `degree`, and the blocks add up to sqrt(blocks) times one. Adam is Muon with 1 x 1 blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mupsweep.scaling.monomial import maximum, sqrt

Shape = Callable[[Any, Any], Any]  # (n_out, n_in), numbers or monomials -> number or monomial


def one(n_out: Any, n_in: Any) -> float:
    """The constant 1: one block, or no shape factor."""
    return 1.0


def entries(n_out: Any, n_in: Any) -> Any:
    """One block per entry."""
    return n_out * n_in


@dataclass(frozen=True)
class UpdateLaw:
    """What an optimizer declares about its update A at LR 1.

    Attributes:
        degree: homogeneity degree p in the gradient (SGD 1, anything fully normalised 0).
        blocks: nb(n_out, n_in), the blocks that are normalised independently (Muon 1, entry-wise n_out * n_in).
        shape_factor: the factor of the shape that the implementation multiplies in itself.
        eps_power: m, when eps is added to the m-th power of a block's gradient norm; None where there is no eps.
    """

    degree: Fraction = Fraction(0)
    blocks: Shape = one
    shape_factor: Shape = one
    eps_power: int | None = 1


GRADIENT = UpdateLaw(degree=Fraction(1), eps_power=None)
ENTRYWISE = UpdateLaw(blocks=entries)


def spectral_ratio(n_out: Any, n_in: Any) -> Any:
    """sqrt(n_out / n_in): the update that already has RMS operator norm 1 (Bernstein's Muon, SSO, Muon++)."""
    return sqrt(n_out / n_in)


def jordan(n_out: Any, n_in: Any) -> Any:
    """sqrt(max(1, n_out / n_in)): Jordan's Muon and torch's `original`."""
    return sqrt(maximum(1.0, n_out / n_in))


def match_rms_adamw(n_out: Any, n_in: Any) -> Any:
    """0.2 sqrt(max(n_out, n_in)): Kimi's Muon and torch's `match_rms_adamw` (Moonlight, 2502.16982)."""
    return 0.2 * sqrt(maximum(n_out, n_in))
