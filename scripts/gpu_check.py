"""Check mupsweep on a GPU, one line per check, the most important first: `make gpu-check`, at most 8 minutes.

    PASS|FAIL|INFO|SKIP  name  what was seen  [seconds]

INFO is a measurement without a verdict. The exit code is 1 where a check failed. `--device cpu` rehearses the checks
with tiny models, without those that need a GPU. Nothing is downloaded: batches are synthetic, and the one corpus is
that of `experiment=smoke`. A peer that is not installed is left out.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import io
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from nanogpt import NanoGPT
from torch import Tensor, nn

from mupsweep import __version__
from mupsweep.sweep.config import choices, load
from mupsweep.sweep.plan import plan
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.training import trainer
from mupsweep.training.build import Builder, TrainingSetup, build
from mupsweep.training.devices import autocast, choose_precision, configure
from mupsweep.training.microbatch import MicroBatcher

STEPS = 20  # of a check of bits
TURNS = 5  # of a comparison of speeds
OURS = ("eager", "compiled")  # sides of it
DECOMPOSE = ("shampoo", "soap", "mucon", "sso")  # beginnings of optimizers whose steps may wait for the device
TOLERANCE = {
    "micro-batches": 1e-3,  # of the loss in bf16, relative
    "compiled": 1e-2,  # of losses in bf16, relative
}


class Shape(NamedTuple):
    """The shape of a model and of its batch."""

    width: int
    depth: int
    context: int
    batch: int
    tokenizer: str = "gpt2-1024"

    @property
    def head_dim(self) -> int:
        return min(64, self.width // 2)


TINY = Shape(16, 1, 16, 4, "bytes")
SMALL = Shape(128, 2, 256, 8)
PROXY = Shape(256, 4, 1024, 8)
LARGE = Shape(1024, 8, 1024, 8, "gpt2")


class Skip(Exception):
    """A check that cannot be made here."""


def run_of(shape: Shape, *overrides: str) -> RunSpec:
    """The run of a model of this shape at one LR."""
    words = [f"data.tokenizer={shape.tokenizer}", f"model.width={shape.width}", f"model.depth={shape.depth}"]
    words += [f"model.head_dim={shape.head_dim}", f"model.context={shape.context}"]
    words += [f"training.batch_size={shape.batch}", "sweep.width_ratios=[1]", "sweep.log2_lrs=[-8]"]
    return plan(load([*words, *overrides]))[0]


def batch_of(run: RunSpec, step: int, device: torch.device) -> Tensor:
    """A batch of tokens that can be learned, the same on every device."""
    rows, columns = torch.arange(run.resolved.training.batch_size), torch.arange(run.size.context + 1)
    return ((rows[:, None] * 7 + columns * 3 + step) % 64).to(device)


@dataclass
class Training:
    """A run that is trained step by step, as `mupsweep.training.trainer` trains it."""

    run: RunSpec
    setup: TrainingSetup
    device: torch.device

    def __post_init__(self) -> None:
        self.precision = choose_precision(self.run.resolved.training.precision, self.device)
        self.network: nn.Module = self.setup.network
        self.micro_batcher = MicroBatcher()

    @classmethod
    def of(cls, shape: Shape, device: torch.device, *overrides: str) -> Training:
        run = run_of(shape, *overrides)
        return cls(run, build(run, device), device)

    def step(self, step: int, batch: Tensor) -> Tensor:
        """Take a step and return its loss, on the device."""
        if self.setup.optimizer.curvature_due(step):
            trainer.observe_curvature(
                self.network, self.setup, batch[:, :-1], self.run.seed, step, self.precision, self.micro_batcher
            )
        loss_of = partial(trainer.mean_loss, self.network, self.precision)
        loss = self.micro_batcher.backward(self.setup.network.parameters(), loss_of, batch)
        trainer.clip(self.setup)
        self.setup.optimizer.step(trainer.lr_factor(step, 1000, self.run.resolved.training))
        return loss

    def losses(self, first: int, last: int) -> list[float]:
        """The losses of the steps from `first` to before `last`."""
        losses = [self.step(step, batch_of(self.run, step, self.device)) for step in range(first, last)]
        return torch.stack(losses).tolist()

    def digest(self) -> str:
        """A short name of the weights' bits."""
        sha = hashlib.sha256()
        for _, tensor in sorted(self.setup.network.state_dict().items()):
            sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()[:12]

    def resumed(self) -> Training:
        """The run built anew from what a checkpoint holds."""
        file = io.BytesIO()
        torch.save([self.setup.network.state_dict(), self.setup.optimizer.state_dict()], file)
        file.seek(0)
        network, optimizer = torch.load(file, map_location="cpu", weights_only=True)
        setup = build(self.run, self.device)
        setup.network.load_state_dict(network)
        setup.optimizer.load_state_dict(optimizer)
        return Training(self.run, setup, self.device)


class Checks:
    """The checks on one device.

    Attributes:
        folder: where sweeps are trained.
        compiler: arguments of torch.compile; a rehearsal on a CPU needs no C++ compiler.
    """

    def __init__(self, device: torch.device, folder: Path) -> None:
        self.device, self.folder = device, folder
        self.on_gpu = device.type == "cuda"
        self.compiler: dict[str, Any] = {} if self.on_gpu else {"backend": "aot_eager"}

    def shape(self, shape: Shape) -> Shape:
        return shape if self.on_gpu else TINY

    def all(self) -> Iterator[tuple[str, float, Callable[[], str]]]:
        """The name of every check, the seconds that it may take on a GPU, and the check."""
        yield "environment", 5, self.environment
        yield "sweep", 40, self.sweep
        yield "repeats", 25, self.repeats
        yield "next-run", 5, self.next_run
        names = [name for name in choices("optimizer") if name != "foreign"]  # whose code is the user's
        for name in sorted(names, key=lambda name: (name.startswith(DECOMPOSE), name != "adamw", name)):
            yield f"optimizer-{name}", 15 if name.startswith(DECOMPOSE) else 4, partial(self.optimizer, name)
        yield "memory", 10, self.memory
        yield "resume", 45, self.resume
        yield "compiled", 60, self.compiled
        yield "speed-proxy", 80, partial(self.speed, PROXY)
        yield "speed-large", 60, partial(self.speed, LARGE)

    def environment(self) -> str:
        """What the figures belong to."""
        facts = [f"mupsweep {__version__}", f"python {sys.version.split()[0]}", f"torch {torch.__version__}"]
        if self.on_gpu:
            total = torch.cuda.mem_get_info(self.device)[1]
            facts += [torch.cuda.get_device_name(self.device), f"{total / 2**30:.0f} GiB", f"CUDA {torch.version.cuda}"]
        return ", ".join([*facts, f"precision auto is {choose_precision('auto', self.device)}"])

    def sweep(self) -> str:
        """The path from a config to a report."""
        self.mupsweep("run", "experiment=smoke", f"launcher.devices=[{self.device}]", "sweep.name=smoke")
        summaries = self.summaries("smoke")
        unfinished = [run_id for run_id, summary in summaries.items() if not summary]
        expect(not unfinished, f"no summary of {unfinished}")
        return f"{len(summaries)} runs on {next(iter(summaries.values()))['device']}, with a report"

    def repeats(self) -> str:
        """The same bits in this process and in another one."""
        digests: list[str] = []
        losses: list[float] = []
        for _ in range(2):
            training = Training.of(self.shape(SMALL), self.device)
            losses = training.losses(0, STEPS)
            digests.append(training.digest())
        expect(digests[0] == digests[1], "a second training in this process has other bits")
        command = [sys.executable, __file__, "--device", str(self.device), "--digest"]
        other = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200).stdout.split()[-1]
        expect(other == digests[0], "another process has other bits")
        expect(losses[-1] < losses[0], f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}")
        return f"bits {other}, loss {losses[0]:.3f} to {losses[-1]:.3f} in {STEPS} steps"

    def next_run(self) -> str:
        """A run in the network of the run before it."""
        builder, shape = Builder(self.device), self.shape(SMALL)
        for lr in (-6, -8):
            run = run_of(shape, f"sweep.log2_lrs=[{lr}]")
            training = Training(run, builder.build(run), self.device)
            training.losses(0, STEPS // 2)
        alone = Training.of(shape, self.device)
        alone.losses(0, STEPS // 2)
        expect(training.digest() == alone.digest(), "a run after another has other bits than alone")
        return "the bits of the run alone"

    def optimizer(self, name: str) -> str:
        """Steps of an optimizer: the same bits after a checkpoint, and no step that waits for the device."""
        shape, half = self.shape(SMALL), STEPS // 2
        whole = Training.of(shape, self.device, f"optimizer={name}")
        losses = whole.losses(0, half)
        batch = batch_of(whole.run, half, self.device)
        waits = self.waits(lambda: whole.step(half, batch))
        begin = self.now()
        losses += whole.losses(half + 1, STEPS)
        seconds = (self.now() - begin) / (half - 1)
        interrupted = Training.of(shape, self.device, f"optimizer={name}")
        expect(interrupted.losses(0, half) == losses[:half], "the first steps do not repeat")
        resumed = interrupted.resumed()
        resumed.losses(half, STEPS)
        expect(all(map(math.isfinite, losses)), f"losses {losses}")
        expect(resumed.digest() == whole.digest(), "the steps after a checkpoint have other bits")
        expect(name.startswith(DECOMPOSE) or waits == 0, f"a step waits {waits} times for the device")
        return f"{1000 * seconds:.2f} ms a step, {waits} waits, loss {losses[0]:.2f} to {losses[-1]:.2f}, resumes"

    def memory(self) -> str:
        """The peak beside its estimate, and smaller micro-batches where memory runs out."""
        if not self.on_gpu:
            raise Skip("the memory of a CPU has no limit to set")
        training = Training.of(Shape(512, 8, 1024, 32), self.device)
        batch = batch_of(training.run, 0, self.device)
        loss_of = partial(trainer.mean_loss, training.network, training.precision)
        weights = list(training.setup.network.parameters())
        torch.cuda.reset_peak_memory_stats(self.device)
        whole = MicroBatcher().backward(weights, loss_of, batch).item()
        held, peak = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
        torch.cuda.empty_cache()
        total, limited = torch.cuda.get_device_properties(self.device).total_memory, MicroBatcher()
        torch.cuda.set_per_process_memory_fraction((held + 0.6 * (peak - held)) / total, self.device)
        try:
            pieces = limited.backward(weights, loss_of, batch).item()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)
        expect(limited.oom_micro_batch is not None, "the batch fitted into 60 % of its peak")
        expect(abs(pieces - whole) <= TOLERANCE["micro-batches"] * whole, f"losses {whole} and {pieces}")
        return (
            f"peak {peak / 2**30:.2f} GiB, estimated {training.run.cost.memory / 2**30:.2f}; with less memory "
            f"micro-batches of {limited.oom_micro_batch}, loss {whole:.4f} and {pieces:.4f}"
        )

    def resume(self) -> str:
        """A sweep that is killed and started again ends as one that is left alone."""
        words = ["experiment=smoke", "launcher=inline", f"launcher.device={self.device}", "sweep.width_ratios=[2]"]
        words += ["sweep.log2_lrs=[-7]", "training.steps=150", "training.checkpoint_minutes=0"]
        self.mupsweep("run", *words, "sweep.name=whole")
        command = [sys.executable, "-m", "mupsweep", "run", *words, "sweep.name=killed"]
        process = subprocess.Popen(
            command, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        rows, deadline = 0, time.monotonic() + 120
        while process.poll() is None and rows < 30 and time.monotonic() < deadline:
            rows = sum(len(p.read_bytes().splitlines()) for p in self.folder.glob("sweeps/killed/runs/*/metrics.jsonl"))
            time.sleep(0.02)
        expect(process.poll() is None, "the run ended before it could be killed")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self.mupsweep("run", *words, "sweep.name=killed")
        (whole,), (killed,) = self.summaries("whole").values(), self.summaries("killed").values()
        for key in ("status", "steps", "train_loss", "val_loss"):
            expect(whole[key] == killed[key], f"{key} is {killed[key]} after a kill, and {whole[key]} without")
        return f"killed after {rows} rows; validation loss {killed['val_loss']:.6f} either way"

    def compiled(self) -> str:
        """torch.compile has the losses of the eager network, and traces a size once."""
        torch._dynamo.reset()
        shape, builder, seconds = self.shape(SMALL), Builder(self.device), []
        eager = Training.of(shape, self.device).losses(0, STEPS)
        for lr in (-7, -8):
            run = run_of(shape, f"sweep.log2_lrs=[{lr}]")
            training = Training(run, builder.build(run), self.device)
            training.network = self.compile(training.setup.network)
            begin = self.now()
            losses = training.losses(0, 1)
            seconds.append(self.now() - begin)
            losses += training.losses(1, STEPS)
        error = max(abs(a - b) / a for a, b in zip(eager, losses, strict=True))
        expect(error <= TOLERANCE["compiled"], f"losses differ from the eager ones by {error:.1e}")
        expect(seconds[1] < seconds[0] / 2, f"first steps took {seconds[0]:.2f} and {seconds[1]:.2f} s")
        return f"losses within {error:.1e}; first step of a size {seconds[0]:.1f} s, of its next run {seconds[1]:.2f} s"

    def speed(self, shape: Shape) -> str:
        """A step beside those of compiled nanoGPT and transformers, all in this process, turn by turn."""
        torch._dynamo.reset()
        shape = self.shape(shape)
        sides: dict[str, Callable[[], object]] = {}
        vocabulary, batch = 0, torch.empty(0)
        for name in OURS:
            training = Training.of(shape, self.device)
            if name == "compiled":
                training.network = self.compile(training.setup.network)
            vocabulary, batch = training.run.size.vocab_size, batch_of(training.run, 0, self.device)
            sides[name] = partial(training.step, 0, batch)
        network = NanoGPT(shape.width, shape.depth, shape.head_dim, shape.context, vocabulary).to(self.device)
        sides["nanoGPT compiled"] = peer(network, self.compile(network), batch, fused=True)
        with_transformers = self.transformers(shape, vocabulary)
        if with_transformers is not None:
            sides["transformers"] = peer(with_transformers, with_transformers, batch)
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        repeats: dict[str, int] = {}
        for turn in range(TURNS + 1):  # the first one warms up
            for name, step in sides.items():
                torch.use_deterministic_algorithms(self.on_gpu and name in OURS)
                if turn == 0:
                    self.timed(step, 3)
                    repeats[name] = max(1, min(200, round((0.3 if self.on_gpu else 0.02) / self.timed(step, 1))))
                else:
                    seconds[name].append(self.timed(step, repeats[name]))
        torch.use_deterministic_algorithms(self.on_gpu)
        median = {name: statistics.median(times) for name, times in seconds.items()}
        tokens = shape.batch * shape.context
        parts = [f"{name} {1000 * s:.2f} ms ({tokens / s:,.0f} tokens/s)" for name, s in median.items()]
        ours = min(median[name] for name in OURS)
        peers = [f"{name} {s / ours:.2f}" for name, s in median.items() if name not in OURS]
        return f"width {shape.width}: {', '.join(parts)}; times as fast as {', '.join(peers)}"

    def compile(self, network: nn.Module) -> nn.Module:
        """torch.compile with one graph per shape, once per network."""
        if network._compiled_call_impl is None:
            network.compile(dynamic=False, **self.compiler)
        return network

    def transformers(self, shape: Shape, vocabulary: int) -> nn.Module | None:
        """GPT-2 as transformers has it; None where it is not installed."""
        try:
            from transformers import GPT2Config, GPT2LMHeadModel
        except ImportError:
            return None

        class WithLoss(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                config = GPT2Config(
                    vocab_size=vocabulary, n_positions=shape.context, n_embd=shape.width, n_layer=shape.depth,
                    n_head=shape.width // shape.head_dim, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                    tie_word_embeddings=False, use_cache=False,
                )  # fmt: skip
                self.model = GPT2LMHeadModel(config)

            def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
                return F.cross_entropy(self.model(input_ids=tokens).logits.flatten(0, 1), targets.flatten())

        return WithLoss().to(self.device).train()

    def waits(self, act: Callable[[], object]) -> int:
        """How often the host waits for the device while it acts."""
        if not self.on_gpu:
            act()
            return 0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                act()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)

    def now(self) -> float:
        """The time after all that the device was given to do."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, act: Callable[[], object], repeats: int) -> float:
        """Seconds of one of `repeats` acts in a row."""
        begin = self.now()
        for _ in range(repeats):
            act()
        return (self.now() - begin) / repeats

    def mupsweep(self, *words: str) -> None:
        """The command line in a process of its own."""
        command = [sys.executable, "-m", "mupsweep", *words]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=300)
        expect(done.returncode == 0, f"mupsweep {words[0]} ended with {done.returncode}: {done.stderr[-300:]}")

    def summaries(self, sweep: str) -> dict[str, dict[str, Any]]:
        """The summary of every run of a sweep, empty where there is none."""
        summaries = {}
        for folder in sorted((self.folder / "sweeps" / sweep / "runs").iterdir()):
            path = folder / "summary.json"
            summaries[folder.name] = json.loads(path.read_text()) if path.exists() else {}
        return summaries


def peer(network: nn.Module, forward: nn.Module, batch: Tensor, fused: bool = False) -> Callable[[], None]:
    """A training step as nanoGPT's loop takes it."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.1, fused=fused)
    precision = choose_precision("auto", batch.device)

    def step() -> None:
        with autocast(precision, batch.device):
            loss = forward(batch[:, :-1], batch[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def expect(holds: bool, otherwise: str) -> None:
    """Fail the check where something does not hold."""
    if not holds:
        raise AssertionError(otherwise)


def check_all(device: torch.device, budget: float, only: list[str], folder: Path) -> int:
    """Make the checks and print their lines; return how many failed."""
    started, failed = time.monotonic(), 0
    for name, cost, check in Checks(device, folder).all():
        if only and not any(name.startswith(prefix) for prefix in only):
            continue
        begin = time.monotonic()
        word = "INFO" if name == "environment" or name.startswith("speed") else "PASS"
        try:
            left = budget - (begin - started)
            if cost > left:
                raise Skip(f"it may take {cost} s, and {left:.0f} of {budget:.0f} are left")
            text = check()
        except Skip as skip:
            word, text = "SKIP", str(skip)
        except Exception as error:
            traceback.print_exc()
            word, text = "FAIL", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            failed += 1
        print(f"{word} {name:<22} {text} [{time.monotonic() - begin:.1f} s]", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"{failed} checks failed, {time.monotonic() - started:.0f} s")
    return failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda:0", type=torch.device)
    parser.add_argument("--budget", default=480.0, type=float, help="seconds; checks that no longer fit are skipped")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="checks whose names begin so")
    parser.add_argument("--digest", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU is visible to torch here; --device cpu rehearses the checks", file=sys.stderr)
        return 2
    configure(torch.get_num_threads(), options.device)
    if options.digest:
        training = Training.of(TINY if options.device.type == "cpu" else SMALL, options.device)
        training.losses(0, STEPS)
        print(training.digest())
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return min(1, check_all(options.device, options.budget, options.only, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
