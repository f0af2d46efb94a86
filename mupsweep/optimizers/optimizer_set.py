"""The optimizers of a run driven as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mupsweep.optimizers.optimizer import Optimizer

if TYPE_CHECKING:
    import torch


class OptimizerSet:
    """The optimizers of a run, one per part of a hybrid, driven as one."""

    def __init__(
        self, parts: Sequence[Optimizer], groups: list[dict[str, Any]], parameters: Mapping[str, torch.Tensor]
    ) -> None:
        self.members: list[Any] = []
        self.curvature_every: list[int | None] = []
        self.observes_new_batch = any(part.observes_new_batch for part in parts)
        for index, part in enumerate(parts):
            own_groups = [
                {
                    "params": [parameters[name] for name in group["tensors"]],
                    "lr": group["lr"],
                    "peak_lr": group["lr"],
                    "weight_decay": group["weight_decay"],
                    "eps": group["eps"],
                    **group["thresholds"],
                    **({"transposed": True} if group["transposed"] else {}),
                }
                for group in groups
                if group["part"] == index
            ]
            if own_groups:
                self.members.append(self.build(part, own_groups))
                self.curvature_every.append(part.curvature_every)

    def build(self, part: Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build the optimizer of a part over its groups."""
        return part.build(groups)

    def step(self, lr_factor: float) -> None:
        """One step at `lr_factor` times every group's peak LR, then forget the gradients."""
        for member in self.members:
            for group in member.param_groups:
                group["lr"] = group["peak_lr"] * lr_factor
            member.step()
            member.zero_grad(set_to_none=True)

    def curvature_due(self, step: int) -> bool:
        """Whether an optimizer wants to observe the curvature before `step` (from 0)."""
        return any(every is not None and step % every == 0 for every in self.curvature_every)

    def observe(self, step: int) -> None:
        """Hand the gradients of a curvature estimate to the optimizers that want them at `step`, then forget them."""
        for member, every in zip(self.members, self.curvature_every, strict=True):
            if every is not None and step % every == 0:
                member.observe()
            member.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [member.state_dict() for member in self.members]

    def own_share(self, member: int, number: int, state: dict[str, Any]) -> dict[str, Any]:
        """Return what this process keeps of the state of an optimizer's parameter: all of it."""
        return state

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for member, state in zip(self.members, states, strict=True):
            member.load_state_dict(state)
