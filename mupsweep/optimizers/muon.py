"""Muon: momentum, orthogonalised by Newton-Schulz (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

The conventions differ in the shape factor that they multiply into the update, and so in what an LR means:
plain 1 (Zheng et al. 2603.00541), jordan sqrt(max(1, n_out/n_in)) (torch's `original`), bernstein sqrt(n_out/n_in),
kimi 0.2 sqrt(max(n_out, n_in)) (Moonlight 2502.16982, torch's `match_rms_adamw`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mupsweep.errors import ConfigError
from mupsweep.formatting import nearest
from mupsweep.optimizers.algorithm import StepContext
from mupsweep.optimizers.composed import ComposableOptimizer
from mupsweep.optimizers.optimizer import MATRICES, Dims, check_decays
from mupsweep.optimizers.singular_values import orthogonalise
from mupsweep.scaling import UpdateLaw
from mupsweep.scaling.laws import jordan, match_rms_adamw, one, spectral_ratio
from mupsweep.schema import one_of, require

if TYPE_CHECKING:
    from torch import Tensor

SHAPE_FACTORS = {"plain": one, "jordan": jordan, "bernstein": spectral_ratio, "kimi": match_rms_adamw}


def convert(lr: float, source: str, target: str, n_out: int, n_in: int) -> float:
    """The LR in convention `target` that steps an (n_out, n_in) matrix as `lr` does in convention `source`.

    Weight decay is coupled to the LR as the optimizer is given it, so a coefficient converts by the inverse.

    Raises:
        ConfigError: a convention that is no key of SHAPE_FACTORS.
    """
    for convention in (source, target):
        if convention not in SHAPE_FACTORS:
            raise ConfigError(f"Muon has no convention {convention}: {nearest(convention, SHAPE_FACTORS)}")
    return lr * SHAPE_FACTORS[source](n_out, n_in) / SHAPE_FACTORS[target](n_out, n_in)


@dataclass(frozen=True, kw_only=True)
class Muon(ComposableOptimizer):
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

    roles: tuple[str, ...] = ("hidden",)

    supported_roles: ClassVar[tuple[str, ...]] = MATRICES

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.scaling, tuple(SHAPE_FACTORS), "optimizer.scaling")
        check_decays(self, "momentum")
        require(self.ns_steps >= 1, "optimizer.ns_steps", self.ns_steps, "at least 1")

    def base_law(self, dims: Dims | None = None) -> UpdateLaw:
        return UpdateLaw(shape_factor=SHAPE_FACTORS[self.scaling], full_rank=True)

    def direction(self, grads: Tensor, state: dict[str, Tensor], now: StepContext) -> Tensor:
        average = state["momentum"].lerp_(grads, 1 - self.momentum)
        mixed = grads.lerp(average, self.momentum) if self.nesterov else average
        n_out, n_in = grads.shape[-2:]
        return orthogonalise(mixed, self.ns_steps, now.thresholds["eps"]).mul_(SHAPE_FACTORS[self.scaling](n_out, n_in))
