"""An LR grid end to end, as a user would run it: one nanoGPT process per LR, against `mupsweep run`.

The same bytes, network, batches, steps and LRs. A process of the peer does what nanoGPT's train.py does on a CPU, where
its README turns compiling off: fp32, all threads, evaluation and a checkpoint at the end. mupsweep trains as it does by
default: a worker per core, the CPU's own precision, records of every run, analysis and report at the end.

    python scripts/bench_grid.py [--widths 64 128] [--turns 3]
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

DEPTH, HEAD_DIM, CONTEXT, BATCH, STEPS = 4, 64, 256, 8, 150
LOG2_LRS = range(-13, -5)
EVALUATED = 32 * CONTEXT  # tokens
VOCABULARY = 257
WARMUP, FLOOR = 15, 0.1


def peer(width: int, log2_lr: float, folder: Path) -> None:
    """Train one LR as nanoGPT's train.py does."""
    import torch
    from nanogpt import NanoGPT

    torch.manual_seed(1337)

    def batch(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        data = np.memmap(folder / f"{split}.bin", dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - CONTEXT, (BATCH,))
        x, y = (
            torch.stack([torch.from_numpy(data[i + shift : i + shift + CONTEXT].astype(np.int64)) for i in starts])
            for shift in (0, 1)
        )
        return x, y

    network = NanoGPT(width, DEPTH, HEAD_DIM, CONTEXT, VOCABULARY)
    for weight in network.parameters():
        if weight.dim() >= 2:
            torch.nn.init.normal_(weight, std=0.02)
    matrices = [p for p in network.parameters() if p.dim() >= 2]
    vectors = [p for p in network.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2.0**log2_lr, betas=(0.9, 0.95))
    for step in range(STEPS):
        share = (step - WARMUP) / (STEPS - WARMUP)
        factor = (
            (step + 1) / (WARMUP + 1) if step < WARMUP else FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * share)) / 2
        )
        for group in optimizer.param_groups:
            group["lr"] = 2.0**log2_lr * factor
        network(*batch("train")).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        losses = [network(*batch("val")).item() for _ in range(EVALUATED // (BATCH * CONTEXT))]
    print(statistics.mean(losses))
    torch.save({"model": network.state_dict(), "optimizer": optimizer.state_dict()}, folder / "ckpt.pt")


def theirs(width: int, folder: Path) -> float:
    """Seconds of a process per LR, one after the other, each with all threads."""
    begin = time.perf_counter()
    for log2_lr in LOG2_LRS:
        command = [sys.executable, __file__, "--peer", str(width), str(log2_lr), str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def ours(width: int, folder: Path) -> float:
    """Seconds of `mupsweep run`."""
    words = ["model=nanogpt", f"model.width={width}", f"model.depth={DEPTH}", f"model.head_dim={HEAD_DIM}"]
    words += [f"model.context={CONTEXT}", "data=sotu", "data.tokenizer=bytes", f"training.steps={STEPS}"]
    words += [f"training.batch_size={BATCH}", f"training.eval_tokens={EVALUATED}", "optimizer=adamw"]
    words += ["sweep.width_ratios=[1]", f"sweep.log2_lrs=[{','.join(map(str, LOG2_LRS))}]"]
    words += [f"out={tempfile.mkdtemp(dir=folder)}", "sweep.name=grid"]
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "mupsweep", "run", *words], check=True, capture_output=True)
    return time.perf_counter() - begin


def write_bytes(folder: Path) -> None:
    """The embedded corpus as nanoGPT's data scripts leave it."""
    from mupsweep.data import prepare
    from mupsweep.sweep.config import load

    config = load(["data=sotu", "data.tokenizer=bytes"])
    dataset = prepare(config.variants[0].data)
    for split, stream in (("train", dataset.train), ("val", dataset.validation)):
        blocks = stream.blocks(range(stream.n_blocks(CONTEXT)), CONTEXT)
        blocks[:, :-1].astype(np.uint16).tofile(folder / f"{split}.bin")


def peak() -> float:
    """FLOP/s of the cores in large products of the precision that mupsweep takes here, one process a core."""
    code = (
        "import time, torch; from mupsweep.training.devices import choose_precision; torch.set_num_threads(1); "
        "kind = {'bf16': torch.bfloat16, 'fp32': torch.float32}[choose_precision('auto', torch.device('cpu'))]; "
        "a, b = torch.randn(2048, 2048).to(kind), torch.randn(2048, 2048).to(kind); a @ b; begin = time.time(); "
        "[a @ b for _ in range(8)]; print(8 * 2 * 2048**3 / (time.time() - begin))"
    )
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(count)]
    return sum(float(process.communicate()[0]) for process in both)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--peer", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        width, log2_lr, folder = options.peer
        peer(int(width), float(log2_lr), Path(folder))
        return
    reached = peak()
    print(f"grid: {len(LOG2_LRS)} LRs, {STEPS} steps of {BATCH} x {CONTEXT} tokens, depth {DEPTH}, bytes")
    print(f"  the cores multiply {reached / 1e9:.0f} GFLOP/s")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_bytes(folder)
        for width in options.widths:
            turns = [(ours(width, folder), theirs(width, folder)) for _ in range(options.turns)]
            mine, other = (statistics.median(seconds) for seconds in zip(*turns, strict=True))
            ratios = sorted(b / a for a, b in turns)
            parameters = 12 * DEPTH * width**2 + VOCABULARY * width
            flops = 6 * parameters * STEPS * BATCH * CONTEXT * len(LOG2_LRS)
            print(
                f"  width {width}: mupsweep {mine:.1f} s, a nanoGPT process per LR {other:.1f} s; "
                f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}] times as fast, "
                f"{100 * flops / mine / reached:.0f} % of what the cores multiply",
                flush=True,
            )


if __name__ == "__main__":
    main()
