"""The W&B run that summarises a sweep: charts, tables, verdicts and the report, from the files of `results/`."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mupsweep.analysis.labels import label_of
from mupsweep.documents import parse_json
from mupsweep.errors import RecordError, reason
from mupsweep.store.sweep_dir import SweepDir

FILES = ("runs.csv", "curves.csv", "transfer.json")
SIZE = ("width", "depth", "ratio", "n_runs", "n_diverged", "log2_lr_optimum", "log2_lr_low", "log2_lr_high")

INTERVALS = {"drift": "octaves_per_doubling", "total_drift": "octaves", "regret": "nats"}  # and their units


@contextlib.contextmanager
def of_whole_results(sweep: SweepDir) -> Iterator[None]:
    """Context in which the results are read.

    Raises:
        RecordError: they are damaged.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise RecordError(
            f"the results in {sweep.results} are damaged ({type(error).__name__}: {reason(error)}): "
            f"mupsweep report {sweep.path} writes them anew"
        ) from error


def digest(sweep: SweepDir) -> str | None:
    """Return a digest of the results; None before there are any."""
    if not (sweep.results / "transfer.json").is_file():
        return None
    results = [(sweep.results / name).read_bytes() for name in FILES]
    names = "".join(figures(sweep)).encode()  # what they show follows from the results
    return hashlib.sha256(b"".join([*results, names])).hexdigest()[:16]


def figures(sweep: SweepDir) -> dict[str, Path]:
    """Return the report's figures by the keys that they are logged under."""
    return {f"figures/{path.stem}": path for path in sorted(sweep.figures.glob("*.png"))}


def tags(sweep: SweepDir) -> list[str]:
    """Return the distinct verdicts of the sweep's groups."""
    return sorted({group["verdict"] for group in _groups(sweep)})


def verdicts(sweep: SweepDir) -> dict[str, Any]:
    """Return verdict, drift and regret of every group, by which a table of summary runs compares sweeps."""
    columns: dict[str, Any] = {}
    for group in _groups(sweep):
        suffix = f"{_label(group)}/{group['axis']}"
        columns[f"verdict/{suffix}"] = group["verdict"]
        for name, unit in INTERVALS.items():
            columns[f"{name}/{suffix}"] = group[name][unit]
            columns |= {f"{name}_{end}/{suffix}": group[name][end] for end in ("low", "high")}
    return {key: value for key, value in columns.items() if value is not None}


def curve_charts(sweep: SweepDir) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Key of a chart -> size -> (log2 LR, loss): one chart for each label."""
    charts: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in _read(sweep, "curves.csv"):
        lines = charts.setdefault(f"loss_vs_lr/{_label(row)}", {})
        if row["loss_mean"] != "" and row["censored"] != "True":  # where seeds diverged, the mean is only bounded
            point = float(row["log2_lr"]), float(row["loss_mean"])
            tokens = f", {row['horizon']} tokens" if row["horizon"] else ""
            lines.setdefault(f"width {row['width']}, depth {row['depth']}{tokens}", []).append(point)
    return charts


def drift_charts(sweep: SweepDir) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Key of a chart -> label -> (octaves of size, log2 of the best LR): one chart for each axis.

    The ends of the intervals are lines of their own; a size whose best LR is only bounded has a point on one of them.
    """
    charts: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for group in _groups(sweep):
        lines = charts.setdefault(f"drift/{group['axis']}", {})
        for suffix, key in (("", "log2_lr_optimum"), (", at least", "log2_lr_low"), (", at most", "log2_lr_high")):
            points = [(math.log2(s["ratio"]), s[key]) for s in group["sizes"]]
            lines[_label(group) + suffix] = [point for point in points if point[1] is not None]
    return charts


def content(sweep: SweepDir) -> dict[str, Any]:
    """Return everything that the summary run logs, as the client's objects."""
    import wandb

    logged: dict[str, Any] = {}
    for charts, xname in ((curve_charts(sweep), "log2 LR"), (drift_charts(sweep), "log2 of size / base size")):
        for key, all_lines in charts.items():
            lines = {name: points for name, points in all_lines.items() if points}
            if lines:
                logged[key] = wandb.plot.line_series(
                    xs=[[x for x, _ in points] for points in lines.values()],
                    ys=[[y for _, y in points] for points in lines.values()],
                    keys=list(lines),
                    title=key,
                    xname=xname,
                )
    logged |= {key: wandb.Image(str(path)) for key, path in figures(sweep).items()}
    groups = _groups(sweep)
    logged |= {f"tables/{name}": _table(_read(sweep, f"{name}.csv")) for name in ("runs", "curves")}
    logged["tables/drift"] = _table(
        {
            "group": _label(g),
            "axis": g["axis"],
            **{key: size[key] for key in SIZE},
            "loss": size["loss_optimum"],
            **{key: size[key] for key in ("loss_low", "loss_high")},
            **_flat("regret", size["regret"], "nats"),
            "reason": size["reason"],
        }
        for g in groups
        for size in g["sizes"]
    )
    logged["tables/verdicts"] = _table(
        {
            "group": _label(g),
            "axis": g["axis"],
            "verdict": g["verdict"],
            **{key: value for name, unit in INTERVALS.items() for key, value in _flat(name, g[name], unit).items()},
            "reasons": "; ".join(g["reasons"]),
        }
        for g in groups
    )
    report = sweep.results / "report.html"
    if report.is_file():
        logged["report"] = wandb.Html(report.read_text(encoding="utf-8"), inject=False)
    return logged


def _flat(name: str, estimate: Mapping[str, float | None], unit: str) -> dict[str, float | None]:
    return {name: estimate[unit], f"{name}_low": estimate["low"], f"{name}_high": estimate["high"]}


def _table(rows: Iterable[Mapping[str, Any]]) -> Any:
    import wandb

    rows = list(rows)
    columns: list[str | int] = list(rows[0]) if rows else ["empty"]
    return wandb.Table(columns=columns, data=[[_cell(row[str(key)]) for key in columns] for row in rows])


def _cell(value: Any) -> Any:
    """A csv's numbers as numbers; W&B's columns have one type each."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value or None


def _read(sweep: SweepDir, name: str) -> list[dict[str, str]]:
    with (sweep.results / name).open(newline="") as file:
        return list(csv.DictReader(file))


def _groups(sweep: SweepDir) -> list[dict[str, Any]]:
    return parse_json((sweep.results / "transfer.json").read_bytes())["groups"]


def _label(row: Mapping[str, Any]) -> str:
    return "/".join(label_of(row))
