"""Norms that the scaling rules speak of: RMS of features, RMS operator norm of weights.

    ||h||_R = ||h||_2 / sqrt(dim h),    ||W||_R = max ||W v||_R / ||v||_R = sqrt(n_in / n_out) ||W||_2

(Yang, Simon and Bernstein 2310.17813.) Weights are (n_out, n_in).
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_UP_TO = 2048  # shorter side of a matrix whose singular values are computed rather than iterated for
ITERATIONS = 300  # of power iteration at most
PRECISION = 1e-5  # relative change of the norm at which power iteration stops


def rms_norm(h: Tensor) -> float:
    """Root mean square over all entries."""
    return h.detach().double().square().mean().sqrt().item()


def rms_operator_norm(matrix: Tensor) -> float:
    """||W||_R of a matrix (n_out, n_in); a vector counts as (n_out, 1), so its RMS."""
    n_out, n_in = (*matrix.shape, 1)[:2]
    return (n_in / n_out) ** 0.5 * spectral_norm(matrix)


def spectral_norm(matrix: Tensor) -> float:
    """The largest singular value of a matrix (n_out, n_in) or vector (n_out,).

    Exact, from the eigenvalues of the smaller Gram matrix, up to a shorter side of EXACT_UP_TO; beyond by power
    iteration, from below and to about a thousandth.
    """
    W = matrix.detach().double()
    if W.ndim == 1:
        return W.norm().item()
    if min(W.shape) > EXACT_UP_TO:
        return power_iteration(W)
    gram = W @ W.mT if W.shape[0] < W.shape[1] else W.mT @ W
    return torch.linalg.eigvalsh(gram)[-1].clamp(min=0.0).sqrt().item()


def power_iteration(matrix: Tensor) -> float:
    """The largest singular value from below, by iterating W^T W from a random vector; the same for the same matrix."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(matrix.shape[1], dtype=matrix.dtype, generator=generator).to(matrix.device)
    sigma = 0.0
    for _ in range(ITERATIONS):
        image = matrix @ (v / v.norm())
        before, sigma = sigma, image.norm().item()
        if sigma == 0.0 or sigma - before < PRECISION * sigma:
            break
        v = matrix.mT @ image
    return sigma


def stable_rank(matrix: Tensor) -> float:
    """||W||_F^2 / ||W||_2^2 of a matrix that is not zero: 1 for rank 1, min(n_out, n_in) for an orthogonal matrix."""
    return (matrix.detach().double().norm().item() / spectral_norm(matrix)) ** 2
