"""AdamW: torch's own, fused where the device has it (Kingma and Ba 1412.6980; Loshchilov and Hutter 1711.05101)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mupsweep.errors import ConfigError
from mupsweep.optimizers.optimizer import Optimizer
from mupsweep.scaling import UpdateLaw
from mupsweep.scaling.laws import ENTRYWISE

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """W -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * W). lr: size of an entry's update.

    Attributes:
        betas: decay of the first and of the second moment.
    """

    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas={list(self.betas)}: expected two numbers in [0, 1)")

    def update_law(self) -> UpdateLaw:
        return ENTRYWISE

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        import torch

        devices = {p.device.type for g in groups for p in g["params"]}
        return torch.optim.AdamW(groups, betas=self.betas, fused=devices <= {"cpu", "cuda"} or None)
