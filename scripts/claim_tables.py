"""The tables of the claims' page: what recorded runs show of a claim, and whether that is what a work says of it."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import geometric_mean
from typing import get_type_hints

from mupsweep.analysis.analysis import Analysis, analyse
from mupsweep.analysis.comparison import Comparison
from mupsweep.analysis.run_result import RunResult
from mupsweep.analysis.transfer import LadderResult
from mupsweep.analysis.verdict import DRIFTS, INCONCLUSIVE, TRANSFERS
from mupsweep.check.exponents import TOLERANCE
from mupsweep.check.measure import CHANGE, FEATURES, UPDATE
from mupsweep.report.norms import NormRow
from mupsweep.store.tables import read_table

ROOT = Path(__file__).resolve().parent.parent
RECORDED = ROOT / "configs" / "experiment" / "claims"
PUBLISHED = ROOT / "tests" / "tables"

KEPT_NORM = 1.5  # a factor by which ||W||_R may change and yet count as kept
ALIKE = 1.2  # a factor by which relative updates at the largest and the smallest width may differ and count as alike
SAVED = 1.2  # a speed-up from which compute counts as saved: between nothing and the claimed 1.4
VERDICTS = SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"


@cache
def runs_of(name: str) -> Sequence[RunResult]:
    """The recorded runs of a sweep, or of a table that a paper prints."""
    ours = RECORDED / f"{name}.csv"
    return read_table(str(ours if ours.exists() else PUBLISHED / ours.name)).runs


@cache
def recorded(name: str, up_to: int | None = None, horizon: int | None = None) -> Analysis:
    """The analysis of some runs: all of them, those up to a width, or those that ended after so many tokens."""
    runs = [run for run in runs_of(name) if up_to is None or run.width <= up_to]
    if horizon is not None:
        runs = [replace(run, horizon=None) for run in runs if run.horizon == horizon]
    return analyse(runs)


def courses(name: str) -> Iterator[NormRow]:
    """What the runs of a sweep recorded of norms, by role."""
    types = get_type_hints(NormRow)
    with (RECORDED / f"{name}-norms.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            number = {k: (int if types[k] is int else float)(v) for k, v in row.items() if types[k] is not str}
            yield NormRow(**{"run_id": "", **row, **number})


@dataclass(frozen=True)
class Finding:
    """What one variant shows of a claim.

    Attributes:
        cells: of its line in a table.
        verdict: SUPPORTED, CONTRADICTED or UNDECIDED.
    """

    cells: tuple[str, ...]
    verdict: str


@dataclass(frozen=True)
class Table:
    """Findings under their columns."""

    columns: tuple[str, ...]
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        head = [*(column.replace("|", "\\|") for column in self.columns), "the claim is"]
        lines = [head, ["---"] * len(head), *([*f.cells, f"**{f.verdict}**"] for f in self.findings)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _judged(claimed: bool, otherwise: bool) -> str:
    """The verdict where the runs show what is claimed, its opposite, or neither."""
    return SUPPORTED if claimed else CONTRADICTED if otherwise else UNDECIDED


def transfer(sweep: str, axis: str = "width", **claimed: str) -> Table:
    """Whether the LR transfers, by optimizer and parametrization.

    Args:
        claimed: the verdict that is claimed for a parametrization, or "rises" where its LR is said to drift upwards;
            the others are left out.
    """
    findings = []
    for group in recorded(sweep).groups:
        if group.axis == axis and group.parametrization in claimed:
            cells = (group.optimizer, group.parametrization, *_drift(group))
            verdict = _transfers(group, claimed[group.parametrization])
            findings.append(Finding(cells, verdict))
    columns = ("optimizer", "rule", f"octaves per doubling of the {axis}", "in all", "base's LR costs, nats", "LR")
    return Table(columns, tuple(findings))


def _drift(group: LadderResult) -> tuple[str, ...]:
    return f"{group.drift:+.2f}", f"{group.total_drift:+.2f}", f"{group.regret:.4f}", str(group.verdict)


def _transfers(group: LadderResult, claimed: str) -> str:
    found, total = group.verdict, group.total_drift
    if claimed != "rises":
        return _judged(found == claimed, found not in (claimed, INCONCLUSIVE))
    rises, falls = total.low is not None and total.low > 0, total.high is not None and total.high < 0
    return _judged(found == DRIFTS and rises, found == TRANSFERS or (found == DRIFTS and falls))


def lower(sweep: str, parametrization: str, axis: str = "width") -> Table:
    """Whether a parametrization ends lower than SP at the largest size, each at its own best LR, by optimizer."""
    findings = []
    for c in recorded(sweep).comparisons:
        if c.axis == axis and c.of[2] == parametrization and c.over[2] == "sp":
            low, high = c.lower.low, c.lower.high
            verdict = _judged(low is not None and low > 0, high is not None and high < 0)
            cells = (c.of[1], f"{c.lower:+.4f}", f"{c.speed_up:.2f}")
            findings.append(Finding(cells, verdict))
    columns = ("optimizer", f"{parametrization} ends lower than sp by, nats", "sp's compute for that loss, times")
    return Table(columns, tuple(findings))


def saved(sweep: str, *widths: str, **claimed: str) -> Table:
    """How far optimizers end below AdamW at every size, each at its own best LR, and how much compute that saves.

    Args:
        widths: those at which it is read, each from the sizes up to it.
        claimed: "saved" or "lost" compute, by parametrization, at the largest width that both have.
    """
    found: dict[tuple[str, str], dict[int, Comparison]] = defaultdict(dict)
    for width in map(int, widths):
        for c in recorded(sweep, up_to=width).comparisons:
            if c.over[1] == "adamw" and c.of[2] == c.over[2] and c.of[2] in claimed and c.width == width:
                found[c.of[1:]][width] = c
    findings = []
    for (optimizer, parametrization), of_width in sorted(found.items()):
        speed_up = of_width[max(of_width)].speed_up
        saves = speed_up.low is not None and speed_up.low > SAVED
        loses = speed_up.high is not None and speed_up.high < SAVED
        verdict = _judged(saves, loses) if claimed[parametrization] == "saved" else _judged(loses, saves)
        lower = (f"{of_width[width].lower:+.3f}" if width in of_width else "" for width in map(int, widths))
        cells = (optimizer, parametrization, *lower, f"{speed_up:.2f}")
        findings.append(Finding(cells, verdict))
    below = (f"nats below AdamW at width {width}" for width in widths)
    return Table(("optimizer", "rule", *below, "AdamW's compute for that loss, times"), tuple(findings))


def coordinates(check: str, axis: str, **claimed: str) -> Table:
    """How features and the updates of hidden matrices grow with a size, by optimizer and parametrization.

    Args:
        claimed: of a parametrization "flat" features, features that "grow", or "frozen" matrices under flat features.
    """
    with (RECORDED / f"{check}.csv").open(newline="") as file:
        measured = {
            (row["optimizer"], row["parametrization"], row["quantity"], row["role"]): row
            for row in csv.DictReader(file)
            if row["axis"] == axis
        }
    findings = []
    for optimizer, rule in dict.fromkeys(key[:2] for key in measured):
        if rule not in claimed:
            continue
        features = measured[optimizer, rule, CHANGE + FEATURES, ""]
        updates = measured[optimizer, rule, UPDATE, "hidden"]
        low, high = float(features["low"]), float(features["high"])
        flat, grows = low <= TOLERANCE and high >= -TOLERANCE, low > TOLERANCE
        match claimed[rule]:
            case "grow":
                verdict = _judged(grows, flat)
            case "flat":
                verdict = _judged(flat, grows)
            case _:
                freezes, moves = float(updates["high"]) < -TOLERANCE, float(updates["low"]) > -TOLERANCE
                verdict = _judged(flat and freezes, grows or moves)
        intervals = (
            f"{float(r['exponent']):+.2f} [{float(r['low']):+.2f}, {float(r['high']):+.2f}]"
            for r in (features, updates)
        )
        findings.append(Finding((optimizer, rule, *intervals), verdict))
    columns = ("optimizer", "rule", f"features change as {axis}^", f"hidden ||dW||_R as {axis}^")
    return Table(columns, tuple(findings))


def norms(*stays: str, **remarks: str) -> Table:
    """How ||W||_R of hidden matrices changes through a run at the best LR, by optimizer and width.

    Args:
        stays: optimizers whose norm is claimed to stay.
        remarks: of every sweep, what is said of its optimizers.
    """
    findings = []
    for sweep, remark in remarks.items():
        for (optimizer, _, width), course in _hidden(sweep).items():
            first, last = course[0], course[-1]
            growth = last.norm / first.norm  # type: ignore[operator]
            kept, variant = 1 / KEPT_NORM <= growth <= KEPT_NORM, f"{optimizer} {remark}".strip()
            ends = (f"{first.norm:.2f}", f"{last.norm:.2f}", f"{growth:.2f}")
            claimed = kept == (variant in stays)
            cells = (variant, str(width), f"{last.log2_lr:g}", *ends)
            findings.append(Finding(cells, _judged(claimed, not claimed)))
    columns = ("optimizer", "width", "log2 LR", "||W||_R after a step", "at the end", "factor")
    return Table(columns, tuple(findings))


def updates(*alike: str, **remarks: str) -> Table:
    """How relative updates of hidden matrices at the largest width compare with those at the smallest, at one LR.

    Args:
        alike: variants whose relative updates are claimed to be alike late in training.
        remarks: of every sweep, what is said of its decay.
    """
    findings = []
    for sweep, remark in remarks.items():
        of_rule = defaultdict[str, dict[int, Sequence[NormRow]]](dict)
        for (_, rule, width), course in _hidden(sweep).items():
            of_rule[rule][width] = course
        for rule, by_width in of_rule.items():
            small, large = by_width[min(by_width)], by_width[max(by_width)]
            ratios = [b.relative_update / a.relative_update for a, b in zip(small, large, strict=True)]  # type: ignore[operator]
            late = geometric_mean(ratios[len(ratios) // 2 : -len(ratios) // 4])
            found = (1 / ALIKE <= late <= ALIKE) == (f"{rule}, {remark}" in alike)
            cells = (rule, remark, f"{ratios[0]:.2f}", f"{late:.2f}")
            findings.append(Finding(cells, _judged(found, not found)))
    columns = ("rule", "decay", "||dW||_R / ||W||_R, largest width : smallest, first step", "second half")
    return Table(columns, tuple(findings))


def drifts(*claims: str, **remarks: str) -> Table:
    """Whether AdamW's LR transfers after every length of training that a sweep has, by decay and parametrization.

    Args:
        claims: variants of which it is claimed after the longest training; of the others the opposite is. After
            shorter ones it is claimed of muP and not of SP, whatever the decay.
        remarks: of every sweep, what is said of its decay.
    """
    findings = []
    for sweep, remark in remarks.items():
        horizons = sorted({run.horizon for run in runs_of(sweep) if run.horizon})
        for horizon in horizons:
            for group in recorded(sweep, horizon=horizon).groups:
                rule = group.parametrization
                claimed = f"{rule}, {remark}" in claims if horizon == horizons[-1] else rule == "mup"
                verdict = _transfers(group, TRANSFERS if claimed else DRIFTS)
                findings.append(Finding((rule, remark, f"{horizon:,}", *_drift(group)), verdict))
    columns = ("rule", "decay", "tokens", "octaves per doubling of the width", "in all", "base's LR costs, nats", "LR")
    return Table(columns, tuple(findings))


def tuned(sweep: str) -> Table:
    """Whether the best value of another hyperparameter transfers, as is claimed, each value at its own best LR."""
    findings = []
    for tuning in recorded(sweep).tunings:
        first, last = tuning.sizes[0], tuning.sizes[-1]
        best = (f"{first.minimum:.2g}", f"{last.minimum:.2g}")
        verdict = _judged(tuning.verdict == TRANSFERS, tuning.verdict == DRIFTS)
        cells = (*tuning.names[1:], *best, f"{tuning.total_drift:+.2f}", f"{last.regret:.4f}", tuning.verdict)
        findings.append(Finding(cells, verdict))
    ends = ("best value at the smallest size", "at the largest")
    moves = ("moves by, octaves", "the smallest's best costs there, nats", "value")
    return Table(("optimizer", "rule", *ends, *moves), tuple(findings))


def _hidden(sweep: str) -> dict[tuple[str, str, int], list[NormRow]]:
    """The courses of hidden matrices by optimizer, parametrization and width, each by rising step."""
    found: dict[tuple[str, str, int], list[NormRow]] = defaultdict(list)
    for row in courses(sweep):
        if row.role == "hidden":
            found[row.optimizer, row.parametrization, row.width].append(row)
    return {key: sorted(rows, key=lambda row: row.step) for key, rows in found.items()}


TABLES = (transfer, lower, saved, tuned, coordinates, norms, updates, drifts)
