"""Build: the only place that joins models, optimizers, scaling and data.

`rules` solves every tensor of a recipe at a size, without torch. `build` makes the network and its optimizers from
exactly those rules. What `mupsweep rules` prints is what a run trains with.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mupsweep.errors import ConfigError
from mupsweep.models import Multipliers
from mupsweep.optimizers import Optimizer
from mupsweep.plan import Recipe, RunSpec
from mupsweep.scaling import Init, Role, Rule, TensorSpec, numeric
from mupsweep.scaling.monomial import ONE
from mupsweep.sizes import Size

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class TensorRule:
    """One tensor as it is trained: absolute numbers, and each ratio to the base shape.

    Attributes:
        lr: peak LR; weight_decay: coupled, a step subtracts lr * weight_decay * W.
        multiplier: forward constant on the tensor's branch, or on the logits.
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
    eps: float
    init_var_ratio: float
    multiplier_ratio: float
    lr_ratio: float
    weight_decay_ratio: float
    eps_ratio: float
    tied_to: str | None


@dataclass(frozen=True)
class Built:
    """A run ready to train."""

    network: nn.Module
    optimizer: OptimizerSet
    groups: list[dict[str, Any]]
    clip: float | None


def rules(recipe: Recipe, size: Size, base_lr: float) -> tuple[TensorRule, ...]:
    """The rule of every tensor at `size`, in the order of the forward pass.

    Raises:
        ConfigError: a role that its shape contradicts, or a tie whose two rules disagree, naming the tensor.
    """
    base = {t.name: t for t in recipe.model.tensors(recipe.size(1.0, 1.0))}
    target = list(recipe.model.tensors(size))
    _check_roles(recipe)
    parts = recipe.optimizer.parts()
    solved: dict[str, tuple[Rule, Optimizer]] = {}
    for spec in target:
        part = _taker(parts, spec)
        # blocks beyond the base depth repeat the shapes of the base's first block
        small = base.get(spec.name) or base[_first_block(spec.name)]
        rule = numeric(recipe.parametrization, part.update_law(), spec, small, size.width_ratio, size.depth_ratio)
        solved[spec.name] = (rule, part)
    for spec in target:
        if spec.tied_to is not None:
            _check_tie(recipe, spec, solved[spec.name][0], solved[spec.tied_to][0])
    forward = multipliers(recipe, size)
    return tuple(_row(spec, *solved[spec.name], forward, base_lr) for spec in target)


def multipliers(recipe: Recipe, size: Size) -> Multipliers:
    """The forward constants at `size`."""
    claims = recipe.parametrization.claims()

    def ratio(role: Role) -> float:
        monomial = ONE if claims is None else claims[role].multiplier
        return monomial.at(size.width_ratio, size.depth_ratio)

    power = float(recipe.parametrization.attention_power)
    return recipe.model.multipliers(size, ratio(Role.HIDDEN), ratio(Role.OUTPUT), power)


def clip_norm(recipe: Recipe) -> float | None:
    """The norm that gradients are clipped to; None where an optimizer's rule depends on the gradient's size.

    The gradient's norm itself changes with width and depth, so a constant norm would clip sizes differently and break
    the rule of every optimizer whose update is not normalised (theory: any degree other than 0).
    """
    normalised = all(part.update_law().degree == 0 for part in recipe.optimizer.parts())
    return recipe.training.clip if normalised else None


def audit(recipe: Recipe) -> list[str]:
    """What a reader of the rules should know before training; contradictions are raised by `recipe` and `rules`."""
    notes = []
    for part in recipe.optimizer.parts():
        law = part.update_law()
        if law.degree != 0 and recipe.training.clip is not None:
            notes.append(
                f"gradient clipping is off: the update of {part.name} has degree {law.degree} in the gradient, "
                "and clipping by one norm at every size would break its scaling rule"
            )
    if recipe.training.schedule == "constant" and recipe.training.min_lr_frac != 1:
        notes.append("training.min_lr_frac has no effect: the schedule is constant")
    if recipe.model.attention_scale != "parametrization":
        notes.append(f"attention scale {recipe.model.attention_scale} is forced by model.attention_scale")
    return notes


def build(run: RunSpec, device: torch.device) -> Built:
    """The network, initialised, and its optimizers.

    Initial values depend on (seed, tensor name, shape) alone: they are drawn on the CPU, so that every device starts
    from the same numbers.
    """
    import torch

    rows = rules(run.recipe, run.size, run.base_lr)
    with torch.device("meta"):
        network = run.recipe.model.network(run.size, multipliers(run.recipe, run.size))
    _check_shapes(network, rows)
    network.to_empty(device=device)
    for row in rows:  # leaving the meta device gave every module a parameter of its own
        if row.tied_to is not None:
            _share(network, row.name, row.tied_to)
    parameters = dict(network.named_parameters())
    for row in rows:
        if row.tied_to is None:
            initialise(parameters[row.name], row, run.seed)
    groups = list(_groups(run.recipe, rows))
    return Built(network, OptimizerSet(run.recipe.optimizer, groups, parameters), groups, clip_norm(run.recipe))


def initialise(parameter: torch.Tensor, row: TensorRule, seed: int) -> None:
    """Fill a parameter.

    | init   | distribution | standard deviation                       |
    |--------|--------------|------------------------------------------|
    | normal | Gaussian     | row.init_std = the model's times the rule |
    | ones   | constant 1   |                                          |
    | zeros  | constant 0   |                                          |
    """
    import torch

    with torch.no_grad():
        if row.init is Init.NORMAL:
            digest = hashlib.sha256(f"{seed} {row.name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * row.init_std)
        else:
            parameter.fill_(1.0 if row.init is Init.ONES else 0.0)


class OptimizerSet:
    """The optimizers of a run, one per part of a hybrid, driven as one."""

    def __init__(
        self, optimizer: Optimizer, groups: list[dict[str, Any]], parameters: Mapping[str, torch.Tensor]
    ) -> None:
        self.members: list[torch.optim.Optimizer] = []
        for index, part in enumerate(optimizer.parts()):
            mine = [
                {
                    "params": [parameters[name] for name in group["tensors"]],
                    "lr": group["lr"],
                    "peak_lr": group["lr"],
                    "weight_decay": group["weight_decay"],
                    "eps": group["eps"],
                }
                for group in groups
                if group["part"] == index
            ]
            if mine:
                self.members.append(part.build(mine))

    def step(self, lr_factor: float) -> None:
        """One step at `lr_factor` times every group's peak LR, then forget the gradients."""
        for member in self.members:
            for group in member.param_groups:
                group["lr"] = group["peak_lr"] * lr_factor
            member.step()
            member.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [member.state_dict() for member in self.members]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for member, state in zip(self.members, states, strict=True):
            member.load_state_dict(state)


def _groups(recipe: Recipe, rows: tuple[TensorRule, ...]) -> Iterator[dict[str, Any]]:
    """Parameter groups: the tensors of one part of the optimizer that share LR, weight decay and eps."""
    parts = recipe.optimizer.parts()
    grouped: dict[tuple[int, float, float, float], list[str]] = {}
    for row in rows:
        if row.tied_to is None:
            part = next(i for i, p in enumerate(parts) if row.role in p.takes)
            grouped.setdefault((part, row.lr, row.weight_decay, row.eps), []).append(row.name)
    for (part, lr, weight_decay, eps), names in grouped.items():
        yield {
            "part": part,
            "optimizer": parts[part].name,
            "lr": lr,
            "weight_decay": weight_decay,
            "eps": eps,
            "tensors": names,
        }


def _row(spec: TensorSpec, rule: Rule, part: Optimizer, forward: Multipliers, base_lr: float) -> TensorRule:
    multiplier = {Role.OUTPUT: forward.output, Role.HIDDEN: forward.block, Role.HIDDEN_VECTOR: forward.block}
    return TensorRule(
        name=spec.name,
        role=spec.role,
        shape=spec.shape,
        optimizer=part.name,
        init=spec.init,
        init_std=spec.init_std * rule.init_std,
        multiplier=multiplier.get(spec.role, 1.0),
        lr=base_lr * part.base_lr_ratio * rule.lr,
        weight_decay=part.weight_decay * rule.weight_decay if spec.decay else 0.0,
        eps=part.eps * rule.eps,
        init_var_ratio=rule.init_std**2,
        multiplier_ratio=rule.multiplier,
        lr_ratio=rule.lr,
        weight_decay_ratio=rule.weight_decay,
        eps_ratio=rule.eps,
        tied_to=spec.tied_to,
    )


def _taker(parts: tuple[Optimizer, ...], spec: TensorSpec) -> Optimizer:
    """The optimizer of a tensor: the first part that takes its role."""
    for part in parts:
        if spec.role in part.takes:
            return part
    raise ConfigError(f"no optimizer takes {spec.name} ({spec.role.value}): add one as optimizer.rest")


def _first_block(name: str) -> str:
    head, _, tail = name.split(".", 2)
    return f"{head}.0.{tail}"


def _check_roles(recipe: Recipe) -> None:
    """A dimension grows with the width exactly where the role says so."""
    sizes = [recipe.size(1.0, 1.0), recipe.size(2.0, 1.0)]
    for small, big in zip(*(recipe.model.tensors(s) for s in sizes), strict=True):
        grew = tuple(b > s for s, b in zip(small.dims, big.dims, strict=True))
        if grew != (small.role.grows if small.role.is_matrix else (True, False)):
            raise ConfigError(
                f"{small.name} is declared {small.role.value}, but its (n_out, n_in) goes from {small.dims} to "
                f"{big.dims} when the width doubles: mend its role in the model"
            )


def _check_tie(recipe: Recipe, spec: TensorSpec, mine: Rule, other: Rule) -> None:
    for key in ("init_std", "lr", "weight_decay", "eps"):
        a, b = getattr(mine, key), getattr(other, key)
        if not math.isclose(a, b, rel_tol=1e-9):
            raise ConfigError(
                f"model.tied=true: {spec.tied_to} and {spec.name} share storage, but "
                f"{recipe.parametrization.name} with {recipe.optimizer.name} wants {key} x{b:g} for the one "
                f"and x{a:g} for the other; "
                "use model.tied=false, or parametrization.output=multiplier if it is init"
            )


def _share(network: nn.Module, name: str, other: str) -> None:
    """Make the tensor `name` the tensor `other`."""
    module, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(module), leaf, network.get_parameter(other))


def _check_shapes(network: nn.Module, rows: tuple[TensorRule, ...]) -> None:
    """The network has exactly the declared tensors."""
    declared = {row.name: tuple(row.shape) for row in rows}
    actual = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name in declared.keys() | actual.keys():
        if declared.get(name) != actual.get(name):
            raise ConfigError(
                f"{name}: the model declares {declared.get(name)} but its network has {actual.get(name)}: "
                "every tensor needs a row in tensors(), and every row a module"
            )


def group_records(built: Built) -> list[dict[str, Any]]:
    """The groups as groups.json holds them."""
    return [{k: v for k, v in group.items() if k != "part"} for group in built.groups]


def rule_record(row: TensorRule) -> dict[str, Any]:
    """A rule as `rules --json` and recipes hold it."""
    return {k: (v.value if isinstance(v, Role | Init) else v) for k, v in asdict(row).items()}
