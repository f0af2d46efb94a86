"""The HTML report: one file that needs nothing else, complete without its script, readable in print."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import mupsweep
from mupsweep.analysis.comparison import comparisons
from mupsweep.analysis.estimate import UNKNOWN, Estimate
from mupsweep.analysis.labels import DIVERGED, DONE, label_of
from mupsweep.analysis.optimum import CONFIDENCE, Optimum
from mupsweep.analysis.transfer import (
    DRIFTS,
    INCONCLUSIVE,
    TOLERANCE_NATS,
    TOLERANCE_OCTAVES,
    TRANSFERS,
    Analysis,
    LadderResult,
    diverges,
    loss_of,
)
from mupsweep.atomic_files import make_folder, read_json, write_text
from mupsweep.formatting import counted, duration, si
from mupsweep.report.html import coordinates
from mupsweep.report.html import rules as rules_table
from mupsweep.report.html.charts import Charts, drawn_seeds, size_id, words
from mupsweep.report.html.svg import minus
from mupsweep.report.names import axis_name, slope_words, variant_name
from mupsweep.report.terminal.tuning import told
from mupsweep.report.terminal.verdicts import advice_on, comparison_line, quality_lines
from mupsweep.store.results import RunCounts
from mupsweep.store.run_dir import FAILED
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep.tensor_rules import TensorRule

SENTENCES = {
    TRANSFERS: "The learning rate transfers.",
    DRIFTS: "The learning rate drifts.",
    INCONCLUSIVE: "The data do not decide.",
}
BADGES = {TRANSFERS: "✓ transfers", DRIFTS: "↘ drifts", INCONCLUSIVE: "? inconclusive"}
SIZE_COLUMNS = (
    *("variant", "size", "runs", "diverged"),
    *("best LR", "log2 best LR", "loss there", "regret of the base's LR"),
)


def write(
    sweep: SweepDir, analysis: Analysis, rules: Sequence[tuple[str, Sequence[TensorRule]]], ledger: RunCounts
) -> Path:
    """Write results/report.html.

    Args:
        sweep: whose plan, environment and training curves are shown.
        analysis: what its runs say.
        rules: a heading and the tensors under it, for every variant and size.
        ledger: the sweep's runs by state, and what they cost.

    Returns:
        The path of the report.
    """
    charts = Charts(analysis)
    sections = [_header(sweep, analysis, ledger)]
    if charts.groups:
        sections += [_verdicts(charts, analysis, sweep), _curves(charts), _drift(charts)]
        sections += [_tuning(analysis), _training(charts, sweep, analysis)]
    else:
        sections.append("<p>No run has finished yet, so there is nothing to judge.</p>")
    sections += [_check(sweep), _rules(rules), _runs(ledger), _provenance(sweep)]
    css, js = (
        resources.files("mupsweep.report.html").joinpath(n).read_text("utf-8") for n in ("report.css", "report.js")
    )
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(sweep.name)} · mupsweep</title>\n<style>\n{css}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + f"\n<script>\n{js}</script>\n</body>\n</html>\n"
    )
    make_folder(sweep.results)
    path = sweep.results / "report.html"
    write_text(path, text)
    return path


def _header(sweep: SweepDir, analysis: Analysis, ledger: RunCounts) -> str:
    names = [", ".join(dict.fromkeys(row[k] for row in analysis.rows)) for k in ("model", "optimizer")]
    counts = sum(ledger.values(), Counter())
    done, every = counts[DONE] + counts[DIVERGED], counted(counts["runs"], "run")
    told = (
        f"{every}, all finished"
        if done == counts["runs"]
        else f"{done} of {every} finished: what follows rests on them"
    )
    line = " · ".join(n for n in [*names, told] if n)
    return f'<h1>{escape(sweep.name)}</h1>\n<p class="quiet">{escape(line)} · losses in nats per token</p>'


# The verdicts


def _verdicts(charts: Charts, analysis: Analysis, sweep: SweepDir) -> str:
    note = (
        "Drift is how far the best learning rate moves, in octaves (factors of two); regret is what reusing "
        f"the base's best rate costs. Brackets are {CONFIDENCE:.0%} intervals, the shaded band is the "
        f"tolerance of ±{TOLERANCE_OCTAVES:g} octaves."
    )
    cards = "\n".join(_card(charts, group) for group in charts.groups)
    told = (*analysis.remarks, *map(comparison_line, comparisons(analysis)), *advice_on(analysis, sweep))
    remarks = "".join(f"<li>{escape(line)}</li>" for line in told)
    return (
        _title("Does the learning rate transfer?", note)
        + f'<div class="cards">\n{cards}\n</div>'
        + (f'<ul class="remarks">{remarks}</ul>' if remarks else "")
    )


def _card(charts: Charts, group: LadderResult) -> str:
    base, last = group.base, group.optima[-1]
    facts = [("only size", escape(charts.name(base.curve)))]
    if len(group.optima) > 1:
        total = words(group.total_drift, "octaves")
        if group.total_drift.value is not None:
            total += f' <span class="quiet">(× {2**group.total_drift.value:.2g})</span>'
        facts = [
            (f"{charts.name(base.curve)} → {charts.number(last.curve)}", total),
            ("drift", "unknown" if group.drift == UNKNOWN else minus(slope_words(group))),
            ("regret", words(group.regret, "nats per token", ".4f")),
        ]
    if base.log2_lr is not None:
        exponent = words(Estimate(base.log2_lr, base.low, base.high), spec=".2f")
        best = f"{2**base.log2_lr:.3g}, log2 {exponent}"
        facts.append((f"best at {charts.name(base.curve)}", best))
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{v}</dd>" for k, v in facts)
    reasons = "".join(f"<li>{escape(r)}</li>" for r in (*group.reasons, *quality_lines(group)))
    return (
        f'<article class="card {group.verdict}" data-variant="{charts.labels.index(group.label)}">'
        f"<header><h3>{escape(charts.variant(group))} {_axis(charts, group)}</h3>"
        f'<span class="badge">{BADGES[group.verdict]}</span></header><p>{SENTENCES[group.verdict]}</p>'
        f"{charts.bar(group.total_drift)}<dl>{listed}</dl><ul>{reasons}</ul></article>"
    )


# The charts


def _curves(charts: Charts) -> str:
    """Loss versus LR, a panel for every ladder, under the buttons that choose what every chart shows."""
    note = (
        "Validation loss against the peak learning rate at the base shape. Points are means over seeds with "
        "their standard errors; the broad line is the fit, the diamond its minimum with its interval, hollow where an "
        "end of it is unknown, the dashed line the best rate of the base. A cross in the upper band is a rate at which "
        "seeds diverged, a triangle a loss beyond the axis."
    )
    shown, every = _seeds(charts)
    if shown < every:
        note += f" Of {every} seeds, {shown} can be shown one by one."
    return _title("Loss versus learning rate", note) + _toggles(charts) + _by_axis(charts, _panels)


def _seeds(charts: Charts) -> tuple[int, int]:
    """How many seeds of a curve are drawn, of how many, where the most are left out."""
    seeds = [drawn_seeds(o.curve) for g in charts.groups for o in g.optima]
    return max(((len(shown), len(every)) for shown, every in seeds), key=lambda pair: (pair[1] - pair[0], pair[1]))


def _toggles(charts: Charts) -> str:
    buttons = [
        f'<button type="button" class="sized" {charts.shade(size)} aria-pressed="true" data-key="size" '
        f'data-value="{size_id(size)}"><i></i>{escape(name)}</button>'
        for size, name in charts.names.items()
    ]
    if len(charts.labels) > 1:
        buttons.append('<span class="gap"></span>')
        buttons += [
            f'<button type="button" aria-pressed="true" data-key="variant" data-value="{i}">'
            f"{escape(variant_name(label, charts.labels))}</button>"
            for i, label in enumerate(charts.labels)
        ]
    shown, every = _seeds(charts)
    if every > 1:
        said = "each seed" if shown == every else f"{shown} of {every} seeds"
        buttons.append('<span class="gap"></span>')
        buttons.append(f'<button type="button" aria-pressed="false" data-key="seeds" data-value="each">{said}</button>')
    return f'<div class="toggles" role="group" aria-label="what the charts show">{"".join(buttons)}</div>'


def _panels(charts: Charts, groups: Sequence[LadderResult]) -> str:
    panels = []
    for family in dict.fromkeys(g.label[:2] for g in groups):
        members = [g for g in groups if g.label[:2] == family]
        panels += [_figure(charts, g, charts.curves(g, members), f"<span>{g.verdict}</span>") for g in members]
    return f'<div class="panels">{"".join(panels)}</div>'


def _drift(charts: Charts) -> str:
    note = (
        "First, how far each size's best rate lies from the base's, with the interval of that distance; an arrow, or a "
        "bar without a point, is a bound where a best rate is not known. Second, what the base's rate costs there. "
        "Shaded: within "
        f"±{TOLERANCE_OCTAVES:g} octaves, and below {TOLERANCE_NATS:g} nats."
    )
    return _title("Drift and regret by size", note) + _by_axis(charts, _ladders)


def _ladders(charts: Charts, groups: Sequence[LadderResult]) -> str:
    drift = charts.ladder(groups, [g.moves for g in groups], TOLERANCE_OCTAVES, "octaves")
    regret = charts.ladder(groups, [g.regrets for g in groups], TOLERANCE_NATS, "nats")
    drawn = {"octaves from the base's best rate": drift, "regret of the base's rate, nats per token": regret}
    figures = "".join(f"<figure><figcaption>{escape(k)}</figcaption>{v}</figure>" for k, v in drawn.items())
    rows = [
        (
            charts.variant(group),
            charts.name(o.curve),
            o.curve.n_runs,
            o.curve.n_diverged or "",
            "–" if o.log2_lr is None else f"{2**o.log2_lr:.3g}",
            words(Estimate(o.log2_lr, o.low, o.high), spec=".2f"),
            "–" if o.loss is None else words(loss_of(o), spec=".4f"),
            "base" if o is group.base else "diverges" if diverges(group.base, o) else words(regret, spec=".4f"),
        )
        for group in groups
        for o, regret in zip(group.optima, group.regrets, strict=True)
    ]
    table = _table(SIZE_COLUMNS, rows)
    return f'<div class="keys">{charts.keys(groups)}</div><div class="panels">{figures}</div>{table}'


def _tuning(analysis: Analysis) -> str:
    """What was varied beside the LR, and what it does to the gap to SP; nothing where nothing was."""
    lines, gaps = told(analysis)
    if not lines:
        return ""
    listed = "".join(f"<li>{escape(line)}</li>" for line in lines)
    tables = "".join(_table(head, rows, "words") for head, rows in gaps)
    return _title("Other hyperparameters", "Each value at its own best rate.") + f"<ul>{listed}</ul>{tables}"


def _training(charts: Charts, sweep: SweepDir, analysis: Analysis) -> str:
    """Loss by step of the run nearest to each size's best LR, one seed."""
    runs = defaultdict(list)
    for row in analysis.rows:
        if row["status"] == DONE:
            runs[label_of(row), (row["width"], row["depth"], row.get("horizon"))].append(row)
    panels = []
    for group in charts.groups:
        chosen = []
        for optimum in group.optima:
            best, size = _best(optimum), optimum.curve.size
            found = runs[group.label, size]
            if best is not None and found:
                row = min(found, key=lambda r: (abs(r["log2_lr"] - best), r["seed"]))
                chosen.append((size, row, sweep.run(row["run_id"]).metrics()))
        chart = charts.training(chosen)
        if chart:
            panels.append(_figure(charts, group, chart, _axis(charts, group)))
    if not panels:
        return ""
    note = (
        "The run nearest to each size's best rate: dots are validation loss, thin lines the training loss, each point "
        "the mean over the steps since the one before. What branches off a run has no curve of its own."
    )
    return _title("Training curves", note) + f'<div class="panels">{"".join(panels)}</div>'


def _best(optimum: Optimum) -> float | None:
    """The best LR known: fitted, else the best that was trained."""
    if optimum.log2_lr is not None:
        return optimum.log2_lr
    return min(optimum.curve.usable, key=lambda p: p.mean).log2_lr if optimum.curve.usable else None


def _by_axis(charts: Charts, draw: Callable[[Charts, Sequence[LadderResult]], str]) -> str:
    parts = []
    for axis in dict.fromkeys(g.axis for g in charts.groups):
        if charts.several_axes:
            parts.append(f"<h3>{escape(axis_name(axis))}</h3>")
        parts.append(draw(charts, [g for g in charts.groups if g.axis == axis]))
    return "\n".join(parts)


def _figure(charts: Charts, group: LadderResult, chart: str, aside: str) -> str:
    return (
        f'<figure data-variant="{charts.labels.index(group.label)}"><figcaption class="{group.verdict}">'
        f"{escape(charts.variant(group))} {aside}</figcaption>{chart}</figure>"
    )


def _axis(charts: Charts, group: LadderResult) -> str:
    """What tells the ladders of one variant apart."""
    return f'<span class="quiet">in {escape(axis_name(group.axis))}</span>' if charts.several_axes else ""


# The check, the rules, the runs, and how to repeat them


def _check(sweep: SweepDir) -> str:
    """The coordinate check that was kept with the sweep."""
    found = coordinates.read(sweep)
    if not found:
        return ""
    table = _table(coordinates.COLUMNS, coordinates.lines(found), "words")
    return (
        _title("Coordinate check", coordinates.NOTE)
        + coordinates.verdicts(found)
        + coordinates.panels(found)
        + f"<details><summary>exponents</summary>{table}</details>"
    )


def _rules(rules: Sequence[tuple[str, Sequence[TensorRule]]]) -> str:
    if not rules:
        return ""
    note = "What every tensor is trained with. A ratio is to the base shape; shapes are as stored."
    tables = [
        f"<details><summary>{escape(heading)}</summary>"
        f"{_table(rules_table.COLUMNS, rules_table.lines(tensors), 'tensors')}</details>"
        for heading, tensors in rules
    ]
    return _title("Rules", note) + "\n".join(tables)


def _runs(ledger: RunCounts) -> str:
    """Runs by state, and what they cost, per variant and size."""
    if not ledger:
        return ""

    def cells(counted: Counter[str]) -> Iterable[Any]:
        counts = [counted[name] for name in ("runs", DONE, DIVERGED, FAILED)]
        counts.append(counted["runs"] - sum(counts[1:]))
        costs = [(counted["tokens"], si), (counted["flops"], si), (counted["seconds"], duration)]
        return [*(n or "" for n in counts), *(said(cost) if cost else "" for cost, said in costs)]

    rows: list[tuple[Any, ...]] = [
        (" / ".join(label), width, depth, si(parameters) if parameters else "", *cells(counted))
        for (label, width, depth, parameters), counted in sorted(ledger.items())
    ]
    rows.append(("all", "", "", "", *cells(sum(ledger.values(), Counter()))))
    note = (
        "Tokens and FLOPs as planned, time as measured. "
        "A diverged run is a result; a failed one is tried again by the next run of the command."
    )
    head = ("variant", "width", "depth", "parameters")
    head = (*head, "runs", DONE, DIVERGED, FAILED, "open", "tokens", "FLOPs", "time")
    return _title("Runs and cost", note) + _table(head, rows, "total")


def _provenance(sweep: SweepDir) -> str:
    try:
        config = sweep.config_path.read_text(encoding="utf-8")
    except OSError:
        config = ""
    command = [line.removeprefix("#").strip() for line in config.splitlines() if line.startswith("#")]
    parts = [_title("How to reproduce", "The same command continues, repeats or extends this sweep.")]
    if command:
        parts.append(f"<pre>{escape(chr(10).join(command))}</pre>")
    if config:
        parts.append(f"<details><summary>config.yaml</summary><pre>{escape(config)}</pre></details>")
    environment = list(_flat(read_json(sweep.environment_path) or {}))
    if environment:
        parts.append("<h3>Environment</h3>" + _table((), environment, "words"))
    parts.append(
        '<p class="quiet">The numbers behind this page lie beside it: runs.csv, curves.csv, transfer.json, figures. '
        f"Made by mupsweep {escape(mupsweep.__version__)}.</p>"
    )
    return "\n".join(parts)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key} ")
        elif value is not None:
            yield f"{prefix}{key}", str(value)


# Pieces of the page


def _title(text: str, note: str) -> str:
    return f'<h2>{escape(text)}</h2>\n<p class="quiet">{escape(note)}</p>\n'


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "") -> str:
    """A table of values, which are escaped; report.css knows its kind."""
    titles = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "\n".join(f"<tr>{''.join(f'<td>{escape(str(c))}</td>' for c in row)}</tr>" for row in rows)
    top = f"<thead><tr>{titles}</tr></thead>\n" if head else ""
    return f'<div class="scroll"><table class="{kind}">{top}<tbody>\n{body}</tbody></table></div>'
