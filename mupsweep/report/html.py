"""The HTML report: one file that needs nothing else, complete without its script, readable in print."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any

import mupsweep
from mupsweep.build import TensorRule
from mupsweep.curves import CONFIDENCE, Optimum, Point
from mupsweep.records import DIVERGED, DONE, FAILED, SweepDir, read_json, write_text
from mupsweep.report.curves_text import in_order, loss_range, ordered_sizes, size_names, variant_name
from mupsweep.transfer import (
    DRIFTS,
    INCONCLUSIVE,
    TOLERANCE_NATS,
    TOLERANCE_OCTAVES,
    TRANSFERS,
    Analysis,
    Estimate,
    Group,
)

SENTENCES = {
    TRANSFERS: "The learning rate transfers.",
    DRIFTS: "The learning rate drifts.",
    INCONCLUSIVE: "The data do not decide.",
}
BADGES = {TRANSFERS: "✓ transfers", DRIFTS: "↘ drifts", INCONCLUSIVE: "? inconclusive"}
THINNED = 80  # points of a training curve: more than a panel can show
MARKERS = (  # paths around the origin, one per variant
    "M0-4.5A4.5 4.5 0 1 1 0 4.5A4.5 4.5 0 1 1 0-4.5Z",
    "M-4-4H4V4H-4Z",
    "M0-5.5L5.5 0L0 5.5L-5.5 0Z",
    "M0-5L5 4H-5Z",
    "M0 5L5-4H-5Z",
    "M-2-5H2V-2H5V2H2V5H-2V2H-5V-2H-2Z",
)
Size = tuple[int, int]  # width, depth


class _Html(str):
    """Text that is HTML already."""


def write(sweep: SweepDir, analysis: Analysis, rules: Sequence[tuple[str, Sequence[TensorRule]]]) -> Path:
    """Write results/report.html.

    Args:
        sweep: whose plan, environment and training curves are shown.
        analysis: what its runs say.
        rules: a heading and the tensors under it, for every variant and size.

    Returns:
        The path of the report.
    """
    charts = _Charts(analysis)
    body = [
        _header(sweep, analysis),
        _verdicts(charts, analysis),
        _curves(charts),
        _drift(charts),
        _training(charts, sweep, analysis),
        _rules(rules),
        _runs(sweep, analysis),
        _provenance(sweep),
    ]
    css, js = (resources.files("mupsweep.report").joinpath(n).read_text("utf-8") for n in ("report.css", "report.js"))
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(sweep.name)} · mupsweep</title>\n<style>\n{css}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + f"\n<script>\n{js}</script>\n</body>\n</html>\n"
    )
    sweep.results.mkdir(parents=True, exist_ok=True)
    path = sweep.results / "report.html"
    write_text(path, text)
    return path


# Sections


def _verdicts(charts: _Charts, analysis: Analysis) -> str:
    if not charts.groups:
        return "<p>No run has finished yet, so there is nothing to judge.</p>"
    ends = [(e.low, e.value, e.high) for e in (g.total_drift for g in charts.groups)]
    reach = max([1.0, *(abs(x) for x in chain(*ends) if x is not None)]) * 1.15
    cards = "\n".join(_card(charts, group, reach) for group in charts.groups)
    remarks = "".join(f"<li>{escape(r)}</li>" for r in analysis.remarks)
    return (
        _title(
            "Does the learning rate transfer?",
            "Drift is how far the best learning rate moves, in octaves (factors of two); regret is what reusing "
            f"the base's best rate costs. Brackets are {CONFIDENCE:.0%} intervals, the shaded band is the "
            f"tolerance of ±{TOLERANCE_OCTAVES:g} octaves.",
        )
        + f'<div class="cards">\n{cards}\n</div>'
        + (f'<ul class="remarks">{remarks}</ul>' if remarks else "")
    )


def _curves(charts: _Charts) -> str:
    """Loss versus LR, a panel for every ladder, under the buttons that choose what every chart shows."""
    if not charts.groups:
        return ""
    buttons = [
        f'<button type="button" class="sized" {charts.shade(size)} aria-pressed="true" data-key="size" '
        f'data-value="{_size_id(size)}"><i></i>{escape(name)}</button>'
        for size, name in charts.names.items()
    ]
    if len(charts.labels) > 1:
        buttons.append('<span class="gap"></span>')
        buttons += [
            f'<button type="button" aria-pressed="true" data-key="variant" data-value="{i}">'
            f"{escape(variant_name(label, charts.labels))}</button>"
            for i, label in enumerate(charts.labels)
        ]
    toggles = f'<div class="toggles" role="group" aria-label="what the charts show">{"".join(buttons)}</div>'
    note = (
        "Validation loss against the peak learning rate at the base shape. Points are means over seeds with "
        "their standard errors; the broad line is the fit, the diamond its minimum with its interval, the "
        "dashed line the best rate of the base. A cross in the upper band is a rate at which seeds diverged, "
        "a triangle a loss beyond the axis."
    )
    return _title("Loss versus learning rate", note) + toggles + _by_axis(charts, _panels)


def _drift(charts: _Charts) -> str:
    if not charts.groups:
        return ""
    note = (
        "First, how far each size's best rate lies from the base's; an arrow is a bound where the best rate is "
        "not inside the grid. Second, what the base's rate costs there. Shaded: within "
        f"±{TOLERANCE_OCTAVES:g} octaves, and below {TOLERANCE_NATS:g} nats."
    )
    return _title("Drift and regret by size", note) + _by_axis(charts, _ladders)


def _training(charts: _Charts, sweep: SweepDir, analysis: Analysis) -> str:
    """Loss by step of the run nearest to each size's best LR, one seed."""
    runs = defaultdict(list)
    for row in analysis.rows:
        if row["status"] == DONE:
            runs[_label(row), row["width"], row["depth"]].append(row)
    panels, seen = [], set()
    for group in charts.groups:
        curves = []
        for optimum in group.optima:
            size = (optimum.curve.width, optimum.curve.depth)
            found = runs[group.label, *size]
            best = _best(optimum)
            if best is None or not found or (group.label, size) in seen:
                continue
            seen.add((group.label, size))
            row = min(found, key=lambda r: (abs(r["log2_lr"] - best), r["seed"]))
            curves.append((size, row, sweep.run(row["run_id"]).metrics()))
        chart = charts.training([c for c in curves if c[2]])
        if chart:
            panels.append(_figure(charts, group, chart, group.axis if charts.several_axes else ""))
    if not panels:
        return ""
    note = "The run nearest to each size's best rate: dots are validation loss, thin lines training loss."
    return _title("Training curves", note) + f'<div class="panels">{"".join(panels)}</div>'


def _by_axis(charts: _Charts, draw: Callable[[_Charts, Sequence[Group]], str]) -> str:
    parts = []
    for axis in dict.fromkeys(g.axis for g in charts.groups):
        if charts.several_axes:
            parts.append(f"<h3>{escape(_axis_name(axis))}</h3>")
        parts.append(draw(charts, [g for g in charts.groups if g.axis == axis]))
    return "\n".join(parts)


def _figure(charts: _Charts, group: Group, chart: str, right: str) -> str:
    return (
        f'<figure data-variant="{charts.labels.index(group.label)}"><figcaption class="{group.verdict}">'
        f"{escape(charts.variant(group))}<span>{escape(right)}</span></figcaption>{chart}</figure>"
    )


def _card(charts: _Charts, group: Group, reach: float) -> str:
    base, last = _base(group), group.optima[-1]
    names = [charts.names[o.curve.width, o.curve.depth] for o in (base, last)]
    total, factor = _estimate(group.total_drift, "octaves"), ""
    if group.total_drift.value is not None:
        factor = f' <span class="quiet">(× {2**group.total_drift.value:.2g})</span>'
    facts = [
        (f"{names[0]} → {names[1].rpartition(' ')[2]}", total + factor),
        ("per doubling", _estimate(group.drift, "octaves")),
        ("regret", _estimate(group.regret, "nats per token", ".4f")),
    ]
    if len(group.optima) < 2:
        facts = [("only size", escape(names[0]))]
    if base.log2_lr is not None:
        facts.append((f"best at {names[0]}", f"{_power(base.log2_lr)} = {2**base.log2_lr:.3g}"))
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{v}</dd>" for k, v in facts)
    reasons = "".join(f"<li>{escape(r)}</li>" for r in group.reasons)
    axis = f' <span class="quiet">in {escape(group.axis)}</span>' if charts.several_axes else ""
    return (
        f'<article class="card {group.verdict}" data-variant="{charts.labels.index(group.label)}">'
        f"<header><h3>{escape(charts.variant(group))}{axis}</h3>"
        f'<span class="badge">{BADGES[group.verdict]}</span></header><p>{SENTENCES[group.verdict]}</p>'
        f"{_interval_bar(group.total_drift, reach)}<dl>{listed}</dl><ul>{reasons}</ul></article>"
    )


def _panels(charts: _Charts, groups: Sequence[Group]) -> str:
    panels = []
    for family in dict.fromkeys(g.label[:2] for g in groups):
        members = [g for g in groups if g.label[:2] == family]
        panels += [_figure(charts, g, charts.curves(g, members), g.verdict) for g in members]
    return f'<div class="panels">{"".join(panels)}</div>'


def _ladders(charts: _Charts, groups: Sequence[Group]) -> str:
    moves, regrets = {}, {}
    for group in groups:
        origin = _base(group).log2_lr
        for i, (o, regret) in enumerate(zip(group.optima, group.regrets, strict=True)):
            regrets[id(group), i] = regret
            if origin is not None:
                ends = (None if v is None else v - origin for v in (o.log2_lr, o.low, o.high))
                moves[id(group), i] = Estimate(*ends)
    drawn = {
        "octaves from the base's best rate": charts.ladder(groups, moves, TOLERANCE_OCTAVES, "octaves"),
        "regret of the base's rate, nats per token": charts.ladder(groups, regrets, TOLERANCE_NATS, "nats"),
    }
    keys = "".join(
        f'<span class="v{i % 6}" data-variant="{i}"><svg viewBox="-7 -7 14 14">'
        f'<path class="pt" d="{MARKERS[i % 6]}"/></svg> {escape(variant_name(label, charts.labels))}</span>'
        for i, label in enumerate(charts.labels)
        if any(g.label == label for g in groups)
    )
    figures = "".join(
        f"<figure><figcaption>{escape(title)}</figcaption>{chart}</figure>" for title, chart in drawn.items()
    )
    head = [
        "variant",
        "size",
        "runs",
        "diverged",
        "best LR",
        "log2 best LR",
        "loss there",
        "regret of the base's LR",
    ]
    rows = [
        (
            charts.variant(g),
            charts.names[o.curve.width, o.curve.depth],
            o.curve.n_runs,
            o.curve.n_diverged or "",
            "–" if o.log2_lr is None else f"{2**o.log2_lr:.3g}",
            str(Estimate(o.log2_lr, o.low, o.high)),
            "–" if o.loss is None else f"{o.loss:.4f}",
            "base" if o is _base(g) else _Html(_estimate(r, "", ".4f")),
        )
        for g in groups
        for o, r in zip(g.optima, g.regrets, strict=True)
    ]
    return f'<div class="keys">{keys}</div><div class="panels">{figures}</div>{_table(head, rows)}'


def _header(sweep: SweepDir, analysis: Analysis) -> str:
    names = [", ".join(dict.fromkeys(row[k] for row in analysis.rows)) for k in ("model", "optimizer")]
    line = " · ".join(n for n in [*names, f"{len(analysis.rows)} finished runs"] if n)
    return f'<h1>{escape(sweep.name)}</h1>\n<p class="quiet">{escape(line)} · losses in nats per token</p>'


def _rules(rules: Sequence[tuple[str, Sequence[TensorRule]]]) -> str:
    """Every variant and size: tensors that are treated alike share a row."""
    if not rules:
        return ""
    head = [
        "role",
        "shape",
        "optimizer",
        "init std",
        "multiplier",
        "LR",
        "LR ratio",
        "weight decay ratio",
        "eps ratio",
        "tensors",
    ]
    parts = []
    for heading, tensors in rules:
        alike: dict[tuple[Any, ...], list[str]] = {}
        for t in tensors:
            ratios = (t.lr, t.lr_ratio, t.weight_decay_ratio, t.eps_ratio)
            std = t.init_std if t.init.value == "normal" else t.init.value
            key = (t.role.value, t.shape, t.optimizer, std, t.multiplier, *ratios)
            name = re.sub(r"\.\d+\.", ".*.", t.name) + (f" = {t.tied_to}" if t.tied_to else "")
            alike.setdefault(key, []).append(name)
        rows = [
            (
                role,
                " × ".join(map(str, shape)),
                optimizer,
                *map(_number, numbers),
                ", ".join(dict.fromkeys(names)),
            )
            for (role, shape, optimizer, *numbers), names in alike.items()
        ]
        parts.append(f"<details><summary>{escape(heading)}</summary>{_table(head, rows)}</details>")
    note = "What every tensor is trained with. A ratio is to the base shape; shapes are as stored."
    return _title("Rules", note) + "\n".join(parts)


def _runs(sweep: SweepDir, analysis: Analysis) -> str:
    """Runs by state, and what they cost, per variant and size."""
    finished = {row["run_id"]: row for row in analysis.rows}
    plan = sweep.read_plan() or list(analysis.rows)
    sizes: dict[tuple[Any, ...], Counter[str]] = defaultdict(Counter)
    for row in plan:
        found = finished.get(row["run_id"])
        status = found["status"] if found else sweep.state(row["run_id"])["status"]
        count = sizes[(*_label(row), row["width"], row["depth"])]
        count["runs"] += 1
        count[status if status in (DONE, DIVERGED, FAILED) else "open"] += 1
        count["parameters"] = row.get("parameters") or 0
        for key in ("tokens", "flops"):
            count[key] += row.get(key) or 0
        count["seconds"] += (found or {}).get("seconds") or 0
    if not sizes:
        return ""
    columns = ("parameters", "runs", DONE, DIVERGED, FAILED, "open", "tokens", "flops", "seconds")
    total: Counter[str] = Counter()
    for count in sizes.values():
        total.update(count)
    total["parameters"] = 0
    rows = [
        [" / ".join(label), width, depth, *(_amount(count[c]) for c in columns)]
        for (*label, width, depth), count in sorted(sizes.items())
    ]
    rows.append(["all", "", "", *(_amount(total[c]) for c in columns)])
    head = ["variant", "width", "depth", *columns[:-2], "FLOPs", "seconds"]
    note = (
        "Tokens and FLOPs as planned, seconds as measured. "
        "A diverged run is a result; a failed one is tried again by the next run of the command."
    )
    return _title("Runs and cost", note) + _table(head, rows, "total")


def _provenance(sweep: SweepDir) -> str:
    try:
        config = sweep.config_path.read_text()
    except OSError:
        config = ""
    lines = config.splitlines()
    command = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
    parts = [_title("How to reproduce", "The same command continues, repeats or extends this sweep.")]
    if command:
        parts.append(f"<pre>{escape(chr(10).join(command))}</pre>")
    if config:
        parts.append(f"<details><summary>config.yaml</summary><pre>{escape(config)}</pre></details>")
    environment = list(_flat(read_json(sweep.environment_path) or {}))
    if environment:
        parts.append("<h3>Environment</h3>" + _table(("", ""), environment, kind="words"))
    parts.append(
        '<p class="quiet">The numbers behind this page lie beside it: runs.csv, curves.csv, transfer.json, figures. '
        f"Made by mupsweep {escape(mupsweep.__version__)}.</p>"
    )
    return "\n".join(parts)


# Pieces


def _title(text: str, note: str) -> str:
    return f'<h2>{escape(text)}</h2>\n<p class="quiet">{escape(note)}</p>\n'


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], last: str = "", kind: str = "") -> str:
    """A table of values that are escaped; `last` is the class of the last row."""

    def cells(row: Sequence[Any]) -> str:
        return "".join(f"<td>{c if isinstance(c, _Html) else escape(str(c))}</td>" for c in row)

    body = [f"<tr>{cells(row)}</tr>" for row in rows]
    if body and last:
        body[-1] = f'<tr class="{last}"{body[-1][3:]}'
    titles = "".join(f"<th>{escape(h)}</th>" for h in head)
    return f'<div class="scroll"><table class="{kind}"><tr>{titles}</tr>\n{chr(10).join(body)}</table></div>'


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key} ")
        elif value is not None:
            yield f"{prefix}{key}", str(value)


def _estimate(estimate: Estimate, unit: str, spec: str = "+.2f") -> str:
    """In words, escaped: a value with its interval, or the bound there is."""
    value, low, high = (None if v is None else f"{v:{spec}}" for v in (estimate.value, estimate.low, estimate.high))
    if value is None:
        bounds = [f"{word} {end}" for word, end in (("at least", low), ("at most", high)) if end is not None]
        text = " and ".join(bounds) or "unknown"
    else:
        text = value if low is None or high is None else f"{value} [{low}, {high}]"
    return escape(text.replace("-", "−") + (f" {unit}" if unit and text != "unknown" else ""))


def _power(log2_lr: float) -> str:
    """HTML of an LR as a power of two."""
    return f"2<sup>{log2_lr:.2f}</sup>".replace("-", "−")


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _amount(value: float) -> str:
    """1.2k, 34M, 5.6T; empty for none."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{value:.4g}" if value else ""


def _label(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["model"], row["optimizer"], row["parametrization"]


def _axis_name(axis: str) -> str:
    return {"joint": "width x depth"}.get(axis, axis)


def _base(group: Group) -> Optimum:
    return next((o for o in group.optima if group.ratio(o.curve) == 1), group.optima[0])


def _best(optimum: Optimum) -> float | None:
    """The best LR known: fitted, else the best that was trained."""
    if optimum.log2_lr is not None:
        return optimum.log2_lr
    return min(optimum.curve.usable, key=lambda p: p.mean).log2_lr if optimum.curve.usable else None


def _column(metrics: Iterable[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) wherever a value was logged."""
    pairs = ((row.get("step"), row.get(key)) for row in metrics)
    return [(step, v) for step, v in pairs if step is not None and v is not None and math.isfinite(v)]


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most THINNED points, the last one always."""
    stride = math.ceil(len(points) / THINNED) or 1
    return [p for i, p in enumerate(points) if (len(points) - 1 - i) % stride == 0]


# Charts: SVG with the values of every point in data-tip, which report.js shows


class _Charts:
    """Draws an analysis; sizes share their colours, and variants their markers, on the whole page."""

    def __init__(self, analysis: Analysis) -> None:
        self.groups = in_order(analysis.groups)
        self.labels = list(dict.fromkeys(g.label for g in self.groups))
        self.sizes = ordered_sizes(self.groups)
        self.names = dict(zip(self.sizes, size_names(list(self.sizes.values())), strict=True))
        self.several_axes = len({g.axis for g in self.groups}) > 1

    def variant(self, group: Group) -> str:
        return variant_name(group.label, self.labels)

    def shade(self, size: Size) -> str:
        """Where a size lies between the colours of the smallest and the largest."""
        return f'style="--t:{100 * list(self.sizes).index(size) / max(1, len(self.sizes) - 1):.0f}%"'

    def curves(self, group: Group, family: Sequence[Group]) -> str:
        """Loss versus LR; the groups of a family share their axes, so that they can be compared by eye."""
        curves = [o.curve for g in family for o in g.optima]
        lrs = [p.log2_lr for c in curves for p in c.points]
        pad = 0.06 * (max(lrs) - min(lrs)) or 0.5
        unstable = {(c.width, c.depth) for c in curves if c.n_diverged}
        diverged = [size for size in self.sizes if size in unstable]
        pitch = min(9.0, 64 / max(1, len(diverged)))  # of the rows of crosses, one per size
        strip = pitch * len(diverged) + 4 if diverged else 0.0
        chart = _Chart((min(lrs) - pad, max(lrs) + pad), loss_range(curves), "peak learning rate", strip)
        chart.y_ticks()
        chart.lr_ticks()
        base = _base(group)
        if base.log2_lr is not None:
            x = chart.x(base.log2_lr)
            chart.add(f'<path class="base" d="M{x} {chart.TOP}V{chart.BOTTOM}"/>')
        for optimum in group.optima:
            size = (optimum.curve.width, optimum.curve.depth)
            row = diverged.index(size) if size in diverged else 0
            chart.add(f'<g data-size="{_size_id(size)}" {self.shade(size)}>')
            self._curve(chart, optimum, chart.upper - pitch * (row + 0.5) - 2)
            chart.add("</g>")
        return chart.svg(f"loss versus learning rate, {self.variant(group)}")

    def _curve(self, chart: _Chart, optimum: Optimum, strip: float) -> None:
        points = [p for p in optimum.curve.usable if math.isfinite(p.mean)]
        made, name = optimum.fit, self.names[optimum.curve.width, optimum.curve.depth]
        inside = []
        if made is not None:
            width = float(made.xs[-1] - made.xs[0])
            grid = [made.center + float(made.xs[0]) + width * i / 40 for i in range(41)]
            inside.append(f'<path class="fit" d="{chart.path((x, made.value(x)) for x in grid)}"/>')
        inside.append(f'<path class="line" d="{chart.path((p.log2_lr, p.mean) for p in points)}"/>')
        chart.clipped("".join(inside))
        for p in optimum.curve.points:
            x, words = chart.x(p.log2_lr), escape(f"{name}\n{_tip(p)}")
            tip = f'data-tip="{words}"'
            if p.censored:
                chart.add(f'<path class="pt cross" {tip} d="M{x - 3:.1f} {strip - 3}l6 6m0-6l-6 6"/>')
            elif p in points and p.mean > chart.ys[1]:
                chart.add(f'<path class="pt" {tip} transform="translate({x} {chart.upper + 5})" d="M0-5L4 3H-4Z"/>')
            elif p in points:
                if p.sem is not None:
                    chart.add(f'<path class="bar" d="M{x} {chart.y(p.mean - p.sem)}V{chart.y(p.mean + p.sem)}"/>')
                chart.add(f'<circle class="pt" {tip} cx="{x}" cy="{chart.y(p.mean)}" r="2.8"/>')
        if optimum.log2_lr is not None and optimum.loss is not None:
            x, y = chart.x(optimum.log2_lr), chart.y(optimum.loss)
            if optimum.low is not None and optimum.high is not None:
                ends = chart.x(optimum.low), chart.x(optimum.high)
                caps = "".join(f"M{end} {y - 4:.1f}v8" for end in ends)
                chart.add(f'<path class="interval" d="M{ends[0]} {y}H{ends[1]}{caps}"/>')
            between = Estimate(optimum.log2_lr, optimum.low, optimum.high)
            tip = f"{name}: best rate\n2^{optimum.log2_lr:.2f} = {2**optimum.log2_lr:.3g}\nlog2 {between}\n"
            tip = escape(f"{tip}loss {optimum.loss:.4f}")
            chart.add(f'<path class="pt best" data-tip="{tip}" transform="translate({x} {y})" d="{MARKERS[2]}"/>')

    def ladder(
        self,
        groups: Sequence[Group],
        values: Mapping[tuple[int, int], Estimate],
        tolerance: float,
        unit: str,
    ) -> str:
        """A number per size of every group over the axis's ratio, with intervals; bounds are arrows."""
        octaves = unit == "octaves"  # which may be negative
        known = [v for e in values.values() for v in (e.value, e.low, e.high) if v is not None]
        top = max([tolerance * 1.5, *known])
        low = min([-tolerance * 1.5, *known]) if octaves else 0.0
        room = 0.12 * (top - low)  # for the arrows of bounds too
        at = {math.log2(g.ratio(o.curve)): o.curve for g in groups for o in g.optima}
        chart = _Chart((min(at) - 0.3, max(at) + 0.3), (low - room * octaves, top + room), _axis_name(groups[0].axis))
        band = chart.y(tolerance), chart.y(-tolerance if octaves else 0.0)
        chart.add(
            f'<rect class="band" x="{chart.LEFT}" width="{chart.RIGHT - chart.LEFT}" y="{band[0]}" '
            f'height="{band[1] - band[0]:.1f}"/>'
        )
        chart.y_ticks()
        chart.x_ticks((x, self.names[c.width, c.depth].rpartition(" ")[2]) for x, c in at.items())
        for nth, group in enumerate(groups):
            variant = self.labels.index(group.label)
            chart.add(f'<g class="v{variant % 6}" data-variant="{variant}">')
            dodge = (nth - (len(groups) - 1) / 2) * 7
            line = []
            for i, optimum in enumerate(group.optima):
                estimate = values.get((id(group), i))
                if estimate is None:
                    continue
                x = chart.x(math.log2(group.ratio(optimum.curve))) + dodge
                name = f"{self.variant(group)}, {self.names[optimum.curve.width, optimum.curve.depth]}"
                if estimate.value is not None:
                    line.append(f"{x:.1f} {chart.y(estimate.value)}")
                tip = escape(f"{name}\n{_estimate(estimate, unit, '+.2f' if octaves else '.4f')}")
                _mark(chart, x, estimate, tip, MARKERS[variant % 6])
            if len(line) > 1:
                chart.add(f'<path class="faint" d="M{"L".join(line)}"/>')
            chart.add("</g>")
        return chart.svg(f"{unit} by size")

    def training(self, runs: Sequence[tuple[Size, Mapping[str, Any], Sequence[Mapping[str, Any]]]]) -> str:
        series = [
            (size, row, _column(metrics, "train_loss"), _column(metrics, "val_loss")) for size, row, metrics in runs
        ]
        series = [s for s in series if s[2] or s[3]]
        if not series:
            return ""
        every = [point for s in series for point in chain(s[2], s[3])]
        last = max(step for step, _ in every)
        # the first steps fall from log(vocabulary): they would take all the room
        settled = [loss for step, loss in every if step >= 0.1 * last]
        low, high = min(settled), max(settled)
        pad = 0.05 * (high - low) or 0.01
        chart = _Chart((0, last), (low - pad, high + pad), "step")
        chart.y_ticks()
        chart.x_ticks((t, f"{t:g}") for t in _ticks(0, last))
        for size, row, train, val in series:
            chart.add(f'<g data-size="{_size_id(size)}" {self.shade(size)}>')
            inside = f'<path class="faint" d="{chart.path(_thin(train))}"/>'
            chart.clipped(f'{inside}<path class="line" d="{chart.path(_thin(val))}"/>')
            for step, loss in _thin(val):
                if loss <= chart.ys[1]:
                    tip = f"{self.names[size]}, LR 2^{row['log2_lr']:g}, seed {row['seed']}\nstep {step:g}: {loss:.4f}"
                    place = f'cx="{chart.x(step)}" cy="{chart.y(loss)}" r="2.4"'
                    chart.add(f'<circle class="pt" data-tip="{escape(tip)}" {place}/>')
            chart.add("</g>")
        return chart.svg("loss by training step")


class _Chart:
    """One SVG: scales, axes, and what is added to it."""

    WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 300, 50, 432, 8, 258

    def __init__(self, xs: tuple[float, float], ys: tuple[float, float], title: str, strip: float = 0.0) -> None:
        self.xs, self.ys, self.title = xs, ys, title
        self.upper = self.TOP + strip  # where the largest y lies
        self.parts: list[str] = []
        if strip:
            size = f'width="{self.RIGHT - self.LEFT}" height="{strip:.1f}"'
            self.add(f'<rect class="band" x="{self.LEFT}" y="{self.TOP}" {size}/>')
            self.add(f'<text x="{self.LEFT + 5}" y="{self.TOP + 11}">diverged</text>')

    def add(self, part: str) -> None:
        self.parts.append(part)

    def clipped(self, parts: str) -> None:
        """Add lines that may leave the plot: a nested svg cuts them at its edge."""
        x, y, w, h = self.LEFT, self.upper, self.RIGHT - self.LEFT, self.BOTTOM - self.upper
        box = f'x="{x}" y="{y}" width="{w}" height="{h}" viewBox="{x} {y} {w} {h}"'
        self.add(f'<svg {box} style="overflow:hidden">{parts}</svg>')

    def x(self, value: float) -> float:
        return round(self.LEFT + (value - self.xs[0]) / (self.xs[1] - self.xs[0]) * (self.RIGHT - self.LEFT), 1)

    def y(self, value: float) -> float:
        return round(self.BOTTOM - (value - self.ys[0]) / (self.ys[1] - self.ys[0]) * (self.BOTTOM - self.upper), 1)

    def path(self, points: Iterable[tuple[float, float]]) -> str:
        """The d of a line; nothing where there are no points."""
        line = "L".join(f"{self.x(x)} {self.y(y)}" for x, y in points)
        return f"M{line}" if line else ""

    def y_ticks(self) -> None:
        for value in _ticks(*self.ys):
            y = self.y(value)
            self.add(f'<path class="grid" d="M{self.LEFT} {y}H{self.RIGHT}"/>')
            self.add(f'<text class="end" x="{self.LEFT - 6}" y="{y + 4:.1f}">{f"{value:g}".replace("-", "−")}</text>')

    def x_ticks(self, ticks: Iterable[tuple[float, str]]) -> None:
        """Labels are SVG already."""
        for value, label in ticks:
            x = self.x(value)
            self.add(f'<path class="frame" d="M{x} {self.BOTTOM}v4"/>')
            self.add(f'<text class="middle" x="{x}" y="{self.BOTTOM + 17}">{label}</text>')

    def lr_ticks(self) -> None:
        """Powers of two."""
        low, high = self.xs
        step = next(s for s in (0.5, 1, 2, 4, 8, 16, 1000) if (high - low) / s <= 9)
        lrs = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
        exponents = (f"{lr:g}".replace("-", "−") for lr in lrs)
        labels = [f'2<tspan dy="-4" style="font-size:8.5px">{e}</tspan>' for e in exponents]
        self.x_ticks(zip(lrs, labels, strict=True))

    def svg(self, label: str) -> str:
        middle = (self.LEFT + self.RIGHT) / 2
        return (
            f'<svg class="chart" viewBox="0 0 {self.WIDTH} {self.HEIGHT}" role="img" aria-label="{escape(label)}">'
            + "".join(self.parts)
            + f'<path class="frame" d="M{self.LEFT} {self.TOP}V{self.BOTTOM}H{self.RIGHT}"/>'
            f'<text class="name middle" x="{middle}" y="{self.HEIGHT - 6}">{escape(self.title)}</text></svg>'
        )


def _mark(chart: _Chart, x: float, estimate: Estimate, tip: str, marker: str) -> None:
    """A value with its interval, or an arrow away from the one bound there is."""
    if estimate.low is not None and estimate.high is not None:
        low, high = chart.y(estimate.low), chart.y(estimate.high)
        chart.add(f'<path class="bar" d="M{x - 4:.1f} {low}h8M{x - 4:.1f} {high}h8M{x:.1f} {low}V{high}"/>')
    if estimate.value is not None:
        place = f'transform="translate({x:.1f} {chart.y(estimate.value)})"'
        chart.add(f'<path class="pt best" data-tip="{tip}" {place} d="{marker}"/>')
        return
    for bound, sign in ((estimate.low, -1), (estimate.high, 1)):
        if bound is not None:
            y = chart.y(bound)
            arrow = f"M{x - 5:.1f} {y}h10M{x:.1f} {y}v{18 * sign}m-4 {-5 * sign}l4 {5 * sign}l4 {-5 * sign}"
            chart.add(f'<path class="bar" data-tip="{tip}" d="{arrow}"/>')


def _interval_bar(estimate: Estimate, reach: float) -> str:
    """The total drift against the tolerance, on one scale for all cards."""

    def at(octaves: float) -> float:
        return round(150 + octaves / reach * 140, 1)

    width = f"{280 * TOLERANCE_OCTAVES / reach:.1f}"
    band = f'<rect class="band" x="{at(-TOLERANCE_OCTAVES)}" y="2" width="{width}" height="20"/>'
    step = math.ceil(reach / 4)
    steps = math.floor(reach / step)
    labels = {k * step: f"{k * step:+d}".replace("-", "−") if k else "0" for k in range(-steps, steps + 1)}
    ticks = "".join(f'<text class="middle" x="{at(k)}" y="34">{label}</text>' for k, label in labels.items())
    parts = [band, f'<path class="frame" d="M10 22H290M{at(0)} 2V22"/>', ticks]
    if (estimate.value, estimate.low, estimate.high) != (None, None, None):
        low = "10" if estimate.low is None else at(estimate.low)
        high = "290" if estimate.high is None else at(estimate.high)
        if estimate.value is None:  # open ends end in arrows
            arrows = ("M16 8l-6 4l6 4" if estimate.low is None else "") + (
                "M284 8l6 4l-6 4" if estimate.high is None else ""
            )
            parts.append(f'<path class="range" d="M{low} 12H{high}{arrows}"/>')
        else:
            if estimate.low is not None and estimate.high is not None:
                parts.append(f'<path class="range" d="M{low} 12H{high}"/>')
            parts.append(f'<circle class="dot" cx="{at(estimate.value)}" cy="12" r="5.5"/>')
    label = escape(f"total drift: {estimate} octaves")
    return f'<svg class="chart" viewBox="0 0 300 38" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers within a range."""
    raw = (high - low) / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    return [round(k * step, 10) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _tip(point: Point) -> str:
    """What hovering a point of a loss curve says."""
    lines = [f"LR 2^{point.log2_lr:g} = {2**point.log2_lr:.3g}"]
    if point.diverged:
        lines.append(f"{point.diverged} of {point.diverged + len(point.losses)} seeds diverged")
    if point.losses:
        sem = "" if point.sem is None else f" ± {point.sem:.4f} (standard error)"
        lines.append(f"loss {point.mean:.4f}{sem}")
        lines.append(f"{len(point.losses)} seed{'s' if len(point.losses) > 1 else ''}")
    return "\n".join(lines)


def _size_id(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
