"""Results: the files of `results/` that scripts read, runs.csv, curves.csv and transfer.json."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any

from mupsweep.analysis.analysis import Analysis
from mupsweep.analysis.comparison import Comparison
from mupsweep.analysis.config import VerdictBounds
from mupsweep.analysis.curves import LossCurve
from mupsweep.analysis.enough import Enough
from mupsweep.analysis.estimate import CONFIDENCE
from mupsweep.analysis.labels import NAMES
from mupsweep.analysis.run_result import CHANGE_COLUMNS, COLUMNS, RunResult
from mupsweep.analysis.transfer import LadderResult, Validation
from mupsweep.atomic_files import make_folder, replace_file, write_chunks, write_json
from mupsweep.errors import RecordError
from mupsweep.report.norms import COLUMNS as NORM_COLUMNS
from mupsweep.report.norms import NormRow


def write_results(folder: Path, analysis: Analysis) -> None:
    """Write runs.csv, curves.csv and transfer.json to a folder of results."""
    make_folder(folder)
    write_chunks(folder / "runs.csv", _runs_csv([*analysis.runs, *analysis.changed]))
    write_chunks(folder / "curves.csv", _curve_csv([*analysis.curves, *analysis.changed_curves]))
    write_json(folder / "transfer.json", to_json(analysis))


def write_norms(folder: Path, rows: Iterable[NormRow]) -> Path:
    """Write norms.csv, the norms of matrices that runs recorded, to a folder of results."""
    path = folder / "norms.csv"
    write_chunks(path, _csv(NORM_COLUMNS, map(attrgetter(*NORM_COLUMNS), rows)))
    return path


def save_runs(path: Path, runs: Iterable[RunResult]) -> None:
    """Replace a file by some runs in the form of runs.csv, which `transfer --from` reads as they were."""
    try:
        replace_file(path, _runs_csv(runs))
    except OSError as error:
        raise RecordError(
            f"--save {path}: cannot be written ({error.strerror}); name a file in a folder that exists"
        ) from error


def _runs_csv(runs: Iterable[RunResult]) -> Iterator[bytes]:
    return _csv(COLUMNS, map(_run_line, runs))


_run_line = attrgetter(*COLUMNS)  # of runs.csv


def _curve_csv(curves: Sequence[LossCurve]) -> Iterator[bytes]:
    columns, rows = curve_table(curves)
    return _csv(columns, ([row.get(column) for column in columns] for row in rows))


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
                        "loss_optimum": o.loss.value,
                        "loss_low": o.loss.low,
                        "loss_high": o.loss.high,
                        "move": m.record("octaves"),
                        "regret": r.record("nats"),
                        "reason": o.reason,
                    }
                    for o, m, r in zip(g.optima, g.shifts, g.regrets, strict=True)
                ],
                "drift": g.drift.record("octaves_per_doubling"),
                "drift_sizes": len(g.fitted),
                "total_drift": g.total_drift.record("octaves"),
                "regret": g.regret.record("nats"),
                "verdict": g.verdict,
                "reasons": list(g.reasons),
                "deciding_runs": [
                    {
                        "width": more.curve.width,
                        "depth": more.curve.depth,
                        "horizon": more.curve.horizon,
                        "log2_lrs": list(more.log2_lrs),
                    }
                    for more in g.deciding_runs
                ],
                "validations": [_validation(one) for one in g.validations],
                "quality": _quality(g),
            }
            for g in analysis.groups
        ],
        "comparisons": [_comparison(c) for c in analysis.comparisons],
        **_tuning(analysis),
        "remarks": list(analysis.remarks),
        "confidence": CONFIDENCE,
        "tolerance": _tolerance(analysis.config.verdict),
    }


def enough_to_json(found: Enough) -> dict[str, Any]:
    """What a ladder's answer took, and what as much effort again would buy."""
    part = found.part
    return {
        "runs": found.n_runs,
        "part": None
        if part is None
        else {
            "runs": part.n_runs,
            "flops_share": part.share,
            "seeds": part.seeds,
            "lr_stride": part.stride,
            "sizes": list(part.sizes),
        },
        "more": [
            {
                "what": more.what,
                "optimum_half_width": more.optimum,
                "total_drift_half_width": more.total_drift,
                "decided": more.decided,
            }
            for more in found.more
        ],
    }


def _tolerance(bounds: VerdictBounds) -> dict[str, float]:
    """The bounds of the verdict; "nats" is what the base's LR may cost at most to be harmless."""
    values = asdict(bounds)
    return {"nats": values.pop("harmless"), **values}


def _validation(one: Validation) -> dict[str, Any]:
    return {
        "width": one.optimum.curve.width,
        "depth": one.optimum.curve.depth,
        "log2_lr": one.forecast.log2_lr,
        "forecast": one.forecast.optimum.record("log2_lr"),
        "optimum": one.optimum.estimate.record("log2_lr"),
        "regret": one.regret.record("nats"),
        "outcome": one.outcome,
    }


def _comparison(c: Comparison) -> dict[str, Any]:
    return {
        "of": list(c.of),
        "over": list(c.over),
        "axis": c.axis,
        "width": c.width,
        "depth": c.depth,
        "horizon": c.horizon,
        "lower": c.lower.record("nats"),
        "speed_up": c.speed_up.record("factor"),
        "asymptotic_penalty": c.asymptotic_penalty.record("nats"),
    }


def _tuning(analysis: Analysis) -> dict[str, Any]:
    """The other hyperparameters of a sweep, and what tuning each does to the gaps to SP; empty without any."""
    if not analysis.tunings:
        return {}
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
                        "values": [{"value": v, **loss.record("loss")} for v, loss in at.losses.items()],
                        "best": at.best,
                        "log2_lr_optimum": at.optimum.log2_lr,
                        "gain": at.gain.record("nats"),
                        "regret": at.regret.record("nats"),
                        "minimum": at.minimum.record("value"),
                        "unbounded": list(at.unbounded),
                        "edge": at.edge,
                        "ridge": at.ridge
                        and {
                            "slope": at.ridge.slope.record("octaves_per_octave"),
                            "log2_lr": at.ridge.log2_lr.record("log2_lr"),
                        },
                    }
                    for at in one.sizes
                ],
                "total_drift": one.total_drift.record("octaves"),
                "lr_drift": one.lr_drift.record("octaves"),
                "verdict": one.verdict,
                "reasons": list(one.reasons),
            }
            for one in analysis.tunings
        ],
        "closings": [
            {
                "hyperparameter": one.hyperparameter,
                "share": one.share,
                "before": [_comparison(c) for c in one.before],
                "after": [_comparison(c) for c in one.after],
            }
            for one in analysis.gaps_after_tuning
        ],
        "tuning_remarks": analysis.tuning_remarks,
    }


def _quality(group: LadderResult) -> dict[str, Any]:
    found = group.quality
    held_out = found.held_out and {
        "predicted": found.held_out.predicted.record("log2_lr"),
        "error": found.held_out.error.record("octaves"),
        "log2_lr": found.held_out.log2_lr,
        "regret": found.held_out.regret.record("nats"),
    }
    return {
        "fit_error": found.fit_error.record("octaves"),
        "robustness": found.robustness.record("exponent"),
        "asymptotic_loss": found.asymptotic_loss.record("nats"),
        "held_out": held_out,
    }


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


def _csv(columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> Iterator[bytes]:
    """The text of a table, line by line: of 100,000 runs the whole would take 70 MB."""
    writer = csv.writer(_Line(), lineterminator="\n")
    yield writer.writerow(columns)
    for line in lines:
        yield writer.writerow(line)
