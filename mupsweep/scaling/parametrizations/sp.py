"""Standard parametrization, in the three meanings that papers give it."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from mupsweep.scaling.monomial import ONE, R_N
from mupsweep.scaling.parametrizations.parametrization import RoleScaling, Rule, check_options
from mupsweep.scaling.roles import Role
from mupsweep.schema import one_of

INITS = ("constant", "fan_in")
ALIGNMENTS = ("full", "none")
MATRICES_WITH_WIDE_INPUT = (Role.HIDDEN, Role.OUTPUT, Role.ROUTER)


@dataclass(frozen=True)
class Standard:
    """One LR for every tensor at every size.

    Attributes:
        init: "constant" keeps every init std, as Zheng et al. run it (2603.00541, grey in Tables 3-7); "fan_in" draws
            matrices with std 1/sqrt(n_in), torch's default and the SP of Qiu et al. (2512.05620).
        weight_decay_rule: a key of `WEIGHT_DECAY_RULES`.
    """

    name: str = "sp"
    init: str = "constant"
    weight_decay_rule: str = "coupled_constant"

    def __post_init__(self) -> None:
        check_options(self.name, self.weight_decay_rule)
        one_of(self.init, INITS, "parametrization.init")

    @property
    def attention_power(self) -> Fraction:
        return Fraction(-1, 2)

    def role_scalings(self) -> dict[Role, RoleScaling | Rule]:
        std = {role: R_N ** Fraction(-1, 2) for role in MATRICES_WITH_WIDE_INPUT if self.init == "fan_in"}
        return {role: Rule(ONE, std.get(role, ONE), ONE, ONE, ONE) for role in Role}


@dataclass(frozen=True)
class PerLayer:
    """Standard init with an LR per layer (Everett et al., 2407.05872): std 1/sqrt(n_in) everywhere, no multipliers.

    Written as a scaling per role, so that optimizers other than Adam have their rule too. Only the head differs from
    muP: its logits grow as sqrt(r_n) at initialisation.

    Attributes:
        alignment: "full" assumes that an update lines up with the activations it meets, as muP does (Adam: hidden and
            head LR 1/r_n); "none" assumes that it does not (1/sqrt(r_n)).
        weight_decay_rule: a key of `WEIGHT_DECAY_RULES`.
    """

    name: str = "sp_per_layer"
    alignment: str = "full"
    weight_decay_rule: str = "coupled_constant"

    def __post_init__(self) -> None:
        check_options(self.name, self.weight_decay_rule)
        one_of(self.alignment, ALIGNMENTS, "parametrization.alignment")

    @property
    def attention_power(self) -> Fraction:
        return Fraction(-1, 2)

    def role_scalings(self) -> dict[Role, RoleScaling | Rule]:
        standard = R_N ** Fraction(1, 2)  # ||W||_R of std 1/sqrt(n_in) where only n_in grows
        update = ONE if self.alignment == "full" else R_N ** Fraction(1, 2)
        vector = RoleScaling(multiplier=ONE, weight=ONE, update=ONE, loss_share=ONE)
        return {
            Role.INPUT: vector,
            Role.INPUT_VECTOR: vector,
            Role.HIDDEN_VECTOR: vector,
            Role.HIDDEN: RoleScaling(multiplier=ONE, weight=ONE, update=update, loss_share=ONE),
            Role.OUTPUT: RoleScaling(multiplier=ONE, weight=standard, update=update, loss_share=ONE),
            Role.ROUTER: RoleScaling(multiplier=ONE, weight=standard, update=update, loss_share=ONE),
        }
