"""Muon++: Muon whose update leaves the top singular direction of the weight alone (Zhao, 2601.01306).

    max <G, D>  with  ||D||_2 <= 1  and  ||W - lr S D||_2 = S,  S = sqrt(n_out / n_in)

Algorithm 1 keeps ||W||_2 = S by its updates as long as lr S is less than the gap of the two largest singular values of
W; beyond, the second one takes over and the norm slowly grows. Algorithm 2 also rescales the weight after each step.

The paper starts from ||W||_2 = S by its initialisation (Yang et al. 2310.17813, parametrization 1), where it holds up
to fluctuations; here the weight is scaled to exactly S before training. Experimental: the adaptive condition of section
4.4 is a first step by the paper's own account, without a value for its constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mupsweep.errors import ConfigError
from mupsweep.optimizers.algorithm import StepContext
from mupsweep.optimizers.optimizer import Dims
from mupsweep.optimizers.singular_values import msign, power_iterate, top_singular_pair
from mupsweep.optimizers.spectral_sphere import SpectralSphere
from mupsweep.schema import require

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MuonPlusPlus(SpectralSphere):
    """W -= lr * S * msign((I - u u^T) M (I - v v^T)), M the momentum, (u, v) the top singular pair of W.
    lr: spectral norm of an update / that of the weight.

    Attributes:
        momentum: M <- momentum * M + G.
        rescale: Algorithm 2, W <- S W / ||W||_2 after each step; the paper's for hidden sizes above 4096.
        adaptive: C; once the common correlation rho of W's entries exceeds C (n_out^-1/2 + n_in^-1/2), W is multiplied
            after a step by sqrt(rho before / rho after), which keeps the norm that rho causes. null: off.
    """

    eps: float = 1e-7
    momentum: float = 0.95
    rescale: bool = False
    adaptive: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.adaptive is None or self.adaptive > 0, "optimizer.adaptive", self.adaptive, "positive or null")
        if self.rescale and self.adaptive is not None:
            raise ConfigError(
                f"optimizer.adaptive={self.adaptive}: optimizer.rescale=true undoes what it does; set one of them"
            )

    def base_state_size(self, dims: Dims) -> int:
        """The momentum, a singular vector and, where it is used, a correlation."""
        return super().base_state_size(dims) + (self.adaptive is not None)

    def state(self, weights: Tensor) -> dict[str, Tensor]:
        adaptive = {} if self.adaptive is None else {"rho": correlation(weights)}
        return super().state(weights) | adaptive

    def direction(self, grads: Tensor, state: dict[str, Tensor], now: StepContext) -> Tensor:
        assert now.weights is not None
        M = state["momentum"].mul_(self.momentum).add_(grads)
        _, u, v = top_singular_pair(now.weights, state["top"])
        M = M - u @ (u.mT @ M)  # (I - u u^T) M
        M = M - (M @ v) @ v.mT  # ... (I - v v^T)
        return msign(M, now.thresholds["eps"]).mul_(self.radius_of(grads))

    def renormalize(self, weights: Tensor, state: dict[str, Tensor]) -> None:
        power_iterate(weights, state["top"], self.power_iterations)
        if self.rescale:
            self.retract(weights, state["top"])
        if self.adaptive is not None:
            n_out, n_in = weights.shape[-2:]
            before, after = state["rho"].clone(), state["rho"].copy_(correlation(weights))
            large = (before > 0) & (after > self.adaptive * (n_out**-0.5 + n_in**-0.5))
            weights.mul_((before / after).sqrt().where(large, before.new_ones(())).view(-1, 1, 1))


def correlation(weights: Tensor) -> Tensor:
    """The common correlation of the entries of each matrix (count,): (N mean(W)^2 - s2) / ((N - 1) s2), where N is the
    number of entries and s2 = mean(W^2) (section 4.4)."""
    entries = weights[0].numel()
    mean, square = weights.mean(dim=(-2, -1)), weights.square().mean(dim=(-2, -1))
    return (entries * mean**2 - square) / ((entries - 1) * square)
