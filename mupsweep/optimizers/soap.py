"""SOAP: Adam in the eigenbasis of Shampoo's statistics (Vyas et al., 2409.11321; nikhilvyas/SOAP)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mupsweep.optimizers.algorithm import StepContext
from mupsweep.optimizers.optimizer import Dims, check_decays
from mupsweep.optimizers.preconditioner import AXES, Preconditioned, accumulate, multiplied, rows_along
from mupsweep.optimizers.singular_values import symmetric_eigen
from mupsweep.scaling import UpdateLaw
from mupsweep.scaling.laws import columns, entries, one, rows
from mupsweep.schema import one_of

if TYPE_CHECKING:
    from torch import Tensor

# An axis that is not rotated is normalised entry by entry (Qiu et al. 2512.05620, code).
BLOCKS = {frozenset(AXES): one, frozenset({"out"}): columns, frozenset({"in"}): rows, frozenset(): entries}


@dataclass(frozen=True, kw_only=True)
class SOAP(Preconditioned):
    """W -= lr * (Q_L A Q_R^T + weight_decay * W), A the update of Adam for the gradient Q_L^T G Q_R.
    lr: size of an entry of A.

    The first step takes in the first gradient and leaves the weights, so that no gradient is rotated into a basis of
    its own.

    Attributes:
        betas: decays of Adam's first and second moment.
        shampoo_beta: decay of L and R, the averages of G G^T and G^T G.
        eps: added to the root of the second moment, before bias corrections.
        axes: which are rotated.
    """

    every: int = 10
    betas: tuple[float, float] = (0.95, 0.95)
    shampoo_beta: float = 0.95
    eps: float = 1e-8
    axes: tuple[str, ...] = AXES

    memory = ("m", "v")
    made = "basis"
    skips_first_step = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decays(self, "betas", "shampoo_beta")
        for axis in self.axes:
            one_of(axis, AXES, "optimizer.axes")

    def caveats(self, width: int) -> list[str]:
        notes = super().caveats(width)
        if not self.composed:
            notes.append(
                f"the optimum of {self.name} moves with the width: its rule counts on a basis that holds the present "
                "gradient, and that of the algorithm is made of earlier ones; on fresh gradients its updates grow as "
                "Adam's, features change as width^+0.98 and ||dW||_R of hidden matrices as width^+0.76 from width 32 "
                "to 256; optimizer.spectral_norm=true optimizer.lr_ratio=0.1 cures it (-0.02 and +0.01), which "
                "optimizer=soap has, or an optimizer.block_size of at most the base width (+0.07 and -0.06)"
            )
        return notes

    @property
    def active(self) -> tuple[str, ...]:
        return self.axes

    def base_algorithm(self, dims: Dims) -> SOAP:
        kept = tuple(axis for axis, n in zip(AXES, dims, strict=True) if axis in self.axes and n <= self.max_axis)
        return self if kept == tuple(self.axes) else replace(self, axes=kept)

    def base_law(self, dims: Dims | None = None) -> UpdateLaw:
        active = self if dims is None else self.base_algorithm(dims)
        return UpdateLaw(blocks=BLOCKS[frozenset(active.axes)])

    def direction(self, grads: Tensor, state: dict[str, Tensor], now: StepContext) -> Tensor:
        step = now.step - 1
        update = self.adam(grads, state, step, now.thresholds["eps"]) if step else grads.new_zeros(grads.shape)
        turns = step % self.every == 0
        momentum = self.rotated(state["m"], state, back=True) if turns else None
        for axis in self.axes:
            moments, basis = state[axis], state[f"{axis}_basis"]
            # L <- beta L + (1 - beta) G G^T;   R likewise with G^T G
            accumulate(moments, grads, axis, self.shampoo_beta, 1 - self.shampoo_beta)
            # Q_L: the eigenvectors of L, followed from then on
            if step == 0:
                basis.copy_(symmetric_eigen(moments)[1])
            elif turns:
                follow(moments, basis, rows_along(state["v"], axis))
        if momentum is not None:
            state["m"].copy_(self.rotated(momentum, state))
        return update

    def adam(self, grads: Tensor, state: dict[str, Tensor], step: int, eps: float) -> Tensor:
        """The update in the present eigenbases, in which both moments are kept."""
        m, v = state["m"], state["v"]
        # G' = Q_L^T G Q_R;   M <- beta1 M + (1 - beta1) G';   V <- beta2 V + (1 - beta2) G'^2
        turned = self.rotated(grads, state)
        m.lerp_(turned, 1 - self.betas[0])
        v.lerp_(turned.square(), 1 - self.betas[1])
        # Q_L [M / (sqrt(V) + eps)] Q_R^T, bias corrected
        update = m / v.sqrt().add_(eps)
        update.mul_((1 - self.betas[1] ** step) ** 0.5 / (1 - self.betas[0] ** step))
        return self.rotated(update, state, back=True)

    def rotated(self, stack: Tensor, state: dict[str, Tensor], back: bool = False) -> Tensor:
        """Q_L^T X Q_R of a stack (count, n_out, n_in), or Q_L X Q_R^T."""
        for axis in self.axes:
            basis = state[f"{axis}_basis"]
            stack = multiplied(basis if back else basis.mT, stack, axis)
        return stack


def follow(moments: Tensor, basis: Tensor, second: Tensor) -> None:
    """One power iteration of the eigenvectors, orthonormalised by QR, all in place.

    Columns are first sorted by their eigenvalues, the largest first, and the rows of `second`, Adam's second moment,
    move with them. All three have n rows: (count, n, n), (count, n, n), (count, n, other).
    """
    import torch

    images = moments @ basis
    order = (basis * images).sum(-2).argsort(-1, descending=True)  # by q^T L q, (count, n)
    basis.copy_(torch.linalg.qr(images.gather(-1, order.unsqueeze(-2).expand_as(images))).Q)
    second.copy_(second.gather(-2, order.unsqueeze(-1).expand_as(second)))
