"""The rules of one run, tensor by tensor: init, multiplier, LR, weight decay and eps, and their audit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from mupsweep.errors import ConfigError
from mupsweep.models import Multipliers
from mupsweep.models.shape import Size
from mupsweep.scaling import WEIGHT_DECAY_RULES, Init, Role, Rule, TensorSpec, UpdateLaw, numeric, symbolic
from mupsweep.sweep.run_spec import ResolvedVariant, RunSpec, ScaledOptimizer


@dataclass(frozen=True)
class TensorRule:
    """One tensor as it is trained: absolute numbers, and each ratio to the base shape.

    Attributes:
        lr: peak LR; weight_decay: coupled, a step subtracts lr * weight_decay * W.
        decay_per_step: lr * weight_decay at the peak.
        multiplier: forward constant on the tensor's branch, or on the logits.
        thresholds: what else is compared with gradients, such as Sophia's rho, by name.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    optimizer: str
    init: Init
    init_std: float
    multiplier: float
    lr: float
    weight_decay: float
    decay_per_step: float
    eps: float
    thresholds: dict[str, float]
    init_var_ratio: float
    multiplier_ratio: float
    lr_ratio: float
    weight_decay_ratio: float
    eps_ratio: float
    tied_to: str | None


class TensorScaling(NamedTuple):
    """The optimizer of a tensor, its rule in ratios to the base shape, and its thresholds in absolute numbers."""

    scaled: ScaledOptimizer
    rule: Rule
    thresholds: Mapping[str, float]


def rules(resolved: ResolvedVariant, size: Size, base_lr: float) -> tuple[TensorRule, ...]:
    """The rule of every tensor at `size`, in the order of the forward pass.

    Raises:
        ConfigError: a role that its shape contradicts, or a tie whose two rules disagree, naming the tensor.
    """
    base = {t.name: t for t in resolved.model.tensors(resolved.size(1.0, 1.0))}
    target = list(resolved.model.tensors(size))
    _check_roles(resolved)
    by_name = {}
    for spec in target:
        # blocks beyond the base depth repeat the shapes of the base's first block
        small = base.get(spec.name) or base[_first_block(spec.name)]
        by_name[spec.name] = scale_tensor(resolved, size.width_ratio, size.depth_ratio, spec, small)
    for spec in target:
        if spec.tied_to is not None:
            _check_tie(resolved, spec, by_name[spec.name], by_name[spec.tied_to])
    forward = multipliers(resolved, size)
    return tuple(tensor_rule(spec, by_name[spec.name], resolved, forward, base_lr) for spec in target)


def multipliers(resolved: ResolvedVariant, size: Size) -> Multipliers:
    """The forward constants at `size`."""
    claims = resolved.parametrization.claims()

    def ratio(role: Role) -> float:
        return claims[role].multiplier.at(size.width_ratio, size.depth_ratio)

    power = float(resolved.parametrization.attention_power)
    return resolved.model.multipliers(size, ratio(Role.HIDDEN), ratio(Role.OUTPUT), power)


def clip_norm(resolved: ResolvedVariant) -> float | None:
    """The norm that gradients are clipped to; None where an optimizer's rule depends on the gradient's size.

    The gradient's norm itself changes with width and depth, so a constant norm would clip sizes differently and break
    the rule of every optimizer whose update is not normalised: any degree other than 0.
    """
    normalised = all(optimizer.update_law().degree == 0 for optimizer, _ in resolved.optimizers)
    return resolved.training.clip if normalised else None


def audit(resolved: ResolvedVariant) -> list[str]:
    """What a reader of the rules should know before training; contradictions are raised by `resolve` and `rules`."""
    notes = []
    for optimizer, _ in resolved.optimizers:
        law = optimizer.update_law()
        if law.degree != 0 and resolved.training.clip is not None:
            notes.append(
                f"gradient clipping is off: the update of {optimizer.name} has degree {law.degree} in the gradient, "
                "and clipping by one norm at every size would break its scaling rule"
            )
        if optimizer.scales_start:
            notes.append(
                f"{optimizer.name} gives its weights a norm of its own at the start: their init std has no effect"
            )
        published, strict = (
            symbolic(resolved.parametrization, of, Role.HIDDEN).lr for of in (law, optimizer.measured_law())
        )
        if published != strict:
            notes.append(
                f"the LR of {optimizer.name} follows the published rule, for hidden matrices {published}, "
                f"but the law of its updates asks for {strict}"
            )
    training = resolved.training
    if training.base_batch_size is not None:
        notes.append(
            f"batch rule sde is on: LRs, betas and eps are those of batch {training.base_batch_size} carried to "
            f"{training.batch_size} (Complete(d)P, 2512.22382)"
        )
    if training.base_tokens is not None:
        notes.append(
            f"horizon rule is on: LRs are multiplied by (tokens / {training.base_tokens})^{training.horizon_exponent:g}"
        )
    if resolved.training.schedule == "constant" and resolved.training.min_lr_frac != 1:
        notes.append("training.min_lr_frac has no effect: the schedule is constant")
    if resolved.model.attention_scale != "parametrization":
        notes.append(f"attention scale {resolved.model.attention_scale} is forced by model.attention_scale")
    return notes


def scale_tensor(
    resolved: ResolvedVariant, width_ratio: float, depth_ratio: float, spec: TensorSpec, base: TensorSpec
) -> TensorScaling:
    """Everything that one tensor is trained with, relative to the tensor `base` of the base shape."""
    scaled = resolved.optimizer_for(spec.role)
    optimizer = scaled.optimizer
    by_its_norm = optimizer.divides_by_weight or optimizer.update_law(spec.dims).weight_norm is not None
    if by_its_norm and spec.role.is_matrix and (spec.init is Init.ZEROS or spec.init_std == 0):
        raise ConfigError(
            f"{spec.name} starts at zero, and {optimizer.name} moves a weight in proportion to its norm: it would "
            "never leave zero; give it an init std above 0"
        )

    def ratios(law: Callable[[tuple[int, int]], UpdateLaw]) -> Rule:
        laws = law(spec.dims), law(base.dims)
        if laws[0].degree != laws[1].degree:
            raise ConfigError(
                f"{spec.name}: {optimizer.name} treats {spec.dims} otherwise than the base's {base.dims}, as one of "
                "them has an axis beyond optimizer.max_axis, so no rule leads from one to the other; raise max_axis"
            )
        return numeric(resolved.parametrization, laws[0], spec, base, width_ratio, depth_ratio, base_law=laws[1])

    rule, decay = ratios(optimizer.update_law), ratios(optimizer.decay_law)
    values = {name: threshold.value for name, threshold in optimizer.thresholds(spec.dims).items()}
    scales = {name: ratios(lambda dims, name=name: optimizer.thresholds(dims)[name].law).eps for name in values}
    thresholds = {name: value * scales[name] for name, value in values.items()}
    return TensorScaling(scaled, replace(rule, weight_decay=decay.weight_decay, eps=scales["eps"]), thresholds)


def tensor_rule(
    spec: TensorSpec, scaling: TensorScaling, resolved: ResolvedVariant, forward: Multipliers, base_lr: float
) -> TensorRule:
    multiplier = {Role.OUTPUT: forward.output, Role.HIDDEN: forward.block, Role.HIDDEN_VECTOR: forward.block}
    (optimizer, lr_ratio), rule, thresholds = scaling.scaled, scaling.rule, dict(scaling.thresholds)
    lr = base_lr * lr_ratio * rule.lr
    decay_rule = WEIGHT_DECAY_RULES[resolved.parametrization.weight_decay_rule]
    decay = decay_rule.coefficient(optimizer.weight_decay, base_lr * lr_ratio, resolved.steps) if spec.decay else 0.0
    return TensorRule(
        name=spec.name,
        role=spec.role,
        shape=spec.shape,
        optimizer=optimizer.name,
        init=spec.init,
        init_std=spec.init_std * rule.init_std,
        multiplier=multiplier.get(spec.role, 1.0),
        lr=lr,
        weight_decay=decay * rule.weight_decay,
        decay_per_step=lr * decay * rule.weight_decay,
        eps=thresholds.pop("eps"),
        thresholds=thresholds,
        init_var_ratio=rule.init_std**2,
        multiplier_ratio=rule.multiplier,
        lr_ratio=rule.lr,
        weight_decay_ratio=rule.weight_decay,
        eps_ratio=rule.eps,
        tied_to=spec.tied_to,
    )


def _first_block(name: str) -> str:
    head, _, tail = name.split(".", 2)
    return f"{head}.0.{tail}"


def _check_roles(resolved: ResolvedVariant) -> None:
    """A dimension grows with the width exactly where the role says so."""
    sizes = [resolved.size(1.0, 1.0), resolved.size(2.0, 1.0)]
    for small, big in zip(*(resolved.model.tensors(s) for s in sizes), strict=True):
        grew = tuple(b > s for s, b in zip(small.acting_dims, big.acting_dims, strict=True))
        if grew != (small.role.grows if small.role.is_matrix else (True, False)):
            raise ConfigError(
                f"{small.name} is declared {small.role.value}, but its (n_out, n_in) goes from {small.acting_dims} to "
                f"{big.acting_dims} when the width doubles: mend its role in the model"
            )


def _check_tie(resolved: ResolvedVariant, spec: TensorSpec, mine: TensorScaling, other: TensorScaling) -> None:
    for key in ("init_std", "lr", "weight_decay", "eps"):
        a, b = getattr(mine.rule, key), getattr(other.rule, key)
        if not math.isclose(a, b, rel_tol=1e-9):
            raise ConfigError(
                f"model.tied=true: {spec.tied_to} and {spec.name} share storage, but "
                f"{resolved.parametrization.name} with {resolved.optimizer.name} wants {key} x{b:g} for the one "
                f"and x{a:g} for the other; "
                "use model.tied=false, or parametrization.output=multiplier if it is init"
            )


def rule_record(row: TensorRule) -> dict[str, Any]:
    """A rule as `rules --json` and recipes hold it."""
    return {k: (v.value if isinstance(v, Role | Init) else v) for k, v in asdict(row).items()}


def role_records(run: RunSpec) -> dict[str, dict[str, Any]]:
    """What the tensors of every role are trained with, as a run's config holds it; a list where shapes differ in it."""
    found: dict[str, dict[str, set[Any]]] = {}
    for row in rules(run.resolved, run.size, run.base_lr):
        of_role = found.setdefault(row.role.value, {})
        for key in ("optimizer", "init_std", "multiplier", "lr", "weight_decay", "eps"):
            of_role.setdefault(key, set()).add(getattr(row, key))
    return {
        role: {key: values.pop() if len(values) == 1 else sorted(values) for key, values in numbers.items()}
        for role, numbers in found.items()
    }
