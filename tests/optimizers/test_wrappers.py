"""The parts that combine with any matrix optimizer: each alone, all of them together, and the laws that follow."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from test_contract import NAMES, aligned_update_norm, parts
from torch import Tensor
from walking import REST

from mupsweep.errors import ConfigError
from mupsweep.optimizers.adamw import AdamW
from mupsweep.optimizers.algorithm import StepContext
from mupsweep.optimizers.composed import ComposableOptimizer
from mupsweep.optimizers.muon import Muon
from mupsweep.optimizers.sgd import SGD
from mupsweep.optimizers.wrappers import Blocked, SpectralNormalised
from mupsweep.scaling import Role, TensorSpec, numeric
from mupsweep.scaling.parametrizations.spectral import Spectral

TOLERANCE = {
    "batched": 4e-2,  # relative; bf16 products of a batch round in another order, 2^-8 each
    "norm": 1e-5,  # relative, fp32
    "spectral": 0.01,  # relative, of one power iteration a step, where one direction leads
    "noise": 0.6,  # where every update is noise of its own, with no direction to follow
    "exponent": 0.08,  # of ||A||_2 in the width; bf16 gives Muon's update of a rank-1 gradient a tail of its own
}
ADAMW: dict[str, Any] = {"name": "adamw", "kind": "mupsweep.optimizers.adamw.AdamW"}
GRAFT_SGD: dict[str, Any] = {"name": "sgd", "kind": "mupsweep.optimizers.sgd.SGD", "momentum": 0.0, "eps": 0.0}
SSO: dict[str, Any] = {"name": "sso", "kind": "mupsweep.optimizers.sso.SSO"}
MUON_H: dict[str, Any] = {"name": "muon_h", "kind": "mupsweep.optimizers.muon.Muon", "hyperball": True}
HIDDEN: dict[str, Any] = {"roles": ("hidden",), "rest": REST}
# Every optimizer that takes parts, without any, on hidden matrices; once where only the name differs.
SINGLE_PROCESS = [
    replace(part, **HIDDEN, hyperball=False, lr_ratio=1.0)
    for part in (parts(name)[0] for name in NAMES)
    if isinstance(part, ComposableOptimizer) and not part.renormalizes
]
MATRIX = {part.name: part for part in {repr(replace(part, name="")): part for part in SINGLE_PROCESS}.values()}
every_optimizer = pytest.mark.parametrize("name", MATRIX)
PARTS: dict[str, dict[str, Any]] = {
    "blocks": {"block_size": 16},
    "graft": {"graft": ADAMW},
    "spectral_norm": {"spectral_norm": True},
    "hyperball": {"hyperball": True},
    "blocks+graft": {"block_size": 16, "graft": ADAMW},
    "blocks+spectral_norm": {"block_size": 16, "spectral_norm": True},
    "graft+hyperball": {"graft": GRAFT_SGD, "hyperball": True},
    "all": {"block_size": 16, "graft": ADAMW, "spectral_norm": True, "hyperball": True},
}


def grads(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Walk:
    """Weights of some shapes under one optimizer, with gradients that depend on the step alone."""

    def __init__(
        self, optimizer: ComposableOptimizer, shapes: tuple[tuple[int, int], ...], **thresholds: float
    ) -> None:
        self.part = optimizer
        self.weights = [torch.nn.Parameter(grads(shape, 1000 + i)) for i, shape in enumerate(shapes)]
        declared = {name: threshold.value for name, threshold in optimizer.thresholds(shapes[0]).items()}
        group = {"params": self.weights, "lr": 0.02, "weight_decay": 0.0, **declared, **thresholds}
        self.optimizer = optimizer.build([group])

    def step(self, step: int) -> list[Tensor]:
        """The updates, as what each weight lost at LR 1."""
        before = [p.detach().clone() for p in self.weights]
        for i, p in enumerate(self.weights):
            p.grad = grads(tuple(p.shape), 10 * step + i)
        if self.part.curvature_every is not None:
            self.optimizer.observe()  # type: ignore[attr-defined]
        self.optimizer.step()
        return [(b - p.detach()) / 0.02 for b, p in zip(before, self.weights, strict=True)]


def norms(updates: list[Tensor]) -> list[float]:
    return [update.norm().item() for update in updates]


# blocks


@pytest.mark.parametrize("sizes", [(4, 4), (5, 3), (7, 7), (64, 64), (None, 4), (4, None)], ids=str)
@pytest.mark.parametrize("shape", [(2, 16, 16), (3, 12, 7), (1, 5, 20), (2, 6, 6)], ids=str)
def test_joining_the_blocks_gives_the_stack_again(shape: tuple[int, ...], sizes: tuple[int | None, int | None]) -> None:
    blocked, stack = Blocked(SGD(name="sgd"), sizes), grads(shape, 0)
    blocks = blocked.split(stack)
    b_out, b_in = (min(n, size or n) for n, size in zip(shape[1:], sizes, strict=True))
    assert blocks.shape == (shape[0] * -(-shape[1] // b_out) * -(-shape[2] // b_in), b_out, b_in)
    assert torch.equal(blocked.join(blocks, stack.shape), stack)
    assert torch.equal(blocks[0, : min(b_out, shape[1]), : min(b_in, shape[2])], stack[0, :b_out, :b_in])


@pytest.mark.parametrize("shape", [(32, 32), (24, 8), (8, 40)], ids=str)
def test_a_block_is_stepped_as_a_matrix_of_its_own(shape: tuple[int, int]) -> None:
    whole = Walk(Muon(name="muon", block_size=8, **HIDDEN), (shape,))
    corners = list(product(range(0, shape[0], 8), range(0, shape[1], 8)))
    apart = Walk(Muon(name="muon", **HIDDEN), ((8, 8),) * len(corners))
    with torch.no_grad():
        for p, (i, j) in zip(apart.weights, corners, strict=True):
            p.copy_(whole.weights[0][i : i + 8, j : j + 8])
    for step in range(5):
        whole.step(step)
        for p, (i, j) in zip(apart.weights, corners, strict=True):
            p.grad = grads(shape, 10 * step)[i : i + 8, j : j + 8].clone()
        apart.optimizer.step()
    for p, (i, j) in zip(apart.weights, corners, strict=True):
        assert (whole.weights[0][i : i + 8, j : j + 8] - p).norm() < TOLERANCE["batched"] * p.norm()


def test_a_remainder_is_a_smaller_matrix_of_its_own() -> None:
    """(20, 12) in blocks of 8: the last row of blocks is 4 high, the last column 4 wide; zeros around do not count."""
    optimizer = Muon(name="muon", momentum=0.0, nesterov=False, **HIDDEN)
    whole = Walk(replace(optimizer, block_size=8), ((20, 12),)).step(0)[0]
    grad = grads((20, 12), 0)
    for rows, columns in product(((0, 8), (8, 16), (16, 20)), ((0, 8), (8, 12))):
        p = torch.nn.Parameter(torch.zeros(rows[1] - rows[0], columns[1] - columns[0]))
        p.grad = grad[slice(*rows), slice(*columns)].clone()
        optimizer.build([{"params": [p], "lr": 1.0, "weight_decay": 0.0, "eps": 1e-7}]).step()
        block = whole[slice(*rows), slice(*columns)]
        assert (block + p.detach()).norm() < TOLERANCE["batched"] * p.detach().norm()


def test_muon_in_blocks_of_one_entry_is_the_sign_of_the_momentum() -> None:
    optimizer = Muon(name="muon", momentum=0.9, nesterov=False, block_size=1, **HIDDEN)
    walk, average = Walk(optimizer, ((12, 20),)), torch.zeros(12, 20)
    for step in range(5):
        (update,) = walk.step(step)
        average = 0.9 * average + 0.1 * grads((12, 20), 10 * step)
        assert torch.equal(update.sign(), average.sign())
        assert update.abs().std() < 1e-3 * update.abs().mean()
    law, row = optimizer.update_law(), AdamW(name="adamw").update_law()
    for dims in ((12.0, 20.0), (64.0, 16.0)):
        assert law.blocks(*dims) == row.blocks(*dims)
        assert law.shape_factor(*dims) == row.shape_factor(*dims)


@every_optimizer
def test_a_block_as_large_as_the_matrix_changes_nothing(name: str) -> None:
    shapes = ((24, 24), (24, 8), (8, 24), (24, 24))
    plain, blocked = Walk(MATRIX[name], shapes), Walk(replace(MATRIX[name], block_size=24), shapes)
    if not MATRIX[name].composed:  # torch's own AdamW and SGD otherwise, which round in another order
        plain.optimizer = type(blocked.optimizer)(plain.optimizer.param_groups, MATRIX[name].algorithm)
    for step in range(4):
        plain.step(step)
        blocked.step(step)
        for a, b in zip(plain.weights, blocked.weights, strict=True):
            assert torch.equal(a, b), step


@pytest.mark.parametrize(
    ("shape", "base", "blocks"),
    [
        ((64, 64), (16, 16), 16 / 1),
        ((100, 16), (16, 16), 7 / 1),  # ceil(100 / 16)
        ((100, 40), (40, 16), 7 * 3 / 3),
        ((8, 8), (16, 16), 1.0),
    ],
)
def test_the_lr_in_blocks_counts_real_blocks(shape: tuple[int, int], base: tuple[int, int], blocks: float) -> None:
    """Muon's LR sqrt(n_out / n_in), divided by the root of the number of blocks (Qiu et al., Table 1)."""
    law = Muon(name="muon", block_size=16, **HIDDEN).update_law()
    specs = [TensorSpec("w", dims, Role.HIDDEN) for dims in (shape, base)]
    ratio = (shape[0] / shape[1] / (base[0] / base[1])) ** 0.5
    assert numeric(Spectral("mup", None), law, *specs, 4.0, 1.0).lr == pytest.approx(ratio / blocks**0.5)


# grafting


@pytest.mark.parametrize("graft", [ADAMW, GRAFT_SGD], ids=["adamw", "sgd"])
@every_optimizer
def test_a_graft_gives_the_norm_and_leaves_the_direction(name: str, graft: dict[str, Any]) -> None:
    shapes = ((16, 16), (24, 8), (16, 16))
    alone = replace(MATRIX[name], spectral_norm=False)  # which would divide the graft by its own norm
    grafted, plain = Walk(replace(alone, graft=graft), shapes), Walk(alone, shapes)
    made = replace(alone, graft=graft).graft_source
    assert made is not None
    graft_source = Walk(made, shapes)
    for step in range(4):
        if MATRIX[name].uses_weights:  # they see the same weights, not each its own
            with torch.no_grad():
                for a, b in zip(plain.weights, grafted.weights, strict=True):
                    a.copy_(b)
        updates, directions, sizes = grafted.step(step), plain.step(step), norms(graft_source.step(step))
        for update, direction, size in zip(updates, directions, sizes, strict=True):
            if direction.norm() == 0:  # SOAP's first step
                assert update.norm() == 0
                continue
            assert update.norm().item() == pytest.approx(size, rel=1e-3)
            cosine = (update * direction).sum() / update.norm() / direction.norm()
            assert cosine > 1 - 1e-4


def test_the_eps_of_a_graft_is_its_own_threshold() -> None:
    optimizer = Muon(name="muon", graft={**ADAMW, "eps": 1e-3}, **HIDDEN)
    thresholds = optimizer.thresholds()
    assert {name: t.value for name, t in thresholds.items()} == {"eps": 1e-7, "graft_eps": 1e-3}
    assert thresholds["graft_eps"].law == AdamW(name="adamw").update_law()
    assert thresholds["eps"].law == Muon(name="muon", **HIDDEN).update_law()
    shapes = ((16, 16),)
    (plain,) = Walk(optimizer, shapes).step(0)
    (large,) = Walk(optimizer, shapes, graft_eps=1.0).step(0)
    grad = grads((16, 16), 0)
    assert plain.norm().item() == pytest.approx((grad / (grad.abs() + 1e-3)).norm().item(), rel=1e-4)
    assert large.norm().item() == pytest.approx((grad / (grad.abs() + 1.0)).norm().item(), rel=1e-4)
    torch.testing.assert_close(plain / plain.norm(), large / large.norm(), rtol=1e-3, atol=1e-5)
    (huge,) = Walk(optimizer, shapes, eps=1e6).step(0)  # Muon's own: the direction is the gradient's then
    cosine = (huge * grad).sum() / huge.norm() / grad.norm()
    assert cosine > 0.999 > (plain * grad).sum() / plain.norm() / grad.norm()


def test_the_memories_of_a_graft_are_kept_apart() -> None:
    walk = Walk(AdamW(name="adamw", graft={**ADAMW, "betas": [0.5, 0.6]}, **HIDDEN), ((8, 8),))
    walk.step(0)
    state = walk.optimizer.state[walk.weights[0]]
    grad = grads((8, 8), 0)
    torch.testing.assert_close(state["m"], 0.1 * grad)
    torch.testing.assert_close(state["graft_m"], 0.5 * grad)
    torch.testing.assert_close(state["v"], 0.05 * grad**2)
    torch.testing.assert_close(state["graft_v"], 0.4 * grad**2)


# spectral normalisation


@pytest.mark.parametrize("shape", [(32, 32), (48, 16), (16, 48)], ids=str)
def test_spectral_normalisation_is_as_by_svd_over_twenty_steps(shape: tuple[int, int]) -> None:
    """Averaged gradients with a common part that turns slowly, as in training."""
    wrapped = SpectralNormalised(SGD(name="sgd", momentum=0.0, **HIDDEN))
    state = wrapped.state(torch.zeros(3, *shape))
    average, common = torch.zeros(3, *shape), grads((2, 3, shape[0]), 1)
    rows = grads((3, shape[1]), 2)
    for step in range(1, 21):
        angle = torch.tensor(0.05 * step)
        columns = common[0] * angle.cos() + common[1] * angle.sin()
        grad = columns.unsqueeze(-1) * rows.unsqueeze(-2) + 2 * grads((3, *shape), 10 * step)
        average = 0.9 * average + 0.1 * grad
        update = wrapped.direction(
            average.clone(), state, StepContext(step, 1.0, 0.0, {"eps": 0.0}, torch.zeros(3, *shape))
        )
        exact = average / torch.linalg.matrix_norm(average, ord=2)[:, None, None] * (shape[0] / shape[1]) ** 0.5
        assert (update - exact).norm() < TOLERANCE["spectral"] * exact.norm(), step


@every_optimizer
def test_the_spectral_norm_of_any_update_is_found_from_below(name: str) -> None:
    shapes = ((32, 32), (48, 16), (16, 48), (32, 32))
    walk = Walk(replace(MATRIX[name], spectral_norm=True), shapes)
    for step in range(20):
        for update in walk.step(step):
            norm = torch.linalg.matrix_norm(update, ord=2).item() / (update.shape[0] / update.shape[1]) ** 0.5
            assert norm == 0 or 1 - 1e-3 < norm < 1 + TOLERANCE["noise"], step  # SOAP's first step is zero


def test_an_update_of_zero_stays_one_and_keeps_the_vector() -> None:
    wrapped = SpectralNormalised(SGD(name="sgd", momentum=0.0, **HIDDEN))
    state = wrapped.state(torch.zeros(2, 4, 3))
    before = state["top"].clone()
    now = StepContext(1, 1.0, 0.0, {"eps": 0.0}, torch.zeros(2, 4, 3))
    assert torch.equal(wrapped.direction(torch.zeros(2, 4, 3), state, now), torch.zeros(2, 4, 3))
    assert torch.equal(state["top"], before)


# together


@pytest.mark.parametrize("combination", PARTS)
@every_optimizer
def test_the_law_of_a_combination_follows_from_its_parts(name: str, combination: str) -> None:
    part = replace(MATRIX[name], **PARTS[combination])
    for aspect in ((3, 1), (1, 3)):
        shapes = [(n * aspect[0], n * aspect[1]) for n in (32, 128)]
        small, large = (aligned_update_norm(part, *shape) for shape in shapes)
        measured, predicted = (math.log(large[i] / small[i], 4) for i in (0, 1))
        assert measured == pytest.approx(predicted, abs=TOLERANCE["exponent"]), aspect


@pytest.mark.parametrize("combination", PARTS)
@every_optimizer
def test_a_combination_survives_a_state_dict_bit_for_bit(name: str, combination: str) -> None:
    part, shapes = replace(MATRIX[name], **PARTS[combination]), ((24, 20), (24, 20), (8, 24))
    straight, resumed = Walk(part, shapes), Walk(part, shapes)
    for step in range(3):
        straight.step(step)
    file = io.BytesIO()
    torch.save(straight.optimizer.state_dict(), file)
    file.seek(0)
    resumed.optimizer.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for a, b in zip(resumed.weights, straight.weights, strict=True):
            a.copy_(b)
    for step in range(3, 6):
        straight.step(step)
        resumed.step(step)
    for a, b in zip(straight.weights, resumed.weights, strict=True):
        assert torch.equal(a, b)
        assert torch.isfinite(a).all()


def test_parts_apply_from_the_inside_out() -> None:
    """Blocks, then the graft's norm, then spectral norm 1, then the norm of the weight: the last one wins."""
    everything: Mapping[str, Any] = {"block_size": 8, "graft": ADAMW, "spectral_norm": True, "hyperball": True}
    shapes = ((16, 16), (24, 8))
    optimizer = Muon(name="muon", **HIDDEN, **everything)
    walk = Walk(optimizer, shapes)
    radii = norms(walk.weights)
    for step in range(3):
        walk.step(step)
        assert norms(walk.weights) == pytest.approx(radii, rel=TOLERANCE["norm"])
    assert set(walk.optimizer.state[walk.weights[0]]) == {"momentum", "graft_m", "graft_v", "top", "radius"}
    without = replace(optimizer, hyperball=False)
    for update, (n_out, n_in) in zip(Walk(without, shapes).step(0), shapes, strict=True):
        norm = torch.linalg.matrix_norm(update, ord=2).item()
        assert norm == pytest.approx((n_out / n_in) ** 0.5, rel=TOLERANCE["noise"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Muon(name="muon", block_size=0, **HIDDEN), "optimizer.block_size=0"),
        (lambda: AdamW(name="adamw", block_size=8), "optimizer.block_size is for matrices, but adamw takes"),
        (lambda: AdamW(name="adamw", spectral_norm=True), "optimizer.spectral_norm is for matrices"),
        (lambda: Muon(name="muon", graft={**ADAMW, "bets": 1}, **HIDDEN).graft_source, "optimizer.graft.*bets"),
        (lambda: Muon(name="muon", graft={"name": "x"}, **HIDDEN).graft_source, "optimizer.graft"),
        (lambda: Muon(name="muon", graft=SSO, **HIDDEN).graft_source, "optimizer.graft=sso: the norm of its update"),
        (
            lambda: Muon(name="muon", graft=MUON_H, **HIDDEN).graft_source,
            "optimizer.graft=muon_h: the norm of its update",
        ),
    ],
)
def test_a_bad_setting_is_refused_with_its_key_and_value(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
