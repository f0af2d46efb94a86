"""Standard parametrization: nothing scales with the size of the model."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from mupsweep.scaling.parametrizations.claims import Claim
from mupsweep.scaling.roles import Role


@dataclass(frozen=True)
class Standard:
    """SP as Zheng et al. run it: init variance, LR, weight decay and eps constant (2603.00541, grey in Tables 3-7)."""

    name: str = "sp"

    @property
    def weight_decay_rule(self) -> str:
        return "unscaled"

    @property
    def attention_power(self) -> Fraction:
        return Fraction(-1, 2)

    def claims(self) -> dict[Role, Claim] | None:
        return None
