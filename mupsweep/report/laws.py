"""The law over size, tokens and batch of some runs: printed, and the recipe of a target from it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mupsweep.analysis.law import Law, fit_laws
from mupsweep.analysis.run_result import RunResult
from mupsweep.atomic_files import make_folder, write_json
from mupsweep.errors import ConfigError, RecordError
from mupsweep.formatting import nearest
from mupsweep.recipes import JSON, check
from mupsweep.recipes.from_law import base_shape, law_json, law_recipe, table_law_recipe
from mupsweep.report.generate import (
    NOT_IMPORTED,
    Selection,
    base_of,
    read_source,
    read_target,
    say_unwritten,
    write_recipes,
)
from mupsweep.store.results import read_runs
from mupsweep.store.sweep_dir import LAW_FILE, SweepDir
from mupsweep.store.tables import TableOptions
from mupsweep.sweep import plan
from mupsweep.sweep.config import analysis_config


def answer(
    sweeps: Sequence[SweepDir],
    table: str | None,
    options: TableOptions,
    target: Sequence[str],
    base: Sequence[str],
    asked: Selection,
    refused: Mapping[str, bool],
) -> None:
    """Print the laws of sweeps or of a table, or the LRs for a target from them.

    Args:
        table: where runs that were trained elsewhere are read from, as `options` say; None for those of the sweeps.
        target, base: words of --to and of --base.
        refused: options that a law has no answer to, and whether they were given.
    """
    if given := [option for option, is_given in refused.items() if is_given]:
        raise ConfigError(f"{given[0]} is of a ladder's verdict, which a law does not have: leave one of them out")
    check(asked.form)
    dims = read_target(target, of_law=True)
    if table is None:
        _of_sweeps(sweeps, dims, asked)
    else:
        _of_table(table, options, dims, base, asked)


def _laws(runs: Sequence[RunResult], stored: dict[str, Any], asked: Selection) -> tuple[list[Law], list[str]]:
    """The laws of the chosen runs, and why some variants have none.

    Args:
        stored: the config whose `analysis` the overrides change.

    Raises:
        ConfigError: no run is of that name.
        RecordError: no variant has a law.
    """
    chosen = list(runs)
    for key, name in (("optimizer", asked.optimizer), ("parametrization", asked.parametrization)):
        names = {getattr(run, key) for run in runs}
        if name is not None and name not in names:
            raise ConfigError(f"no {key} '{name}' among these runs; {nearest(name, names)}")
        chosen = [run for run in chosen if name in (None, getattr(run, key))]
    laws, refused = fit_laws(chosen, analysis_config(stored, asked.overrides).curve)
    return laws, [f"no law for {line}" for line in refused]


def _of_sweeps(sweeps: Sequence[SweepDir], target: Mapping[str, int], asked: Selection) -> None:
    """Print the laws of some sweeps, or where there is a target, their recipes for it, which are written too."""
    if not sweeps:
        raise ConfigError("no sweep given: mupsweep transfer sweeps/NAME --law, or mupsweep transfer --from FILE --law")
    laws, refused = _laws(read_runs(sweeps), sweeps[0].read_config(), asked)
    if not target:
        one_sweep = sweeps[0].results if len(sweeps) == 1 else None
        _conclude(laws, refused, asked, asked.results or one_sweep)
        return
    for line in refused:
        print(line, file=sys.stderr)
    planned = (run for sweep in reversed(sweeps) for run in plan.load(sweep, to_train=False))
    variants = {run.resolved.variant.label: run.resolved for run in planned if run.resolved.variant.change is None}
    contents = []
    for law in laws:
        labels = [(model, law.variant.optimizer, law.variant.parametrization) for model in law.variant.models]
        resolved = next((variants[label] for label in labels if label in variants), None)
        if resolved is None:
            raise RecordError(f"{law.variant.name}: its code {NOT_IMPORTED}")
        contents.append(law_recipe(law, resolved, target))
    write_recipes(contents, target, sweeps[0].results, asked)


def _of_table(
    source: str, options: TableOptions, target: Mapping[str, int], base: Sequence[str], asked: Selection
) -> None:
    """Print the laws of runs that were trained elsewhere, or where there is a target, the LRs for it.

    Args:
        base: overrides that say how the table's smallest size was trained: then recipes are written.
    """
    from mupsweep.report.terminal.law import show_law_lr

    if target and (asked.form != JSON or asked.results is not None) and not base:
        what = "--results" if asked.form == JSON else f"--format {asked.form}"
        raise ConfigError(f"{what} is for the recipes of a table, which need its base: add --base model=NAME ...")
    table = read_source(source, options, asked.save)
    laws, refused = _laws(table.runs, {}, asked)
    notes = [*table.notes, *refused]
    if not target:
        _conclude(laws, notes, asked, asked.results)
        return
    contents = []
    for law in laws:
        label = (law.variant.models[0], law.variant.optimizer, law.variant.parametrization)
        resolved = base_of(label, base_shape(law), base) if base else None
        contents.append(table_law_recipe(law, target, resolved))
    for line in notes:
        print(line, file=sys.stderr)
    if base:
        write_recipes(contents, target, Path(), asked)
    elif asked.as_json:
        print(json.dumps(contents, indent=2))
    else:
        for content in contents:
            show_law_lr(content)


def _conclude(laws: Sequence[Law], notes: Sequence[str], asked: Selection, folder: Path | None) -> None:
    """Print the laws and write them to a folder, if there is one."""
    from mupsweep.report.terminal.law import law_lines, show_laws

    of_all = [{"name": law.variant.name, **law_json(law), "sentences": list(law_lines(law))} for law in laws]
    only = {"law": of_all[0]} if len(of_all) == 1 else {}
    content = {**only, "laws": of_all, "notes": list(notes)}
    files: list[Path] = []
    unwritten: RecordError | None = None
    if folder is not None:
        try:
            make_folder(folder)
            write_json(folder / LAW_FILE, content)
            files = [folder / LAW_FILE]
        except RecordError as error:  # what it says can still be read
            unwritten = error
    if asked.as_json:
        print(json.dumps(content, indent=2))
    else:
        show_laws(laws, notes, files)
    if unwritten is not None:
        say_unwritten(unwritten, asked.results)
