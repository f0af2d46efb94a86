"""The chunked cross-entropy against torch's own: value, gradients, chunk boundaries, bf16; labels drawn from it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mupsweep.models import loss
from mupsweep.models.loss import DRAWS, linear_cross_entropy, sample_labels

TOLERANCE = {
    "value": 2e-6,  # fp32, a loss of about 4
    # of gradients, relative to the largest entry
    torch.float64: 1e-6,  # an fp32 softmax, all else in float64
    torch.float32: 5e-6,  # a sum over up to 1,000 classes adds sqrt(1000) eps, 2e-6 (torch's own: 2.8e-6 for scale 4)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.125, 0.3, 4.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_are_those_of_cross_entropy(
    shape: tuple[int, int, int], scale: float, dtype: torch.dtype
) -> None:
    features, weight, targets = case(*shape, dtype)
    expected = reference(features.double(), weight.double(), targets, scale)
    got = linear_cross_entropy(features, weight, targets, scale)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(expected.item(), abs=TOLERANCE["value"] * max(1.0, scale))
    for mine, theirs in zip(gradients(got, features, weight), gradients(expected, features, weight), strict=True):
        assert mine.dtype == dtype
        assert relative(mine, theirs) < TOLERANCE[dtype] * max(1.0, scale)


@pytest.mark.parametrize("rows", [1, 2, 5, 32, 63, 64, 65, 1000])
def test_chunks_of_any_length_give_the_same_loss_and_gradients(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    features, weight, targets = case(64, 24, 257, torch.float64)
    expected = reference(features, weight, targets, 0.7)
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", rows * 257 + 256)
    got = linear_cross_entropy(features, weight, targets, 0.7)
    assert got.item() == pytest.approx(expected.item(), abs=TOLERANCE["value"])
    for mine, theirs in zip(gradients(got, features, weight), gradients(expected, features, weight), strict=True):
        assert relative(mine, theirs) < TOLERANCE[torch.float64]


def test_a_vocabulary_larger_than_a_chunk_takes_one_token_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 10)
    features, weight, targets = case(7, 16, 11)
    assert linear_cross_entropy(features, weight, targets).item() == pytest.approx(
        reference(features, weight, targets).item(), abs=TOLERANCE["value"]
    )


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """How many elements the largest tensor has that is made meanwhile."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_no_tensor_of_logits_is_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
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
    features, weight, targets = case(64, 24, 257, torch.float64)
    expected = gradients(reference(features, weight, targets), features, weight)
    inputs = {"features": features.detach(), "weight": weight.detach()}
    inputs[which].requires_grad_()
    (got,) = gradients(linear_cross_entropy(**inputs, targets=targets), inputs[which])
    assert relative(got, expected[0 if which == "features" else 1]) < TOLERANCE[torch.float64]


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
    own_gradients = gradients(got, features, weight)
    for a, b, true in zip(own_gradients, theirs, truth, strict=True):
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


# Labels drawn from the predictions.


def evenly(count: int) -> Tensor:
    """Random numbers that cover [0, DRAWS) in equal steps."""
    return torch.arange(count) * DRAWS // count


@pytest.mark.parametrize("scale", [1.0, 0.3, 4.0])
def test_labels_are_drawn_in_proportion_to_their_probability(scale: float) -> None:
    features, weight, _ = case(3, 16, 11)
    probabilities = (scale * features.detach().double() @ weight.detach().double().T).softmax(1)
    for row, p in zip(features.detach(), probabilities, strict=True):
        labels = sample_labels(row.expand(5000, -1), weight, evenly(5000), scale)
        counts = torch.bincount(labels, minlength=11)
        assert counts.sum() == 5000
        assert (counts - 5000 * p).abs().max() < 1 + 1e-3  # equal steps leave no chance


def test_independent_random_numbers_give_independent_labels() -> None:
    """One token's label says nothing of the next one's: pairs have the product of their probabilities."""
    features, weight, _ = case(2, 4, 3)
    p = (features.detach() @ weight.detach().T).softmax(1)
    draws = torch.randint(DRAWS, (20_000, 2), generator=torch.Generator().manual_seed(0))
    pairs = sample_labels(features.detach().repeat(len(draws), 1), weight, draws.flatten()).view(draws.shape)
    joint = torch.bincount(3 * pairs[:, 0] + pairs[:, 1], minlength=9) / len(pairs)
    expected = torch.outer(p[0], p[1]).flatten()
    assert ((joint - expected).abs() / (expected * (1 - expected) / len(pairs)).sqrt()).max() < 4.5


@pytest.mark.parametrize("elements", [1, 257 * 4, 257 * 20 + 3, 257 * 1000])
def test_a_label_depends_on_its_own_token_and_random_number_alone(
    elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, weight, _ = case(64, 24, 257)
    draws = torch.randint(DRAWS, (64,), generator=torch.Generator().manual_seed(0))
    expected = torch.cat([sample_labels(features[i : i + 1], weight, draws[i : i + 1], 0.7) for i in range(64)])
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", elements)
    assert torch.equal(sample_labels(features, weight, draws, 0.7), expected)
    assert len(expected.unique()) > 32


def test_sampling_makes_no_tensor_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 16_000)
    features, weight, _ = case(256, 2, 1000)
    with Largest() as seen:
        sample_labels(features, weight, evenly(256))
    assert seen.elements == 4000  # a quarter: its integers take several times the memory of logits


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_labels_of_broken_logits_are_still_labels(bad: float) -> None:
    features, weight, _ = case(64, 24, 257)
    labels = sample_labels(torch.full_like(features, bad), weight, evenly(64))
    assert labels.min() >= 0
    assert labels.max() < 257


def test_a_label_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")])
    labels = sample_labels(torch.ones(3, 1), logits[:, None], torch.tensor([0, DRAWS // 2, DRAWS - 1]))
    assert labels.tolist() == [1, 3, 3]


def test_under_bf16_autocast_labels_come_from_the_logits_of_the_loss() -> None:
    features, weight, _ = case(64, 24, 257)
    draws = evenly(64)
    logits = (features.detach().bfloat16() @ weight.detach().bfloat16().T).float()
    expected = sample_labels(torch.eye(64), logits.T.contiguous(), draws)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sample_labels(features, weight, draws), expected)
