"""MuCon: Muon with its singular values clipped instead of all set to one (Yi, 2605.26459).

    min(sigma, tau) for every singular value sigma of the Muon matrix: the projection onto a ball of the spectral norm

Experimental: the paper trains nothing with it and leaves the scale of the Muon matrix and tau open. Here tau is in
units of the root mean square of the momentum's singular values, ||M||_F / sqrt(min(n_out, n_in)), and the result is
divided by tau. With tau <= 1 the largest singular value always reaches it, so an update has spectral norm 1 as Muon's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mupsweep.optimizers.algorithm import StepContext
from mupsweep.optimizers.composed import ComposableOptimizer
from mupsweep.optimizers.optimizer import MATRICES, Dims, check_decays
from mupsweep.optimizers.singular_values import clip
from mupsweep.scaling import UpdateLaw
from mupsweep.schema import require

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MuCon(ComposableOptimizer):
    """W -= lr * (clip(momentum) + weight_decay * W). lr: spectral norm per update.

    Attributes:
        tau: in (0, 1]; singular values of tau root mean squares and above become 1, smaller ones keep their proportion
            to them. Muon is the limit of 0.
        momentum: decay of the average of gradients.
        nesterov: clip the gradient mixed with the average instead of the average.
        eps: bounds the norm that divides.
    """

    eps: float = 1e-7
    tau: float = 1.0
    momentum: float = 0.95
    nesterov: bool = True

    roles: tuple[str, ...] = ("hidden",)

    supported_roles: ClassVar[tuple[str, ...]] = MATRICES

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decays(self, "momentum")
        require(0 < self.tau <= 1, "optimizer.tau", self.tau, "a number in (0, 1]")

    def base_law(self, dims: Dims | None = None) -> UpdateLaw:
        return UpdateLaw(full_rank=True)

    def direction(self, grads: Tensor, state: dict[str, Tensor], now: StepContext) -> Tensor:
        average = state["momentum"].lerp_(grads, 1 - self.momentum)
        M = grads.lerp(average, self.momentum) if self.nesterov else average
        norm = M.norm(dim=(-2, -1), keepdim=True).clamp(min=now.thresholds["eps"])
        return clip(M * (min(M.shape[-2:]) ** 0.5 / self.tau) / norm)
