"""Hyperball (Wen et al. 2606.16899): MuonH and AdamH keep the Frobenius norms of weights and updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz
from walking import PEAK_LR, REST, STEPS, Moment, largest_error, moments, parameters, start, walk

from mupsweep.errors import ConfigError
from mupsweep.optimizers.adamw import AdamW
from mupsweep.optimizers.composed import ComposableOptimizer
from mupsweep.optimizers.muon import Muon
from mupsweep.scaling import Role, symbolic
from mupsweep.scaling.monomial import ONE, R_N, Monomial
from mupsweep.scaling.parametrizations.spectral import Spectral
from mupsweep.sweep import config
from mupsweep.sweep.run_spec import resolve

TOLERANCE = {
    "closed form": 1e-5,  # relative to the distance walked; Newton-Schulz in the same bf16
    "norm": 1e-6,  # relative, fp32
}
JORDAN = (3.4445, -4.7750, 2.0315)
HIDDEN: dict[str, Any] = {"roles": ("hidden",), "rest": REST, "hyperball": True}


def muon_h(**keys: Any) -> Muon:
    return Muon(name="muon_hyperball", **HIDDEN, **keys)


def adam_h(**keys: Any) -> AdamW:
    return AdamW(name="adamw_hyperball", **HIDDEN, **keys)


def hyperball(w: Tensor, walk: Iterator[Moment], direction: Callable[[Moment], Tensor]) -> Tensor:
    """The wrapper as the paper writes it, in float64: R = ||W_0||_F."""
    R = w.norm()
    for now in walk:
        u = direction(now)
        w = w - now.lr * R * u / u.norm()
        w = R * w / w.norm()
    return w


def adams(w: Tensor, walk: Iterator[Moment]) -> Tensor:
    m, v = torch.zeros_like(w), torch.zeros_like(w)

    def direction(now: Moment) -> Tensor:
        nonlocal m, v
        m, v = 0.9 * m + 0.1 * now.grad, 0.95 * v + 0.05 * now.grad**2
        return (m / (1 - 0.9**now.step)) / ((v / (1 - 0.95**now.step)).sqrt() + 1e-12)

    return hyperball(w, walk, direction)


def muons(w: Tensor, walk: Iterator[Moment]) -> Tensor:
    m = torch.zeros_like(w).float()

    def direction(now: Moment) -> Tensor:
        m.lerp_(now.grad.float(), 0.05)
        return _zeropower_via_newtonschulz(now.grad.float().lerp(m, 0.95), JORDAN, 5, 1e-7).double()

    return hyperball(w, walk, direction)


def alone(optimizer: ComposableOptimizer) -> list[Tensor]:
    """All weights after the last step, each a stack of its own: Newton-Schulz takes them one by one, as torch does."""
    weights = parameters()
    for i, p in enumerate(weights):
        built = optimizer.build([{"params": [p], "lr": 0.0, "weight_decay": 0.0, "eps": optimizer.eps}])
        for now in moments(i):
            built.param_groups[0]["lr"] = now.lr
            p.grad = now.grad.float()
            built.step()
    return [p.detach() for p in weights]


@pytest.mark.parametrize(("optimizer", "closed_form"), [(muon_h(), muons), (adam_h(), adams)], ids=["MuonH", "AdamH"])
def test_hyperball_is_the_papers_wrapper(optimizer: ComposableOptimizer, closed_form: Any) -> None:
    assert STEPS >= 10
    assert largest_error(alone(optimizer), closed_form) < TOLERANCE["closed form"]


@pytest.mark.parametrize("optimizer", [muon_h(), adam_h()], ids=["MuonH", "AdamH"])
@pytest.mark.parametrize("lr", [PEAK_LR, 1.0])
def test_norms_stay_those_of_the_start(optimizer: ComposableOptimizer, lr: float) -> None:
    weights = parameters()
    built = optimizer.build([{"params": weights, "lr": lr, "weight_decay": 0.0, "eps": optimizer.eps}])
    for _ in range(3):
        walk(built, weights)
        for i, p in enumerate(weights):
            assert p.detach().norm().item() == pytest.approx(start(i).norm().item(), rel=TOLERANCE["norm"])


@pytest.mark.parametrize("optimizer", [muon_h(), adam_h()], ids=["MuonH", "AdamH"])
def test_the_lr_is_the_relative_change_of_a_weight(optimizer: ComposableOptimizer) -> None:
    """A step at right angles to the weight, of length lr R before it is projected, turns it by atan(lr)."""
    p = torch.nn.Parameter(torch.eye(16))
    p.grad = torch.ones(16, 16).tril(-1) - torch.ones(16, 16).triu(1)
    optimizer.build([{"params": [p], "lr": 0.1, "weight_decay": 0.0, "eps": 1e-12}]).step()
    cosine = p.detach().trace().item() / 16
    assert cosine == pytest.approx((1 + 0.1**2) ** -0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "lr"), [("muon_hyperball", ONE), ("adamw_hyperball", R_N ** Fraction(-1, 2))], ids=str
)
def test_the_lr_of_hidden_matrices_follows_the_rank_of_the_update(name: str, lr: Monomial) -> None:
    """At fixed Frobenius norms full-rank updates keep their spectral norm relative to a weight's, rank-1 ones grow."""
    one = resolve(config.load([f"optimizer={name}"]).variants[0])
    assert symbolic(Spectral("mup", None), one.optimizer.update_law(), Role.HIDDEN).lr == lr
    assert one.optimizer.roles == ("hidden",)
    assert [scaled.optimizer.name for scaled in one.optimizers] == [name, "adamw"]


@pytest.mark.parametrize("optimizer", [muon_h(), adam_h()], ids=["MuonH", "AdamH"])
def test_the_radius_survives_a_state_dict(optimizer: ComposableOptimizer) -> None:
    p = torch.nn.Parameter(start(0))
    group = {"lr": 0.02, "weight_decay": 0.0, "eps": 1e-12}
    first = optimizer.build([{"params": [p], **group}])
    q = torch.nn.Parameter(3.0 * start(0))  # a radius of its own until it loads the other's
    second = optimizer.build([{"params": [q], **group}])
    second.load_state_dict(first.state_dict())
    q.grad = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    second.step()
    assert q.detach().norm().item() == pytest.approx(start(0).norm().item(), rel=TOLERANCE["norm"])


@pytest.mark.parametrize("make", [muon_h, adam_h])
def test_weight_decay_is_refused_with_its_value(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"optimizer.weight_decay=0.1: .*_hyperball fixes the norm .* set it to 0"):
        make(weight_decay=0.1)


def test_vectors_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.hyperball is for matrices, but adamw takes input_vector"):
        AdamW(name="adamw", hyperball=True)
