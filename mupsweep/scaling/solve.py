"""One solver: from what an optimizer and a parametrization declare to init std, LR, weight decay and eps.

Written once over numbers and over monomials, so that the symbols `mupsweep rules` prints and the numbers a run trains
with come from the same lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mupsweep.scaling.laws import UpdateLaw
from mupsweep.scaling.monomial import ONE, R_N, Monomial, maximum, sqrt
from mupsweep.scaling.parametrizations.claims import Claim, Parametrization
from mupsweep.scaling.roles import Role, TensorSpec


@dataclass(frozen=True)
class Rule:
    """How one tensor scales, each entry target / base: a float for a tensor, a Monomial for a role."""

    multiplier: Any
    init_std: Any
    lr: Any
    weight_decay: Any
    eps: Any


def solve(claim: Claim, law: UpdateLaw, dims: tuple[Any, Any], role: Role, decay_rule: str, at: Any) -> Rule:
    """The absolute sizes that the spectral condition asks for, up to constants that cancel in a ratio.

    Args:
        claim: what the parametrization promises for the role.
        law: what the optimizer declares.
        dims: (n_out, n_in) of the tensor.
        role: which of the two dimensions grow.
        decay_rule: `coupled_constant` holds lr * weight_decay at ||dW||_R / ||W||_R, `inverse_width` makes it fall as
            1/r_n on top, `unscaled` leaves the coupled weight decay alone (so lr * weight_decay follows the LR).
        at: how to read a claim's monomial: its value at (r_n, r_L), or the monomial itself.
    """
    n_out, n_in = dims
    s, u, c = at(claim.weight), at(claim.update), at(claim.loss_share)
    rms = sqrt(n_out / n_in)

    # A Gaussian matrix has ||W||_2 ~ std sqrt(max(n_out, n_in)). One-hot tokens use one column of an embedding and
    # the vocabulary is fixed, so dimensions that do not grow count as 1 here: only their asymptotics may enter.
    grows_out, grows_in = role.grows
    free_out, free_in = (n_out if grows_out else 1.0), (n_in if grows_in else 1.0)
    std = s * sqrt(free_out / free_in) / sqrt(maximum(free_out, free_in))

    gradient = c / (u * rms)  # ||G||_2: a step of size ||dW||_2 = u * rms changes the loss by c
    blocks = law.blocks(n_out, n_in)
    half = (1 - law.degree) / 2
    update = gradient**law.degree * blocks**half * law.shape_factor(n_out, n_in)  # ||A||_2 at LR 1
    lr = u * rms / update

    decay = {"coupled_constant": u / (s * lr), "inverse_width": u / (s * lr * at(R_N)), "unscaled": at(ONE)}[decay_rule]
    eps = at(ONE) if law.eps_power is None else (gradient / sqrt(blocks)) ** Fraction(law.eps_power)
    return Rule(multiplier=at(claim.multiplier), init_std=std, lr=lr, weight_decay=decay, eps=eps)


def symbolic(parametrization: Parametrization, law: UpdateLaw, role: Role) -> Rule:
    """The rule of a role as monomials in (r_n, r_L), for tensors whose growing dimensions all grow as r_n."""
    claims = parametrization.claims()
    if claims is None:
        return Rule(ONE, ONE, ONE, ONE, ONE)
    grows_out, grows_in = role.grows
    dims = (R_N if grows_out else ONE, R_N if grows_in else ONE)
    return solve(claims[role], law, dims, role, parametrization.weight_decay_rule, at=lambda m: m)


def numeric(
    parametrization: Parametrization,
    law: UpdateLaw,
    target: TensorSpec,
    base: TensorSpec,
    r_n: float,
    r_L: float,  # noqa: N803
) -> Rule:
    """The rule of one tensor, f(target shape) / f(base shape) with the real shapes of both.

    Constants such as a 4x FFN or Kimi's 0.2 cancel, block counts are exact, and at the base shape every entry is
    exactly 1.0.
    """
    claims = parametrization.claims()
    if claims is None:
        return Rule(1.0, 1.0, 1.0, 1.0, 1.0)

    def absolute(spec: TensorSpec, width_ratio: float, depth_ratio: float) -> Rule:
        def at(monomial: Monomial) -> float:
            return monomial.at(width_ratio, depth_ratio)

        dims = (float(spec.dims[0]), float(spec.dims[1]))
        return solve(claims[spec.role], law, dims, spec.role, parametrization.weight_decay_rule, at)

    big, small = absolute(target, r_n, r_L), absolute(base, 1.0, 1.0)
    return Rule(
        **{
            key: getattr(big, key) / getattr(small, key)
            for key in ("multiplier", "init_std", "lr", "weight_decay", "eps")
        }
    )
