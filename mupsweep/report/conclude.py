"""Conclude: analyse a sweep and write every view of the outcome; export the recipe of a target."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mupsweep import plan, recipe, trackers
from mupsweep.build import rules
from mupsweep.errors import ConfigError, RecordError
from mupsweep.files import make_folder, write_json
from mupsweep.plan import RunSpec
from mupsweep.records import SweepDir
from mupsweep.results import read_runs, read_table, to_json, write_results
from mupsweep.transfer import Analysis, Group, analyse, select


def conclude(
    sweeps: Sequence[SweepDir],
    as_json: bool = False,
    optimizer: str | None = None,
    parametrization: str | None = None,
) -> list[str]:
    """Analyse some sweeps together, write the results of a single one, print the outcome, return the verdicts."""
    from mupsweep.report import verdicts

    if not sweeps:
        raise ConfigError("no sweep given: mupsweep transfer sweeps/NAME, or mupsweep transfer --from runs.csv")
    analysis = analyse(read_runs(sweeps))
    files = write_views(sweeps[0], analysis) if len(sweeps) == 1 else []
    groups = select(analysis, optimizer, parametrization) if analysis.groups else []
    shown = Analysis(analysis.rows, analysis.curves, tuple(groups), analysis.remarks)
    if as_json:
        print(json.dumps(to_json(shown), indent=2))
    else:
        verdicts.show_analysis(shown, [(s.path, s.counts()) for s in sweeps], files)
    return [group.verdict for group in groups]


def conclude_table(
    table: str, others: Sequence[str], as_json: bool, optimizer: str | None, parametrization: str | None
) -> list[str]:
    """Analyse runs that were trained elsewhere, print the outcome, return the verdicts. Writes nothing."""
    from mupsweep.report import verdicts

    if others:
        raise ConfigError(f"--from {table} stands alone, without {others[0]}: how these runs were trained is not known")
    analysis = analyse(read_table(table))
    shown = replace(analysis, groups=tuple(select(analysis, optimizer, parametrization)))
    if as_json:
        print(json.dumps(to_json(shown), indent=2))
    else:
        verdicts.show_analysis(shown, [], [])
    return [group.verdict for group in shown.groups]


def write_views(sweep: SweepDir, analysis: Analysis) -> list[Path]:
    """results/: tables, and figures and the report once there is something to see."""
    write_results(sweep, analysis)
    files = [sweep.results / "transfer.json", sweep.results / "runs.csv"]
    if analysis.curves:
        from mupsweep.report import figures, html

        figures.draw(analysis, sweep.figures)
        files = [html.write(sweep, analysis, list(_rules_at_sizes(plan.load(sweep)))), sweep.figures, *files]
    trackers.load(sweep).analysed()
    return files


def export(
    sweeps: Sequence[SweepDir],
    target: Sequence[str],
    optimizer: str | None,
    parametrization: str | None,
    as_json: bool = False,
) -> None:
    """Print the recipe of every chosen variant for a target, and write it beside the first sweep's results."""
    from mupsweep.report import verdicts

    dims = _target(target)
    if not sweeps:
        raise ConfigError(f"no sweep given: mupsweep transfer sweeps/NAME --to {' '.join(target)}")
    recipes: dict[tuple[str, str, str], plan.Recipe] = {}
    for sweep in sweeps:
        for run in plan.load(sweep):
            recipes.setdefault(run.recipe.variant.label, run.recipe)
    groups = select(analyse(read_runs(sweeps)), optimizer, parametrization)
    if not groups:
        raise RecordError(
            f"{sweeps[0].path} has no finished runs, so there is no LR --to {' '.join(target)}: mupsweep run first"
        )
    made: list[tuple[Group, dict[str, Any]]] = []
    refused: list[str] = []
    for label in dict.fromkeys(group.label for group in groups):
        if label not in recipes:
            refused.append(f"{'/'.join(label)}: two sweeps hold this name with other settings; export from one of them")
            continue
        chosen = recipes[label]
        width, depth = dims.get("width", chosen.model.width), dims.get("depth", chosen.model.depth)
        mine = {group.axis: group for group in groups if group.label == label}
        best = mine.get(recipe.axis_of(chosen, width, depth) or "", next(iter(mine.values())))
        try:
            made.append((best, recipe.recipe(best, chosen, width, depth)))
        except RecordError as error:
            refused.append(str(error))
    if not made:
        raise RecordError("; ".join(refused))
    for line in refused:
        print(f"no recipe for {line}", file=sys.stderr)
    for group, content in made:
        size = content["target"]
        name = f"recipe-{group.optimizer}-{group.parametrization}-w{size['width']}-d{size['depth']}.json"
        make_folder(sweeps[0].results)
        write_json(sweeps[0].results / name, content)
        if not as_json:
            verdicts.show_recipe(content, sweeps[0].results / name)
    if as_json:
        print(json.dumps([content for _, content in made], indent=2))


def _target(words: Sequence[str]) -> dict[str, int]:
    """width=4096 depth=32 -> {"width": 4096, "depth": 32}."""
    dims = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in ("width", "depth") or not value.isdecimal() or not value.isascii() or int(value) < 1:
            raise ConfigError(f"--to {word}: expected width=N and depth=N, for example --to width=4096 depth=32")
        dims[key] = int(value)
    return dims


def _rules_at_sizes(runs: Sequence[RunSpec]):
    """(heading, rules) for every variant and size of a sweep, at the middle LR of its grid."""
    middle = sorted({run.log2_lr for run in runs})[len({run.log2_lr for run in runs}) // 2]
    seen = {(run.recipe.variant.label, run.size): run for run in runs}
    for (label, size), run in sorted(seen.items(), key=lambda item: (item[0][0], item[0][1])):
        heading = f"{'/'.join(label)}, width {size.width}, depth {size.depth}, at base LR 2^{middle:g}"
        yield heading, rules(run.recipe, size, 2.0**middle)
