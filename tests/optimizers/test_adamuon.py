"""AdaMuon against its closed form and another implementation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz
from walking import PEAK_LR, REST, SHAPES, Moment, largest_error, moments, parameters, start, walk, walked

from mupsweep.errors import ConfigError
from mupsweep.optimizers.adamuon import RMS, AdaMuon
from mupsweep.optimizers.muon import Muon
from mupsweep.scaling import Role, TensorSpec, numeric, symbolic
from mupsweep.scaling.parametrizations.spectral import Spectral

TOLERANCE = {
    # relative to the distance walked:
    "closed form": 1e-5,  # fp32 against float64, with Newton-Schulz in the same bf16
    "batched": 5e-2,  # bf16 products of a batch round in another order, and small entries are scaled up
    "theirs": 4e-3,  # they divide in bf16, 2^-8 an entry
    "rms": 1e-5,  # relative
}
JORDAN = (3.4445, -4.7750, 2.0315)


def adamuon(**keys: Any) -> AdaMuon:
    return AdaMuon(name="adamuon", rest=REST, **keys)


def alone(optimizer: AdaMuon, weight_decay: float) -> list[Tensor]:
    """All weights after the last step, each a stack of its own: Newton-Schulz takes them one by one, as torch does."""
    weights = parameters()
    thresholds = {name: threshold.value for name, threshold in optimizer.thresholds().items()}
    for i, p in enumerate(weights):
        built = optimizer.build([{"params": [p], "lr": 0.0, "weight_decay": weight_decay, **thresholds}])
        for now in moments(i):
            built.param_groups[0]["lr"] = now.lr
            p.grad = now.grad.float()
            built.step()
    return [p.detach() for p in weights]


def closed_form(w: Tensor, walk: Iterator[Moment], sign: bool, betas: tuple[float, float], decay: float) -> Tensor:
    """Algorithm 1 of the paper in float64, but for what Newton-Schulz rounds to bf16: that is fp32, and torch's."""
    m, v = torch.zeros_like(w).float(), torch.zeros_like(w)
    for now in walk:
        m = betas[0] * m + now.grad.float()
        update = _zeropower_via_newtonschulz(torch.sign(m) if sign else m, JORDAN, 5, 1e-7).double()
        v = betas[1] * v + (1 - betas[1]) * update**2
        update = update / (v.sqrt() + 1e-8)
        w = w - now.lr * (0.2 * w.numel() ** 0.5 / update.norm() * update + decay * w)
    return w


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize(("sign", "betas"), [(True, (0.95, 0.95)), (True, (0.0, 0.9)), (False, (0.5, 0.99))], ids=str)
def test_adamuon_is_the_papers_algorithm(sign: bool, betas: tuple[float, float], decay: float) -> None:
    got = alone(adamuon(sign=sign, betas=betas), decay)
    exact = partial(closed_form, sign=sign, betas=betas, decay=decay)
    assert largest_error(got, exact) < TOLERANCE["closed form"]


@pytest.mark.parametrize("sign", [True, False])
def test_a_stack_walks_as_each_of_its_matrices_alone(sign: bool) -> None:
    exact = partial(closed_form, sign=sign, betas=(0.95, 0.95), decay=0.5)
    assert largest_error(walked(adamuon(sign=sign), 0.5), exact) < TOLERANCE["batched"]


def test_without_signs_adamuon_is_pytorch_optimizers() -> None:
    """Theirs averages the momentum, where ours sums: with a decay of 1/2 the two differ by a power of two exactly."""
    theirs = parameters()
    group = {"params": theirs, "lr": PEAK_LR, "betas": (0.5, 0.9), "weight_decay": 0.5, "use_muon": True}
    walk(pytorch_optimizer.AdaMuon([group], eps=1e-10), theirs)
    ours = alone(adamuon(sign=False, betas=(0.5, 0.9), entry_eps=1e-10), 0.5)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (b - start(i)).norm() > 0.1
        assert (a - b).norm() < TOLERANCE["theirs"] * (b - start(i)).norm()


@pytest.mark.parametrize("shape", sorted(set(SHAPES)))
def test_the_rms_of_an_update_is_a_fifth(shape: tuple[int, int]) -> None:
    p = torch.nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    adamuon().build([{"params": [p], "lr": 1.0, "weight_decay": 0.0, "eps": 1e-7, "entry_eps": 1e-8}]).step()
    assert p.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=TOLERANCE["rms"])
    assert RMS == 0.2


@pytest.mark.parametrize(
    ("keys", "shape", "base", "ratio"),
    [
        ({}, (64, 64), (16, 16), 1 / 4),  # entries of an orthogonal matrix of rank 1: 1 / sqrt(n_out n_in)
        ({}, (256, 64), (64, 16), 1 / 4),
        ({"block_size": 8}, (64, 64), (16, 16), 1.0),  # those of a block do not change
        ({"block_size": 32}, (64, 64), (16, 16), 1 / 2),  # until a matrix is a block
    ],
)
@pytest.mark.parametrize("depth_ratio", [1.0, 4.0])
def test_the_eps_of_the_second_moment_scales_as_entries_do(
    keys: dict[str, Any], shape: tuple[int, int], base: tuple[int, int], ratio: float, depth_ratio: float
) -> None:
    laws = [adamuon(**keys).thresholds(dims)["entry_eps"].law for dims in (shape, base)]
    specs = [TensorSpec("w", dims, Role.HIDDEN) for dims in (shape, base)]
    rule = numeric(Spectral("spectral", "1"), laws[0], *specs, r_n=4.0, r_L=depth_ratio, base_law=laws[1])
    assert rule.eps == pytest.approx(ratio)


def test_the_eps_of_newton_schulz_scales_as_muons() -> None:
    ours, muons = (made.thresholds()["eps"].law for made in (adamuon(), Muon(name="muon", rest=REST)))
    for role in (Role.INPUT, Role.HIDDEN, Role.OUTPUT):
        assert symbolic(Spectral("spectral", "1"), ours, role).eps == symbolic(Spectral("s", "1"), muons, role).eps


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"optimizer.betas=\[0.9, 1.0\]"),
        ({"ns_steps": 0}, "optimizer.ns_steps=0"),
        ({"entry_eps": 0.0}, "optimizer.entry_eps=0.0"),
        ({"roles": ("hidden", "hidden_vector")}, "optimizer.roles=.*leave hidden_vector to optimizer.rest"),
    ],
)
def test_a_bad_setting_is_refused_with_its_key_and_value(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adamuon(**keys)
