"""SGD with heavy-ball or Nesterov momentum: torch's own, with decoupled weight decay (SGDW, 1711.05101)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mupsweep.errors import ConfigError
from mupsweep.optimizers.algorithm import StepContext
from mupsweep.optimizers.composed import ComposableOptimizer
from mupsweep.optimizers.optimizer import Dims, Optimizer, check_decays
from mupsweep.scaling import UpdateLaw
from mupsweep.scaling.laws import GRADIENT

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SGD(ComposableOptimizer):
    """M = momentum * M + G; W -= lr * (M + weight_decay * W). lr: update per unit of gradient.

    torch adds weight_decay * W to the gradient instead, so that the momentum repeats it and a step shrinks by
    1 / (1 - momentum) times what every weight decay rule says.

    Attributes:
        momentum: 0 is plain gradient descent.
        nesterov: look one step ahead.
    """

    momentum: float = 0.9
    nesterov: bool = False

    entrywise = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decays(self, "momentum")
        if self.nesterov and self.momentum == 0:
            raise ConfigError("optimizer.nesterov=true needs optimizer.momentum above 0")

    def base_law(self, dims: Dims | None = None) -> UpdateLaw:
        return GRADIENT

    def sde_rule(self, ratio: float) -> tuple[Optimizer, float]:
        """The linear rule: the noise of the gradient falls as 1/k, so k times the LR keeps the SDE (2512.22382)."""
        return self, ratio

    def base_state_size(self, dims: Dims) -> int:
        return super().base_state_size(dims) if self.momentum or self.composed else 0

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        from mupsweep.optimizers.decoupled_sgd import DecoupledSGD

        if self.composed:
            return super().build(groups)
        plain = [{k: v for k, v in group.items() if k != "eps"} for group in groups]
        return DecoupledSGD(plain, momentum=self.momentum, nesterov=self.nesterov)

    def direction(self, grads: Tensor, state: dict[str, Tensor], now: StepContext) -> Tensor:
        average = state["momentum"].mul_(self.momentum).add_(grads)
        return grads.add_(average, alpha=self.momentum) if self.nesterov else average.clone()
