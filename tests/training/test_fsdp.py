"""Sharded runs: the numbers of whole ones, a share of the memory, and checkpoints that any number of ranks can take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distributed import Pool, corpus, digest, on_all_ranks, process_of_each_rank
from test_trainer import CPU, TrainControl, run
from tiny import resolve
from torch import Tensor

from mupsweep.errors import ConfigError
from mupsweep.store.run_dir import RunDir
from mupsweep.sweep.config import load
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.sweep.tensor_rules import rules
from mupsweep.training.build import TrainingSetup, build, meta_model, parameter_groups
from mupsweep.training.checkpoint import network_state
from mupsweep.training.distributed import DistributedContext
from mupsweep.training.fsdp import OwnerOptimizer, RowOptimizer, assign_owners, local_rows, units
from mupsweep.training.session import TorchSession
from mupsweep.training.signals import StopRequested
from mupsweep.training.trainer import train

TOLERANCE = {
    "loss": 1e-5,  # relative, of any step and at the end
    "first gradient norm": 1e-6,  # relative, from equal weights
    "share": 1.2,  # numbers on the fullest rank / the mean
}
SHORT = ("training.steps=10",)
# more axes than this model's gradients have rows would leave eigenvectors to chance, whatever sums the gradients
SOAP = ("optimizer=soap", "optimizer.max_axis=16")


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    corpus()
    with process_of_each_rank() as pool:
        yield pool


def trained(ranks: DistributedContext, spec: RunSpec, path: Path, shard: bool, stops: dict[int, int]) -> dict[str, Any]:
    """Train a run until some rank is asked to stop before the step that `stops` gives it, or to its end."""
    folder, control, summary = RunDir(path), TrainControl(stop=stops.get(ranks.rank, 10**9)), None
    path.mkdir(exist_ok=True)
    setup = TorchSession(CPU, ranks, shard).build(spec)
    with contextlib.suppress(StopRequested):
        summary = train(spec, setup, corpus(), folder, CPU, control, ranks)
    return {
        "summary": summary,
        "rows": folder.metrics(),
        "metrics": folder.metrics_path.read_bytes(),
        "weights": digest(network_state(setup, ranks)),  # on rank 0
        "state": numbers(setup),
    }


def numbers(setup: TrainingSetup) -> int:
    """How many numbers of optimizer state are held here."""
    held: list[Any] = []
    for member in setup.optimizer.members:
        owned = member.owned.values() if isinstance(member, OwnerOptimizer) else ()
        held += owned or [member.optimizer if isinstance(member, RowOptimizer) else member]
    states = [state for optimizer in held for state in optimizer.state.values()]
    return sum(v.numel() for state in states for v in state.values() if isinstance(v, Tensor) and v.ndim > 0)


def whole(pool: Pool, size: int, path: Path, *overrides: str, shard: bool = True) -> dict[str, Any]:
    """Rank 0's outcome of a whole run, with what all ranks hold of the state."""
    outcomes = on_all_ranks(pool, size, trained, run(*overrides), path, shard, {})
    assert [one["summary"]["val_loss"] for one in outcomes] == [outcomes[0]["summary"]["val_loss"]] * size
    return outcomes[0] | {"states": [one["state"] for one in outcomes]}


@pytest.mark.parametrize(
    "overrides",
    [
        ("training.clip=0.01", "model.tied=true"),
        ("optimizer=muon",),
        SOAP,
        ("optimizer=sophia", "training.norm_points=2"),
        ("optimizer=muon", "optimizer.hyperball=true", "optimizer.weight_decay=0"),
        ("training.precision=bf16", "model=llama", "training.micro_batch=1"),
        pytest.param(("training.compile=true",), marks=pytest.mark.slow),
        pytest.param(("model=moe", "model.experts=4", "training.micro_batch=1"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_sharded_run_has_the_losses_of_a_whole_one_and_a_share_of_its_state(
    overrides: tuple[str, ...], pool: Pool, tmp_path: Path
) -> None:
    expected = whole(pool, 2, tmp_path / "whole", *SHORT, *overrides, shard=False)
    sharded = whole(pool, 2, tmp_path / "sharded", *SHORT, *overrides)
    assert len(sharded["rows"]) == len(expected["rows"]) == 10
    losses = [row["train_loss"] for row in expected["rows"]]
    assert [row["train_loss"] for row in sharded["rows"]] == pytest.approx(losses, rel=TOLERANCE["loss"])
    for key in ("val_loss", "val_bits_per_byte"):
        assert sharded["summary"][key] == pytest.approx(expected["summary"][key], rel=TOLERANCE["loss"])
    for row, of_whole in zip(sharded["rows"], expected["rows"], strict=True):
        assert {key: norm for key, norm in row.items() if key.startswith("norm")} == pytest.approx(
            {key: norm for key, norm in of_whole.items() if key.startswith("norm")}, rel=TOLERANCE["loss"]
        )
    if "grad_norm" in expected["rows"][0]:
        norm = expected["rows"][0]["grad_norm"]
        assert sharded["rows"][0]["grad_norm"] == pytest.approx(norm, rel=TOLERANCE["first gradient norm"])
    assert sum(sharded["states"]) == expected["states"][0] == expected["states"][1] > 0
    assert max(sharded["states"]) < TOLERANCE["share"] * sum(sharded["states"]) / 2


def test_a_mixture_is_gathered_with_all_its_experts() -> None:
    """Experts stand in a list of their own, which no unit of its own may take from the block's."""
    network, _ = meta_model(run("model=moe"))
    expected = [
        module for block in network.get_submodule("blocks").children() for module in (block.attention, block.mlp)
    ]
    assert units(network) == expected


def test_one_two_three_and_four_sharded_ranks_end_at_the_same_loss(pool: Pool, tmp_path: Path) -> None:
    """Three ranks hold rows of unequal number."""
    overrides = (*SHORT, "training.batch_size=12", "training.eval_tokens=3072")
    one = whole(pool, 1, tmp_path / "1", *overrides, shard=False)
    losses = [row["train_loss"] for row in one["rows"]]
    for size in (2, 3, 4):
        other = whole(pool, size, tmp_path / str(size), *overrides)
        assert other["summary"]["devices"] == size
        assert [row["train_loss"] for row in other["rows"]] == pytest.approx(losses, rel=TOLERANCE["loss"])
        assert other["summary"]["val_loss"] == pytest.approx(one["summary"]["val_loss"], rel=TOLERANCE["loss"])


def started(ranks: DistributedContext, *overrides: str) -> dict[str, Tensor]:
    """The rows that a rank holds at the start."""
    network = TorchSession(CPU, ranks, shard=True).build(run(*overrides)).network
    return {name: local_rows(parameter).clone() for name, parameter in network.named_parameters()}


def test_the_rows_of_all_ranks_are_the_initial_values_of_the_whole_run(pool: Pool) -> None:
    expected = build(run(), CPU).network.state_dict()
    shards = on_all_ranks(pool, 4, started)
    assert shards[0].keys() == expected.keys()
    for name, whole_tensor in expected.items():
        assert torch.equal(torch.cat([rows[name] for rows in shards]), whole_tensor)
        assert {len(rows[name]) for rows in shards} == {len(whole_tensor) // 4}


@pytest.mark.parametrize("model", ["gpt2_355m", "llama_qiu_190m"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("size", [2, 8])
def test_every_tensor_has_one_owner_and_every_owner_as_much_to_do(model: str, optimizer: str, size: int) -> None:
    resolved = resolve(f"model={model}", f"optimizer={optimizer}", "parametrization=sp")
    table = rules(resolved, resolved.size(1.0, 1.0), 0.01)
    shape_of = {row.name: torch.Size(row.shape) for row in table}
    groups = [[shape_of[name] for name in group["tensors"]] for group in parameter_groups(resolved, table)]
    shapes = [shape for group in groups for shape in group]
    group_of = [index for index, group in enumerate(groups) for _ in group]
    rounds = assign_owners(groups, size)
    owned = [[b for owners in rounds if (b := owners[rank]) is not None] for rank in range(size)]
    assert sorted(n for buckets in owned for bucket in buckets for n in bucket.numbers) == list(range(len(shapes)))
    for bucket in (bucket for buckets in owned for bucket in buckets):
        assert {group_of[number] for number in bucket.numbers} == {bucket.group}
        assert len({shapes[number] for number in bucket.numbers}) == 1
    loads = [sum(shapes[number].numel() for bucket in buckets for number in bucket.numbers) for buckets in owned]
    largest = max(shape.numel() for shape in shapes)
    assert max(loads) <= max(TOLERANCE["share"] * sum(loads) / size, largest)


def test_a_stopped_run_resumes_bit_for_bit_from_the_checkpoint_of_a_whole_run(pool: Pool, tmp_path: Path) -> None:
    overrides = ("optimizer=muon", "training.clip=null")
    straight = whole(pool, 2, tmp_path / "straight", *overrides)
    on_all_ranks(pool, 2, trained, run(*overrides), tmp_path / "stopped", True, {1: 10})
    on_all_ranks(pool, 2, trained, run(*overrides), tmp_path / "whole", False, {1: 10})
    sharded, unsharded = (
        torch.load(tmp_path / path / "checkpoint" / "latest.pt", weights_only=True) for path in ("stopped", "whole")
    )
    assert sharded.pop("seconds") > 0
    unsharded.pop("seconds")
    assert described(sharded) == described(unsharded)
    assert sharded["losses"] == pytest.approx(unsharded["losses"], rel=TOLERANCE["loss"])
    resumed = whole(pool, 2, tmp_path / "stopped", *overrides)
    assert resumed["metrics"] == straight["metrics"]
    assert resumed["weights"] == straight["weights"]


def described(tree: Any) -> Any:
    """A checkpoint with shapes instead of values of tensors and losses."""
    if isinstance(tree, dict):
        return {key: described(value) for key, value in sorted(tree.items(), key=str)}
    if isinstance(tree, list):
        return [described(value) for value in tree]
    return (tree.shape, tree.dtype, tree.device) if isinstance(tree, Tensor) else type(tree)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_goes_on_with_another_number_of_ranks_sharded_or_not(optimizer: str, pool: Pool, tmp_path: Path) -> None:
    overrides = (f"optimizer={optimizer}", "training.steps=20")
    straight = whole(pool, 1, tmp_path / "straight", *overrides, shard=False)
    on_all_ranks(pool, 2, trained, run(*overrides), tmp_path / "moved", True, {0: 5})
    on_all_ranks(pool, 1, trained, run(*overrides), tmp_path / "moved", False, {0: 5})
    on_all_ranks(pool, 4, trained, run(*overrides), tmp_path / "moved", True, {0: 3})
    moved = whole(pool, 2, tmp_path / "moved", *overrides, shard=False)
    assert [r["step"] for r in moved["rows"]] == [r["step"] for r in straight["rows"]]
    losses = [row["train_loss"] for row in straight["rows"]]
    assert [row["train_loss"] for row in moved["rows"]] == pytest.approx(losses, rel=TOLERANCE["loss"])


@pytest.mark.parametrize("launcher", ["local", "slurm"])
def test_a_run_on_one_device_cannot_be_sharded(launcher: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^launcher\.shard=true: expected launcher\.devices_per_run to be at least 2$"
    ):
        load([f"launcher={launcher}", "launcher.shard=true"])
