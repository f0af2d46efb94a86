"""The driver of our own matrix optimizers: same-shape matrices are stacked and take their step as one batch."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Protocol

import torch
from torch import Tensor


class Algorithm(Protocol):
    """What `StackedOptimizer` drives: pure functions of a stack of matrices (count, n_out, n_in)."""

    def state(self, weights: Tensor) -> dict[str, Tensor]: ...

    def direction(self, grads: Tensor, state: dict[str, Tensor], eps: float) -> Tensor: ...


class StackedOptimizer(torch.optim.Optimizer):
    """W -= lr * (direction + weight_decay * W), with each group's own lr, weight_decay and eps.

    The state of a parameter is a view into the stack of its shape, so that a state dict looks like any other torch
    optimizer's and a step copies nothing but gradients.
    """

    def __init__(self, groups: list[dict[str, Any]], algorithm: Algorithm) -> None:
        super().__init__(groups, {})
        self.algorithm = algorithm
        self.stacks: dict[tuple[int, ...], dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for index, group in enumerate(self.param_groups):
            same_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                same_shape[p.shape].append(p)
            for shape, weights in same_shape.items():
                grads = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in weights])
                state = self.stack((index, *shape), weights)
                update = self.algorithm.direction(grads, state, group["eps"])
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])  # pyright: ignore
                updates = list(update.to(weights[0].dtype).unbind())
                torch._foreach_add_(weights, updates, alpha=-group["lr"])  # pyright: ignore

    def stack(self, key: tuple[int, ...], weights: list[Tensor]) -> dict[str, Tensor]:
        """The stacked state of some same-shape weights; made on first use, or again from a loaded state dict."""
        if key not in self.stacks:
            state = self.algorithm.state(torch.stack([w.detach() for w in weights]))
            for name, stacked in state.items():
                for i, p in enumerate(weights):
                    if name in self.state[p]:
                        stacked[i] = self.state[p][name]
                    self.state[p][name] = stacked[i]
            self.stacks[key] = state
        return self.stacks[key]

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.stacks.clear()
