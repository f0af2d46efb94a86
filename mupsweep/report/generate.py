"""Generate every view of a sweep's analysis, and the recipe of a target."""

from __future__ import annotations

import errno
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

from mupsweep import trackers
from mupsweep.analysis.analysis import Analysis, analyse
from mupsweep.analysis.enough import Enough, enough
from mupsweep.analysis.transfer import LadderResult
from mupsweep.atomic_files import make_folder, write_json, write_text
from mupsweep.errors import ConfigError, RecordError
from mupsweep.recipes import JSON, check, recipe, validation
from mupsweep.recipes import export as export_format
from mupsweep.report import norms
from mupsweep.report.best_runs import best_runs
from mupsweep.report.results_files import enough_to_json, save_runs, to_json, write_norms, write_results
from mupsweep.schema import LARGEST
from mupsweep.store.results import read, read_runs
from mupsweep.store.sweep_dir import FIGURES, SweepDir
from mupsweep.store.tables import Table, TableOptions, read_table
from mupsweep.sweep import plan
from mupsweep.sweep.compose import COMPARABLE, choices
from mupsweep.sweep.config import analysis_config, load
from mupsweep.sweep.run_spec import ResolvedVariant, RunSpec, resolve
from mupsweep.sweep.tensor_rules import TensorRule, rules
from mupsweep.trackers.wandb import project

READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)  # errors of a folder that may not be written
NOT_IMPORTED = "is code outside mupsweep, and reading imports none: add --allow-imports if you trust it"


@dataclass(frozen=True)
class Selection:
    """Of which runs an answer is asked, and how it is given.

    Attributes:
        optimizer, parametrization: the only ones, where they are named.
        overrides: of the first sweep's `analysis`.
        form: of the file beside a recipe's JSON, a name of `recipes.names()`.
        results: the folder to write to; None for the first sweep's own, or for a table's recipes this one.
        save: where the runs of a table are written, in the form of runs.csv.
    """

    optimizer: str | None = None
    parametrization: str | None = None
    overrides: Sequence[str] = ()
    as_json: bool = False
    form: str = JSON
    results: Path | None = None
    save: Path | None = None


def generate(
    sweeps: Sequence[SweepDir],
    as_json: bool = False,
    optimizer: str | None = None,
    parametrization: str | None = None,
    figures: str | None = None,
    overrides: Sequence[str] = (),
    trials: Sequence[validation.Trial] = (),
    results: Path | None = None,
    with_effort: bool = False,
) -> list[str]:
    """Analyse some sweeps together, write the results of a single one, print the outcome, return the verdicts.

    A folder that may not be written, such as a colleague's, is judged like any other.

    Args:
        figures: a further style to draw the figures in, a key of `theme.FIGURE_STYLES`.
        overrides: of the first sweep's `analysis`.
        trials: of the first sweep, whose targets have been trained.
        results: the folder to write to, also of several sweeps; None for the sweep's own.
        with_effort: say the smallest part of every ladder that had given its answer, and what more would buy.
    """
    from mupsweep.report.terminal import verdicts

    if not sweeps:
        raise ConfigError("no sweep given: mupsweep transfer sweeps/NAME, or mupsweep transfer --from runs.csv")
    if figures is not None:
        from mupsweep.report.figures import theme

        theme.figure_style(figures)  # this, and a damaged config, are refused before anything is written
    sweeps = [replace(sweep, results_folder=results) for sweep in sweeps]
    trees = [sweep.read_config() for sweep in sweeps]
    config = analysis_config(trees[0], overrides)
    # before the runs are read: of 100,000, plan and results together would take the most memory
    shown_rules: list[tuple[str, Sequence[TensorRule]]] = []
    if len(sweeps) == 1:
        shown_rules += _rules_at_sizes(plan.load(sweeps[0], to_train=False))
        for label, code in plan.unreadable(sweeps[0]).items():
            print(f"no rules of {'/'.join(label)}: {code} {NOT_IMPORTED}", file=sys.stderr)
    rows, ledgers = read(sweeps)
    analysis = analyse(rows, config)
    files: list[Path] = []
    unwritten: RecordError | None = None
    if len(sweeps) == 1 or results is not None:
        try:
            files += write_views(sweeps[0].results, analysis, figures)
            files += write_norm_views(sweeps, analysis, figures)
            if len(sweeps) == 1 and analysis.curves:
                from mupsweep.report.html import page

                files.insert(0, page.write(sweeps[0], analysis, shown_rules, ledgers[0]))
            if results is None:
                trackers.log_results(sweeps[0])
        except RecordError as error:  # somebody else's folder, or a full disk: what it says can still be read
            unwritten = error
    shown = analysis.select(optimizer, parametrization) if analysis.groups else analysis
    effort = _effort(shown) if with_effort else []
    if as_json:
        print(json.dumps(_with_effort(to_json(shown), effort), indent=2))
    else:
        counts = [sum(ledger.values(), Counter()) for ledger in ledgers]
        advice: list[str] = []
        if len(sweeps) == 1:
            look = [f"to look at it: open {quote(str(file))}" for file in files if file.suffix == ".html"]
            advice += [*look, *verdicts.advice_on(shown, sweeps[0])]
        verdicts.show_analysis(shown, list(zip((s.path for s in sweeps), counts, strict=True)), files, advice, effort)
    if unwritten is not None:
        say_unwritten(unwritten, results)
    _conclude_validation(sweeps[0], analysis, trials, as_json)
    return [group.verdict for group in shown.groups]


def conclude_table(source: str, options: TableOptions, asked: Selection, with_effort: bool) -> list[str]:
    """Analyse runs that were trained elsewhere, print the outcome, return the verdicts.

    Tables and figures are written where `asked.results` is given.

    Args:
        source: a file, "-" for stdin, or wandb:ENTITY/PROJECT.
        with_effort: say the smallest part of every ladder that had given its answer, and what more would buy.
    """
    from mupsweep.report.terminal import verdicts

    table = read_source(source, options, asked.save)
    analysis = analyse(table.runs, analysis_config({}, asked.overrides))
    files = [] if asked.save is None else [asked.save]
    if asked.results is not None:
        files += write_views(asked.results, analysis)
    shown = analysis.select(asked.optimizer, asked.parametrization)
    effort = _effort(shown) if with_effort else []
    if asked.as_json:
        print(json.dumps({**_with_effort(to_json(shown), effort), "notes": list(table.notes)}, indent=2))
    else:
        shown = replace(shown, remarks=(*table.notes, *shown.remarks))
        verdicts.show_analysis(shown, [], files, effort=effort)
    return [group.verdict for group in shown.groups]


def _effort(analysis: Analysis) -> list[tuple[LadderResult, Enough]]:
    """What the answer of every ladder took."""
    return [(group, enough(group, analysis.config)) for group in analysis.groups]


def _with_effort(content: dict[str, Any], effort: Sequence[tuple[LadderResult, Enough]]) -> dict[str, Any]:
    """The JSON of an analysis, `enough` in each of its groups where it was asked for."""
    for group, (_, found) in zip(content["groups"], effort, strict=False):
        group["enough"] = enough_to_json(found)
    return content


def read_source(source: str, options: TableOptions, save: Path | None) -> Table:
    """The runs of a file or of a W&B project, written to `save` if it is given."""
    if save is not None and save.exists() and Path(source).exists() and save.samefile(source):
        raise ConfigError(f"--save {save} is the table itself, which it would replace: name another file")
    table = project.read_project(source, options) if project.is_project(source) else read_table(source, options)
    if save is not None:
        save_runs(save, table.runs)
    return table


def write_views(folder: Path, analysis: Analysis, style: str | None = None) -> list[Path]:
    """Write tables to a folder of results, and figures once there is something to see; return what people look at."""
    write_results(folder, analysis)
    files = [folder / "transfer.json", folder / "runs.csv"]
    if analysis.curves:
        from mupsweep.report.figures import curves

        figures = folder / FIGURES
        curves.draw(analysis, figures)
        if style is not None:
            files += curves.draw(analysis, figures / style, style)
        files = [figures, *files]
    return files


def write_norm_views(sweeps: Sequence[SweepDir], analysis: Analysis, style: str | None = None) -> list[Path]:
    """Write norms.csv and its figures to the results of the first sweep, if any tracked norms; return the table."""
    runs = [*analysis.runs, *analysis.changed]
    rows = [row for sweep in sweeps for row in norms.read_norms(sweep, runs)]
    if not rows:
        return []
    path = write_norms(sweeps[0].results, rows)
    of_run = defaultdict(list)
    for row in rows:
        of_run[row.run_id].append(row)
    courses = {key: of_run[run.run_id] for key, run in best_runs(analysis).items() if run.run_id in of_run}
    if courses:
        from mupsweep.report.figures import norms as norm_figures

        figures = sweeps[0].figures
        norm_figures.draw(courses, figures)
        if style is not None:
            norm_figures.draw(courses, figures / style, style)
    return [path]


def say_unwritten(error: RecordError, results: Path | None) -> None:
    """Say that a sweep which may only be read got no results, and where they can be written.

    Raises:
        RecordError: the folder could be written, were it not for a full disk, or is the one that was asked for.
    """
    reason = error.__cause__
    if results is not None or not isinstance(reason, OSError) or reason.errno not in READ_ONLY:
        raise error
    print(f"nothing is written, {reason.filename}: {reason.strerror}; --results DIR writes elsewhere", file=sys.stderr)


def _conclude_validation(sweep: SweepDir, analysis: Analysis, trials: Sequence[validation.Trial], silent: bool) -> None:
    """Write what the transferred LR was worth at a target, and print it unless `silent`."""
    from mupsweep.report.terminal import verdicts

    for outcome in (validation.judge(analysis, trial) for trial in trials):
        _, optimizer, parametrization = outcome.label
        name = f"validation-{optimizer}-{parametrization}-{outcome.size.name}.json"
        write_json(sweep.results / name, validation.to_json(outcome))
        if not silent:
            verdicts.show_validation(outcome)


def export(sweeps: Sequence[SweepDir], target: Sequence[str], asked: Selection) -> list[str]:
    """Print and write the recipe of every chosen variant for a target, return verdicts."""
    dims = read_target(target)
    check(asked.form)
    if not sweeps:
        raise ConfigError(f"no sweep given: mupsweep transfer sweeps/NAME --to {' '.join(target)}")
    planned = (run for sweep in reversed(sweeps) for run in plan.load(sweep, to_train=False))
    variants = {run.resolved.variant.label: run.resolved for run in planned}
    unreadable = {label: code for sweep in sweeps for label, code in plan.unreadable(sweep).items()}
    config = analysis_config(sweeps[0].read_config(), asked.overrides)
    groups = analyse(read_runs(sweeps), config).select(asked.optimizer, asked.parametrization).groups
    if not groups:
        raise RecordError(
            f"{sweeps[0].path} has no finished runs, so there is no LR --to {' '.join(target)}: mupsweep run first"
        )

    def recipe_of(ladders: Sequence[LadderResult]) -> dict[str, Any]:
        label = ladders[0].label
        if label in unreadable:
            raise RecordError(f"{'/'.join(label)}: {unreadable[label]} {NOT_IMPORTED}")
        if label not in variants:
            raise RecordError(
                f"{'/'.join(label)}: two sweeps hold this name with other settings; export from one of them"
            )
        return recipe.target_recipe(ladders, variants[label], dims)

    contents, refused = _of_every_variant(groups, recipe_of)
    for line in refused:
        print(f"no recipe for {line}", file=sys.stderr)
    write_recipes(contents, dims, sweeps[0].results, asked)
    return [content["verdict"] for content in contents]


def export_table(
    source: str, options: TableOptions, target: Sequence[str], base: Sequence[str], asked: Selection
) -> list[str]:
    """Print the LR of every chosen variant of a table for a target, return verdicts; with a base, write whole recipes.

    Args:
        source: a file, "-" for stdin, or wandb:ENTITY/PROJECT.
        base: overrides that say how the table's smallest size was trained.

    Raises:
        ConfigError: a folder for recipes without the base that recipes need.
    """
    from mupsweep.report.terminal import verdicts

    dims = read_target(target)
    check(asked.form)
    if asked.form != JSON and not base:
        raise ConfigError(
            f"--format {asked.form} needs the settings of the base, which a table does not have: add "
            "--base model=NAME optimizer=NAME parametrization=NAME"
        )
    if asked.results is not None and not base:
        raise ConfigError("--results is for the recipes of a table, which need its base: add --base model=NAME ...")
    table = read_source(source, options, asked.save)
    analysis = analyse(table.runs, analysis_config({}, asked.overrides))
    groups = analysis.select(asked.optimizer, asked.parametrization).groups

    def recipe_of(ladders: Sequence[LadderResult]) -> dict[str, Any]:
        resolved = base_of(ladders[0].label, recipe.base_shape(ladders), base) if base else None
        return recipe.table_recipe(ladders, dims, resolved)

    contents, refused = _of_every_variant(groups, recipe_of)
    for line in (*table.notes, *(f"no LR for {line}" for line in refused)):
        print(line, file=sys.stderr)
    if base:
        write_recipes(contents, dims, Path(), asked)
    elif asked.as_json:
        print(json.dumps(contents, indent=2))
    else:
        for content in contents:
            verdicts.show_target_lr(content)
    return [content["verdict"] for content in contents]


def _of_every_variant(
    groups: Sequence[LadderResult], recipe_of: Callable[[Sequence[LadderResult]], dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """What `recipe_of` makes of the ladders of every variant, and why it makes nothing of some.

    Raises:
        RecordError: it makes nothing of any.
    """
    contents: list[dict[str, Any]] = []
    refused: list[str] = []
    for label in dict.fromkeys(group.label for group in groups):
        try:
            contents.append(recipe_of([group for group in groups if group.label == label]))
        except RecordError as error:
            refused.append(str(error))
    if not contents:
        raise RecordError("; ".join(refused))
    return contents, refused


def base_of(label: Sequence[str], shape: Mapping[str, int], words: Sequence[str]) -> ResolvedVariant:
    """The variant that --base describes, at the shape of the table's base.

    Args:
        label: model, optimizer and parametrization in the table.
    """
    lacking = [group for group in COMPARABLE if not any(word.startswith(f"{group}=") for word in words)]
    if lacking:
        raise ConfigError(f"--base {' '.join(words)} lacks {lacking[0]}=NAME: {', '.join(choices(lacking[0]))}")
    variant, *others = load([*words, *(f"model.{key}={value}" for key, value in shape.items())]).variants
    if others:
        raise ConfigError(f"--base {' '.join(words)}: one base at a time, without several choices of a group")
    for group, given, name in zip(COMPARABLE, label, variant.names, strict=True):
        if given in choices(group) and given != name:
            raise RecordError(f"{'/'.join(label)}: --base {group}={name} is another {group} than the table's")
    return resolve(variant, digest="of a table")


def write_recipes(
    contents: Sequence[dict[str, Any]], target: Mapping[str, int], own_folder: Path, asked: Selection
) -> None:
    """Write recipes for a target to a folder, in another form too, and print them.

    Args:
        own_folder: where they are written unless `asked` says where.
    """
    from mupsweep.report.terminal import verdicts

    several = len({content["model"] for content in contents}) > 1
    exports = [None if asked.form == JSON else export_format(asked.form, content) for content in contents]  # or refuse
    folder = own_folder if asked.results is None else asked.results
    unwritten: RecordError | None = None
    for content, exported in zip(contents, exports, strict=True):
        path = folder / f"{_file_name(content, several, target)}.json"
        files = [path] if exported is None else [path, path.with_name(f"{path.stem}-{asked.form}{exported.suffix}")]
        try:
            make_folder(folder)
            write_json(path, content)
            if exported is not None:
                write_text(files[1], exported.text)
        except RecordError as error:  # what it says can still be read
            files, unwritten = [], error
        if not asked.as_json:
            verdicts.show_recipe(content, files, exported.limits if exported and files else ())
    if asked.as_json:
        print(json.dumps(contents, indent=2))
    if unwritten is not None:
        say_unwritten(unwritten, asked.results)


def _file_name(content: dict[str, Any], several_models: bool, target: Mapping[str, int]) -> str:
    """recipe-adamw-spectral-w4096-d32, with the model, horizon or batch size where they tell recipes apart."""
    size = content["target"]
    model = f"{content['model']}-" if several_models else ""
    horizon = f"-t{content['horizon']['tokens']}" if "tokens" in target else ""
    batch = f"-b{content['training']['batch_size']}" if "batch_size" in target else ""
    variant = f"{model}{content['optimizer']}-{content['parametrization']}"
    variant = re.sub(r"[/\\\x00-\x1f]", "-", variant)  # a table may call a model org/name
    return f"recipe-{variant}-w{size['width']}-d{size['depth']}{horizon}{batch}"


SHAPE, BY_LAW = ("width", "depth", "tokens"), ("parameters", "batch_size")  # words of a target; the latter of a law


def read_target(words: Sequence[str], of_law: bool = False) -> dict[str, int]:
    """width=4096 depth=32 tokens=2e9 -> {"width": 4096, "depth": 32, "tokens": 2000000000}.

    Args:
        of_law: whether the LR comes from a law, which knows of BY_LAW too.
    """
    dims = {}
    for word in words:
        key, _, text = word.partition("=")
        try:
            value = float(text) if text.isascii() and "_" not in text else 0.0
        except ValueError:
            value = 0.0
        if key not in (*SHAPE, *BY_LAW) or not 1 <= value <= LARGEST or not value.is_integer():
            raise ConfigError(
                f"--to {word}: expected whole numbers of {', '.join(SHAPE)} and, with --law, "
                f"{' and '.join(BY_LAW)}, for example --to width=4096 depth=32 tokens=2e9"
            )
        if key in BY_LAW and not of_law:
            raise ConfigError(f"--to {word}: only a law carries an LR there, mupsweep transfer ... --law --to {word}")
        if key in dims:
            raise ConfigError(f"--to {word}: {key}={dims[key]} is given too; one target a command")
        dims[key] = int(value)
    return dims


def _rules_at_sizes(runs: Sequence[RunSpec]) -> Iterator[tuple[str, Sequence[TensorRule]]]:
    """(heading, rules) for every variant and size of a sweep, at the middle LR of its grid."""
    lrs = sorted({run.log2_lr for run in runs})
    seen = {(run.resolved.variant.label, run.size): run for run in runs if run.resolved.variant.change is None}
    for (label, size), run in sorted(seen.items(), key=lambda item: (item[0][0], item[0][1])):
        heading = f"{'/'.join(label)}, width {size.width}, depth {size.depth}, at base LR 2^{lrs[len(lrs) // 2]:g}"
        yield heading, rules(run.resolved, size, 2.0 ** lrs[len(lrs) // 2])
