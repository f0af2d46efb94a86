"""What a search for the best LRs costs, on dense sweeps: `python scripts/replay.py [--figure FILE.svg]`.

A search says which run it wants, and a dense sweep of tests/tables (public) or tests/tables/own says what that run gave
(at the nearest LR that it has and that is not known yet). Every ladder of three dense sizes or more is searched by

    mupsweep   the product's search, one run at a time and four at a time; and without any run of the largest size,
               whose LR it forecasts
    random     random LRs
    golden     golden-section search
    tpe, gp    Optuna's samplers (pip install optuna), two random LRs first
    carbs      cost-aware search (2306.08055; github.com/imbue-ai/carbs), two random LRs first; it takes seconds a run

These search the first size over the whole range, the others within two octaves of the optimum of the size before, as
people do by hand. They have no end of their own and are given 3 to 12 runs a size; their optimum is the vertex of the
parabola through their best run and its neighbours. Printed are, for each: FLOPs as a share of 13 LRs with 3 seeds at
every size; the share of sizes within 0.25 octaves of the whole curve's optimum (judge.py); nats lost at the largest
size, in the mean and the share below 0.005; and how often one had to wait for results.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from judge import TABLES, Ladder, is_dense, is_inside, known_optimum, nats_lost, read, vertex

from mupsweep.analysis.forecast import forecast
from mupsweep.analysis.loss_curve import SizeRuns, fit_ladder
from mupsweep.sweep.lr_search import LRSearch, SearchedSize

OWN = TABLES / "own"
GRID = 39  # runs of a size: 13 LRs, 3 seeds
WITHIN, HARMLESS = 0.25, 0.005
BARS = {"cost": 0.095, "near": 0.95, "harmless": 0.97}  # of mupsweep, one run at a time
RUNS = (3, 4, 5, 6, 8, 12)  # a size, of searches without an end
GOLDEN = (math.sqrt(5) - 1) / 2
SEEDS = range(5)  # of searches that draw


@dataclass
class Replay:
    """The runs of one ladder that a search has asked for.

    Attributes:
        known: log2 LR -> loss of every size; nan where a run diverged.
        rounds: how often the search waited for results.
    """

    ladder: Ladder
    known: list[dict[float, float]] = field(init=False)
    rounds: int = 0

    def __post_init__(self) -> None:
        self.known = [{} for _ in self.ladder.sizes]

    @property
    def limits(self) -> tuple[float, float]:
        ends = [(size.log2_lrs[0], size.log2_lrs[-1]) for size in self.ladder.sizes]
        return float(min(low for low, _ in ends)), float(max(high for _, high in ends))

    def train(self, k: int, log2_lr: float) -> float:
        """The loss at the nearest LR that is not known yet; nan where it diverged, or where all are known.

        Of several seeds it is that of the first: the others are for the judge alone.
        """
        size, known = self.ladder.sizes[k], self.known[k]
        free = [i for i, x in enumerate(size.log2_lrs) if x not in known]
        if not free:
            return math.nan
        i = min(free, key=lambda i: abs(size.log2_lrs[i] - log2_lr))
        loss = float(size.losses[i][np.isfinite(size.losses[i])][0]) if size.usable[i] else math.nan
        known[float(size.log2_lrs[i])] = loss
        return loss

    def trained(self, k: int) -> SizeRuns:
        return SizeRuns.of(self.ladder.sizes[k].position, list(self.known[k]), list(self.known[k].values()))


@dataclass
class Score:
    """What replays came to; a number per ladder, of `near` per size."""

    cost: list[float] = field(default_factory=list)
    near: list[bool] = field(default_factory=list)
    regret: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)

    def add(self, replay: Replay, optima: list[float]) -> None:
        sizes = replay.ladder.sizes
        flops = np.array([4.0**size.position for size in sizes])  # width^2 x depth x tokens, tokens with the size
        runs = np.array([len(known) for known in replay.known])
        self.cost.append(float((flops * runs).sum() / (flops * GRID).sum()))
        self.near += [abs(x - aim(size)) <= WITHIN for x, size in zip(optima, sizes, strict=True)]
        self.regret.append(nats_lost(sizes[-1], optima[-1]))
        self.rounds.append(replay.rounds)

    @property
    def numbers(self) -> dict[str, float]:
        harmless = float(np.mean(np.array(self.regret) < HARMLESS))
        return {"cost": float(np.mean(self.cost)), "near": float(np.mean(self.near)), "harmless": harmless}

    def line(self, name: str) -> str:
        shares = "  ".join(f"{key} {value:6.1%}" for key, value in self.numbers.items())
        return f"{name:16}  {shares}  regret {np.mean(self.regret):.4f}  rounds {np.mean(self.rounds):4.1f}"


def aim(size: SizeRuns) -> float:
    """The optimum of the whole curve."""
    draws = known_optimum(size)
    return vertex(size) if draws is None else float(np.median(draws))


def ladders() -> Iterator[Ladder]:
    """Every ladder over sizes with three dense ones or more, of public sweeps and of our own."""
    for path in [*sorted(TABLES.glob("*.csv")), *sorted(OWN.glob("*.csv"))]:
        for ladder in read(path):
            dense = [size for size in ladder.curves if is_dense(size) and is_inside(size)]
            if len(dense) >= 3 and ladder.axis != "horizon":
                yield ladder.of(dense)


# ---- searches


def mupsweep(replay: Replay, at_once: int, untrained: int = 0) -> list[float]:
    """The optima of the product's search; of as many of the largest sizes as stay untrained, the LR handed over."""
    trained = replay.ladder.sizes[: len(replay.known) - untrained]
    while True:
        sizes = tuple(SearchedSize(replay.trained(k), 4.0**size.position) for k, size in enumerate(trained))
        search = LRSearch(sizes, replay.limits, replay.limits, lattice=0.0)
        runs = search.next(at_once)
        if not runs:
            found = [search.optimum(k).value or math.nan for k in range(len(sizes))]
            ladder = fit_ladder(replay.trained(k) for k in range(len(sizes)))
            targets = [forecast(ladder, size.position) for size in replay.ladder.sizes[len(sizes) :]]
            return found + [math.nan if target is None else target.log2_lr for target in targets]
        replay.rounds += 1
        for run in runs:
            replay.train(run.size, run.log2_lr)


def by_hand(replay: Replay, count: int, ask: Callable[[Replay, int, int], None]) -> list[float]:
    """The optima of a search that is given some runs of each size."""
    for k in range(len(replay.ladder.sizes)):
        ask(replay, k, count)
    replay.rounds = count * len(replay.known)
    return [best(replay, k) for k in range(len(replay.known))]


def best(replay: Replay, k: int) -> float:
    trained = replay.trained(k)
    return vertex(trained) if trained.usable.any() else replay.limits[0]


def window(replay: Replay, k: int) -> tuple[float, float]:
    """Where people would look at a size, after the smaller ones."""
    low, high = replay.limits
    if not k:
        return low, high
    middle = best(replay, k - 1)
    return max(low, middle - 2), min(high, middle + 2)


def random(replay: Replay, k: int, count: int, seed: int) -> None:
    for log2_lr in np.random.default_rng((seed, k)).uniform(*window(replay, k), count):
        replay.train(k, float(log2_lr))


def golden(replay: Replay, k: int, count: int) -> None:
    low, high = window(replay, k)
    places = [high - GOLDEN * (high - low), low + GOLDEN * (high - low)]
    losses = [replay.train(k, place) for place in places]
    for _ in range(count - 2):
        if np.nan_to_num(losses[0], nan=math.inf) < np.nan_to_num(losses[1], nan=math.inf):
            high, places[1], losses[1] = places[1], places[0], losses[0]
            places[0] = high - GOLDEN * (high - low)
            losses[0] = replay.train(k, places[0])
        else:
            low, places[0], losses[0] = places[0], places[1], losses[1]
            places[1] = low + GOLDEN * (high - low)
            losses[1] = replay.train(k, places[1])


def by_optuna(replay: Replay, k: int, count: int, seed: int, sampler: str) -> None:
    optuna = import_module("optuna")  # which nothing else needs

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=getattr(optuna.samplers, sampler)(seed=seed, n_startup_trials=2))
    low, high = window(replay, k)

    def objective(trial) -> float:
        loss = replay.train(k, trial.suggest_float("log2_lr", low, high))
        return 10.0 if math.isnan(loss) else loss

    study.optimize(objective, n_trials=count)


def by_carbs(replay: Replay, k: int, count: int, seed: int) -> None:
    carbs = import_module("carbs")  # which nothing else needs

    low, high = window(replay, k)
    space = carbs.LinearSpace(scale=1.0, min=low, max=high)
    params = carbs.CARBSParams(
        better_direction_sign=-1,
        is_wandb_logging_enabled=False,
        is_saved_on_every_observation=False,
        resample_frequency=0,
        num_random_samples=2,
        seed=seed,
    )
    search = carbs.CARBS(params, [carbs.Param(name="log2_lr", space=space, search_center=(low + high) / 2)])
    for _ in range(count):
        suggestion = search.suggest().suggestion
        loss = replay.train(k, suggestion["log2_lr"])
        failed = math.isnan(loss)
        seen = carbs.ObservationInParam(input=suggestion, output=0.0 if failed else loss, cost=1.0, is_failure=failed)
        search.observe(seen)


DRAWING = {
    "random": (random, SEEDS, RUNS),
    "tpe": (partial(by_optuna, sampler="TPESampler"), SEEDS, RUNS),
    "gp": (partial(by_optuna, sampler="GPSampler"), SEEDS[:1], (4, 6, 8)),  # slow, as is the next
    "carbs": (by_carbs, SEEDS[:1], (4,)),
}
PACKAGES = {"tpe": "optuna", "gp": "optuna", "carbs": "carbs"}


def score(search: Callable[[Replay], list[float]], *, verbose: bool = False) -> Score:
    total = Score()
    for ladder in ladders():
        replay = Replay(ladder)
        total.add(replay, search(replay))
        if verbose:
            runs = [len(known) for known in replay.known]
            print(
                f"  cost {total.cost[-1]:.3f}, runs {runs}, lost {total.regret[-1]:.4f}: {ladder.table} {ladder.label}"
            )
    return total


def rivals() -> Iterator[tuple[str, int, Score]]:
    """(name, runs a size, score) of every other search."""
    for count in RUNS:
        yield "golden", count, score(partial(by_hand, count=count, ask=golden))
    for name, (ask, seeds, counts) in DRAWING.items():
        if name in PACKAGES and find_spec(PACKAGES[name]) is None:
            print(f"{name} is left out: there is no package {PACKAGES[name]}")
            continue
        for count in counts:
            total = Score()
            for seed in seeds:
                one = score(partial(by_hand, count=count, ask=partial(ask, seed=seed)))
                for key, values in vars(one).items():
                    getattr(total, key).extend(values)
            yield name, count, total


def draw(figure: Path, found: list[tuple[str, Score]]) -> None:
    """Share of sizes near the optimum, and nats lost at the largest, over the cost; log scales."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(9, 3.6), layout="constrained")
    near, regret = canvas.subplots(1, 2)
    for name in dict.fromkeys(name for name, _ in found):
        scores = [one for other, one in found if other == name]
        cost = [100 * one.numbers["cost"] for one in scores]
        ours = name.startswith("mupsweep")
        style = {"marker": "*" if ours else "o", "ms": 12 if ours else 4, "ls": "" if ours else "-", "label": name}
        near.plot(cost, [100 * one.numbers["near"] for one in scores], **style)
        regret.plot(cost, [max(1e-4, float(np.mean(one.regret))) for one in scores], **style)
    near.set(ylabel="sizes within 0.25 octaves of the optimum, %", ylim=(0, 102))
    regret.set(ylabel="nats lost at the largest size", yscale="log")
    for axes in (near, regret):
        axes.set(xlabel="FLOPs, % of 13 LRs with 3 seeds", xscale="log", xticks=[4, 7, 10, 15, 20, 30])
        axes.set_xticks([], minor=True)
        axes.set_xticklabels(["4", "7", "10", "15", "20", "30"])
        axes.grid(alpha=0.3)
    near.legend(frameon=False, fontsize=8)
    canvas.savefig(figure, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path, help="compare with the other searches, and draw them")
    parser.add_argument("--ladders", action="store_true", help="print every ladder")
    given = parser.parse_args()
    one = score(partial(mupsweep, at_once=1), verbose=given.ladders)
    four = score(partial(mupsweep, at_once=4), verbose=given.ladders)
    forecasting = score(partial(mupsweep, at_once=1, untrained=1), verbose=given.ladders)
    found = [("mupsweep", one), ("mupsweep x 4", four), ("mupsweep, target", forecasting)]
    for name, result in found:
        print(result.line(name), flush=True)
    if given.figure is not None:
        for name, count, result in rivals():
            print(result.line(f"{name}, {count} runs"), flush=True)
            found.append((name, result))
        draw(given.figure, found)
    missed = [k for k, bar in BARS.items() if (one.numbers[k] > bar if k == "cost" else one.numbers[k] < bar)]
    print(f"missed: {', '.join(missed)}" if missed else "every bar is met")
    return bool(missed)


if __name__ == "__main__":
    raise SystemExit(main())
