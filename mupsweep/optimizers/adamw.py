"""AdamW: torch's own, fused where the device has it (Kingma and Ba 1412.6980; Loshchilov and Hutter 1711.05101)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mupsweep.errors import ConfigError
from mupsweep.optimizers.algorithm import StepContext
from mupsweep.optimizers.composed import ComposableOptimizer
from mupsweep.optimizers.optimizer import Dims, Optimizer, check_decays
from mupsweep.scaling import UpdateLaw
from mupsweep.scaling.laws import ENTRYWISE

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AdamW(ComposableOptimizer):
    """W -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * W). lr: size of an entry's update.

    Attributes:
        betas: decay of the first and of the second moment.
    """

    betas: tuple[float, float] = (0.9, 0.95)

    memory = ("m", "v")
    entrywise = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decays(self, "betas")

    def base_law(self, dims: Dims | None = None) -> UpdateLaw:
        return ENTRYWISE

    def sde_rule(self, ratio: float) -> tuple[Optimizer, float]:
        return adam_sde_rule(self, ratio)

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        import torch

        if self.composed:
            return super().build(groups)
        devices = {p.device.type for g in groups for p in g["params"]}
        return torch.optim.AdamW(groups, betas=self.betas, fused=devices <= {"cpu", "cuda"} or None)

    def direction(self, grads: Tensor, state: dict[str, Tensor], now: StepContext) -> Tensor:
        return adam_direction(grads, state["m"], state["v"], self.betas, now)


def adam_direction(grads: Tensor, m: Tensor, v: Tensor, betas: tuple[float, float], now: StepContext) -> Tensor:
    """m_hat / (sqrt(v_hat) + eps), with the moments updated in place."""
    m.lerp_(grads, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(grads, grads, value=1 - betas[1])
    m_hat, v_hat = m / (1 - betas[0] ** now.step), v / (1 - betas[1] ** now.step)
    return m_hat.div_(v_hat.sqrt_().add_(now.thresholds["eps"]))


def adam_sde_rule(optimizer: Any, ratio: float) -> tuple[Any, float]:
    """For the Adam family: lr * sqrt(k), 1 - beta -> k (1 - beta), eps / sqrt(k) (Complete(d)P, 2512.22382)."""
    if max(ratio * (1 - beta) for beta in optimizer.betas) >= 1:
        raise ConfigError(
            f"training.batch_rule=sde: a batch {ratio:g} times the base's would need 1 - beta above 1 "
            f"(optimizer.betas={list(optimizer.betas)}): raise training.base_batch_size or the betas"
        )
    betas = tuple(1 - ratio * (1 - beta) for beta in optimizer.betas)
    return replace(optimizer, betas=betas, eps=optimizer.eps / ratio**0.5), ratio**0.5
