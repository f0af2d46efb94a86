"""Weight decay rules: what `optimizer.weight_decay` means and how the shrinkage per step follows the size.

The shrinkage of a tensor per step is lr * weight_decay, both as its optimizer is given them. A rule that is `scaled`
holds it in the ratio ||dW||_R / ||W||_R that the parametrization promises, so that decay and update stay in balance.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from mupsweep.scaling.monomial import ONE, R_N, Monomial
from mupsweep.scaling.roles import Role


@dataclass(frozen=True)
class DecayRule:
    """One reading of `optimizer.weight_decay`.

    Attributes:
        unit: what it is multiplied by to give the shrinkage per step at the base shape: the base LR, 1 (a step), or
            1 / steps (a run).
        scaled: whether the shrinkage keeps the promised ratio of update to weight; else the coefficient is constant.
        falls: how the shrinkage changes with the size on top of that.
        roles: of the tensors that decay; those of others do not.
    """

    unit: str
    scaled: bool = True
    falls: Monomial = ONE
    roles: frozenset[Role] = frozenset(Role)

    def coefficient(self, weight_decay: float, base_lr: float, steps: int) -> float:
        """The coupled coefficient at the base shape: a step subtracts lr * coefficient * W."""
        return weight_decay / {"lr": 1.0, "step": base_lr, "run": base_lr * steps}[self.unit]

    def at_batch_ratio(self, ratio: float, lr_factor: float) -> float:
        """The factor of `optimizer.weight_decay` at `ratio` times the base batch, where LRs take `lr_factor`.

        Decay per token is what the SDE limit keeps, so a step decays `ratio` times as much (Complete(d)P, 2512.22382).
        A share of a run is left alone: a run over the same tokens has `ratio` times fewer steps.
        """
        return {"lr": ratio / lr_factor, "step": ratio, "run": 1.0}[self.unit]


WEIGHT_DECAY_RULES = {
    # a step shrinks by base LR * weight_decay at every size (Zheng 2603.00541 C.1; Gupta; CompleteP)
    "coupled_constant": DecayRule("lr"),
    # a step shrinks by weight_decay at every LR and size; also the rule at fixed FLOPs (Qiu 2512.05620, App. H.5)
    "independent": DecayRule("step"),
    # independent and falling as 1 / r_n: compute-optimal training, tokens in proportion to parameters (Qiu, section 4)
    "inverse_width": DecayRule("step", falls=R_N**-1),
    # a run shrinks by weight_decay at every LR, size and length: a fixed AdamW timescale (2405.13698)
    "timescale": DecayRule("run"),
    # the coefficient of hidden matrices rises as sqrt(r_n) while their LR falls as 1 / r_n, and nothing else decays:
    # AdamW's steady state has a top singular value of sqrt(lr / coefficient) r_n^(3/4) (Fan et al. 2510.15262)
    "sqrt_width": DecayRule("lr", falls=R_N ** Fraction(-1, 2), roles=frozenset({Role.HIDDEN})),
    # the coefficient that torch takes, constant: the shrinkage follows each tensor's LR
    "unscaled": DecayRule("lr", scaled=False),
}
