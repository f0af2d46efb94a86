"""What an optimization algorithm provides: the update of a stack of tensors, given the step's context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StepContext:
    """What an algorithm knows of the moment of a step.

    Attributes:
        step: from 1.
        lr, weight_decay: of the group, this step.
        thresholds: eps and its like, of the group.
        weights: the stack before the step, for algorithms with `uses_weights`.
    """

    step: int
    lr: float
    weight_decay: float
    thresholds: Mapping[str, float]
    weights: Tensor | None = None


class Algorithm:
    """Pure functions of a stack of tensors (count, n_out, n_in), with no memory but `state`, which they update in
    place. Vectors come as (count, n_out)."""

    memory: ClassVar[tuple[str, ...]] = ("momentum",)  # what it remembers of every weight, zeros at the start
    uses_weights: bool = False  # reads now.weights
    applies_weight_decay: bool = False  # applies weight decay inside its direction
    skips_first_step: bool = False  # the first step only takes in the gradient: no update and no weight decay
    renormalizes: bool = False  # puts the weights back onto a sphere after each step, so weight decay has no effect

    def rescale_init(self, weights: Tensor) -> None:
        """Put the initial weights where `renormalize` will keep them, in place, if they are not there anyhow."""

    def state(self, weights: Tensor) -> dict[str, Tensor]:
        """The memory at the start, every entry with leading dimension count."""
        return {name: weights.new_zeros(weights.shape) for name in self.memory}

    def direction(self, grads: Tensor, state: dict[str, Tensor], now: StepContext) -> Tensor:
        """The update at LR 1, as large as `grads`, which it may overwrite."""
        raise NotImplementedError

    def observe(self, grads: Tensor, state: dict[str, Tensor], now: StepContext) -> None:
        """Take in gradients whose squares estimate the curvature (`Optimizer.curvature_every`): those of
        sqrt(tokens) times the mean loss, for labels drawn from the predictions."""
        raise NotImplementedError

    def renormalize(self, weights: Tensor, state: dict[str, Tensor]) -> None:
        """Put the stepped weights back where they belong, in place."""
        raise NotImplementedError
