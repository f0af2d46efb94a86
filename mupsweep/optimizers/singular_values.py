"""Functions of the singular values of every matrix of a stack (count, n_out, n_in)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
from typing import TYPE_CHECKING

Quintic = tuple[float, float, float]  # (a, b, c) of a sigma + b sigma^3 + c sigma^5

JORDAN: Quintic = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024, kellerjordan.github.io/posts/muon
# Amsel et al. 2505.16932 (Polar Express), rounded as in the code of SSO, 2601.08393.
POLAR_EXPRESS: tuple[Quintic, ...] = (
    (8.2051, -22.9019, 16.4607),
    (4.0664, -2.8612, 0.5184),
    (3.9096, -2.8234, 0.5250),
    (3.2856, -2.4153, 0.4853),
    (2.2779, -1.6198, 0.3985),
    (1.8726, -1.2307, 0.3585),
    (1.8564, -1.2132, 0.3568),
    (1.8750, -1.2500, 0.3750),
)

LONGEST_SIDE = 256  # of matrices that are multiplied as stacks, per CPU thread


def orthogonalise(matrices: Tensor, steps: int, eps: float) -> Tensor:
    """Muon's: singular values to about [0.7, 1.2], in bf16; the result is fp32.

    `eps` bounds the Frobenius norm from below before it divides.
    """
    return _newton_schulz(matrices.bfloat16(), (JORDAN,) * steps, eps).float()


def msign(matrices: Tensor, eps: float) -> Tensor:
    """U V^T: singular values from 1e-3 of the Frobenius norm up end at 1, in fp32; those of zero stay zero.

    `eps` bounds the Frobenius norm from below before it divides.
    """
    return _newton_schulz(matrices.float(), POLAR_EXPRESS, eps)


def _newton_schulz(stack: Tensor, quintics: tuple[Quintic, ...], eps: float) -> Tensor:
    """One quintic after the other, applied to the singular values divided by the Frobenius norm."""
    import torch

    wide = stack.shape[-2] <= stack.shape[-1]
    X = stack if wide else stack.mT
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)  # so that every singular value is at most 1
    if batch_pays(X):
        X = _iterate(X, quintics)
        return X if wide else X.mT
    each = (_iterate(one, quintics) for one in X)  # a large transpose is faster copied than added to a weight as it is
    return torch.stack([one if wide else one.mT.contiguous() for one in each])


def _iterate(rows: Tensor, quintics: tuple[Quintic, ...]) -> Tensor:
    """The quintics of a stack (count, n, m) or of one matrix (n, m), n <= m."""
    import torch

    X, plus_product = rows, torch.baddbmm if rows.ndim == 3 else torch.addmm
    for a, b, c in quintics:
        gram = X @ X.mT
        X = plus_product(X, plus_product(gram, gram, gram, beta=b, alpha=c), X, beta=a)  # a X + (b G + c G G) X
    return X


def batch_pays(stack: Tensor) -> bool:
    """Whether a product of stacks is faster than one product per matrix: always on accelerators, where a launch costs
    more than a small product. On a CPU it parallelises over matrices, which pays until one alone fills the threads, and
    a stack of one matrix never pays (`make bench`, part optimizers)."""
    import torch

    if stack.device.type != "cpu":
        return True
    return len(stack) > 1 and min(stack.shape[-2:]) <= LONGEST_SIDE * torch.get_num_threads()


def clip(matrices: Tensor) -> Tensor:
    """Singular values above 1 to 1, the others left alone: the nearest matrices of spectral norm 1.

    From the smaller Gram matrices, whose eigenvalues below 1 are inexact but do not enter. In fp32 one close to 1 is
    known to 1e-7 of the largest.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    rows = matrices if wide else matrices.mT
    values, vectors = symmetric_eigen(rows @ rows.mT)
    clipped = (vectors * values.clamp(min=1.0).rsqrt().unsqueeze(-2)) @ (vectors.mT @ rows)
    return clipped if wide else clipped.mT


def top_singular_pair(matrices: Tensor, vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sigma, u, v) of the right singular vectors (count, n_in), as (count, 1, 1), (count, n_out, 1), (count, n_in, 1).

    Sigma is ||W v||, so at most the true one. A matrix of zeros has a u of zeros.
    """
    v = vector.unsqueeze(-1)
    image = matrices @ v
    return image.norm(dim=-2, keepdim=True), _unit(image, otherwise=image), v


def power_iterate(matrices: Tensor, vector: Tensor, iterations: int) -> None:
    """Turn `vector` (count, n_in) towards the top right singular vectors, in place; matrices of zeros keep theirs."""
    v = vector.unsqueeze(-1)
    for _ in range(iterations):
        v.copy_(_unit(matrices.mT @ (matrices @ v), otherwise=v))


def random_like(vectors: Tensor) -> Tensor:
    """A random vector for each of (count, n), the same every time."""
    import torch

    drawn = torch.randn(vectors.shape[-1], generator=torch.Generator().manual_seed(0))
    return drawn.to(vectors).expand_as(vectors)


def top_right_vectors(matrices: Tensor) -> Tensor:
    """The right singular vector of each largest singular value, (count, n_in), from the smaller Gram matrices."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    rows = matrices if wide else matrices.mT
    _, vectors = symmetric_eigen(rows @ rows.mT)
    top = vectors[..., -1:]
    return (_unit(rows.mT @ top, otherwise=rows.mT @ top) if wide else top).squeeze(-1)


def _unit(columns: Tensor, otherwise: Tensor) -> Tensor:
    """Columns (count, n, 1) of length 1; `otherwise` for those of length 0."""
    import torch

    length = columns.norm(dim=-2, keepdim=True)
    return torch.where(length > 0, columns / length, otherwise)


def symmetric_eigen(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (count, n) from small to large, and eigenvectors as columns (count, n, n), of symmetric matrices.

    What is not finite counts as zero: LAPACK refuses it, but a diverged run should end by its loss.
    """
    import torch

    finite = matrices.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    try:
        return torch.linalg.eigh(finite)
    except torch.linalg.LinAlgError:  # pyright: ignore  # fp32 gives up on some matrices of many equal eigenvalues
        values, vectors = torch.linalg.eigh(finite.double())
        return values.to(matrices.dtype), vectors.to(matrices.dtype)
