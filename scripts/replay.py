"""What a search finds and costs beside the dense grid it is replayed on: `python scripts/replay.py sweeps/dense`.

Takes finished sweeps on a grid of half octaves, or their runs.csv, and lets sweep.search=adaptive ask them for losses
instead of training. Every replay shuffles the seeds and draws other log2_lrs to begin from, so that one sweep gives
many searches. `--synthetic 200` adds sweeps with a known truth (scripts/calibrate.py). With OMP_NUM_THREADS=1 it is
three times as fast, since the matrices are small.

Printed are, per variant and in all: the share of the grid's runs and FLOPs that the search took, its rounds, how far
its optima are from those of the whole grid (octaves), and the half-widths of the intervals of both.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import calibrate
import numpy as np

from mupsweep.analysis.curves import collect
from mupsweep.analysis.labels import DIVERGED, DONE
from mupsweep.analysis.optimum import Optimum
from mupsweep.analysis.run_result import RunResult
from mupsweep.analysis.transfer import ladder_optima
from mupsweep.store.results import read_runs
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.store.tables import read_table
from mupsweep.sweep.config import ADAPTIVE, GridConfig
from mupsweep.sweep.size_search import Proposal, propose

STEP = 0.5  # octaves
WITHIN = 0.25  # octaves: the aim is to be so near the grid's optimum
TRIM = 3  # LRs that a replay may leave out at each end of where it begins
Table = dict[Proposal, RunResult]


@dataclass
class Tally:
    """What replays came to.

    Attributes:
        runs, flops: shares of the grid's.
        errors: octaves from the grid's optimum, for every size that has one.
        truth, grid_truth: octaves from the truth, of the search and of the grid, where it is known.
        widths, grid_widths: half-widths of the intervals.
    """

    runs: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    truth: list[float] = field(default_factory=list)
    grid_truth: list[float] = field(default_factory=list)
    widths: list[float] = field(default_factory=list)
    grid_widths: list[float] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        for key, values in vars(self).items():
            values += getattr(other, key)

    def line(self) -> str:
        errors = np.array(self.errors)
        columns = [
            f"{len(self.runs):7d}",
            f"{np.mean(self.runs):5.0%}",
            f"{np.mean(self.flops):5.0%} {max(self.flops):5.0%}",
            f"{np.mean(self.rounds):6.1f}",
            f"{np.median(errors):6.2f} {np.quantile(errors, 0.95):5.2f} {np.mean(errors <= WITHIN):6.1%}",
            f"{np.median(self.widths):6.2f} {np.median(self.grid_widths):5.2f}",
        ]
        if self.truth:
            near, grid = (np.mean(np.array(values) <= WITHIN) for values in (self.truth, self.grid_truth))
            columns.append(f"{near:6.1%} {grid:6.1%}")
        return "  ".join(columns)


HEADER = (
    f"{'':30}  replays   runs  FLOPs   max  rounds   error   p95  <=0.25   half  grid's  (of the truth: <=0.25, grid's)"
)


def search(table: Table, grid: GridConfig) -> tuple[list[RunResult], int]:
    """The rows that a search asks a table for, and its rounds. A run that the table does not have ends it there."""
    lrs = [key.log2_lr for key in table]
    rows: Table = {}
    rounds = 0
    while new := [p for p in propose(rows.values(), grid, (min(lrs), max(lrs))) if p not in rows and p in table]:
        rows |= {key: table[key] for key in new}
        rounds += 1
    return list(rows.values()), rounds


def compare(
    table: Table, grid: GridConfig, dense: Sequence[Optimum], truth: Mapping[float, float] | None = None
) -> Tally:
    """One search beside the grid.

    Args:
        dense: the optima of the whole table.
        truth: the true optimum by width ratio.
    """
    rows, rounds = search(table, grid)
    whole = sum(map(cost, table.values()))
    made = Tally([len(rows) / len(table)], [sum(map(cost, rows)) / whole], [rounds])
    found = {(o.curve.width_ratio, o.curve.depth_ratio): o for o in ladder_optima("width", collect(rows))}
    for aim in dense:
        if aim.log2_lr is None:
            continue
        mine = found.get((aim.curve.width_ratio, aim.curve.depth_ratio))
        place = np.inf if mine is None or mine.log2_lr is None else mine.log2_lr
        made.errors.append(abs(place - aim.log2_lr))
        made.widths.append(half_width(mine))
        made.grid_widths.append(half_width(aim))
        if truth is not None:
            true = truth[aim.curve.width_ratio]
            made.truth.append(abs(place - true))
            made.grid_truth.append(abs(aim.log2_lr - true))
    return made


def half_width(o: Optimum | None) -> float:
    return np.inf if o is None or o.low is None or o.high is None else (o.high - o.low) / 2


def cost(row: RunResult) -> float:
    """FLOPs of a run, up to a factor where the table does not say."""
    return float(row.flops or row.width_ratio**2 * row.depth_ratio)


def on_sweep(rows: Iterable[RunResult], replays: int, seed: int, keys: Mapping[str, Any]) -> Tally:
    """Replays of the search on the runs of one variant."""
    random = np.random.default_rng(seed)
    rows = complete(rows)
    dense = ladder_optima("width", collect(rows))
    seeds, lrs = sorted({row.seed for row in rows}), sorted({row.log2_lr for row in rows})
    ratios = sorted({(row.width_ratio, row.depth_ratio) for row in rows})
    tally = Tally()
    for _ in range(replays):
        renamed = dict(zip(seeds, random.permutation(len(seeds)).tolist(), strict=True))
        moved = [replace(row, seed=renamed[row.seed]) for row in rows]
        table: Table = {Proposal(r.width_ratio, r.depth_ratio, r.log2_lr, r.seed): r for r in moved}
        begin = lrs[random.integers(0, TRIM + 1) : len(lrs) - random.integers(0, TRIM + 1)]
        tally.add(compare(table, adaptive(ratios, begin, len(seeds), keys), dense))
    return tally


def complete(rows: Iterable[RunResult]) -> list[RunResult]:
    """The runs at the longest row of neighbouring half octaves that every size has with every seed."""
    rows = [row for row in rows if row.log2_lr % STEP == 0]
    cells = {(row.width_ratio, row.depth_ratio, row.seed) for row in rows}
    having: dict[float, set[Any]] = defaultdict(set)
    for row in rows:
        having[row.log2_lr].add((row.width_ratio, row.depth_ratio, row.seed))
    stretches: list[list[float]] = [[]]
    for log2_lr in sorted(x for x, had in having.items() if had == cells):
        if stretches[-1] and log2_lr - stretches[-1][-1] > STEP:
            stretches.append([])
        stretches[-1].append(log2_lr)
    longest = max(stretches, key=len)
    return [row for row in rows if row.log2_lr in longest]


def adaptive(ratios: list[tuple[float, float]], lrs: list[float], seeds: int, keys: Mapping[str, Any]) -> GridConfig:
    widths, depths = (tuple(sorted(set(of))) for of in zip(*ratios, strict=True))
    return GridConfig(None, widths, depths, tuple(lrs), search=ADAPTIVE, max_seeds=seeds, **keys)


def on_synthetic(count: int, seed: int, keys: Mapping[str, Any]) -> Tally:
    """The search on synthetic ladders of 15 LRs and three seeds, which may go beyond those."""
    random = np.random.default_rng(seed)
    tally = Tally()
    for _ in range(count):
        setting = replace(calibrate.Setting.draw(random), seeds=3, step=STEP, gap=1.0, holes=0.0)
        ladder = calibrate.draw_ladder(random, setting)
        lrs = ladder.sizes[0].log2_lrs.tolist()[:15]
        table: Table = {}
        for size in ladder.sizes:
            for i, log2_lr in enumerate(size.log2_lrs.tolist()):
                losses = size.losses[i].tolist() if size.diverged[i] == 0 else [np.nan] * setting.seeds
                for run_seed, loss in enumerate(losses):
                    key = Proposal(2.0**size.position, 1.0, log2_lr, run_seed)
                    table[key] = synthetic_run(key, loss)
        truth = {2.0**size.position: at for size, at in zip(ladder.sizes, ladder.optima, strict=False)}
        grid = adaptive([(ratio, 1.0) for ratio in truth], lrs, 3, keys)
        within: Table = {key: row for key, row in table.items() if key.log2_lr in lrs}
        tally.add(compare(within, grid, ladder_optima("width", collect(within.values())), truth))
    return tally


def synthetic_run(run: Proposal, loss: float) -> RunResult:
    """The result of a run; a loss that is nan is a run that diverged."""
    diverged = bool(np.isnan(loss))
    return RunResult(
        run_id="",
        model="m",
        optimizer="o",
        parametrization="p",
        width=int(32 * run.width_ratio),
        depth=4,
        width_ratio=run.width_ratio,
        depth_ratio=1.0,
        log2_lr=run.log2_lr,
        seed=run.seed,
        status=DIVERGED if diverged else DONE,
        val_loss=None if diverged else loss,
    )


def variants(path: str) -> Iterator[tuple[str, list[RunResult]]]:
    """(name, runs) of every variant in a sweep's folder or a table."""
    rows = read_table(path).runs if Path(path).is_file() else read_runs([SweepDir.open(path)])
    grouped: dict[str, list[RunResult]] = defaultdict(list)
    for row in rows:
        grouped[f"{Path(path).stem}: {row.optimizer}/{row.parametrization}"].append(row)
    yield from grouped.items()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="*", help="folders, or tables like runs.csv")
    parser.add_argument("--replays", type=int, default=30, help="of every variant")
    parser.add_argument("--synthetic", type=int, default=0, help="sweeps with a known truth")
    parser.add_argument("--half-width", type=float, default=WITHIN)
    parser.add_argument("--max-runs", type=int, default=GridConfig.max_runs)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    keys = {"half_width": given.half_width, "max_runs": given.max_runs}
    print(HEADER)
    total = Tally()
    for path in given.sweeps:
        for variant, rows in variants(path):
            tally = on_sweep(rows, given.replays, given.seed, keys)
            print(f"{variant:30}  {tally.line()}", flush=True)
            total.add(tally)
    if total.runs:
        print(f"{'all':30}  {total.line()}")
    if given.synthetic:
        print(f"{'synthetic':30}  {on_synthetic(given.synthetic, given.seed, keys).line()}")


if __name__ == "__main__":
    main()
