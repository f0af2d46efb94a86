"""What the step of an optimizer costs: part `optimizers` of `make bench`.

Each function of PARTS is one table. Its sides take turns in one process, so that they see the same machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Make = Callable[[list[Tensor]], torch.optim.Optimizer]

DEPTH, HEAD_DIM, VOCABULARY, CONTEXT, BATCH = 4, 64, 256, 256, 8
TURNS = {64: 9, 128: 5, 256: 3, 512: 1, 1024: 1}  # by width
EVERY = 10  # steps from one decomposition of SOAP or Shampoo to the next


def cost_of_a_step() -> None:
    """The step on all hidden matrices as a share of the forward and backward pass.

    From width 256 on one layer stands for all, and at 1024 SOAP and Shampoo work in blocks of 512.
    """
    names = ("adamw", "muon", "muon_plus_plus", "muon_hyperball", "sso", "soap", "shampoo")
    print(f"a step on the hidden matrices of {DEPTH} layers / forward and backward pass of {BATCH} x {CONTEXT} tokens")
    print(f"soap and shampoo decompose every {EVERY} steps; * in blocks of 512")
    print(f"{'width':>6} {'pass':>10}" + "".join(f"{name:>15}" for name in names))
    for width, turns in TURNS.items():
        layers, matrices = layers_and_matrices(width)
        blocks = {name: width > 512 and name in ("soap", "shampoo") for name in names}
        makes = [ours(name, *["optimizer.block_size=512"] * blocks[name]) for name in names]
        sides = [Side(make, matrices) for make in makes]
        forward_backward = one_pass(width)
        times = [(timed(forward_backward), *(side.seconds() for side in sides)) for _ in range(turns)]
        base, *steps = (statistics.median(column) for column in zip(*times, strict=True))
        shares = [f"{100 * seconds * DEPTH / layers / base:.1f} %" for seconds in steps]
        marked = [share + "*" * blocks[name] for name, share in zip(names, shares, strict=True)]
        print(f"{width:>6} {1000 * base:>7.0f} ms" + "".join(f"{share:>15}" for share in marked), flush=True)


def soap_and_shampoo() -> None:
    """Against pytorch-optimizer's classes; sums in both Shampoos."""
    import pytorch_optimizer

    def soap(p: list[Tensor]) -> torch.optim.Optimizer:
        return pytorch_optimizer.SOAP(p, precondition_frequency=EVERY, weight_decay=0.0)

    def shampoo(p: list[Tensor]) -> torch.optim.Optimizer:
        return pytorch_optimizer.Shampoo(p, preconditioning_compute_steps=EVERY)

    pairs = {
        "soap": (ours("soap"), soap),
        "shampoo": (ours("shampoo", "optimizer.statistics=sum", "optimizer.betas=[0,0]"), shampoo),
    }
    print(f"\n{'width':>6} {'':>8} {'mupsweep':>12} {'pytorch-optimizer':>18}   ratio [lowest, highest turn]")
    for width in (64, 128, 256):
        for name, makes in pairs.items():
            compare(width, name, *makes)


def muon_in_stacks() -> None:
    """Muon on stacks of same-shape matrices against torch's, which takes one matrix after the other."""
    import torch

    def muon(p: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Muon(p, weight_decay=0.0)

    print(f"\n{'width':>6} {'':>8} {'mupsweep':>12} {'torch':>18}   ratio [lowest, highest turn]")
    for width in TURNS:
        compare(width, "muon", ours("muon_jordan"), muon)


PARTS = (cost_of_a_step, soap_and_shampoo, muon_in_stacks)


def optimizers(threads: int) -> None:
    """All tables."""
    import torch

    from mupsweep.training.devices import configure

    configure(threads, torch.device("cpu"))
    print(f"\noptimizers: {threads} thread(s)")
    for part in PARTS:
        part()


def compare(width: int, name: str, mine: Make, peer: Make) -> None:
    """A line of a table: a step of each on the hidden matrices of a width, turn by turn."""
    layers, matrices = layers_and_matrices(width)
    sides = Side(mine, matrices), Side(peer, matrices)
    turns = [(sides[0].seconds(), sides[1].seconds()) for _ in range(TURNS[width])]
    our_time, their_time = (1000 * statistics.median(t) * DEPTH / layers for t in zip(*turns, strict=True))
    ratios = sorted(theirs / ours for ours, theirs in turns)
    print(
        f"{width:>6} {name:>8} {our_time:>9.2f} ms {their_time:>15.2f} ms   "
        f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]",
        flush=True,
    )


class Side:
    """An optimizer over copies of matrices, whose gradients stay the same."""

    def __init__(self, make: Make, matrices: list[Tensor]) -> None:
        import torch

        generator = torch.Generator().manual_seed(0)
        self.weights: list[Tensor] = [torch.nn.Parameter(p.detach().clone()) for p in matrices]
        self.gradients = [torch.randn(p.shape, generator=generator) * 1e-3 for p in matrices]
        self.optimizer = make(self.weights)
        self.steps(1)  # makes the state

    def seconds(self) -> float:
        """Mean seconds of a step over EVERY of them, of which one decomposes.

        Only four are taken: numbers EVERY and EVERY + 1, at one of which each algorithm here decomposes, and two more.
        """
        for group in self.optimizer.param_groups:
            group["step"] = EVERY - 1
        two, plain = self.steps(2), self.steps(2) / 2
        return (two + (EVERY - 2) * plain) / EVERY

    def steps(self, count: int) -> float:
        """Seconds of so many steps; some optimizers change the gradients, so that each takes copies."""
        seconds = 0.0
        for _ in range(count):
            for p, gradient in zip(self.weights, self.gradients, strict=True):
                p.grad = gradient.clone()
            seconds += timed(self.optimizer.step)
        return seconds


def ours(name: str, *words: str) -> Make:
    """An optimizer as its yaml configures it, decomposing every EVERY steps."""
    from mupsweep.sweep import config
    from mupsweep.sweep.run_spec import resolve

    every = [f"optimizer.every={EVERY}"] if name in ("soap", "shampoo") else []
    part = resolve(config.load([f"optimizer={name}", *every, *words]).variants[0]).optimizer
    thresholds = {key: threshold.value for key, threshold in part.thresholds().items()}
    return lambda p: part.build([{"params": p, "lr": 1e-3, "weight_decay": 0.0, **thresholds}])


def network(width: int, layers: int) -> nn.Module:
    """The GPT-2 of the benchmark, of vectors and matrices drawn at random."""
    import torch

    from mupsweep.models import Multipliers
    from mupsweep.models.nanogpt import NanoGPT

    model = NanoGPT(name="bench", width=width, depth=layers, head_dim=HEAD_DIM, context=CONTEXT)
    made = model.network(model.base.scaled(1.0, 1.0, VOCABULARY), Multipliers(1.0, 1.0, HEAD_DIM**-0.5))
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.02)
    return made


def layers_and_matrices(width: int) -> tuple[int, list[Tensor]]:
    """How many layers are measured, and their hidden matrices."""
    layers = DEPTH if width < 256 else 1
    named = network(width, layers).named_parameters()
    return layers, [p for name, p in named if name.startswith("blocks.") and p.ndim == 2]


def one_pass(width: int) -> Callable[[], None]:
    """The forward and backward pass of a batch, warmed up."""
    import torch

    from mupsweep.training.devices import autocast, choose_precision

    cpu = torch.device("cpu")
    model, precision = network(width, DEPTH), choose_precision("auto", cpu)
    tokens = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        with autocast(precision, cpu):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        for p in model.parameters():
            p.grad = None

    run()
    return run


def timed(call: Callable[[], object]) -> float:
    """Wall seconds of a call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
