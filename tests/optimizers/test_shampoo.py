"""Shampoo against pytorch-optimizer's and against matrix powers by scipy; its laws, its limits, its settings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import pytorch_optimizer
import scipy.linalg
import torch
from torch import Tensor
from walking import PEAK_LR, REST, SHAPES, Moment, largest_error, parameters, walk

from mupsweep.errors import ConfigError
from mupsweep.optimizers.shampoo import Shampoo, inverse_root
from mupsweep.optimizers.singular_values import symmetric_eigen
from mupsweep.sweep import config
from mupsweep.sweep.plan import plan
from mupsweep.sweep.tensor_rules import rules

TOLERANCE = {
    # relative to the distance walked
    "float64": 1e-10,
    "float32": 1e-4,  # eigenvalues from 1e-3 of the largest up, each to 1e-7 of it
    "stack": 1e-5,  # batched products round in another order, and eigenvectors amplify it
    "orthogonal": 1e-5,  # float64; a ridge of 1e-7 shortens the smallest singular value, 0.1 of the largest, by 5e-6
}
QUARTERS, HALVES = ("1/4", "1/4"), ("1/2", "1/2")


def shampoo(**keys: Any) -> Shampoo:
    return Shampoo(name="shampoo", rest=REST, **keys)


def walked(optimizer: Shampoo, eps: float, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The weights of the walk after its last step, in one group."""
    weights = [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters()]
    walk(optimizer.build([{"params": weights, "lr": PEAK_LR, "weight_decay": 0.0, "eps": eps}]), weights)
    return [p.detach() for p in weights]


def error(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest distance, relative to the distance walked."""
    return max(
        ((a - b).norm() / (b - start.detach()).norm()).item()
        for a, b, start in zip(got, expected, parameters(), strict=True)
    )


@pytest.mark.parametrize("eps", [1e-2, 1e-6])
def test_sums_with_quarters_are_pytorch_optimizers_shampoo(eps: float) -> None:
    theirs = [torch.nn.Parameter(p.detach().double()) for p in parameters()]
    walk(pytorch_optimizer.Shampoo(theirs, lr=PEAK_LR, matrix_eps=eps), theirs)
    ours = walked(shampoo(statistics="sum", betas=(0.0, 0.0), relative_eps=0.0), eps)
    assert error(ours, [p.detach() for p in theirs]) < TOLERANCE["float64"]


@pytest.mark.parametrize("root", [2, 4])
def test_blocks_are_those_of_pytorch_optimizers_scalable_shampoo(root: int) -> None:
    theirs = [torch.nn.Parameter(p.detach().double()) for p in parameters()]
    keys = {"block_size": 16, "inverse_exponent_override": root, "matrix_eps": 1e-3, "use_svd": True}
    plain = {"graft_type": 0, "nesterov": False, "shape_interpretation": False}
    every_step = {"start_preconditioning_step": 1, "preconditioning_compute_steps": 1}
    oracle = pytorch_optimizer.ScalableShampoo(theirs, lr=PEAK_LR, **keys, **plain, **every_step)
    oracle.param_groups[0]["betas"] = (0.0, 1.0)  # no momentum, sums: its constructor takes no beta of 1
    walk(oracle, theirs)
    exponents = (f"1/{root}", f"1/{root}")
    blocked = shampoo(statistics="sum", betas=(0.0, 0.0), relative_eps=0.0, exponents=exponents, block_size=16)
    assert error(walked(blocked, 1e-3), [p.detach() for p in theirs]) < TOLERANCE["float64"]


def power(matrix: np.ndarray, exponent: float, eps: float, relative: float) -> np.ndarray:
    """(A + ridge I)^-exponent in float64."""
    values, Q = np.linalg.eigh(matrix)
    return Q @ np.diag((values + eps + relative * values[-1]) ** -exponent) @ Q.T


@pytest.mark.parametrize("exponent", [0.25, 0.5, 0.375, 1.0])
def test_an_inverse_root_is_scipys_matrix_power(exponent: float) -> None:
    half = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrices = half @ half.mT
    got = inverse_root(matrices, exponent, 0.5, 0.01)
    for one, root in zip(matrices.numpy(), got.numpy(), strict=True):
        ridge = 0.5 + 0.01 * np.linalg.norm(one, 2)
        expected = scipy.linalg.fractional_matrix_power(one + ridge * np.eye(12), -exponent)
        assert np.abs(root - expected).max() < TOLERANCE["float64"] * np.abs(expected).max()


def closed_form(w: Tensor, walk: Iterator[Moment], optimizer: Shampoo, eps: float) -> Tensor:
    """One matrix, as the papers write it."""
    W, M = w.numpy().copy(), np.zeros(w.shape)
    L, R = np.zeros((len(W), len(W))), np.zeros((W.shape[1], W.shape[1]))
    (b1, b2), (e_left, e_right) = optimizer.betas, (float(Fraction(e)) for e in optimizer.exponents)
    left = right = np.zeros(0)
    for now in walk:
        G = now.grad.numpy()
        M = b1 * M + (1 - b1) * G
        if optimizer.statistics == "sum":
            L, R, scale = L + G @ G.T, R + G.T @ G, 1.0
        else:
            L, R, scale = b2 * L + (1 - b2) * G @ G.T, b2 * R + (1 - b2) * G.T @ G, 1 - b2**now.step
        if now.step % optimizer.every == 1 % optimizer.every:
            left = power(L / scale, e_left, eps, optimizer.relative_eps) if e_left else np.eye(len(L))
            right = power(R / scale, e_right, eps, optimizer.relative_eps) if e_right else np.eye(len(R))
        W -= now.lr * left @ (M / (1 - b1**now.step)) @ right
    return torch.from_numpy(W)


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize(
    "keys",
    [
        {"exponents": QUARTERS},
        {"exponents": HALVES, "betas": (0.95, 0.98)},
        {"exponents": HALVES, "betas": (0.0, 0.0), "statistics": "sum"},
        {"exponents": ("3/8", "1/8"), "betas": (0.5, 0.9)},
        {"exponents": ("1/4", "0")},
        {"exponents": ("0", "1/2"), "statistics": "sum"},
    ],
    ids=str,
)
def test_shampoo_is_its_closed_form(keys: dict[str, Any], every: int) -> None:
    optimizer = shampoo(every=every, relative_eps=1e-3, **keys)
    exact = walked(optimizer, 1e-5)
    assert largest_error(exact, partial(closed_form, optimizer=optimizer, eps=1e-5)) < TOLERANCE["float64"]
    assert error(walked(optimizer, 1e-5, torch.float32), exact) < TOLERANCE["float32"]


@pytest.mark.parametrize("keys", [{}, {"exponents": HALVES, "relative_eps": 1e-5, "block_size": 16}], ids=str)
def test_a_stack_is_every_matrix_alone(keys: dict[str, Any]) -> None:
    together = walked(shampoo(**keys), 1e-16, torch.float32)
    apart = parameters()
    walk(
        shampoo(**keys).build([{"params": [p], "lr": PEAK_LR, "weight_decay": 0.0, "eps": 1e-16} for p in apart]), apart
    )
    assert error(together, [p.detach() for p in apart]) < TOLERANCE["stack"]


@pytest.mark.parametrize("exponents", [QUARTERS, ("1/2", "0"), ("0", "1/2")], ids=str)
@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (16, 48)], ids=str)
def test_the_first_update_of_degree_zero_is_the_orthogonal_factor(
    shape: tuple[int, int], exponents: tuple[str, str]
) -> None:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, _, V = torch.linalg.svd(noise, full_matrices=False)
    grad = U @ torch.diag(torch.logspace(0, -1, min(shape), dtype=torch.float64)) @ V
    p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    p.grad = 1e-3 * grad
    shampoo(exponents=exponents, relative_eps=1e-7).build(
        [{"params": [p], "lr": 1.0, "weight_decay": 0.0, "eps": 1e-16}]
    ).step()
    assert (-p.detach() - U @ V).abs().max() < TOLERANCE["orthogonal"]


def test_roots_are_kept_between_their_steps() -> None:
    p = torch.nn.Parameter(torch.zeros(8, 4))
    optimizer = shampoo(every=3).build([{"params": [p], "lr": 1.0, "weight_decay": 0.0, "eps": 1e-16}])
    roots = []
    for step in range(7):
        p.grad = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        roots.append([optimizer.state[p][f"{axis}_root"].clone() for axis in ("out", "in")])
    new = [all(not torch.equal(a, b) for a, b in zip(roots[i], roots[i - 1], strict=True)) for i in range(1, 7)]
    kept = [all(torch.equal(a, b) for a, b in zip(roots[i], roots[i - 1], strict=True)) for i in range(1, 7)]
    assert new == [False, False, True, False, False, True]
    assert kept == [True, True, False, True, True, False]


def test_an_axis_beyond_max_axis_is_left_alone() -> None:
    limited, one_sided = walked(shampoo(max_axis=50), 1e-8), walked(shampoo(exponents=("0", "1/4")), 1e-8)
    both = walked(shampoo(), 1e-8)
    for i, (n_out, _) in enumerate(SHAPES):
        assert torch.equal(limited[i], one_sided[i] if n_out > 50 else both[i])
        assert not torch.equal(one_sided[i], both[i])


def test_max_axis_counts_the_whole_matrix_and_such_an_axis_is_not_cut() -> None:
    one_sided = shampoo(max_axis=50, block_size=8)
    state = one_sided.algorithm((64, 16)).state(torch.zeros(3, 64, 16))
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "momentum": (3, 2, 64, 8),
        "in": (3, 2, 8, 8),
        "in_root": (3, 2, 8, 8),
    }
    assert one_sided.update_law((64, 16)).blocks(64.0, 16.0) == 2


@pytest.mark.parametrize(
    ("exponents", "degree"), [(QUARTERS, 0), (HALVES, -1), (("1/4", "0"), Fraction(1, 2)), (("3/8", "1/4"), -0.25)]
)
def test_the_law_follows_the_exponents(exponents: tuple[str, str], degree: float) -> None:
    law = shampoo(exponents=exponents).update_law((64, 16))
    assert (law.degree, law.blocks(64, 16), law.eps_power, law.full_rank) == (degree, 1, 2, False)


def test_the_law_of_a_long_axis_is_one_sided() -> None:
    assert shampoo(max_axis=50).update_law((64, 16)).degree == Fraction(1, 2)
    assert shampoo(max_axis=64).update_law((64, 16)).degree == 0


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_ends_in_weights_that_are_not(bad: float, every: int) -> None:
    """LAPACK raises for some such matrices; the run should go on to be recorded as diverged."""
    p = torch.nn.Parameter(torch.zeros(6, 5))
    optimizer = shampoo(every=every).build([{"params": [p], "lr": 1.0, "weight_decay": 0.0, "eps": 1e-16}])
    for _ in range(3):
        p.grad = torch.ones(6, 5)
        p.grad[3, 2] = bad
        optimizer.step()
    assert not p.isfinite().all()


def test_an_eigensolver_that_gives_up_is_helped_by_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be made to on demand."""
    real = torch.linalg.eigh

    def stubborn(matrices: Tensor) -> Any:
        if matrices.dtype == torch.float32:
            raise torch.linalg.LinAlgError
        return real(matrices)

    half = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0))
    matrices = half @ half.mT
    monkeypatch.setattr(torch.linalg, "eigh", stubborn)
    values, vectors = symmetric_eigen(matrices)
    assert (values.dtype, vectors.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(vectors @ torch.diag_embed(values) @ vectors.mT, matrices, rtol=1e-5, atol=1e-5)


def test_zero_and_negative_eigenvalues_stay_zero_without_a_ridge() -> None:
    values = torch.tensor([-1e-9, 0.0, 4.0, 16.0])
    Q = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0))).Q
    got = inverse_root(torch.diag(values).unsqueeze(0), 0.5, 0.0, 0.0)[0]
    torch.testing.assert_close(got, torch.diag(torch.tensor([0.0, 0.0, 0.5, 0.25])))
    ridged = inverse_root((Q @ torch.diag(values) @ Q.T).unsqueeze(0), 0.5, 1.0, 0.25)[0]  # ridge 1 + 0.25 * 16
    expected = Q @ torch.diag(torch.tensor([5.0, 5.0, 9.0, 21.0]) ** -0.5) @ Q.T
    torch.testing.assert_close(ridged, expected, rtol=1e-5, atol=1e-6)


def test_shampoo2_is_the_one_of_qiu() -> None:
    optimizer = plan(config.load(["optimizer=shampoo2"]))[0].resolved.optimizer
    assert isinstance(optimizer, Shampoo)
    assert optimizer.graft_source is not None
    assert (optimizer.exponents, optimizer.block_size, optimizer.every) == (HALVES, 512, 10)
    assert (optimizer.graft_source.name, optimizer.betas, optimizer.relative_eps) == ("adamw", (0.95, 0.98), 1e-5)
    assert optimizer.update_law((1024, 1024)) == optimizer.graft_source.update_law((1024, 1024))


def test_a_ladder_across_max_axis_is_refused() -> None:
    overrides = ["experiment=smoke", "optimizer=shampoo", "optimizer.max_axis=100", "sweep.width_ratios=[4]"]
    (run,) = plan(config.load([*overrides, "sweep.log2_lrs=[-6]"]))
    with pytest.raises(ConfigError, match=r"mlp.up.weight: shampoo treats \(256, 64\) otherwise.*raise max_axis"):
        rules(run.resolved, run.size, 1.0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"exponents": ("1/4", "x")}, r"optimizer.exponents=\['1/4', 'x'\]: expected two fractions"),
        ({"exponents": ("-1/4", "1/4")}, r"optimizer.exponents=\['-1/4', '1/4'\]"),
        ({"exponents": ("1/0", "1/4")}, r"optimizer.exponents=\['1/0', '1/4'\]"),
        ({"exponents": ("0", "0")}, r"optimizer.exponents=\['0', '0'\].*not both 0"),
        ({"statistics": "emma"}, "optimizer.statistics=emma: did you mean 'ema'"),
        ({"betas": (0.9, 1.0)}, r"optimizer.betas=\[0.9, 1.0\]"),
        ({"relative_eps": -1.0}, "optimizer.relative_eps=-1.0"),
        ({"every": 0}, "optimizer.every=0: expected at least 1"),
        ({"max_axis": 0}, "optimizer.max_axis=0: expected at least 1"),
        ({"roles": ("hidden", "hidden_vector")}, "shampoo takes input, hidden, output tensors only"),
    ],
    ids=str,
)
def test_a_bad_setting_is_refused_with_its_key_and_value(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shampoo(**keys)


def test_a_matrix_with_no_axis_to_precondition_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.max_axis=50: shampoo has no axis of a \(64, 128\) matrix"):
        shampoo(max_axis=50).update_law((64, 128))
