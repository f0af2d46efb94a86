"""The spectral condition: every layer's weight and update move features by Theta(1) at any width and depth.

Width: Yang, Simon and Bernstein (2310.17813). Width and depth: Zheng et al. (2603.00541), Conditions 3.1, B.1, B.2.
One exponent spans the depth family: 1 is k >= 2 (CompleteP), 1/2 is k = 1 (Depth-muP), null is width only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from mupsweep.errors import ConfigError
from mupsweep.scaling.monomial import ONE, R_L, R_N, Monomial
from mupsweep.scaling.parametrizations.parametrization import RoleScaling, Rule, check_options
from mupsweep.scaling.roles import Role


@dataclass(frozen=True)
class Spectral:
    """Maximal-update parametrization of a pre-norm residual network.

    Attributes:
        name: what curves and reports call it.
        depth_exponent: a in the block multiplier r_L^-a, a number or a fraction such as "1/2"; None leaves depth as SP.
        output: "multiplier" (logits * 1/r_n, head variance constant) or "init" (head variance 1/r_n^2, no multiplier).
        weight_decay_rule: a key of `WEIGHT_DECAY_RULES`.
        update_law_of: the optimizer (a key of `NAMED_LAWS`) by whose law every optimizer's LR and weight decay scale,
            a wrong rule for any other; None for each by its own.
        embedding_exponent: of r_n in the update of an embedding, a number or a fraction: 0, or "-1/2" for a vocabulary
            far larger than the width (Hayou and Liu 2506.15025, the large-vocabulary regime).
    """

    name: str
    depth_exponent: str | None = "1"
    output: str = "multiplier"
    weight_decay_rule: str = "coupled_constant"
    update_law_of: str | None = None
    embedding_exponent: str = "0"

    def __post_init__(self) -> None:
        check_options(self.name, self.weight_decay_rule, self.output, self.update_law_of)
        depth, embedding = _fraction(self.depth_exponent or "0"), _fraction(self.embedding_exponent)
        if depth is None or not 0 <= depth <= 1:
            raise ConfigError(
                f"parametrization.depth_exponent={self.depth_exponent}: expected a fraction from 0 to 1, "
                "1 (k >= 2, CompleteP), 1/2 (k = 1, Depth-muP), or null (width only)"
            )
        if embedding is None or not -1 <= embedding <= 0:
            raise ConfigError(
                f"parametrization.embedding_exponent={self.embedding_exponent}: expected a fraction from -1 to 0, 0 "
                "(muP) or -1/2 (a vocabulary far larger than the width)"
            )

    @property
    def attention_power(self) -> Fraction:
        """Aligned queries and keys grow their product as d_head, so the scale is 1/d_head relative to the base."""
        return Fraction(-1)

    def role_scalings(self) -> dict[Role, RoleScaling | Rule]:
        input_like = RoleScaling(multiplier=ONE, weight=ONE, update=ONE, loss_share=ONE)
        # its gradient stays what it is, so a smaller step buys less
        smaller = R_N ** Fraction(self.embedding_exponent)
        embedding = replace(input_like, update=smaller, loss_share=smaller)
        hidden_like = input_like
        if self.depth_exponent is not None:
            a = Fraction(self.depth_exponent)
            hidden_like = RoleScaling(multiplier=R_L**-a, weight=ONE, update=R_L ** (a - 1), loss_share=R_L**-1)
        output_size: Monomial = R_N if self.output == "multiplier" else ONE
        output = RoleScaling(multiplier=output_size**-1, weight=output_size, update=output_size, loss_share=ONE)
        return {
            Role.INPUT: embedding,
            Role.INPUT_VECTOR: input_like,
            Role.HIDDEN: hidden_like,
            Role.HIDDEN_VECTOR: hidden_like,
            Role.OUTPUT: output,
            Role.ROUTER: hidden_like,
        }


def _fraction(text: str) -> Fraction | None:
    """A number or a fraction such as "1/2"; None for anything else."""
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None
