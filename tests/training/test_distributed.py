"""Distributed training: one, two and four processes train one run, and leave it together whatever happens to one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import CONTEXT, Forked
from polling import DEADLINE
from test_trainer import CPU, TOTAL, TrainControl, run
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from mupsweep.data import Dataset, prepare
from mupsweep.errors import ConfigError
from mupsweep.store.run_dir import RunDir
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep.config import load
from mupsweep.sweep.plan import plan, save
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.training import distributed, session
from mupsweep.training.build import Builder, TrainingSetup, build
from mupsweep.training.devices import choose_device, choose_devices
from mupsweep.training.distributed import DistributedContext, process_group, rank_envs
from mupsweep.training.microbatch import MicroBatcher
from mupsweep.training.signals import StopRequested, StopSignal
from mupsweep.training.slot import Slot
from mupsweep.training.trainer import data_parallel, observe_curvature, train
from mupsweep.training.worker import execute

TOLERANCE = {
    "loss": 1e-5,  # relative, of any of the 30 steps in fp32, and at their end
    "first gradient norm": 1e-6,  # relative, from equal weights
    "gradient norm": 1e-4,  # relative, of any step
    "curvature": 1e-5,  # relative to the largest entry
}
SIZES = (1, 2, 4)
WORKERS = 4
Pool = list[ProcessPoolExecutor]  # the process of each rank


@pytest.fixture(scope="module")
def pool(data: Dataset) -> Iterator[Pool]:
    with process_of_each_rank() as pool:
        yield pool


@contextlib.contextmanager
def process_of_each_rank() -> Iterator[Pool]:
    """Processes that share nothing but a store, forked from a clean one that has imported what takes seconds.

    A process keeps its rank, as those of a run do: torch remembers which rows of a tensor are a process's own.
    """
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(ProcessPoolExecutor(1, mp_context=CONTEXT)) for _ in range(WORKERS)]


@pytest.fixture(scope="module")
def data() -> Dataset:
    return corpus()


@cache
def corpus() -> Dataset:
    return prepare(run().resolved.variant.data)


def joined(rank: int, size: int, port: int, job: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Run a job as one rank."""
    torch.set_num_threads(1)
    env = rank_envs(size, port)[rank] if size > 1 else {}
    os.environ.update(env)
    with process_group(env, CPU) as ranks:
        return job(ranks, *arguments)


def on_all_ranks(pool: Pool, size: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `job` returns on each rank."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    futures = [pool[rank].submit(joined, rank, size, store.port, job, arguments) for rank in range(size)]
    return [future.result() for future in futures]


def digest(weights: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights.values())).hexdigest()


def trained(ranks: DistributedContext, spec: RunSpec, path: Path, stops: dict[int, int]) -> dict[str, Any]:
    """Train a run until some rank is asked to stop before the step that `stops` gives it, or to its end."""
    folder = RunDir(path)
    path.mkdir(exist_ok=True)
    setup = build(spec, CPU)
    control = TrainControl(stop=stops.get(ranks.rank, 10**9))
    summary = None
    with contextlib.suppress(StopRequested):
        summary = train(spec, setup, corpus(), folder, CPU, control, ranks)
    return {"summary": summary, "weights": digest(setup.network.state_dict()), "asked": control.asked}


def whole(pool: Pool, size: int, path: Path, *overrides: str) -> dict[str, Any]:
    """Rank 0's outcome of a whole run, with the rows of its metrics; all ranks have the same weights."""
    outcomes = on_all_ranks(pool, size, trained, run(*overrides), path, {})
    assert len({one["weights"] for one in outcomes}) == 1
    assert [one["summary"]["val_loss"] for one in outcomes] == [outcomes[0]["summary"]["val_loss"]] * size
    return outcomes[0] | {"rows": RunDir(path).metrics(), "metrics": RunDir(path).metrics_path.read_bytes()}


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), marks=pytest.mark.slow),
        ("optimizer=muon_plus_plus", "optimizer.weight_decay=0"),  # bf16 in Muon's would magnify rounding
        pytest.param(("optimizer=sophia",), marks=pytest.mark.slow),
        ("training.clip=0.01",),
    ],
)
def test_one_two_and_four_ranks_see_the_same_batches_and_end_at_the_same_loss(
    overrides: tuple[str, ...], pool: Pool, tmp_path: Path
) -> None:
    one, *others = (whole(pool, size, tmp_path / str(size), *overrides) for size in SIZES)
    assert len(one["rows"]) == TOTAL
    for size, other in zip(SIZES[1:], others, strict=True):
        assert other["summary"]["devices"] == size
        for key in ("tokens", "lr", "step"):
            assert [r[key] for r in other["rows"]] == [r[key] for r in one["rows"]]
        losses, norms = ([r[key] for r in one["rows"]] for key in ("train_loss", "grad_norm"))
        assert [r["train_loss"] for r in other["rows"]] == pytest.approx(losses, rel=TOLERANCE["loss"])
        assert [r["grad_norm"] for r in other["rows"]] == pytest.approx(norms, rel=TOLERANCE["gradient norm"])
        assert other["rows"][0]["grad_norm"] == pytest.approx(norms[0], rel=TOLERANCE["first gradient norm"])
        assert other["summary"]["val_loss"] == pytest.approx(one["summary"]["val_loss"], rel=TOLERANCE["loss"])
        assert other["summary"]["val_bits_per_byte"] == pytest.approx(
            one["summary"]["val_bits_per_byte"], rel=TOLERANCE["loss"]
        )


def test_ranks_and_micro_batches_combine(pool: Pool, tmp_path: Path) -> None:
    one = whole(pool, 1, tmp_path / "one", "training.batch_size=8")
    two = whole(pool, 2, tmp_path / "two", "training.batch_size=8", "training.micro_batch=3")
    assert two["summary"]["val_loss"] == pytest.approx(one["summary"]["val_loss"], rel=TOLERANCE["loss"])


@pytest.mark.parametrize("size", SIZES)
def test_the_rows_of_all_ranks_are_the_global_batch(size: int, data: Dataset) -> None:
    batch = data.train_batch(32, 4, 0, 7)
    assert np.array_equal(
        np.concatenate([DistributedContext(rank, size).local_shard(batch) for rank in range(size)]), batch
    )


def test_a_batch_that_cannot_be_divided_is_refused_in_one_line(data: Dataset) -> None:
    with pytest.raises(ConfigError, match=r"^training\.batch_size=4 cannot be divided among 3 devices: .*$"):
        DistributedContext(0, 3).local_shard(data.train_batch(32, 4, 0, 0))
    with pytest.raises(ConfigError, match=r"^training\.batch_size=4 cannot .* launcher\.devices_per_run=3: .*$"):
        plan(load(["experiment=smoke", "launcher=local", "launcher.devices_per_run=3"]))


def observed(ranks: DistributedContext) -> tuple[Tensor, list[Tensor]]:
    """(the draws that this rank's labels come from, the curvature after them)."""
    setup = build(run("optimizer=sophia"), CPU)
    parallel, _ = data_parallel(setup, ranks, find_unused=False)
    inputs = torch.from_numpy(corpus().train_batch(32, 4, 0, 0))[:, :-1]
    seen = []

    def network(inputs: Tensor, draws: Tensor) -> Tensor:
        seen.append(draws)
        return parallel(inputs, draws=draws)

    observe_curvature(network, setup, ranks.local_shard(inputs), 0, 10, "fp32", MicroBatcher(ranks))
    return torch.cat(seen), [s["h"] for m in setup.optimizer.members for s in m.state.values() if "h" in s]


def test_sampled_labels_and_the_curvature_are_those_of_the_whole_batch(pool: Pool) -> None:
    ((draws, curvature),) = on_all_ranks(pool, 1, observed)
    for size in SIZES[1:]:
        observations = on_all_ranks(pool, size, observed)
        assert torch.equal(torch.cat([local_draws for local_draws, _ in observations]), draws)
        for _, state in observations:
            assert len(state) == len(curvature) > 3
            for h, w in zip(state, curvature, strict=True):
                assert float(w.max()) > 0
                assert float((h - w).abs().max()) <= TOLERANCE["curvature"] * float(w.max())


@pytest.mark.parametrize(("optimizer", "size"), [("adamw", 4), ("muon", 2)])  # the order of a sum shows from three on
def test_a_stop_that_reaches_one_rank_stops_all_at_the_same_step_and_resumes_bit_for_bit(
    optimizer: str, size: int, pool: Pool, tmp_path: Path
) -> None:
    overrides = (f"optimizer={optimizer}",)
    straight = whole(pool, size, tmp_path / "straight", *overrides)
    outcomes = on_all_ranks(pool, size, trained, run(*overrides), tmp_path / "stopped", {1: 10})
    assert [one["asked"] for one in outcomes] == [12] * size  # asked before step 10, they stop before step 11
    assert [one["summary"] for one in outcomes] == [None] * size
    assert torch.load(tmp_path / "stopped" / "checkpoint" / "latest.pt", weights_only=True)["step"] == 11
    resumed = whole(pool, size, tmp_path / "stopped", *overrides)
    assert resumed["metrics"] == straight["metrics"]
    assert resumed["weights"] == straight["weights"]


def test_a_run_goes_on_with_another_number_of_ranks(pool: Pool, tmp_path: Path) -> None:
    straight = whole(pool, 1, tmp_path / "straight")
    on_all_ranks(pool, 4, trained, run(), tmp_path / "moved", {0: 10})
    on_all_ranks(pool, 1, trained, run(), tmp_path / "moved", {0: 10})
    moved = whole(pool, 2, tmp_path / "moved")
    assert [r["step"] for r in moved["rows"]] == [r["step"] for r in straight["rows"]]
    assert moved["summary"]["val_loss"] == pytest.approx(straight["summary"]["val_loss"], rel=TOLERANCE["loss"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_main_process_alone_reads_a_checkpoint(optimizer: str, pool: Pool, tmp_path: Path) -> None:
    overrides = (f"optimizer={optimizer}", "training.steps=12")
    straight = whole(pool, 2, tmp_path / "straight", *overrides)
    on_all_ranks(pool, 2, apart, run(*overrides), tmp_path, {0: 5})
    assert not (tmp_path / "1" / "checkpoint").exists()
    resumed = on_all_ranks(pool, 2, apart, run(*overrides), tmp_path, {})
    assert [one["weights"] for one in resumed] == [straight["weights"]] * 2
    assert RunDir(tmp_path / "0").metrics_path.read_bytes() == straight["metrics"]


def apart(ranks: DistributedContext, spec: RunSpec, path: Path, stops: dict[int, int]) -> dict[str, Any]:
    """Train a run of which every rank sees a folder of its own, so that rank 0 alone finds a checkpoint."""
    return trained(ranks, spec, path / str(ranks.rank), stops)


def in_one_network(ranks: DistributedContext, specs: list[RunSpec], path: Path) -> list[tuple[str, int]]:
    """Train runs one after the other as a worker does; the weights after each, and the number of graphs by then."""
    builder, counter, outcomes = Builder(CPU), CompileCounter(), []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's compiler warns of its own parts
        patch.setattr(torch, "compile", partial(torch.compile, backend=counter))
        for number, spec in enumerate(specs):
            folder = RunDir(path / f"{ranks.rank} {number}")
            folder.path.mkdir(parents=True)
            setup = builder.build(spec)
            train(spec, setup, corpus(), folder, CPU, TrainControl(), ranks)
            outcomes.append((digest(setup.network.state_dict()), counter.frame_count))
    return outcomes


def test_runs_of_one_size_share_a_network_that_is_compiled_once(pool: Pool, tmp_path: Path) -> None:
    short = ("training.compile=true", "training.steps=4", "training.eval_tokens=128", "model.depth=1")
    before, spec = run(*short, "sweep.log2_lrs=[-5]", "sweep.seeds=[1]"), run(*short)
    together = on_all_ranks(pool, 2, in_one_network, [before, spec], tmp_path / "together")
    alone = on_all_ranks(pool, 2, in_one_network, [spec], tmp_path / "alone")
    assert together[0] == together[1]
    (_, graphs_of_first), (weights, graphs) = together[0]
    assert graphs == graphs_of_first > 0
    assert alone == [[(weights, graphs)]] * 2


TWO_RUNS = [
    *("experiment=smoke", "training.precision=fp32", "training.steps=8", "training.checkpoint_minutes=0"),
    *("sweep.width_ratios=[1]", "sweep.log2_lrs=[-7,-6]"),
]


def faulty_rank(local_rank: int, environments: Any, sweep: SweepDir, slot: Slot) -> None:
    """A rank that a supervisor started, to which the accident happens that the sweep's folder describes."""
    accident = json.loads((sweep.path / "accident.json").read_text())
    train, calls = session.train, []

    def trained(spec: RunSpec, setup: TrainingSetup, *others: Any) -> dict[str, Any]:
        forward = setup.network.forward

        def failing(*tensors: Tensor, **named: Tensor) -> Tensor:
            calls.append(0)
            if accident["kind"] == "memory" and len(tensors[0]) > 1:
                raise torch.OutOfMemoryError("too many")
            if accident["kind"] == "error" and len(calls) > 3:
                raise ValueError("within a step")
            again = accident["kind"] == "always killed" or not sweep.run(spec.run_id).failures()
            if accident["kind"].endswith("killed") and len(calls) > 3 and again:
                os.kill(os.getpid(), signal.SIGKILL)
            return forward(*tensors, **named)

        with pytest.MonkeyPatch.context() as patch:  # the next run has the same network
            if spec.run_id == accident["run_id"]:
                patch.setattr(setup.network, "forward", failing)
            return train(spec, setup, *others)

    if local_rank == accident["rank"]:
        session.train = trained
    REAL_RANK(local_rank, environments, sweep, slot)


REAL_RANK = session.run_rank


def accident(
    kind: str, rank: int, monkeypatch: pytest.MonkeyPatch, *overrides: str, shard: bool = False
) -> tuple[SweepDir, RunDir, RunDir]:
    """Train two runs on two ranks, of which one has an accident in the first run; return the sweep and the runs."""
    forkserver.ensure_running()
    monkeypatch.setattr(session, "run_rank", faulty_rank)
    sweep, (first, second) = save(load([*TWO_RUNS, *overrides]), "")
    (sweep.path / "accident.json").write_text(json.dumps({"kind": kind, "rank": rank, "run_id": first.run_id}))
    assert execute(sweep, Slot(device="cpu,cpu", shard=shard), stop=StopSignal())
    return sweep, sweep.run(first.run_id), sweep.run(second.run_id)


def deaths(folder: RunDir) -> int:
    """How many workers ended in the middle of a run."""
    return sum("released" not in json.loads(path.read_text()) for path in folder.claims.glob("*.json"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The metrics of both runs where nothing happens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("undisturbed"))
        _, *runs = accident("none", 0, patch)
        return [folder.metrics_path.read_bytes() for folder in runs]


@pytest.mark.parametrize(("rank", "shard"), [(0, False), (1, False), pytest.param(1, True, marks=pytest.mark.slow)])
def test_a_run_that_fails_three_times_has_failed_with_the_reason_of_its_rank_and_the_next_one_is_trained(
    rank: int, shard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, failed, other = accident("error", rank, monkeypatch, shard=shard)
    assert failed.status() == {"status": "failed", "error": f"rank {rank}: ValueError: within a step"}
    assert failed.failure() is None  # the next command tries as often again
    assert other.status() == {"status": "done"}
    assert [deaths(failed), deaths(other)] == [3, 0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_loses_nothing(rank: int, undisturbed: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    _, *runs = accident("killed", rank, monkeypatch)
    assert [folder.metrics_path.read_bytes() for folder in runs] == undisturbed
    assert [deaths(folder) for folder in runs] == [1, 0]
    assert "resuming at step " in runs[0].log_path.read_text()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_always_killed_is_named_and_not_the_others_that_lost_it(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, failed, other = accident("always killed", rank, monkeypatch)
    assert failed.status() == {"status": "failed", "error": f"rank {rank} was ended by SIGKILL"}
    assert other.status() == {"status": "done"}


def test_a_run_whose_failure_cannot_be_recorded_ends_its_ranks_in_one_line() -> None:
    """Rank 0 cannot write a checkpoint; it must not go on to the next run, which the others would not follow."""
    sweep, (first, _) = save(load(TWO_RUNS), "")
    in_the_way = sweep.run(first.run_id).checkpoints[0].parent
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()
    worker = Forked("worker", str(sweep.path), "--device", "cpu,cpu")
    try:
        _, err = worker.communicate(DEADLINE)
    finally:
        worker.kill()
    assert worker.returncode == 2
    assert err.splitlines()[-1].startswith(f"mupsweep: cannot make the folder {in_the_way}: File exists; ")


def test_an_error_between_runs_ends_the_other_ranks_and_leaves_none_to_be_killed() -> None:
    sweep, _ = save(load(TWO_RUNS), "")
    worker = Forked("worker", str(sweep.path), "unknown", "--device", "cpu,cpu")
    _, err = worker.communicate(DEADLINE)
    assert worker.returncode == 2
    assert "mupsweep: no run 'unknown' in this sweep; " in err
    assert "SIGKILL" not in err


@pytest.mark.parametrize("shard", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_memory_that_runs_out_on_one_rank_halves_the_micro_batch_of_all(
    shard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, forced, _ = accident("memory", 1, monkeypatch, shard=shard)
    assert (forced.summary() or {})["micro_batch"] == 1
    _, asked, _ = accident("none", 1, monkeypatch, "training.micro_batch=1", "out=asked", shard=shard)
    assert forced.metrics_path.read_bytes() == asked.metrics_path.read_bytes()
    assert [deaths(forced), deaths(asked)] == [1, 0]


def test_nccl_sums_as_much_as_it_ever_will_while_the_device_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL takes memory beside torch's allocator, algorithm by algorithm, when it first uses one."""
    done: list[object] = []
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, **_: done.append(backend))
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda tensor: done.append((len(tensor), str(tensor.device))))
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(distributed, "rendezvous", lambda _: iter([(None, 1, 2)]))
    with FakeTensorMode(), process_group(rank_envs(2, 1)[1], torch.device("cuda:1")):
        assert done == ["cpu:gloo,cuda:nccl", (distributed.BUCKET, "cuda:1")]


def test_no_rank_takes_memory_on_the_device_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("a context of half a GB"))
    assert [str(d) for d in choose_devices("cuda:4,cuda:5")] == ["cuda:4", "cuda:5"]
    assert [str(d) for d in choose_devices("cuda", 2)] == ["cuda:0", "cuda:1"]
    with pytest.raises(ConfigError, match=r"^device cuda:0,cuda: each rank of a run needs a GPU of its own$"):
        choose_devices("cuda:0,cuda")
    assert str(choose_device("cuda")) == "cuda:0"


def test_a_process_that_was_given_one_gpu_of_several_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # as Slurm's --gpus-per-task sets it for each process of a run
    for device in ("cuda:0,cuda:1", "cuda", "auto"):
        assert [str(d) for d in choose_devices(device, 2)] == ["cuda:0", "cuda:0"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")  # two processes of a machine with one GPU
    with pytest.raises(ConfigError, match=r"^device cuda: a run takes several CUDA devices that are there"):
        choose_devices("cuda", 2)


@pytest.mark.parametrize("device", ["cpu,cuda:0", "cpu,gpu7", "meta,meta"])
def test_devices_that_cannot_train_one_run_together_are_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=rf"^device ({device}|gpu7|meta)[: ]"):
        choose_devices(device)
