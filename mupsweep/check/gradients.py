"""What update laws are measured on: rank-1 gradients, repeated or fresh, and those of a language model in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product

import torch
from torch import Tensor

from mupsweep.check.coordinate_check import runs_of, subject
from mupsweep.sweep import config
from mupsweep.sweep.run_spec import RunSpec

SIDES = (32, 64, 128, 256)  # n_out and n_in of rank-1 gradients, every pair
STEPS = 3  # with rank-1 gradients: some optimizers treat the first one differently
MANY_STEPS = 50  # until averages with betas of 0.95 are full
FEW_SIDES = (32, 64, 128)  # where steps are many: a Newton-Schulz iteration costs the cube of a side
MODEL = ("experiment=check", "optimizer=adamw", "parametrization=spectral", "sweep.seeds=[0]", "sweep.log2_lrs=[-9]")
LADDERS = (("sweep.depth_ratios=[1]",), ("sweep.width_ratios=[1]", "sweep.depth_ratios=[2,4,8]"))
TRAINED = 5  # steps of the model
MATRICES = ("attention.value", "mlp.up", "mlp.down")  # square, tall, flat; of the middle block


@dataclass(frozen=True)
class Gradients:
    """What one matrix saw, step by step.

    Attributes:
        weights, grads: (n_out, n_in) each.
        group: matrices of the same kind; within one, n_out and n_in grow together.
        depth: of the model that it is part of.
    """

    weights: Sequence[Tensor]
    grads: Sequence[Tensor]
    group: object
    depth: int = 1

    @property
    def dims(self) -> tuple[int, int]:
        n_out, n_in = self.grads[0].shape
        return n_out, n_in

    def scaled(self, grads: float = 1.0, weights: float = 1.0) -> Gradients:
        """The same with other sizes."""
        return replace(self, grads=[grads * g for g in self.grads], weights=[weights * w for w in self.weights])


def aligned(
    full_rank: bool = False, fresh: bool = False, steps: int = STEPS, sides: Sequence[int] = SIDES
) -> Iterator[Gradients]:
    """Gradients u v^T with dense u and v, or orthogonal ones, smaller for larger shapes; Gaussian weights.

    Args:
        fresh: whether every step has a gradient of its own, which no average of the steps before contains; else all
            steps repeat one.
    """
    for n_out, n_in in product(sides, sides):
        generator = torch.Generator().manual_seed(n_out * SIDES[-1] + n_in)
        drawn = [_direction(n_out, n_in, full_rank, generator) * (n_out * n_in) ** -0.4]
        weights = torch.randn(n_out, n_in, generator=generator) * max(n_out, n_in) ** -0.5
        for _ in range(steps - 1):
            again = _direction(n_out, n_in, full_rank, generator) * (n_out * n_in) ** -0.4 if fresh else drawn[0]
            drawn.append(again)
        yield Gradients([weights] * steps, drawn, group=Fraction(n_out, n_in))


def _direction(n_out: int, n_in: int, full_rank: bool, generator: torch.Generator) -> Tensor:
    """A random matrix (n_out, n_in) of spectral norm 1: of rank 1, or with all singular values 1."""
    if full_rank:
        tall = torch.randn(max(n_out, n_in), min(n_out, n_in), generator=generator)
        Q = torch.linalg.qr(tall).Q
        return Q if n_out >= n_in else Q.mT
    u, v = (torch.randn(n, generator=generator) for n in (n_out, n_in))
    return torch.outer(u / u.norm(), v / v.norm())


def realistic() -> Iterator[Gradients]:
    """Those of hidden matrices along a NanoGPT's widths and depths, in its first steps under AdamW."""
    for ladder in LADDERS:
        sweep_config = config.load([*MODEL, *ladder])
        for run in runs_of(sweep_config.variants[0], sweep_config.sweep):
            yield from _watched(run)


def _watched(run: RunSpec) -> list[Gradients]:
    probe = subject(run)
    parameters = dict(probe.network.named_parameters())
    middle = [f"blocks.{run.size.depth // 2}.{name}.weight" for name in MATRICES]
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in middle}

    def watch(name: str) -> None:
        def keep(p: Tensor) -> None:
            assert p.grad is not None
            seen[name].append((p.detach().clone(), p.grad.clone()))

        parameters[name].register_post_accumulate_grad_hook(keep)

    for name in middle:
        watch(name)
    for _ in range(TRAINED):
        probe.step()
    return [
        Gradients([w for w, _ in steps], [g for _, g in steps], group=kind, depth=run.size.depth)
        for kind, steps in zip(MATRICES, seen.values(), strict=True)
    ]
