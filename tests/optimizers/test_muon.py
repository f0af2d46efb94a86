"""Muon's conventions, converted into each other, and its stacks, multiplied as one or matrix by matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.optim._muon import _adjust_lr
from walking import REST

from mupsweep.errors import ConfigError
from mupsweep.optimizers.muon import SHAPE_FACTORS, Muon, convert
from mupsweep.optimizers.singular_values import LONGEST_SIDE, batch_pays, msign, orthogonalise

TOLERANCE = {
    "step": 1e-6,  # relative, fp32
    "bf16": 2e-2,  # relative: products in another order, 2^-8 each
    "fp32": 1e-5,  # relative
}
SHAPES = [(32, 32), (64, 16), (16, 48)]
DIMS = st.integers(1, 20_000)
CONVENTIONS = st.sampled_from(sorted(SHAPE_FACTORS))


@pytest.mark.parametrize("shape", [*SHAPES, (1024, 1024), (4096, 1024), (1024, 4096), (50257, 768)], ids=str)
@pytest.mark.parametrize(("convention", "torchs"), [("jordan", "original"), ("kimi", "match_rms_adamw")])
def test_plain_lrs_are_torchs_adjusted_lrs(convention: str, torchs: str, shape: tuple[int, int]) -> None:
    """What torch multiplies into the orthogonalised update is the plain LR of the same step."""
    assert convert(0.02, convention, "plain", *shape) == pytest.approx(_adjust_lr(0.02, torchs, torch.Size(shape)))


@given(lr=st.floats(1e-6, 10.0), source=CONVENTIONS, over=CONVENTIONS, target=CONVENTIONS, n_out=DIMS, n_in=DIMS)
def test_converting_is_a_change_of_units(lr: float, source: str, over: str, target: str, n_out: int, n_in: int) -> None:
    there = convert(lr, source, target, n_out, n_in)
    assert convert(there, target, source, n_out, n_in) == pytest.approx(lr)
    assert convert(convert(lr, source, over, n_out, n_in), over, target, n_out, n_in) == pytest.approx(there)


def stepped(convention: str, lr: float, shape: tuple[int, int], weight_decay: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(shape, generator=generator))
    p.grad = torch.randn(shape, generator=generator)
    muon = Muon(name="muon", scaling=convention, rest=REST)
    muon.build([{"params": [p], "lr": lr, "weight_decay": weight_decay, "eps": 1e-7}]).step()
    return p.detach()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("target", sorted(SHAPE_FACTORS))
@pytest.mark.parametrize("source", sorted(SHAPE_FACTORS))
def test_a_converted_lr_takes_the_same_step(source: str, target: str, shape: tuple[int, int]) -> None:
    """And so does weight decay, by the inverse."""
    lr = convert(0.02, source, target, *shape)
    expected = stepped(source, 0.02, shape, weight_decay=0.1)
    got = stepped(target, lr, shape, weight_decay=0.1 * 0.02 / lr)
    assert (got - expected).norm() < TOLERANCE["step"] * expected.norm()


@pytest.mark.parametrize("names", [("plane", "kimi"), ("plain", "kimmi")], ids=str)
def test_an_unknown_convention_is_refused_with_the_nearest(names: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"no convention (plane.*plain|kimmi.*kimi)"):
        convert(0.02, *names, 8, 8)


@pytest.mark.parametrize(
    ("count", "shape", "threads", "pays"),
    [
        (16, (64, 64), 1, True),
        (16, (256, 1024), 1, True),
        (16, (512, 512), 1, False),
        (16, (512, 512), 2, True),
        (16, (1024, 1024), 2, False),
        (1, (64, 64), 1, False),
        (2, (64, 64), 1, True),
    ],
)
def test_stacks_are_multiplied_as_one_up_to_a_size_a_thread(
    count: int, shape: tuple[int, int], threads: int, pays: bool
) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert batch_pays(torch.empty(count, *shape)) is pays
        assert batch_pays(torch.empty(count, *shape, device="meta"))  # any accelerator
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("function", "precision"),
    [(lambda stack: orthogonalise(stack, 5, 1e-7), "bf16"), (lambda s: msign(s, 1e-7), "fp32")],
)
def test_a_stack_is_each_of_its_matrices(
    monkeypatch: pytest.MonkeyPatch, function: Any, precision: str, shape: tuple[int, int]
) -> None:
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    together = function(stack)
    monkeypatch.setattr("mupsweep.optimizers.singular_values.LONGEST_SIDE", 0)
    apart = function(stack)
    assert (together - apart).norm() < TOLERANCE[precision] * apart.norm()
    assert torch.equal(apart[1], function(stack[1:2])[0])
    assert LONGEST_SIDE == 256
