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
from typing import Any

from mupsweep.analysis.config import CurvePrior
from mupsweep.analysis.labels import LARGEST_LOG2_LR
from mupsweep.analysis.loss_curve import SizeRuns
from mupsweep.errors import ConfigError
from mupsweep.schema import LARGEST, require
from mupsweep.store.tables import MOST_NATS
from mupsweep.sweep.lr_search import Goal, LRSearch, SearchedSize


@dataclass(frozen=True)
class Size:
    """A size that can be trained.

    Attributes:
        cost: of one run, in any unit; by default in proportion to width^2 * depth.

    Raises:
        ConfigError: naming what is no size.
    """

    width: int
    depth: int = 1
    cost: float | None = None

    def __post_init__(self) -> None:
        require(_is_size(self.width), "width", repr(self.width), "a whole number above 0")
        require(_is_size(self.depth), "depth", repr(self.depth), "a whole number above 0")
        is_cost = self.cost is None or (_is_number(self.cost) and 0 < self.cost <= LARGEST)
        require(is_cost, "cost", repr(self.cost), f"a number above 0 and at most {LARGEST:g}, of every size or of none")

    @property
    def price(self) -> float:
        return float(self.width) ** 2 * self.depth if self.cost is None else float(self.cost)

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
    """The best log2 LR of a size and its interval at 95 %, which may reach beyond the range that was searched.

    Attributes:
        log2_lr: None where it is not known.
        reason: why it is not known, in words.
    """

    width: int
    depth: int
    log2_lr: float | None
    low: float | None
    high: float | None
    reason: str | None = None


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
        self.log2_lrs = low, high = _pair(self.log2_lrs, "log2_lrs", "the lowest and the highest, as (-14, -5)")
        if not -LARGEST_LOG2_LR <= low < high <= LARGEST_LOG2_LR:
            raise ConfigError(
                f"log2 LRs {low:g}:{high:g}: expected LOW:HIGH, rising, within +-{LARGEST_LOG2_LR}, as -14:-5"
            )
        if low > 0 and high <= 1:
            octaves = f"{math.log2(low):.1f}:{math.log2(high):.1f}"
            raise ConfigError(f"log2 LRs {low:g}:{high:g}: these look like LRs, and octaves are wanted: {octaves}")
        self.sizes = list(self.sizes)
        if not self.sizes:
            raise ConfigError("a search needs a size: a width, and a depth where it varies")
        for size in self.sizes:
            require(isinstance(size, Size), "size", size, "Size(width, depth, cost), the last two where they vary")
        costs = [size.cost is not None for size in self.sizes]
        if any(costs) and not all(costs):
            raise ConfigError(f"{self.sizes[costs.index(False)]} has no cost: give one to every size or to none")
        self.sizes.sort(key=lambda size: (size.price, size.shape))
        if len({size.shape for size in self.sizes}) < len(self.sizes):
            raise ConfigError("a size stands twice: one line for each width and depth")
        if self.to is not None:
            self.to = width, depth = _pair(self.to, "to", "width and depth of the target, as (8192, 32)")
            Size(width, depth)
        for name, value in (("half_width", self.half_width), ("regret", self.regret)):
            require(_is_number(value) and value >= 0, name, repr(value), "a number, 0 or more")
        self._runs: dict[tuple[int, int], list[tuple[float, float, int]]] = defaultdict(list)

    def add(self, width: int, depth: int, log2_lr: float, loss: float, seed: int = 0) -> None:
        """Note the result of a run; a loss that is not finite, or above MOST_NATS, is a run that diverged.

        Further results of one LR and seed are repetitions.
        """
        if (width, depth) not in {size.shape for size in self.sizes}:
            shapes = ", ".join(f"{w}x{d}" for w, d in (size.shape for size in self.sizes))
            raise ConfigError(
                f"a run of width {width}, depth {depth} is of no size of the search, {shapes}: add its size, or leave "
                "the run out"
            )
        is_lr = _is_number(log2_lr) and abs(log2_lr) <= LARGEST_LOG2_LR
        require(is_lr, "log2_lr", repr(log2_lr), f"octaves, within +-{LARGEST_LOG2_LR}")
        require(_is_number(loss), "loss", repr(loss), "nats per token; nan for a run that diverged")
        require(_is_whole(seed), "seed", repr(seed), "a whole number")
        nats = float(loss) if abs(loss) <= MOST_NATS else math.nan
        self._runs[width, depth].append((float(log2_lr), nats, int(seed)))

    def optima(self) -> list[Optimum]:
        """The best LR of every size, as far as any run says something of it."""
        search = self._search()
        optima = []
        for k, size in enumerate(self.sizes):
            estimate, reason = search.optimum(k), search.reason(k)
            value = estimate.value if reason is None else None
            optima.append(Optimum(*size.shape, value, estimate.low, estimate.high, reason))
        return optima

    def state(self) -> str:
        """What is known of the target, in words; empty without one."""
        return self._search().goal_state()

    def next(self, count: int = 1) -> list[Run]:
        """The runs to train next, up to `count` LRs; the same ones until one of them has its result."""
        require(_is_size(count), "count", repr(count), "how many LRs, 1 or more")
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


def _is_number(value: object) -> bool:
    """Whether a value is one number; those of numpy and torch are."""
    try:
        return not isinstance(value, str) and isinstance(float(value), float)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False


def _is_whole(value: object) -> bool:
    return _is_number(value) and float(value).is_integer()  # type: ignore[arg-type]


def _is_size(value: object) -> bool:
    return _is_whole(value) and 1 <= value <= LARGEST  # type: ignore[operator]


def _pair(value: Any, name: str, expected: str) -> Any:
    """The two numbers of a pair."""
    is_pair = isinstance(value, Sequence) and len(value) == 2 and all(map(_is_number, value))
    require(is_pair, name, repr(value), expected)
    return tuple(value)


def ask(search: Search, count: int = 1) -> list[Run]:
    """The runs to train next, up to `count` LRs chosen together; none when the search has ended."""
    return search.next(count)


def tell(search: Search, run: Run, loss: float) -> None:
    """Note the loss of a run, in nats per token; see `Search.add`."""
    search.add(run.width, run.depth, run.log2_lr, loss, run.seed)
