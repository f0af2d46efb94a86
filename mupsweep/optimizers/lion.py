"""Lion: the sign of an interpolated momentum (Chen et al. 2302.06675, Algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mupsweep.optimizers.algorithm import StepContext
from mupsweep.optimizers.composed import ComposableOptimizer
from mupsweep.optimizers.optimizer import Dims, check_decays
from mupsweep.scaling import UpdateLaw
from mupsweep.scaling.laws import ENTRYWISE

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Lion(ComposableOptimizer):
    """W -= lr * (sign(b1 m + (1 - b1) G) + weight_decay * W). lr: size of an entry's update, exactly.

    Attributes:
        betas: how much of the momentum the signed mixture holds; decay of the momentum.
    """

    eps: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)

    entrywise = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decays(self, "betas")

    def base_law(self, dims: Dims | None = None) -> UpdateLaw:
        return replace(ENTRYWISE, eps_power=None)

    def direction(self, grads: Tensor, state: dict[str, Tensor], now: StepContext) -> Tensor:
        update = state["momentum"].lerp(grads, 1 - self.betas[0]).sign_()  # c = b1 m + (1 - b1) g
        state["momentum"].lerp_(grads, 1 - self.betas[1])  # m = b2 m + (1 - b2) g
        return update
