"""The rules of one run, tensor by tensor: init, multiplier, LR, weight decay and eps, and their audit."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from mupsweep.errors import ConfigError
from mupsweep.models import Multipliers
from mupsweep.models.inference import forms_of
from mupsweep.models.shape import Size
from mupsweep.optimizers import Optimizer
from mupsweep.optimizers.optimizer import Dims
from mupsweep.scaling import WEIGHT_DECAY_RULES, Fold, Init, Role, Rule, TensorSpec, UpdateLaw, numeric, symbolic
from mupsweep.scaling.group_lr import factor_of, without_ones
from mupsweep.scaling.parametrizations.parametrization import forced_law
from mupsweep.scaling.solve import folded_constant
from mupsweep.sweep.run_spec import ResolvedVariant, RunSpec, ScaledOptimizer

BUILD_IT_IN = "have the model take it, as an argument of build (configs/model/README.md)"
LawOfShape = Callable[[Dims | None], UpdateLaw]  # an optimizer's law for a tensor of (n_out, n_in), or in general


@dataclass(frozen=True)
class TensorRule:
    """The numbers that one tensor is trained with, and the ratio of each to its value at the base shape.

    Attributes:
        multiplier: forward constant on the tensor's branch, or on the logits.
        lr: peak LR.
        weight_decay: coupled coefficient: a step subtracts lr * weight_decay * W.
        decay_per_step: lr * weight_decay at the peak.
        thresholds: name -> value of every hyperparameter beside eps that is compared with gradients, as Sophia's rho.
        tied_to: the name of the tensor whose storage this one shares, or None.
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
    """How one tensor is scaled from the base shape.

    Attributes:
        scaled: the optimizer that steps the tensor.
        rule: ratio of every number to its value at the base shape.
        thresholds: name -> ratio of every hyperparameter beside eps that is compared with gradients.
    """

    scaled: ScaledOptimizer
    rule: Rule
    thresholds: Mapping[str, Any]

    def times(self, factor: float) -> TensorScaling:
        """The scaling with another LR: the optimizer's base LR for this tensor, times a factor."""
        return self._replace(scaled=self.scaled._replace(lr_ratio=self.scaled.lr_ratio * factor))

    def absolute_thresholds(self, dims: Dims) -> dict[str, float]:
        """The value of every hyperparameter that is compared with gradients, eps included, for a tensor of `dims`."""
        scales = {"eps": self.rule.eps, **self.thresholds}
        return {name: base.value * scales[name] for name, base in self.scaled.optimizer.thresholds(dims).items()}

    def differing_key(self, other: TensorScaling) -> str | None:
        """The first number of the rule in which two tensors differ that may share their storage; None if in none."""
        keys = ("init_std", "lr", "weight_decay", "eps")
        return next(
            (key for key in keys if not math.isclose(getattr(self.rule, key), getattr(other.rule, key), rel_tol=1e-9)),
            None,
        )


def rules(resolved: ResolvedVariant, size: Size, base_lr: float) -> tuple[TensorRule, ...]:
    """The rule of every tensor at `size`, in the order of the forward pass.

    Raises:
        ConfigError: a role that its shape contradicts, or a tie whose two rules disagree, naming the tensor.
    """
    resolved = resolved.at(size)
    if not resolved.model.inferred:
        _check_roles(resolved)
    base = {spec.name: spec for spec in resolved.model.tensors(resolved.size(1.0, 1.0))}
    target = list(resolved.model.tensors(size))
    first_alike: dict[str, TensorSpec] = {}  # a name with one number as # -> the first tensor of the base like it
    if any(spec.name not in base for spec in target):
        for spec in base.values():
            for form in forms_of(spec.name):
                first_alike.setdefault(form.alike, spec)
    scalings: dict[str, TensorScaling] = {}
    alike: dict[tuple[TensorSpec, TensorSpec], TensorScaling] = {}  # the tensors of one kind of all blocks
    for spec in target:
        # blocks beyond the base depth have the shapes of the base's first block
        base_spec = base.get(spec.name) or next(
            first_alike[form.alike] for form in forms_of(spec.name) if form.alike in first_alike
        )
        kind = replace(spec, name=""), replace(base_spec, name="")
        if kind not in alike:
            alike[kind] = scale_tensor(resolved, size.width_ratio, size.depth_ratio, spec, base_spec)
        scalings[spec.name] = alike[kind]
    for spec in target:
        if spec.tied_to is not None:
            _check_tie(resolved, spec, scalings[spec.name], scalings[spec.tied_to])
    if factors := resolved.optimizer.group_lr:
        by_name = {spec.name: factor_of(factors, spec) for spec in target}
        scalings = {name: scaling.times(by_name[name]) for name, scaling in scalings.items()}
        for spec in target:
            if spec.tied_to is not None and by_name[spec.name] != by_name[spec.tied_to]:
                raise ConfigError(
                    f"optimizer.group_lr: {spec.tied_to} and {spec.name} share storage, but their factors are "
                    f"{by_name[spec.tied_to]:g} and {by_name[spec.name]:g}; give both one factor, or model.tied=false"
                )
    forward = multipliers(resolved, size)
    return tuple(tensor_rule(spec, scalings[spec.name], resolved, forward, base_lr) for spec in target)


def symbolic_rules(resolved: ResolvedVariant) -> dict[Role, TensorScaling]:
    """The rule of every role, and the scale of every threshold beside eps, as monomials in (r_n, r_L).

    Of routers only where the model has some.
    """
    scalings: dict[Role, TensorScaling] = {}
    folds: dict[Role, set[Fold | None]] = defaultdict(set)
    for spec in resolved.model.tensors(resolved.size(1.0, 1.0)):
        folds[spec.role].add(spec.fold)
    for role in Role:
        if role is Role.ROUTER and not folds[role]:
            continue
        fold = next(iter(folds[role])) if len(folds[role]) == 1 else None  # else tensors of the role differ

        def solve(law: LawOfShape, role: Role = role, fold: Fold | None = fold) -> Rule:
            return symbolic(resolved.parametrization, law(None), role, fold)

        scaled = resolved.optimizer_for(role)
        scalings[role] = TensorScaling(scaled, *_optimizer_rule(resolved, scaled.optimizer, solve))
    return scalings


def multipliers(resolved: ResolvedVariant, size: Size) -> Multipliers:
    """The forward constants at `size`."""
    claims = resolved.parametrization.role_scalings()
    block, output = (
        claims[role].multiplier.at(size.width_ratio, size.depth_ratio) for role in (Role.HIDDEN, Role.OUTPUT)
    )
    return resolved.model.multipliers(size, block, output, float(resolved.parametrization.attention_power))


def clip_norm(resolved: ResolvedVariant) -> float | None:
    """The norm that gradients are clipped to; None where an optimizer's rule depends on the gradient's size.

    The gradient's norm itself changes with width and depth, so a constant norm would clip sizes differently and break
    the rule of every optimizer whose update is not normalised (`UpdateLaw.degree` other than 0).
    """
    normalised = all(optimizer.update_law().degree == 0 for optimizer, _ in resolved.optimizers)
    return resolved.training.clip if normalised else None


def audit(resolved: ResolvedVariant) -> list[str]:
    """Notes on the rules of a variant that a user should read before training.

    Contradictions are errors of `resolve` and `rules` instead.
    """
    notes = []
    for optimizer, _ in resolved.optimizers:
        law = optimizer.update_law()
        if law.degree != 0 and resolved.training.clip is not None:
            notes.append(
                f"gradient clipping is off: the update of {optimizer.name} has degree {law.degree} in the gradient, "
                "and clipping by one norm at every size would break its scaling rule"
            )
        if optimizer.rescales_init:
            notes.append(
                f"{optimizer.name} gives its weights a norm of its own at the start: their init std has no effect"
            )
        notes += optimizer.caveats(resolved.size(1.0, 1.0).width)
        if wrong := wrong_rule(resolved, optimizer):
            notes.append(wrong)
        published = symbolic(resolved.parametrization, law, Role.HIDDEN).lr
        strict = symbolic(resolved.parametrization, optimizer.measured_law(), Role.HIDDEN).lr
        if published != strict:
            notes.append(
                f"the LR of {optimizer.name} follows the published rule, for hidden matrices {published}, "
                f"but the law of its updates asks for {strict}"
            )
    hidden = symbolic_rules(resolved)[Role.HIDDEN]
    if resolved.parametrization.weight_decay_rule == "sqrt_width" and hidden.rule.lr.width != -1:
        notes.append(
            "weight_decay_rule=sqrt_width was observed where AdamW's LR of hidden matrices falls as 1 / r_n "
            f"(2510.15262), and that of {hidden.scaled.optimizer.name} goes as {hidden.rule.lr}: "
            "coupled_constant and independent are for every optimizer"
        )
    if group_lr := without_ones(resolved.optimizer.group_lr):
        factors = ", ".join(f"{key} by {factor:g}" for key, factor in group_lr.items())
        notes.append(f"optimizer.group_lr multiplies LRs at every size: {factors}")
    training = resolved.training
    if training.base_batch_size is not None:
        source = {"sde": "Complete(d)P, 2512.22382", "sqrt": "LMO methods, 2603.15958"}[training.batch_rule]
        averages = "betas, " if training.batch_rule == "sde" else ""
        tokens = f" and {training.base_tokens} tokens" if training.batch_rule_has_tokens else ""
        notes.append(
            f"batch rule {training.batch_rule} is on: LRs, {averages}eps and weight decay are those of batch "
            f"{training.base_batch_size}{tokens} carried to batch {training.batch_size}"
            f"{' and the tokens of this run' if tokens else ''} ({source})"
        )
    if training.horizon_exponent:
        notes.append(
            f"horizon rule is on: LRs are multiplied by (tokens / {training.base_tokens})^{training.horizon_exponent:g}"
        )
    if training.schedule == "constant" and training.min_lr_frac != 1:
        notes.append("training.min_lr_frac has no effect: the schedule is constant")
    if any(spec.role is Role.ROUTER for spec in resolved.model.tensors(resolved.size(1.0, 1.0))):
        router = resolved.optimizer_for(Role.ROUTER).optimizer.name
        notes.append(
            "up and down of every expert, routed or shared, are hidden matrices; the router of a fixed number of "
            f"experts has a rule of its own (2601.20205; 2605.14200) under {router}, the optimizer of the head; what "
            "was measured: mupsweep/models/ROLES.md"
        )
    return notes + resolved.model.remarks(resolved.size(1.0, 1.0))


def wrong_rule(resolved: ResolvedVariant, optimizer: Optimizer) -> str | None:
    """A note where the parametrization forces a law on an optimizer that gives it other LRs than its own."""
    forced = forced_law(resolved.parametrization)
    for role in map(Role, optimizer.roles if forced else ()):
        assert forced is not None
        wrong, own = (symbolic(resolved.parametrization, law, role).lr for law in (forced, optimizer.update_law()))
        if wrong != own:
            name = resolved.variant.parametrization["update_law_of"]
            return (
                f"WRONG RULE, as parametrization.update_law_of={name} asks: LRs of {optimizer.name} scale as if it "
                f"were {name}, those of {role} tensors as {wrong}, where its own updates ask for {own}; expect no "
                "transfer"
            )
    return None


def scale_tensor(
    resolved: ResolvedVariant, width_ratio: float, depth_ratio: float, spec: TensorSpec, base: TensorSpec
) -> TensorScaling:
    """Everything that one tensor is trained with, relative to the tensor `base` of the base shape.

    Of a tensor that stacks rows of two kinds, what both have in common.

    Raises:
        ConfigError: rows that grow with the width want other numbers than those stacked on them that do not; or no rule
            leads from the base's tensor to this one.
    """

    def scaled(spec: TensorSpec, base: TensorSpec) -> TensorScaling:
        return _scale_matrix(resolved, width_ratio, depth_ratio, spec, base)

    if not spec.stacked:
        return scaled(spec, base)
    rows, sizes = base.dims[0], (spec.dims[1], base.dims[1])
    growing = scaled(*(replace(spec, as_matrix=(n_in, n_in)) for n_in in sizes))
    fixed = scaled(*(replace(spec, as_matrix=(rows, n_in), repeats=max(1.0, n_in / rows)) for n_in in sizes))
    settled = (
        f"'model.roles={{{spec.name}:hidden}}'" if resolved.model.inferred else f"roles={{'{spec.name}': 'hidden'}}"
    )
    for key in ("lr", "weight_decay", "init_std"):  # the smaller eps, that of growing rows, is below both gradients
        a, b = getattr(growing.rule, key), getattr(fixed.rule, key)
        if not math.isclose(a, b, rel_tol=1e-9):
            raise ConfigError(
                f"{spec.name}: rows that grow with the width and rows that do not are stacked in it, and "
                f"{growing.scaled.optimizer.name} wants {key} x{a:g} for the ones and x{b:g} for the others: split it, "
                f"or take it for one matrix with {settled}"
            )
    return growing


def _scale_matrix(
    resolved: ResolvedVariant, width_ratio: float, depth_ratio: float, spec: TensorSpec, base: TensorSpec
) -> TensorScaling:
    """The scaling of a tensor whose rows are all of one kind."""
    scaled = resolved.optimizer_for(spec.role)
    optimizer = scaled.optimizer
    by_its_norm = optimizer.divides_by_weight or optimizer.update_law(spec.dims).weight_norm is not None
    if by_its_norm and spec.role.is_matrix and (spec.init is Init.ZEROS or spec.init_std == 0):
        raise ConfigError(
            f"{spec.name} starts at zero, and {optimizer.name} moves a weight in proportion to its norm: it would "
            "never leave zero; give it an init std above 0"
        )

    if spec.fold is not None:
        _check_fold(resolved, optimizer, width_ratio, depth_ratio, spec)
    if len(spec.shape) > 2 and optimizer.oriented and spec.role.is_matrix:
        raise ConfigError(
            f"{spec.name} has {len(spec.shape)} dimensions {spec.shape}, and {optimizer.name} takes matrices: leave it "
            "to another optimizer, with a role in model.roles that optimizer.roles does not name"
        )

    def solve(law: LawOfShape) -> Rule:
        laws = law(spec.dims), law(base.dims)
        if laws[0].degree != laws[1].degree:
            raise ConfigError(
                f"{spec.name}: {optimizer.name} treats {spec.dims} otherwise than the base's {base.dims}, as one of "
                "them has an axis beyond optimizer.max_axis, so no rule leads from one to the other; raise max_axis"
            )
        return numeric(resolved.parametrization, laws[0], spec, base, width_ratio, depth_ratio, base_law=laws[1])

    return TensorScaling(scaled, *_optimizer_rule(resolved, optimizer, solve))


def _check_fold(
    resolved: ResolvedVariant, optimizer: Optimizer, width_ratio: float, depth_ratio: float, spec: TensorSpec
) -> None:
    """Refuse a tensor that would have to take up a forward constant and cannot under its optimizer."""
    assert spec.fold is not None
    constant = folded_constant(resolved.parametrization, spec.role, spec.fold).at(width_ratio, depth_ratio)
    if constant == 1:
        return
    where = f"{spec.name} would have to take up the forward constant {constant:.6g}, which the model does not have"
    if optimizer.rescales_init:
        raise ConfigError(f"{where}, and {optimizer.name} gives its weights a norm of its own: {BUILD_IT_IN}")
    if (forced_law(resolved.parametrization) or optimizer.update_law(spec.dims)) != optimizer.measured_law(spec.dims):
        raise ConfigError(f"{where}, and the rule of {optimizer.name} is not the law of its updates: {BUILD_IT_IN}")


def _optimizer_rule(
    resolved: ResolvedVariant, optimizer: Optimizer, solve: Callable[[LawOfShape], Rule]
) -> tuple[Rule, dict[str, Any]]:
    """The rule of an optimizer, and the scale of every threshold beside eps.

    LR and init follow from the law of the update, weight decay from the law of what it is added to, and every threshold
    from a law of its own. Where the parametrization forces a law, LR and weight decay follow that one, and with it the
    shrinkage per step is still what the decay rule says.

    Args:
        solve: the rule under one law, which is given as a function of a tensor's (n_out, n_in).
    """
    scales = {}
    for name in optimizer.thresholds():
        scales[name] = solve(lambda dims, name=name: optimizer.thresholds(dims)[name].law).eps
    forced = forced_law(resolved.parametrization)
    update_law: LawOfShape = optimizer.update_law if forced is None else lambda dims: forced
    decay_law: LawOfShape = optimizer.decay_law if forced is None else update_law
    decay = solve(decay_law).weight_decay
    return replace(solve(update_law), weight_decay=decay, eps=scales.pop("eps")), scales


def tensor_rule(
    spec: TensorSpec, scaling: TensorScaling, resolved: ResolvedVariant, forward: Multipliers, base_lr: float
) -> TensorRule:
    """The numbers of one tensor at a base LR, from its ratios to the base shape and the forward constants."""
    multiplier = {Role.OUTPUT: forward.output}
    multiplier |= dict.fromkeys((Role.HIDDEN, Role.HIDDEN_VECTOR, Role.ROUTER), forward.block)
    (optimizer, lr_ratio), rule, thresholds = scaling.scaled, scaling.rule, scaling.absolute_thresholds(spec.dims)
    lr = base_lr * lr_ratio * rule.lr
    decay_rule = WEIGHT_DECAY_RULES[resolved.parametrization.weight_decay_rule]
    decays = spec.decay and spec.role in decay_rule.roles
    decay = decay_rule.coefficient(optimizer.weight_decay, base_lr * lr_ratio, resolved.steps) if decays else 0.0
    return TensorRule(
        name=spec.name,
        role=spec.role,
        shape=spec.shape,
        optimizer=optimizer.name,
        init=spec.init,
        init_std=spec.init_std * rule.init_std,
        multiplier=1.0 if spec.fold is Fold.MULTIPLIER else multiplier.get(spec.role, 1.0),
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


def _check_roles(resolved: ResolvedVariant) -> None:
    """Refuse a tensor whose dimensions do not grow with the width as its role says."""
    sizes = (resolved.size(1.0, 1.0), resolved.size(2.0, 1.0))
    for base, doubled in zip(*(resolved.model.tensors(size) for size in sizes), strict=True):
        growth = tuple(b > s for s, b in zip(base.acting_dims, doubled.acting_dims, strict=True))
        if growth != (base.role.grows if base.role.is_matrix else (True, False)):
            raise ConfigError(
                f"{base.name} is declared {base.role.value}, but its (n_out, n_in) goes from {base.acting_dims} to "
                f"{doubled.acting_dims} when the width doubles: mend its role in the model"
            )


def _check_tie(resolved: ResolvedVariant, spec: TensorSpec, scaling: TensorScaling, tied: TensorScaling) -> None:
    """Refuse a tensor that shares its storage with one of another rule."""
    if key := scaling.differing_key(tied):
        cause, remedy = "model.tied=true: ", "use model.tied=false"
        if resolved.model.inferred:
            cause, remedy = "", "untie them in the model"
        raise ConfigError(
            f"{cause}{spec.tied_to} and {spec.name} share storage, but "
            f"{resolved.parametrization.name} with {resolved.optimizer.name} wants {key} x{getattr(tied.rule, key):g} "
            f"for the one and x{getattr(scaling.rule, key):g} for the other; "
            f"{remedy}, or parametrization.output=multiplier if it is init"
        )


def rule_record(row: TensorRule) -> dict[str, Any]:
    """A tensor's rule as a row of `rules --json` and of a recipe's JSON."""
    return {k: (v.value if isinstance(v, Role | Init) else v) for k, v in asdict(row).items()}


def role_records(run: RunSpec) -> dict[str, dict[str, Any]]:
    """The numbers of every role as a run's config stores them; a list where tensors of one role differ."""
    values_of: dict[str, dict[str, set[Any]]] = {}
    for row in rules(run.resolved, run.size, run.base_lr):
        values_of_role = values_of.setdefault(row.role.value, {})
        for key in ("optimizer", "init_std", "multiplier", "lr", "weight_decay", "eps"):
            values_of_role.setdefault(key, set()).add(getattr(row, key))
    records: dict[str, dict[str, Any]] = {}
    for role, numbers in values_of.items():
        records[role] = {key: values.pop() if len(values) == 1 else sorted(values) for key, values in numbers.items()}
    return records
