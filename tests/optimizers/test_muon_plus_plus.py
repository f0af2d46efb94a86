"""Muon++ against its closed form by SVD, and what it promises about the norm of a weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from walking import REST

from mupsweep.errors import ConfigError
from mupsweep.optimizers.muon_plus_plus import MuonPlusPlus, correlation
from mupsweep.optimizers.singular_values import POLAR_EXPRESS
from mupsweep.scaling import Role, symbolic
from mupsweep.scaling.monomial import ONE, R_N
from mupsweep.scaling.parametrizations.spectral import Spectral
from mupsweep.sweep import config
from mupsweep.sweep.run_spec import resolve
from mupsweep.sweep.tensor_rules import audit

TOLERANCE = {
    "closed form": 1e-4,  # relative to the distance walked, fp32 against float64
    "norm": 1e-5,  # relative, of ||W||_2
}
SHAPES = ((32, 32), (64, 16), (32, 32), (16, 48), (64, 16), (32, 32))
STEPS = 12
LR = 0.01


def muon_plus_plus(**keys: Any) -> MuonPlusPlus:
    return MuonPlusPlus(name="muon_plus_plus", rest=REST, **keys)


def spectral(matrix: Tensor) -> float:
    return torch.linalg.matrix_norm(matrix, ord=2).item()


def msign(matrix: Tensor) -> Tensor:
    """U V^T, but for singular values so small that eight quintics do not take them to 1; what is zero stays zero."""
    U, sigma, V = torch.linalg.svd(matrix, full_matrices=False)
    sigma = sigma / matrix.norm()
    for a, b, c in POLAR_EXPRESS:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return U @ torch.diag(sigma) @ V


def literal_correlation(w: Tensor) -> float:
    m, n = w.shape
    s2 = (w**2).mean()
    return ((m * n * w.mean() ** 2 - s2) / ((m * n - 1) * s2)).item()


def spiked(index: int) -> Tensor:
    """A weight whose largest singular value is twice the second, so that no step makes another the largest."""
    U, S, V = torch.linalg.svd(torch.randn(SHAPES[index], generator=torch.Generator().manual_seed(index)), False)
    S[0] = 2 * S[1]
    return U @ torch.diag(S) @ V


def gradient(index: int, step: int) -> Tensor:
    return torch.randn(SHAPES[index], generator=torch.Generator().manual_seed(100 * step + index)) * 10.0 ** (step % 3)


def walked(optimizer: MuonPlusPlus, steps: int = STEPS) -> list[Tensor]:
    weights = [torch.nn.Parameter(spiked(i)) for i in range(len(SHAPES))]
    built = optimizer.build([{"params": weights, "lr": LR, "weight_decay": 0.0, "eps": 1e-7}])
    for step in range(steps):
        for i, p in enumerate(weights):
            p.grad = gradient(i, step)
        built.step()
    return [p.detach() for p in weights]


def closed_form(index: int, momentum: float, rescale: bool, adaptive: float | None) -> Tensor:
    """Algorithm 1, or 2 if `rescale`, of the paper in float64."""
    n_out, n_in = SHAPES[index]
    S = (n_out / n_in) ** 0.5
    w = spiked(index).double()
    w, m = w * S / spectral(w), torch.zeros_like(w)
    for step in range(STEPS):
        m = momentum * m + gradient(index, step).double()
        U, _, V = torch.linalg.svd(w)
        u, v = U[:, :1], V[:1].mT
        D = msign((torch.eye(n_out).double() - u @ u.mT) @ m @ (torch.eye(n_in).double() - v @ v.mT))
        before = literal_correlation(w)
        w = w - LR * S * D
        after = literal_correlation(w)
        if rescale:
            w = w * S / spectral(w)
        if adaptive is not None and before > 0 and after > adaptive * (n_out**-0.5 + n_in**-0.5):
            w = w * (before / after) ** 0.5
    return w


def largest_error(got: list[Tensor], **keys: Any) -> float:
    """The largest distance from the closed form, relative to how far that walked from the sphere's point."""
    errors = []
    for i, w in enumerate(got):
        exact, before = closed_form(i, **keys), spiked(i).double()
        before = before * (before.shape[0] / before.shape[1]) ** 0.5 / spectral(before)
        assert (exact - before).norm() > 0.05 * before.norm()
        errors.append(((w.double() - exact).norm() / (exact - before).norm()).item())
    return max(errors)


@pytest.mark.parametrize("momentum", [0.95, 0.0])
@pytest.mark.parametrize("rescale", [False, True])
def test_muon_plus_plus_is_the_papers_algorithm(momentum: float, rescale: bool) -> None:
    got = walked(muon_plus_plus(momentum=momentum, rescale=rescale))
    assert largest_error(got, momentum=momentum, rescale=rescale, adaptive=None) < TOLERANCE["closed form"]


def test_the_adaptive_condition_is_the_papers() -> None:
    got = walked(muon_plus_plus(adaptive=1e-3))
    assert largest_error(got, momentum=0.95, rescale=False, adaptive=1e-3) < TOLERANCE["closed form"]
    assert any((a - b).norm() > 0.01 * b.norm() for a, b in zip(got, walked(muon_plus_plus()), strict=True))


@pytest.mark.parametrize("shape", sorted(set(SHAPES)))
def test_the_correlation_is_that_of_the_papers_model(shape: tuple[int, int]) -> None:
    """Entries sqrt(rho) z + sqrt(1 - rho) x_ij with a common z have the common correlation rho."""
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    for got, w in zip(correlation(stack), stack, strict=True):
        assert got.item() == pytest.approx(literal_correlation(w))
    assert correlation(torch.ones(1, *shape)).item() == pytest.approx(1.0)
    alternating = torch.ones(1, *shape)
    alternating[:, :, ::2] = -1.0
    assert correlation(alternating).item() == pytest.approx(-1 / (shape[0] * shape[1] - 1), rel=1e-4)


@pytest.mark.parametrize("rescale", [False, True])
def test_a_weight_starts_with_the_norm_of_the_sphere_and_keeps_it(rescale: bool) -> None:
    for steps in (0, 1, STEPS):
        for w in walked(muon_plus_plus(rescale=rescale), steps):
            assert spectral(w) == pytest.approx((w.shape[0] / w.shape[1]) ** 0.5, rel=TOLERANCE["norm"])


def walk_from_gaussian(lr: float, steps: int = 1, rescale: bool = False) -> tuple[float, float]:
    """(gap of the two largest singular values before, spectral norm after) of a 256 x 256 Gaussian matrix."""
    generator = torch.Generator().manual_seed(5)
    p = torch.nn.Parameter(torch.randn(256, 256, generator=generator))
    built = muon_plus_plus(rescale=rescale).build([{"params": [p], "lr": lr, "weight_decay": 0.0, "eps": 1e-7}])
    values = torch.linalg.svdvals(p.detach())
    for _ in range(steps):
        p.grad = torch.randn(256, 256, generator=generator)
        built.step()
    return (values[0] - values[1]).item(), spectral(p.detach())


def test_an_update_within_the_gap_keeps_the_norm_exactly_and_a_larger_one_does_not() -> None:
    gap, _ = walk_from_gaussian(0.0)
    assert gap == pytest.approx(0.012, abs=0.001)
    assert walk_from_gaussian(gap)[1] == pytest.approx(1.0, abs=TOLERANCE["norm"])
    assert walk_from_gaussian(0.022)[1] == pytest.approx(1.0, abs=1e-3)
    assert walk_from_gaussian(0.1)[1] == pytest.approx(1.01, abs=5e-3)
    assert walk_from_gaussian(0.3)[1] == pytest.approx(1.125, abs=2e-2)


def test_rescaling_holds_the_norm_where_updates_alone_do_not() -> None:
    """Within a few percent: power iterations lag behind where a new direction becomes the top one."""
    assert walk_from_gaussian(0.05, steps=40)[1] > 1.3
    assert walk_from_gaussian(0.05, steps=40, rescale=True)[1] == pytest.approx(1.0, abs=0.05)


def test_the_update_has_no_part_along_the_top_singular_pair() -> None:
    (before, *_), (after, *_) = walked(muon_plus_plus(), 0), walked(muon_plus_plus(), 1)
    U, _, V = torch.linalg.svd(before)
    update = (before - after) / LR
    assert (U[:, 0] @ update).norm() < 1e-4
    assert (update @ V[0]).norm() < 1e-4
    assert torch.linalg.svdvals(update)[:-2] == pytest.approx(torch.ones(30), abs=1e-3)


def test_the_rule_is_that_of_an_update_of_rms_operator_norm_one() -> None:
    law = muon_plus_plus().update_law()
    rules = [symbolic(Spectral("mup", None), law, role).lr for role in (Role.INPUT, Role.HIDDEN, Role.OUTPUT)]
    assert rules == [ONE, ONE, R_N]


def test_the_audit_says_that_the_init_std_has_no_effect() -> None:
    resolved = resolve(config.load(["experiment=smoke", "optimizer=muon_plus_plus"]).variants[0])
    assert any("muon_plus_plus gives its weights a norm of its own" in note for note in audit(resolved))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"momentum": 1.0}, "optimizer.momentum=1.0"),
        ({"power_iterations": 0}, "optimizer.power_iterations=0"),
        ({"adaptive": 0.0}, "optimizer.adaptive=0.0"),
        ({"adaptive": 1.0, "rescale": True}, "optimizer.adaptive=1.0: optimizer.rescale=true undoes"),
        ({"weight_decay": 0.1}, "optimizer.weight_decay=0.1: muon_plus_plus fixes the norm"),
        ({"spectral_norm": True}, "optimizer.spectral_norm: muon_plus_plus fixes the norm"),
        ({"roles": ("hidden", "input")}, "optimizer.roles=.*leave input to optimizer.rest"),
    ],
)
def test_a_bad_setting_is_refused_with_its_key_and_value(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        muon_plus_plus(**keys)
