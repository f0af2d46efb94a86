"""Results: the files of `results/` that scripts read, runs.csv, curves.csv and transfer.json (design section 9)."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mupsweep.curves import LossCurve
from mupsweep.files import make_folder, write_json, write_text
from mupsweep.optimum import CONFIDENCE
from mupsweep.records import FINISHED, SweepDir
from mupsweep.transfer import TOLERANCE_NATS, TOLERANCE_OCTAVES, Analysis, Estimate

RUN_COLUMNS = [
    "run_id",
    "model",
    "parametrization",
    "optimizer",
    "width",
    "depth",
    "width_ratio",
    "depth_ratio",
    "log2_lr",
    "seed",
    "status",
    "steps",
    "tokens",
    "train_loss",
    "val_loss",
    "val_bits_per_byte",
    "diverged_at_step",
    "seconds",
    "tokens_per_second",
    "device",
]


def read_runs(sweeps: Sequence[SweepDir]) -> list[dict[str, Any]]:
    """The finished runs of some sweeps, by rising size; two variants of one name are told apart by their sweep."""
    rows, variants = [], {}
    for sweep in sweeps:
        for planned in sweep.read_plan():
            folder = sweep.run(planned["run_id"])
            if folder.status()["status"] not in FINISHED:
                continue
            summary = folder.summary()
            if summary is None:
                continue
            label = (summary["model"], summary["optimizer"], summary["parametrization"])
            if variants.setdefault(label, planned["variant"]) != planned["variant"]:
                summary |= {"model": f"{summary['model']} ({sweep.name})"}
            rows.append(summary)
    keys = ("model", "optimizer", "parametrization", "width", "depth", "log2_lr", "seed")
    unique = {(row["model"], row["run_id"]): row for row in rows}
    return sorted(unique.values(), key=lambda row: tuple(row[k] for k in keys))


def write_results(sweep: SweepDir, analysis: Analysis) -> None:
    """results/runs.csv, curves.csv and transfer.json."""
    make_folder(sweep.results)
    write_text(sweep.results / "runs.csv", _csv(RUN_COLUMNS, analysis.rows))
    write_text(sweep.results / "curves.csv", _csv(*_curve_table(analysis.curves)))
    write_json(sweep.results / "transfer.json", to_json(analysis))


def to_json(analysis: Analysis) -> dict[str, Any]:
    """The stable form that scripts read: design section 9."""
    return {
        "groups": [
            {
                "model": g.model,
                "optimizer": g.optimizer,
                "parametrization": g.parametrization,
                "axis": g.axis,
                "sizes": [
                    {
                        "width": o.curve.width,
                        "depth": o.curve.depth,
                        "ratio": g.ratio(o.curve),
                        "n_runs": o.curve.n_runs,
                        "n_diverged": o.curve.n_diverged,
                        "bracketed": o.bracketed,
                        "log2_lr_optimum": o.log2_lr,
                        "log2_lr_low": o.low,
                        "log2_lr_high": o.high,
                        "loss_optimum": o.loss,
                        "regret": _interval("nats", r),
                        "reason": o.reason,
                    }
                    for o, r in zip(g.optima, g.regrets, strict=True)
                ],
                "drift": _interval("octaves_per_doubling", g.drift),
                "total_drift": _interval("octaves", g.total_drift),
                "regret": _interval("nats", g.regret),
                "verdict": g.verdict,
                "reasons": list(g.reasons),
            }
            for g in analysis.groups
        ],
        "remarks": list(analysis.remarks),
        "confidence": CONFIDENCE,
        "tolerance": {"octaves": TOLERANCE_OCTAVES, "nats": TOLERANCE_NATS},
    }


def _interval(unit: str, estimate: Estimate) -> dict[str, float | None]:
    return {unit: estimate.value, "low": estimate.low, "high": estimate.high}


def _curve_table(curves: Sequence[LossCurve]) -> tuple[list[str], list[dict[str, Any]]]:
    keys = ["model", "parametrization", "optimizer", "width", "depth", "width_ratio", "depth_ratio"]
    rows = [
        {
            **{k: getattr(curve, k) for k in keys},
            "log2_lr": p.log2_lr,
            "n_seeds": len(p.losses),
            "loss_mean": None if math.isnan(p.mean) else p.mean,
            "loss_sem": p.sem,
            "censored": p.censored,
        }
        for curve in curves
        for p in curve.points
    ]
    return [*keys, "log2_lr", "n_seeds", "loss_mean", "loss_sem", "censored"], rows


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
