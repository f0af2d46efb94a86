"""Results of finished runs, read from sweeps."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mupsweep.analysis.labels import NAMES, Label, label_of
from mupsweep.analysis.run_result import RunResult
from mupsweep.errors import RecordError
from mupsweep.store import records
from mupsweep.store.run_dir import FINISHED, PENDING
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
        batch_sizes = _batch_sizes(sweep)
        namesakes = {
            label[:3] for row in plan if variants.setdefault(label := label_of(row), row["variant"]) != row["variant"]
        }
        while plan:  # each freed as it is used: 100,000 runs are not held twice
            planned = plan.pop()
            folder = sweep.run(planned["run_id"])
            status = folder.status()
            summary = folder.summary() if status["status"] in FINISHED else None
            if summary is None and status["status"] in FINISHED:
                status = {"status": PENDING}  # its summary is damaged, so that it is trained again
            _enter(ledgers[-1], planned, status["status"], summary or status)
            if summary is None:
                continue
            if wrong := records.missing_in_summary(summary):
                raise folder.no_summary(wrong)
            if label_of(summary)[:3] in namesakes:
                summary |= {"model": f"{summary['model']} ({sweep.name})"}
            summary["validation"] = planned.get("validation", False)
            summary |= {"parameters": planned.get("parameters"), "batch_size": batch_sizes.get(label_of(planned))}
            runs += _with_branches(summary, planned)
    unique = {(run.model, run.run_id): run for run in runs}
    by_size = sorted(unique.values(), key=lambda run: (run.label, run.width, run.depth, run.log2_lr, run.seed))
    return by_size, ledgers


def _batch_sizes(sweep: SweepDir) -> dict[Label, int]:
    """Sequences a step of every variant; none where the config is damaged, since results can be read without it."""
    sizes: dict[Label, int] = {}
    with contextlib.suppress(RecordError):
        for variant in sweep.read_config()["variants"]:
            with contextlib.suppress(KeyError, TypeError):  # a section that is none
                names = {name: variant[name]["name"] for name in NAMES}
                sizes[label_of({**names, **(variant.get("change") or {})})] = int(variant["training"]["batch_size"])
    return sizes


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
    if "flops" not in planned:  # of a program that nobody knows the cost of
        return [RunResult.of(end) for end in ends]
    flops_per_token = planned["flops"] / planned["tokens"]
    return [RunResult.of({**end, "flops": flops_per_token * (end.get("horizon") or planned["tokens"])}) for end in ends]
