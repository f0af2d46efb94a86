"""Building a run: the only place that joins models, optimizers and scaling rules.

`tensor_rules.rules` solves every tensor of a variant at a size, without torch. `build` makes the network and its
optimizers from exactly those rules, so what `mupsweep rules` prints is what a run trains with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mupsweep.errors import ConfigError
from mupsweep.models.inferred import InferredArchitecture
from mupsweep.optimizers.optimizer_set import OptimizerSet
from mupsweep.scaling import Init, Role
from mupsweep.sweep.run_spec import ResolvedVariant, RunSpec
from mupsweep.sweep.tensor_rules import TensorRule, clip_norm, multipliers, rules

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class TrainingSetup:
    """A run ready to train.

    Attributes:
        run_id: of the run, which its checkpoints name.
        groups: the parameter groups, as `parameter_groups` yields them.
        clip: the norm that gradients are clipped to; None where they are not clipped.
        sharded: whether this rank holds some rows of every tensor, whose gradients the backward pass averages.
    """

    run_id: str
    network: nn.Module
    optimizer: OptimizerSet
    groups: list[dict[str, Any]]
    clip: float | None
    sharded: bool = False


class Builder:
    """Builds the runs of a process on a device; consecutive runs of one model and size share a network.

    torch.compile then traces it once, and not for every LR. All values are written anew, so that a run has the same
    bits whatever was trained before it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.key: tuple[Any, ...] | None = None  # what decides the kept network, and how it is compiled
        self.network: nn.Module | None = None

    def build(self, run: RunSpec) -> TrainingSetup:
        """Build a run, in the network of the last one where it is of the same model and size."""
        training = run.resolved.training
        constants = multipliers(run.resolved, run.size)
        key = (run.resolved.model, run.size, constants, training.precision, training.compile)
        if key != self.key:
            self.forget()  # first, since there may not be memory for both
        setup = build(run, self.device, self.network)
        if not isinstance(run.resolved.model, InferredArchitecture):  # code of others may keep more than its tensors
            self.key, self.network = key, setup.network
        return setup

    def forget(self) -> None:
        """Build the next run from nothing."""
        self.key = self.network = None


def build(run: RunSpec, device: torch.device, network: nn.Module | None = None) -> TrainingSetup:
    """Build the initialised network and its optimizers.

    Initial values depend on (seed, tensor name, shape) alone and are drawn on the CPU, so that every device starts from
    the same numbers.

    Args:
        network: of an earlier run of the same model and size on the device, to be used again; None makes one.
    """
    rows: tuple[TensorRule, ...]
    if isinstance(run.resolved.model, InferredArchitecture):
        network, rows = drawn_model(run, run.resolved.model)
        network.to(device)
    else:
        if network is None:
            network, rows = meta_model(run)
            network.to_empty(device=device)
            for row in rows:  # `to_empty` unties weights: it gives every module a parameter of its own
                if row.tied_to is not None:
                    _tie(network, row.name, row.tied_to)
        else:
            rows = rules(run.resolved, run.size, run.base_lr)
            network.zero_grad(set_to_none=True)
        for row in rows:
            if row.tied_to is None:
                initialise(network.get_parameter(row.name), row, run.seed)
    parameters = dict(network.named_parameters())
    groups = list(parameter_groups(run.resolved, rows, stored_in_out(run)))
    return TrainingSetup(
        run.run_id,
        network,
        OptimizerSet([scaled.optimizer for scaled in run.resolved.optimizers], groups, parameters),
        groups,
        clip_norm(run.resolved),
    )


def meta_model(run: RunSpec) -> tuple[nn.Module, tuple[TensorRule, ...]]:
    """Return the network on the meta device, without values, and the rule of every tensor."""
    import torch

    rows = rules(run.resolved, run.size, run.base_lr)
    with torch.device("meta"):
        network = run.resolved.model.network(run.size, multipliers(run.resolved, run.size))
    _check_shapes(network.state_dict().items(), rows)
    return network, rows


def drawn_model(run: RunSpec, model: InferredArchitecture) -> tuple[nn.Module, tuple[TensorRule, ...]]:
    """Return the network as its own code draws it under the run's seed, scaled by the rules, and the rules.

    At the base shape it stays as it is drawn, bit for bit.
    """
    from mupsweep.models.observation import rescale

    rows = rules(run.resolved, run.size, run.base_lr)
    network = model.drawn(run.size, multipliers(run.resolved, run.size), run.seed)
    _check_shapes(network.named_parameters(remove_duplicate=False), rows)  # constant buffers are its own affair
    if (run.size.width_ratio, run.size.depth_ratio) != (1.0, 1.0):
        specs = {spec.name: spec for spec in model.tensors(run.size)}
        own = [row for row in rows if row.tied_to is None]
        stds = {row.name: row.init_std for row in own if row.init is Init.OWN}
        is_set = [row for row in own if row.init in (Init.ONES, Init.FIXED) and specs[row.name].fold is not None]
        rescale(network, stds, {row.name: row.init_std / specs[row.name].init_std for row in is_set})
    return network, rows


def stored_in_out(run: RunSpec) -> frozenset[str]:
    """The matrices that a model stores (n_in, n_out), beside embeddings, as transformers' Conv1D does."""
    specs = run.resolved.model.tensors(run.size) if run.resolved.model.inferred else ()
    return frozenset(t.name for t in specs if len(t.shape) == 2 and t.dims == t.shape[::-1] != t.shape)


def initialise(parameter: torch.Tensor, row: TensorRule, seed: int) -> None:
    """Fill a parameter with its initial values.

    | init   | distribution | standard deviation                       |
    |--------|--------------|------------------------------------------|
    | normal | Gaussian     | row.init_std = the model's times the rule |
    | ones   | constant 1   |                                          |
    | zeros  | constant 0   |                                          |
    """
    import torch

    with torch.no_grad():
        if row.init is Init.NORMAL:
            parameter.copy_(torch.randn(parameter.shape, generator=generator(seed, row.name)) * row.init_std)
        else:
            parameter.fill_(1.0 if row.init is Init.ONES else 0.0)


def generator(*key: object) -> torch.Generator:
    """Return a CPU generator whose random numbers depend on `key` alone, so that every device draws the same."""
    import torch

    digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def parameter_groups(
    resolved: ResolvedVariant, rows: tuple[TensorRule, ...], in_out: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yield the parameter groups: the tensors of one optimizer that share all hyperparameters.

    Args:
        in_out: the tensors that are stored (n_in, n_out), beside embeddings.
    """
    grouped: dict[tuple[Any, ...], list[TensorRule]] = {}
    for row in rows:
        if row.tied_to is None:
            part = resolved.optimizers.index(resolved.optimizer_for(row.role))
            transposed = (row.role is Role.INPUT or row.name in in_out) and resolved.optimizers[part].optimizer.oriented
            key = (part, transposed, row.lr, row.weight_decay, row.eps, *row.thresholds.items())
            grouped.setdefault(key, []).append(row)
    for (part, transposed, *_), members in grouped.items():
        yield {
            "part": part,
            "transposed": transposed,
            "optimizer": members[0].optimizer,
            **{key: getattr(members[0], key) for key in ("lr", "weight_decay", "eps", "thresholds")},
            "tensors": [row.name for row in members],
        }


def _tie(network: nn.Module, name: str, other: str) -> None:
    """Let the parameter `name` be the parameter `other`."""
    module, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(module), leaf, network.get_parameter(other))


def _check_shapes(tensors: Iterable[tuple[str, torch.Tensor]], rows: tuple[TensorRule, ...]) -> None:
    """Raise ConfigError unless a network has exactly the declared tensors."""
    declared = {row.name: tuple(row.shape) for row in rows}
    actual = {name: tuple(tensor.shape) for name, tensor in tensors}
    for name in declared.keys() | actual.keys():
        if declared.get(name) != actual.get(name):
            raise ConfigError(
                f"{name}: the model declares {declared.get(name)} but its network has {actual.get(name)}: "
                "every tensor needs a row in tensors(), and every row a module"
            )


def group_records(setup: TrainingSetup) -> list[dict[str, Any]]:
    """The parameter groups as groups.json holds them."""
    return [{k: v for k, v in group.items() if k not in ("part", "transposed")} for group in setup.groups]
