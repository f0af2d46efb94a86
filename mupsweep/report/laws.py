"""The law over size, tokens and batch of some runs: printed, and the recipe of a target from it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mupsweep.analysis.law import Law, fit_laws
from mupsweep.analysis.run_result import RunResult
from mupsweep.atomic_files import make_folder, write_json
from mupsweep.errors import ConfigError, RecordError
from mupsweep.formatting import nearest
from mupsweep.recipes import JSON, check
from mupsweep.recipes.from_law import base_shape, law_json, law_recipe, table_law_recipe
from mupsweep.report.generate import NOT_IMPORTED, base_of, read_source, read_target, say_unwritten, write_recipes
from mupsweep.store.results import read_runs
from mupsweep.store.sweep_dir import LAW_FILE, SweepDir
from mupsweep.store.tables import TableOptions
from mupsweep.sweep import plan
from mupsweep.sweep.config import analysis_config


@dataclass(frozen=True)
class Selection:
    """Of which runs a law is asked, and how its answer is given.

    Attributes:
        optimizer, parametrization: the only ones, where they are named.
        overrides: of `analysis`.
        form: of the file beside a recipe's JSON, a name of `recipes.names()`.
        results: the folder for recipes; None for the sweep's own, or this one.
    """

    optimizer: str | None = None
    parametrization: str | None = None
    overrides: Sequence[str] = ()
    as_json: bool = False
    form: str = JSON
    results: Path | None = None

    def laws(self, runs: Sequence[RunResult], stored: dict[str, Any]) -> tuple[list[Law], list[str]]:
        """The laws of the chosen runs, and why some variants have none.

        Args:
            stored: the config whose `analysis` the overrides change.

        Raises:
            ConfigError: no run is of that name.
            RecordError: no variant has a law.
        """
        chosen = list(runs)
        for key, name in (("optimizer", self.optimizer), ("parametrization", self.parametrization)):
            names = {getattr(run, key) for run in runs}
            if name is not None and name not in names:
                raise ConfigError(f"no {key} '{name}' among these runs; {nearest(name, names)}")
            chosen = [run for run in chosen if name in (None, getattr(run, key))]
        laws, refused = fit_laws(chosen, analysis_config(stored, self.overrides).curve)
        return laws, [f"no law for {line}" for line in refused]


def answer(
    sweeps: Sequence[SweepDir],
    table: str | None,
    options: TableOptions,
    target: Sequence[str],
    base: Sequence[str],
    selection: Selection,
    save: Path | None,
    refused: Mapping[str, bool],
) -> None:
    """Print the laws of sweeps or of a table, or the LRs for a target from them.

    Args:
        table: where runs that were trained elsewhere are read from, as `options` say; None for those of the sweeps.
        target, base: words of --to and of --base.
        save: where the runs of a table are written.
        refused: options that a law has no answer to, and whether they were given.
    """
    if given := [option for option, is_given in refused.items() if is_given]:
        raise ConfigError(f"{given[0]} is of a ladder's verdict, which a law does not have: leave one of them out")
    check(selection.form)
    dims = read_target(target, of_law=True)
    if table is None:
        _of_sweeps(sweeps, dims, selection)
    else:
        _of_table(table, options, dims, base, selection, save)


def _of_sweeps(sweeps: Sequence[SweepDir], target: Mapping[str, int], selection: Selection) -> None:
    """Print the laws of some sweeps, or where there is a target, their recipes for it, which are written too."""
    if not sweeps:
        raise ConfigError("no sweep given: mupsweep transfer sweeps/NAME --law, or mupsweep transfer --from FILE --law")
    laws, refused = selection.laws(read_runs(sweeps), sweeps[0].read_config())
    if not target:
        one_sweep = sweeps[0].results if len(sweeps) == 1 else None
        _conclude(laws, refused, selection, selection.results or one_sweep)
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
    _write(contents, sweeps[0].results, target, selection)


def _of_table(
    source: str,
    options: TableOptions,
    target: Mapping[str, int],
    base: Sequence[str],
    selection: Selection,
    save: Path | None,
) -> None:
    """Print the laws of runs that were trained elsewhere, or where there is a target, the LRs for it.

    Args:
        base: overrides that say how the table's smallest size was trained: then recipes are written.
        save: write the runs there.
    """
    from mupsweep.report.terminal.law import show_law_lr

    if target and (selection.form != JSON or selection.results is not None) and not base:
        what = "--results" if selection.form == JSON else f"--format {selection.form}"
        raise ConfigError(f"{what} is for the recipes of a table, which need its base: add --base model=NAME ...")
    table = read_source(source, options, save)
    laws, refused = selection.laws(table.runs, {})
    notes = [*table.notes, *refused]
    if not target:
        _conclude(laws, notes, selection, selection.results)
        return
    contents = []
    for law in laws:
        label = (law.variant.models[0], law.variant.optimizer, law.variant.parametrization)
        resolved = base_of(label, base_shape(law), base) if base else None
        contents.append(table_law_recipe(law, target, resolved))
    for line in notes:
        print(line, file=sys.stderr)
    if base:
        _write(contents, Path(), target, selection)
    elif selection.as_json:
        print(json.dumps(contents, indent=2))
    else:
        for content in contents:
            show_law_lr(content)


def _write(
    contents: Sequence[dict[str, Any]], own_folder: Path, target: Mapping[str, int], selection: Selection
) -> None:
    has_tokens, has_batch = "tokens" in target, "batch_size" in target
    write_recipes(contents, selection.results, own_folder, selection.form, selection.as_json, has_tokens, has_batch)


def _conclude(laws: Sequence[Law], notes: Sequence[str], selection: Selection, folder: Path | None) -> None:
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
    if selection.as_json:
        print(json.dumps(content, indent=2))
    else:
        show_laws(laws, notes, files)
    if unwritten is not None:
        say_unwritten(unwritten, selection.results)
