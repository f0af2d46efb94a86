"""Our optimizers against torch's, and Muon against the properties of its paper."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from mupsweep.errors import ConfigError
from mupsweep.optimizers.adamw import AdamW
from mupsweep.optimizers.muon import Muon, orthogonalise
from mupsweep.optimizers.sgd import SGD

TOLERANCE = {
    "unfused": 1e-6,  # relative to the largest weight: fp32 sums in another order, 20 steps
    # relative to the distance walked:
    "scaled": 1e-6,  # a factor is multiplied in fp32 before the LR instead of after
    "batched": 2e-2,  # bf16 products of a batch round in another order, 2^-8 each
}
STEPS = 20
REST: dict[str, Any] = {"name": "adamw", "kind": "mupsweep.optimizers.adamw.AdamW"}
SQUARE, TALL, WIDE = (32, 32), (64, 16), (16, 48)


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def walk(optimizer: torch.optim.Optimizer, parameters: list[Tensor], steps: range = range(STEPS)) -> None:
    """Steps with gradients that depend on the step alone, and an LR that rises and falls."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in steps:
        for i, p in enumerate(parameters):
            generator = torch.Generator().manual_seed(1000 * step + i)
            p.grad = torch.randn(p.shape, generator=generator) * 10.0 ** (step % 3 - 2)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * (1 - abs(step - 7) / 20)
        optimizer.step()
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak


def groups(parameters: list[Tensor], lrs: list[float], decays: list[float], eps: list[float]) -> list[dict[str, Any]]:
    return [
        {"params": [p], "lr": lr, "weight_decay": wd, "eps": e}
        for p, lr, wd, e in zip(parameters, lrs, decays, eps, strict=True)
    ]


def muon(scaling: str, **keys: Any) -> Muon:
    return Muon(name="muon", scaling=scaling, rest=REST, **keys)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.8, 0.999)], ids=str)
def test_adamw_is_torchs(betas: tuple[float, float]) -> None:
    shapes = [SQUARE, TALL, (7,)]
    settings = ([1e-2, 3e-3, 0.1], [0.0, 0.1, 0.5], [1e-8, 1e-12, 1e-3])
    ours, fused, plain, start = (tensors(*shapes) for _ in range(4))
    walk(AdamW(name="adamw", betas=betas).build(groups(ours, *settings)), ours)
    walk(torch.optim.AdamW(groups(fused, *settings), betas=betas, fused=True), fused)
    walk(torch.optim.AdamW(groups(plain, *settings), betas=betas, fused=False, foreach=False), plain)
    for a, b, c, s in zip(ours, fused, plain, start, strict=True):
        assert torch.equal(a, b)
        assert (a - s).abs().max() > 0.01
        assert (a - c).abs().max() < TOLERANCE["unfused"] * c.abs().max()


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_is_torchs_with_decay_beside_the_momentum(momentum: float, nesterov: bool) -> None:
    shapes = [SQUARE, TALL, (7,)]
    ours, theirs, start = tensors(*shapes), tensors(*shapes), tensors(*shapes)
    lrs, decays = [1e-1, 1e-2, 1.0], [0.0, 0.1, 0.01]
    walk(
        SGD(name="sgd", momentum=momentum, nesterov=nesterov).build(groups(ours, lrs, decays, [0.0] * 3)),
        ours,
    )
    torchs = [{"params": [p], "lr": lr, "decay": wd} for p, lr, wd in zip(theirs, lrs, decays, strict=True)]
    oracle = torch.optim.SGD(torchs, momentum=momentum, nesterov=nesterov, foreach=False)

    def decay(oracle: torch.optim.Optimizer, *_: Any) -> None:
        for group in oracle.param_groups:
            group["params"][0].detach().mul_(1 - group["lr"] * group["decay"])

    oracle.register_step_pre_hook(decay)
    walk(oracle, theirs)
    for a, b, s in zip(ours, theirs, start, strict=True):
        assert torch.equal(a, b)
        assert (a - s).abs().max() > 0.01


TORCH_MUON = {"jordan": "original", "kimi": "match_rms_adamw"}


def both_muons(
    scaling: str, shapes: list[tuple[int, int]], nesterov: bool = True, steps: int = STEPS
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(ours, torch's, the start) of every matrix after some steps, all in one group."""
    ours, theirs, start = tensors(*shapes), tensors(*shapes), tensors(*shapes)
    shared = {"lr": 0.02, "weight_decay": 0.1}
    walk(muon(scaling, nesterov=nesterov).build([{"params": ours, "eps": 1e-7, **shared}]), ours, range(steps))
    oracle = torch.optim.Muon(
        theirs,
        momentum=0.95,
        nesterov=nesterov,
        eps=1e-7,
        ns_steps=5,
        adjust_lr_fn=TORCH_MUON[scaling],
        **shared,
    )
    walk(oracle, theirs, range(steps))
    return list(zip(ours, theirs, start, strict=True))


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scaling", TORCH_MUON)
@pytest.mark.parametrize("shape", [SQUARE, TALL, WIDE], ids=str)
def test_muon_on_one_matrix_is_torchs(scaling: str, shape: tuple[int, int], nesterov: bool) -> None:
    ((ours, theirs, start),) = both_muons(scaling, [shape], nesterov)
    walked = (theirs - start).norm()
    assert walked > 0.1
    if scaling == "jordan" and shape[0] <= shape[1]:  # a factor of exactly 1
        assert torch.equal(ours, theirs)
    assert (ours - theirs).norm() < TOLERANCE["scaled"] * walked


@pytest.mark.parametrize("scaling", TORCH_MUON)
def test_muon_on_a_stack_of_matrices_is_torchs_on_each(scaling: str) -> None:
    shapes = [SQUARE, TALL, SQUARE, WIDE, TALL, SQUARE]
    for ours, theirs, start in both_muons(scaling, shapes):
        assert (ours - theirs).norm() < TOLERANCE["batched"] * (theirs - start).norm()


@pytest.mark.parametrize("scaling", TORCH_MUON)
def test_muon_on_a_stack_is_muon_on_each_matrix(scaling: str) -> None:
    """Mixing up two matrices of a stack, or their momenta, would be an error of order 1."""
    shapes = [SQUARE, TALL, SQUARE, TALL]
    together, apart = tensors(*shapes), tensors(*shapes)
    start = tensors(*shapes)
    keys = {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-7}
    walk(muon(scaling).build([{"params": together, **keys}]), together)
    walk(muon(scaling).build([{"params": [p], **keys} for p in apart]), apart)
    for a, b, s in zip(together, apart, start, strict=True):
        assert (a - b).norm() < TOLERANCE["batched"] * (b - s).norm()


def step_from_zero(optimizer: Muon, grad: Tensor, lr: float = 1.0) -> Tensor:
    p = torch.nn.Parameter(torch.zeros_like(grad))
    p.grad = grad.clone()
    optimizer.build([{"params": [p], "lr": lr, "weight_decay": 0.0, "eps": 1e-7}]).step()
    return -p.detach()


@pytest.mark.parametrize("shape", [SQUARE, TALL, WIDE, (128, 128)], ids=str)
def test_the_plain_update_has_singular_values_near_one(shape: tuple[int, int]) -> None:
    U, _, V = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(3)), full_matrices=False)
    grad = 1e-3 * U @ torch.diag(torch.logspace(0, -1.3, min(shape))) @ V  # a condition number of 20
    values = torch.linalg.svdvals(step_from_zero(muon("plain"), grad))
    assert len(values) == min(shape)
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_the_update_keeps_the_singular_vectors_of_the_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(48, 8, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(24, 8, generator=generator))
    grad = U @ torch.diag(torch.linspace(1.0, 3.0, 8)) @ V.mT
    inside = U.mT @ step_from_zero(muon("plain"), grad) @ V
    assert inside.diag().min() > 0.6
    assert inside.diag().max() < 1.3
    assert (inside - torch.diag(inside.diag())).abs().max() < 0.05


@pytest.mark.parametrize(
    ("scaling", "shape", "factor"),
    [
        ("plain", TALL, 1.0),
        ("bernstein", SQUARE, 1.0),
        ("bernstein", TALL, 2.0),
        ("bernstein", (16, 64), 0.5),
        ("jordan", SQUARE, 1.0),
        ("jordan", TALL, 2.0),
        ("jordan", (16, 64), 1.0),
        ("kimi", TALL, 0.2 * 8),
        ("kimi", (16, 64), 0.2 * 8),
        ("kimi", (25, 25), 0.2 * 5),
    ],
)
def test_a_convention_multiplies_the_plain_update_by_its_factor(
    scaling: str, shape: tuple[int, int], factor: float
) -> None:
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    expected = factor * step_from_zero(muon("plain"), grad)
    torch.testing.assert_close(step_from_zero(muon(scaling), grad), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [SQUARE, TALL, WIDE], ids=str)
def test_bernsteins_update_has_rms_operator_norm_one(shape: tuple[int, int]) -> None:
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    update = step_from_zero(muon("bernstein"), grad)
    norm = (shape[1] / shape[0]) ** 0.5 * torch.linalg.matrix_norm(update, ord=2)
    assert 0.8 < norm < 1.3


@pytest.mark.parametrize("shape", [TALL, WIDE], ids=str)
def test_orthogonalising_the_transpose_gives_the_transpose(shape: tuple[int, int]) -> None:
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(orthogonalise(stack.mT, 5, 1e-7), orthogonalise(stack, 5, 1e-7).mT)


@pytest.mark.parametrize("scaling", ["plain", "jordan", "bernstein", "kimi"])
def test_weight_decay_uses_the_lr_without_the_shape_factor(scaling: str) -> None:
    (p,) = tensors(TALL)
    before, grad = p.detach().clone(), torch.randn(TALL, generator=torch.Generator().manual_seed(1))
    p.grad = grad.clone()
    muon(scaling).build([{"params": [p], "lr": 0.5, "weight_decay": 0.25, "eps": 1e-7}]).step()
    expected = before * (1 - 0.5 * 0.25) - step_from_zero(muon(scaling), grad, lr=0.5)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_momentum_is_the_average_of_the_gradients(momentum: float) -> None:
    parameters = tensors(SQUARE, SQUARE)
    optimizer = muon("plain", momentum=momentum).build(
        [{"params": parameters, "lr": 0.1, "weight_decay": 0.0, "eps": 1e-7}]
    )
    average = [torch.zeros(SQUARE) for _ in parameters]
    for step in range(4):
        for i, p in enumerate(parameters):
            p.grad = torch.randn(SQUARE, generator=torch.Generator().manual_seed(10 * step + i))
            average[i] = momentum * average[i] + (1 - momentum) * p.grad
        optimizer.step()
    for p, expected in zip(parameters, average, strict=True):
        torch.testing.assert_close(optimizer.state[p]["momentum"], expected, rtol=1e-5, atol=1e-6)


def test_a_stacks_state_survives_a_state_dict_and_continues_bit_for_bit() -> None:
    shapes = [SQUARE, TALL, SQUARE, TALL, TALL]
    straight = tensors(*shapes)
    keys = {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-7}
    first = muon("jordan").build([{"params": straight, **keys}])
    walk(first, straight, range(6))
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in straight]
    second = muon("jordan").build([{"params": resumed, **keys}])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for i, p in enumerate(straight):
        assert torch.equal(first.state[p]["momentum"], second.state[resumed[i]]["momentum"])
        assert first.state[p]["momentum"].abs().max() > 0
    walk(first, straight, range(6, STEPS))
    walk(second, resumed, range(6, STEPS))
    for a, b in zip(straight, resumed, strict=True):
        assert torch.equal(a, b)


def test_a_matrix_without_a_gradient_takes_one_of_zero() -> None:
    missing, zero = tensors(SQUARE, SQUARE), tensors(SQUARE, SQUARE)
    for parameters in (missing, zero):
        optimizer = muon("plain").build([{"params": parameters, "lr": 0.1, "weight_decay": 0.0, "eps": 1e-7}])
        parameters[0].grad = torch.randn(SQUARE, generator=torch.Generator().manual_seed(1))
        parameters[1].grad = torch.zeros(SQUARE) if parameters is zero else None
        optimizer.step()
    for a, b in zip(missing, zero, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(missing[1], tensors(SQUARE, SQUARE)[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Muon(name="muon", scaling="plain"), "optimizer.rest of muon: it takes only hidden"),
        (lambda: AdamW(name="adamw", rest=REST), "optimizer.rest of adamw: it takes every tensor"),
        (lambda: muon("jordn"), "optimizer.scaling=jordn.*jordan"),
        (lambda: muon("plain", momentum=1.0), "optimizer.momentum=1.0"),
        (lambda: muon("plain", ns_steps=0), "optimizer.ns_steps=0"),
        (lambda: AdamW(name="adamw", betas=(0.9, 1.0)), r"optimizer.betas=\[0.9, 1.0\]"),
        (lambda: AdamW(name="adamw", eps=-1.0), "optimizer.eps=-1.0"),
        (lambda: AdamW(name="adamw", weight_decay=-0.1), "optimizer.weight_decay=-0.1"),
        (lambda: AdamW(name="adamw", lr_ratio=0.0), "optimizer.lr_ratio=0.0"),
        (lambda: SGD(name="sgd", momentum=-0.1), "optimizer.momentum=-0.1"),
        (lambda: SGD(name="sgd", momentum=0.0, nesterov=True), "optimizer.nesterov=true"),
    ],
)
def test_a_bad_setting_is_refused_with_its_key_and_value(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
