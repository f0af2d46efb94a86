"""Shampoo (Gupta, Koren and Singer, 1802.09568) with free exponents.

The paper has exponents 1/4 and 1/4 and sums of squared gradients. Zheng et al. (2603.00541) and Qiu et al.
(2512.05620) average them, and Qiu's Shampoo2 has exponents 1/2 and 1/2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from mupsweep.errors import ConfigError
from mupsweep.optimizers.algorithm import StepContext
from mupsweep.optimizers.optimizer import Dims, check_decays
from mupsweep.optimizers.preconditioner import AXES, Preconditioned, accumulate, multiplied
from mupsweep.optimizers.singular_values import symmetric_eigen
from mupsweep.scaling import UpdateLaw
from mupsweep.schema import one_of, require

if TYPE_CHECKING:
    from torch import Tensor

STATISTICS = ("ema", "sum")


@dataclass(frozen=True, kw_only=True)
class Shampoo(Preconditioned):
    """W -= lr * (L^-e_L M R^-e_R + weight_decay * W). lr: spectral norm per update where e_L + e_R = 1/2.

    Attributes:
        exponents: (e_L, e_R), numbers or fractions such as "1/4"; 0 leaves an axis as it is.
        statistics: L and R are averages ("ema", bias corrected) or sums ("sum", the paper's) of G G^T and G^T G.
        betas: decays of M, the average of gradients (bias corrected), and of L and R.
        eps: added to the eigenvalues of L and R before the root; for sums, the same as starting them at eps * I.
        relative_eps: so much of the largest eigenvalue is added too, which needs no scaling. In fp32 rounding blurs
            eigenvalues below about 1e-6 of the largest.
    """

    exponents: tuple[str, str] = ("1/4", "1/4")
    statistics: str = "ema"
    betas: tuple[float, float] = (0.95, 0.95)
    eps: float = 1e-16
    relative_eps: float = 1e-6

    made = "root"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.statistics, STATISTICS, "optimizer.statistics")
        check_decays(self, "betas")
        require(self.relative_eps >= 0, "optimizer.relative_eps", self.relative_eps, "at least 0")
        try:
            valid = min(map(Fraction, self.exponents)) >= 0 and any(map(Fraction, self.exponents))
        except (ValueError, ZeroDivisionError):
            valid = False
        expected = "two fractions of at least 0, such as [1/4,1/4], not both 0"
        require(valid, "optimizer.exponents", list(self.exponents), expected)

    def caveats(self, width: int) -> list[str]:
        notes = super().caveats(width)
        if sum(self.powers.values()) == 1 and not self.spectral_norm:
            notes.append(
                f"the optimum of {self.name} moves with the width: its updates line up otherwise in wider models than "
                "its rule assumes, the change of features as width^+0.23 from width 32 to 256 (Qiu et al. "
                "2512.05620, section 3.2); optimizer.spectral_norm=true optimizer.lr_ratio=0.1 cures it down to +0.13"
            )
        return notes

    @property
    def active(self) -> tuple[str, ...]:
        return tuple(self.powers)

    @property
    def powers(self) -> dict[str, Fraction]:
        """The exponent of every axis that is preconditioned."""
        return {axis: Fraction(e) for axis, e in zip(AXES, self.exponents, strict=True) if Fraction(e)}

    def base_algorithm(self, dims: Dims) -> Shampoo:
        kept = tuple("0" if n > self.max_axis else e for n, e in zip(dims, self.exponents, strict=True))
        if not any(map(Fraction, kept)):
            raise ConfigError(
                f"optimizer.max_axis={self.max_axis}: {self.name} has no axis of a {dims} matrix to precondition; "
                "raise max_axis, or leave such matrices to optimizer.rest"
            )
        return self if kept == tuple(self.exponents) else replace(self, exponents=kept)

    def base_law(self, dims: Dims | None = None) -> UpdateLaw:
        active = self if dims is None else self.base_algorithm(dims)
        degree = 1 - 2 * sum(active.powers.values(), Fraction(0))
        return UpdateLaw(degree=degree, eps_power=2)

    def direction(self, grads: Tensor, state: dict[str, Tensor], now: StepContext) -> Tensor:
        keep, take, total = 1.0, 1.0, 1.0
        if self.statistics == "ema":
            keep, take, total = self.betas[1], 1 - self.betas[1], 1 - self.betas[1] ** now.step
        # M <- beta1 M + (1 - beta1) G
        update = state["momentum"].lerp_(grads, 1 - self.betas[0]) / (1 - self.betas[0] ** now.step)
        for axis, exponent in self.powers.items():
            moments, root = state[axis], state[f"{axis}_root"]
            # L <- L + G G^T, or beta2 L + (1 - beta2) G G^T;   R likewise with G^T G
            accumulate(moments, grads, axis, keep, take)
            if (now.step - 1) % self.every == 0:
                root.copy_(inverse_root(moments / total, float(exponent), now.thresholds["eps"], self.relative_eps))
            # L^-e_L M R^-e_R
            update = multiplied(root, update, axis)
        return update


def inverse_root(matrices: Tensor, exponent: float, eps: float, relative_eps: float) -> Tensor:
    """(A + ridge I)^-exponent of symmetric A >= 0 (count, n, n), ridge = eps + relative_eps * largest eigenvalue.

    Eigenvalues that rounding made negative count as zero; without a ridge a zero stays one, as in a pseudo-inverse.
    """
    import torch

    values, vectors = symmetric_eigen(matrices)
    values = values.clamp(min=0)
    ridged = values + eps + relative_eps * values[:, -1:]
    roots = torch.where(ridged > 0, ridged**-exponent, torch.zeros_like(ridged))
    return (vectors * roots.unsqueeze(-2)) @ vectors.mT
