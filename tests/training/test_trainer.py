"""One run: the same bits twice and across interruptions, divergence as a result, schedules, evaluation, records."""

from __future__ import annotations

import io
import itertools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from mupsweep.data import Dataset, prepare, tokenizers
from mupsweep.store.matrix_norms import in_row
from mupsweep.store.run_dir import RunDir
from mupsweep.sweep import config
from mupsweep.sweep.config import TrainingConfig
from mupsweep.sweep.plan import plan
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.training import trainer as loop
from mupsweep.training.build import Builder, build
from mupsweep.training.devices import choose_precision
from mupsweep.training.norm_tracker import matrix_norm
from mupsweep.training.session import TorchSession
from mupsweep.training.signals import StopSignal
from mupsweep.training.trainer import StopRequested, compiled, diverged_at, lr_factor, train
from mupsweep.training.worker import LeaseControl, execute_run

TOLERANCE = {
    "schedule": 1e-12,
    "evaluation": 2e-6,  # relative: fp32 losses against float64 sums
    "gradient norm": 1e-5,  # relative, fp32
    "norm": 1e-6,  # relative: singular values of fp32 numbers in float64
    "bf16": 0.02,  # relative, of a loss after 30 steps
}
CPU = torch.device("cpu")
CLOCK = ("seconds", "tokens_per_second")  # what may differ between two equal runs
TOTAL = 30  # steps of experiment=smoke
NEVER = 10**9


@cache
def run(*overrides: str) -> RunSpec:
    """The one run of a tiny sweep: width 16, depth 2, 30 steps of 4 x 32 bytes, fp32."""
    tiny = ["experiment=smoke", "training.precision=fp32", "sweep.width_ratios=[1]", "sweep.log2_lrs=[-6]"]
    (spec,) = plan(config.load([*tiny, "optimizer.weight_decay=0.1", *overrides]))
    return spec


@pytest.fixture(scope="module")
def data() -> Dataset:
    return prepare(run().resolved.variant.data)


class Killed(Exception):
    """Raised in the place of a process that dies without writing anything."""


@dataclass
class TrainControl:
    """Asks to stop before step `stop`, dies after step `kill` (both count this attempt's steps from 0)."""

    stop: int = NEVER
    kill: int = NEVER
    asked: int = 0

    def stop_requested(self) -> bool:
        self.asked += 1
        return self.asked > self.stop

    def lease_lost(self) -> bool:
        if self.asked > self.kill + 1:
            raise Killed
        return False


@dataclass
class Result:
    weights: dict[str, Tensor]
    summary: dict[str, Any]
    metrics: bytes

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.metrics.decode().splitlines()]


def attempt(spec: RunSpec, data: Dataset, path: Path, control: TrainControl | None = None) -> Result:
    """Train in `path`, going on from what is there."""
    path.mkdir(exist_ok=True)
    setup, folder = build(spec, CPU), RunDir(path)
    summary = train(spec, setup, data, folder, CPU, control or TrainControl())
    return Result(setup.network.state_dict(), summary, folder.metrics_path.read_bytes())


def assert_same(a: Result, b: Result) -> None:
    """Equal bit for bit, but for the clock."""
    assert a.metrics == b.metrics
    assert a.weights.keys() == b.weights.keys()
    for name, w in a.weights.items():
        assert torch.equal(w, b.weights[name]), name
    assert a.summary.keys() == b.summary.keys()
    for key in a.summary.keys() - set(CLOCK):
        assert a.summary[key] == b.summary[key], key


def checkpoint(path: Path, name: str = "latest.pt") -> Path:
    return path / "checkpoint" / name


# Determinism.


@pytest.mark.parametrize("overrides", [(), ("optimizer=muon",), ("optimizer=sgd",), ("training.precision=bf16",)])
def test_the_same_run_twice_is_bit_identical(overrides: tuple[str, ...], data: Dataset, tmp_path: Path) -> None:
    first, second = (attempt(run(*overrides), data, tmp_path / name) for name in ("a", "b"))
    assert_same(first, second)
    assert len(first.rows) == TOTAL
    assert first.summary["status"] == "done"
    assert first.summary["val_loss"] < first.rows[0]["train_loss"]
    for key in CLOCK:
        assert first.summary[key] > 0


def test_what_only_decides_how_often_to_log_or_save_changes_no_number(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = attempt(run(), data, tmp_path / "a")
    often = attempt(run("training.checkpoint_minutes=0"), data, tmp_path / "b")
    assert_same(straight, often)
    monkeypatch.setattr(loop, "METRICS_ROWS", 7)
    seldom = attempt(run(), data, tmp_path / "c")
    for name, w in straight.weights.items():
        assert torch.equal(w, seldom.weights[name]), name
    assert straight.summary["val_loss"] == seldom.summary["val_loss"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sophia"])
@pytest.mark.parametrize("stops", [(10,), (1, 1, 27), (29,), (0, 5)], ids=str)
def test_interrupted_and_resumed_equals_uninterrupted(
    optimizer: str, stops: tuple[int, ...], data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "METRICS_ROWS", 10)  # a row every three steps, so that stops fall between rows
    spec = run(f"optimizer={optimizer}", "training.evals=2")
    straight = attempt(spec, data, tmp_path / "straight")
    path = tmp_path / "stopped"
    done = 0
    for steps in stops:
        with pytest.raises(StopRequested):
            attempt(spec, data, path, TrainControl(stop=steps))
        done += steps
        assert checkpoint(path).exists() == (done > 0)
        if done:
            saved = torch.load(checkpoint(path), weights_only=True)
            assert (saved["step"], len(saved["losses"])) == (done, done)
        assert len(RunDir(path).metrics()) == done // 3
    assert_same(attempt(spec, data, path), straight)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_and_resumed_equals_uninterrupted(
    optimizer: str, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows after the last checkpoint are spec anew, not twice."""
    monkeypatch.setattr(loop, "METRICS_ROWS", 10)
    spec = run(f"optimizer={optimizer}")
    straight = attempt(spec, data, tmp_path / "straight")
    path = tmp_path / "killed"
    with pytest.raises(StopRequested):
        attempt(spec, data, path, TrainControl(stop=10))
    with pytest.raises(Killed):
        attempt(spec, data, path, TrainControl(kill=9))
    assert [row["step"] for row in RunDir(path).metrics()] == [3, 6, 9, 12, 15, 18]
    assert_same(attempt(spec, data, path), straight)


def test_killed_while_writing_a_row_and_resumed_equals_uninterrupted(data: Dataset, tmp_path: Path) -> None:
    spec = run()
    straight = attempt(spec, data, tmp_path / "straight")
    path = tmp_path / "killed"
    with pytest.raises(StopRequested):
        attempt(spec, data, path, TrainControl(stop=10))
    with RunDir(path).metrics_path.open("a") as file:
        file.write('{"step": 11, "tok')
    assert_same(attempt(spec, data, path), straight)


def test_killed_before_any_checkpoint_starts_afresh(data: Dataset, tmp_path: Path) -> None:
    spec = run()
    with pytest.raises(Killed):
        attempt(spec, data, tmp_path / "killed", TrainControl(kill=7))
    assert_same(attempt(spec, data, tmp_path / "killed"), attempt(spec, data, tmp_path / "straight"))


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(share * len(content))]


def without(key: str) -> Callable[[bytes], bytes]:
    """Remove a key from a checkpoint, as another version may lack it."""

    def edit(content: bytes) -> bytes:
        saved = torch.load(io.BytesIO(content), weights_only=True)
        del saved[key]
        file = io.BytesIO()
        torch.save(saved, file)
        return file.getvalue()

    return edit


def of_another_shape(content: bytes) -> bytes:
    saved = torch.load(io.BytesIO(content), weights_only=True)
    saved["network"]["blocks.1.mlp.up.weight"] = torch.zeros(3, 3)
    file = io.BytesIO()
    torch.save(saved, file)
    return file.getvalue()


DAMAGE = {
    "empty": cut(0.0),
    "half": cut(0.5),
    "one byte short": lambda content: content[:-1],
    "garbage": lambda content: b"garbage" * 1000,
    "zeros": lambda content: bytes(len(content)),
    "no network": without("network"),
    "no optimizer": without("optimizer"),
    "no step": without("step"),
    "another shape": of_another_shape,
}


@pytest.fixture(scope="module")
def straight(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return attempt(run(), data, tmp_path_factory.mktemp("straight"))


@pytest.fixture(scope="module")
def killed_once(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint after each step that died before its thirteenth step."""
    path = tmp_path_factory.mktemp("killed")
    with pytest.raises(Killed):
        attempt(run("training.checkpoint_minutes=0"), data, path, TrainControl(kill=12))
    files = checkpoint(path), checkpoint(path, "previous.pt")
    assert [torch.load(file, weights_only=True)["step"] for file in files] == [12, 11]
    return path


@pytest.fixture
def killed(killed_once: Path, tmp_path: Path) -> Path:
    """A copy of the killed run, to damage."""
    return shutil.copytree(killed_once, tmp_path / "run")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    damage: str,
    data: Dataset,
    straight: Result,
    killed: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    checkpoint(killed).write_bytes(DAMAGE[damage](checkpoint(killed).read_bytes()))
    with caplog.at_level("INFO", "mupsweep"):
        resumed = attempt(run(), data, killed)
    assert "latest.pt is damaged" in caplog.text
    assert "resuming at step 11 from previous.pt" in caplog.text
    assert_same(resumed, straight)


@pytest.mark.parametrize("damage", DAMAGE)
def test_two_damaged_checkpoints_are_a_fresh_start(
    damage: str, data: Dataset, straight: Result, killed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("latest.pt", "previous.pt"):
        checkpoint(killed, name).write_bytes(DAMAGE[damage](checkpoint(killed, name).read_bytes()))
    resumed = attempt(run(), data, killed)
    assert "latest.pt is damaged" in caplog.text
    assert "previous.pt is damaged" in caplog.text
    assert_same(resumed, straight)


def test_a_missing_latest_checkpoint_falls_back_to_the_one_before(
    data: Dataset, straight: Result, killed: Path
) -> None:
    """A kill between the two renames of a save leaves no latest checkpoint."""
    checkpoint(killed).unlink()
    assert_same(attempt(run(), data, killed), straight)


# Divergence.


@pytest.mark.parametrize(("optimizer", "log2_lr"), [("adamw", 6), ("muon", 10), ("sgd", 40)])
def test_a_huge_lr_diverges_and_is_recorded_with_its_step(
    optimizer: str, log2_lr: int, data: Dataset, tmp_path: Path
) -> None:
    spec = run(f"optimizer={optimizer}", f"sweep.log2_lrs=[{log2_lr}]")
    result = attempt(spec, data, tmp_path / "run")
    assert result.summary["status"] == "diverged"
    assert 1 <= result.summary["diverged_at_step"] <= result.summary["steps"] <= TOTAL
    assert result.summary["val_loss"] is None
    assert result.summary["val_bits_per_byte"] is None
    assert result.rows[-1]["step"] == result.summary["steps"]


def test_the_step_of_divergence_does_not_depend_on_how_often_it_is_looked_for(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = run("optimizer=sgd", "sweep.log2_lrs=[40]")
    at_each_step = attempt(spec, data, tmp_path / "a").summary
    monkeypatch.setattr(loop, "METRICS_ROWS", 3)
    seldom = attempt(spec, data, tmp_path / "b").summary
    assert at_each_step["diverged_at_step"] == seldom["diverged_at_step"] < 10
    assert seldom["steps"] == 10


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_a_tiny_lr_is_slow_and_not_diverged(optimizer: str, data: Dataset, tmp_path: Path) -> None:
    spec = run(f"optimizer={optimizer}", "sweep.log2_lrs=[-40]")
    result = attempt(spec, data, tmp_path / "run")
    assert (result.summary["status"], result.summary["diverged_at_step"]) == ("done", None)
    start = result.rows[0]["train_loss"]
    assert result.summary["val_loss"] == pytest.approx(start, rel=0.01)
    assert start == pytest.approx(math.log(spec.size.vocab_size), rel=0.01)


@pytest.mark.parametrize(
    ("losses", "patience", "total", "step"),
    [
        ([4.0, 3.0, 2.0], 0.1, 100, None),
        ([4.0, 3.0, math.inf, 3.0], 0.1, 100, 3),
        ([4.0, math.nan], 0.1, 100, 2),
        ([math.nan], 0.1, 100, 1),
        ([4.0] + [4.8] * 9, 0.1, 100, None),  # not yet as long as the patience
        ([4.0] + [4.8] * 10, 0.1, 100, 11),
        ([4.0] + [4.1] * 90, 0.1, 100, None),  # within the noise of a batch
        ([4.0] + [3.0] * 50 + [4.8] * 10, 0.1, 100, 61),
        ([4.0] + [3.0] * 50 + [4.8] * 5 + [3.0] * 5, 0.1, 100, None),  # a spike that heals
        # AdamW at depth 8 without norm layers, 150 steps: the mean of 15 losses is 8 % above the first
        ([5.54] * 4 + [5.51, 5.49, 5.46, 5.39, 5.25, 4.84, 3.98, 5.79, 8.16, 9.42, 8.55, 4.77], 0.1, 150, None),
        ([4.0] + [4.8] * 4, 5, 100, None),
        ([4.0] + [4.8] * 5, 5, 100, 6),
        ([4.0] + [4.0] * 99, 0.1, 100, None),
        ([4.0, 5.0], 0.1, 5, 2),
        ([], 0.1, 100, None),
    ],
)
def test_a_loss_above_its_start_for_the_patience_is_divergence(
    losses: list[float], patience: float, total: int, step: int | None
) -> None:
    assert diverged_at(losses, patience, total) == step


# Schedules.

GOLDEN = {
    # steps 0..9 of 10, two of warm-up, floor 0.1, decay over the last two for wsd
    "cosine": [
        *(0.5, 1.0, 1.0, 0.965745789630079, 0.868198051533946),
        *(0.722207544564290, 0.55, 0.377792455435710, 0.231801948466054, 0.134254210369921),
    ],
    "linear": [0.5, 1.0, 1.0, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125],
    "wsd": [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.55],
    "constant": [0.5] + [1.0] * 9,
}


@pytest.mark.parametrize("schedule", config.SCHEDULES)
@pytest.mark.parametrize("warmup", [0.2, 2])
def test_schedules_are_their_golden_values(schedule: str, warmup: float) -> None:
    training = TrainingConfig(steps=10, warmup=warmup, schedule=schedule, min_lr_frac=0.1, decay_fraction=0.2)
    got = [lr_factor(step, 10, training) for step in range(10)]
    assert got == pytest.approx(GOLDEN[schedule], abs=TOLERANCE["schedule"])


def test_without_warm_up_the_first_step_is_at_the_peak() -> None:
    for schedule in config.SCHEDULES:
        training = TrainingConfig(steps=10, warmup=0, schedule=schedule)
        assert lr_factor(0, 10, training) == 1.0


@given(
    total=st.integers(1, 400),
    warmup=st.one_of(st.floats(0, 0.9, allow_subnormal=False), st.integers(1, 50)),
    schedule=st.sampled_from(config.SCHEDULES),
    floor=st.floats(0, 1, allow_subnormal=False),
    decay=st.floats(0.01, 1),
)
def test_every_schedule_rises_to_one_then_falls_to_its_floor(
    total: int, warmup: float, schedule: str, floor: float, decay: float
) -> None:
    training = TrainingConfig(steps=total, warmup=warmup, schedule=schedule, min_lr_frac=floor, decay_fraction=decay)
    rise = training.warmup_steps(total)
    if rise >= total:  # refused when the run is planned
        return
    factors = [lr_factor(step, total, training) for step in range(total)]
    assert all(0 <= f <= 1 for f in factors)
    assert factors[:rise] == pytest.approx([(i + 1) / rise for i in range(rise)])
    assert max(factors) == 1.0 or (schedule == "wsd" and rise == 0)
    tail = factors[max(0, rise - 1) :]
    assert all(a >= b for a, b in itertools.pairwise(tail))
    assert all(f >= floor - TOLERANCE["schedule"] for f in factors[rise:])
    # the floor is where the step after the last one would be
    end = 1.0 if schedule == "constant" else floor
    assert lr_factor(total, total, training) == pytest.approx(end, abs=TOLERANCE["schedule"])


def test_the_lr_of_a_row_is_the_peak_times_its_factor(data: Dataset, tmp_path: Path) -> None:
    spec = run("training.schedule=linear", "training.warmup=3", "training.min_lr_frac=0.0")
    rows = attempt(spec, data, tmp_path / "run").rows
    peak = 2.0**-6
    assert [row["lr"] for row in rows[:4]] == pytest.approx([peak / 3, peak * 2 / 3, peak, peak])
    assert rows[-1]["lr"] == pytest.approx(peak / 27)


# Precision.


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler warns of its own parts
def test_every_shape_of_a_run_is_compiled_however_often_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run has only compiled the last of them, and must not differ from one that compiled all."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    network = compiled(Network())
    for rows in (64, 32, 16, 8, 4, 2):
        network(torch.ones(rows, 4)).sum().backward()
        with torch.no_grad():
            network(torch.ones(rows, 4))
    assert counter.frame_count == 12


def test_a_precision_that_is_asked_for_is_taken() -> None:
    assert choose_precision("fp32", CPU) == "fp32"
    assert choose_precision("bf16", CPU) == "bf16"
    assert choose_precision("auto", CPU) in ("fp32", "bf16")
    assert choose_precision("auto", torch.device("mps")) == "fp32"


def test_bf16_multiplies_in_bf16_over_fp32_weights(data: Dataset, tmp_path: Path) -> None:
    fp32, bf16, auto = (attempt(run(f"training.precision={p}"), data, tmp_path / p) for p in ("fp32", "bf16", "auto"))
    assert [r.summary["precision"] for r in (fp32, bf16)] == ["fp32", "bf16"]
    assert {w.dtype for w in bf16.weights.values()} == {torch.float32}
    assert bf16.summary["val_loss"] != fp32.summary["val_loss"]
    assert bf16.summary["val_loss"] == pytest.approx(fp32.summary["val_loss"], rel=TOLERANCE["bf16"])
    expected = {"fp32": fp32, "bf16": bf16}[auto.summary["precision"]]
    assert auto.metrics == expected.metrics


# Evaluation and metrics.


@pytest.mark.parametrize("overrides", [(), ("data.tokenizer=gpt2-1024",), ("sweep.width_ratios=[2]",)], ids=str)
@pytest.mark.parametrize("read", ["training.eval_tokens=1024", "training.eval_batches=3"])
def test_the_validation_loss_is_the_mean_over_the_fixed_blocks(
    read: str, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    spec = run("training.steps=5", read, *overrides)
    data = prepare(spec.resolved.variant.data)
    setup, folder = build(spec, CPU), RunDir(tmp_path / "run")
    folder.path.mkdir()
    summary = train(spec, setup, data, folder, CPU, TrainControl())
    nats, n_tokens, text = 0.0, 0, ""
    total = data.validation.n_blocks(32)
    blocks = [k * total // 32 for k in range(32)] if read == "training.eval_tokens=1024" else range(12)
    for index in blocks:
        block = torch.from_numpy(data.validation_batch(32, [index]))
        targets = block[:, 1:].flatten()
        with torch.no_grad():
            logits = setup.network(block[:, :-1]).flatten(0, 1).double()
        nats += F.cross_entropy(logits, targets, reduction="sum").item()
        n_tokens += targets.numel()
        for row in block[:, 1:].tolist():
            text += tokenizers.load(spec.resolved.variant.data.tokenizer).decode(row)
    assert n_tokens == len(blocks) * 32
    assert "\ufffd" not in text  # no character is cut at the end of a row
    assert summary["val_loss"] == pytest.approx(nats / n_tokens, rel=TOLERANCE["evaluation"])
    assert summary["val_bits_per_byte"] == pytest.approx(
        nats / math.log(2) / len(text.encode()), rel=TOLERANCE["evaluation"]
    )


def test_bits_per_byte_count_the_bytes_of_the_whole_validation_set(tmp_path: Path) -> None:
    """A head of zeros costs log2(256) bits a token at any size and LR, and the end of text (0) has no bytes."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"Address {n}. " * 40}) + "\n" for n in range(200)))
    of_corpus = ["data=local", f"data.path={corpus}", "data.tokenizer=bytes", "data.validation_fraction=0.5"]
    data = prepare(run(*of_corpus).resolved.variant.data)
    targets = data.validation_batch(32, data.validation_blocks(32, 10**9))[:, 1:]
    expected = 8 * targets.size / (targets != 0).sum()
    assert expected > 8
    zeros = ["model.head_init_std=0.0", "training.eval_tokens=1000000000", "training.steps=2", "training.warmup=1"]
    for i, other in enumerate(("sweep.log2_lrs=[-60]", "sweep.width_ratios=[2]")):
        spec = run(*of_corpus, *zeros, "sweep.log2_lrs=[-61]", other)
        summary = attempt(spec, data, tmp_path / str(i)).summary
        assert summary["val_loss"] == pytest.approx(math.log(256), rel=TOLERANCE["evaluation"])
        assert summary["val_bits_per_byte"] == pytest.approx(expected, rel=TOLERANCE["evaluation"])


def test_no_batch_size_decides_which_tokens_are_validated(data: Dataset, tmp_path: Path) -> None:
    """Weights of step 0, which nothing has trained: the LR is 2^-60."""
    losses = [
        attempt(run("training.steps=2", "sweep.log2_lrs=[-60]", size), data, tmp_path / size).summary["val_loss"]
        for size in ("training.batch_size=4", "training.batch_size=7")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE["evaluation"])


@pytest.mark.parametrize(("rows", "steps"), [(200, list(range(1, 31))), (10, list(range(3, 31, 3)))])
def test_about_so_many_rows_are_logged(
    rows: int, steps: list[int], data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "METRICS_ROWS", rows)
    rows_logged = attempt(run(), data, tmp_path / "run").rows
    assert [row["step"] for row in rows_logged] == steps
    assert [row["tokens"] for row in rows_logged] == [step * 4 * 32 for step in steps]


def test_the_last_step_is_logged_whatever_the_interval(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "METRICS_ROWS", 7)
    rows = attempt(run(), data, tmp_path / "run").rows
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20, 24, 28, 30]


def test_a_rows_loss_is_the_mean_since_the_row_before(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = [row["train_loss"] for row in attempt(run(), data, tmp_path / "a").rows]
    monkeypatch.setattr(loop, "METRICS_ROWS", 10)
    thirds = [row["train_loss"] for row in attempt(run(), data, tmp_path / "b").rows]
    assert thirds == pytest.approx([sum(each[i : i + 3]) / 3 for i in range(0, 30, 3)], rel=1e-12)


@pytest.mark.parametrize("rows", [200, 10, 7])
def test_three_evaluations_give_three_rows_with_a_validation_loss(
    rows: int, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the thirds of the run fall between two rows."""
    monkeypatch.setattr(loop, "METRICS_ROWS", rows)
    result = attempt(run("training.evals=3"), data, tmp_path / "run")
    evaluated = [row for row in result.rows if "val_loss" in row]
    assert len(evaluated) == 3
    assert evaluated[-1]["step"] == TOTAL
    assert evaluated[-1]["val_loss"] == result.summary["val_loss"] < evaluated[0]["val_loss"]
    for expected, row in zip((10, 20, 30), evaluated, strict=True):
        assert abs(row["step"] - expected) <= 4


def test_the_logged_gradient_norm_is_the_one_before_clipping(data: Dataset, tmp_path: Path) -> None:
    spec = run("training.clip=0.001", "training.steps=2", "training.warmup=1")
    setup = build(spec, CPU)
    block = torch.from_numpy(data.train_batch(32, 4, 0, 0))
    logits = setup.network(block[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), block[:, 1:].flatten()).backward()
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in setup.network.parameters()))
    rows = attempt(spec, data, tmp_path / "run").rows
    assert norm > 0.01
    assert rows[0]["grad_norm"] == pytest.approx(norm, rel=TOLERANCE["gradient norm"])


def test_sgd_has_no_clipped_norm_and_clipping_does_not_change_it(data: Dataset, tmp_path: Path) -> None:
    clipped, free = (attempt(run("optimizer=sgd", f"training.clip={c}"), data, tmp_path / c) for c in ("0.001", "null"))
    assert all("grad_norm" not in row for row in clipped.rows)
    assert clipped.metrics == free.metrics


def test_the_first_losses_are_those_of_the_first_batches(data: Dataset, tmp_path: Path) -> None:
    spec = run("sweep.log2_lrs=[-60]", "sweep.seeds=[3]", "training.steps=4", "training.warmup=1")
    rows = attempt(spec, data, tmp_path / "run").rows
    net = build(spec, CPU).network
    for step, row in enumerate(rows):
        block = torch.from_numpy(data.train_batch(32, 4, 3, step))
        with torch.no_grad():
            expected = F.cross_entropy(net(block[:, :-1]).flatten(0, 1).double(), block[:, 1:].flatten())
        assert row["train_loss"] == pytest.approx(expected.item(), rel=TOLERANCE["evaluation"])


# Several runs of one worker.


def assert_ends_as_alone(spec: RunSpec, after: RunSpec, data: Dataset, path: Path) -> None:
    """A run of a worker ends as the run alone, bit for bit, in the network of the run before it."""
    session, outcomes = TorchSession(CPU), []
    executed(after, data, path, session=session)
    network = session.builder.network
    for folder in (executed(spec, data, path, session=session), executed(spec, data, path / "alone")):
        summary = folder.summary()
        assert summary is not None, folder.status()
        outcomes.append((folder.metrics_path.read_bytes(), {k: v for k, v in summary.items() if k not in CLOCK}))
    assert outcomes[0] == outcomes[1]
    assert session.builder.network is network is not None


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("optimizer=sso", "optimizer.weight_decay=0"),  # which rescales initial values
        ("model.tied=true", "optimizer=sophia"),  # with observations of the curvature
        ("model=moe",),
    ],
    ids=str,
)
def test_a_run_after_another_in_its_network_has_the_bits_of_the_run_alone(
    overrides: tuple[str, ...], data: Dataset, tmp_path: Path
) -> None:
    short = ("training.steps=8", "model.depth=1", *overrides)
    before, spec = run(*short, "sweep.log2_lrs=[-5]", "sweep.seeds=[1]"), run(*short, "sweep.log2_lrs=[-7]")
    assert_ends_as_alone(spec, before, data, tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler warns of its own parts
def test_runs_of_one_size_are_compiled_once(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    short = ("training.compile=true", "training.steps=4", "training.eval_tokens=128", "model.depth=1")
    assert_ends_as_alone(run(*short, "sweep.log2_lrs=[-7]"), run(*short), data, tmp_path)
    assert counter.frame_count == 4  # training and evaluation of both runs of the worker, and of the run alone


def test_a_run_that_failed_leaves_the_next_one_no_network(data: Dataset, tmp_path: Path) -> None:
    session = TorchSession(CPU)
    failed = executed(run("training.batch_size=10000000"), data, tmp_path, session=session)
    assert failed.status()["status"] == "failed"
    assert session.builder.network is None


def test_a_network_of_another_size_or_rule_is_not_used_again() -> None:
    builder = Builder(CPU)
    first = builder.build(run()).network
    assert builder.build(run("sweep.log2_lrs=[-9]")).network is first
    for overrides in (("sweep.width_ratios=[2]",), ("sweep.depth_ratios=[2]",), ("model.output_multiplier=2",)):
        assert builder.build(run(*overrides)).network is not first
        first = builder.build(run()).network


# Records of a run.


def executed(
    spec: RunSpec, data: Dataset, path: Path, stop: StopSignal | None = None, session: TorchSession | None = None
) -> RunDir:
    folder = RunDir(path / spec.run_id)
    lease = folder.claim()
    assert lease is not None
    session = session or TorchSession(CPU)
    session.datasets[spec.resolved.digest] = data
    try:
        execute_run(spec, folder, session, LeaseControl(lease, stop or StopSignal()))
    finally:
        lease.release()
    return folder


def test_a_finished_run_leaves_its_records_and_no_checkpoint(data: Dataset, tmp_path: Path) -> None:
    spec = run("training.checkpoint_minutes=0")
    folder = executed(spec, data, tmp_path)
    assert folder.status() == {"status": "done"}
    summary = folder.summary()
    assert summary is not None
    assert (summary["run_id"], summary["steps"], summary["tokens"]) == (spec.run_id, 30, 30 * 4 * 32)
    assert (summary["width"], summary["depth"], summary["log2_lr"], summary["seed"]) == (16, 2, -6.0, 0)
    assert {p.name for p in folder.path.iterdir()} == {
        "claims",
        "config.yaml",
        "groups.json",
        "metrics.jsonl",
        "status.json",
        "summary.json",
        "train.log",
    }


def test_a_diverged_run_is_a_result_without_a_validation_loss(data: Dataset, tmp_path: Path) -> None:
    folder = executed(run("optimizer=sgd", "sweep.log2_lrs=[40]"), data, tmp_path)
    assert folder.status() == {"status": "diverged"}
    summary = json.loads(folder.summary_path.read_text(), parse_constant=pytest.fail)  # no NaN in json
    assert summary["status"] == "diverged"
    assert summary["diverged_at_step"] >= 1
    assert summary["val_loss"] is None
    for line in folder.metrics_path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_a_stopped_run_keeps_its_checkpoint_and_ends_like_an_uninterrupted_one(data: Dataset, tmp_path: Path) -> None:
    @dataclass
    class After(StopSignal):
        steps: int = 0

        def __getattribute__(self, name: str) -> Any:
            if name == "signalled":
                self.steps -= 1
                return self.steps < 0
            return super().__getattribute__(name)

    spec = run()
    whole = executed(spec, data, tmp_path / "whole")
    with pytest.raises(StopRequested):
        executed(spec, data, tmp_path / "stopped", After(steps=12))
    assert checkpoint(tmp_path / "stopped" / spec.run_id).is_file()
    resumed = executed(spec, data, tmp_path / "stopped")
    assert resumed.metrics_path.read_bytes() == whole.metrics_path.read_bytes()
    assert not checkpoint(resumed.path).exists()
    a, b = whole.summary(), resumed.summary()
    assert a is not None
    assert b is not None
    assert {k: v for k, v in a.items() if k not in CLOCK} == {k: v for k, v in b.items() if k not in CLOCK}


def test_a_run_that_is_stopped_before_its_first_step_writes_no_checkpoint(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(StopRequested):
        executed(run(), data, tmp_path, StopSignal(signalled=True))
    assert not checkpoint(tmp_path / run().run_id).exists()


def test_a_run_that_cannot_be_trained_is_failed_with_its_reason(data: Dataset, tmp_path: Path) -> None:
    folder = executed(run("training.batch_size=10000000"), data, tmp_path)
    status = folder.status()
    assert status["status"] == "failed"
    assert "batch of 10000000" in status["error"]
    assert folder.summary() is None
    assert "batch of 10000000" in folder.log_path.read_text()


# Norms of matrices.


def test_norms_are_measured_after_the_first_step_and_at_even_points_and_change_no_bit(
    data: Dataset, tmp_path: Path
) -> None:
    plain = attempt(run(), data, tmp_path / "plain")
    tracked = attempt(run("training.norm_points=3"), data, tmp_path / "tracked")
    for name, weight in plain.weights.items():
        assert torch.equal(weight, tracked.weights[name]), name
    assert plain.summary["val_loss"] == tracked.summary["val_loss"]
    norms = {row["step"]: in_row(row) for row in tracked.rows if in_row(row)}
    assert list(norms) == [1, 10, 20, 30]
    bare = [{key: value for key, value in row.items() if "/" not in key} for row in tracked.rows]
    assert bare == plain.rows
    roles = {spec.name: spec.role for spec in run().resolved.model.tensors(run().size) if spec.role.is_matrix}
    assert [(norm.tensor, norm.role) for norm in norms[30]] == list(roles.items())
    for norm in norms[30]:
        expected = size_of(plain.weights[norm.tensor].double(), norm.role)
        assert norm.norm == pytest.approx(expected, rel=TOLERANCE["norm"]), norm.tensor


def size_of(weight: Tensor, role: str) -> float:
    """||W||_R by torch's own singular values; of an embedding the RMS of its entries."""
    if role == "input":
        return weight.square().mean().sqrt().item()
    n_out, n_in = weight.shape
    return math.sqrt(n_in / n_out) * torch.linalg.matrix_norm(weight, 2).item()


def test_the_relative_update_is_that_of_the_step(data: Dataset, tmp_path: Path) -> None:
    spec = run("training.norm_points=1", "training.steps=1", "training.warmup=0")
    start = {name: weight.clone() for name, weight in build(spec, CPU).network.state_dict().items()}
    ended = attempt(spec, data, tmp_path / "run")
    for norm in in_row(ended.rows[0]):
        before, after = start[norm.tensor].double(), ended.weights[norm.tensor].double()
        expected = size_of(after - before, norm.role) / size_of(before, norm.role)
        assert norm.relative_update == pytest.approx(expected, rel=TOLERANCE["norm"]), norm.tensor


def test_norms_of_a_resumed_run_are_those_of_an_uninterrupted_one(data: Dataset, tmp_path: Path) -> None:
    spec = run("training.norm_points=3")
    whole = attempt(spec, data, tmp_path / "whole")
    with pytest.raises(StopRequested):
        attempt(spec, data, tmp_path / "stopped", TrainControl(stop=15))
    assert_same(attempt(spec, data, tmp_path / "stopped"), whole)


def test_norms_of_a_weight_that_is_zero_or_not_finite_are_none() -> None:
    head = next(spec for spec in run().resolved.model.tensors(run().size) if spec.role == "output")
    assert matrix_norm(torch.zeros(head.shape), head) == 0.0
    assert matrix_norm(torch.full(head.shape, math.nan), head) is None
