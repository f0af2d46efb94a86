"""LAMB: Adam whose every matrix moves by a fraction of its own norm (You et al. 1904.00962 v3, Algorithm 2).

The paper's own form: bias correction, phi the identity, no clamp on the norms, which would bind at some widths only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from mupsweep.optimizers.adamw import adam_direction
from mupsweep.optimizers.algorithm import StepContext
from mupsweep.optimizers.composed import ComposableOptimizer
from mupsweep.optimizers.optimizer import MATRICES, Dims, Threshold, check_decays
from mupsweep.scaling import UpdateLaw
from mupsweep.scaling.laws import ENTRYWISE
from mupsweep.schema import one_of

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT_NORMS = ("spectral", "frobenius")


@dataclass(frozen=True, kw_only=True)
class LAMB(ComposableOptimizer):
    """U = r + weight_decay * W, r Adam's direction; W -= lr * ||W||_F / ||U||_F * U. lr: relative change per update.

    Attributes:
        betas: decay of the first and of the second moment.
        weight_norm: the norm of W that the LR rule counts with. "frobenius" is what the step multiplies in: of a
            Gaussian matrix it is sqrt(n) times the spectral norm, and the LR of hidden matrices falls as r_n^-1/2.
            "spectral" is the published rule: Gupta et al. (2602.20937, section 4.4) take ||W||_F ~ ||W||_2, so that
            one LR fits all widths.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    weight_norm: str = "frobenius"

    roles: tuple[str, ...] = MATRICES

    supported_roles: ClassVar[tuple[str, ...]] = MATRICES  # a bias starts at zero and would never move

    uses_weights = True
    applies_weight_decay = True
    memory = ("m", "v")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decays(self, "betas")
        one_of(self.weight_norm, WEIGHT_NORMS, "optimizer.weight_norm")

    def caveats(self, width: int) -> list[str]:
        notes = super().caveats(width)
        if self.weight_norm == "spectral" and not self.spectral_norm and not self.hyperball:
            notes.append(
                f"the optimum of {self.name} moves with the width: its rule takes ||W||_F for ||W||_2, features change "
                "as width^+0.46 and ||dW||_R of hidden matrices as width^+0.45 from width 32 to 256; "
                "optimizer.weight_norm=frobenius cures it (+0.02 and -0.02), which optimizer=lamb has"
            )
        return notes

    @property
    def oriented(self) -> bool:
        return self.composed  # a matrix and its transpose take the same step, and no copy is the fastest

    def base_law(self, dims: Dims | None = None) -> UpdateLaw:
        return UpdateLaw(weight_norm=self.weight_norm)

    def measured_law(self, dims: Dims | None = None) -> UpdateLaw:
        return replace(self, weight_norm="frobenius").update_law(dims)

    def decay_law(self, dims: Dims | None = None) -> UpdateLaw:
        return ENTRYWISE  # decay stands beside Adam's direction

    def thresholds(self, dims: Dims | None = None) -> Mapping[str, Threshold]:
        return {**super().thresholds(dims), "eps": Threshold(self.eps, ENTRYWISE)}

    def direction(self, grads: Tensor, state: dict[str, Tensor], now: StepContext) -> Tensor:
        from mupsweep.optimizers.wrappers import norm, with_norm

        assert now.weights is not None
        update = adam_direction(grads, state["m"], state["v"], self.betas, now)  # r = m_hat / (sqrt(v_hat) + eps)
        update.add_(now.weights, alpha=now.weight_decay)  # r + lambda W
        return with_norm(update, norm(now.weights))  # phi(||W||) / ||r + lambda W|| (r + lambda W)
