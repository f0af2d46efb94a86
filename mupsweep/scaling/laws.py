"""Update laws: how large the unit-LR update of an optimizer is, as a function of gradient, shape and weight.

    ||A||_2 = ||G||_2^degree * blocks^((1 - degree) / 2) * shape_factor(n_out, n_in) * ||W||

For an aligned gradient each of `blocks` independently normalised blocks has norm ||G||_2 / sqrt(blocks), is mapped
to its power `degree`, and the blocks add up to sqrt(blocks) times one. Adam is Muon with 1 x 1 blocks.
The last factor is there for optimizers that move a weight by a fraction of its own norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from mupsweep.scaling.monomial import ONE, Monomial, maximum, minimum, sqrt

Sizes = tuple[int | None, int | None]  # the longest sides of a block, (b_out, b_in); None leaves an axis whole
Shape = Callable[[Any, Any], Any]  # (n_out, n_in), numbers or monomials -> number or monomial


def one(n_out: Any, n_in: Any) -> float:
    """The constant 1: one block, or no shape factor."""
    return 1.0


def entries(n_out: Any, n_in: Any) -> Any:
    """One block per entry."""
    return n_out * n_in


def rows(n_out: Any, n_in: Any) -> Any:
    """One block per row: the in axis is handled as a whole, the out axis entry by entry."""
    return n_out


def columns(n_out: Any, n_in: Any) -> Any:
    """One block per column."""
    return n_in


@dataclass(frozen=True)
class UpdateLaw:
    """What an optimizer declares about its update A at LR 1.

    Attributes:
        degree: homogeneity degree p in the gradient (SGD 1, anything fully normalised 0).
        blocks: nb(n_out, n_in), the blocks that are normalised independently (Muon 1, entry-wise n_out * n_in).
        shape_factor: the factor of the shape that the implementation multiplies in itself.
        eps_power: m, when eps is added to the m-th power of a block's gradient norm; None where it does not scale.
        eps_degree: 0 where eps is compared with entries of a normalised matrix instead of a gradient.
        weight_norm: "frobenius" or "spectral" where the update carries that norm of the weight, else None.
        full_rank: whether all singular values of an update are about equal (orthogonalised updates), so that its
            Frobenius norm is sqrt(min(n_out, n_in)) times its spectral norm.
    """

    degree: Fraction = Fraction(0)
    blocks: Shape = one
    shape_factor: Shape = one
    eps_power: int | None = 1
    eps_degree: int = 1
    weight_norm: str | None = None
    full_rank: bool = False


GRADIENT = UpdateLaw(degree=Fraction(1), eps_power=None)
ENTRYWISE = UpdateLaw(blocks=entries)

# Laws by name, for a rule that is wrong on purpose (`parametrization.update_law_of`); muon without a shape factor.
NAMED_LAWS = {"adamw": ENTRYWISE, "muon": UpdateLaw(full_rank=True), "sgd": GRADIENT}


def spectral_ratio(n_out: Any, n_in: Any) -> Any:
    """sqrt(n_out / n_in): the update that already has RMS operator norm 1 (Bernstein's Muon, SSO, Muon++)."""
    return sqrt(n_out / n_in)


def jordan(n_out: Any, n_in: Any) -> Any:
    """sqrt(max(1, n_out / n_in)): Jordan's Muon and torch's `original`."""
    return sqrt(maximum(1.0, n_out / n_in))


def match_rms_adamw(n_out: Any, n_in: Any) -> Any:
    """0.2 sqrt(max(n_out, n_in)): Kimi's Muon and torch's `match_rms_adamw` (Moonlight, 2502.16982)."""
    return 0.2 * sqrt(maximum(n_out, n_in))


@dataclass(frozen=True)
class InBlocks:
    """A function of the shape of one block, times the number of blocks if `counted`."""

    of_block: Shape
    sizes: Sizes
    counted: bool

    def __call__(self, n_out: Any, n_in: Any) -> Any:
        value = self.of_block(_side(n_out, self.sizes[0]), _side(n_in, self.sizes[1]))
        return value * _count(n_out, self.sizes[0]) * _count(n_in, self.sizes[1]) if self.counted else value


def blocked(law: UpdateLaw, sizes: Sizes) -> UpdateLaw:
    """The law of an optimizer that treats every block of a matrix as a matrix of its own.

    An axis that is no longer than a block stays whole; a remainder counts as a block (Qiu et al. 2512.05620, Table 1
    and its code: ceil(dim / size)). Where a block moves by a fraction of its own norm, all of them together move by
    that fraction of the whole's, so their number does not enter.
    """
    blocks = InBlocks(law.blocks, sizes, counted=law.weight_norm is None)
    shape_factor = InBlocks(law.shape_factor, sizes, counted=False)
    return replace(law, blocks=blocks, shape_factor=shape_factor, full_rank=False)


# Divided by its own spectral norm and multiplied by sqrt(n_out / n_in), whatever it was (Qiu et al., section 3.2).
SPECTRAL_NORMALISED = UpdateLaw(shape_factor=spectral_ratio)


@dataclass(frozen=True)
class OneOver:
    """1 / sqrt(min(n_out, n_in)) for a full-rank update of Frobenius norm 1, else 1."""

    full_rank: bool

    def __call__(self, n_out: Any, n_in: Any) -> Any:
        return 1.0 / sqrt(minimum(n_out, n_in)) if self.full_rank else 1.0


def frobenius_normalised(law: UpdateLaw) -> UpdateLaw:
    """The law once an update has the Frobenius norm of its weight (Hyperball, 2606.16899): only its rank is left."""
    return UpdateLaw(
        shape_factor=OneOver(law.full_rank), eps_power=None, weight_norm="frobenius", full_rank=law.full_rank
    )


def _side(n: Any, size: int | None) -> Any:
    """The longest side of a block along an axis of length n; constant once the axis is longer than a block."""
    if size is None:
        return n
    return ONE if isinstance(n, Monomial) else min(n, float(size))


def _count(n: Any, size: int | None) -> Any:
    """Blocks along an axis of length n; for a monomial as the width grows."""
    if size is None:
        return 1.0
    return n if isinstance(n, Monomial) else float(math.ceil(n / size))
