"""What mupsweep costs, each figure with its peer in the same run: `make bench`.

    training   tokens/s against transformers' GPT-2 with torch AdamW: same shapes, batch, precision and threads
    grid       seconds of an LR grid end to end, against a nanoGPT process per LR (bench_grid.py)
    start      milliseconds of `mupsweep --help` and `mupsweep rules`, against `python -c pass`
    runner     seconds a run costs beyond its training steps, in a sweep of 40 short runs
    scale      what 100,000 runs cost to plan, to look at and to analyse; claims of 64 workers (bench_scale.py)
    data       tokens/s of preparing a corpus, against a loop over tiktoken and tokenizers' batch call (bench_data.py)
    loss       the head and its loss at a large vocabulary, speed and memory against torch's (bench_loss.py)
    analysis   seconds for the posterior of five sizes of twelve LRs, and of ten sizes as a multiple of it
    optimizers an optimizer's step as a share of a training step, and against pytorch-optimizer's (bench_optimizers.py)

Each side of the training pair is a process of its own; they take turns, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench_optimizers import optimizers
from bench_scale import scale

WIDTHS, VOCABULARIES = (128, 256, 512), (1024, 50257)
DEPTH, HEAD_DIM, CONTEXT, BATCH = 4, 64, 256, 8
TURNS = 5


def ours(width: int, vocab: int, threads: int, precision: str) -> Callable[[int], None]:
    """A training step of mupsweep: the modules, loss and optimizer that a run uses."""
    import torch

    from mupsweep.models import Multipliers
    from mupsweep.models.nanogpt import NanoGPT
    from mupsweep.optimizers.adamw import AdamW
    from mupsweep.training.devices import autocast, configure

    configure(threads, torch.device("cpu"))
    model = NanoGPT(name="bench", width=width, depth=DEPTH, head_dim=HEAD_DIM, context=CONTEXT, bias=True)
    network = model.network(model.base.scaled(1.0, 1.0, vocab), Multipliers(1.0, 1.0, HEAD_DIM**-0.5))
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.02)
    groups = [{"params": list(network.parameters()), "lr": 1e-3, "weight_decay": 0.1, "eps": 1e-8}]
    optimizer = AdamW(name="adamw").build(groups)

    def step(seed: int) -> None:
        tokens = batch(seed, vocab)
        with autocast(precision, torch.device("cpu")):
            loss = network(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def theirs(width: int, vocab: int, threads: int, precision: str) -> Callable[[int], None]:
    """The same step with transformers' GPT-2 and torch's AdamW as their documentation writes it."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(threads)
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=CONTEXT,
        n_embd=width,
        n_layer=DEPTH,
        n_head=width // HEAD_DIM,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        use_cache=False,
    )
    network = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.1)

    def step(seed: int) -> None:
        tokens = batch(seed, vocab)[:, :-1]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = network(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def batch(seed: int, vocab: int):
    import torch

    return torch.randint(vocab, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(seed))


def serve(side: str, width: int, vocab: int, threads: int, precision: str) -> None:
    """A training process that does as many steps as each line of its input says, and answers with the seconds."""
    step = {"ours": ours, "theirs": theirs}[side](width, vocab, threads, precision)
    for _ in range(2):
        step(0)
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for i in range(int(line)):
            step(i)
        print(time.perf_counter() - start, flush=True)


def training(threads: int, widths: tuple[int, ...], vocabularies: tuple[int, ...]) -> None:
    import torch

    from mupsweep.training.devices import choose_precision

    precision = choose_precision("auto", torch.device("cpu"))
    print(f"training: depth {DEPTH}, head_dim {HEAD_DIM}, {BATCH} x {CONTEXT} tokens, {precision}, {threads} thread(s)")
    print(f"{'width':>6} {'vocab':>6} {'mupsweep':>12} {'transformers':>13}   ratio [lowest, highest turn]")
    for vocab in vocabularies:
        for width in widths:
            sides = [Side(side, width, vocab, threads, precision) for side in ("ours", "theirs")]
            steps = max(2, round(3.0 / sides[1].seconds(2) * 2))
            turns = [(sides[0].seconds(steps), sides[1].seconds(steps)) for _ in range(TURNS)]
            for side in sides:
                side.close()
            tokens = steps * BATCH * CONTEXT
            mine, peer = (tokens / statistics.median(t) for t in zip(*turns, strict=True))
            ratios = sorted(b / a for a, b in turns)
            print(
                f"{width:>6} {vocab:>6} {mine:>8,.0f} t/s {peer:>9,.0f} t/s   "
                f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]",
                flush=True,
            )


class Side:
    """One of the two processes of a training pair."""

    def __init__(self, side: str, width: int, vocab: int, threads: int, precision: str) -> None:
        words = [side, str(width), str(vocab), str(threads), precision]
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        self.read()

    def read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a bench process ended early: {self.process.args}")
        return line

    def seconds(self, steps: int) -> float:
        """Seconds that `steps` training steps take."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return float(self.read())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def start() -> None:
    """Whole-process times of commands that should feel instant."""
    cli = [sys.executable, "-m", "mupsweep"]
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "mupsweep --help": [*cli, "--help"],
        "mupsweep rules": [*cli, "rules"],
        "mupsweep plan": [*cli, "plan"],
    }
    print("\nstart: median of 7 whole processes")
    for name, command in commands.items():
        print(f"  {name:<18} {1000 * statistics.median(timed(command) for _ in range(7)):>6.0f} ms")


def runner(folder: Path) -> None:
    """What the runner adds to training: 40 runs of 20 steps on one worker."""
    from mupsweep.store.sweep_dir import SweepDir

    lrs = ",".join(f"{-12 + i / 5:g}" for i in range(40))
    words = ["experiment=smoke", "training.steps=20", "sweep.width_ratios=[1]", f"sweep.log2_lrs=[{lrs}]"]
    words += [f"out={folder}", "sweep.name=short", "launcher.slots_per_device=1"]
    seconds = timed([sys.executable, "-m", "mupsweep", "run", *words])
    sweep = SweepDir.open(folder / "short")
    summaries = [sweep.run(row["run_id"]).summary() or {} for row in sweep.read_plan()]
    inside = sum(s["seconds"] for s in summaries)
    claims = [sweep.run(row["run_id"]).path / "claims" / "0000.json" for row in sweep.read_plan()]
    taken = [json.loads(p.read_text())["taken"] for p in claims]
    released = [p.stat().st_mtime for p in claims]
    span = max(released) - min(taken)
    print(f"\nrunner: 40 runs of 20 steps on one worker: {seconds:.1f} s in all, report included")
    print(f"  in training steps and evaluation {inside:.1f} s; beyond them {(span - inside) / 40:.3f} s a run")


def analysis() -> None:
    """The posterior of a ladder; its time should be linear in sizes."""
    import numpy as np

    from mupsweep.analysis.loss_curve import SizeRuns, fit_ladder

    random = np.random.default_rng(0)
    grid = np.arange(-11.0, -5.4, 0.5)
    sizes = []
    for position in range(10):
        losses = 3.0 - 0.1 * position + 0.03 * (grid + 8.0 + 0.1 * position) ** 2 + random.normal(0, 0.002, len(grid))
        sizes.append(SizeRuns.of(position / 2, grid, losses))
    seconds: dict[int, list[float]] = {5: [], 10: []}
    for _ in range(TURNS):
        for count, times in seconds.items():
            begin = time.perf_counter()
            fit_ladder(sizes[:count])
            times.append(time.perf_counter() - begin)
    five, ten = (statistics.median(times) for times in seconds.values())
    print(f"analysis: {five:.2f} s for five sizes of {len(grid)} LRs, ten take {ten / five:.2f} times as long")


def grid() -> None:
    """A grid end to end."""
    subprocess.run([sys.executable, str(Path(__file__).with_name("bench_grid.py"))], check=True)


def data() -> None:
    """Preparing a corpus."""
    subprocess.run([sys.executable, str(Path(__file__).with_name("bench_data.py"))], check=True)


def loss() -> None:
    """The head and its loss."""
    subprocess.run([sys.executable, str(Path(__file__).with_name("bench_loss.py"))], check=True)


def timed(command: list[str]) -> float:
    """Wall seconds of a whole process that must succeed."""
    begin = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--only", choices=("training", "grid", "start", "runner", "scale", "data", "loss", "analysis", "optimizers")
    )
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--serve", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        side, width, vocab, threads, precision = options.serve
        serve(side, int(width), int(vocab), int(threads), precision)
        return
    with tempfile.TemporaryDirectory() as folder:
        parts: dict[str, Callable[[], None]] = {
            "training": lambda: training(options.threads, tuple(options.widths), tuple(options.vocabularies)),
            "grid": grid,
            "start": start,
            "runner": lambda: runner(Path(folder)),
            "scale": lambda: scale(Path(folder)),
            "data": data,
            "loss": loss,
            "analysis": analysis,
            "optimizers": lambda: optimizers(options.threads),
        }
        for name, part in parts.items():
            if options.only in (None, name):
                part()


if __name__ == "__main__":
    main()
