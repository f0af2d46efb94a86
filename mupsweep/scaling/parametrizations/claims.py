"""The vocabulary of a parametrization: what it promises for the tensors of one role, and which options all share."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from mupsweep.scaling.monomial import Monomial
from mupsweep.scaling.roles import Role

OUTPUT_FORMS = ("multiplier", "init")
WEIGHT_DECAY_RULES = ("coupled_constant", "inverse_width", "unscaled")


@dataclass(frozen=True)
class Claim:
    """Four monomials per role, of which everything else follows (`solve`).

    Attributes:
        multiplier: alpha, the forward constant on the branch or the logits.
        weight: ||W||_R of the raw weight at initialisation.
        update: ||dW||_R of the raw weight per step.
        loss_share: the loss change one step of this tensor buys; 1/r_L inside a residual block.
    """

    multiplier: Monomial
    weight: Monomial
    update: Monomial
    loss_share: Monomial


class Parametrization(Protocol):
    """A dataclass under `scaling/parametrizations/`; its fields are the keys of its yaml."""

    @property
    def name(self) -> str: ...

    @property
    def weight_decay_rule(self) -> str:
        """One of WEIGHT_DECAY_RULES."""
        ...

    @property
    def attention_power(self) -> Fraction:
        """The exponent of d_head in the attention scale relative to the base: -1/2 is the usual 1/sqrt(d_head)."""
        ...

    def claims(self) -> dict[Role, Claim] | None:
        """What it promises per role; None means that nothing is scaled (standard parametrization)."""
        ...
