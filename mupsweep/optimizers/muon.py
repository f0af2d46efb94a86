"""Muon: momentum, orthogonalised by Newton-Schulz (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

The conventions differ in the shape factor that they multiply into the update, and so in what an LR means:
plain 1 (Zheng et al. 2603.00541), jordan sqrt(max(1, n_out/n_in)) (torch's `original`), bernstein sqrt(n_out/n_in),
kimi 0.2 sqrt(max(n_out, n_in)) (Moonlight 2502.16982, torch's `match_rms_adamw`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mupsweep.errors import ConfigError, nearest
from mupsweep.optimizers.optimizer import Optimizer
from mupsweep.scaling import Role, UpdateLaw
from mupsweep.scaling.laws import jordan, match_rms_adamw, one, spectral_ratio

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SHAPE_FACTORS = {"plain": one, "jordan": jordan, "bernstein": spectral_ratio, "kimi": match_rms_adamw}
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: singular values end in about [0.7, 1.2]


@dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """W -= lr * (shape_factor * orthogonalise(momentum) + weight_decay * W). lr: spectral norm per update (plain).

    Attributes:
        scaling: the convention, a key of SHAPE_FACTORS.
        momentum: decay of the average of gradients.
        nesterov: orthogonalise the gradient mixed with the average instead of the average.
        ns_steps: Newton-Schulz iterations.
    """

    eps: float = 1e-7
    scaling: str = "plain"
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5

    takes: ClassVar[frozenset[Role]] = frozenset({Role.HIDDEN})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scaling not in SHAPE_FACTORS:
            raise ConfigError(f"optimizer.scaling={self.scaling}: {nearest(self.scaling, SHAPE_FACTORS)}")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"optimizer.momentum={self.momentum}: expected a number in [0, 1)")
        if self.ns_steps < 1:
            raise ConfigError(f"optimizer.ns_steps={self.ns_steps}: expected at least 1")

    def update_law(self) -> UpdateLaw:
        return UpdateLaw(shape_factor=SHAPE_FACTORS[self.scaling])

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        from mupsweep.optimizers.stacked import StackedOptimizer

        return StackedOptimizer(groups, self)

    def state(self, weights: Tensor) -> dict[str, Tensor]:
        """The optimizer's memory for a stack of matrices (count, n_out, n_in)."""
        return {"momentum": weights.new_zeros(weights.shape)}

    def direction(self, grads: Tensor, state: dict[str, Tensor], eps: float) -> Tensor:
        """The update at LR 1 for a stack of same-shape matrices, all (count, n_out, n_in)."""
        average = state["momentum"].lerp_(grads, 1 - self.momentum)
        mixed = grads.lerp(average, self.momentum) if self.nesterov else average
        n_out, n_in = grads.shape[-2:]
        return orthogonalise(mixed, self.ns_steps, eps).mul_(SHAPE_FACTORS[self.scaling](n_out, n_in))


def orthogonalise(matrices: Tensor, steps: int, eps: float) -> Tensor:
    """Newton-Schulz in bf16: the nearest (semi-)orthogonal matrices to a stack (count, n_out, n_in), as fp32.

    `eps` bounds the Frobenius norm from below before it divides.
    """
    a, b, c = COEFFICIENTS
    X = matrices.bfloat16()
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        X = X.mT
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)  # so that every singular value is at most 1
    for _ in range(steps):
        gram = X @ X.mT
        X = X.baddbmm(gram.baddbmm(gram, gram, beta=b, alpha=c), X, beta=a)  # a X + (b G + c G G) X
    return (X.mT if tall else X).float()
