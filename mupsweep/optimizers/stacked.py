"""The torch optimizer behind most of ours: tensors of one shape are stacked and take their step as one batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mupsweep.optimizers.algorithm import Algorithm, StepContext

KEYS = ("params", "lr", "peak_lr", "weight_decay", "transposed", "step")  # of a group; every other key is a threshold


@dataclass
class Stack:
    """Same-shape tensors of one group with their algorithm and its memory."""

    parameters: list[Tensor]
    transposed: bool  # stored (n_in, n_out)
    algorithm: Algorithm
    state: dict[str, Tensor]

    @property
    def weights(self) -> list[Tensor]:
        """Views as (n_out, n_in)."""
        return [self.oriented(p.detach()) for p in self.parameters]

    @property
    def grads(self) -> Tensor:
        """(count, n_out, n_in), a copy; a tensor without a gradient takes one of zero."""
        return torch.stack([self.oriented(torch.zeros_like(p) if p.grad is None else p.grad) for p in self.parameters])

    def oriented(self, tensor: Tensor) -> Tensor:
        return tensor.mT if self.transposed else tensor


class StackedOptimizer(torch.optim.Optimizer):
    """W -= lr * (direction + weight_decay * W), with each group's own lr, weight_decay and thresholds.

    The state of a parameter is a view into the stack of its shape, so that a state dict looks like any other torch
    optimizer's and a step copies nothing but gradients. `step` of a group counts its steps.
    """

    def __init__(self, groups: list[dict[str, Any]], algorithm: Callable[[tuple[int, int]], Algorithm]) -> None:
        super().__init__(groups, {"transposed": False, "step": 0})
        self.algorithm = algorithm
        self.stacks: dict[tuple[int, ...], Stack] = {}
        with torch.no_grad():
            list(self._stacks())

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            group["step"] += 1
        for group, stack in self._stacks():
            weights, algorithm = stack.weights, stack.algorithm
            now = self._now(group, stack)
            update = algorithm.direction(stack.grads, stack.state, now)
            moves = now.step > 1 or not algorithm.skips_first_step
            if moves and now.weight_decay and not algorithm.applies_weight_decay:
                torch._foreach_mul_(weights, 1 - now.lr * now.weight_decay)  # pyright: ignore
            torch._foreach_add_(weights, list(update.to(weights[0].dtype).unbind()), alpha=-now.lr)  # pyright: ignore
            if algorithm.renormalizes:
                moved = torch.stack(weights)
                algorithm.renormalize(moved, stack.state)
                torch._foreach_copy_(weights, list(moved.unbind()))  # pyright: ignore

    @torch.no_grad()
    def observe(self) -> None:
        """Hand the gradients of a curvature estimate to the algorithms; the weights stay."""
        for group, stack in self._stacks():
            stack.algorithm.observe(stack.grads, stack.state, self._now(group, stack))

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.stacks.clear()

    def _stacks(self) -> Iterator[tuple[dict[str, Any], Stack]]:
        """Every stack with its group; made again after a state dict was loaded."""
        for index, group in enumerate(self.param_groups):
            same_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                same_shape[p.shape].append(p)
            for shape, parameters in same_shape.items():
                key = (index, *shape)
                if key not in self.stacks:
                    self.stacks[key] = self._stack(parameters, group["transposed"])
                yield group, self.stacks[key]

    def _stack(self, parameters: list[Tensor], transposed: bool) -> Stack:
        stack = Stack(parameters, transposed, Algorithm(), {})
        weights = torch.stack(stack.weights)
        n_out, n_in = (*weights.shape[1:], 1)[:2]
        stack.algorithm = self.algorithm((n_out, n_in))
        if stack.algorithm.renormalizes and not self.state[parameters[0]]:
            stack.algorithm.rescale_init(weights)
            torch._foreach_copy_(stack.weights, list(weights.unbind()))  # pyright: ignore
        stack.state = stack.algorithm.state(weights)
        for name, stacked in stack.state.items():
            for i, p in enumerate(parameters):
                if name in self.state[p]:
                    stacked[i] = self.state[p][name]
                self.state[p][name] = stacked[i]
        return stack

    @staticmethod
    def _now(group: dict[str, Any], stack: Stack) -> StepContext:
        thresholds = {key: value for key, value in group.items() if key not in KEYS}
        weights = torch.stack(stack.weights) if stack.algorithm.uses_weights else None
        return StepContext(group["step"], group["lr"], group["weight_decay"], thresholds, weights)
