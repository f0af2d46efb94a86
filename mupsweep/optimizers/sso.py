"""SSO, the spectral sphere optimizer: steepest descent in the spectral norm at a fixed spectral norm of the weight
(Xie et al. 2601.08393; github.com/Unakar/Spectral-Sphere-Optimizer).

    max <G, Phi>  with  ||Phi||_2 = 1  and  ||W - lr R Phi||_2 = ||W||_2 = R = radius sqrt(n_out / n_in)

To first order the second constraint is <u v^T, Phi> = 0 for the top singular pair (u, v) of W, and the solution is
Phi = msign(G + lam u v^T) for the one lam that meets it. Weights start on the sphere and return to it after each step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mupsweep.optimizers.algorithm import StepContext
from mupsweep.optimizers.singular_values import msign, power_iterate, top_singular_pair
from mupsweep.optimizers.spectral_sphere import SpectralSphere
from mupsweep.schema import require

if TYPE_CHECKING:
    from torch import Tensor

FIRST_WIDTH = 1e-3  # of the bracket of lam, as in the authors' code; it doubles until it holds the root
DOUBLINGS = 20  # |lam| is at most twice the nuclear norm of a matrix of Frobenius norm 1
TOLERANCE = 2e-4  # of <u v^T, Phi>, the paper's
TINY = 1e-7  # bounds the norm of a matrix of norm about 1 before it divides


@dataclass(frozen=True, kw_only=True)
class SSO(SpectralSphere):
    """W <- retract(W - lr * R * msign(momentum + lam u v^T)). lr: spectral norm of an update / that of the weight.

    Attributes:
        radius: ||W||_2 / sqrt(n_out / n_in).
        momentum: decay of the average of gradients.
        nesterov: take the gradient mixed with the average instead of the average.
        solver_steps: at most, for lam, once it is bracketed; each costs an msign.
    """

    radius: float = 1.0
    momentum: float = 0.9
    nesterov: bool = True
    solver_steps: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.radius > 0, "optimizer.radius", self.radius, "a positive number")
        require(self.solver_steps >= 1, "optimizer.solver_steps", self.solver_steps, "at least 1")

    def direction(self, grads: Tensor, state: dict[str, Tensor], now: StepContext) -> Tensor:
        assert now.weights is not None
        average = state["momentum"].lerp_(grads, 1 - self.momentum)
        M = grads.lerp(average, self.momentum) if self.nesterov else average
        M = M / M.norm(dim=(-2, -1), keepdim=True).clamp(min=now.thresholds["eps"])
        _, u, v = top_singular_pair(now.weights, state["top"])
        return tangent_msign(M, u @ v.mT, self.solver_steps).mul_(self.radius_of(grads))

    def renormalize(self, weights: Tensor, state: dict[str, Tensor]) -> None:
        power_iterate(weights, state["top"], self.power_iterations)
        self.retract(weights, state["top"])

    def radius_of(self, weights: Tensor) -> float:
        """R."""
        return self.radius * super().radius_of(weights)


def tangent_msign(unit: Tensor, normal: Tensor, steps: int) -> Tensor:
    """Phi = msign(unit + lam normal) with <normal, Phi> = 0 within TOLERANCE, for matrices of Frobenius norm 1.

    The inner product grows with lam. A bracket doubles until it holds the root; then false positions close in on it,
    with half the value of an end that stays (Illinois). The authors bisect to the same root, with three times as many
    products.
    """
    import torch

    def at(lam: Tensor) -> tuple[Tensor, Tensor]:
        Phi = msign(unit + lam * normal, eps=TINY)
        return Phi, (normal * Phi).sum(dim=(-2, -1), keepdim=True)

    a = unit.new_zeros(len(unit), 1, 1)
    Phi, at_a = at(a)
    side = at_a.sign()
    b = -FIRST_WIDTH * side
    Phi, at_b = at(b)
    for _ in range(DOUBLINGS):
        held = at_b * side <= 0
        if held.all():
            break
        a, at_a, b = torch.where(held, a, b), torch.where(held, at_a, at_b), torch.where(held, b, 2 * b)
        Phi, at_b = at(b)
    for _ in range(steps):
        if (at_b.abs() <= TOLERANCE).all():
            break
        between = (a * at_b - b * at_a) / torch.where(at_a == at_b, 1.0, at_b - at_a)  # both are 0 where unit is
        Phi, inner = at(between)
        crossed = inner * at_b < 0
        a, at_a = torch.where(crossed, b, a), torch.where(crossed, at_b, at_a / 2)
        b, at_b = between, inner
    return Phi
