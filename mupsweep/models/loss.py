"""Cross-entropy of a linear head, in chunks of tokens: the whole (tokens, vocabulary) matrix never exists.

The gradients are made in the forward pass, while a chunk's probabilities are still in cache, so that a vocabulary of
50k at width 256 costs the memory of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**22  # logits per chunk on a CPU: 16 MiB in fp32, near what its caches hold
ACCELERATOR_CHUNK_ELEMENTS = 2**28  # 1 GiB in fp32: few large products


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
        n_tokens, vocab = features.shape[0], weight.shape[0]
        rows = max(1, (CHUNK_ELEMENTS if features.device.type == "cpu" else ACCELERATOR_CHUNK_ELEMENTS) // vocab)
        h, w = features.to(dtype), weight.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=h.device)
        grad_h = torch.empty_like(features) if needs_grad else None
        grad_w = torch.zeros_like(weight) if needs_grad else None
        for start in range(0, n_tokens, rows):
            part = slice(start, start + rows)
            logits = (h[part] @ w.T).float()
            if scale != 1.0:
                logits *= scale
            log_z = logits.logsumexp(dim=1, keepdim=True)
            target = targets[part, None]
            total += (log_z - logits.gather(1, target)).sum()
            if grad_h is None or grad_w is None:
                continue
            grad = logits.sub_(log_z).exp_()  # softmax, in the logits' memory
            grad.scatter_add_(1, target, torch.full_like(log_z, -1.0))
            grad = grad.mul_(scale / n_tokens).to(dtype)
            grad_h[part] = grad @ w
            grad_w += grad.T @ h[part]
        if grad_h is not None:
            ctx.save_for_backward(grad_h, grad_w)
        return total / n_tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_h, grad_w = ctx.saved_tensors
        return grad_h * grads[0], grad_w * grads[0], None, None, None, None


def linear_cross_entropy(features: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
    """Mean cross-entropy in nats of softmax(scale * features @ weight.T) against targets.

    Args:
        features: (tokens, width).
        weight: (vocabulary, width).
        targets: (tokens,) int64.
        scale: the output multiplier.

    Matrix products run in the autocast dtype where autocast is on; the softmax is always fp32.
    """
    device = features.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(features, weight, targets, scale, dtype, torch.is_grad_enabled())  # type: ignore[return-value]
