"""The parts that combine with any algorithm: blocks, grafting, spectral normalization, fixed norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from mupsweep.optimizers.algorithm import Algorithm, StepContext
from mupsweep.optimizers.singular_values import power_iterate, random_like, top_singular_pair
from mupsweep.scaling.laws import Sizes

FIRST_ITERATIONS = 10  # of power iteration from a random vector; one a step follows the update from there
GRAFT = "graft_"


class Wrapper(Algorithm):
    """An algorithm around another, whose memory stays in the same dictionary."""

    def __init__(self, inner: Algorithm) -> None:
        self.inner = inner
        self.uses_weights = inner.uses_weights
        self.applies_weight_decay = inner.applies_weight_decay
        self.skips_first_step = inner.skips_first_step
        self.renormalizes = inner.renormalizes

    def state(self, weights: Tensor) -> dict[str, Tensor]:
        return self.inner.state(weights)

    def observe(self, grads: Tensor, state: dict[str, Tensor], now: StepContext) -> None:
        self.inner.observe(grads, state, now)

    def renormalize(self, weights: Tensor, state: dict[str, Tensor]) -> None:
        self.inner.renormalize(weights, state)


class Blocked(Wrapper):
    """Every block of at most `sizes` is a matrix of its own; a remainder is filled up with zeros."""

    def __init__(self, inner: Algorithm, sizes: Sizes) -> None:
        super().__init__(inner)
        self.sizes = sizes

    def state(self, weights: Tensor) -> dict[str, Tensor]:
        inner = self.inner.state(self.split(weights))
        return {name: value.unflatten(0, (len(weights), -1)) for name, value in inner.items()}

    def direction(self, grads: Tensor, state: dict[str, Tensor], now: StepContext) -> Tensor:
        weights = None if now.weights is None else self.split(now.weights)
        blocks = self.inner.direction(self.split(grads), self.flat(state), replace(now, weights=weights))
        return self.join(blocks, grads.shape)

    def observe(self, grads: Tensor, state: dict[str, Tensor], now: StepContext) -> None:
        self.inner.observe(self.split(grads), self.flat(state), now)

    def split(self, stack: Tensor) -> Tensor:
        """(count, n_out, n_in) -> (count * blocks, b_out, b_in)."""
        b_out, b_in = (min(n, size or n) for n, size in zip(stack.shape[-2:], self.sizes, strict=True))
        stack = pad(stack, (0, -stack.shape[-1] % b_in, 0, -stack.shape[-2] % b_out))
        return stack.unflatten(-1, (-1, b_in)).unflatten(-3, (-1, b_out)).transpose(-3, -2).flatten(0, 2).contiguous()

    def join(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `split` for a stack of `shape`."""
        count, n_out, n_in = shape
        b_out, b_in = blocks.shape[-2:]
        grid = blocks.unflatten(0, (count, -(-n_out // b_out), -(-n_in // b_in))).transpose(-3, -2)
        return grid.flatten(-2).flatten(-3, -2)[:, :n_out, :n_in]

    @staticmethod
    def flat(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Views, so that what the inner algorithm updates in place is updated here."""
        return {name: value.view(-1, *value.shape[2:]) for name, value in state.items()}


class Grafted(Wrapper):
    """Q1#Q2: the direction of Q2 (`inner`) with the Frobenius norm of Q1 (`graft_source`), each with its own memory."""

    def __init__(self, inner: Algorithm, graft_source: Algorithm) -> None:
        super().__init__(inner)
        self.graft_source = graft_source
        self.uses_weights = inner.uses_weights or graft_source.uses_weights
        self.skips_first_step = inner.skips_first_step or graft_source.skips_first_step

    def state(self, weights: Tensor) -> dict[str, Tensor]:
        grafted = self.graft_source.state(weights)
        return self.inner.state(weights) | {GRAFT + name: value for name, value in grafted.items()}

    def direction(self, grads: Tensor, state: dict[str, Tensor], now: StepContext) -> Tensor:
        alone = replace(now, weight_decay=0.0, thresholds=_unprefixed(now.thresholds))  # decay is no part of the norm
        size = norm(self.graft_source.direction(grads.clone(), _unprefixed(state), alone))
        return with_norm(self.inner.direction(grads, state, now), size)


class SpectralNormalised(Wrapper):
    """Spectral norm sqrt(n_out / n_in), by one power iteration a step from a kept vector (Qiu 2512.05620, 3.2)."""

    def state(self, weights: Tensor) -> dict[str, Tensor]:
        return {**self.inner.state(weights), "top": random_like(weights[:, 0]).clone()}

    def direction(self, grads: Tensor, state: dict[str, Tensor], now: StepContext) -> Tensor:
        update = self.inner.direction(grads, state, now)
        power_iterate(update, state["top"], FIRST_ITERATIONS if now.step <= 2 else 1)  # SOAP starts with step 2
        sigma, _, _ = top_singular_pair(update, state["top"])
        n_out, n_in = update.shape[-2:]
        return torch.where(sigma > 0, update / sigma, update) * (n_out / n_in) ** 0.5


class Hyperball(Wrapper):
    """The Frobenius norms of weight and update are that of the weight at the start (Wen et al., 2606.16899):
    W <- R normalise(W - lr R normalise(U)), R = ||W_0||_F."""

    def __init__(self, inner: Algorithm) -> None:
        super().__init__(inner)
        self.renormalizes = True

    def state(self, weights: Tensor) -> dict[str, Tensor]:
        return {**self.inner.state(weights), "radius": norm(weights).flatten()}

    def direction(self, grads: Tensor, state: dict[str, Tensor], now: StepContext) -> Tensor:
        return with_norm(self.inner.direction(grads, state, now), state["radius"].view(-1, 1, 1))

    def renormalize(self, weights: Tensor, state: dict[str, Tensor]) -> None:
        weights.copy_(with_norm(weights, state["radius"].view(-1, 1, 1)))


def norm(stack: Tensor) -> Tensor:
    """The Frobenius norm of every matrix of a stack, (count, 1, 1)."""
    return stack.norm(dim=(-2, -1), keepdim=True)


def with_norm(stack: Tensor, size: Tensor) -> Tensor:
    """Every matrix scaled to the Frobenius norm `size`, (count, 1, 1); a matrix of zeros stays one."""
    length = norm(stack)
    return stack * torch.where(length > 0, size / length, torch.zeros_like(length))


def _unprefixed(entries: Mapping[str, object]) -> dict:
    """The entries of the grafted optimizer, under the names that it gave them."""
    return {name.removeprefix(GRAFT): value for name, value in entries.items() if name.startswith(GRAFT)}
