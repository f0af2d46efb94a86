"""MuCon against its closed form by SVD, and the projection that it is."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from walking import REST, SHAPES, Moment, gradient, largest_error, walked

from mupsweep.errors import ConfigError
from mupsweep.optimizers.mucon import MuCon
from mupsweep.optimizers.singular_values import clip

TOLERANCE = {
    "closed form": 1e-5,  # relative to the distance walked, fp32 against float64
    "clip": 3e-5,  # relative; squared singular values are up to 3000 times the threshold
}


def mucon(**keys: Any) -> MuCon:
    return MuCon(name="mucon", rest=REST, **keys)


def clipped(matrix: Tensor, tau: float) -> Tensor:
    """U diag(min(sigma, tau)) V^T, as the paper writes it."""
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    return U @ torch.diag(S.clamp(max=tau)) @ V


def closed_form(w: Tensor, walk: Iterator[Moment], tau: float, momentum: float, nesterov: bool, decay: float) -> Tensor:
    m = torch.zeros_like(w)
    for now in walk:
        m = momentum * m + (1 - momentum) * now.grad
        g = momentum * m + (1 - momentum) * now.grad if nesterov else m
        g = g / torch.linalg.svdvals(g).square().mean().sqrt()
        w = w - now.lr * (clipped(g, tau) / tau + decay * w)
    return w


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize(
    "keys",
    [
        {"tau": 1.0, "momentum": 0.95, "nesterov": True},
        {"tau": 0.5, "momentum": 0.9, "nesterov": False},
        {"tau": 0.1, "momentum": 0.0, "nesterov": True},
    ],
    ids=str,
)
def test_mucon_is_the_papers_clip_of_the_scaled_momentum(keys: dict[str, Any], decay: float) -> None:
    exact = partial(closed_form, decay=decay, **keys)
    assert largest_error(walked(mucon(**keys), decay), exact) < TOLERANCE["closed form"]


@pytest.mark.parametrize("shape", sorted(set(SHAPES)))
def test_clip_is_the_nearest_matrix_of_spectral_norm_one(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(4, *shape, generator=generator) * torch.tensor([1e-3, 0.2, 1.0, 5.0]).view(-1, 1, 1)
    got = clip(stack)
    for one, matrix in zip(got, stack, strict=True):
        exact = clipped(matrix.double(), 1.0)
        assert (one - exact).norm() < TOLERANCE["clip"] * exact.norm()
        for other in torch.randn(10, *shape, generator=generator):
            inside = clip((one + 0.1 * other).unsqueeze(0))[0]
            assert (inside - matrix).norm() >= (one - matrix).norm() * (1 - TOLERANCE["clip"])
    assert (got[0] - stack[0]).norm() < TOLERANCE["clip"] * stack[0].norm()  # nothing to clip


def first_update(optimizer: MuCon, grad: Tensor) -> Tensor:
    p = torch.nn.Parameter(torch.zeros_like(grad))
    p.grad = grad.clone()
    optimizer.build([{"params": [p], "lr": 1.0, "weight_decay": 0.0, "eps": 1e-7}]).step()
    return -p.detach()


@pytest.mark.parametrize("tau", [1.0, 0.7])
@pytest.mark.parametrize("index", [0, 1, 3])
def test_an_update_has_spectral_norm_one_and_keeps_small_singular_values_small(tau: float, index: int) -> None:
    grad = gradient(index, 1)
    values = torch.linalg.svdvals(first_update(mucon(tau=tau), grad))
    before = torch.linalg.svdvals(grad)
    before = before / before.square().mean().sqrt() / tau
    assert values[0].item() == pytest.approx(1.0, rel=TOLERANCE["clip"])
    assert before[0] > 1 > before[-1]
    torch.testing.assert_close(values, before.clamp(max=1.0), rtol=1e-4, atol=1e-4)


def test_muon_is_the_limit_of_a_small_threshold() -> None:
    grad = gradient(1, 1)
    U, _, V = torch.linalg.svd(grad, full_matrices=False)
    assert (first_update(mucon(tau=1e-3), grad) - U @ V).norm() < 1e-4 * (U @ V).norm()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tau": 0.0}, "optimizer.tau=0.0"),
        ({"tau": 1.5}, "optimizer.tau=1.5"),
        ({"momentum": 1.0}, "optimizer.momentum=1.0"),
        ({"roles": ("hidden", "hidden_vector")}, "optimizer.roles=.*leave hidden_vector to optimizer.rest"),
    ],
)
def test_a_bad_setting_is_refused_with_its_key_and_value(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mucon(**keys)
