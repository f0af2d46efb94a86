"""Sharded runs: weights, gradients and optimizer state divided among the ranks, for what does not fit on one device.

torch's FSDP2 keeps some rows of every tensor on each rank, and whole tensors exist only while their block is computed.
Where an optimizer updates every entry by itself, a rank steps the rows that it holds. Other optimizers need whole
matrices, so every matrix has an owner, the rank that keeps its optimizer state. In a step the owners receive the rows
of their matrices, a bucket at a time, run the optimizer as on one device and send the rows back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mupsweep.optimizers.optimizer import Optimizer
from mupsweep.optimizers.optimizer_set import OptimizerSet
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.sweep.tensor_rules import clip_norm
from mupsweep.training.build import TrainingSetup, initialise, meta_model, parameter_groups
from mupsweep.training.distributed import BUCKET, DistributedContext


def build_sharded(
    run: RunSpec, device: torch.device, ranks: DistributedContext, dtype: torch.dtype | None
) -> TrainingSetup:
    """Build a sharded run with the initial values of `build`, without a whole network on any device.

    Args:
        dtype: the dtype of matrix products; None where it is that of the weights.
    """
    network, rows = meta_model(run)
    mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)  # pyright: ignore[reportArgumentType]
    # autocast would keep its copies of weights until the backward pass; a policy gathers full weights in its dtype
    # and frees them after use
    matrices = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in units(network):
        fully_shard(unit, mesh=mesh, mp_policy=matrices)
    fully_shard(network, mesh=mesh)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no average; FSDP divides the sum
    network.to_empty(device=device)
    parameters = dict(network.named_parameters())
    for row in rows:
        if row.tied_to is None:
            full = torch.empty(row.shape)
            initialise(full, row, run.seed)
            local_rows(parameters[row.name]).copy_(rows_of(full, ranks.rank, ranks.size))
    groups = list(parameter_groups(run.resolved, rows))
    optimizer = ShardedOptimizer([scaled.optimizer for scaled in run.resolved.optimizers], groups, parameters, ranks)
    return TrainingSetup(run.run_id, network, optimizer, groups, clip_norm(run.resolved), sharded=True)


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


def rows_of(full: Tensor, rank: int, size: int) -> Tensor:
    """Return the rows of a full tensor that FSDP gives to a rank of `size`: rank 0 the first rows, and so on."""
    per_rank = -(-len(full) // size)
    return full[rank * per_rank : (rank + 1) * per_rank]


def local_rows(parameter: Tensor) -> Tensor:
    """Return the rows of a parameter that this rank holds."""
    return parameter.detach().to_local()  # type: ignore[attr-defined]


def local_gradient(parameter: Tensor) -> Tensor:
    """Return the gradient of the rows of a parameter that this rank holds."""
    return torch.zeros_like(local_rows(parameter)) if parameter.grad is None else local_rows(parameter.grad)


class ShardedOptimizer(OptimizerSet):
    """The optimizers of a sharded run. `state_dict` gathers what one device would have on rank 0."""

    def __init__(
        self,
        parts: Sequence[Optimizer],
        groups: list[dict[str, Any]],
        parameters: Mapping[str, Tensor],
        ranks: DistributedContext,
    ) -> None:
        self.ranks = ranks
        super().__init__(parts, groups, parameters)

    def build(self, part: Optimizer, groups: list[dict[str, Any]]) -> Any:
        return (RowOptimizer if part.steps_shards else OwnerOptimizer)(part, groups, self.ranks)

    def own_share(self, member: int, number: int, state: dict[str, Any]) -> dict[str, Any]:
        return self.members[member].own_share(number, state)


class RowOptimizer:
    """An optimizer that updates every entry by itself: each rank steps the rows that it holds."""

    def __init__(self, part: Optimizer, groups: list[dict[str, Any]], ranks: DistributedContext) -> None:
        self.ranks = ranks
        self.parameters: list[Tensor] = [p for group in groups for p in group["params"]]
        self.rows = {p: nn.Parameter(local_rows(p)) for p in self.parameters}
        self.optimizer = part.build([group | {"params": [self.rows[p] for p in group["params"]]} for group in groups])

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def step(self) -> None:
        self._take_gradients()
        self.optimizer.step()

    def observe(self) -> None:
        self._take_gradients()
        self.optimizer.observe()  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool) -> None:
        for parameter, rows in self.rows.items():
            parameter.grad = rows.grad = None

    def state_dict(self) -> dict[str, Any]:
        saved = self.optimizer.state_dict()
        states = {number: self._gathered(number, state) for number, state in saved["state"].items()}
        return saved | {"state": states if self.ranks.is_main_process else {}}

    def own_share(self, number: int, state: dict[str, Any]) -> dict[str, Any]:
        """Return the state of this rank's rows of a parameter."""
        return {
            key: rows_of(value, self.ranks.rank, self.ranks.size).clone() if _is_entrywise(value) else value
            for key, value in state.items()
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(saved)

    def _take_gradients(self) -> None:
        for parameter, rows in self.rows.items():
            rows.data = local_rows(parameter)
            rows.grad = None if parameter.grad is None else local_rows(parameter.grad)

    def _gathered(self, number: int, state: dict[str, Any]) -> dict[str, Any]:
        """Return the state of all ranks' rows of a parameter on rank 0."""
        p: Any = self.parameters[number]
        gathered = {}
        for key, value in state.items():
            if _is_entrywise(value):
                rows = DTensor.from_local(value, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
                value = rows.full_tensor()
            gathered[key] = value.cpu() if isinstance(value, Tensor) and self.ranks.is_main_process else value
        return gathered


def _is_entrywise(value: Any) -> bool:
    """Whether an entry of an optimizer's state has a number for every entry of the parameter."""
    return isinstance(value, Tensor) and value.ndim > 0


@dataclass(frozen=True)
class Bucket:
    """Parameters of one shape and one group that a rank steps together.

    Attributes:
        numbers: the places of the parameters among all of the optimizer, as torch's state dicts number them.
    """

    group: int
    numbers: tuple[int, ...]


OwnerRound = Sequence[Bucket | None]  # the bucket that each rank steps in this round, or None


def assign_owners(groups: Sequence[Sequence[torch.Size]], size: int) -> list[OwnerRound]:
    """Assign every parameter to one of `size` ranks, with as even a load as whole matrices allow, in rounds of buckets.

    Args:
        groups: the shapes of the parameters of every group.
    """
    buckets: list[tuple[int, torch.Size, Bucket]] = []
    n_before = 0
    for index, shapes in enumerate(groups):
        numbers_of_shape = defaultdict(list)
        for number, shape in enumerate(shapes, start=n_before):
            numbers_of_shape[shape].append(number)
        n_before += len(shapes)
        for shape, numbers in numbers_of_shape.items():
            count = min(-(-len(numbers) // size), max(1, BUCKET // shape.numel()))
            for start in range(0, len(numbers), count):
                bucket = Bucket(index, tuple(numbers[start : start + count]))
                buckets.append((len(bucket.numbers) * shape.numel(), shape, bucket))
    # the largest bucket first, each to the rank with the least to do, then the least of this shape
    buckets_of_rank: list[list[Bucket]] = [[] for _ in range(size)]
    loads: list[dict[torch.Size, int]] = [defaultdict(int) for _ in range(size)]
    for numel, shape, bucket in sorted(buckets, key=lambda entry: -entry[0]):
        rank = min(range(size), key=lambda r: (sum(loads[r].values()), loads[r][shape]))
        buckets_of_rank[rank].append(bucket)
        loads[rank][shape] += numel
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


class OwnerOptimizer:
    """An optimizer that needs whole matrices: the state of each is on the rank that owns it.

    Attributes:
        owned: the optimizer of every bucket of this rank, over parameters that hold values only in their round.
    """

    def __init__(self, part: Optimizer, groups: list[dict[str, Any]], ranks: DistributedContext) -> None:
        self.ranks, self.param_groups = ranks, groups
        self.parameters: list[Tensor] = [p for group in groups for p in group["params"]]
        self.rounds = assign_owners([[p.shape for p in group["params"]] for group in groups], ranks.size)
        self.owned: dict[Bucket, torch.optim.Optimizer] = {}
        for owners in self.rounds:
            (weights,), message = self._gather(owners, local_rows)
            message.wait()
            full = [nn.Parameter(weight) for weight in weights]
            if (bucket := owners[ranks.rank]) is not None:
                self.owned[bucket] = part.build([groups[bucket.group] | {"params": full}])
            self._scatter(owners, [p.detach() for p in full]).wait()  # some optimizers rescale the init
            _free(full)

    def step(self) -> None:
        for bucket, optimizer in self.owned.items():
            optimizer.param_groups[0]["lr"] = self.param_groups[bucket.group]["lr"]
        self._for_each_owned(lambda optimizer: optimizer.step())

    def observe(self) -> None:
        self._for_each_owned(lambda optimizer: optimizer.observe())

    def zero_grad(self, set_to_none: bool) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        states: dict[int, Any] = {}
        param_groups: dict[int, dict[str, Any]] = {}
        for owners in self.rounds:
            bucket = owners[self.ranks.rank]
            for saved in self.ranks.gather_object(bucket and self._saved(bucket)):
                if saved is not None:
                    index, param_group, states_of_bucket = saved
                    param_groups[index] = param_group
                    states |= states_of_bucket
        numbers = iter(range(len(self.parameters)))
        return {
            "state": states,
            "param_groups": [
                param_groups.get(index, {}) | {"params": [next(numbers) for _ in group["params"]]}
                for index, group in enumerate(self.param_groups)
            ],
        }

    def own_share(self, number: int, state: dict[str, Any]) -> dict[str, Any]:
        """Return the state of a parameter that this rank owns; none of another's."""
        return state if any(number in bucket.numbers for bucket in self.owned) else {}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        for bucket, optimizer in self.owned.items():
            state = {i: saved["state"][number] for i, number in enumerate(bucket.numbers) if number in saved["state"]}
            param_group = saved["param_groups"][bucket.group] | {"params": list(range(len(bucket.numbers)))}
            optimizer.load_state_dict({"state": state, "param_groups": [param_group]})

    def _for_each_owned(self, act: Callable[[Any], None]) -> None:
        """Call `act` on every optimizer that this rank owns while its weights and gradients are there in full.

        The matrices of the next round, and the weights of the round before, are on their way meanwhile.
        """
        incoming = self._gather(self.rounds[0], local_rows, local_gradient)
        outgoing: Message | None = None
        for owners, next_owners in zip_longest(self.rounds, self.rounds[1:]):
            (weights, gradients), message = incoming
            message.wait()
            if next_owners is not None:
                incoming = self._gather(next_owners, local_rows, local_gradient)
            if (bucket := owners[self.ranks.rank]) is not None:
                optimizer = self.owned[bucket]
                full = optimizer.param_groups[0]["params"]
                for parameter, weight, gradient in zip(full, weights, gradients, strict=True):
                    parameter.data, parameter.grad = weight, gradient
                act(optimizer)
                weights = [parameter.data for parameter in full]
                _free(full)
            if outgoing is not None:
                outgoing.wait()
            outgoing = self._scatter(owners, weights)
        if outgoing is not None:
            outgoing.wait()

    def _gather(
        self, owners: OwnerRound, *rows_of_parameter: Callable[[Tensor], Tensor]
    ) -> tuple[list[list[Tensor]], Message]:
        """Send for the full tensors of this rank's bucket, for each function that gives the rows of a parameter."""
        own = self._parameters_of(owners[self.ranks.rank])
        full = [[torch.empty(p.shape, device=p.device) for p in own] for _ in rows_of_parameter]
        sent = [[rows(p) for rows in rows_of_parameter for p in self._parameters_of(bucket)] for bucket in owners]
        return full, self._all_to_all(sent, self._by_rank(chain(*full)))

    def _scatter(self, owners: OwnerRound, full: Sequence[Tensor]) -> Message:
        """Send every rank its rows of the full tensors of this rank's bucket, and receive this rank's rows."""
        return self._all_to_all(
            self._by_rank(full), [[local_rows(p) for p in self._parameters_of(bucket)] for bucket in owners]
        )

    def _by_rank(self, full: Iterable[Tensor]) -> list[list[Tensor]]:
        """For every rank, its rows of full tensors."""
        tensors = list(full)
        return [[rows_of(tensor, rank, self.ranks.size) for tensor in tensors] for rank in range(self.ranks.size)]

    def _all_to_all(self, sent: Sequence[Sequence[Tensor]], received: Sequence[Sequence[Tensor]]) -> Message:
        """Send the tensors `sent[r]` to every rank r; the message fills the tensors `received[r]` with what r sends."""
        flat = [tensor.flatten() for tensors in sent for tensor in tensors]
        targets = [tensor for tensors in received for tensor in tensors]
        send_buffer = torch.cat(flat) if flat else torch.empty(0, device=self.parameters[0].device)
        recv_buffer = send_buffer.new_empty(sum(target.numel() for target in targets))
        recv_counts, send_counts = (
            [sum(tensor.numel() for tensor in tensors) for tensors in by_rank] for by_rank in (received, sent)
        )
        work = dist.all_to_all_single(recv_buffer, send_buffer, recv_counts, send_counts, async_op=True)
        return Message(work, recv_buffer, targets)

    def _parameters_of(self, bucket: Bucket | None) -> list[Tensor]:
        return [self.parameters[number] for number in bucket.numbers] if bucket else []

    def _saved(self, bucket: Bucket) -> tuple[int, dict[str, Any], dict[int, Any]]:
        """Return the group's index, its entry in a state dict, and the state of this rank's parameters, on the CPU."""
        saved = self.owned[bucket].state_dict()
        states = {}
        for i, state in saved["state"].items():
            # a clone, since a view would be pickled with all the storage that it looks at
            states[bucket.numbers[i]] = {
                key: value.detach().cpu().clone() if isinstance(value, Tensor) else value
                for key, value in state.items()
            }
        return bucket.group, saved["param_groups"][0], states


def _free(full: Sequence[nn.Parameter]) -> None:
    """Free full weights and gradients, which exist only in the round of their owner."""
    for parameter in full:
        parameter.data, parameter.grad = parameter.data.new_empty(0), None
