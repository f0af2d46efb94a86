"""The weights, gradients and LRs that an optimizer and its closed form both walk through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mupsweep.optimizers import Optimizer

SHAPES = ((32, 32), (64, 16), (32, 32), (16, 48), (64, 16), (32, 32))  # stacks of three, two and one
STEPS = 20
PEAK_LR = 0.02
REST: dict[str, Any] = {"name": "adamw", "kind": "mupsweep.optimizers.adamw.AdamW"}


class Moment(NamedTuple):
    """What a closed form knows of a step (from 1), in float64; `curvature` is what there is to observe at it."""

    step: int
    lr: float
    grad: Tensor
    curvature: Tensor


def start(index: int) -> Tensor:
    """The weight of that index before the first step."""
    return 0.1 * torch.randn(SHAPES[index], generator=torch.Generator().manual_seed(index))


def gradient(index: int, step: int, seed: int = 0) -> Tensor:
    """Its gradient at a step, of sizes that vary hundredfold."""
    generator = torch.Generator().manual_seed(1_000_000 * seed + 1000 * step + index)
    return torch.randn(SHAPES[index], generator=generator) * 10.0 ** (step % 3 - 2)


def lr(step: int) -> float:
    """It rises and falls."""
    return PEAK_LR * (1 - abs(step - 7) / 20)


def moments(index: int) -> Iterator[Moment]:
    """Every step of the weight of that index."""
    for step in range(1, STEPS + 1):
        yield Moment(step, lr(step), gradient(index, step).double(), gradient(index, step, seed=1).double())


def parameters() -> list[Tensor]:
    """All weights before the first step."""
    return [torch.nn.Parameter(start(i)) for i in range(len(SHAPES))]


def walk(
    optimizer: Any,
    weights: list[Tensor],
    observes: Callable[[int], bool] = lambda step: False,
    steps: Iterable[int] = range(1, STEPS + 1),
) -> None:
    """Steps of a torch optimizer over `weights`, curvature first where it observes."""
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = lr(step)
        for seed in (1, 0) if observes(step) else (0,):
            for i, p in enumerate(weights):
                p.grad = gradient(i, step, seed).to(p.dtype)
            optimizer.observe() if seed else optimizer.step()


def walked(optimizer: Optimizer, weight_decay: float = 0.0) -> list[Tensor]:
    """All weights after the last step, stepped in one group at the base shape."""
    weights, every = parameters(), optimizer.curvature_every
    thresholds = {name: threshold.value for name, threshold in optimizer.thresholds().items()}
    group = {"params": weights, "lr": PEAK_LR, "weight_decay": weight_decay, **thresholds}
    walk(optimizer.build([group]), weights, lambda step: every is not None and (step - 1) % every == 0)
    return [p.detach() for p in weights]


def largest_error(got: list[Tensor], closed_form: Callable[[Tensor, Iterator[Moment]], Tensor]) -> float:
    """The largest distance from the closed form's weights, relative to how far those walked."""
    errors = []
    for i, w in enumerate(got):
        before = start(i).double()
        exact = closed_form(before, moments(i))
        assert (exact - before).norm() > 0.01 * before.norm()
        errors.append(((w.double() - exact).norm() / (exact - before).norm()).item())
    return max(errors)
