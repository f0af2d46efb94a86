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

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

from mupsweep.errors import ConfigError
from mupsweep.formatting import nearest
from mupsweep.models.inference import InferredTensor, infer, without_wrappers
from mupsweep.scaling.group_lr import check_group_lr, check_matches, factor_of
from mupsweep.sweep import config, run_spec, tensor_rules
from mupsweep.sweep.tensor_rules import TensorScaling

if TYPE_CHECKING:
    import torch
    from torch import nn


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
    group_lr: Mapping[str, float] | None = None,
    details: bool = False,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, with the LR, weight decay and eps of every tensor scaled from the base model.

    Roles come from the dimensions that differ between the two models and from what the modules do
    (mupsweep/models/ROLES.md has every kind). Numbers in names, such as layers.3, count blocks: a model may have more
    of them than the base. Names are those without wrappers (torch.compile, DDP, activation checkpointing). Both models
    may be on the meta device. What groups cannot hold is left to the model: multipliers, init and the attention scale
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
        group_lr: factors on the LR by role or pattern of names, as `optimizer.group_lr` of a sweep.
        details: groups also say `names`, `role`, `init_std_ratio` (std at the start / std at the base) and `multiplier`
            (forward constant on the branch of the tensor, or on the logits / that of the base). The group of a tied
            tensor has the last three for each of its other names too, under `tied`.

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
    tensors = infer(model, base_model, delta_model, roles)
    check_group_lr(group_lr or {}, "group_lr")
    check_matches(group_lr or {}, [tensor.spec for tensor in tensors], "group_lr")
    _check_patterns([*no_decay, *(roles or {})], [tensor.name for tensor in tensors])
    single_optimizer = len(resolved.optimizers) == 1
    if not (single_optimizer or roles or any(tensor.grows for tensor in tensors)):
        raise ConfigError(
            "no tensor differs in shape between model and base_model, so nothing tells which of them the optimizer of "
            "hidden matrices takes: give delta_model (the base at another width) or roles={'PATTERN': 'hidden'}"
        )
    uses: dict[torch.Tensor, list[_Use]] = {}  # of every parameter, one for each of its names
    for tensor in tensors:
        scaling = tensor_rules.scale_tensor(
            resolved, tensor.width_ratio, tensor.depth_ratio, tensor.spec, tensor.base
        ).times(factor_of(group_lr or {}, tensor.spec))
        uses.setdefault(tensor.parameter, []).append(_Use(tensor, scaling))

    groups: dict[tuple[Any, ...], dict[str, Any]] = {}  # by what its members have in common
    for parameter, (use, *others) in uses.items():
        for other in others:
            _check_tie(use, other)
        scaling, names = use.scaling, [use.tensor.name, *(other.tensor.name for other in others)]
        decays = not any(fnmatchcase(name, without_wrappers(pattern)) for pattern in no_decay for name in names)
        group = {
            "lr": lr * scaling.scaled.lr_ratio * scaling.rule.lr,
            "weight_decay": weight_decay * scaling.rule.weight_decay if decays else 0.0,
            **{key: value for key, value in scaling.absolute_thresholds(use.tensor.spec.dims).items() if value > 0},
        }
        if not single_optimizer:
            group["optimizer"] = scaling.scaled.optimizer.name
        if details:
            group |= use.outside_groups()

        # Tensors with equal numbers share a group: torch steps a group's tensors together.
        key = (*group.items(), *(names[1:] if details else ()))
        if key not in groups:
            groups[key] = {"params": [], **group}
            if details:
                groups[key]["names"] = []
                groups[key]["tied"] = {other.tensor.name: other.outside_groups() for other in others}
        groups[key]["params"].append(parameter)
        if details:
            groups[key]["names"].append(use.tensor.name)
    return list(groups.values())


class _Use(NamedTuple):
    """A parameter under one of its names."""

    tensor: InferredTensor
    scaling: TensorScaling

    def outside_groups(self) -> dict[str, Any]:
        """What a group cannot do for the tensor and the model has to."""
        rule = self.scaling.rule
        return {"role": self.tensor.spec.role.value, "init_std_ratio": rule.init_std, "multiplier": rule.multiplier}


def _check_patterns(patterns: Iterable[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, without_wrappers(pattern)) for name in names):
            raise ConfigError(f"the pattern {pattern!r} fits no parameter; {nearest(pattern, names)}")


def _check_tie(use: _Use, other: _Use) -> None:
    """Refuse a tensor whose names call for different numbers."""
    one, another = use.scaling, other.scaling
    if one.scaled.optimizer != another.scaled.optimizer:
        difference = f"{one.scaled.optimizer.name} and {another.scaled.optimizer.name}"
    elif one.scaled.lr_ratio != another.scaled.lr_ratio:
        difference = f"base LR x{one.scaled.lr_ratio:g} and x{another.scaled.lr_ratio:g}"
    elif key := one.differing_key(another):
        difference = f"{key} x{getattr(one.rule, key):g} and x{getattr(another.rule, key):g}"
    else:
        return
    raise ConfigError(
        f"{use.tensor.name} and {other.tensor.name} are one tensor, but their rules differ ({difference}): untie them"
    )
