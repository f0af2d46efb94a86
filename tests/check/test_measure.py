"""What is measured on a network equals what one computes by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mupsweep.check.measure import (
    ATTENTION,
    CHANGE,
    FEATURES,
    LOGITS,
    UPDATE,
    WEIGHT,
    Probe,
    attention_logits,
    measure,
    recorded,
    update_norm,
    weight_norm,
)
from mupsweep.models.observation import WatchAttention
from mupsweep.scaling import Role
from mupsweep.training.norms import rms_norm, rms_operator_norm

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(5, 6, bias=False), nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def doubling() -> Probe:
    """A network whose weights double at every step."""
    net = Net()

    def step() -> None:
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(2)

    return Probe(net, step, net.body, (X,), {"body.weight": Role.HIDDEN, "head.weight": Role.OUTPUT})


def test_norms_and_changes_are_those_since_the_start() -> None:
    net = Net()
    h, z = net.body(X), net(X)
    law = measure(doubling(), (1, 3))
    assert sorted(law) == [0, 1, 3]
    assert law[0][FEATURES, ""] == pytest.approx(rms_norm(h), rel=1e-6)
    assert law[0][LOGITS, ""] == pytest.approx(rms_norm(z), rel=1e-6)
    assert (CHANGE + FEATURES, "") not in law[0]
    for steps, factor in ((1, 2), (3, 8)):
        assert law[steps][FEATURES, ""] == pytest.approx(factor * rms_norm(h), rel=1e-6)
        assert law[steps][CHANGE + FEATURES, ""] == pytest.approx((factor - 1) * rms_norm(h), rel=1e-6)
        assert law[steps][CHANGE + LOGITS, ""] == pytest.approx((factor**2 - 1) * rms_norm(z), rel=1e-6)
        moved = (factor - 1) * rms_operator_norm(net.body.weight)
        assert law[steps][UPDATE, "body.weight"] == pytest.approx(moved, rel=1e-6)
        assert law[steps][WEIGHT, "body.weight"] == pytest.approx(factor * moved / (factor - 1), rel=1e-6)
    assert not any(quantity.endswith(ATTENTION) for quantity, _ in law[3])


def test_weights_with_one_growing_axis_count_as_the_vectors_along_it() -> None:
    """So that a Gaussian head of constant std has the norm n that `solve` gives it, whatever the vocabulary."""
    for n in (8, 64, 512):
        head = torch.full((32, n), 0.1)
        embedding = torch.full((32, n), 0.1)
        assert weight_norm(head, Role.OUTPUT) == pytest.approx(0.1 * n)
        assert weight_norm(embedding, Role.INPUT) == pytest.approx(0.1)
        assert update_norm(embedding, Role.INPUT) == pytest.approx(0.1)
        assert update_norm(head, Role.OUTPUT) == pytest.approx(0.1 * n)  # rank 1: sqrt(n / 32) * 0.1 sqrt(32 n)
        assert weight_norm(torch.full((n,), 0.1), Role.HIDDEN_VECTOR) == pytest.approx(0.1)
        assert weight_norm(0.1 * torch.eye(n), Role.HIDDEN) == pytest.approx(0.1)


def test_attention_logits_are_the_scaled_products_of_the_past() -> None:
    q, k, v = (torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    with WatchAttention(attention_logits) as seen:
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25)
        F.scaled_dot_product_attention(q, k, v)
    causal, full = seen.seen
    expected = [0.25 * (q[b, h, i] @ k[b, h, j]).item() for b in range(2) for h in range(3) for i in range(4)
                for j in range(i + 1)]  # fmt: skip
    assert sorted(causal.tolist()) == pytest.approx(sorted(expected), rel=1e-5, abs=1e-6)
    assert full.numel() == 2 * 3 * 4 * 4
    assert full.norm() == pytest.approx((q @ k.mT).norm() / 8**0.5)


def test_attention_logits_of_shared_keys_repeat_them() -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    shared = attention_logits(q, k, k, enable_gqa=True)
    torch.testing.assert_close(shared, attention_logits(q, k.repeat_interleave(2, dim=1), k))


def test_watching_leaves_no_hook_behind() -> None:
    subject = doubling()
    measure(subject, (1,))
    assert not subject.features._forward_hooks


def test_what_is_not_finite_ends_the_trace() -> None:
    net = Net()

    def step() -> None:
        with torch.no_grad():
            net.body.weight.mul_(1e20)

    roles = {"body.weight": Role.HIDDEN, "head.weight": Role.OUTPUT}
    assert sorted(measure(Probe(net, step, net.body, (X,), roles), (1, 2, 3))) == [0, 1]


def test_of_several_outputs_the_first_are_the_features() -> None:
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
            return super().forward(x), None

    pair = Pair(5, 6)
    with recorded(pair) as seen:
        pair(X)
    assert torch.equal(seen[0], pair(X)[0])
