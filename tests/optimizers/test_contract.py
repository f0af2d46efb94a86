"""What every optimizer of configs/optimizer keeps: its groups, its state, the update law it declares."""

from __future__ import annotations

import io
import math
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import chosen
import pytest
import torch
from torch import Tensor

from mupsweep.optimizers import Optimizer
from mupsweep.optimizers.composed import ComposableOptimizer
from mupsweep.scaling import Role
from mupsweep.sweep import config
from mupsweep.sweep.plan import plan
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.training.build import TrainingSetup, build

TOLERANCE = {
    "exponent": 0.05,  # of ||A||_2 in the width
    "shape": 0.10,  # relative, of ||A||_2 / the law over all shapes
    "homogeneity": 1e-5,  # relative; powers of two are exact in bf16 and fp32
    "decay": 1e-6,  # relative, fp32
    "projection": 1e-6,  # relative, fp32
}
NAMES = config.choices("optimizer")
WIDTHS = (32, 64, 128, 256)
ASPECTS = ((1, 1), (4, 1), (1, 4), (3, 2))  # (n_out, n_in) in units of the width
LARGEST = 512 * 256  # entries
TWICE_AS_WIDE = "soap_published"  # whose norm is 0.07 off its exponent at these widths
STEPS = 3  # some optimizers only look at the first gradient
DECAYS = 10  # steps without a gradient
CPU = torch.device("cpu")
TINY = ["experiment=smoke", "model.depth=1", "sweep.width_ratios=[2]", "sweep.log2_lrs=[-5]"]


@cache
def run(name: str, *overrides: str) -> RunSpec:
    (made,) = plan(config.load([*TINY, *chosen.words("optimizer", name), *overrides]))
    return made


def parts(name: str) -> tuple[Optimizer, ...]:
    return tuple(scaled.optimizer for scaled in run(name).resolved.optimizers)


# Each algorithm once: most matrix optimizers share the same AdamW for the rest.
PARTS = list({repr(replace(part, lr_ratio=1.0)): part for name in NAMES for part in parts(name)}.values())
every_part = pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)


def update(part: Optimizer, weights: Tensor, grads: list[Tensor], scale: float = 1.0) -> Tensor:
    """The update of the last of some steps at LR 1: what it subtracts. On a sphere only a short step is straight."""
    p = torch.nn.Parameter(weights.clone())
    lr = 2.0**-10 if renormalizes(part) else 1.0
    optimizer = part.build([group(part, p, lr=lr, weight_decay=0.0, scale=scale)])
    for grad in grads:
        before = p.detach().clone()
        p.grad = grad.clone()
        if part.curvature_every is not None:
            optimizer.observe()  # pyright: ignore
        optimizer.step()
    return (before - p.detach()).double() / lr


def group(part: Optimizer, p: Tensor, lr: float, weight_decay: float, scale: float = 1.0) -> dict[str, Any]:
    """A parameter group at the base shape, its thresholds following gradients `scale` times as large."""
    thresholds = {
        name: threshold.value * scale ** ((threshold.law.eps_power or 0) * threshold.law.eps_degree)
        for name, threshold in part.thresholds(dims(p)).items()
    }
    return {"params": [p], "lr": lr, "weight_decay": weight_decay, **thresholds}


def dims(p: Tensor) -> tuple[int, int]:
    n_out, n_in = (*p.shape, 1)[:2]
    return n_out, n_in


def renormalizes(part: Optimizer) -> bool:
    """Whether it puts the weights back onto a sphere, so that weight decay has no effect."""
    return isinstance(part, ComposableOptimizer) and (part.hyperball or part.renormalizes)


def decay(name: str) -> str:
    """Weight decay for the parts that can have it."""
    return "optimizer.rest.weight_decay=0.1" if renormalizes(parts(name)[0]) else "optimizer.weight_decay=0.1"


def left_alone(name: str, before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    """Whether the weights are the same; where they are put onto a sphere that they are on, up to rounding."""
    if not any(renormalizes(part) for part in parts(name)):
        return same(before, after)
    return all((after[k] - w).norm() <= TOLERANCE["projection"] * w.norm() for k, w in before.items())


def spectral_norm(matrix: Tensor) -> float:
    gram = matrix @ matrix.mT if matrix.shape[0] < matrix.shape[1] else matrix.mT @ matrix
    return math.sqrt(torch.linalg.eigvalsh(gram)[-1].item())


def aligned_update_norm(part: Optimizer, n_out: int, n_in: int) -> tuple[float, float]:
    """(||A||_2, the law's prediction) for rank-1 gradients of dense vectors, smaller for larger shapes.

    An optimizer whose rule counts on full-rank updates and fixes their Frobenius norm sees orthogonal gradients.
    """
    generator = torch.Generator().manual_seed(n_out + n_in)
    u, v = (torch.randn(n, generator=generator) for n in (n_out, n_in))
    norm = (n_out * n_in) ** -0.4
    law = part.measured_law((n_out, n_in))
    shape = torch.outer(u / u.norm(), v / v.norm())
    if law.full_rank and law.weight_norm is not None:
        shape = torch.linalg.qr(torch.randn(max(n_out, n_in), min(n_out, n_in), generator=generator)).Q
        shape = shape if n_out >= n_in else shape.mT
    weights = torch.randn(n_out, n_in, generator=generator) * max(n_out, n_in) ** -0.5
    predicted = (
        norm ** float(law.degree)
        * float(law.blocks(n_out, n_in)) ** float((1 - law.degree) / 2)
        * float(law.shape_factor(n_out, n_in))
        * {None: 1.0, "frobenius": float(weights.norm()), "spectral": spectral_norm(weights)}[law.weight_norm]
    )
    return spectral_norm(update(part, weights, [norm * shape] * STEPS)), predicted


def slope(xs: list[float], ys: list[float]) -> float:
    """Of the least-squares line through points."""
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def gradients(built: TrainingSetup, seed: int, scale: float = 1.0) -> None:
    for i, p in enumerate(built.network.parameters()):
        generator = torch.Generator().manual_seed(1000 * seed + i)
        p.grad = scale * torch.randn(p.shape, generator=generator)


def weights(built: TrainingSetup) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in built.network.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", NAMES)
def test_every_role_has_a_taker(name: str) -> None:
    taken = [role for part in parts(name) for role in part.roles]
    assert set(taken) == set(Role) - {Role.ROUTER}  # routers go with the head


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_in_exactly_one_group(name: str) -> None:
    built = build(run(name, "model.bias=true"), CPU)
    grouped = Counter(id(p) for member in built.optimizer.members for g in member.param_groups for p in g["params"])
    assert grouped == Counter(id(p) for p in built.network.parameters())
    assert set(grouped.values()) == {1}
    assert sorted(n for g in built.groups for n in g["tensors"]) == sorted(weights(built))


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_stepped_by_the_part_that_takes_its_role(name: str) -> None:
    spec = run(name)
    built = build(spec, CPU)
    roles = {t.name: t.role for t in spec.resolved.model.tensors(spec.size)}
    named = {part.name: part for part in parts(name)}
    for group in built.groups:
        for tensor in group["tensors"]:
            assert roles[tensor] in named[group["optimizer"]].roles, tensor


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_through_a_file_continues_bit_for_bit(name: str) -> None:
    spec = run(name, decay(name))
    straight, resumed = build(spec, CPU), build(spec, CPU)
    for step in range(3):
        gradients(straight, step)
        straight.optimizer.step(0.5 + step / 4)
    file = io.BytesIO()
    torch.save([straight.network.state_dict(), straight.optimizer.state_dict()], file)
    file.seek(0)
    network, state = torch.load(file, weights_only=True)
    resumed.network.load_state_dict(network)
    resumed.optimizer.load_state_dict(state)
    start = weights(straight)
    for step in range(3, 6):
        for built in (straight, resumed):
            gradients(built, step)
            built.optimizer.step(1.0)
        assert same(weights(straight), weights(resumed)), step
    assert all(not torch.equal(start[k], v) for k, v in weights(straight).items())


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_of_a_step_ago_takes_the_step_again(name: str) -> None:
    """The live optimizer itself goes back, with the stacks that it already has."""
    built = build(run(name), CPU)
    gradients(built, 0)
    built.optimizer.step(1.0)
    file = io.BytesIO()
    torch.save([built.network.state_dict(), built.optimizer.state_dict()], file)
    after: list[dict[str, Tensor]] = []
    for _ in range(2):
        file.seek(0)
        network, state = torch.load(file, weights_only=True)
        built.network.load_state_dict(network)
        built.optimizer.load_state_dict(state)
        gradients(built, 1)
        built.optimizer.step(1.0)
        after.append(weights(built))
    assert same(*after)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_forgets_the_gradients(name: str) -> None:
    built = build(run(name), CPU)
    gradients(built, 0)
    built.optimizer.step(1.0)
    assert all(p.grad is None for p in built.network.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_of_zero_without_weight_decay_leaves_the_weights(name: str) -> None:
    built = build(run(name), CPU)
    before = weights(built)
    gradients(built, 0, scale=0.0)
    built.optimizer.step(1.0)
    assert left_alone(name, before, weights(built))


@pytest.mark.parametrize("name", NAMES)
def test_a_factor_of_zero_leaves_the_weights(name: str) -> None:
    built = build(run(name, decay(name)), CPU)
    before = weights(built)
    gradients(built, 0)
    built.optimizer.step(0.0)
    assert left_alone(name, before, weights(built))


ENTRYWISE = [part for part in PARTS if part.steps_shards]


def test_the_optimizers_that_update_every_entry_by_itself() -> None:
    assert {part.name for part in ENTRYWISE} >= {"adamw", "adopt", "lion", "sgd", "sophia"}
    muon = next(part for part in PARTS if part.name == "muon")
    assert not muon.steps_shards
    adamw = next(part for part in ENTRYWISE if isinstance(part, ComposableOptimizer))
    assert not replace(adamw, roles=("hidden",), rest={"kind": "sgd"}, hyperball=True, weight_decay=0.0).steps_shards


@pytest.mark.parametrize("part", ENTRYWISE, ids=lambda part: part.name)
@pytest.mark.parametrize("shape", [(13, 7), (64, 40), (5,)])
def test_rows_take_the_same_step_without_the_others(part: Optimizer, shape: tuple[int, ...]) -> None:
    """As the ranks of a sharded run step the rows that they hold, down to a rank that holds none."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.nn.Parameter(torch.randn(shape, generator=generator))
    n = -(-shape[0] // 3)
    rows = [torch.nn.Parameter(whole.detach()[start : start + n].clone()) for start in (0, n, 2 * n, 3 * n)]
    optimizers = [part.build([group(part, p, lr=0.01, weight_decay=0.1)]) for p in (whole, *rows)]
    start = whole.detach().clone()
    for _ in range(5):
        grad = torch.randn(shape, generator=generator)
        for p, of_rows in zip((whole, *rows), (grad, *grad.split(n), grad[3 * n :]), strict=True):
            p.grad = of_rows.clone()
        for optimizer in optimizers:
            if part.curvature_every is not None:
                optimizer.observe()  # pyright: ignore
            optimizer.step()
    assert torch.equal(torch.cat([p.detach() for p in rows]), whole.detach())
    assert (whole != start).all()


def test_the_first_step_of_adopt_and_of_soap_leaves_the_weights() -> None:
    """As in their authors' code, whose first step sets second moments and is done."""
    skipping = [part for part in PARTS if isinstance(part, ComposableOptimizer) and part.skips_first_step]
    assert {part.name for part in skipping} == {"adopt", "soap", "soap_published"}
    for part in skipping:
        p = torch.nn.Parameter(torch.randn(24, 6, generator=torch.Generator().manual_seed(0)))
        before = p.detach().clone()
        p.grad = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
        optimizer = part.build([group(part, p, lr=0.125, weight_decay=0.25)])
        optimizer.step()
        assert torch.equal(p.detach(), before)
        optimizer.step()
        assert (p.detach() - before).norm() > 0.01 * before.norm()


@every_part
def test_weight_decay_is_coupled_to_the_lr_alone(part: Optimizer) -> None:
    """With a gradient of zero every step subtracts lr * weight_decay * W, whatever the shape factor and the momentum.

    Where decay is normalised together with the gradient, what is left without a gradient is a multiple of W. A first
    step that only takes in a gradient leaves the weights.
    """
    if renormalizes(part):
        pytest.skip("fixes the norm of its weights")
    p = torch.nn.Parameter(torch.randn(24, 6, generator=torch.Generator().manual_seed(0)))
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    optimizer = part.build([group(part, p, lr=0.125, weight_decay=0.25)])
    decays = DECAYS - (isinstance(part, ComposableOptimizer) and part.skips_first_step)
    for _ in range(DECAYS):
        optimizer.step()
    kept = (1 - 0.125 * 0.25) ** decays
    if part.decay_law(dims(p)) != part.update_law(dims(p)):
        kept = (p.detach().norm() / before.norm()).item()
        assert 0 < kept < 1
    torch.testing.assert_close(p.detach(), before * kept, rtol=TOLERANCE["decay"], atol=0)


@every_part
@pytest.mark.parametrize("aspect", ASPECTS, ids=str)
def test_the_measured_exponent_of_the_update_is_that_of_its_law(part: Optimizer, aspect: tuple[int, int]) -> None:
    unit = 2 if part.name == TWICE_AS_WIDE else 1
    shapes = [(n, (n * aspect[0], n * aspect[1])) for n in (unit * width for width in WIDTHS)]
    shapes = [(n, shape) for n, shape in shapes if math.prod(shape) <= unit**2 * LARGEST]
    assert len(shapes) >= 3
    norms = [aligned_update_norm(part, *shape) for _, shape in shapes]
    widths = [math.log(n) for n, _ in shapes]
    measured, predicted = (slope(widths, [math.log(pair[i]) for pair in norms]) for i in (0, 1))
    assert measured == pytest.approx(predicted, abs=TOLERANCE["exponent"])


@every_part
def test_the_law_holds_across_aspect_ratios(part: Optimizer) -> None:
    ratios = [
        measured / predicted
        for measured, predicted in (
            aligned_update_norm(part, 64 * a, 64 * b) for a, b in [*ASPECTS, (8, 1), (1, 8), (2, 2)]
        )
    ]
    assert max(ratios) / min(ratios) < 1 + TOLERANCE["shape"], ratios


@every_part
@pytest.mark.parametrize("scale", [16.0, 1 / 16.0])
def test_the_update_is_homogeneous_in_the_gradient(part: Optimizer, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(48, 32, generator=generator)
    grads = [torch.randn(48, 32, generator=generator) for _ in range(STEPS)]
    once = update(part, start, grads)
    scaled = update(part, start, [scale * g for g in grads], scale)
    expected = once * scale ** float(part.update_law().degree)
    assert once.norm() > 0
    assert (scaled - expected).norm() < TOLERANCE["homogeneity"] * expected.norm()
