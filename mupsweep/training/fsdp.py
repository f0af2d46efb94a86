"""Sharded runs: weights, gradients and optimizer state divided among the ranks, for what does not fit on one device.

Weights and gradients are torch's FSDP2: a rank holds some rows of every tensor, and whole ones exist while a block is
computed. Optimizers want whole matrices, so every tensor has an owner, a rank that keeps its optimizer state. At a step
owners are sent the rows of their tensors, a bucket at a time, run the optimizer as on one device, and send them back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from mupsweep.optimizers.optimizer import Optimizer
from mupsweep.optimizers.optimizer_set import OptimizerSet
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.sweep.tensor_rules import TensorRule, clip_norm
from mupsweep.training.build import TrainingSetup, initialise, meta_model, parameter_groups
from mupsweep.training.distributed import BUCKET, DistributedContext, bucketed


def build_sharded(
    run: RunSpec, device: torch.device, ranks: DistributedContext, dtype: torch.dtype | None
) -> TrainingSetup:
    """As `build`, with the same initial values, and never a whole network on one device.

    Args:
        dtype: of matrix products, where it is not that of the weights.
    """
    _, rows = meta_model(run)
    network = ShardedNetwork(lambda: meta_model(run)[0], rows, device, ranks, dtype)
    for row in rows:
        if row.tied_to is None:
            whole = torch.empty(row.shape)
            initialise(whole, row, run.seed)
            network.rows(row.name).copy_(whole[network.shard_slice(row.name, ranks.rank)])
    groups = list(parameter_groups(run.recipe, rows))
    optimizer = ShardedOptimizer([part.optimizer for part in run.recipe.parts], groups, network)
    return TrainingSetup(network, optimizer, groups, clip_norm(run.recipe), network.reapply_fsdp)


@dataclass(frozen=True)
class Bucket:
    """Tensors of one shape and one group that a rank steps together."""

    group: int
    names: tuple[str, ...]


OwnerRound = Sequence[Bucket | None]  # the bucket of every rank


def owner_rounds(groups: Sequence[Mapping[str, Any]], shapes: Mapping[str, torch.Size], size: int) -> list[OwnerRound]:
    """Every tensor in one bucket of one of `size` ranks, with as many numbers for each rank as whole tensors allow."""
    buckets: list[tuple[int, torch.Size, Bucket]] = []
    for index, group in enumerate(groups):
        same_shape = defaultdict(list)
        for name in group["tensors"]:
            same_shape[shapes[name]].append(name)
        for shape, names in same_shape.items():
            count = min(-(-len(names) // size), max(1, BUCKET // shape.numel()))
            for start in range(0, len(names), count):
                piece = tuple(names[start : start + count])
                buckets.append((len(piece) * shape.numel(), shape, Bucket(index, piece)))
    piles: list[list[Bucket]] = [[] for _ in range(size)]
    loads: list[dict[Any, int]] = [defaultdict(int) for _ in range(size)]
    for numbers, shape, bucket in sorted(buckets, key=lambda entry: -entry[0]):  # the largest first
        kind = (groups[bucket.group]["part"], shape)
        rank = min(range(size), key=lambda r: (sum(loads[r].values()), loads[r][kind]))
        piles[rank].append(bucket)
        loads[rank][kind] += numbers
    return list(zip_longest(*piles))


class ShardedNetwork(nn.Module):
    """A network of which this rank holds some rows of every tensor, in order of the ranks.

    Attributes:
        shapes: of the whole tensors, without those that share another's storage.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        table: Sequence[TensorRule],
        device: torch.device,
        ranks: DistributedContext,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.make, self.device, self.ranks, self.dtype = make, device, ranks, dtype
        self.shapes = {row.name: torch.Size(row.shape) for row in table if row.tied_to is None}
        self.storage = {row.name: row.tied_to or row.name for row in table}  # the tensor that holds the values of each
        self.mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)  # pyright: ignore[reportArgumentType]
        self.sharded = {name: self._empty(name) for name in self.shapes}
        self.reapply_fsdp()

    def reapply_fsdp(self) -> None:
        """Hand the rows to FSDP anew; after an error in a pass its own bookkeeping cannot be used any more."""
        network = self.make()
        # autocast would keep its copies of weights until the backward pass; with a policy whole weights come in its
        # dtype, and go after use
        matrices = MixedPrecisionPolicy(self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for unit in _units(network):
            fully_shard(unit, mesh=self.mesh, mp_policy=matrices)
        fully_shard(network, mesh=self.mesh)
        for name, storage in self.storage.items():
            module, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(module), leaf, self.sharded[storage])
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(CheckedAllGather(self.ranks))  # type: ignore[arg-type]
                module.set_custom_reduce_scatter(CheckedReduceScatter(self.ranks))  # type: ignore[arg-type]
                module.set_gradient_divide_factor(1.0)  # a loss is already its share of the global batch's
                module.set_force_sum_reduction_for_comms(True)
        self.wrapped = [network]  # in a list, since it is no submodule: `parameters` are the rows alone

    def forward(self, *tokens: Tensor, **named: Tensor) -> Tensor:
        return self.wrapped[0](*tokens, **named)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return iter(self.sharded.values())

    def rows(self, name: str) -> Tensor:
        """This rank's rows of a tensor."""
        return self.sharded[name].detach().to_local()  # type: ignore[attr-defined]

    def gradient(self, name: str) -> Tensor:
        """The gradient of this rank's rows."""
        gradient = self.sharded[name].grad
        return torch.zeros_like(self.rows(name)) if gradient is None else gradient.to_local()  # type: ignore[attr-defined]

    def shard_slice(self, name: str, rank: int) -> slice:
        """Which rows of a tensor a rank holds."""
        n = self.shapes[name][0]
        each = -(-n // self.ranks.size)
        return slice(min(rank * each, n), min((rank + 1) * each, n))

    def gather(self, turn: OwnerRound, rows: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The whole tensors of this rank's bucket."""
        whole = {name: torch.empty(self.shapes[name], device=self.device) for name in self.owned_names(turn)}
        self._trade(
            [[rows(name) for name in bucket.names] if bucket else [] for bucket in turn],
            [[w[self.shard_slice(name, rank)] for name, w in whole.items()] for rank in range(self.ranks.size)],
        )
        return whole

    def scatter(self, turn: OwnerRound, whole: Mapping[str, Tensor]) -> None:
        """The way back: everybody's rows of this rank's bucket, and this rank's rows of everybody's."""
        self._trade(
            [
                [whole[name][self.shard_slice(name, rank)] for name in self.owned_names(turn)]
                for rank in range(self.ranks.size)
            ],
            [[self.rows(name) for name in bucket.names] if bucket else [] for bucket in turn],
        )

    def state_dict(self, *unused: Any, **named: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The whole tensors as on one device, on rank 0 and on the CPU."""
        found: dict[str, Tensor] = {}
        for names in bucketed(self.shapes, lambda name: self.shapes[name].numel()):
            for_rank_0: OwnerRound = [Bucket(0, tuple(names)), *[None] * (self.ranks.size - 1)]
            found |= {name: whole.cpu() for name, whole in self.gather(for_rank_0, self.rows).items()}
        return {name: found[storage] for name, storage in self.storage.items()} if self.ranks.is_main_process else {}

    def load_state_dict(self, state_dict: Mapping[str, Tensor], *unused: Any, **named: Any) -> None:  # type: ignore[override]
        """Take this rank's rows of the whole tensors."""
        for name in self.shapes:
            self.rows(name).copy_(state_dict[name][self.shard_slice(name, self.ranks.rank)])

    def owned_names(self, turn: OwnerRound) -> tuple[str, ...]:
        bucket = turn[self.ranks.rank]
        return () if bucket is None else bucket.names

    def _trade(self, sent: Sequence[Sequence[Tensor]], received: Sequence[Sequence[Tensor]]) -> None:
        """Send every rank some tensors, and fill others with what each of them sends."""
        flat = [tensor.flatten() for tensors in sent for tensor in tensors]
        targets = [tensor for tensors in received for tensor in tensors]
        came = self.ranks.all_to_all(
            torch.cat(flat) if flat else torch.empty(0, device=self.device),
            [sum(tensor.numel() for tensor in tensors) for tensors in sent],
            [sum(tensor.numel() for tensor in tensors) for tensors in received],
        )
        for target, part in zip(targets, came.split([target.numel() for target in targets]), strict=True):
            target.copy_(part.view_as(target))

    def _empty(self, name: str) -> nn.Parameter:
        shape, shard_slice = self.shapes[name], self.shard_slice(name, self.ranks.rank)
        local = torch.empty(shard_slice.stop - shard_slice.start, *shape[1:], device=self.device)
        stride = torch.empty(shape, device="meta").stride()
        rows = DTensor.from_local(local, self.mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        return nn.Parameter(rows)


class ShardedOptimizer(OptimizerSet):
    """The optimizers of a run, each tensor's on the rank that owns it."""

    def __init__(self, parts: Sequence[Optimizer], groups: Sequence[dict[str, Any]], network: ShardedNetwork) -> None:
        self.groups, self.network, self.ranks = groups, network, network.ranks
        self.curvature_every = [parts[group["part"]].curvature_every for group in groups]
        self.owner_rounds = owner_rounds(groups, network.shapes, self.ranks.size)
        self.parameters: dict[Bucket, dict[str, nn.Parameter]] = {}
        self.owned: dict[Bucket, OptimizerSet] = {}
        for turn in self.owner_rounds:
            whole = {name: nn.Parameter(w) for name, w in network.gather(turn, network.rows).items()}
            if (bucket := turn[self.ranks.rank]) is not None:
                group = groups[bucket.group] | {"tensors": bucket.names}
                self.parameters[bucket] = whole
                self.owned[bucket] = OptimizerSet(parts, [group], whole)
            network.scatter(turn, {name: p.detach() for name, p in whole.items()})  # some optimizers scale the start
            free_full_tensors(whole)

    def step(self, lr_factor: float) -> None:
        self._each(lambda optimizer: optimizer.step(lr_factor))

    def observe(self, step: int) -> None:
        self._each(lambda optimizer: optimizer.observe(step))

    def state_dict(self) -> list[dict[str, Any]]:
        """As on one device, on rank 0 and on the CPU; collected a turn at a time."""
        states: dict[str, Any] = {}
        groups: dict[int, dict[str, Any]] = {}
        for turn in self.owner_rounds:
            for saved in self.ranks.collect(self._saved(turn)):
                if saved is not None:
                    index, group, state = saved
                    groups[index] = group
                    states |= state
        if not self.ranks.is_main_process:
            return []
        return [
            {
                "state": {number: states[name] for name, number in numbers.items() if name in states},
                "param_groups": [
                    groups[index] | {"params": [numbers[name] for name in self.groups[index]["tensors"]]}
                    for index in indices
                ],
            }
            for indices, numbers in self._members()
        ]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        state_of: dict[str, Any] = {}
        group_of: dict[int, dict[str, Any]] = {}
        for member, (indices, numbers) in zip(states, self._members(), strict=True):
            group_of |= dict(zip(indices, member["param_groups"], strict=True))
            state_of |= {name: member["state"][number] for name, number in numbers.items() if number in member["state"]}
        for bucket, optimizer in self.owned.items():
            state = {i: state_of[name] for i, name in enumerate(bucket.names) if name in state_of}
            group = group_of[bucket.group] | {"params": list(range(len(bucket.names)))}
            optimizer.load_state_dict([{"state": state, "param_groups": [group]}])

    def _each(self, act: Callable[[OptimizerSet], None]) -> None:
        """`act` on every optimizer that this rank owns, while its weights and gradients are there, whole; the gradients
        are forgotten."""
        for turn in self.owner_rounds:
            weights = self.network.gather(turn, self.network.rows)
            gradients = self.network.gather(turn, self.network.gradient)
            for name in (name for bucket in turn if bucket for name in bucket.names):
                self.network.sharded[name].grad = None
            bucket = turn[self.ranks.rank]
            if bucket is not None:
                parameters = self.parameters[bucket]
                for name, parameter in parameters.items():
                    parameter.data, parameter.grad = weights[name], gradients[name]
                del gradients
                act(self.owned[bucket])
                weights = {name: parameter.data for name, parameter in parameters.items()}
                free_full_tensors(parameters)
            self.network.scatter(turn, weights)

    def _members(self) -> list[tuple[list[int], dict[str, int]]]:
        """Of every optimizer, as on one device: its groups, and the number by which it knows each tensor."""
        indices: dict[int, list[int]] = defaultdict(list)
        for index, group in enumerate(self.groups):
            indices[group["part"]].append(index)
        names = {part: [name for i in mine for name in self.groups[i]["tensors"]] for part, mine in indices.items()}
        return [(mine, {name: i for i, name in enumerate(names[part])}) for part, mine in sorted(indices.items())]

    def _saved(self, turn: OwnerRound) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """Of this rank's bucket: its group, that group's state, and that of each of its tensors."""
        bucket = turn[self.ranks.rank]
        if bucket is None:
            return None
        (saved,) = self.owned[bucket].state_dict()
        # clones, since a view would carry all of what it looks at
        state = {
            bucket.names[i]: {k: v.detach().cpu().clone() if isinstance(v, Tensor) else v for k, v in entries.items()}
            for i, entries in saved["state"].items()
        }
        return bucket.group, saved["param_groups"][0], state


class CheckedAllGather:
    """FSDP's all-gather, with a word before it: a rank that cannot go on leaves nobody waiting."""

    def __init__(self, ranks: DistributedContext) -> None:
        self.ranks = ranks

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        self.ranks.go_on()
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # since torch 2.13, before
        return gather(output_tensor, input_tensor, group=group, async_op=async_op)


class CheckedReduceScatter(CheckedAllGather):
    """FSDP's reduce-scatter, likewise."""

    def __call__(  # type: ignore[override]
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work | None:
        self.ranks.go_on()
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


def _units(network: nn.Module) -> list[nn.Module]:
    """What is gathered at once: the parts of every block that have matrices. All other tensors stay while they do."""
    stacks = (module for module in network.modules() if isinstance(module, nn.ModuleList))
    parts = (part for stack in stacks for block in stack for part in block.children())
    return [part for part in parts if any(p.ndim > 1 for p in part.parameters())]


def free_full_tensors(parameters: Mapping[str, nn.Parameter]) -> None:
    """Whole weights and gradients are there only at their turn."""
    for parameter in parameters.values():
        parameter.data, parameter.grad = parameter.data.new_empty(0), None
