"""Cross-entropy of a linear head in chunks of tokens, without the (tokens, vocabulary) matrix in memory.

Gradients are computed in the forward pass, while a chunk's probabilities are still in cache, so that a vocabulary of
50k at width 256 costs the memory of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mupsweep.models.shape import MAX_LOGITS

# logits per chunk on a CPU, 64 MiB in fp32; smaller chunks add to the weight's gradient too often
CHUNK_ELEMENTS = 2**24
DRAWS = 2**31  # the random integers of `sample_labels` are below this


class _LinearCrossEntropy(torch.autograd.Function):
    """The mean cross-entropy of `linear_cross_entropy`, whose forward pass also computes the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: float,
        dtype: torch.dtype,
        needs_grad: bool,
    ) -> Tensor:
        n_tokens, rows = features.shape[0], _chunk_rows(weight, 1)
        h, w = features.to(dtype), weight.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=h.device)
        grad_h = torch.empty_like(features) if needs_grad else None
        grad_w = torch.zeros_like(weight) if needs_grad else None
        for start in range(0, n_tokens, rows):
            chunk = slice(start, start + rows)
            log_p = _logits(h[chunk], w, scale).log_softmax(dim=1)
            target = targets[chunk, None]
            total -= log_p.gather(1, target).sum()
            if grad_h is None or grad_w is None:
                continue
            grad = log_p.exp_()  # softmax, in the same memory
            grad.scatter_add_(1, target, torch.full_like(target, -1.0, dtype=grad.dtype))
            grad = grad.to(dtype)
            grad_h[chunk] = grad @ w
            grad_w += grad.T @ h[chunk]
        if grad_h is not None:
            ctx.save_for_backward(grad_h, grad_w)
            ctx.share = scale / n_tokens
        return total / n_tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_h, grad_w = ctx.saved_tensors
        share = grads[0] * ctx.share
        return grad_h * share, grad_w * share, None, None, None, None


def linear_cross_entropy(features: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
    """Mean cross-entropy in nats of softmax(scale * features @ weight.T) against targets.

    Args:
        features: (tokens, width).
        weight: (vocabulary, width).
        targets: (tokens,) int64.
        scale: the output multiplier.

    Matrix products run in the autocast dtype where autocast is on; the softmax is always fp32.
    """
    dtype = _product_dtype(features)
    with torch.autocast(features.device.type, enabled=False):
        return _LinearCrossEntropy.apply(features, weight, targets, scale, dtype, torch.is_grad_enabled())  # type: ignore[return-value]


@torch.no_grad()
def sample_labels(features: Tensor, weight: Tensor, draws: Tensor, scale: float = 1.0) -> Tensor:
    """Labels (tokens,) sampled from softmax(scale * features @ weight.T) by inverse transform sampling.

    The label of a token is the first at which the cumulative probability exceeds the token's random number.
    Probabilities are summed as integers, so that neither the order of a device's sum nor the length of a chunk changes
    a label.

    Args:
        features, weight, scale: as in `linear_cross_entropy`.
        draws: (tokens,) int64, uniform in [0, DRAWS).
    """
    dtype, rows = _product_dtype(features), _chunk_rows(weight, 4)  # two integers of 8 bytes for every float of 4
    labels = torch.empty_like(draws)
    with torch.autocast(features.device.type, enabled=False):
        h, w = features.to(dtype), weight.to(dtype)
        for start in range(0, len(draws), rows):
            chunk = slice(start, start + rows)
            labels[chunk] = labels_of(_logits(h[chunk], w, scale), draws[chunk])
    return labels


@torch.no_grad()
def labels_of(logits: Tensor, draws: Tensor) -> Tensor:
    """Labels (tokens,) sampled from softmax(logits) as `sample_labels` does it; logits (tokens, vocabulary) in fp32."""
    cumulative = logits.softmax(dim=1).mul_(DRAWS).long().cumsum(dim=1)
    thresholds = draws[:, None] * cumulative[:, -1:] // DRAWS
    sampled = torch.searchsorted(cumulative, thresholds, right=True).squeeze(1)
    return sampled.clamp_(max=logits.shape[1] - 1)  # logits that are not finite must not index outside


def _logits(features: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Scaled logits in fp32, whatever the dtype of the product."""
    logits = (features @ weight.T).float()
    return logits if scale == 1.0 else logits.mul_(scale)


def _chunk_rows(weight: Tensor, share: int) -> int:
    """The number of tokens in a chunk that takes 1 / share of a chunk's memory."""
    elements = CHUNK_ELEMENTS if weight.device.type == "cpu" else MAX_LOGITS
    return max(1, elements // (share * len(weight)))


def _product_dtype(features: Tensor) -> torch.dtype:
    """The dtype of matrix products: autocast's where it is on, else that of the features."""
    device = features.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype
