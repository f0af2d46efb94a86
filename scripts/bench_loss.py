"""The head and its loss at a vocabulary of 50,304 and width 256, 8 x 256 tokens, against torch's logits and
cross-entropy: tokens/s and the peak of memory beyond the inputs, each side in processes of its own, turn by turn."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time

WIDTH, VOCABULARY, TOKENS = 256, 50304, 2048
STEPS, TURNS = 6, 3


def side(name: str) -> None:
    """Forward and backward passes of one side; prints tokens/s and the peak in bytes."""
    import torch
    from torch.nn.functional import cross_entropy, linear

    from mupsweep.models.loss import linear_cross_entropy

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(TOKENS, WIDTH, generator=generator, requires_grad=True)
    weight = torch.nn.Parameter(0.02 * torch.randn(VOCABULARY, WIDTH, generator=generator))
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)

    def loss() -> torch.Tensor:
        if name == "ours":
            return linear_cross_entropy(features, weight, targets)
        return cross_entropy(linear(features, weight).float(), targets)

    weight.grad, features.grad = torch.zeros_like(weight), torch.zeros_like(features)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(STEPS):
        started = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = loss()
        value.backward()
        seconds.append(time.perf_counter() - started)
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(TOKENS / statistics.median(seconds), peak)


def compare() -> None:
    """Print the ratio of both sides."""
    speed, memory = [], []
    found: dict[str, list[float]] = {}
    for _ in range(TURNS):
        for name in ("ours", "torch"):
            command = [sys.executable, __file__, name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name] = [float(word) for word in done.stdout.split()]
        speed.append(found["ours"][0] / found["torch"][0])
        memory.append(found["ours"][1] / found["torch"][1])
    ours, theirs = found["ours"], found["torch"]  # of the last turn
    print(
        f"loss: vocabulary {VOCABULARY}, width {WIDTH}: {ours[0]:,.0f} against {theirs[0]:,.0f} tokens/s, ratio "
        f"{statistics.median(speed):.2f} [{min(speed):.2f}, {max(speed):.2f}]; peak {ours[1] / 2**20:,.0f} against "
        f"{theirs[1] / 2**20:,.0f} MiB, ratio {statistics.median(memory):.2f}"
    )


if __name__ == "__main__":
    side(sys.argv[1]) if len(sys.argv) > 1 else compare()
