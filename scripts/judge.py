"""How good the answers are on public LR sweeps: `python scripts/judge.py [--ladders]`; exit code 1 if a bar is missed.

Nobody knows the true optimum of a published sweep, so the answers are judged by what parts of it say of each other:

    whole      every ladder of three sizes or more as published: how many verdicts are called, how many are those of the
               reference, how many the opposite; how many sizes with the best LR inside the grid have an interval
    halves     the even and the odd LRs of dense curves as two sweeps on coarse grids: do their intervals agree, do they
               hold the optimum of the full curve, how far are the estimates from it
    forecast   the largest one or two sizes left out and asked for: does the interval hold their optimum, how wide is
               it, and what is lost at the largest size by the LR that is handed over (nats, one at most)

References are made of the runs alone (no estimator had a hand in them): the vertex of a parabola through a curve's best
LR and its neighbours, draws of polynomials through dense curves, and a verdict by how far the vertex moves and what the
base's vertex costs. tests/tables has the sweeps and their sources.

`--page FILE` writes the page of `make judge`. `--program mupsweep` asks an executable (`transfer --from FILE --json`,
and `--to width=W`) instead of the library.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import judge_page
import numpy as np
import numpy.typing as npt

from mupsweep.analysis.estimate import UNKNOWN, Estimate
from mupsweep.analysis.forecast import forecast
from mupsweep.analysis.loss_curve import SizeRuns, fit_ladder
from mupsweep.analysis.transfer import LadderResult
from mupsweep.analysis.verdict import DRIFTS, INCONCLUSIVE, TRANSFERS, judge

Array = npt.NDArray[np.float64]

TABLES = Path(__file__).parents[1] / "tests" / "tables"
BASE_WIDTH, BASE_DEPTH = 1024, 840  # that ladders are written with: many ratios of them are whole numbers
CLIFF = 0.3  # nats above the best LR: no straight line leads onto a cliff
DENSE_LRS, DENSE_GAP = 7, 0.62  # a curve has an optimum that is known where so many LRs are so near (octaves) around it
MOST_HALVED = 24
MUSTS: dict[tuple[str, str], tuple[str, ...]] = {  # (table, part of the label): what every reader says
    ("zheng_muon_kimi_width", "/sp/"): (DRIFTS,),
    ("zheng_muon_kimi_width", "/spectral/"): (TRANSFERS, INCONCLUSIVE),
    ("mup_issue66", ""): (DRIFTS,),
    ("sso_width", "/muon/"): (TRANSFERS,),
    ("sso_width", "/sso/"): (TRANSFERS,),
    ("steplaw_width_tpp53", "bs128/"): (DRIFTS,),
}
AT_LEAST = {
    "called": 0.60,
    "right": 0.75,
    "intervals": 0.92,
    "halves: intervals": 0.92,
    "halves: agree": 0.93,
    "halves: hold": 0.90,
    "forecast: answered": 0.95,
    "forecast: holds": 0.88,
}
AT_MOST = {
    "opposite": 0.04,
    "musts missed": 0.0,
    "width": 0.75,
    "total drift's width": 1.2,
    "halves: width": 0.85,
    "halves: rms error": 0.16,
    "halves: opposite": 0.05,
    "forecast: width": 2.5,
    "forecast: regret, mean": 0.11,
    "forecast: regret, median": 0.003,
}


# ---- the sweeps


@dataclass(frozen=True)
class Ladder:
    """A published ladder: runs of several sizes along one axis.

    Attributes:
        label: model/optimizer/parametrization/, with the shape where sizes are horizons.
        axis: width, depth or horizon; a ladder over width and depth is one over width.
    """

    table: str
    label: str
    axis: str
    sizes: tuple[SizeRuns, ...]

    def of(self, sizes: Sequence[SizeRuns]) -> Ladder:
        """Other sizes, the first of which is the base."""
        base = sizes[0].position
        return replace(self, sizes=tuple(replace(size, position=size.position - base) for size in sizes))

    @property
    def curves(self) -> list[SizeRuns]:
        """Sizes with three LRs or more."""
        return [size for size in self.sizes if size.fitted]


def read(path: Path) -> list[Ladder]:
    """The ladders of a table with three curves or more: over sizes at the longest horizon, and over horizons."""
    runs: dict[str, dict[tuple[int, int, int], list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    with path.open() as file:
        for row in csv.DictReader(file):
            label = "".join(f"{row[key]}/" for key in ("model", "optimizer", "parametrization"))
            shape = int(row["width"]), int(row["depth"]), int(row.get("horizon") or 0)
            runs[label][shape].append((float(row["log2_lr"]), float(row["val_loss"])))
    ladders = []
    for label, shapes in runs.items():
        longest = max(horizon for *_, horizon in shapes)
        models = sorted((s for s in shapes if s[2] == longest), key=lambda s: (s[0] * s[1], s))
        axis = "width" if len({width for width, *_ in models}) > 1 else "depth"
        ladders.append(Ladder(path.stem, label, axis, curves_of(shapes, models, lambda s: s[0] * s[1])))
        for width, depth in sorted({s[:2] for s in shapes}):
            horizons = sorted(s for s in shapes if s[:2] == (width, depth))
            sizes = curves_of(shapes, horizons, lambda s: s[2])
            ladders.append(Ladder(path.stem, f"{label}{width}x{depth}/", "horizon", sizes))
    return [ladder for ladder in ladders if len(ladder.curves) >= 3]


def curves_of(
    runs: Mapping[tuple[int, int, int], list[tuple[float, float]]],
    shapes: Sequence[tuple[int, int, int]],
    extent: Callable[[tuple[int, int, int]], int],
) -> tuple[SizeRuns, ...]:
    """The sizes of a ladder, by rising extent on its axis."""
    base = max(extent(shapes[0]), 1)
    return tuple(SizeRuns.of(math.log2(max(extent(s), 1) / base), *zip(*runs[s], strict=True)) for s in shapes)


def thinned(size: SizeRuns, phase: int) -> SizeRuns:
    """The even (0) or odd (1) LRs of a size."""
    step = np.median(np.diff(size.log2_lrs))
    kept = np.round((size.log2_lrs - size.log2_lrs[0]) / step).astype(int) % 2 == phase
    return SizeRuns(size.position, size.log2_lrs[kept], size.losses[kept], size.diverged[kept])


# ---- references that no estimator had a hand in


def points(size: SizeRuns) -> tuple[Array, Array]:
    """LRs and mean losses."""
    return size.log2_lrs[size.usable], size.residuals[0][size.usable]


def is_inside(size: SizeRuns) -> bool:
    """Whether the best LR has trained neighbours on both sides."""
    y = points(size)[1]
    return len(y) > 2 and 0 < int(y.argmin()) < len(y) - 1


def vertex(size: SizeRuns) -> float:
    """The parabola through the best LR and its neighbours: what people do by hand."""
    x, y = points(size)
    best = int(y.argmin())
    if not is_inside(size):
        return float(x[best])
    near = slice(best - 1, best + 2)
    curvature, slope, _ = np.polyfit(x[near], y[near], 2)
    if curvature <= 0:
        return float(x[best])
    return float(np.clip(-slope / (2 * curvature), x[best - 1], x[best + 1]))


def is_dense(size: SizeRuns) -> bool:
    """Whether the LRs around the best one are near enough to tell the optimum."""
    x, y = points(size)
    if len(x) < DENSE_LRS:
        return False
    near = x[np.abs(x - x[y.argmin()]) <= 1.3]
    best = x[y.argmin()]
    reaches = len(near) > 1 and near[0] <= best - 0.4 and near[-1] >= best + 0.4
    return bool(reaches and np.diff(near).max() < DENSE_GAP)


def dense_optimum(size: SizeRuns, draws: int = 100) -> Array | None:
    """Draws of the optimum of a dense curve: polynomials of several degrees and windows, and their noise."""
    if not (is_dense(size) and is_inside(size)):
        return None
    x, y = points(size)
    best = int(y.argmin())
    above = y - y[best]
    rng = np.random.default_rng(0)
    found: list[Array] = []
    for degree, reach, top in ((2, 1.05, 0.03), (3, 1.3, 0.045), (3, 1.75, 0.06), (4, 2.2, 0.08)):
        enough = np.sort(above)[degree + 1] + 1e-6
        near = (np.abs(x - x[best]) <= reach) & (above <= max(top, enough))
        u = x[near] - x[best]
        if len(u) < degree + 2:
            continue
        weight = 1 / (1 + above[near] / 0.02)
        design, target = np.vander(u, degree + 1, increasing=True) * weight[:, None], y[near] * weight
        inverse = np.linalg.pinv(design)
        middle = inverse @ target
        freedom = len(u) - degree + 1  # with two of a typical run's noise, 1.2 mnat
        square = ((target - design @ middle) ** 2).sum() + 2 * 0.0012**2
        sigma = np.sqrt(square / rng.chisquare(freedom, draws))
        noise = sigma[:, None] * rng.standard_normal((draws, len(u)))
        grid = np.linspace(max(u[0], -1.2), min(u[-1], 1.2), 121)
        curves = (middle + noise @ inverse.T) @ np.vander(grid, degree + 1, increasing=True).T
        found.append(x[best] + grid[curves.argmin(axis=1)])
    return np.concatenate(found) if len(found) > 1 else None


def known_optimum(size: SizeRuns) -> Array | None:
    """Draws of what is known of a curve's optimum; None where the best LR is at an end."""
    if not is_inside(size):
        return None
    dense = dense_optimum(size)
    if dense is not None:
        return dense
    x, y = points(size)
    best = int(y.argmin())
    return vertex(size) + np.linspace(-1, 1, 41) * max(x[best] - x[best - 1], x[best + 1] - x[best]) / 3


def nats_lost(size: SizeRuns, log2_lr: float) -> float:
    """Nats above the lowest point of a curve, a nat at most: parabolas between LRs, lines beyond ends and at cliffs."""
    x, y = points(size)
    y = y - y.min()
    if log2_lr > x[-1] and (size.diverged[size.log2_lrs > x[-1]] > 0).any():
        return 1.0
    if not x[0] <= log2_lr <= x[-1]:
        end, before = (0, 1) if log2_lr < x[0] else (-1, -2)
        line = y[end] + (y[before] - y[end]) / (x[before] - x[end]) * (log2_lr - x[end])
        return float(np.clip(line, y[end], 1.0))

    def height(at: float) -> float:
        middle = int(np.clip(np.abs(x - at).argmin(), 1, len(x) - 2))
        near = slice(middle - 1, middle + 2)
        if y[near].max() >= CLIFF:
            return float(np.interp(at, x, y))
        return float(np.polyval(np.polyfit(x[near] - x[middle], y[near], 2), at - x[middle]))

    return float(np.clip(height(log2_lr) - min(0.0, height(vertex(size))), 0.0, 1.0))


def reference_verdict(ladder: Ladder) -> str:
    """What a reader would say: DRIFTS, TRANSFERS, or INCONCLUSIVE where he would not bet."""
    curves = ladder.curves
    base, largest = curves[0], curves[-1]
    if at_open_end(base) or at_open_end(largest):
        return INCONCLUSIVE
    doublings = largest.position - base.position
    moved = abs(vertex(largest) - vertex(base))
    costs = []
    for size in curves[1:]:
        above = np.where(size.usable, size.residuals[0] - points(size)[1].min(), np.nan)
        above[above > CLIFF] = np.nan
        covers = size.log2_lrs[0] <= vertex(base) <= size.log2_lrs[-1]
        costs.append(float(np.interp(vertex(base), size.log2_lrs, above)) if covers else math.nan)
    if (moved >= max(1.0, doublings / 3) and not costs[-1] <= 0.01) or (moved >= 0.5 and costs[-1] >= 0.05):
        return DRIFTS
    if moved <= max(0.5, doublings / 4) and np.max(costs) <= 0.015:
        return TRANSFERS
    return INCONCLUSIVE


def verdict_of_reader(ladder: LadderResult) -> str:
    """The reference verdict on a ladder that mupsweep has judged."""
    return reference_verdict(Ladder("", "", ladder.axis, ladder.posterior.sizes))


def at_open_end(size: SizeRuns) -> bool:
    """Whether the best LR is the lowest, or the highest with no divergence beyond it."""
    x, y = points(size)
    best = int(y.argmin())
    ends_at_cliff = best > 0 and (size.diverged[size.log2_lrs > x[-1]] > 0).any()
    return best in (0, len(y) - 1) and not ends_at_cliff


# ---- who is asked


@dataclass(frozen=True)
class Answer:
    """What is said of a ladder.

    Attributes:
        optima: of every size.
    """

    verdict: str
    total_drift: Estimate
    optima: tuple[Estimate, ...]


@dataclass(frozen=True)
class Handed:
    """What is said of a target: its optimum, and the LR to use."""

    optimum: Estimate
    log2_lr: float


def library_answer(ladder: Ladder) -> Answer:
    posterior = fit_ladder(ladder.sizes)
    verdict = judge(posterior)
    return Answer(verdict.name, verdict.total_drift, tuple(optimum.estimate for optimum in posterior.optima))


def library_forecast(ladder: Ladder, position: float) -> Handed | None:
    found = forecast(fit_ladder(ladder.sizes), position)
    return None if found is None else Handed(found.optimum, found.log2_lr)


@dataclass(frozen=True)
class Program:
    """An executable that is asked through tables and JSON."""

    command: tuple[str, ...]

    def run(self, ladder: Ladder, *arguments: str) -> object | None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "runs.csv"
            write(path, ladder)
            call = [*self.command, "transfer", "--from", str(path), *arguments, "--json"]
            done = subprocess.run(call, capture_output=True, text=True, check=False)
        return json.loads(done.stdout) if done.returncode in (0, 3) else None

    def answer(self, ladder: Ladder) -> Answer:
        said = self.run(ladder)
        groups = said["groups"] if isinstance(said, dict) else []
        group = max((g for g in groups if g["axis"] == ladder.axis), key=lambda g: len(g["sizes"]), default=None)
        if group is None:
            return Answer(INCONCLUSIVE, UNKNOWN, (UNKNOWN,) * len(ladder.sizes))
        by_ratio = {round(math.log2(size["ratio"]), 2): size for size in group["sizes"]}
        optima = []
        for size in ladder.sizes:
            row = by_ratio.get(round(size.position, 2), {})
            optima.append(Estimate(*(row.get(f"log2_lr_{end}") for end in ("optimum", "low", "high"))))
        total = group["total_drift"]
        return Answer(group["verdict"], Estimate(total["octaves"], total["low"], total["high"]), tuple(optima))

    def forecast(self, ladder: Ladder, position: float) -> Handed | None:
        key, value = ("depth", BASE_DEPTH) if ladder.axis == "depth" else ("width", BASE_WIDTH)
        said = self.run(ladder, "--to", f"{key}={round(value * 2**position)}")
        said = said[0] if isinstance(said, list) else said
        if not isinstance(said, dict) or None in (said.get("log2_lr_low"), said.get("log2_lr_high")):
            return None
        optimum = Estimate(said.get("log2_lr_optimum", said["log2_lr"]), said["log2_lr_low"], said["log2_lr_high"])
        return Handed(optimum, said["log2_lr"])


def write(path: Path, ladder: Ladder) -> None:
    """A ladder as a table whose base is BASE_WIDTH wide and BASE_DEPTH deep."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        columns = ("model", "optimizer", "parametrization", "width", "depth", "horizon", "log2_lr", "seed", "val_loss")
        writer.writerow(columns)
        for size in ladder.sizes:
            ratio = 2.0**size.position
            width = round(BASE_WIDTH * ratio) if ladder.axis == "width" else BASE_WIDTH
            depth = round(BASE_DEPTH * ratio) if ladder.axis == "depth" else BASE_DEPTH
            horizon = round(1e6 * ratio) if ladder.axis == "horizon" else ""
            for log2_lr, losses, diverged in zip(size.log2_lrs, size.losses, size.diverged, strict=True):
                cells = [*(f"{loss:.6f}" for loss in losses[np.isfinite(losses)]), *["nan"] * int(diverged)]
                for seed, loss in enumerate(cells):
                    writer.writerow(("m", "o", "p", width, depth, horizon, f"{log2_lr:.6f}", seed, loss))


# ---- what is measured

Answers = Callable[[Ladder], Answer]
Forecasts = Callable[[Ladder, float], Handed | None]
Map = Callable[..., Iterable]


def judge_whole(ladders: Sequence[Ladder], answers: Answers, each: Map, show: bool) -> dict[str, float]:
    """The ladders as they were published."""
    called, right, opposite, intervals, widths, total_widths, missed = [], [], [], [], [], [], 0
    for ladder, answer in zip(ladders, each(answers, ladders), strict=True):
        expected = reference_verdict(ladder)
        called.append(answer.verdict != INCONCLUSIVE)
        if expected != INCONCLUSIVE:
            right.append(answer.verdict == expected)
            opposite.append({answer.verdict, expected} == {TRANSFERS, DRIFTS})
        if (width := width_of(answer.total_drift)) is not None:
            total_widths.append(width)
        for size, optimum in zip(ladder.sizes, answer.optima, strict=True):
            if size.fitted and is_inside(size):
                width = width_of(optimum)
                intervals.append(width is not None)
                widths += [] if width is None else [width]
        for (table, part), allowed in MUSTS.items():
            missed += table == ladder.table and part in ladder.label and answer.verdict not in allowed
        if show:
            name = f"{ladder.table} {ladder.label}{ladder.axis}"
            print(f"{answer.verdict:12} (reference {expected:12}) {answer.total_drift}  {name}")
    return {
        "ladders": len(ladders),
        "called": float(np.mean(called)),
        "right": float(np.mean(right)),
        "opposite": float(np.mean(opposite)),
        "musts missed": missed,
        "intervals": float(np.mean(intervals)),
        "width": float(np.median(widths)),
        "total drift's width": float(np.median(total_widths)),
    }


def width_of(estimate: Estimate) -> float | None:
    return None if estimate.low is None or estimate.high is None else estimate.high - estimate.low


def judge_halves(ladders: Sequence[Ladder], answers: Answers, each: Map) -> dict[str, float]:
    """Even and odd LRs of dense curves as two sweeps."""
    enough = [ladder for ladder in ladders if sum(map(is_dense, ladder.curves)) > 1]
    dense = [ladder.of([size for size in ladder.curves if is_dense(size)]) for ladder in enough]
    dense = dense[:: max(1, len(dense) // MOST_HALVED)][:MOST_HALVED]
    halves = [ladder.of([thinned(size, phase) for size in ladder.sizes]) for ladder in dense for phase in (0, 1)]
    said = list(each(answers, halves))
    intervals, widths, agree, hold, errors, best_errors, vertex_errors, opposite = [], [], [], [], [], [], [], []
    for k, ladder in enumerate(dense):
        pair, both = halves[2 * k : 2 * k + 2], said[2 * k : 2 * k + 2]
        opposite.append({answer.verdict for answer in both} == {TRANSFERS, DRIFTS})
        for i, size in enumerate(ladder.sizes):
            estimates = [answer.optima[i] for answer in both]
            if all(width_of(e) is not None and e.value is not None for e in estimates):
                agree.append(do_agree(*estimates))
            known = dense_optimum(size)
            for half, estimate in zip(pair, estimates, strict=True):
                part, width = half.sizes[i], width_of(estimate)
                if is_inside(part):
                    intervals.append(width is not None)
                    widths += [] if width is None else [width]
                if known is None:
                    continue
                if width is not None:
                    hold.append(share_inside(known, estimate))
                best = part.log2_lrs[part.best]
                aim = np.median(known)
                errors.append((best if estimate.value is None else estimate.value) - aim)
                best_errors.append(best - aim)
                vertex_errors.append(vertex(part) - aim)
    return {
        "halves: ladders": len(dense),
        "halves: intervals": float(np.mean(intervals)),
        "halves: width": float(np.median(widths)),
        "halves: agree": float(np.mean(agree)),
        "halves: hold": float(np.mean(hold)),
        "halves: rms error": rms(errors),
        "    of the best LR": rms(best_errors),
        "    of a parabola": rms(vertex_errors),
        "halves: opposite": float(np.mean(opposite)),
    }


def do_agree(one: Estimate, other: Estimate) -> bool:
    """Whether two estimates differ by less than the root of the sum of squares of their half-widths."""
    low, high = sorted((one, other), key=lambda e: e.value or 0.0)
    if None in (low.value, low.high, high.value, high.low):
        return False
    below, above = low.high - low.value, high.value - high.low  # type: ignore[operator]
    return high.value - low.value <= math.hypot(below, above)  # type: ignore[operator]


def share_inside(draws: Array, estimate: Estimate) -> float:
    assert estimate.low is not None
    assert estimate.high is not None
    return float(((estimate.low <= draws) & (draws <= estimate.high)).mean())


def rms(errors: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))


def judge_forecasts(ladders: Sequence[Ladder], forecasts: Forecasts, each: Map, show: bool) -> dict[str, float]:
    """The largest sizes left out, and asked for."""
    questions: list[tuple[Ladder, float, SizeRuns]] = []
    for ladder in ladders:
        target = ladder.curves[-1]
        for kept in (ladder.curves[:-1], ladder.curves[:-2]):
            asks = ladder.axis != "horizon" and len(kept) >= 3 and known_optimum(target) is not None
            if asks and target.position > kept[-1].position:
                questions.append((ladder.of(kept), target.position - kept[0].position, target))
    said = each(forecasts, [ladder for ladder, *_ in questions], [position for _, position, _ in questions])
    answered, holds, widths, errors, stay_errors, costs, stay_costs = [], [], [], [], [], [], []
    for (ladder, _, target), handed in zip(questions, said, strict=True):
        answered.append(handed is not None)
        known = known_optimum(target)
        if handed is None or known is None:
            continue
        stay = vertex(ladder.curves[-1])
        holds.append(share_inside(known, handed.optimum))
        widths.append(width_of(handed.optimum) or math.inf)
        errors.append((handed.optimum.value or math.inf) - np.median(known))
        stay_errors.append(stay - np.median(known))
        costs.append(nats_lost(target, handed.log2_lr))
        stay_costs.append(nats_lost(target, stay))
        if show:
            outcome = f"came out {np.median(known):+.2f}, lost {costs[-1]:.4f}"
            print(f"{handed.optimum}, {outcome}  {ladder.table} {ladder.label}")
    return {
        "forecasts": len(questions),
        "forecast: answered": float(np.mean(answered)),
        "forecast: holds": float(np.mean(holds)),
        "forecast: width": float(np.median(widths)),
        "forecast: rms error": rms(errors),
        "    of staying": rms(stay_errors),
        "forecast: regret, mean": float(np.mean(costs)),
        "    of staying, mean": float(np.mean(stay_costs)),
        "forecast: regret, median": float(np.median(costs)),
        "    of staying, median": float(np.median(stay_costs)),
    }


def is_missed(name: str, value: float) -> bool:
    """Whether a figure is worse than its bar; one that could not be computed is."""
    return not (value >= AT_LEAST.get(name, -math.inf) and value <= AT_MOST.get(name, math.inf))


def report(figures: Mapping[str, float]) -> str:
    """A line a figure, beside its bar."""
    lines = []
    for name, value in figures.items():
        bar = f">= {AT_LEAST[name]:g}" if name in AT_LEAST else f"<= {AT_MOST[name]:g}" if name in AT_MOST else ""
        lines.append(f"{name:28} {value:8.3f}  {bar:9} {'MISSED' if bar and is_missed(name, value) else ''}".rstrip())
    return "\n".join(lines)


def measure(
    tables: Iterable[Path], answers: Answers, forecasts: Forecasts, each: Map = map, show: bool = False
) -> dict[str, float]:
    """Every figure of some tables.

    Args:
        each: `map`, or that of a pool of processes.
    """
    ladders = [ladder for table in tables for ladder in read(table)]
    return {
        **judge_whole(ladders, answers, each, show),
        **judge_halves(ladders, answers, each),
        **judge_forecasts(ladders, forecasts, each, show),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", type=Path, help="those of tests/tables unless given")
    parser.add_argument("--program", help="an executable to ask; the library unless given")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--ladders", action="store_true", help="print what is said of each")
    parser.add_argument("--page", type=Path, help="write the figures there, with a picture of every table beside it")
    given = parser.parse_args()
    program = Program((given.program,)) if given.program else None
    answers, forecasts = (program.answer, program.forecast) if program else (library_answer, library_forecast)
    with ProcessPoolExecutor(given.processes) as pool:
        tables = given.tables or sorted(TABLES.glob("*.csv"))
        figures = measure(tables, answers, forecasts, pool.map, given.ladders)
    print(report(figures))
    if given.page:
        judge_page.write(given.page, tables, report(figures), reader=verdict_of_reader)
    sys.exit(any(is_missed(name, value) for name, value in figures.items()))


if __name__ == "__main__":
    main()
