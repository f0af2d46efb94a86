"""SOAP against pytorch-optimizer's, which is the authors'; against AdamW; its bases, its laws, its settings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import Tensor
from walking import PEAK_LR, REST, SHAPES, STEPS, Moment, gradient, largest_error, parameters, start, walk

from mupsweep.errors import ConfigError
from mupsweep.optimizers.soap import SOAP, follow
from mupsweep.scaling.laws import columns, entries, one, rows

TOLERANCE = {
    # in units of eps, for axes of n <= 64
    "moments": 64,  # n
    "eigenvectors": 64**2,  # n^2
    # relative to the distance walked
    torch.float64: 1e-10,  # QR decompositions amplify eps by the condition numbers of L and R
    torch.float32: 1e-2,  # a rotated entry within eps of zero may change its sign, and Adam lifts it to size 1
    "stack": 1e-5,  # batched products round in another order, and Adam lifts small entries to the size of large ones
    "adam": 1e-12,  # float64
    "rotation": 1e-7,  # float64, with the bases of 20 steps
    "orthonormal": 1e-5,  # of an entry of Q^T Q, fp32
    "spectral norm": 0.1,  # ten power iterations on noise, whose singular values are close
}
EPS = 1e-8


def soap(**keys: Any) -> SOAP:
    return SOAP(name="soap", rest=REST, **keys)


def group(weights: list[Tensor]) -> dict[str, Any]:
    return {"params": weights, "lr": PEAK_LR, "weight_decay": 0.0, "eps": EPS}


def doubled() -> list[Tensor]:
    return [torch.nn.Parameter(p.detach().double()) for p in parameters()]


def error(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest distance, relative to the distance walked."""
    return max(
        ((a - b).norm() / (b - start(i)).norm()).item() for i, (a, b) in enumerate(zip(got, expected, strict=True))
    )


class Float64Torch:
    """torch, for a module whose decompositions are in fp32 whatever the weights are."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def error_beside_the_oracle(dtype: torch.dtype, last: int, keys: dict[str, Any]) -> float:
    """The error after step `last` of a walk beside pytorch-optimizer's SOAP, which walks on from our first bases.

    One gradient fills 16 of the 64 dimensions of a long axis, and rounding chooses the eigenvectors of the others: the
    oracle differs from itself when a gradient changes by one ulp. So first bases are compared by what defines them.
    """
    ours, theirs = ([torch.nn.Parameter(p.detach().to(dtype)) for p in parameters()] for _ in range(2))
    optimizer = soap(**keys).build([group(ours)])
    oracle = pytorch_optimizer.SOAP(
        theirs,
        betas=keys["betas"],
        shampoo_beta=keys["shampoo_beta"],
        precondition_frequency=keys["every"],
        max_precondition_dim=keys["max_axis"],
        weight_decay=0.0,
        eps=EPS,
    )
    walk(optimizer, ours, steps=[1])
    walk(oracle, theirs, steps=[1])
    eps = torch.finfo(dtype).eps
    for p, q in zip(ours, theirs, strict=True):
        for i, axis in enumerate(("out", "in")):
            if p.shape[i] > keys["max_axis"]:
                assert axis not in optimizer.state[p]
                assert len(oracle.state[q]["Q"][i]) == 0
                continue
            moments, basis = optimizer.state[p][axis], optimizer.state[p][f"{axis}_basis"]
            assert (moments - oracle.state[q]["GG"][i]).norm() < TOLERANCE["moments"] * eps * moments.norm()
            for Q in (basis, oracle.state[q]["Q"][i]):
                inside = Q.mT @ moments @ Q
                assert (inside - inside.diag().diag()).norm() < TOLERANCE["eigenvectors"] * eps * moments.norm()
                assert (Q.mT @ Q - torch.eye(len(Q))).norm() < TOLERANCE["eigenvectors"] * eps
            oracle.state[q]["Q"][i] = basis.clone()
    walk(optimizer, ours, steps=range(2, last + 1))
    walk(oracle, theirs, steps=range(2, last + 1))
    return error(ours, theirs)


# Long axes are decomposed again only once enough gradients have filled them.
@pytest.mark.parametrize(
    "keys",
    [
        {"betas": (0.95, 0.95), "shampoo_beta": 0.95, "every": 10, "max_axis": 10000},
        {"betas": (0.9, 0.99), "shampoo_beta": 0.97, "every": 10, "max_axis": 10000},
        {"betas": (0.95, 0.95), "shampoo_beta": 0.95, "every": 5, "max_axis": 40},
        {"betas": (0.8, 0.9), "shampoo_beta": 0.95, "every": 1, "max_axis": 20},
    ],
    ids=str,
)
def test_soap_is_pytorch_optimizers(keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytorch_optimizer.optimizer.soap.torch", Float64Torch())
    assert error_beside_the_oracle(torch.float64, STEPS, keys) < TOLERANCE[torch.float64]


def test_in_float32_soap_is_pytorch_optimizers_until_bases_are_followed() -> None:
    """From then on rounding decides which of two close eigenvalues comes first, and the bases part."""
    keys = {"betas": (0.95, 0.95), "shampoo_beta": 0.95, "every": 10, "max_axis": 10000}
    assert error_beside_the_oracle(torch.float32, 10, keys) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("keys", [{}, {"block_size": 16}, {"axes": ("in",)}], ids=str)
def test_a_stack_is_every_matrix_alone(keys: dict[str, Any]) -> None:
    together, apart = parameters(), parameters()
    walk(soap(**keys).build([group(together)]), together)
    walk(soap(**keys).build([group([p]) for p in apart]), apart)
    assert error(together, apart) < TOLERANCE["stack"]


def adam(w: Tensor, walk: Iterator[Moment], betas: tuple[float, float]) -> Tensor:
    """Adam from the second gradient on; eps is added before the bias corrections."""
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for now in walk:
        if now.step > 1:
            t = now.step - 1
            m = betas[0] * m + (1 - betas[0]) * now.grad
            v = betas[1] * v + (1 - betas[1]) * now.grad**2
            w = w - now.lr * (1 - betas[1] ** t) ** 0.5 / (1 - betas[0] ** t) * m / (v.sqrt() + EPS)
    return w


@pytest.mark.parametrize("keys", [{"axes": ()}, {"max_axis": 1}], ids=str)
def test_soap_that_rotates_no_axis_is_adam_one_step_later(keys: dict[str, Any]) -> None:
    weights = doubled()
    walk(soap(betas=(0.8, 0.99), **keys).build([group(weights)]), weights)
    got = [p.detach() for p in weights]
    assert largest_error(got, lambda w, moments: adam(w, moments, (0.8, 0.99))) < TOLERANCE["adam"]


def test_the_first_step_leaves_the_weights() -> None:
    weights = parameters()
    optimizer = soap().build([group(weights)])
    for i, p in enumerate(weights):
        p.grad = gradient(i, 1)
    optimizer.step()
    assert all(torch.equal(p, start(i)) for i, p in enumerate(weights))
    optimizer.step()
    assert all(not torch.equal(p, start(i)) for i, p in enumerate(weights))


def test_a_rotated_gradient_gives_the_rotated_update() -> None:
    """Which Adam's does not."""
    generator = torch.Generator().manual_seed(7)
    U, V = (torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64)).Q for _ in range(2))

    def update(turned: bool, algorithm: SOAP) -> Tensor:
        p = torch.nn.Parameter(torch.zeros(32, 32, dtype=torch.float64))
        optimizer = algorithm.build([group([p])])
        for step in range(1, 21):
            grad = gradient(0, step).double()
            p.grad = U @ grad @ V if turned else grad
            optimizer.step()
        return p.detach()

    expected = U @ update(False, soap(every=3)) @ V
    assert (update(True, soap(every=3)) - expected).norm() < TOLERANCE["rotation"] * expected.norm()
    assert (update(True, soap(axes=())) - U @ update(False, soap(axes=())) @ V).norm() > 0.1 * expected.norm()


def test_following_fixed_moments_ends_at_their_eigenvectors() -> None:
    """The second moments stay with the directions that they belong to."""
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(2, 6, 6, generator=generator)).Q
    values = torch.tensor([[1.0, 32.0, 4.0, 2.0, 16.0, 8.0], [2.0**k for k in range(6)]])
    moments = Q @ torch.diag_embed(values) @ Q.mT
    basis = Q.clone()  # in another order than by size
    second = values.unsqueeze(-1).expand(2, 6, 3).contiguous()
    for _ in range(3):
        follow(moments, basis, second)
    sizes = values.sort(-1, descending=True).values
    torch.testing.assert_close(basis.mT @ moments @ basis, torch.diag_embed(sizes), rtol=1e-4, atol=1e-4)
    assert torch.equal(second, sizes.unsqueeze(-1).expand(2, 6, 3))
    start = torch.linalg.qr(torch.randn(2, 6, 6, generator=generator)).Q
    for _ in range(40):
        follow(moments, start, second)
    assert ((start.mT @ basis).abs() - torch.eye(6)).abs().max() < 1e-3


def test_bases_stay_orthonormal() -> None:
    weights = parameters()
    optimizer = soap(every=1).build([group(weights)])
    walk(optimizer, weights)
    for p in weights:
        for axis in ("out", "in"):
            Q = optimizer.state[p][f"{axis}_basis"]
            assert (Q.mT @ Q - torch.eye(len(Q))).abs().max() < TOLERANCE["orthonormal"]


def test_the_spectral_norm_is_right_from_the_first_update_on() -> None:
    """Power iteration has nothing to follow at the step that leaves the weights."""
    weights = parameters()
    optimizer = soap(spectral_norm=True).build([{**group(weights), "lr": 1.0}])
    for step in (1, 2):
        before = [p.detach().clone() for p in weights]
        for i, p in enumerate(weights):
            p.grad = gradient(i, step)
        optimizer.step()
    for p, w, (n_out, n_in) in zip(weights, before, SHAPES, strict=True):
        norm = torch.linalg.matrix_norm(w - p.detach(), 2).item()
        assert norm == pytest.approx((n_out / n_in) ** 0.5, rel=TOLERANCE["spectral norm"])


@pytest.mark.parametrize(
    ("shape", "blocks"), [((40, 40), one), ((40, 60), columns), ((60, 40), rows), ((60, 60), entries)]
)
def test_the_law_of_a_long_axis_is_entrywise_along_it(shape: tuple[int, int], blocks: Any) -> None:
    law = soap(max_axis=40).update_law(shape)
    assert (law.degree, law.eps_power) == (0, 1)
    assert law.blocks(*map(float, shape)) == blocks(*map(float, shape))
    assert soap(axes=("in", "out")).update_law().blocks is one


def test_max_axis_counts_the_whole_matrix_and_such_an_axis_is_not_cut() -> None:
    one_sided = soap(max_axis=50, block_size=8)
    state = one_sided.algorithm((64, 16)).state(torch.zeros(3, 64, 16))
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "m": (3, 2, 64, 8),
        "v": (3, 2, 64, 8),
        "in": (3, 2, 8, 8),
        "in_basis": (3, 2, 8, 8),
    }
    assert one_sided.update_law((64, 16)).blocks(64.0, 16.0) == 64 * 2  # rows times blocks


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_ends_in_weights_that_are_not(bad: float) -> None:
    """LAPACK raises for some such matrices; the run should go on to be recorded as diverged."""
    p = torch.nn.Parameter(torch.zeros(6, 5))
    optimizer = soap(every=1).build([group([p])])
    for _ in range(3):
        p.grad = torch.ones(6, 5)
        p.grad[3, 2] = bad
        optimizer.step()
    assert not p.isfinite().all()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"axes": ("left",)}, "optimizer.axes=left: valid: in, out"),
        ({"betas": (0.95, 1.0)}, r"optimizer.betas=\[0.95, 1.0\]"),
        ({"shampoo_beta": 1.0}, "optimizer.shampoo_beta=1.0"),
        ({"every": 0}, "optimizer.every=0: expected at least 1"),
        ({"max_axis": -1}, "optimizer.max_axis=-1: expected at least 1"),
        ({"roles": ("hidden", "input_vector")}, "soap takes input, hidden, output tensors only"),
    ],
    ids=str,
)
def test_a_bad_setting_is_refused_with_its_key_and_value(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        soap(**keys)
