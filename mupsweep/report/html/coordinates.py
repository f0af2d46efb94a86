"""The coordinate check in the HTML report: what moved against the size, and what was promised of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mupsweep.analysis.estimate import Estimate
from mupsweep.atomic_files import read_json
from mupsweep.report.html.svg import Plot, minus, tip_of
from mupsweep.report.names import variant_name, variant_order
from mupsweep.store.sweep_dir import SweepDir

NOTE = (
    "Small models after a few steps at several sizes. Each line is a coordinate against the size, as a multiple of "
    "what it is at the smallest one: under a parametrization that works, all of them stay level. The table has the "
    "exponents: 0 is level, 1 grows with the size. A check that passes is no proof: whether the learning rate "
    "transfers, the sweep tells."
)
COLUMNS = ("variant", "axis", "quantity", "exponent", "promised", "")
Label = tuple[str, str, str]


def read(sweep: SweepDir) -> list[tuple[Label, Mapping[str, Any]]]:
    """The variants of the check that was kept with a sweep, in order; none where there is none that can be read."""
    variants = (read_json(sweep.check_path) or {}).get("variants")
    kept = [v for v in variants if isinstance(v, dict) and "roles" in v] if isinstance(variants, list) else []
    labelled = [((v["model"], v["optimizer"], v["parametrization"]), v) for v in kept]
    return sorted(labelled, key=lambda pair: variant_order(pair[0]))


def verdicts(found: Sequence[tuple[Label, Mapping[str, Any]]]) -> str:
    """A line per variant, and what broken promises point at."""
    labels = [label for label, _ in found]
    items = []
    for label, variant in found:
        judged = [row for row in variant["roles"] if row["promised"] is not None]
        missed = sum(bool(row["off"]) for row in judged)
        said = f"{len(judged) - missed} of {len(judged)} promises kept" if judged else "promises nothing"
        if judged:
            said = f"{'passed' if variant['passed'] else 'failed'}: {said}"
        items.append(f"<li>{escape(variant_name(label, labels))} {escape(said)}</li>")
        items += [f"<li>{escape(cause)}</li>" for cause in variant["causes"]]
    return f'<ul class="remarks">{"".join(items)}</ul>'


def panels(found: Sequence[tuple[Label, Mapping[str, Any]]]) -> str:
    """A chart per axis and variant; those of an axis share their scale."""
    labels = [label for label, _ in found]
    quantities = list(dict.fromkeys(_name(row) for _, v in found for row in _level(v["roles"])))
    figures = []
    for axis in dict.fromkeys(row["axis"] for _, v in found for row in v["roles"]):
        drawn = {label: [r for r in _level(v["roles"]) if r["axis"] == axis] for label, v in found}
        grown = [g for rows in drawn.values() for row in rows for g in _growth(row)]
        if not grown:
            continue
        low, high = min(-1.0, *grown), max(1.0, *grown)
        for label, rows in drawn.items():
            if rows:
                chart = _chart(rows, axis, (low - 0.3, high + 0.3), quantities)
                caption = f'{escape(variant_name(label, labels))} <span class="quiet">by {escape(axis)}</span>'
                figures.append(f"<figure><figcaption>{caption}</figcaption>{chart}</figure>")
    keys = "".join(
        f'<span class="v{i % 6}"><svg viewBox="-7 -7 14 14"><circle class="pt" r="4"/></svg> {escape(name)}</span>'
        for i, name in enumerate(quantities)
    )
    return f'<div class="keys">{keys}</div><div class="panels">{"".join(figures)}</div>'


def lines(found: Sequence[tuple[Label, Mapping[str, Any]]]) -> list[tuple[str, ...]]:
    """A line of the table per quantity: COLUMNS."""
    labels = [label for label, _ in found]
    return [
        (variant_name(label, labels), row["axis"], _name(row), _interval(row), row["promised"] or "–", _said(row))
        for label, variant in found
        for row in variant["roles"]
        if row["shown"]
    ]


def _said(row: Mapping[str, Any]) -> str:
    if row["promised"] is None:
        return ""
    return f"off {', '.join(filter(None, row['off']))}".strip() if row["off"] else "ok"


def _interval(row: Mapping[str, Any]) -> str:
    return minus(f"{Estimate(*(row['judged'][key] for key in ('value', 'low', 'high')))}")


def _name(row: Mapping[str, Any]) -> str:
    return row["quantity"] if row["role"] is None else f"{row['quantity']} {row['role']}"


def _level(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What should not depend on the size: coordinates, which are of no tensor."""
    return [row for row in rows if row["shown"] and row["role"] is None]


def _growth(row: Mapping[str, Any]) -> list[float]:
    """log2 of the last values over the first size's; nothing where one of them is not a number."""
    values = row["after"][max(row["after"], key=int)]["values"]
    if not values or any(v is None or v <= 0 for v in values):
        return []
    return [math.log2(v / values[0]) for v in values]


def _chart(rows: Sequence[Mapping[str, Any]], axis: str, ys: tuple[float, float], quantities: Sequence[str]) -> str:
    sizes = sorted({size for row in rows for size in row["sizes"]})
    plot = Plot((math.log2(sizes[0]) - 0.2, math.log2(sizes[-1]) + 0.2), ys, axis)
    step = math.ceil((ys[1] - ys[0]) / 6)
    for power in range(math.ceil(ys[0] / step) * step, math.floor(ys[1]) + 1, step):
        y = plot.y(power)
        plot.add(f'<path class="grid" d="M{plot.LEFT} {y}H{plot.RIGHT}"/>')
        plot.add(f'<text class="end" x="{plot.LEFT - 6}" y="{y + 4:.1f}">{2.0**power:g}×</text>')
    plot.x_ticks((math.log2(size), f"{size:g}") for size in sizes)
    for row in rows:
        points = list(zip(map(math.log2, row["sizes"]), _growth(row), strict=False))
        plot.add(f'<g class="v{quantities.index(_name(row)) % 6}"><path class="line" d="{plot.path(points)}"/>')
        for (x, y), size in zip(points, row["sizes"], strict=False):
            grown = f"{axis} {size}: {2**y:.3g} times that of {axis} {row['sizes'][0]}"
            tip = tip_of(_name(row), grown, f"exponent {_interval(row)}")
            plot.add(f'<circle class="pt" {tip} cx="{plot.x(x)}" cy="{plot.y(y)}" r="2.8"/>')
        plot.add("</g>")
    return plot.svg(f"coordinates by {axis}")
