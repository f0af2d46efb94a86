"""torch's SGD with weight decay beside the momentum instead of inside it."""

from __future__ import annotations

from typing import Any

import torch


class DecoupledSGD(torch.optim.SGD):
    """W -= lr * (M + weight_decay * W), M the momentum of gradients alone (Loshchilov and Hutter, 1711.05101)."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, weight_decay in zip(self.param_groups, decays, strict=True):
            weights = [p for p in group["params"] if p.grad is not None]
            if weights and weight_decay:
                torch._foreach_mul_(weights, 1 - group["lr"] * weight_decay)  # pyright: ignore
            group["weight_decay"] = 0.0  # or torch would add it to the gradients
        try:
            super().step()
        finally:
            for group, weight_decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = weight_decay
