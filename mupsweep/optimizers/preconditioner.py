"""What Shampoo and SOAP share: second moments of the gradient along both axes of a matrix, and their eigenvectors."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mupsweep.optimizers.composed import ComposableOptimizer
from mupsweep.optimizers.optimizer import MATRICES, Dims
from mupsweep.scaling.laws import Sizes
from mupsweep.schema import require

if TYPE_CHECKING:
    from torch import Tensor

AXES = ("out", "in")  # of a matrix (n_out, n_in): L of the papers handles the out axis, R the in axis


@dataclass(frozen=True, kw_only=True)
class Preconditioned(ComposableOptimizer):
    """The keys that both share.

    Attributes:
        every: steps from one eigendecomposition, or QR decomposition, to the next.
        max_axis: a longer axis of the whole matrix is not preconditioned.
    """

    every: int = 1
    max_axis: int = 10000

    roles: tuple[str, ...] = ("hidden",)

    supported_roles: ClassVar[tuple[str, ...]] = MATRICES
    made: ClassVar[str]  # of the second moments of an axis: their "root" or a "basis"

    @property
    @abstractmethod
    def active(self) -> tuple[str, ...]:
        """The axes that are preconditioned."""

    @abstractmethod
    def base_algorithm(self, dims: Dims) -> Preconditioned: ...

    def state(self, weights: Tensor) -> dict[str, Tensor]:
        state = super().state(weights)
        for axis in self.active:
            count, n, _ = rows_along(weights, axis).shape
            state |= {name: weights.new_zeros(count, n, n) for name in (axis, f"{axis}_{self.made}")}
        return state

    def base_state_size(self, dims: Dims) -> int:
        return super().base_state_size(dims) + sum(
            2 * n**2 for axis, n in zip(AXES, dims, strict=True) if axis in self.active
        )

    def block_sizes(self, dims: Dims | None) -> Sizes:
        """An axis that is not preconditioned is not cut either (Qiu et al. 2512.05620, code)."""
        active = (self if dims is None else self.base_algorithm(dims)).active
        b_out, b_in = (self.block_size if axis in active else None for axis in AXES)
        return b_out, b_in

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("every", "max_axis"):
            require(getattr(self, key) >= 1, f"optimizer.{key}", getattr(self, key), "at least 1")


def rows_along(stack: Tensor, axis: str) -> Tensor:
    """A view of a stack (count, n_out, n_in) that has `axis` as its rows."""
    return stack if axis == "out" else stack.mT


def multiplied(factor: Tensor, stack: Tensor, axis: str) -> Tensor:
    """F X along the out axis, X F^T along the in axis."""
    return factor @ stack if axis == "out" else stack @ factor.mT


def accumulate(moments: Tensor, grads: Tensor, axis: str, keep: float, take: float) -> None:
    """L <- keep L + take G G^T in place, or R <- keep R + take G^T G; `moments` are (count, n, n)."""
    rows = rows_along(grads, axis)
    moments.baddbmm_(rows, rows.mT, beta=keep, alpha=take)
