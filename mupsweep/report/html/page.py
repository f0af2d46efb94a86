"""The HTML report: one self-contained file that is complete without its script and readable in print."""

from __future__ import annotations

from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import mupsweep
from mupsweep.analysis.analysis import Analysis
from mupsweep.analysis.estimate import CONFIDENCE
from mupsweep.analysis.labels import DIVERGED, DONE
from mupsweep.analysis.transfer import LadderResult, diverges
from mupsweep.analysis.verdict import DRIFTS, INCONCLUSIVE, TRANSFERS
from mupsweep.atomic_files import make_folder, read_json, write_text
from mupsweep.documents import leaves
from mupsweep.formatting import counted, duration, si
from mupsweep.report import norms
from mupsweep.report.best_runs import best_runs
from mupsweep.report.html import coordinates, pairs
from mupsweep.report.html import rules as rules_table
from mupsweep.report.html.charts import Charts, drawn_seeds, estimate_text, size_id
from mupsweep.report.html.words import definitions, explained
from mupsweep.report.names import axis_name, variant_name
from mupsweep.report.terminal.tuning import tuning_summary
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
    sweep: SweepDir, analysis: Analysis, rules: Sequence[tuple[str, Sequence[TensorRule]]], counts: RunCounts
) -> Path:
    """Write results/report.html.

    Args:
        sweep: the sweep whose config, environment and training curves go into the report.
        analysis: verdicts and curves of its runs.
        rules: a heading and the tensors under it, for every variant and size.
        counts: number of runs by state, and their cost, per variant and size.

    Returns:
        The path of the report.
    """
    charts = Charts(analysis)
    sections = [_header(sweep, analysis, counts)]
    if charts.groups:
        sections += [_verdicts(charts, analysis, sweep), _curves(charts), _drift(charts)]
        sections += [_law(sweep), _tuning(analysis), _training(charts, sweep, analysis), _norms(sweep)]
    else:
        sections.append("<p>No run has finished yet, so there is nothing to judge.</p>")
    sections += [_check(sweep), _rules(rules), _runs(counts), _provenance(sweep)]
    assets = resources.files("mupsweep.report.html")
    css, js = (assets.joinpath(name).read_text("utf-8") for name in ("report.css", "report.js"))
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


def _header(sweep: SweepDir, analysis: Analysis, counts: RunCounts) -> str:
    names = [", ".join(dict.fromkeys(getattr(run, k) for run in analysis.runs)) for k in ("model", "optimizer")]
    total = sum(counts.values(), Counter())
    finished, runs = total[DONE] + total[DIVERGED], counted(total["runs"], "run")
    if finished == total["runs"]:
        progress = f"{runs}, all finished"
    else:
        progress = f"{finished} of {runs} finished: what follows rests on them"
    line = " · ".join(n for n in [*names, progress] if n)
    return f'<h1>{escape(sweep.name)}</h1>\n<p class="quiet">{escape(line)} · losses in nats per token</p>'


# The verdicts


def _verdicts(charts: Charts, analysis: Analysis, sweep: SweepDir) -> str:
    note = (
        "Drift is how far the best learning rate moves, in octaves (factors of two); regret is what reusing "
        f"the base's best rate costs. Brackets are {CONFIDENCE:.0%} intervals, the shaded band is the "
        "octaves within which it may move."
    )
    cards = "\n".join(_card(charts, group) for group in charts.groups)
    lines = (*analysis.remarks, *map(comparison_line, analysis.comparisons), *advice_on(analysis, sweep))
    remarks = "".join(f"<li>{explained(line)}</li>" for line in lines)
    return (
        _title("Does the learning rate transfer?", note)
        + f'<div class="cards">\n{cards}\n</div>'
        + (f'<ul class="remarks">{remarks}</ul>' if remarks else "")
        + f"<details open><summary>what the numbers are</summary>{definitions()}</details>"
    )


def _card(charts: Charts, group: LadderResult) -> str:
    """The verdict on one ladder in a sentence with its numbers, and what else is known of it."""
    base, (decisive, *reasons) = group.base, group.reasons
    best = ""
    if base.log2_lr is not None:
        log2_lr = estimate_text(base.estimate, spec=".2f")
        name = escape(charts.name(base.curve))
        best = f"<dl><dt>best at {name}</dt><dd>{2**base.log2_lr:.3g}, log2 {log2_lr}</dd></dl>"
    details = "".join(f"<li>{explained(line)}</li>" for line in (*reasons, *quality_lines(group)))
    return (
        f'<article class="card {group.verdict}" data-variant="{charts.labels.index(group.label)}">'
        f"<header><h3>{escape(charts.variant(group))} {_axis(charts, group)}</h3>"
        f'<span class="badge">{BADGES[group.verdict]}</span></header>'
        f"<p>{SENTENCES[group.verdict]} {explained(decisive[:1].upper() + decisive[1:])}.</p>"
        f"{charts.bar(group.total_drift, group.tolerance)}{best}<ul>{details}</ul></article>"
    )


# The charts


def _curves(charts: Charts) -> str:
    """Loss versus LR, a panel per ladder, under the buttons that select sizes and variants in all charts."""
    note = (
        "Validation loss against the peak learning rate at the base shape. Points are means over seeds with "
        f"their standard errors; the shaded valleys are what they leave possible, at {CONFIDENCE:.0%}. A dotted line "
        "marks a cliff, somewhere between two runs; hollow points beyond it only say that the best rate is lower. A "
        "cross in the upper band is a rate at which seeds diverged, a triangle a loss beyond the axis. Below, the "
        "interval of every size's best rate, with an arrow where no run bounds it; dashed, the best rate of the base."
    )
    n_drawn, n_seeds = _seed_counts(charts)
    if n_drawn < n_seeds:
        note += f" Of {n_seeds} seeds, {n_drawn} can be shown one by one."
    return _title("Loss versus learning rate", note) + _toggles(charts) + _by_axis(charts, _panels)


def _seed_counts(charts: Charts) -> tuple[int, int]:
    """Numbers of drawn and of all seeds, of the curve that leaves out most of them."""
    seeds = [drawn_seeds(o.curve) for g in charts.groups for o in g.optima]
    counts = [(len(drawn), len(every)) for drawn, every in seeds]
    return max(counts, key=lambda pair: (pair[1] - pair[0], pair[1]))


def _toggles(charts: Charts) -> str:
    """The buttons that show and hide sizes, variants and single seeds."""
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
    n_drawn, n_seeds = _seed_counts(charts)
    if n_seeds > 1:
        text = "each seed" if n_drawn == n_seeds else f"{n_drawn} of {n_seeds} seeds"
        buttons.append('<span class="gap"></span>')
        buttons.append(f'<button type="button" aria-pressed="false" data-key="seeds" data-value="each">{text}</button>')
    return f'<div class="toggles" role="group" aria-label="what the charts show">{"".join(buttons)}</div>'


def _panels(charts: Charts, groups: Sequence[LadderResult]) -> str:
    """A panel per ladder; ladders of one model and optimizer have the same axes."""
    panels = []
    for family in dict.fromkeys(g.label[:2] for g in groups):
        members = [g for g in groups if g.label[:2] == family]
        panels += [_figure(charts, g, charts.curves(g, members), f"<span>{g.verdict}</span>") for g in members]
    return f'<div class="panels">{"".join(panels)}</div>'


def _drift(charts: Charts) -> str:
    bounds = charts.bounds
    note = (
        "First, how far each size's best rate lies from the base's, with the interval of that distance; an arrow, or a "
        "bar without a point, is a bound where a best rate is not known. The fan is the forecast for larger sizes, a "
        "broad bar that for a size trained since, whose star is what came out. Second, what the base's rate costs. "
        "Shaded: within "
        f"±{bounds.octaves:g} octaves or {bounds.octaves_per_doubling:g} per doubling if that is more, and below "
        f"{bounds.harmless:g} nats."
    )
    return _title("Drift and regret by size", note) + _by_axis(charts, _ladders)


def _ladders(charts: Charts, groups: Sequence[LadderResult]) -> str:
    """Drift and regret of the ladders along one axis, as charts and as a table."""
    drift = charts.ladder(groups, [g.shifts for g in groups], charts.bounds.total, "octaves")
    regret = charts.ladder(groups, [g.regrets for g in groups], lambda _: charts.bounds.harmless, "nats")
    titled = {"octaves from the base's best rate": drift, "regret of the base's rate, nats per token": regret}
    figures = "".join(
        f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in titled.items()
    )
    rows = []
    for group in groups:
        for optimum, lost in zip(group.optima, group.regrets, strict=True):
            if optimum is group.base:
                cost = "base"
            else:
                cost = "diverges" if diverges(group.base, optimum) else estimate_text(lost, spec=".4f")
            rows.append(
                (
                    charts.variant(group),
                    charts.name(optimum.curve),
                    optimum.curve.n_runs,
                    optimum.curve.n_diverged or "",
                    "–" if optimum.log2_lr is None else f"{2**optimum.log2_lr:.3g}",
                    estimate_text(optimum.estimate, spec=".2f"),
                    "–" if optimum.loss.value is None else estimate_text(optimum.loss, spec=".4f"),
                    cost,
                )
            )
    table = _table(SIZE_COLUMNS, rows)
    return f'<div class="keys">{charts.keys(groups)}</div><div class="panels">{figures}</div>{table}'


def _law(sweep: SweepDir) -> str:
    """The law over size, tokens and batch that was last asked for; empty where none was."""
    laws = (read_json(sweep.law_path) or {}).get("laws")
    parts = []
    for law in laws if isinstance(laws, list) else ():
        if isinstance(law, dict) and isinstance(law.get("sentences"), list):
            items = "".join(f"<li>{explained(str(line))}</li>" for line in law["sentences"])
            parts.append(f"<h3>{escape(str(law.get('name')))}</h3><ul>{items}</ul>")
    if not parts:
        return ""
    note = "As the last mupsweep transfer --law found it, curve by curve; it is asked for again when runs are added."
    return _title("One law over size, tokens and batch", note) + "\n".join(parts)


def _tuning(analysis: Analysis) -> str:
    """Hyperparameters that were varied beside the LR, and their effect on the gap to SP; empty where none was."""
    lines, gaps = tuning_summary(analysis)
    if not lines:
        return ""
    items = "".join(f"<li>{explained(line)}</li>" for line in lines)
    tables = "".join(_table(head, rows, "words") for head, rows in gaps)
    pictures = pairs.panels(analysis.tunings)
    note = f"Each value at its own best rate. {pairs.NOTE}" if pictures else "Each value at its own best rate."
    return _title("Other hyperparameters", note) + f"<ul>{items}</ul>{tables}{pictures}"


def _training(charts: Charts, sweep: SweepDir, analysis: Analysis) -> str:
    """Loss by step of the run nearest to each size's best LR, one seed."""
    nearest = best_runs(analysis)
    panels = []
    for group in charts.groups:
        found = [(size, nearest.get((group.label, size))) for size in (o.curve.size for o in group.optima)]
        logged = [(size, run, sweep.run(run.run_id).metrics()) for size, run in found if run is not None]
        chart = charts.training(logged)
        if chart:
            panels.append(_figure(charts, group, chart, _axis(charts, group)))
    if not panels:
        return ""
    note = (
        "The run nearest to each size's best rate: dots are validation loss, thin lines the training loss, each point "
        "the mean over the steps since the one before. What branches off a run has no curve of its own."
    )
    return _title("Training curves", note) + f'<div class="panels">{"".join(panels)}</div>'


def _norms(sweep: SweepDir) -> str:
    """The figures of tracked norms; empty where no run tracked any."""
    paths = [path for name in norms.FIGURES if (path := sweep.figures / f"{name}.svg").is_file()]
    if not paths:
        return ""
    images = "".join(
        f'<figure><img alt="{path.stem} through training" style="max-width:100%" '
        f'src="data:image/svg+xml;base64,{b64encode(path.read_bytes()).decode()}"></figure>'
        for path in paths
    )
    note = (
        "The run nearest to each size's best rate. A line is the geometric mean over the matrices of a role; of "
        "embeddings it is the RMS of entries. norms.csv has every matrix of every run."
    )
    return _title("Norms through training", note) + images


def _by_axis(charts: Charts, draw: Callable[[Charts, Sequence[LadderResult]], str]) -> str:
    """What `draw` makes of the ladders along each axis, with headings where there are several axes."""
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
    """The axis of a ladder, where its variant has ladders along several."""
    return f'<span class="quiet">in {escape(axis_name(group.axis))}</span>' if charts.several_axes else ""


# The check, the rules, the runs, and how to repeat them


def _check(sweep: SweepDir) -> str:
    """The coordinate check that is stored with the sweep."""
    variants = coordinates.read(sweep)
    if not variants:
        return ""
    table = _table(coordinates.COLUMNS, coordinates.table_rows(variants), "words")
    return (
        _title("Coordinate check", coordinates.NOTE)
        + coordinates.verdicts(variants)
        + coordinates.panels(variants)
        + f"<details><summary>exponents</summary>{table}</details>"
    )


def _rules(rules: Sequence[tuple[str, Sequence[TensorRule]]]) -> str:
    if not rules:
        return ""
    note = "What every tensor is trained with. A ratio is to the base shape; shapes are as stored."
    tables = [
        f"<details><summary>{escape(heading)}</summary>"
        f"{_table(rules_table.COLUMNS, rules_table.table_rows(tensors), 'tensors')}</details>"
        for heading, tensors in rules
    ]
    return _title("Rules", note) + "\n".join(tables)


def _runs(counts: RunCounts) -> str:
    """Number of runs by state, and their cost, per variant and size."""
    if not counts:
        return ""

    def cells(row: Counter[str]) -> Iterable[Any]:
        finished = [row[state] for state in (DONE, DIVERGED, FAILED)]
        costs = [(row["tokens"], si), (row["flops"], si), (row["seconds"], duration)]
        yield from (n or "" for n in (row["runs"], *finished, row["runs"] - sum(finished)))
        yield from (as_text(cost) if cost else "" for cost, as_text in costs)

    rows: list[tuple[Any, ...]] = [
        (" / ".join(label), width, depth, si(parameters) if parameters else "", *cells(row))
        for (label, width, depth, parameters), row in sorted(counts.items())
    ]
    rows.append(("all", "", "", "", *cells(sum(counts.values(), Counter()))))
    note = (
        "Tokens and FLOPs as planned, time as measured. "
        "A diverged run is a result; a failed one is tried again by the next run of the command."
    )
    head = ("variant", "width", "depth", "parameters")
    head = (*head, "runs", DONE, DIVERGED, FAILED, "open", "tokens", "FLOPs", "time")
    return _title("Runs and cost", note) + _table(head, rows, "total")


def _provenance(sweep: SweepDir) -> str:
    """The command, the config and the environment of the sweep."""
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
    stored = leaves(read_json(sweep.environment_path) or {}, separator=" ")
    environment = [(key, value) for key, value in stored if value is not None]
    if environment:
        parts.append("<h3>Environment</h3>" + _table((), environment, "words"))
    parts.append(
        '<p class="quiet">The numbers behind this page lie beside it: runs.csv, curves.csv, transfer.json, figures. '
        f"Made by mupsweep {escape(mupsweep.__version__)}.</p>"
    )
    return "\n".join(parts)


# Pieces of the page


def _title(text: str, note: str) -> str:
    return f'<h2>{escape(text)}</h2>\n<p class="quiet">{escape(note)}</p>\n'


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "") -> str:
    """A table of values, which are escaped; `kind` is a class of report.css."""
    titles = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "\n".join(f"<tr>{''.join(f'<td>{escape(str(c))}</td>' for c in row)}</tr>" for row in rows)
    top = f"<thead><tr>{titles}</tr></thead>\n" if head else ""
    return f'<div class="scroll"><table class="{kind}">{top}<tbody>\n{body}</tbody></table></div>'
