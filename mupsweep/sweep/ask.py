"""Which LR to train next, for people who start their runs themselves: ask for runs, tell their losses.

search = Search([Size(256, 4), Size(512, 4), Size(1024, 4)], log2_lrs=(-14, -5))
while runs := ask(search, 2):
    for run in runs:
        tell(search, run, loss=train(run.width, run.depth, 2**run.log2_lr))
search.optima()
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from mupsweep.analysis.config import CurvePrior
from mupsweep.analysis.labels import LARGEST_LOG2_LR
from mupsweep.analysis.loss_curve import SizeRuns
from mupsweep.errors import ConfigError
from mupsweep.sweep.lr_search import Goal, LRSearch, SearchedSize


@dataclass(frozen=True)
class Size:
    """A size that can be trained.

    Attributes:
        cost: of one run, in any unit; by default in proportion to width^2 * depth.
    """

    width: int
    depth: int = 1
    cost: float | None = None

    @property
    def price(self) -> float:
        return float(self.width**2 * self.depth) if self.cost is None else self.cost

    @property
    def shape(self) -> tuple[int, int]:
        return self.width, self.depth


@dataclass(frozen=True)
class Run:
    """A run to train.

    Attributes:
        seed: 0 for the first run of an LR, 1 for another one of it, and so on.
        why: the reason, in words.
    """

    width: int
    depth: int
    log2_lr: float
    seed: int
    cost: float
    why: str


@dataclass(frozen=True)
class Optimum:
    """The best log2 LR of a size and its interval at 95 %; None where nothing is known of it."""

    width: int
    depth: int
    log2_lr: float | None
    low: float | None
    high: float | None


@dataclass
class Search:
    """A search for the best LR of some sizes, and of a target.

    Attributes:
        sizes: that can be trained.
        log2_lrs: the lowest and the highest log2 LR of any run.
        to: (width, depth) of the target, whose LR shall be known; None ends with the optima of the sizes.
        half_width: octaves to which the target's LR shall be known, at 95 %.
        regret: nats that the target's LR may be expected to lose; either is enough.

    Raises:
        ConfigError: naming what cannot be meant.
    """

    sizes: Sequence[Size]
    log2_lrs: tuple[float, float]
    to: tuple[int, int] | None = None
    half_width: float = 0.25
    regret: float = 0.002
    prior: CurvePrior = field(default_factory=CurvePrior)

    def __post_init__(self) -> None:
        low, high = self.log2_lrs
        if not -LARGEST_LOG2_LR <= low < high <= LARGEST_LOG2_LR:
            raise ConfigError(
                f"log2 LRs {low:g}:{high:g}: expected LOW:HIGH, rising, within +-{LARGEST_LOG2_LR}, as -14:-5"
            )
        if not self.sizes:
            raise ConfigError("a search needs a size: a width, and a depth where it varies")
        self.sizes = sorted(self.sizes, key=lambda size: (size.price, size.shape))
        for size in self.sizes:
            if min(size.shape) < 1 or not (math.isfinite(size.price) and size.price > 0):
                raise ConfigError(f"{size}: expected a width, a depth and a cost above 0")
        if len({size.shape for size in self.sizes}) < len(self.sizes):
            raise ConfigError("a size stands twice: one line for each width and depth")
        self._runs: dict[tuple[int, int], list[tuple[float, float, int]]] = defaultdict(list)

    def add(self, width: int, depth: int, log2_lr: float, loss: float, seed: int = 0) -> None:
        """Note the result of a run; a loss that is not finite is a run that diverged."""
        if (width, depth) not in {size.shape for size in self.sizes}:
            shapes = ", ".join(f"{w}x{d}" for w, d in (size.shape for size in self.sizes))
            raise ConfigError(f"a run of width {width}, depth {depth} is of no size of the search: {shapes}")
        self._runs[width, depth].append((log2_lr, loss, seed))

    def optima(self) -> list[Optimum]:
        """The best LR of every size, as far as any run says something of it."""
        search = self._search()
        found = (search.optimum(k) for k in range(len(self.sizes)))
        return [Optimum(*size.shape, e.value, e.low, e.high) for size, e in zip(self.sizes, found, strict=True)]

    def state(self) -> str:
        """What is known of the target, in words; empty without one."""
        return self._search().goal_state()

    def next(self, count: int = 1) -> list[Run]:
        """The runs to train next."""
        found = []
        for run in self._search().next(count):
            size = self.sizes[run.size]
            found.append(Run(*size.shape, run.log2_lr, run.repetition, size.price, run.why))
        return found

    def _search(self) -> LRSearch:
        sizes = tuple(SearchedSize(self._runs_of(size), size.price) for size in self.sizes)
        goal = None if self.to is None else Goal(self._position(*self.to), self.half_width, self.regret)
        return LRSearch(sizes, self.log2_lrs, self.log2_lrs, goal, lattice=0.0, prior=self.prior)

    def _position(self, width: int, depth: int) -> float:
        """Doublings of width times depth above the smallest size."""
        smallest = min(self.sizes, key=lambda size: size.width * size.depth)
        return math.log2(width * depth / (smallest.width * smallest.depth))

    def _runs_of(self, size: Size) -> SizeRuns:
        runs = sorted(self._runs[size.shape])
        lrs, losses, seeds = zip(*runs, strict=True) if runs else ((), (), ())
        return SizeRuns.of(self._position(*size.shape), lrs, losses, seeds)


def ask(search: Search, count: int = 1) -> list[Run]:
    """The runs to train next, up to `count` LRs chosen together; none when the search has ended."""
    return search.next(count)


def tell(search: Search, run: Run, loss: float) -> None:
    """Note the loss of a run, in nats per token; one that is not finite is a run that diverged."""
    search.add(run.width, run.depth, run.log2_lr, loss, run.seed)
