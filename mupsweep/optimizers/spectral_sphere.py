"""Optimizers that keep the spectral norm of every weight: ||W||_2 = S, S = sqrt(n_out / n_in) unless scaled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mupsweep.optimizers.composed import ComposableOptimizer
from mupsweep.optimizers.optimizer import Dims, check_decays
from mupsweep.optimizers.singular_values import top_right_vectors, top_singular_pair
from mupsweep.scaling import UpdateLaw
from mupsweep.scaling.laws import spectral_ratio
from mupsweep.schema import require

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SpectralSphere(ComposableOptimizer):
    """An optimizer of hidden matrices on the spectral sphere, from the init on, with a momentum.

    Attributes:
        momentum: decay of the average, or the sum, of gradients.
        power_iterations: a step, for the top singular pair, from the last step's.
    """

    momentum: float
    power_iterations: int = 20

    roles: tuple[str, ...] = ("hidden",)

    supported_roles: ClassVar[tuple[str, ...]] = ("hidden",)
    divides_by_weight: ClassVar[bool] = True
    rescales_init: ClassVar[bool] = True
    uses_weights = True
    renormalizes = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decays(self, "momentum")
        require(self.power_iterations >= 1, "optimizer.power_iterations", self.power_iterations, "at least 1")

    def base_law(self, dims: Dims | None = None) -> UpdateLaw:
        return UpdateLaw(shape_factor=spectral_ratio, full_rank=True)

    def base_state_size(self, dims: Dims) -> int:
        """The momentum and a singular vector."""
        return super().base_state_size(dims) + dims[1]

    def state(self, weights: Tensor) -> dict[str, Tensor]:
        return {**super().state(weights), "top": top_right_vectors(weights)}

    def rescale_init(self, weights: Tensor) -> None:
        self.retract(weights, top_right_vectors(weights))

    def retract(self, weights: Tensor, top: Tensor) -> None:
        """W <- S W / ||W||_2, `top` being the top right singular vector of W."""
        sigma, _, _ = top_singular_pair(weights, top)
        weights.mul_(self.radius_of(weights) / sigma)

    def radius_of(self, weights: Tensor) -> float:
        """S."""
        n_out, n_in = weights.shape[-2:]
        return spectral_ratio(n_out, n_in)
