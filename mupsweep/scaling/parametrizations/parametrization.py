"""The vocabulary of a parametrization: what it promises for the tensors of one role, and which options all share."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

from mupsweep.errors import ConfigError
from mupsweep.formatting import nearest
from mupsweep.scaling.decay import WEIGHT_DECAY_RULES
from mupsweep.scaling.laws import NAMED_LAWS, UpdateLaw
from mupsweep.scaling.monomial import Monomial
from mupsweep.scaling.roles import Role

OUTPUT_FORMS = ("multiplier", "init")


@dataclass(frozen=True)
class RoleScaling:
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


@dataclass(frozen=True)
class Rule:
    """How one tensor scales, each entry target / base: a float for a tensor, a Monomial for a role."""

    multiplier: Any
    init_std: Any
    lr: Any
    weight_decay: Any
    eps: Any


class Parametrization(Protocol):
    """A dataclass under `scaling/parametrizations/`; its fields are the keys of its yaml."""

    @property
    def name(self) -> str: ...

    @property
    def weight_decay_rule(self) -> str:
        """A key of WEIGHT_DECAY_RULES."""
        ...

    @property
    def attention_power(self) -> Fraction:
        """The exponent of d_head in the attention scale relative to the base: -1/2 is the usual 1/sqrt(d_head)."""
        ...

    def role_scalings(self) -> dict[Role, RoleScaling | Rule]:
        """Per role what it promises, to be solved for the optimizer at hand, or a rule that holds for every one."""
        ...


def forced_law(parametrization: Parametrization) -> UpdateLaw | None:
    """The law that takes the place of every optimizer's own, which makes a wrong rule; None as a rule."""
    name = getattr(parametrization, "update_law_of", None)  # a key that a parametrization need not have
    return None if name is None else NAMED_LAWS[name]


def check_options(
    name: str, weight_decay_rule: str, output: str = OUTPUT_FORMS[0], update_law_of: str | None = None
) -> None:
    """Refuse an option that no parametrization knows."""
    for key, value, known in (
        ("output", output, OUTPUT_FORMS),
        ("weight_decay_rule", weight_decay_rule, WEIGHT_DECAY_RULES),
        ("update_law_of", update_law_of, NAMED_LAWS),
    ):
        if value is not None and value not in known:
            raise ConfigError(f"parametrization.{key}={value} ({name}): {nearest(value, known)}")
