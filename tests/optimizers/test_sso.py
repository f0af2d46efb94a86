"""SSO against its closed form: singular values by SVD, the multiplier by a root finder."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor
from walking import REST, SHAPES, Moment, gradient, largest_error, moments, parameters, walked

from mupsweep.errors import ConfigError
from mupsweep.optimizers.singular_values import POLAR_EXPRESS, msign
from mupsweep.optimizers.sso import SSO, tangent_msign
from mupsweep.sweep import config
from mupsweep.sweep.run_spec import resolve
from mupsweep.sweep.tensor_rules import audit

TOLERANCE = {
    "closed form": 5e-4,  # relative to the distance walked: <u v^T, Phi> is solved to 2e-4
    "tangent": 2e-4,  # |<u v^T, Phi>|, as the paper
    "sphere": 1e-4,  # relative, of ||W||_2, which 20 power iterations a step follow at LRs of about 1 %
    "polar": 1e-5,  # singular values of msign
}
ENOUGH = 200  # power iterations to tell singular values apart that are within a percent


def sso(**keys: Any) -> SSO:
    return SSO(name="sso", rest=REST, **keys)


def polar(matrix: Tensor) -> Tensor:
    """U V^T, but for singular values so small that the paper's eight quintics do not take them to 1 either."""
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    return U @ torch.diag(eight_quintics(S / matrix.norm())) @ V


def eight_quintics(sigma: Tensor) -> Tensor:
    for a, b, c in POLAR_EXPRESS:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return sigma


def spectral(matrix: Tensor) -> float:
    return torch.linalg.matrix_norm(matrix, ord=2).item()


def closed_form(w: Tensor, walk: Iterator[Moment], radius: float, momentum: float, nesterov: bool) -> Tensor:
    """Algorithm 1 of the paper in float64, retracting at the end of a step."""
    R = radius * (w.shape[0] / w.shape[1]) ** 0.5
    w, m = w * R / spectral(w), torch.zeros_like(w)
    for now in walk:
        m = momentum * m + (1 - momentum) * now.grad
        g = momentum * m + (1 - momentum) * now.grad if nesterov else m
        g = g / g.norm()
        U, _, V = torch.linalg.svd(w)
        normal = torch.outer(U[:, 0], V[0])
        lam = brentq(lambda x, g=g, normal=normal: (normal * polar(g + x * normal)).sum().item(), -10, 10, xtol=1e-12)
        w = w - now.lr * R * polar(g + lam * normal)
        w = w * R / spectral(w)
    return w


def test_eight_quintics_take_singular_values_to_one() -> None:
    sigma = torch.logspace(-3, 0, 1000, dtype=torch.float64)
    assert (eight_quintics(sigma) - 1).abs().max() < 1e-12
    assert len(POLAR_EXPRESS) == 8


@pytest.mark.parametrize(
    "keys",
    [
        {"radius": 1.0, "momentum": 0.9, "nesterov": True},
        {"radius": 2.0, "momentum": 0.9, "nesterov": False},
        {"radius": 0.5, "momentum": 0.0, "nesterov": False},
    ],
    ids=str,
)
def test_sso_is_the_papers_algorithm(keys: dict[str, Any]) -> None:
    assert (
        largest_error(walked(sso(power_iterations=ENOUGH, **keys)), partial(closed_form, **keys))
        < TOLERANCE["closed form"]
    )


@pytest.mark.parametrize("radius", [1.0, 2.0])
def test_weights_are_on_the_sphere_from_before_the_first_step(radius: float) -> None:
    weights = parameters()
    optimizer = sso(radius=radius).build([{"params": weights, "lr": 0.01, "weight_decay": 0.0, "eps": 1e-8}])
    for step in range(1, 21):
        for i, p in enumerate(weights):
            assert spectral(p.detach()) == pytest.approx(
                radius * (p.shape[0] / p.shape[1]) ** 0.5, rel=TOLERANCE["sphere"]
            )
            p.grad = gradient(i, step)
        optimizer.step()


@pytest.mark.parametrize("shape", sorted(set(SHAPES)))
def test_the_direction_is_tangent_of_norm_one_and_steepest(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    grads, weights = torch.randn(2, 4, *shape, generator=generator)
    U, _, V = torch.linalg.svd(weights, full_matrices=False)
    normal = U[..., :1] @ V[..., :1, :]
    unit = grads / grads.norm(dim=(-2, -1), keepdim=True)
    Phi = tangent_msign(unit, normal, steps=20)
    assert (normal * Phi).sum(dim=(-2, -1)).abs().max() <= TOLERANCE["tangent"]
    values = torch.linalg.svdvals(Phi)
    assert (values - 1).abs().max() < TOLERANCE["polar"]
    gain = (unit * Phi).sum(dim=(-2, -1))
    for _ in range(20):  # no other tangent direction of norm 1 gains more
        other = torch.randn(4, *shape, generator=generator)
        other = other - (normal * other).sum(dim=(-2, -1), keepdim=True) * normal
        other = msign(other + 3 * Phi, eps=1e-7)
        other = other - (normal * other).sum(dim=(-2, -1), keepdim=True) * normal
        other = other / torch.linalg.matrix_norm(other, ord=2)[:, None, None]
        assert ((unit * other).sum(dim=(-2, -1)) <= gain + 1e-3).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("noise", [1e-3, 0.1])
def test_a_gradient_along_the_normal_leaves_the_sphere_in_no_direction(sign: float, noise: float) -> None:
    generator = torch.Generator().manual_seed(0)
    U, _, V = torch.linalg.svd(torch.randn(24, 16, generator=generator), full_matrices=False)
    normal = torch.outer(U[:, 0], V[0]).unsqueeze(0)
    unit = sign * normal + noise * torch.randn(1, 24, 16, generator=generator)
    Phi = tangent_msign(unit / unit.norm(), normal, steps=40)
    assert (normal * Phi).sum().abs() <= TOLERANCE["tangent"]
    assert torch.linalg.matrix_norm(Phi, ord=2).max() < 1 + TOLERANCE["polar"]


def test_matrices_of_a_stack_are_solved_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    stack, weights = torch.randn(2, 5, 16, 16, generator=generator)
    stack = stack / stack.norm(dim=(-2, -1), keepdim=True)
    U, _, V = torch.linalg.svd(weights)
    normal = U[..., :1] @ V[..., :1, :]
    together = tangent_msign(stack, normal, steps=20)
    for i in range(5):
        alone = tangent_msign(stack[i : i + 1], normal[i : i + 1], steps=20)[0]
        assert (together[i] - alone).norm() < 1e-2 * alone.norm()


def test_a_first_order_step_leaves_the_spectral_norm() -> None:
    """Before it is retracted a step changes the norm by O(lr^2)."""
    generator = torch.Generator().manual_seed(0)
    U, S, V = torch.linalg.svd(torch.randn(32, 32, generator=generator, dtype=torch.float64))
    S[0] = 1.5 * S[1]
    w = (U @ torch.diag(S) @ V / S[0]).float()
    grad = torch.randn(1, 32, 32, generator=generator)
    Phi = tangent_msign(grad / grad.norm(), torch.outer(U[:, 0], V[0]).float().unsqueeze(0), steps=20)[0]
    grown = [spectral((w - lr * Phi).double()) - 1 for lr in (0.02, 0.01)]
    assert 0 < grown[1] < 0.02**2 * 4
    assert grown[0] / grown[1] == pytest.approx(4, rel=0.2)


def test_the_audit_says_that_the_init_std_has_no_effect() -> None:
    resolved = resolve(config.load(["experiment=smoke", "optimizer=sso"]).variants[0])
    assert any("sso gives its weights a norm of its own" in note for note in audit(resolved))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"radius": 0.0}, "optimizer.radius=0.0"),
        ({"momentum": 1.0}, "optimizer.momentum=1.0"),
        ({"solver_steps": 0}, "optimizer.solver_steps=0"),
        ({"power_iterations": 0}, "optimizer.power_iterations=0"),
        ({"weight_decay": 0.1}, "optimizer.weight_decay=0.1: sso fixes the norm"),
        ({"block_size": 8}, "optimizer.block_size: sso fixes the norm"),
        ({"hyperball": True}, "optimizer.hyperball: sso fixes the norm"),
        ({"roles": ("hidden", "output")}, "optimizer.roles=.*leave output to optimizer.rest"),
    ],
)
def test_a_bad_setting_is_refused_with_its_key_and_value(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sso(**keys)


def test_moments_cover_stacks_of_several_shapes() -> None:
    assert len(set(SHAPES)) == 3
    assert len(list(moments(0))) >= 10
