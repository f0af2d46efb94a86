"""Parameter groups for a model of your own: roles from the shapes, numbers from the same rules as everywhere.

Example: a network tuned at width 64 with Adam, trained at width 256.

>>> import torch
>>> from torch import nn
>>> import mupsweep
>>> def net(width):
...     return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))
>>> groups = mupsweep.param_groups(net(256), base_model=net(64), optimizer="adamw", parametrization="mup", lr=0.01)
>>> optimizer = torch.optim.AdamW(groups)
>>> {p.shape: group["lr"] for group in optimizer.param_groups for p in group["params"] if p.ndim == 2}
{torch.Size([256, 8]): 0.01, torch.Size([4, 256]): 0.01, torch.Size([256, 256]): 0.0025}
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from mupsweep.errors import ConfigError
from mupsweep.formatting import nearest
from mupsweep.scaling import Role, TensorSpec
from mupsweep.sweep import config, run_spec, tensor_rules

if TYPE_CHECKING:
    import torch
    from torch import nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Scaled:
    """One tensor of a model beside the tensor of the base model that it grew from.

    Attributes:
        spec, base: as the solver takes them, with its n_out and n_in.
        width_ratio: of the dimension that sums run over: n_in of hidden matrices and the head, n_out of the rest.
        depth_ratio: how many times more often its like stands in the model than in the base.
    """

    spec: TensorSpec
    base: TensorSpec
    width_ratio: float
    depth_ratio: float


def param_groups(
    model: nn.Module,
    base_model: nn.Module,
    *,
    lr: float,
    optimizer: str = "adamw",
    parametrization: str = "mup",
    weight_decay: float = 0.0,
    eps: float | None = None,
    no_decay: Sequence[str] = (),
    delta_model: nn.Module | None = None,
    roles: Mapping[str, str] | None = None,
    details: bool = False,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, with the LR, weight decay and eps of every tensor scaled from the base model.

    Roles come from the dimensions that differ between the two models. A matrix is (n_out, n_in), unless its module is
    an embedding; a parameter that is no `weight` and grows along one axis counts as an input, as a position embedding
    does. Numbers in names, such as layers.3, count blocks: a model may have more of them than the base. Both models may
    be on the meta device. What groups cannot hold is left to the model: multipliers, init and the attention scale
    (1/d_head relative to the base, where d_head grows); `details` says the first two.

    Args:
        model: what will be trained; its parameters stand in the groups.
        base_model: the model at the shape that `lr` was tuned at.
        lr: base LR, of the optimizer that is named; that of its `rest` follows by configs/optimizer.
        optimizer, parametrization: choices of configs/, such as "muon" and "spectral".
        weight_decay: base coefficient, coupled as in torch: a step subtracts lr * weight_decay * W.
        eps: base eps of the named optimizer; None: that of configs/optimizer. Scaled like a gradient's entries.
        no_decay: patterns of names without weight decay, such as "*.bias".
        delta_model: the base at another width, which tells what grows where `model` does not (at the base shape).
        roles: pattern of names -> role, where shapes cannot tell; the first that fits counts.
        details: groups also say `names`, `role`, `init_std_ratio` (std at the start / std at the base) and `multiplier`
            (forward constant on the branch of the tensor, or on the logits / that of the base).

    Returns:
        Dicts with params, lr, weight_decay, eps where the optimizer has one, and other thresholds it has. Where one
        optimizer does not take every tensor (Muon), each group also names its `optimizer`.

    Raises:
        ConfigError: tensors without a counterpart or of an unclear role, a pattern that fits nothing, tied tensors
            whose rules disagree.
    """
    if not (isinstance(lr, int | float) and lr > 0):
        raise ConfigError(f"lr={lr!r}: expected a positive number, such as 2**-7")
    overrides = [f"optimizer={optimizer}", f"parametrization={parametrization}"]
    overrides += [] if eps is None else [f"optimizer.eps={eps!r}"]
    resolved = run_spec.resolve(config.load(overrides).variants[0])
    _check_patterns([*no_decay, *(roles or {})], [name for name, _ in model.named_parameters(remove_duplicate=False)])
    single_optimizer = len(resolved.optimizers) == 1
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}  # by what its members have in common
    first_use: dict[torch.Tensor, tuple[str, list[float]]] = {}  # of every parameter: its name and numbers
    for name, parameter, tensor in _tensors(model, base_model, delta_model, roles or {}, single_optimizer):
        scaling = tensor_rules.scale_tensor(resolved, tensor.width_ratio, tensor.depth_ratio, tensor.spec, tensor.base)
        decays = not any(fnmatchcase(name, pattern) for pattern in no_decay)
        group = {
            "lr": lr * scaling.scaled.lr_ratio * scaling.rule.lr,
            "weight_decay": weight_decay * scaling.rule.weight_decay if decays else 0.0,
            **{key: value for key, value in scaling.absolute_thresholds(tensor.spec.dims).items() if value > 0},
        }

        # A tied tensor has several names and is listed once, so all of them must call for equal numbers.
        first_name, first_numbers = first_use.setdefault(parameter, (name, list(group.values())))
        if first_name != name:
            _check_tie(name, list(group.values()), first_name, first_numbers)
            continue

        if not single_optimizer:
            group["optimizer"] = scaling.scaled.optimizer.name
        if details:
            outside_groups = {"init_std_ratio": scaling.rule.init_std, "multiplier": scaling.rule.multiplier}
            group |= {"role": tensor.spec.role.value, **outside_groups}

        # Tensors with equal numbers share a group: torch steps a group's tensors together.
        key = tuple(group.items())
        if key not in groups:
            groups[key] = {"params": [], **group, **({"names": []} if details else {})}
        groups[key]["params"].append(parameter)
        if details:
            groups[key]["names"].append(name)
    return list(groups.values())


def _tensors(
    model: nn.Module,
    base_model: nn.Module,
    delta_model: nn.Module | None,
    roles: Mapping[str, str],
    single_optimizer: bool,
) -> Iterator[tuple[str, torch.Tensor, Scaled]]:
    """Every parameter of the model, with its role and its counterpart in the base."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    base_shapes = {name: tuple(p.shape) for name, p in base_model.named_parameters(remove_duplicate=False)}
    others = base_model if delta_model is None else delta_model
    delta_shapes = {name: tuple(p.shape) for name, p in others.named_parameters(remove_duplicate=False)}
    if delta_shapes.keys() != base_shapes.keys():
        raise ConfigError(f"delta_model and base_model differ in {sorted(delta_shapes.keys() ^ base_shapes.keys())[0]}")
    depths = _depth_ratios(list(parameters), list(base_shapes))
    grows = False
    for name, parameter in parameters.items():
        counterpart, depth_ratio = depths[name]
        shape, base = tuple(parameter.shape), base_shapes[counterpart]
        if not len(shape) == len(base) == len(delta_shapes[counterpart]):
            raise ConfigError(f"{name} has shape {shape}, but {base} in the base model: they must differ in size only")
        axes = [
            i for i, (s, b, d) in enumerate(zip(shape, base, delta_shapes[counterpart], strict=True)) if not s == b == d
        ]
        grows |= bool(axes)
        given = next((role for pattern, role in roles.items() if fnmatchcase(name, pattern)), None)
        role = _role(name, axes, model) if given is None else _parse_role(given)
        spec, base_spec = (_spec(name, dims, role, axes) for dims in (shape, base))
        fan_in_or_out = 1 if role in (Role.HIDDEN, Role.OUTPUT) else 0  # the index in dims, which are (n_out, n_in)
        width_ratio = spec.dims[fan_in_or_out] / base_spec.dims[fan_in_or_out]
        yield name, parameter, Scaled(spec, base_spec, width_ratio, depth_ratio)
    if not (grows or roles or single_optimizer):
        raise ConfigError(
            "no tensor differs in shape between model and base_model, so nothing tells which of them the optimizer of "
            "hidden matrices takes: give delta_model (the base at another width) or roles={'PATTERN': 'hidden'}"
        )


def _depth_ratios(names: Sequence[str], base: Sequence[str]) -> dict[str, tuple[str, float]]:
    """Per name, its counterpart in the base, and how many times more often the model has such a tensor.

    Names that differ in one number, such as layers.3.mlp.weight and layers.4.mlp.weight, are each other's like.
    """

    def alike(name: str) -> Iterator[tuple[str, ...]]:
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.isdecimal():
                yield (*parts[:i], "#", *parts[i + 1 :])

    counts = [Counter(key for name in side for key in alike(name)) for side in (names, base)]
    first = {key: name for name in reversed(base) for key in alike(name)}
    base_names = set(base)
    counterparts = {}
    for name in names:
        like = name if name in base_names else next((first[key] for key in alike(name) if key in first), None)
        if like is None:
            raise ConfigError(f"{name} has no counterpart in the base model; {nearest(name, base_names)}")
        counterparts[name] = like, math.prod(counts[0][k] / counts[1][k] for k in alike(name) if k in counts[1])
    unused = (
        base_names
        - {like for like, _ in counterparts.values()}
        - {n for n in base_names if any(k in counts[0] for k in alike(n))}
    )
    if unused:
        raise ConfigError(f"{min(unused)} of the base model has no counterpart in the model")
    if len(ratios := {ratio for _, ratio in counterparts.values()} - {1.0}) > 1:
        raise ConfigError(
            f"numbered blocks grow by different factors ({', '.join(f'{r:g}' for r in sorted(ratios))}): scale the "
            "depth of all of them alike, or count only what residual blocks repeat"
        )
    return counterparts


def _role(name: str, axes: Sequence[int], model: nn.Module) -> Role:
    """The role of a tensor from the axes that grow."""
    owner, _, leaf = name.rpartition(".")
    embeds = "embed" in type(model.get_submodule(owner)).__name__.lower()
    if len(axes) > 2 or (len(axes) == 2 and embeds):
        raise ConfigError(f"{name} grows along {len(axes)} axes: keep all but {1 if embeds else 2} fixed")
    if len(axes) == 2:
        return Role.HIDDEN
    parameter = model.get_parameter(name)
    if not axes or parameter.ndim < 2:
        inside = any(part.isdecimal() for part in name.split("."))
        return Role.HIDDEN_VECTOR if inside else Role.INPUT_VECTOR
    stored_out_in = leaf == "weight" and not embeds
    return Role.of_matrix(n_out_grows=axes[0] != 1, n_in_grows=axes[0] == 1) if stored_out_in else Role.INPUT


def _spec(name: str, shape: Shape, role: Role, axes: Sequence[int]) -> TensorSpec:
    """What the solver takes; further axes, such as those of a convolution's kernel, do not grow and cancel."""
    if not role.is_matrix:
        return TensorSpec(name, (shape[axes[0]] if axes else 1,), role)
    if len(shape) < 2:
        raise ConfigError(f"{name} of shape {shape} cannot be {role.value}: that is a role of matrices")
    if role is Role.INPUT:
        grown = axes[0] if axes else -1
        return TensorSpec(name, (math.prod(shape) // shape[grown], shape[grown]), role, init_std=1.0)
    out, into = axes if len(axes) == 2 else (0, 1)
    return TensorSpec(name, (shape[out], shape[into]), role, init_std=1.0)


def _parse_role(role: str) -> Role:
    try:
        return Role(role)
    except ValueError:
        raise ConfigError(f"roles: no role '{role}'; {nearest(role, Role)}") from None


def _check_patterns(patterns: Iterable[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"the pattern {pattern!r} fits no parameter; {nearest(pattern, names)}")


def _check_tie(name: str, numbers: Sequence[float], other: str, others: Sequence[float]) -> None:
    if any(not math.isclose(a, b, rel_tol=1e-9) for a, b in zip(numbers, others, strict=True)):
        raise ConfigError(
            f"{other} and {name} are one tensor, but their rules differ (LR {others[0]:g} and {numbers[0]:g}): "
            "untie them"
        )
