"""The coordinate check of a model and a training step that mupsweep knows nothing of."""

from __future__ import annotations

import doctest
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mupsweep.check import coordinates, custom_model
from mupsweep.check.exponents import DEPTH, TOLERANCE, WIDTH, Coordinates
from mupsweep.check.measure import ATTENTION, CHANGE, FEATURES, LOGITS, UPDATE
from mupsweep.errors import ConfigError
from mupsweep.scaling import Role

TOKENS = torch.randint(16, (4, 9), generator=torch.Generator().manual_seed(0))
BASE = 32


class Block(nn.Module):
    def __init__(self, width: int, multiplier: float) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.multiplier = multiplier

    def forward(self, x: Tensor) -> Tensor:
        normed = nn.functional.layer_norm(x, x.shape[-1:])
        q, k, v = self.qkv(normed).unflatten(-1, (3, -1, 8)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.multiplier * self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Attention blocks between an embedding and a head, with or without muP's factors."""

    def __init__(self, width: int, depth: int, mup: bool) -> None:
        super().__init__()
        self.scale = BASE / width if mup else 1.0
        self.embedding, self.head = nn.Embedding(16, width), nn.Linear(width, 16, bias=False)
        self.blocks = nn.ModuleList(Block(width, 0.5 / depth if mup else 0.5) for _ in range(depth))
        for p in self.blocks.parameters():
            nn.init.normal_(p, std=0.5 / width**0.5 if mup else 0.5 / BASE**0.5)
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.normal_(self.head.weight, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(nn.functional.layer_norm(x, x.shape[-1:])) * self.scale


def model_fn(mup: bool) -> Callable[[int, int], tuple[nn.Module, Callable[[], None]]]:
    def make(width: int, depth: int) -> tuple[nn.Module, Callable[[], None]]:
        net = Model(width, depth, mup)
        hidden = list(net.blocks.parameters())
        rest = [net.embedding.weight, net.head.weight]
        lr = 2.0**-9
        adam = torch.optim.Adam(
            [{"params": hidden, "lr": lr * BASE / width if mup else lr}, {"params": rest}], lr=lr, eps=1e-12
        )

        def step() -> None:
            adam.zero_grad()
            nn.functional.cross_entropy(net(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
            adam.step()

        return net, step

    return make


def checked(mup: bool, **keys: object) -> Coordinates:
    ladders = {"widths": [32, 64, 128, 256], "depths": [2, 4, 8, 16]} | keys
    return coordinates(
        model_fn(mup),
        probe=(TOKENS[:, :-1],),
        features=lambda net: net.blocks[-1],  # type: ignore[index]
        seeds=(0,),
        **ladders,  # type: ignore[arg-type]
    )


def test_the_example_of_the_docstring_runs() -> None:
    assert doctest.testmod(custom_model) == doctest.TestResults(failed=0, attempted=9)


def test_your_model_passes_where_it_follows_mup() -> None:
    check = checked(mup=True)
    assert check.passed, check.causes()
    assert check.row(WIDTH, UPDATE, Role.OUTPUT).final_exponent.value == pytest.approx(1, abs=TOLERANCE)
    assert check.row(DEPTH, UPDATE, Role.HIDDEN).final_exponent.value == pytest.approx(0, abs=TOLERANCE)
    assert check.row(WIDTH, CHANGE + ATTENTION).expected == 0
    assert check.row(DEPTH, CHANGE + ATTENTION).expected is None


def test_your_model_fails_where_it_does_not() -> None:
    check = checked(mup=False)
    assert not check.passed
    broken = {(row.axis, row.quantity) for row in check.violations}
    assert {(WIDTH, CHANGE + FEATURES), (WIDTH, CHANGE + LOGITS), (DEPTH, CHANGE + FEATURES)} <= broken
    assert any("change of logits goes as width^+" in line for line in check.causes())


def test_the_roles_of_tensors_follow_from_what_grows() -> None:
    check = checked(mup=True, depths=[1])
    roles = {row.tensor: row.role for row in check.rows if row.quantity == UPDATE}
    assert roles == {
        "embedding.weight": Role.INPUT,
        "head.weight": Role.OUTPUT,
        "blocks.*.qkv.weight": Role.HIDDEN,
        "blocks.*.out.weight": Role.HIDDEN,
    }


def test_the_same_seeds_give_the_same_exponents_and_leave_the_generator_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = (checked(mup=True, widths=[32, 48, 64], depths=[1]) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == second


def test_a_single_size_and_a_tensor_of_three_axes_are_refused() -> None:
    with pytest.raises(ConfigError, match="one width and one depth"):
        checked(mup=True, widths=[32], depths=[1])

    def convolution(width: int, depth: int) -> tuple[nn.Module, Callable[[], None]]:
        return nn.Conv1d(4, width, 3), lambda: None

    with pytest.raises(ConfigError, match=r"weight has shape \(8, 4, 3\): only vectors and matrices"):
        coordinates(convolution, probe=(torch.ones(1, 4, 9),), features=lambda net: net, widths=[8, 16, 32])


def test_a_matrix_of_unclear_role_is_refused_until_it_is_named() -> None:
    def model(width: int, depth: int) -> tuple[nn.Module, Callable[[], None]]:
        net = Model(width, depth, mup=True)
        for block in net.blocks:
            block.probe = nn.Linear(width, 3, bias=False)
        return net, lambda: None

    def check(roles: dict[str, str] | None) -> Coordinates:
        features = {"features": lambda net: net.blocks[-1]}
        return coordinates(model, probe=(TOKENS,), widths=[16, 24, 32], at=(1,), seeds=(0,), roles=roles, **features)

    with pytest.raises(ConfigError, match=r"probe\.weight .* no clear role.*'blocks\.\*\.probe\.weight'"):
        check(None)
    roles = {row.role for row in check({"blocks.*.probe.weight": "router"}).rows if "probe" in row.tensor}
    assert roles == {Role.ROUTER}
