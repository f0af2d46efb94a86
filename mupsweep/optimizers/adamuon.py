"""AdaMuon: Adam's second moment of Muon's orthogonalised update (Si, Zhang and Shen, 2507.11005 v3, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from mupsweep.optimizers.algorithm import StepContext
from mupsweep.optimizers.composed import ComposableOptimizer
from mupsweep.optimizers.optimizer import MATRICES, Dims, Threshold, check_decays
from mupsweep.optimizers.singular_values import orthogonalise
from mupsweep.scaling import UpdateLaw
from mupsweep.scaling.laws import ENTRYWISE, InBlocks, blocked, entries
from mupsweep.schema import require

if TYPE_CHECKING:
    from torch import Tensor

RMS = 0.2  # of an update's entries: about that of AdamW's (Moonlight, 2502.16982)


@dataclass(frozen=True, kw_only=True)
class AdaMuon(ComposableOptimizer):
    """W -= lr * (0.2 sqrt(n_out n_in) O / ||O||_F + weight_decay * W), O orthogonalised and then divided by the root of
    its second moment, entry by entry. lr: five times the RMS of an update's entries.

    Attributes:
        betas: decay of the momentum and of the second moment; the paper has one for both.
        sign: orthogonalise the signs of the momentum; false is version 1 of the paper.
        ns_steps: Newton-Schulz iterations.
        eps: bounds the norm that divides in Newton-Schulz.
        entry_eps: beside the root of the second moment.
    """

    eps: float = 1e-7
    betas: tuple[float, float] = (0.95, 0.95)
    sign: bool = True
    ns_steps: int = 5
    entry_eps: float = 1e-8

    roles: tuple[str, ...] = ("hidden",)

    supported_roles: ClassVar[tuple[str, ...]] = MATRICES
    memory = ("momentum", "v")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decays(self, "betas")
        require(self.ns_steps >= 1, "optimizer.ns_steps", self.ns_steps, "at least 1")
        require(self.entry_eps > 0, "optimizer.entry_eps", self.entry_eps, "a positive number")

    def caveats(self, width: int) -> list[str]:
        notes = super().caveats(width)
        if not self.spectral_norm:
            notes.append(
                f"the optimum of {self.name} moves with the width: the RMS of its updates follows the rule, but they "
                "line up less the wider the model, ||dW||_R of hidden matrices as width^-0.36 from width 32 to 128 "
                "(Qiu et al. 2512.05620, section 3.2); optimizer.spectral_norm=true optimizer.lr_ratio=0.1 cures it "
                "(-0.03)"
            )
        return notes

    def base_law(self, dims: Dims | None = None) -> UpdateLaw:
        return ENTRYWISE

    def thresholds(self, dims: Dims | None = None) -> Mapping[str, Threshold]:
        """eps is compared with the norm of a gradient, as Muon's; entry_eps with an entry of an orthogonal block."""
        norm, entry = UpdateLaw(), UpdateLaw(blocks=entries, eps_degree=0)
        if self.block_size is not None:
            sizes = self.block_sizes(dims)
            norm, entry = blocked(norm, sizes), replace(entry, blocks=InBlocks(entries, sizes, counted=False))
        own = {"eps": Threshold(self.eps, norm), "entry_eps": Threshold(self.entry_eps, entry)}
        return {**super().thresholds(dims), **own}

    def direction(self, grads: Tensor, state: dict[str, Tensor], now: StepContext) -> Tensor:
        n_out, n_in = grads.shape[-2:]
        M = state["momentum"].mul_(self.betas[0]).add_(grads)  # M <- b M + G
        update = orthogonalise(M.sign() if self.sign else M, self.ns_steps, now.thresholds["eps"])  # O
        v = state["v"].mul_(self.betas[1]).addcmul_(update, update, value=1 - self.betas[1])  # V <- b V + (1 - b) O O
        update = update.div_(v.sqrt().add_(now.thresholds["entry_eps"]))  # O / (sqrt(V) + eps)
        norm = update.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-30)  # an update of zero stays one
        return update.mul_(RMS * (n_out * n_in) ** 0.5 / norm)
