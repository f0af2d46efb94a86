"""ADOPT against its closed form and an implementation that equals the authors'."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import Tensor
from walking import PEAK_LR, STEPS, Moment, gradient, largest_error, parameters, walk, walked

from mupsweep.errors import ConfigError
from mupsweep.optimizers.adopt import ADOPT

TOLERANCE = {"closed form": 1e-6}  # relative to the distance walked, fp32 against float64
SETTINGS = [((0.9, 0.9999), 1e-12), ((0.9, 0.9999), 0.05), ((0.5, 0.9), 1e-6), ((0.0, 0.0), 1e-6)]  # (betas, eps)


def adopt(betas: tuple[float, float] = (0.9, 0.9999), eps: float = 1e-12) -> ADOPT:
    return ADOPT(name="adopt", betas=betas, eps=eps)


def closed_form(w: Tensor, walk: Iterator[Moment], betas: tuple[float, float], eps: float, decay: float) -> Tensor:
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for now in walk:
        if now.step == 1:
            v = now.grad**2
            continue
        w = w * (1 - now.lr * decay)
        clipped = (now.grad / v.sqrt().clamp(min=eps)).clamp(-((now.step - 1) ** 0.25), (now.step - 1) ** 0.25)
        m = betas[0] * m + (1 - betas[0]) * clipped
        w = w - now.lr * m
        v = betas[1] * v + (1 - betas[1]) * now.grad**2
    return w


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize(("betas", "eps"), SETTINGS)
def test_adopt_is_its_closed_form(betas: tuple[float, float], eps: float, decay: float) -> None:
    exact = partial(closed_form, betas=betas, eps=eps, decay=decay)
    assert largest_error(walked(adopt(betas, eps), decay), exact) < TOLERANCE["closed form"]


@pytest.mark.parametrize(("betas", "eps"), SETTINGS)
def test_adopt_is_the_authors_bit_for_bit(betas: tuple[float, float], eps: float) -> None:
    """With the clip of the authors' code: at the number of steps before to the power 1/4.

    Their first step leaves the weights alone; pytorch-optimizer's decays them.
    """
    theirs = parameters()
    oracle = pytorch_optimizer.ADOPT(
        theirs,
        lr=PEAK_LR,
        betas=betas,
        eps=eps,
        clip_lambda=lambda step: (step - 1) ** 0.25,
        weight_decay=0.0,
        weight_decouple=True,
    )
    walk(oracle, theirs, steps=[1])
    oracle.param_groups[0]["weight_decay"] = 0.5
    walk(oracle, theirs, steps=range(2, STEPS + 1))
    for a, b in zip(walked(adopt(betas, eps), 0.5), theirs, strict=True):
        assert torch.equal(a, b)


def test_the_first_step_only_sets_the_second_moment() -> None:
    p = torch.nn.Parameter(gradient(0, 5))
    before, p.grad = p.detach().clone(), gradient(0, 1)
    optimizer = adopt().build([{"params": [p], "lr": 1.0, "weight_decay": 0.5, "eps": 1e-12}])
    optimizer.step()
    assert torch.equal(p.detach(), before)
    assert torch.equal(optimizer.state[p]["v"], p.grad**2)
    assert optimizer.state[p]["m"].abs().max() == 0


@pytest.mark.parametrize("step", [2, 3, 17])
def test_a_gradient_after_silence_moves_an_entry_by_the_clip_at_most(step: int) -> None:
    """Such as the row of a token that no batch held before."""
    p = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = adopt().build([{"params": [p], "lr": 1.0, "weight_decay": 0.0, "eps": 1e-12}])
    for _ in range(1, step):
        p.grad = torch.zeros(4, 4)
        optimizer.step()
    p.grad = torch.full((4, 4), 1e-3)
    optimizer.step()
    expected = torch.full((4, 4), -0.1 * (step - 1) ** 0.25)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)


def test_the_sde_rule_is_adams() -> None:
    scaled, factor = adopt(betas=(0.9, 0.99), eps=1e-6).at_batch_ratio(4.0, "sde")
    assert isinstance(scaled, ADOPT)
    assert factor == 2.0
    assert scaled.betas == pytest.approx((0.6, 0.96))
    assert scaled.eps == 5e-7
    with pytest.raises(ConfigError, match=r"training.batch_rule=sde.*betas=\[0.9, 0.99\]"):
        adopt(betas=(0.9, 0.99)).at_batch_ratio(11.0, "sde")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"optimizer.betas=\[0.9, 1.0\]"),
        ({"eps": 0.0}, "optimizer.eps=0.0: expected above 0"),
        ({"eps": -1.0}, "optimizer.eps=-1.0"),
    ],
)
def test_a_bad_setting_is_refused_with_its_key_and_value(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adopt(**keys)
