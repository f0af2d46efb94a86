"""Results: the files of `results/` that scripts read, runs.csv, curves.csv and transfer.json."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mupsweep.analysis.comparison import Comparison, comparisons, quality
from mupsweep.analysis.curves import LossCurve, collect
from mupsweep.analysis.estimate import Estimate
from mupsweep.analysis.labels import NAMES
from mupsweep.analysis.optimum import CONFIDENCE
from mupsweep.analysis.transfer import TOLERANCE_NATS, TOLERANCE_OCTAVES, Analysis, LadderResult, loss_of
from mupsweep.analysis.tuning import gaps_after_tuning, remarks, tunings
from mupsweep.atomic_files import make_folder, write_chunks, write_json
from mupsweep.store.sweep_dir import SweepDir

CHANGE_COLUMNS = ["hyperparameter", "value", "default"]  # of a variant that is not the default's
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
    "flops",
    "horizon",
    *CHANGE_COLUMNS,
]


def write_results(sweep: SweepDir, analysis: Analysis) -> None:
    """results/runs.csv, curves.csv and transfer.json."""
    make_folder(sweep.results)
    write_chunks(sweep.results / "runs.csv", _csv(RUN_COLUMNS, [*analysis.rows, *analysis.changed]))
    write_chunks(sweep.results / "curves.csv", _csv(*curve_table([*analysis.curves, *collect(analysis.changed)])))
    write_json(sweep.results / "transfer.json", to_json(analysis))


def to_json(analysis: Analysis) -> dict[str, Any]:
    """The stable form that scripts read; mupsweep/report/README.md describes it."""
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
                        "horizon": o.curve.horizon,
                        "ratio": g.ratio(o.curve),
                        "n_runs": o.curve.n_runs,
                        "n_diverged": o.curve.n_diverged,
                        "bracketed": o.bracketed,
                        "log2_lr_optimum": o.log2_lr,
                        "log2_lr_low": o.low,
                        "log2_lr_high": o.high,
                        "loss_optimum": o.loss,
                        "loss_low": loss_of(o).low,
                        "loss_high": loss_of(o).high,
                        "move": _interval("octaves", m),
                        "regret": _interval("nats", r),
                        "reason": o.reason,
                    }
                    for o, m, r in zip(g.optima, g.moves, g.regrets, strict=True)
                ],
                "drift": _interval("octaves_per_doubling", g.drift),
                "drift_sizes": len(g.sloped),
                "total_drift": _interval("octaves", g.total_drift),
                "regret": _interval("nats", g.regret),
                "verdict": g.verdict,
                "reasons": list(g.reasons),
                "quality": _quality(g),
            }
            for g in analysis.groups
        ],
        "comparisons": [_comparison(c) for c in comparisons(analysis)],
        **_tuning(analysis),
        "remarks": list(analysis.remarks),
        "confidence": CONFIDENCE,
        "tolerance": {"octaves": TOLERANCE_OCTAVES, "nats": TOLERANCE_NATS},
    }


def _comparison(c: Comparison) -> dict[str, Any]:
    return {
        "of": list(c.of),
        "over": list(c.over),
        "axis": c.axis,
        "width": c.width,
        "depth": c.depth,
        "horizon": c.horizon,
        "lower": _interval("nats", c.lower),
        "speed_up": _interval("factor", c.speed_up),
        "asymptotic_penalty": _interval("nats", c.asymptotic_penalty),
    }


def _tuning(analysis: Analysis) -> dict[str, Any]:
    """The other hyperparameters of a sweep, and what tuning each does to the gaps to SP; empty without any."""
    tuned = tunings(analysis)
    if not tuned:
        return {}
    closed = gaps_after_tuning(analysis, tuned)
    return {
        "tuning": [
            {
                **dict(zip(NAMES, one.names, strict=True)),
                "hyperparameter": one.hyperparameter,
                "default": one.default,
                "axis": one.axis,
                "sizes": [
                    {
                        "width": at.width,
                        "depth": at.depth,
                        "horizon": at.horizon,
                        "values": [{"value": v, **_interval("loss", loss)} for v, loss in at.losses.items()],
                        "best": at.best,
                        "log2_lr_optimum": at.optimum.log2_lr,
                        "gain": _interval("nats", at.gain),
                        "regret": _interval("nats", at.regret),
                        "minimum": _interval("value", at.minimum),
                        "unbounded": list(at.unbounded),
                        "edge": at.edge,
                    }
                    for at in one.sizes
                ],
                "total_drift": _interval("octaves", one.moves),
                "verdict": one.verdict,
                "reasons": list(one.reasons),
            }
            for one in tuned
        ],
        "closings": [
            {
                "hyperparameter": one.hyperparameter,
                "share": one.share,
                "before": [_comparison(c) for c in one.before],
                "after": [_comparison(c) for c in one.after],
            }
            for one in closed
        ],
        "tuning_remarks": remarks(closed),
    }


def _quality(group: LadderResult) -> dict[str, Any]:
    found = quality(group)
    held_out = found.held_out and {
        "predicted": _interval("log2_lr", found.held_out.predicted),
        "error": _interval("octaves", found.held_out.error),
        "regret": _interval("nats", found.held_out.regret),
    }
    return {
        "fit_error": _interval("octaves", found.fit_error),
        "robustness": _interval("exponent", found.robustness),
        "asymptotic_loss": _interval("nats", found.asymptotic_loss),
        "held_out": held_out,
    }


def _interval(unit: str, estimate: Estimate) -> dict[str, float | None]:
    return {unit: estimate.value, "low": estimate.low, "high": estimate.high}


def curve_table(curves: Sequence[LossCurve]) -> tuple[list[str], list[dict[str, Any]]]:
    """The columns and lines of curves.csv."""
    keys = ["model", "parametrization", "optimizer", "width", "depth", "width_ratio", "depth_ratio"]
    rows = [
        {
            **{k: getattr(curve, k) for k in keys},
            "log2_lr": p.log2_lr,
            "n_seeds": len(p.losses),
            "loss_mean": None if math.isnan(p.mean) else p.mean,
            "loss_sem": p.sem,
            "censored": p.censored,
            "horizon": curve.horizon,
            **({} if curve.change is None else asdict(curve.change)),
        }
        for curve in curves
        for p in curve.points
    ]
    return [*keys, "log2_lr", "n_seeds", "loss_mean", "loss_sem", "censored", "horizon", *CHANGE_COLUMNS], rows


class _Line:
    """A file for csv.writer, whose writerow then answers the line."""

    write = staticmethod(str.encode)


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    """Line by line: of 100,000 runs the whole text would take 70 MB."""
    writer = csv.writer(_Line(), lineterminator="\n")
    yield writer.writerow(columns)
    for row in rows:
        yield writer.writerow([row.get(column, "") for column in columns])
