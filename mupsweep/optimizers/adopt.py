"""ADOPT: Adam that normalises a gradient by the second moment of those before it (Taniguchi et al. 2411.02853).

The algorithm with clipping, Algorithm 2, as the authors' code has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mupsweep.optimizers.adamw import adam_sde_rule
from mupsweep.optimizers.algorithm import StepContext
from mupsweep.optimizers.composed import ComposableOptimizer
from mupsweep.optimizers.optimizer import Dims, Optimizer, check_decays
from mupsweep.scaling import UpdateLaw
from mupsweep.scaling.laws import ENTRYWISE
from mupsweep.schema import require

if TYPE_CHECKING:
    from torch import Tensor

CLIP_POWER = 0.25  # entries of a normalised gradient are clipped at (earlier steps) ** CLIP_POWER, as in the code


@dataclass(frozen=True, kw_only=True)
class ADOPT(ComposableOptimizer):
    """W -= lr * (m + weight_decay * W), m the average of G / max(sqrt(v), eps). lr: size of an entry's update.

    Attributes:
        betas: decay of the average and of the second moment.
    """

    betas: tuple[float, float] = (0.9, 0.9999)

    memory = ("m", "v")
    entrywise = True
    skips_first_step = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decays(self, "betas")
        # the rows of tokens that no batch has held yet have a second moment of zero
        require(self.eps > 0, "optimizer.eps", self.eps, f"above 0, since {self.name} divides by max(sqrt(v), eps)")

    def base_law(self, dims: Dims | None = None) -> UpdateLaw:
        return ENTRYWISE

    def sde_rule(self, ratio: float) -> tuple[Optimizer, float]:
        """Adam's SDE rule: where noise dominates, v of the steps before is that of this one, and both the first step
        and the clipping, which only bites early, vanish in the limit of many small steps."""
        return adam_sde_rule(self, ratio)

    def direction(self, grads: Tensor, state: dict[str, Tensor], now: StepContext) -> Tensor:
        m, v = state["m"], state["v"]
        if now.step == 1:  # v = g^2, and nothing moves
            v.addcmul_(grads, grads)
            return m.clone()
        bound = (now.step - 1) ** CLIP_POWER
        normalised = grads / v.sqrt().clamp_(min=now.thresholds["eps"])  # by the v before this gradient
        m.lerp_(normalised.clamp_(-bound, bound), 1 - self.betas[0])  # m = b1 m + (1 - b1) clip(g / max(sqrt v, eps))
        v.mul_(self.betas[1]).addcmul_(grads, grads, value=1 - self.betas[1])  # v = b2 v + (1 - b2) g^2
        return m.clone()
