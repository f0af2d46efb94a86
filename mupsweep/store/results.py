"""Results of finished runs, read from sweeps or from tables made elsewhere."""

from __future__ import annotations

import contextlib
import csv
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mupsweep.analysis.labels import DIVERGED, DONE, LARGEST_LOG2_LR, Label, label_of
from mupsweep.analysis.run_result import REQUIRED, RunResult
from mupsweep.errors import DataError, RecordError
from mupsweep.schema import LARGEST
from mupsweep.store.run_dir import FINISHED
from mupsweep.store.sweep_dir import SweepDir

# variant, width, depth, parameters -> "runs", as many of each state, and their tokens, flops and seconds
RunCounts = dict[tuple[Label, int, int, int | None], Counter[str]]


def read_runs(sweeps: Sequence[SweepDir]) -> list[RunResult]:
    """The finished runs of some sweeps, by rising size; two variants of one name are told apart by their sweep."""
    return read(sweeps)[0]


def read(sweeps: Sequence[SweepDir]) -> tuple[list[RunResult], list[RunCounts]]:
    """The finished runs of some sweeps as `read_runs` gives them, and what each of the sweeps planned.

    Both in one walk through the plans: of 100,000 runs, each walk takes seconds and memory.
    """
    runs: list[RunResult] = []
    variants: dict[Label, str] = {}
    ledgers: list[RunCounts] = []
    for sweep in sweeps:
        ledgers.append({})
        plan = sweep.read_plan()
        namesakes = {
            label[:3] for row in plan if variants.setdefault(label := label_of(row), row["variant"]) != row["variant"]
        }
        while plan:  # each freed as it is used: 100,000 runs are not held twice
            planned = plan.pop()
            folder = sweep.run(planned["run_id"])
            status = folder.status()
            summary = folder.summary() if status["status"] in FINISHED else None
            _enter(ledgers[-1], planned, status["status"], summary or status)
            if summary is None:
                continue
            if missing := [key for key in REQUIRED if key not in summary]:
                raise RecordError(
                    f"{folder.summary_path} is no summary of a run, it has no {missing[0]}: delete it and run the "
                    "command that made the sweep again, which trains this run anew"
                )
            if label_of(summary)[:3] in namesakes:
                summary |= {"model": f"{summary['model']} ({sweep.name})"}
            runs += _with_branches(summary, planned)
    unique = {(run.model, run.run_id): run for run in runs}
    by_size = sorted(unique.values(), key=lambda run: (run.label, run.width, run.depth, run.log2_lr, run.seed))
    return by_size, ledgers


def _enter(ledger: RunCounts, planned: Mapping[str, Any], status: str, record: Mapping[str, Any]) -> None:
    """Add a run to the counts of its variant and size."""
    key = label_of(planned), planned["width"], planned["depth"], planned.get("parameters")
    costs = {"tokens": planned.get("tokens"), "flops": planned.get("flops"), "seconds": record.get("seconds")}
    counts = ledger.setdefault(key, Counter())
    for name, amount in {"runs": 1, status: 1, **costs}.items():
        counts[name] += amount or 0


def _with_branches(summary: Mapping[str, Any], planned: Mapping[str, Any]) -> list[RunResult]:
    """A run, and every branch that left it to end earlier; the FLOPs are those of a run of its own."""
    ends = [summary]
    for branch in summary.get("branches", []):
        ends.append({**summary, **branch, "run_id": f"{summary['run_id']}@{branch['horizon']}"})
    flops_per_token = planned["flops"] / planned["tokens"]
    return [RunResult.of({**end, "flops": flops_per_token * (end.get("horizon") or planned["tokens"])}) for end in ends]


def read_table(path: str) -> list[RunResult]:
    """Runs that were trained elsewhere, from a csv with columns like those of runs.csv.

    parametrization, width, log2_lr (or lr) and val_loss suffice; an empty, nan or inf loss is a diverged run. Without
    ratios the smallest width and depth are the base; without seeds, repetitions of one LR are numbered as they come.

    Raises:
        DataError: naming the line and the column that cannot be read.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            lines = [(reader.line_num, line) for line in reader]
            columns = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"--from {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    wanted = ("parametrization", "width", "lr" if "lr" in columns and "log2_lr" not in columns else "log2_lr")
    for column in (*wanted, "val_loss"):
        if column not in columns:
            raise DataError(f"--from {path} has no column {column}: it has {', '.join(columns) or 'none'}")
    if not lines:
        raise DataError(f"--from {path} has no runs")
    rows: list[dict[str, Any]] = []
    repeated = Counter[tuple[Any, ...]]()
    for number, line in lines:
        if None in line or None in line.values():  # cut off, or a decimal comma
            raise DataError(f"--from {path}, line {number}: expected {len(columns)} cells, as in the first line")
        row = _foreign_run(
            line, lambda column, what, at=number: DataError(f"--from {path}, line {at}: {column}={what}")
        )
        key = (label_of(row), *(row[k] for k in ("width", "depth", "log2_lr")))
        rows.append({"seed": repeated[key], **row})
        repeated[key] += 1
    width, depth = (min(row[key] for row in rows) for key in ("width", "depth"))
    ratios = ({"width_ratio": row["width"] / width, "depth_ratio": row["depth"] / depth} for row in rows)
    return [RunResult.of({"run_id": "", **ratio, **row}) for ratio, row in zip(ratios, rows, strict=True)]


def _foreign_run(line: Mapping[str, str | None], refuse: Callable[[str, str], DataError]) -> dict[str, Any]:
    """One line of a table; `refuse(column, what)` makes the error."""

    def number(column: str, least: float = -LARGEST, whole: bool = False) -> float:
        text = (line.get(column) or "").strip()
        with contextlib.suppress(ValueError):
            value = float(text)
            if least <= value <= LARGEST and (value.is_integer() or not whole):
                return value
        kind = "a whole number" if whole else "a number"
        raise refuse(column, f"{text!r}: expected {kind} from {least:g} to {LARGEST:g}")

    row: dict[str, Any] = {"model": "model", "optimizer": "optimizer", "depth": 1}
    row |= {key: line[key] for key in ("model", "optimizer", "parametrization") if line.get(key)}
    if not row.get("parametrization"):
        raise refuse("parametrization", "'': expected a name such as sp or mup")
    for key in ("width", "depth", "horizon"):
        if line.get(key) or key == "width":
            row[key] = int(number(key, 1, whole=True))
    row |= {key: number(key, 1 / LARGEST) for key in ("width_ratio", "depth_ratio", "flops") if line.get(key)}
    row |= {"seed": int(number("seed", whole=True))} if line.get("seed") else {}
    if line.get("hyperparameter"):
        row |= {"hyperparameter": line["hyperparameter"], "value": number("value")}
        row |= {"default": number("default")} if line.get("default") else {}
    row["log2_lr"] = number("log2_lr") if line.get("log2_lr") else math.log2(number("lr", 1 / LARGEST))
    if abs(row["log2_lr"]) > LARGEST_LOG2_LR:
        raise refuse("log2_lr", f"{row['log2_lr']:g}: expected octaves, {-LARGEST_LOG2_LR} to {LARGEST_LOG2_LR}")
    lost = (line.get("val_loss") or "").strip().lower().lstrip("+-") in ("", "nan", "inf", "infinity")
    diverged = lost or line.get("status") == DIVERGED
    return row | {"status": DIVERGED if diverged else DONE, "val_loss": None if diverged else number("val_loss")}
