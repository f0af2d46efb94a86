"""The chunked cross-entropy against torch's own: value, gradients, chunk boundaries, bf16."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mupsweep.models import loss
from mupsweep.models.loss import linear_cross_entropy

TOLERANCE = {
    "value": 2e-6,  # fp32, a loss of about 4
    "gradient": 1e-6,  # fp32, relative to the largest entry
    "bf16": 1.5,  # error in units of plain autocast's error
    "finite difference": 2e-3,  # relative, of a directional derivative in fp32
}
SHAPES = [(1, 4, 3), (7, 16, 11), (64, 24, 257), (33, 8, 1000)]  # (tokens, width, vocabulary)


def case(tokens: int, width: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens + vocab)
    features = torch.randn(tokens, width, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype).mul_(0.5).requires_grad_()
    return features, weight, torch.randint(vocab, (tokens,), generator=generator)


def reference(features: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0) -> Tensor:
    return F.cross_entropy(scale * features @ weight.T, targets)


def gradients(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, inputs)


def relative(got: Tensor, expected: Tensor) -> float:
    """The largest error relative to the largest entry."""
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("scale", [1.0, 0.125, 0.3, 4.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_are_those_of_cross_entropy(shape: tuple[int, int, int], scale: float) -> None:
    features, weight, targets = case(*shape)
    exact = (features.double(), weight.double(), targets, scale)
    expected = reference(*exact)
    got = linear_cross_entropy(features, weight, targets, scale)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(expected.item(), abs=TOLERANCE["value"] * max(1.0, scale))
    for mine, theirs in zip(gradients(got, features, weight), gradients(expected, features, weight), strict=True):
        assert mine.dtype == torch.float32
        assert relative(mine, theirs) < TOLERANCE["gradient"] * max(1.0, scale)


@pytest.mark.parametrize("rows", [1, 2, 5, 32, 63, 64, 65, 1000])
def test_chunks_of_any_length_give_the_same_loss_and_gradients(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    features, weight, targets = case(64, 24, 257)
    expected = reference(features, weight, targets, 0.7)
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", rows * 257 + 256)
    got = linear_cross_entropy(features, weight, targets, 0.7)
    assert got.item() == pytest.approx(expected.item(), abs=TOLERANCE["value"])
    for mine, theirs in zip(gradients(got, features, weight), gradients(expected, features, weight), strict=True):
        assert relative(mine, theirs) < TOLERANCE["gradient"]


def test_a_vocabulary_larger_than_a_chunk_takes_one_token_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 10)
    features, weight, targets = case(7, 16, 11)
    assert linear_cross_entropy(features, weight, targets).item() == pytest.approx(
        reference(features, weight, targets).item(), abs=TOLERANCE["value"]
    )


def test_no_tensor_of_logits_is_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 4000)
    features, weight, targets = case(256, 8, 1000)
    with Largest() as seen:
        gradients(linear_cross_entropy(features, weight, targets), features, weight)
    assert seen.elements == weight.numel() == 8000  # the logits of all tokens are 256 000


@pytest.mark.parametrize("upstream", [0.5, -3.0])
def test_the_gradient_from_above_multiplies_through(upstream: float) -> None:
    features, weight, targets = case(64, 24, 257)
    once = gradients(linear_cross_entropy(features, weight, targets), features, weight)
    scaled = gradients(upstream * linear_cross_entropy(features, weight, targets), features, weight)
    for a, b in zip(once, scaled, strict=True):
        assert torch.equal(upstream * a, b)


@pytest.mark.parametrize("which", ["features", "weight"])
def test_only_the_input_that_asks_for_a_gradient_needs_one(which: str) -> None:
    features, weight, targets = case(64, 24, 257)
    expected = gradients(reference(features, weight, targets), features, weight)
    inputs = {"features": features.detach(), "weight": weight.detach()}
    inputs[which].requires_grad_()
    (got,) = gradients(linear_cross_entropy(**inputs, targets=targets), inputs[which])
    assert relative(got, expected[0 if which == "features" else 1]) < TOLERANCE["gradient"]


def test_the_gradient_is_the_slope_of_the_loss() -> None:
    """Without a reference: a central difference of the loss itself along the gradient."""
    features, weight, targets = case(33, 8, 100)
    for tensor, grad in zip(
        (features, weight),
        gradients(linear_cross_entropy(features, weight, targets, 0.6), features, weight),
        strict=True,
    ):
        step = 0.05 * grad / grad.norm()
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                tensor.add_(sign * step)
                values.append(linear_cross_entropy(features, weight, targets, 0.6).item())
                tensor.sub_(sign * step)
        slope = (values[0] - values[1]) / 0.1
        assert slope == pytest.approx(grad.norm().item(), rel=TOLERANCE["finite difference"])


def test_without_grad_mode_no_gradient_is_computed() -> None:
    features, weight, targets = case(64, 24, 257)
    product = 2 * 64 * 24 * 257
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        value = linear_cross_entropy(features, weight, targets)
    assert not value.requires_grad
    assert counter.get_total_flops() == product
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(features, weight, targets).backward()
    assert counter.get_total_flops() == 3 * product


def test_the_value_is_the_same_bits_with_and_without_gradients() -> None:
    features, weight, targets = case(64, 24, 257)
    with torch.no_grad():
        evaluated = linear_cross_entropy(features, weight, targets, 0.5)
    assert torch.equal(linear_cross_entropy(features, weight, targets, 0.5).detach(), evaluated)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_under_bf16_autocast_the_error_is_that_of_plain_autocast(scale: float) -> None:
    features, weight, targets = case(512, 64, 300)
    exact = reference(features.double(), weight.double(), targets, scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = F.cross_entropy(scale * F.linear(features, weight), targets)
        got = linear_cross_entropy(features, weight, targets, scale)
    assert got.dtype == torch.float32
    truth = gradients(exact, features, weight)
    theirs = gradients(plain, features, weight)
    mine = gradients(got, features, weight)
    for a, b, true in zip(mine, theirs, truth, strict=True):
        assert a.dtype == torch.float32
        error, allowed = (a - true).norm() / true.norm(), (b - true).norm() / true.norm()
        assert 1e-4 < error < TOLERANCE["bf16"] * allowed  # really bf16, and no worse
    assert abs(got.item() - exact.item()) < 1e-2 * exact.item()
    assert abs(got.item() - reference(features, weight, targets, scale).item()) > 0


def test_bf16_autocast_keeps_a_large_loss_finite_and_right() -> None:
    features, weight, targets = case(8, 4, 50)
    with torch.no_grad():
        features *= 1000
    expected = reference(features.double(), weight.double(), targets).item()
    assert expected > 500
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear_cross_entropy(features, weight, targets).item() == pytest.approx(expected, rel=1e-2)
    assert linear_cross_entropy(features, weight, targets).item() == pytest.approx(expected, rel=1e-6)


def test_equal_logits_cost_the_log_of_the_vocabulary() -> None:
    features, _, targets = case(33, 8, 1000)
    value = linear_cross_entropy(features, torch.zeros(1000, 8), targets)
    assert value.item() == pytest.approx(math.log(1000), abs=TOLERANCE["value"])
