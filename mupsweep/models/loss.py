"""Cross-entropy of a linear head, in chunks of tokens: the whole (tokens, vocabulary) matrix never exists.

The gradients are made in the forward pass, while a chunk's probabilities are still in cache, so that a vocabulary of
50k at width 256 costs the memory of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**24  # logits per chunk on a CPU: 64 MiB in fp32; smaller ones add up the weight's gradient too often
ACCELERATOR_CHUNK_ELEMENTS = 2**27  # 512 MiB in fp32: few large products
DRAWS = 2**31  # random numbers of `sample_labels` are whole numbers below this


class _LinearCrossEntropy(torch.autograd.Function):
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
            part = slice(start, start + rows)
            log_p = _logits(h[part], w, scale).log_softmax(dim=1)
            target = targets[part, None]
            total -= log_p.gather(1, target).sum()
            if grad_h is None or grad_w is None:
                continue
            grad = log_p.exp_()  # softmax, in the same memory
            grad.scatter_add_(1, target, torch.full_like(target, -1.0, dtype=grad.dtype))
            grad = grad.to(dtype)
            grad_h[part] = grad @ w
            grad_w += grad.T @ h[part]
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
    """A label (tokens,) for every token, drawn from softmax(scale * features @ weight.T).

    Each token's random number picks the label at which the cumulative probability passes it. Probabilities are added
    as whole numbers, so that neither the order of a device's sum nor the length of a chunk changes a label.

    Args:
        features, weight, scale: as in `linear_cross_entropy`.
        draws: (tokens,) int64, uniform in [0, DRAWS).
    """
    dtype, rows = _product_dtype(features), _chunk_rows(weight, 4)  # two integers of 8 bytes for every float of 4
    labels = torch.empty_like(draws)
    with torch.autocast(features.device.type, enabled=False):
        h, w = features.to(dtype), weight.to(dtype)
        for start in range(0, len(draws), rows):
            part = slice(start, start + rows)
            cumulative = _logits(h[part], w, scale).softmax(dim=1).mul_(DRAWS).long().cumsum(dim=1)
            passed = draws[part, None] * cumulative[:, -1:] // DRAWS
            drawn = torch.searchsorted(cumulative, passed, right=True).squeeze(1)
            labels[part] = drawn.clamp_(max=len(weight) - 1)  # logits that are not finite must not index outside
    return labels


def _logits(features: Tensor, weight: Tensor, scale: float) -> Tensor:
    """In fp32, whatever the product's dtype."""
    logits = (features @ weight.T).float()
    return logits if scale == 1.0 else logits.mul_(scale)


def _chunk_rows(weight: Tensor, share: int) -> int:
    """Tokens in a chunk of 1 / share of the usual memory."""
    elements = CHUNK_ELEMENTS if weight.device.type == "cpu" else ACCELERATOR_CHUNK_ELEMENTS
    return max(1, elements // (share * len(weight)))


def _product_dtype(features: Tensor) -> torch.dtype:
    """The dtype of matrix products here and now."""
    device = features.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype
