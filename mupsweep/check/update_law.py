"""The update law of an optimizer, measured: ||A||_2 = ||G||_2^degree n_out^x n_in^y ||W||^w at LR 1.

On rank-1 gradients, which the scaling rules assume, and on the gradients of a small language model in training. A law
is one only if it holds throughout: rank-1 gradients are repeated or fresh at every step, for a few steps and for many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mupsweep.check import gradients
from mupsweep.check.coordinate_check import use_threads
from mupsweep.check.gradients import Gradients
from mupsweep.check.regression import Exponent, regress
from mupsweep.errors import ConfigError
from mupsweep.optimizers import Optimizer
from mupsweep.optimizers.composed import ComposableOptimizer
from mupsweep.optimizers.foreign import Foreign, Power
from mupsweep.scaling import UpdateLaw
from mupsweep.schema import instantiate
from mupsweep.sweep.config import SweepConfig, Variant
from mupsweep.training.norms import spectral_norm, stable_rank

FACTORS = (1 / 16, 16.0)  # by which gradients and weights are scaled for their exponents
RESOLUTION = 0.05  # half an interval at least: orthogonalised updates have singular values of 0.7 to 1.2
MISFIT = 0.1  # up to which n_out and n_in count as having an exponent each
GRID = 4  # exponents of known optimizers are multiples of 1 / GRID
CHANGE = 1 / GRID  # between intervals; fresh gradients line up less, values by up to 0.26 (Sophia after 50 steps)
SHORT_STEP = 2.0**-10  # where weights are put back onto a sphere, only a short step is straight
DEGREE, N_OUT, N_IN, BOTH, DEPTH, WEIGHT = "degree", "n_out", "n_in", "n_out and n_in", "depth", "weight norm"
NORMS: dict[str, Callable[[Tensor], float]] = {"frobenius": lambda w: w.norm().item(), "spectral": spectral_norm}
FIXED, COUPLED, INDEPENDENT, NO_DECAY, INSIDE = (
    "none: the weights keep their norm",
    "a step subtracts lr * weight_decay * W",
    "a step subtracts weight_decay * W at every lr",
    "none",
    "inside the gradient, normalised together with it",
)
THROUGH_MOMENTUM = (
    "through the momentum, which repeats it: a step subtracts {factor:.3g} * lr * weight_decay * W, so give "
    "{share:.3g} times the optimizer.weight_decay that you mean"
)
DECAY_STEPS = 200  # until a momentum of 0.95 has gathered all but 1e-4 of a constant


class Condition(NamedTuple):
    """Under which a law is measured on rank-1 gradients.

    Attributes:
        fresh: whether every step has a gradient of its own; else all steps repeat one.
        steps: the last of which is measured.
    """

    fresh: bool
    steps: int

    def __str__(self) -> str:
        return f"{'fresh' if self.fresh else 'repeated'} gradients after {self.steps} steps"


SHORT = Condition(fresh=False, steps=gradients.STEPS)  # what laws are declared for
OTHERS = (
    Condition(fresh=True, steps=gradients.STEPS),
    Condition(fresh=False, steps=gradients.MANY_STEPS),
    Condition(fresh=True, steps=gradients.MANY_STEPS),
)


@dataclass(frozen=True)
class Exponents:
    """Measured exponents by name.

    Attributes:
        stable_ranks: the least and the largest of the updates.
        misfit: log of the factor by which the worst update misses a power of n_out times a power of n_in.
    """

    by_name: dict[str, Exponent]
    stable_ranks: tuple[float, float]
    misfit: float


@dataclass(frozen=True)
class Measured:
    """The law of one optimizer.

    Attributes:
        aligned: on rank-1 gradients (orthogonal ones where the law counts on full rank): what is judged and snapped.
        realistic: on the gradients of a model in training.
        under: the exponents on rank-1 gradients by condition, `aligned` among them.
        declared: the exponents of the optimizer's own law, fitted in the same way; empty where it has none.
        snapped: `aligned` as fractions, None where an interval contains no multiple of 1 / GRID.
        weight_norm: which norm of the weight the update carries, if any.
        weight_decay: how it is applied, in words.
    """

    name: str
    aligned: Exponents
    realistic: Exponents
    under: Mapping[Condition, Mapping[str, Exponent]]
    declared: dict[str, float]
    snapped: dict[str, Fraction | None]
    weight_norm: str | None
    weight_decay: str

    @property
    def violations(self) -> list[str]:
        """The exponents that differ from what is declared."""
        return [k for k, v in self.declared.items() if self.aligned.by_name[k].away_from(v) > 0]

    @property
    def changes(self) -> dict[str, tuple[Condition, Condition]]:
        """Exponents that are no constants, with the two conditions under which they are furthest apart."""
        changes = {}
        for name in self.aligned.by_name:
            ends = [(exponents[name].low, exponents[name].high, c) for c, exponents in self.under.items()]
            (_, high, lowest), (low, _, highest) = min(ends, key=lambda e: e[1]), max(ends, key=lambda e: e[0])
            if low - high > CHANGE:
                changes[name] = lowest, highest
        return changes

    @property
    def passed(self) -> bool:
        """Whether there is a law, and it is the declared one."""
        return not self.violations and not self.changes

    @property
    def monomial(self) -> bool:
        """Whether n_out and n_in have an exponent each."""
        return self.aligned.misfit < MISFIT and None not in (self.snapped[N_OUT], self.snapped[N_IN])

    def keys(self) -> dict[str, Any] | None:
        """The law as `optimizer.law` takes it; None where it is no such law, or changes.

        Without an exponent for each axis, that of both is halved: where all matrices keep their aspect ratio, as hidden
        ones do along a ladder, the rule is the same.
        """
        degree, both, weight = (self.snapped[k] for k in (DEGREE, BOTH, WEIGHT))
        n_out, n_in = (self.snapped[k] for k in (N_OUT, N_IN))
        if not self.monomial:
            n_out = n_in = None if both is None else both / 2
        if self.changes or degree is None or n_out is None or n_in is None or weight not in (0, 1):
            return None
        norm = {"weight_norm": self.weight_norm} if weight else {}
        return {"degree": str(degree), "n_out": str(n_out), "n_in": str(n_in), **norm}

    def law(self) -> UpdateLaw | None:
        """The law of `keys`."""
        keys = self.keys()
        if keys is None:
            return None
        degree, n_out, n_in = (Fraction(keys[k]) for k in ("degree", "n_out", "n_in"))
        return UpdateLaw(degree, shape_factor=Power(n_out, n_in), eps_power=None, weight_norm=keys.get("weight_norm"))


def laws(sweep_config: SweepConfig) -> Iterator[tuple[Variant, Optimizer, Measured]]:
    """The law of every optimizer of a config, and the first variant that has it."""
    use_threads(sweep_config)
    real = list(gradients.realistic())
    variants = {variant.label[1]: variant for variant in reversed(sweep_config.variants)}
    for variant in reversed(variants.values()):
        optimizer: Optimizer = instantiate(variant.optimizer, "optimizer")
        declared = not (isinstance(optimizer, Foreign) and optimizer.law is None)
        declared_law = optimizer.measured_law() if declared else UpdateLaw()
        full_rank = declared_law.full_rank and declared_law.weight_norm is not None
        others = {c: list(gradients.aligned(full_rank, c.fresh, c.steps, gradients.FEW_SIDES)) for c in OTHERS}
        yield variant, optimizer, measure(optimizer, list(gradients.aligned(full_rank)), real, declared, others)


def measure(
    optimizer: Optimizer,
    aligned: Sequence[Gradients],
    realistic: Sequence[Gradients],
    declared: bool,
    others: Mapping[Condition, Sequence[Gradients]] | None = None,
) -> Measured:
    """Measure the law of an optimizer on all kinds of gradients, and compare it with its own if `declared`.

    Args:
        others: rank-1 gradients under other conditions than `aligned`.
    """
    declared_law = optimizer.measured_law() if declared else None
    norm = declared_law.weight_norm if declared_law is not None else None
    measured = exponents(optimizer, aligned, norm or "frobenius", declared)
    if declared_law is None and abs(measured.by_name[WEIGHT].value) > RESOLUTION:
        fits = {name: exponents(optimizer, aligned, name, declared) for name in NORMS}
        norm = min(fits, key=lambda name: fits[name].misfit)
        measured = fits[norm]
    predicted: dict[str, float] = {}
    if declared_law is not None:
        shape = _shape([_predicted(optimizer, g, of_shape=True) for g in aligned], aligned)
        exponents_of_shape = {k: e.value for k, e in shape.items()}
        predicted = {DEGREE: float(declared_law.degree), **exponents_of_shape, WEIGHT: float(norm is not None)}
    under = {SHORT: measured.by_name}
    for condition, points in (others or {}).items():
        under[condition] = exponents(optimizer, points, norm or "frobenius", declared).by_name
    return Measured(
        name=optimizer.name,
        aligned=measured,
        under=under,
        realistic=exponents(optimizer, realistic, norm or "frobenius", declared),
        declared=predicted,
        snapped={name: snap(e) for name, e in measured.by_name.items()},
        weight_norm=norm,
        weight_decay=decay_of(optimizer),
    )


def exponents(optimizer: Optimizer, points: Sequence[Gradients], norm: str, declared: bool) -> Exponents:
    """The exponents of an optimizer's updates, `norm` being that of the weight.

    Where a law is declared, the ratio to it is fitted, so that a law that is no monomial, such as
    sqrt(max(1, n_out / n_in)), costs no accuracy.
    """
    updates = [update(optimizer, g) for g in points]
    if not all(A.isfinite().all() and A.any() for A in updates):
        raise ConfigError(f"{optimizer.name}: a gradient gives an update of zero, inf or nan, which has no exponent")
    logs = [_log_norm(A) for A in updates]
    some = [(i, f) for i in range(0, len(points), math.ceil(len(points) / 4)) for f in FACTORS]

    def by_scaling(scaled: Callable[[Gradients, float], Tensor]) -> Exponent:
        ratios = [(_log_norm(scaled(points[i], f)) - logs[i]) / math.log(f) for i, f in some]
        return Exponent(sum(ratios) / len(ratios), min(ratios), max(ratios)).widened(RESOLUTION)

    degree = by_scaling(lambda g, f: update(optimizer, g.scaled(grads=f), thresholds=f))
    weight = by_scaling(lambda g, f: update(optimizer, g.scaled(weights=f)))
    if declared:
        expected = [_predicted(optimizer, g) for g in points]
        shape = _shape([_predicted(optimizer, g, of_shape=True) for g in points], points)
        offsets = {k: e.value for k, e in shape.items()}
    else:
        p, w = (float(e.value if snap(e) is None else snap(e)) for e in (degree, weight))  # type: ignore[arg-type]
        expected = [p * _log_norm(g.grads[-1]) + w * math.log(NORMS[norm](g.weights[-1])) for g in points]
        offsets = {}
    residuals = [y - e for y, e in zip(logs, expected, strict=True)]
    shape = _shape(residuals, points)
    of_shape = {k: e.shifted(offsets.get(k, 0.0)).widened(RESOLUTION) for k, e in shape.items()}
    ranks = [stable_rank(A) for A in updates]
    return Exponents(
        {DEGREE: degree, **of_shape, WEIGHT: weight}, (min(ranks), max(ranks)), _misfit(residuals, shape, points)
    )


def update(optimizer: Optimizer, seen: Gradients, thresholds: float = 1.0) -> Tensor:
    """The last update at LR 1 after the gradients of a matrix, each at its own weights.

    Thresholds such as eps follow gradients that are `thresholds` times as large.
    """
    renormalizes = isinstance(optimizer, ComposableOptimizer) and (optimizer.renormalizes or optimizer.hyperball)
    p, lr = nn.Parameter(seen.weights[0].clone()), SHORT_STEP if renormalizes else 1.0
    torch_optimizer = optimizer.build([_group(optimizer, p, lr, scale=thresholds)])
    before = p.detach().clone()
    for weights, grad in zip(seen.weights, seen.grads, strict=True):
        if not renormalizes:
            p.detach().copy_(weights)
        before.copy_(p.detach())
        p.grad = grad.clone()
        _step(optimizer, torch_optimizer)
    return (before - p.detach()) / lr


def snap(exponent: Exponent) -> Fraction | None:
    """The nearest multiple of 1 / GRID if the interval contains it."""
    nearest = Fraction(round(exponent.value * GRID), GRID)
    return nearest if exponent.away_from(float(nearest)) == 0 else None


def decay_of(optimizer: Optimizer) -> str:
    """What weight decay does, seen at gradients of zero in the second step, since some skip the first."""
    if isinstance(optimizer, ComposableOptimizer) and (optimizer.renormalizes or optimizer.hyperball):
        return FIXED
    lr, weight_decay = 0.25, 0.5
    before, after = _decayed(optimizer, lr, weight_decay, steps=2)
    for expected, description in ((0.0, NO_DECAY), (lr * weight_decay, COUPLED), (weight_decay, INDEPENDENT)):
        if torch.allclose(after, before * (1 - expected), rtol=1e-4):
            return description
    factors = []
    for coefficient in (weight_decay, weight_decay / 2):
        before, after = _decayed(optimizer, lr, coefficient, DECAY_STEPS)
        factor = float((before - after).norm() / (lr * coefficient * before.norm()))
        if not torch.allclose(after, before * (1 - factor * lr * coefficient), rtol=1e-3, atol=1e-5):
            return INSIDE
        factors.append(factor)
    # proportional to the coefficient: added up, not normalised
    if not math.isclose(*factors, rel_tol=1e-3):
        return INSIDE
    return THROUGH_MOMENTUM.format(factor=factors[0], share=1 / factors[0])


def _decayed(optimizer: Optimizer, lr: float, weight_decay: float, steps: int) -> tuple[Tensor, Tensor]:
    """A matrix before and after the last of `steps` steps with gradients of zero, all from the one matrix."""
    before = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    p = nn.Parameter(before.clone())
    torch_optimizer = optimizer.build([_group(optimizer, p, lr, weight_decay)])
    for _ in range(steps):
        p.detach().copy_(before)
        p.grad = torch.zeros_like(p)
        _step(optimizer, torch_optimizer)
    return before, p.detach()


def _group(optimizer: Optimizer, p: Tensor, lr: float, weight_decay: float = 0.0, scale: float = 1.0) -> dict[str, Any]:
    n_out, n_in = p.shape
    thresholds = {
        name: threshold.value * scale ** ((threshold.law.eps_power or 0) * threshold.law.eps_degree)
        for name, threshold in optimizer.thresholds((n_out, n_in)).items()
    }
    return {"params": [p], "lr": lr, "weight_decay": weight_decay, **thresholds}


def _step(optimizer: Optimizer, torch_optimizer: torch.optim.Optimizer) -> None:
    if optimizer.curvature_every is not None:
        torch_optimizer.observe()  # type: ignore[attr-defined]
    try:
        torch_optimizer.step()
    except Exception as error:
        if not isinstance(optimizer, Foreign):
            raise
        reason = " ".join(str(error).split())
        raise ConfigError(f"{optimizer.path} cannot step a matrix: {type(error).__name__}: {reason}") from error


def _predicted(optimizer: Optimizer, seen: Gradients, of_shape: bool = False) -> float:
    """log ||A||_2 by the declared law, or the part of it that is a function of the shape."""
    law, dims = optimizer.measured_law(seen.dims), seen.dims
    shape = float(law.blocks(*dims)) ** float((1 - law.degree) / 2) * float(law.shape_factor(*dims))
    if of_shape:
        return math.log(shape)
    weight = 1.0 if law.weight_norm is None else NORMS[law.weight_norm](seen.weights[-1])
    return float(law.degree) * _log_norm(seen.grads[-1]) + math.log(shape * weight)


def _shape(logs: Sequence[float], points: Sequence[Gradients]) -> dict[str, Exponent]:
    """Exponents in n_out, n_in, both together at a fixed aspect ratio, and in the depth where it varies."""
    n_out, n_in = ([math.log(g.dims[i]) for g in points] for i in (0, 1))
    depth = [math.log(g.depth) for g in points]
    deep = [depth] if len(set(depth)) > 1 else []
    apart = regress([n_out, n_in, *deep], logs)
    middle = [(a + b) / 2 for a, b in zip(n_out, n_in, strict=True)]
    together = regress([middle, *deep], logs, [g.group for g in points])
    return {N_OUT: apart[0], N_IN: apart[1], BOTH: together[0]} | ({DEPTH: together[1]} if deep else {})


def _misfit(logs: Sequence[float], shape: dict[str, Exponent], points: Sequence[Gradients]) -> float:
    residuals = []
    for y, g in zip(logs, points, strict=True):
        n_out, n_in = map(math.log, g.dims)
        residuals.append(y - shape[N_OUT].value * n_out - shape[N_IN].value * n_in)
    middle = sum(residuals) / len(residuals)
    return max(abs(y - middle) for y in residuals)


def _log_norm(matrix: Tensor) -> float:
    return math.log(spectral_norm(matrix))
