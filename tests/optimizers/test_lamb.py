"""LAMB against its closed form; what its published LR rule leaves out; where weight decay stands."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from walking import REST, SHAPES, Moment, largest_error, start, walked

from mupsweep.errors import ConfigError
from mupsweep.optimizers.lamb import LAMB
from mupsweep.scaling import Role
from mupsweep.sweep import config, run_spec
from mupsweep.sweep.tensor_rules import audit, rules

TOLERANCE = {
    "closed form": 2e-6,  # relative to the distance walked, fp32 against float64
    "norm": 1e-6,  # relative, fp32
    "exponent": 0.02,  # of ||A||_2 in the width, over Gaussian weights
}
VECTORS = ("input_vector", "hidden_vector")


def lamb(**keys: Any) -> LAMB:
    return LAMB(name="lamb", rest=REST, **keys)


def closed_form(w: Tensor, walk: Iterator[Moment], betas: tuple[float, float], eps: float, decay: float) -> Tensor:
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for now in walk:
        m = betas[0] * m + (1 - betas[0]) * now.grad
        v = betas[1] * v + (1 - betas[1]) * now.grad**2
        r = (m / (1 - betas[0] ** now.step)) / ((v / (1 - betas[1] ** now.step)).sqrt() + eps)
        update = r + decay * w
        w = w - now.lr * w.norm() / update.norm() * update
    return w


@pytest.mark.parametrize("weight_norm", ["spectral", "frobenius"])
@pytest.mark.parametrize("decay", [0.0, 0.5, 20.0])
@pytest.mark.parametrize(("betas", "eps"), [((0.9, 0.999), 1e-12), ((0.5, 0.9), 0.05)])
def test_lamb_is_its_closed_form(betas: tuple[float, float], eps: float, decay: float, weight_norm: str) -> None:
    got = walked(lamb(betas=betas, eps=eps, weight_norm=weight_norm), decay)
    assert largest_error(got, partial(closed_form, betas=betas, eps=eps, decay=decay)) < TOLERANCE["closed form"]


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_every_matrix_of_a_stack_moves_by_lr_times_its_own_norm(decay: float) -> None:
    weights = [torch.nn.Parameter(10.0**-i * start(i)) for i in range(len(SHAPES))]
    before = [p.detach().clone() for p in weights]
    for i, p in enumerate(weights):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(7 + i))
    group = {"params": weights, "lr": 0.125, "weight_decay": decay, "eps": 1e-12}
    lamb().build([group]).step()
    for p, w in zip(weights, before, strict=True):
        assert (p.detach() - w).norm() == pytest.approx(0.125 * w.norm().item(), rel=TOLERANCE["norm"])


def test_the_transpose_takes_the_transposed_step() -> None:
    """So embeddings are stepped as they are stored."""
    weights = [torch.nn.Parameter(w.contiguous()) for w in (start(1), start(1).mT)]
    grad = torch.randn(weights[0].shape, generator=torch.Generator().manual_seed(7))
    for p, g in zip(weights, (grad, grad.mT), strict=True):
        p.grad = g.contiguous()
        lamb().build([{"params": [p], "lr": 0.125, "weight_decay": 0.5, "eps": 1e-12}]).step()
    assert (weights[1].mT - weights[0]).norm() < TOLERANCE["norm"] * weights[0].norm()


def update_norm(optimizer: LAMB, n: int) -> float:
    """||A||_2 for a hidden matrix as muP initialises it, and a rank-1 gradient."""
    generator = torch.Generator().manual_seed(n)
    p = torch.nn.Parameter(torch.randn(n, n, generator=generator) * n**-0.5)
    before = p.detach().clone()
    p.grad = torch.outer(*torch.randn(2, n, generator=generator))
    optimizer.build([{"params": [p], "lr": 1.0, "weight_decay": 0.0, "eps": 1e-12}]).step()
    return torch.linalg.matrix_norm(before - p.detach(), ord=2).item()


@pytest.mark.parametrize("block_size", [None, 16])
def test_the_update_grows_as_the_root_of_the_width_at_the_published_lr(block_size: int | None) -> None:
    """The weight's spectral norm is the same at every width; the published law says so of the update too."""
    optimizer = lamb(block_size=block_size, weight_norm="spectral")
    exponent = math.log2(update_norm(optimizer, 512) / update_norm(optimizer, 64)) / 3
    assert exponent == pytest.approx(0.5, abs=TOLERANCE["exponent"])
    big, small = (float(optimizer.measured_law((n, n)).blocks(n, n)) for n in (512, 64))
    assert big == small
    assert optimizer.measured_law().weight_norm == "frobenius"
    assert optimizer.update_law().weight_norm == "spectral"


def solved(*overrides: str) -> dict[Role, Any]:
    """The rule of a tensor of every role at width x4, depth x4."""
    resolved = run_spec.resolve(config.load(["data.tokenizer=bytes", *overrides]).variants[0])
    return {row.role: row for row in rules(resolved, resolved.size(4.0, 4.0), 1.0)}


@pytest.mark.parametrize(("name", "hidden"), [("lamb_published", 1.0), ("lamb", 0.5), ("lamb_strict", 0.5)])
def test_one_key_chooses_between_the_published_lr_rule_and_the_strict_one(name: str, hidden: float) -> None:
    rows = solved(f"optimizer={name}", "parametrization=spectral")
    assert rows[Role.HIDDEN].lr_ratio == pytest.approx(hidden, rel=1e-12)
    assert rows[Role.INPUT].lr_ratio == rows[Role.OUTPUT].lr_ratio == pytest.approx(1.0, rel=1e-12)
    assert all(rows[Role(role)].optimizer == "adamw" for role in VECTORS)


@pytest.mark.parametrize("name", ["lamb_published", "lamb"])
def test_decay_and_eps_are_those_of_adam_inside_the_trust_ratio(name: str) -> None:
    own = solved(f"optimizer={name}", "parametrization=spectral", "optimizer.weight_decay=0.1")
    adams = solved("optimizer=adamw", "parametrization=spectral", "optimizer.weight_decay=0.1")
    for role in (Role.INPUT, Role.HIDDEN, Role.OUTPUT):
        assert own[role].weight_decay == adams[role].weight_decay > 0
        assert own[role].eps_ratio == adams[role].eps_ratio


@pytest.mark.parametrize(
    ("optimizer", "parametrization", "expected"),
    [("lamb_published", "mup", True), ("lamb", "mup", False), ("lamb_published", "sp", False)],
)
def test_the_audit_says_where_the_published_rule_is_not_that_of_the_updates(
    optimizer: str, parametrization: str, expected: bool
) -> None:
    resolved = run_spec.resolve(
        config.load([f"optimizer={optimizer}", f"parametrization={parametrization}"]).variants[0]
    )
    note = (
        "the LR of lamb_published follows the published rule, for hidden matrices 1, but the law of its updates asks "
        "for r_n^-1/2"
    )
    assert [line for line in audit(resolved) if "follows the published rule" in line] == ([note] if expected else [])


def test_a_matrix_that_starts_at_zero_is_refused_with_its_name() -> None:
    with pytest.raises(ConfigError, match=r"head.weight starts at zero, and lamb moves .* init std above 0"):
        solved("optimizer=lamb", "model.head_init_std=0")


@pytest.mark.parametrize("rule", ["independent", "inverse_width", "timescale"])
def test_decay_inside_a_normalisation_takes_coupled_units_only(rule: str) -> None:
    overrides = ["optimizer=lamb", "optimizer.weight_decay=0.1", f"parametrization.weight_decay_rule={rule}"]
    others = "coupled_constant or sqrt_width or unscaled"
    with pytest.raises(ConfigError, match=f"weight_decay_rule={rule}: .* use {others}"):
        solved(*overrides)
    without = solved(*overrides, "optimizer.weight_decay=0")
    assert without[Role.HIDDEN].weight_decay == 0


@pytest.mark.parametrize(
    "part", ["optimizer.block_size=null", "optimizer.block_size=16", "optimizer.spectral_norm=true"]
)
def test_decay_beside_the_update_takes_every_unit(part: str) -> None:
    overrides = [
        "optimizer=sgd",
        part,
        "optimizer.roles=[hidden]",
        "optimizer.rest=adamw",
        "optimizer.weight_decay=0.1",
    ]
    row = solved(*overrides, "parametrization.weight_decay_rule=independent")[Role.HIDDEN]
    assert row.decay_per_step == pytest.approx(0.1, rel=1e-12)  # a step, at every size


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weight_norm": "frobenus"}, "optimizer.weight_norm=frobenus.*frobenius"),
        ({"betas": (1.0, 0.9)}, r"optimizer.betas=\[1.0, 0.9\]"),
        ({"roles": ("hidden", "hidden_vector")}, "lamb takes input, hidden, output tensors only"),
    ],
)
def test_a_bad_setting_is_refused_with_its_key_and_value(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lamb(**keys)
