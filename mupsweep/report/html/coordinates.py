"""The coordinate check in the HTML report: coordinates against the size, and their exponents beside the promised."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import chain
from typing import Any

from mupsweep.analysis.estimate import Estimate
from mupsweep.atomic_files import read_json
from mupsweep.report.html.svg import Plot, minus, tip_of
from mupsweep.report.names import variant_name, variant_order
from mupsweep.store.records import LARGEST_NUMBER, Check, is_name, is_number, is_positive, is_text, or_none, wrong_in
from mupsweep.store.sweep_dir import SweepDir

NOTE = (
    "Small models after a few steps at several sizes. Each line is a coordinate against the size, as a multiple of "
    "what it is at the smallest one: under a parametrization that works, all of them stay level. The table has the "
    "exponents: 0 is level, 1 grows with the size. A check that passes is no proof: whether the learning rate "
    "transfers, the sweep tells."
)
COLUMNS = ("variant", "axis", "quantity", "exponent", "promised", "")
TOO_WIDE = "too wide"
Label = tuple[str, str, str]


def read(sweep: SweepDir) -> list[tuple[Label, Mapping[str, Any]]]:
    """The variants of the check that is stored with a sweep, sorted; empty where no check can be read."""
    variants = (read_json(sweep.check_path) or {}).get("variants")
    if not isinstance(variants, list) or any(wrong_in(variant, VARIANT, {}) for variant in variants):
        return []
    labelled = [((v["model"], v["optimizer"], v["parametrization"]), v) for v in variants]
    return sorted(labelled, key=lambda pair: variant_order(pair[0]))


def _is_list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_after(value: Any) -> bool:
    """Whether a value holds what was measured after some numbers of steps."""
    if not isinstance(value, dict) or not all(step.isascii() and step.isdecimal() for step in value):
        return False
    measured = {"values": _is_list_of(or_none(is_number))}
    return value != {} and all(wrong_in(row, measured, {}) is None for row in value.values())


INTERVAL: dict[str, Check] = dict.fromkeys(("value", "low", "high"), or_none(is_number))
ROW: dict[str, Check] = {
    "axis": is_name,
    "quantity": is_text,
    "role": or_none(is_text),
    "promised": or_none(is_text),
    "off": _is_list_of(or_none(is_text)),
    "shown": _is_flag,
    "judged": lambda value: wrong_in(value, INTERVAL, {}) is None,
    "sizes": lambda value: value != [] and _is_list_of(is_positive)(value),
    "after": _is_after,
}
VARIANT: dict[str, Check] = {
    "model": is_name,
    "optimizer": is_name,
    "parametrization": is_name,
    "passed": or_none(_is_flag),
    "causes": _is_list_of(is_text),
    "roles": _is_list_of(lambda row: wrong_in(row, ROW, {}) is None),
}


def verdicts(variants: Sequence[tuple[Label, Mapping[str, Any]]]) -> str:
    """A line per variant, with the likely causes of promises that it breaks."""
    labels = [label for label, _ in variants]
    items = []
    for label, variant in variants:
        judged = [row for row in variant["roles"] if row["promised"] is not None]
        missed = sum(bool(row["off"]) for row in judged)
        if judged:
            outcome = {True: "passed", False: "failed", None: "inconclusive"}[variant["passed"]]
            unknown = sum(_verdict(row) == TOO_WIDE for row in judged)
            verdict = f"{outcome}: {len(judged) - missed - unknown} of {len(judged)} promises kept"
        else:
            verdict = "promises nothing"
        items.append(f"<li>{escape(variant_name(label, labels))} {escape(verdict)}</li>")
        items += [f"<li>{escape(cause)}</li>" for cause in variant["causes"]]
    return f'<ul class="remarks">{"".join(items)}</ul>'


def panels(variants: Sequence[tuple[Label, Mapping[str, Any]]]) -> str:
    """A chart per axis and variant; the charts of an axis share their scale."""
    labels = [label for label, _ in variants]
    quantities = list(dict.fromkeys(_name(row) for _, v in variants for row in _coordinates(v["roles"])))
    figures = []
    for axis in dict.fromkeys(row["axis"] for _, v in variants for row in v["roles"]):
        rows_by_label = {label: [r for r in _coordinates(v["roles"]) if r["axis"] == axis] for label, v in variants}
        growths = [_growth(row) for rows in rows_by_label.values() for row in rows]
        if not any(growths):
            continue
        low, high = min(-1.0, *chain(*growths)), max(1.0, *chain(*growths))
        for label, rows in rows_by_label.items():
            if rows:
                chart = _chart(rows, axis, (low - 0.3, high + 0.3), quantities)
                caption = f'{escape(variant_name(label, labels))} <span class="quiet">by {escape(axis)}</span>'
                figures.append(f"<figure><figcaption>{caption}</figcaption>{chart}</figure>")
    keys = "".join(
        f'<span class="v{i % 6}"><svg viewBox="-7 -7 14 14"><circle class="pt" r="4"/></svg> {escape(name)}</span>'
        for i, name in enumerate(quantities)
    )
    return f'<div class="keys">{keys}</div><div class="panels">{"".join(figures)}</div>'


def table_rows(variants: Sequence[tuple[Label, Mapping[str, Any]]]) -> list[tuple[str, ...]]:
    """Rows of the table of exponents, one per quantity; their columns are COLUMNS."""
    labels = [label for label, _ in variants]
    rows = []
    for label, variant in variants:
        name = variant_name(label, labels)
        for row in variant["roles"]:
            if row["shown"]:
                promised = row["promised"] or "–"
                rows.append((name, row["axis"], _name(row), _interval(row), promised, _verdict(row)))
    return rows


def _verdict(row: Mapping[str, Any]) -> str:
    """Whether a quantity keeps its promise, and which tensors do not."""
    if row["promised"] is None:
        return ""
    if row["off"]:
        return f"off {', '.join(filter(None, row['off']))}".strip()
    return TOO_WIDE if row.get("too_wide") else "ok"  # checks of earlier versions do not say


def _interval(row: Mapping[str, Any]) -> str:
    return minus(f"{Estimate(*(row['judged'][key] for key in ('value', 'low', 'high')))}")


def _name(row: Mapping[str, Any]) -> str:
    return row["quantity"] if row["role"] is None else f"{row['quantity']} {row['role']}"


def _coordinates(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that should not depend on the size: coordinates, which belong to no role of tensors."""
    return [row for row in rows if row["shown"] and row["role"] is None]


def _growth(row: Mapping[str, Any]) -> list[float]:
    """log2 of the values after the last step, over that of the first size; empty if one of them is not positive."""
    values = row["after"][max(row["after"], key=int)]["values"]
    if not values or any(v is None or v < 1 / LARGEST_NUMBER for v in values):
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
        # values that are not positive leave a row without points
        points = list(zip(map(math.log2, row["sizes"]), _growth(row), strict=False))
        plot.add(f'<g class="v{quantities.index(_name(row)) % 6}"><path class="line" d="{plot.path(points)}"/>')
        for (x, y), size in zip(points, row["sizes"], strict=False):
            grown = f"{axis} {size}: {2**y:.3g} times that of {axis} {row['sizes'][0]}"
            tip = tip_of(_name(row), grown, f"exponent {_interval(row)}")
            plot.add(f'<circle class="pt" {tip} cx="{plot.x(x)}" cy="{plot.y(y)}" r="2.8"/>')
        plot.add("</g>")
    return plot.svg(f"coordinates by {axis}")
