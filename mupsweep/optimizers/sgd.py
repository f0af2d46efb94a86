"""SGD with heavy-ball or Nesterov momentum: torch's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mupsweep.errors import ConfigError
from mupsweep.optimizers.optimizer import Optimizer
from mupsweep.scaling import UpdateLaw
from mupsweep.scaling.laws import GRADIENT

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """M = momentum * M + (G + weight_decay * W); W -= lr * M. lr: update per unit of gradient.

    Attributes:
        momentum: 0 is plain gradient descent.
        nesterov: look one step ahead.
    """

    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"optimizer.momentum={self.momentum}: expected a number in [0, 1)")
        if self.nesterov and self.momentum == 0:
            raise ConfigError("optimizer.nesterov=true needs optimizer.momentum above 0")

    def update_law(self) -> UpdateLaw:
        return GRADIENT

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        import torch

        plain = [{k: v for k, v in group.items() if k != "eps"} for group in groups]
        return torch.optim.SGD(plain, momentum=self.momentum, nesterov=self.nesterov)
