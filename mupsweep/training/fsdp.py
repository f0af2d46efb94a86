"""Sharded runs: weights, gradients and optimizer state divided among the ranks, for what does not fit on one device.

Weights and gradients are sharded by torch's FSDP2: a rank holds some rows of every tensor, and whole tensors exist only
while their block is computed. Optimizers need whole matrices, so every tensor has an owner, the rank that keeps its
optimizer state. In a step the owners receive the rows of their tensors, a bucket at a time, run the optimizer as on one
device and send the rows back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
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
    """Build a sharded run with the initial values of `build`, without a whole network on any device.

    Args:
        dtype: the dtype of matrix products; None where it is that of the weights.
    """
    meta_network, rows = meta_model(run)
    network = ShardedNetwork(meta_network, rows, device, ranks, dtype)
    for row in rows:
        if row.tied_to is None:
            full = torch.empty(row.shape)
            initialise(full, row, run.seed)
            network.local_shard(row.name).copy_(full[network.shard_slice(row.name, ranks.rank)])
    groups = list(parameter_groups(run.resolved, rows))
    optimizer = ShardedOptimizer([scaled.optimizer for scaled in run.resolved.optimizers], groups, network)
    return TrainingSetup(run.run_id, network, optimizer, groups, clip_norm(run.resolved), sharded=True)


@dataclass(frozen=True)
class Bucket:
    """Tensors of one shape and one group that a rank steps together."""

    group: int
    names: tuple[str, ...]


OwnerRound = Sequence[Bucket | None]  # the bucket that each rank steps in this round, or None


def assign_owners(groups: Sequence[Mapping[str, Any]], shapes: Mapping[str, torch.Size], size: int) -> list[OwnerRound]:
    """Assign every tensor to one of `size` ranks, with as even a load as whole tensors allow, in rounds of buckets."""
    buckets: list[tuple[int, torch.Size, Bucket]] = []
    for index, group in enumerate(groups):
        names_of_shape = defaultdict(list)
        for name in group["tensors"]:
            names_of_shape[shapes[name]].append(name)
        for shape, names in names_of_shape.items():
            count = min(-(-len(names) // size), max(1, BUCKET // shape.numel()))
            for start in range(0, len(names), count):
                bucket_names = tuple(names[start : start + count])
                buckets.append((len(bucket_names) * shape.numel(), shape, Bucket(index, bucket_names)))
    # the largest bucket first, each to the rank with the least to do, then the least of this optimizer and shape
    buckets_of_rank: list[list[Bucket]] = [[] for _ in range(size)]
    loads: list[dict[Any, int]] = [defaultdict(int) for _ in range(size)]
    for numel, shape, bucket in sorted(buckets, key=lambda entry: -entry[0]):
        kind = (groups[bucket.group]["part"], shape)
        rank = min(range(size), key=lambda r: (sum(loads[r].values()), loads[r][kind]))
        buckets_of_rank[rank].append(bucket)
        loads[rank][kind] += numel
    return list(zip_longest(*buckets_of_rank))


@dataclass(frozen=True)
class Message:
    """What this rank is being sent.

    Attributes:
        targets: the tensors that are copied from the buffer, in order.
    """

    work: Any
    buffer: Tensor
    targets: Sequence[Tensor]

    def wait(self) -> None:
        """Fill the targets."""
        self.work.wait()
        for target, piece in zip(self.targets, self.buffer.split([t.numel() for t in self.targets]), strict=True):
            target.copy_(piece.view_as(target))


class ShardedNetwork(nn.Module):
    """A network of which this rank holds some rows of every tensor: rank 0 the first rows, and so on.

    Attributes:
        shapes: the shapes of the full tensors, without those that share the storage of another.
        storage: for every tensor, the name of the tensor that holds its values; another one's where it is tied.
    """

    def __init__(
        self,
        network: nn.Module,
        table: Sequence[TensorRule],
        device: torch.device,
        ranks: DistributedContext,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.device, self.ranks = device, ranks
        self.shapes = {row.name: torch.Size(row.shape) for row in table if row.tied_to is None}
        self.storage = {row.name: row.tied_to or row.name for row in table}
        self.mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)  # pyright: ignore[reportArgumentType]
        self.sharded = {name: self._empty(name) for name in self.shapes}
        # autocast would keep its copies of weights until the backward pass; a policy gathers full weights in its dtype
        # and frees them after use
        matrices = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for unit in units(network):
            fully_shard(unit, mesh=self.mesh, mp_policy=matrices)
        fully_shard(network, mesh=self.mesh)
        for name, storage in self.storage.items():
            module, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(module), leaf, self.sharded[storage])
        for module in network.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no average; FSDP divides the sum
        self.wrapped = [network]  # in a list, so that it is no submodule: `parameters` are the shards alone

    def forward(self, *tokens: Tensor, **named: Tensor) -> Tensor:
        return self.wrapped[0](*tokens, **named)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return iter(self.sharded.values())

    def local_shard(self, name: str) -> Tensor:
        """Return this rank's rows of a tensor."""
        return self.sharded[name].detach().to_local()  # type: ignore[attr-defined]

    def gradient(self, name: str) -> Tensor:
        """Return the gradient of this rank's rows of a tensor."""
        gradient = self.sharded[name].grad
        return torch.zeros_like(self.local_shard(name)) if gradient is None else gradient.to_local()  # type: ignore[attr-defined]

    def shard_slice(self, name: str, rank: int) -> slice:
        """Return which rows of a tensor a rank holds."""
        n_rows = self.shapes[name][0]
        per_rank = -(-n_rows // self.ranks.size)
        return slice(min(rank * per_rank, n_rows), min((rank + 1) * per_rank, n_rows))

    def gather(
        self, owners: OwnerRound, *shards_of: Callable[[str], Tensor]
    ) -> tuple[list[dict[str, Tensor]], Message]:
        """Send for the full tensors of this rank's bucket by name, for each of `shards_of`, which gives the shards."""
        full = [
            {name: torch.empty(self.shapes[name], device=self.device) for name in self.owned_names(owners)}
            for _ in shards_of
        ]
        sent = zip(*(self._shards_by_owner(owners, shard_of) for shard_of in shards_of), strict=True)
        received = zip(*(self._shards_by_rank(tensors) for tensors in full), strict=True)
        return full, self._all_to_all(
            [list(chain(*parts)) for parts in sent], [list(chain(*parts)) for parts in received]
        )

    def scatter(self, owners: OwnerRound, full: Mapping[str, Tensor]) -> Message:
        """Send every rank its rows of the full tensors of this rank's bucket, and receive this rank's shards."""
        return self._all_to_all(self._shards_by_rank(full), self._shards_by_owner(owners, self.local_shard))

    def _shards_by_owner(self, owners: OwnerRound, shard_of: Callable[[str], Tensor]) -> list[list[Tensor]]:
        """For every rank, this rank's shards of the tensors in that rank's bucket."""
        return [[shard_of(name) for name in bucket.names] if bucket else [] for bucket in owners]

    def _shards_by_rank(self, full: Mapping[str, Tensor]) -> list[list[Tensor]]:
        """For every rank, its rows of the full tensors in this rank's bucket."""
        return [[t[self.shard_slice(name, rank)] for name, t in full.items()] for rank in range(self.ranks.size)]

    def state_dict(self, *unused: Any, **named: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the full tensors as on one device: on rank 0, on the CPU."""
        full: dict[str, Tensor] = {}
        for names in bucketed(self.shapes, lambda name: self.shapes[name].numel()):
            for_rank_0: OwnerRound = [Bucket(0, tuple(names)), *[None] * (self.ranks.size - 1)]
            (gathered,), message = self.gather(for_rank_0, self.local_shard)
            message.wait()
            full |= {name: tensor.cpu() for name, tensor in gathered.items()}
        return {name: full[storage] for name, storage in self.storage.items()} if self.ranks.is_main_process else {}

    def load_state_dict(self, state_dict: Mapping[str, Tensor], *unused: Any, **named: Any) -> None:  # type: ignore[override]
        """Copy this rank's rows of the full tensors into its shards."""
        for name in self.shapes:
            self.local_shard(name).copy_(state_dict[name][self.shard_slice(name, self.ranks.rank)])

    def owned_names(self, owners: OwnerRound) -> tuple[str, ...]:
        """Return the names of the tensors in this rank's bucket."""
        bucket = owners[self.ranks.rank]
        return () if bucket is None else bucket.names

    def _all_to_all(self, sent: Sequence[Sequence[Tensor]], received: Sequence[Sequence[Tensor]]) -> Message:
        """Send the tensors `sent[r]` to every rank r; the message fills the tensors `received[r]` with what r sends."""
        flat = [tensor.flatten() for tensors in sent for tensor in tensors]
        targets = [tensor for tensors in received for tensor in tensors]
        send_buffer = torch.cat(flat) if flat else torch.empty(0, device=self.device)
        recv_buffer = send_buffer.new_empty(sum(target.numel() for target in targets))
        recv_counts, send_counts = (
            [sum(tensor.numel() for tensor in tensors) for tensors in by_rank] for by_rank in (received, sent)
        )
        work = dist.all_to_all_single(recv_buffer, send_buffer, recv_counts, send_counts, async_op=True)
        return Message(work, recv_buffer, targets)

    def _empty(self, name: str) -> nn.Parameter:
        shape, shard_slice = self.shapes[name], self.shard_slice(name, self.ranks.rank)
        local = torch.empty(shard_slice.stop - shard_slice.start, *shape[1:], device=self.device)
        stride = torch.empty(shape, device="meta").stride()
        sharded = DTensor.from_local(local, self.mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        return nn.Parameter(sharded)


class ShardedOptimizer(OptimizerSet):
    """The optimizers of a sharded run: a tensor's optimizer state is on the rank that owns the tensor."""

    def __init__(self, parts: Sequence[Optimizer], groups: Sequence[dict[str, Any]], network: ShardedNetwork) -> None:
        self.groups, self.network, self.ranks = groups, network, network.ranks
        self.observes_new_batch = any(part.observes_new_batch for part in parts)
        self.curvature_every = [parts[group["part"]].curvature_every for group in groups]
        self.owner_rounds = assign_owners(groups, network.shapes, self.ranks.size)
        self.parameters: dict[Bucket, dict[str, nn.Parameter]] = {}
        self.owned: dict[Bucket, OptimizerSet] = {}
        for owners in self.owner_rounds:
            (weights,), message = network.gather(owners, network.local_shard)
            message.wait()
            full = {name: nn.Parameter(w) for name, w in weights.items()}
            if (bucket := owners[self.ranks.rank]) is not None:
                group = groups[bucket.group] | {"tensors": bucket.names}
                self.parameters[bucket] = full
                self.owned[bucket] = OptimizerSet(parts, [group], full)
            network.scatter(owners, {n: p.detach() for n, p in full.items()}).wait()  # some optimizers rescale the init
            free_full_tensors(full)

    def step(self, lr_factor: float) -> None:
        self._for_each_owned(lambda optimizer: optimizer.step(lr_factor))

    def observe(self, step: int) -> None:
        self._for_each_owned(lambda optimizer: optimizer.observe(step))

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the state of every optimizer as on one device: on rank 0, on the CPU, gathered a round at a time."""
        states: dict[str, Any] = {}
        param_groups: dict[int, dict[str, Any]] = {}
        for owners in self.owner_rounds:
            for saved in self.ranks.gather_object(self._saved(owners)):
                if saved is not None:
                    index, param_group, state = saved
                    param_groups[index] = param_group
                    states |= state
        if not self.ranks.is_main_process:
            return []
        return [
            {
                "state": {number: states[name] for name, number in numbers.items() if name in states},
                "param_groups": [
                    param_groups[index] | {"params": [numbers[name] for name in self.groups[index]["tensors"]]}
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
            param_group = group_of[bucket.group] | {"params": list(range(len(bucket.names)))}
            optimizer.load_state_dict([{"state": state, "param_groups": [param_group]}])

    def _for_each_owned(self, act: Callable[[OptimizerSet], None]) -> None:
        """Call `act` on every optimizer that this rank owns while its weights and gradients are there in full.

        The tensors of the next round, and the weights of the round before, are on their way meanwhile. The gradients
        are freed afterwards.
        """
        incoming = self._gather(self.owner_rounds[0])
        outgoing: Message | None = None
        for owners, next_owners in zip_longest(self.owner_rounds, self.owner_rounds[1:]):
            (weights, gradients), message = incoming
            message.wait()
            if next_owners is not None:
                incoming = self._gather(next_owners)
            owned = owners[self.ranks.rank]
            if owned is not None:
                parameters = self.parameters[owned]
                for name, parameter in parameters.items():
                    parameter.data, parameter.grad = weights[name], gradients[name]
                del gradients
                act(self.owned[owned])
                weights = {name: parameter.data for name, parameter in parameters.items()}
                free_full_tensors(parameters)
            if outgoing is not None:
                outgoing.wait()
            outgoing = self.network.scatter(owners, weights)
        if outgoing is not None:
            outgoing.wait()

    def _gather(self, owners: OwnerRound) -> tuple[list[dict[str, Tensor]], Message]:
        """Send for the full weights and gradients of a round, and free the gradients of its shards."""
        full = self.network.gather(owners, self.network.local_shard, self.network.gradient)
        for bucket in owners:
            for name in bucket.names if bucket else ():
                self.network.sharded[name].grad = None
        return full

    def _members(self) -> list[tuple[list[int], dict[str, int]]]:
        """For every optimizer as on one device: the indices of its groups, and the number of each of its tensors."""
        indices_of_part: dict[int, list[int]] = defaultdict(list)
        for index, group in enumerate(self.groups):
            indices_of_part[group["part"]].append(index)
        members = []
        for _, indices in sorted(indices_of_part.items()):
            names = [name for index in indices for name in self.groups[index]["tensors"]]
            members.append((indices, {name: number for number, name in enumerate(names)}))
        return members

    def _saved(self, owners: OwnerRound) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """Return the group index of this rank's bucket, its param_group, and the state of its tensors by name."""
        bucket = owners[self.ranks.rank]
        if bucket is None:
            return None
        (saved,) = self.owned[bucket].state_dict()
        states = {}
        for number, entries in saved["state"].items():
            # a clone, since a view would be pickled with all the storage that it looks at
            states[bucket.names[number]] = {
                key: value.detach().cpu().clone() if isinstance(value, Tensor) else value
                for key, value in entries.items()
            }
        return bucket.group, saved["param_groups"][0], states


def units(network: nn.Module) -> list[nn.Module]:
    """Return the modules that FSDP gathers and frees one by one: the children of blocks that hold matrices.

    All other tensors belong to the root module, whose tensors stay gathered throughout the pass. A list within a unit,
    such as that of a mixture's experts, is part of it.
    """
    found: list[nn.Module] = []
    for stack in network.modules():
        if isinstance(stack, nn.ModuleList) and not any(stack in unit.modules() for unit in found):
            children = (child for block in stack for child in block.children())
            found += [child for child in children if any(p.ndim > 1 for p in child.parameters())]
    return found


def free_full_tensors(parameters: Mapping[str, nn.Parameter]) -> None:
    """Free full weights and gradients, which exist only in the round of their owner."""
    for parameter in parameters.values():
        parameter.data, parameter.grad = parameter.data.new_empty(0), None
