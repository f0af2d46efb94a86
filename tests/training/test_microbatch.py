"""Micro-batches: the whole batch's gradient and loss from its pieces, and what happens when memory runs out."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_trainer import CPU, TOTAL, Result, TrainControl, assert_same, run
from torch import Tensor

from mupsweep.analysis.labels import DONE
from mupsweep.data import Dataset, prepare
from mupsweep.errors import ConfigError
from mupsweep.store.run_dir import FAILED, RunDir
from mupsweep.sweep.config import TrainingConfig
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.training import build as building
from mupsweep.training.build import TrainingSetup, build
from mupsweep.training.microbatch import MicroBatcher, free_memory, is_out_of_memory
from mupsweep.training.session import TorchSession
from mupsweep.training.signals import StopSignal
from mupsweep.training.trainer import StopRequested, mean_loss, observe_curvature, train
from mupsweep.training.worker import LeaseControl, execute_run

TOLERANCE = {
    "gradient": 2e-6,  # absolute, of gradients near 1: fp32 sums in another order
    "loss": 1e-5,  # relative, of the loss of any of 30 steps, and at their end
}


@pytest.fixture(scope="module")
def data() -> Dataset:
    return prepare(run().resolved.variant.data)


def small(setup: TrainingSetup, fits: int, begins: int = 0) -> TrainingSetup:
    """The run on a device that holds `fits` sequences, from the forward pass number `begins` on."""
    forward, calls = setup.network.forward, []

    def limited(inputs: Tensor, *others: Tensor, **named: Tensor) -> Tensor:
        calls.append(len(inputs))
        if len(inputs) > fits and len(calls) > begins:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {len(inputs)} sequences.\nMore")
        return forward(inputs, *others, **named)

    setup.network.forward = limited  # type: ignore[method-assign]
    return setup


def attempt(
    spec: RunSpec,
    data: Dataset,
    path: Path,
    control: TrainControl | None = None,
    edit: Callable[[TrainingSetup], TrainingSetup] = lambda setup: setup,
) -> Result:
    path.mkdir(exist_ok=True)
    setup, folder = edit(build(spec, CPU)), RunDir(path)
    summary = train(spec, setup, data, folder, CPU, control or TrainControl())
    return Result(setup.network.state_dict(), summary, folder.metrics_path.read_bytes())


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 100])
def test_the_gradient_and_the_loss_of_the_pieces_are_those_of_the_whole_batch(micro_batch: int, data: Dataset) -> None:
    setup = build(run("model.head_init_std=1.0"), CPU)
    tokens = torch.from_numpy(data.train_batch(32, 4, 0, 0))
    named = dict(setup.network.named_parameters())

    def gradients(batches: MicroBatcher) -> tuple[float, dict[str, Tensor]]:
        loss = batches.backward(named.values(), lambda rows: mean_loss(setup.network, "fp32", rows), tokens)
        return loss.item(), {name: p.grad.clone() for name, p in named.items() if p.grad is not None}

    (whole_loss, whole), (loss, gradient_of) = (
        gradients(MicroBatcher()),
        gradients(MicroBatcher(micro_batch=micro_batch)),
    )
    assert loss == pytest.approx(whole_loss, rel=TOLERANCE["loss"])
    assert gradient_of.keys() == whole.keys() == named.keys()
    assert max(float(g.abs().max()) for g in whole.values()) > 0.1
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient_of[name], gradient, rtol=0, atol=TOLERANCE["gradient"], msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sophia"])
def test_a_run_in_micro_batches_ends_at_the_loss_of_whole_batches(
    optimizer: str, data: Dataset, tmp_path: Path
) -> None:
    whole = attempt(run(f"optimizer={optimizer}"), data, tmp_path / "whole")
    pieces = attempt(run(f"optimizer={optimizer}", "training.micro_batch=3"), data, tmp_path / "pieces")
    assert [r["tokens"] for r in pieces.rows] == [r["tokens"] for r in whole.rows]
    losses = [r["train_loss"] for r in whole.rows]
    assert [r["train_loss"] for r in pieces.rows] == pytest.approx(losses, rel=TOLERANCE["loss"])
    assert pieces.summary["val_loss"] == pytest.approx(whole.summary["val_loss"], rel=TOLERANCE["loss"])


def test_a_micro_batch_is_no_part_of_a_runs_identity() -> None:
    assert run().run_id == run("training.micro_batch=2").run_id
    assert run().run_id != run("training.batch_size=2").run_id


def test_a_micro_batch_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^training\.micro_batch=0: expected positive$"):
        TrainingConfig(steps=1, micro_batch=0)


@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.slow), "muon", "sophia"])
def test_running_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(
    optimizer: str, data: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = attempt(run(f"optimizer={optimizer}", "training.micro_batch=2"), data, tmp_path / "asked")
    with caplog.at_level("INFO", "mupsweep"):
        forced = attempt(
            run(f"optimizer={optimizer}"), data, tmp_path / "forced", edit=lambda setup: small(setup, fits=2)
        )
    assert forced.summary.pop("micro_batch") == 2
    assert_same(asked, forced)
    assert [r.message for r in caplog.records if "memory" in r.message] == [
        "out of memory (OutOfMemoryError: CUDA out of memory. Tried to allocate 4 sequences.): "
        "going on with micro-batches of 2"
    ]


@pytest.mark.parametrize(
    ("text", "is_memory"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
        ("Triton Error [CUDA]: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`.", True),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", True),
        ("cusolver error: CUSOLVER_STATUS_NOT_INITIALIZED, when calling `cusolverDnCreate(handle)`", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'", False),  # its group is broken
    ],
)
def test_memory_that_runs_out_outside_of_the_allocator_is_known_by_its_text(text: str, is_memory: bool) -> None:
    assert is_out_of_memory(RuntimeError(text)) is is_memory


def test_making_room_frees_what_only_reference_cycles_hold(data: Dataset) -> None:
    setup = build(run(), CPU)
    setup.network.itself = [setup]  # type: ignore[assignment]
    weight = weakref.ref(next(iter(setup.network.parameters())))
    gc.collect()
    del setup
    assert weight() is not None
    free_memory()
    assert weight() is None


def test_memory_that_runs_out_within_a_step_leaves_no_half_gradient(data: Dataset) -> None:
    """The first piece of three fits, the second does not."""
    spec = run("training.micro_batch=2")
    tokens = torch.from_numpy(data.train_batch(32, 5, 0, 0))

    def gradients(setup: TrainingSetup, micro_batch: int) -> list[Tensor]:
        weights = list(setup.network.parameters())
        MicroBatcher(micro_batch=micro_batch).backward(weights, lambda r: mean_loss(setup.network, "fp32", r), tokens)
        return [p.grad for p in weights if p.grad is not None]

    forced, asked = gradients(small(build(spec, CPU), fits=1, begins=1), 2), gradients(build(spec, CPU), 1)
    assert all(torch.equal(a, b) for a, b in zip(forced, asked, strict=True))


def test_an_observed_curvature_is_that_of_smaller_pieces_when_memory_runs_out(data: Dataset) -> None:
    spec = run("optimizer=sophia")
    inputs = torch.from_numpy(data.train_batch(32, 4, 0, 0))[:, :-1]
    states = []
    for fits, micro_batch in ((2, None), (100, 2)):
        setup = small(build(spec, CPU), fits)
        observe_curvature(setup.network, setup, inputs, 0, 0, "fp32", MicroBatcher(micro_batch=micro_batch))
        states.append([s["h"] for member in setup.optimizer.members for s in member.state.values() if "h" in s])
    assert len(states[0]) > 3
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_memory_that_runs_out_late_is_remembered_over_an_interruption(data: Dataset, tmp_path: Path) -> None:
    def edit(setup: TrainingSetup) -> TrainingSetup:
        return small(setup, fits=2, begins=10)

    straight = attempt(run(), data, tmp_path / "straight", edit=edit)
    path = tmp_path / "stopped"
    with pytest.raises(StopRequested):
        attempt(run(), data, path, TrainControl(stop=20), edit=edit)
    assert torch.load(path / "checkpoint" / "latest.pt", weights_only=True)["micro_batch"] == 2
    assert_same(attempt(run(), data, path), straight)  # with more memory
    assert len(straight.rows) == TOTAL


@pytest.fixture
def broken(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The statuses of a run for which not even one sequence fits, and of a run after it in one process."""
    statuses: dict[str, object] = {}
    for fits in (0, 1):
        spec = replace(run(), run_id=f"fits-{fits}")
        monkeypatch.setattr(building, "build", lambda *a, fits=fits: small(build(*a), fits))
        folder = RunDir(tmp_path / spec.run_id)
        lease = folder.claim()
        assert lease is not None
        execute_run(
            spec, folder, TorchSession(CPU, datasets={spec.resolved.digest: data}), LeaseControl(lease, StopSignal())
        )
        lease.release()
        statuses[spec.run_id] = folder.status()
    return statuses


def test_a_run_whose_single_sequences_do_not_fit_has_failed_with_its_numbers_and_the_others_go_on(
    broken: dict[str, dict[str, str]],
) -> None:
    assert broken["fits-1"] == {"status": DONE}
    assert broken["fits-0"]["status"] == FAILED
    cost = run("training.micro_batch=1").cost
    assert broken["fits-0"]["error"] == (
        f"out of memory on cpu: {cost.parameters / 1e3:.3g}k parameters take roughly {cost.memory / 1e3:.3g}kB with "
        "one sequence at a time; use a larger device, several that share the runs of this size "
        "('launcher.sizes={w16-d2:{devices_per_run:2,shard:true}}'), fewer launcher.slots_per_device, a shorter "
        "model.context or smaller sizes "
        "(OutOfMemoryError: CUDA out of memory. Tried to allocate 1 sequences.)"
    )
