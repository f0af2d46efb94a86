"""The output of `run`, `transfer` and `report`: curves, optima, verdicts, recipes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from rich.table import Table

from mupsweep.analysis.analysis import Analysis
from mupsweep.analysis.comparison import Comparison
from mupsweep.analysis.enough import Enough
from mupsweep.analysis.estimate import CONFIDENCE, UNKNOWN, Estimate
from mupsweep.analysis.labels import DIVERGED, DONE, NAMES
from mupsweep.analysis.optimum import Optimum
from mupsweep.analysis.transfer import HORIZON, LadderResult, diverges
from mupsweep.analysis.verdict import DRIFTS, INCONCLUSIVE, TRANSFERS
from mupsweep.formatting import counted, si
from mupsweep.recipes.validation import TargetOutcome
from mupsweep.report.terminal.console import console_of, table_of
from mupsweep.report.terminal.curve_plot import curve_text
from mupsweep.report.terminal.tuning import factor, nats, tuning_text
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep.config import GRID


def show_analysis(
    analysis: Analysis,
    sweeps: Sequence[tuple[Path, Counter[str]]],
    files: Sequence[Path],
    advice: Iterable[str] = (),
    effort: Iterable[tuple[LadderResult, Enough]] = (),
) -> None:
    """Print curves, the optimum of every size, the verdicts, what they took, and advice on the next command."""
    console = console_of()
    for path, counts in sweeps:
        unfinished = counts["runs"] - counts[DONE] - counts[DIVERGED]
        if 0 < unfinished < counts["runs"]:
            console.say(
                f"{path}: {unfinished} of {counted(counts['runs'], 'run')} not finished; what follows rests on the rest"
            )
    if not analysis.groups:
        console.print("no finished runs yet: go on with mupsweep run")
        return
    for group in analysis.groups:
        base = group.base.curve
        shape = f" at width {base.width}, depth {base.depth}" if group.axis == HORIZON else ""
        console.print(f"\n{'/'.join(group.label)}, {group.axis} ladder{shape}", style="bold")
        console.print(curve_text(group.optima, min(72, console.width)))
        console.show(_optimum_table(group))
    console.print()
    for group in analysis.groups:
        style = {TRANSFERS: "bold green", DRIFTS: "bold red"}.get(group.verdict, "bold yellow")
        console.print(f"{'/'.join(group.label)} in {group.axis}: ", end="")
        console.print(group.verdict.upper(), style=style)
        for line in (*group.reasons, *_summary_lines(group), *quality_lines(group)):
            console.say(line, indent=2)
    for line in (*map(comparison_line, analysis.comparisons), *analysis.remarks):
        console.say(line)
    for item in tuning_text(analysis):
        if isinstance(item, str):
            console.say(item)
        else:
            console.show(item)
    for group, found in effort:
        console.say(f"{'/'.join(group.label)} in {group.axis}, enough?")
        for line in enough_lines(group, found):
            console.say(line, indent=2)
    console.say(f"in brackets and after ±: {CONFIDENCE:.0%} intervals")
    for file in files:
        console.say(f"wrote {file}")
    for line in advice:
        console.say(line)


def enough_lines(group: LadderResult, found: Enough) -> Iterator[str]:
    """The smallest part of a ladder that had given its answer, and what as much effort again would buy."""
    part = found.part
    if part is None:
        yield "there is no answer yet that less could have given"
    elif part.share == 1.0:
        yield f"nothing less than these {counted(found.n_runs, 'run')} gives this answer whichever runs are taken"
    else:
        kept = [f"{part.seeds} of {counted(found.seeds, 'seed')}"] if part.seeds < found.seeds else []
        kept += [f"every { ({2: 'second', 3: 'third'}[part.stride]) } LR"] if part.stride > 1 else []
        if len(part.sizes) < found.sizes:
            places = ", ".join(group.optima[k].curve.place(group.axis) for k in part.sizes)
            kept.append(f"only {places}")
        yield (
            f"{part.n_runs} of {counted(found.n_runs, 'run')}, {part.share:.0%} of the FLOPs, had given this answer, "
            f"whichever were taken: {', '.join(kept)}"
        )
    largest = group.optima[-1]
    for more in found.more:
        bought = [
            f"{what} to ±{after:.2f} octaves{'' if before is None else f' from ±{before:.2f}'}"
            for what, before, after in (
                (f"the optimum at {largest.curve.place(group.axis)}", largest.estimate.half_width, more.optimum),
                ("the total drift", group.total_drift.half_width, more.total_drift),
            )
            if after is not None
        ]
        decided = f"a verdict with a chance of {more.decided:.0%}" if group.verdict == INCONCLUSIVE else ""
        yield f"{more.what} would bring {', '.join(filter(None, [*bought, decided])) or 'no bound that is missing now'}"


def advice_on(analysis: Analysis, sweep: SweepDir) -> Iterator[str]:
    """What helps next with a sweep, in two lines: what to train, and how to get an LR."""
    undecided = any(g.verdict == INCONCLUSIVE and g.base is not g.optima[-1] for g in analysis.groups)
    if undecided and sweep.read_config()["sweep"].get("search", GRID) == GRID:
        yield (
            "inconclusive: the same mupsweep run with sweep.search=adaptive adds LRs and seeds until every optimum is "
            "known; mupsweep plan says what that costs"
        )
    else:
        yield "further sizes, LRs or seeds: the same mupsweep run with longer lists trains only what is new"
    if axes := {g.axis for g in analysis.groups if g.fitted}:  # ladders with fitted optima give a recipe its LR
        shape = [f"{key}=N" for key in ("width", "depth") if axes & {key, "joint"}]
        yield (
            f"for the LR of {'a larger model' if shape else 'longer training'}: "
            f"mupsweep transfer {quote(str(sweep.path))} --to {' '.join(shape) or 'tokens=N'}"
        )
    else:
        yield (
            "no optimum is known at both ends yet: add LRs where the reasons above say, before you rely on an LR for a "
            "larger model"
        )


def show_recipe(content: dict[str, Any], files: Sequence[Path], limits: Sequence[str]) -> None:
    """Print the recipe of a target, and the parts of it that the last of the files cannot express."""
    console = console_of()
    target = content["target"]
    console.print(
        f"\n{content['optimizer']}/{content['parametrization']} at width {target['width']}, depth {target['depth']} "
        f"({si(content['parameters'])} parameters)",
        style="bold",
    )
    for line in lr_lines(content):
        console.say(line)
    console.say(f"LR {content['horizon']['note']}")
    n_tensors: Counter[tuple[str, ...]] = Counter()  # by what is printed, since equal numbers differ in their last bit
    for row in content["tensors"]:
        init_std = f"{row['init_std']:.4g}" if row["init"] in ("normal", "own") else row["init"]
        numbers = (f"{row[key]:.4g}" for key in ("multiplier", "lr", "weight_decay", "eps"))
        n_tensors[row["role"], row["optimizer"], init_std, *numbers] += 1
    table = table_of("role", "optimizer", "tensors", "init std", "multiplier", "LR", "weight decay", "eps")
    for (role, optimizer, *cells), count in n_tensors.items():
        table.add_row(role, optimizer, str(count), *cells)
    console.show(table)
    console.say(f"attention scale {content['attention_scale']:.4g}, gradient clipping {content['clip']}")
    for path in files:
        console.say(f"wrote {path}")
    for limit in limits:
        console.say(f"not in {files[-1].name}: {limit}")


def show_target_lr(content: Mapping[str, Any]) -> None:
    """Print the LR of a target whose base is not known."""
    console = console_of()
    target, names = content["target"], "/".join(content[key] for key in NAMES)
    console.print(f"\n{names} at width {target['width']}, depth {target['depth']}", style="bold")
    for line in lr_lines(content):
        console.say(line)
    console.say(f"LR {content['horizon']['note']}")
    console.say("every tensor's numbers: add --base model=NAME optimizer=NAME parametrization=NAME")


def lr_lines(content: Mapping[str, Any]) -> Iterator[str]:
    """The LR of a target that is handed over, where the optimum lies, and what both rest on."""
    optimum = Estimate(content["log2_lr_optimum"], content["log2_lr_low"], content["log2_lr_high"])
    regret = content["expected_regret"]
    cost = "" if regret is None else f", expected to lose {regret:.4f} nats"
    log2_lr = content["log2_lr"]
    yield f"base LR {2**log2_lr:.3g}, log2 {log2_lr:+.2f}{cost}; the optimum there: log2 {optimum}"
    yield content["basis"]


def show_validation(outcome: TargetOutcome) -> None:
    """Print how the transferred LR fared at a target that has been trained since."""
    console = console_of()
    target = f"{'/'.join(outcome.label)} at width {outcome.size.width}, depth {outcome.size.depth}"
    console.print(f"\n{target}: validation of the transferred LR", style="bold")
    console.say(
        f"the forecast of the smaller sizes is {outcome.outcome}: they handed over log2 LR {outcome.log2_lr:g} and "
        f"expected the optimum at {outcome.forecast}; it is at {outcome.optimum}, and the LR handed over costs "
        f"{nats(outcome.regret)}"
    )
    for reason in outcome.reasons:
        console.say(reason)


def _optimum_table(group: LadderResult) -> Table:
    """A row per size; the headers are short enough for 80 columns."""
    size_columns = ["tokens"] if group.axis == HORIZON else ["width", "depth"]
    table = table_of(*size_columns, "runs", "x", "optimal log2 LR", "loss", "the base's LR costs")
    for optimum, regret in zip(group.optima, group.regrets, strict=True):
        curve = optimum.curve
        cost = "base" if optimum is group.base else "diverges" if diverges(group.base, optimum) else f"{regret:.4f}"
        table.add_row(
            *([si(curve.horizon or 0)] if group.axis == HORIZON else [str(curve.width), str(curve.depth)]),
            str(curve.n_runs),
            str(curve.n_diverged or ""),
            f"{optimum.estimate:.2f}",
            _loss_text(optimum),
            cost,
        )
    return table


def _loss_text(optimum: Optimum) -> str:
    """The loss at an optimum with the wider half of its interval, since a table has no room for both halves."""
    loss = optimum.loss
    if loss.value is None:
        return ""
    ends = [abs(end - loss.value) for end in (loss.low, loss.high) if end is not None]
    return f"{loss.value:.4f}" + (f" ±{max(ends):.4f}" if ends else "")


def _summary_lines(group: LadderResult) -> Iterator[str]:
    """The best LR of a ladder's base."""
    base = group.base
    if base.log2_lr is not None:
        yield f"best LR at {base.curve.place(group.axis)}: {2**base.log2_lr:.3g}, log2 {base.estimate:.2f}"


def quality_lines(group: LadderResult) -> Iterator[str]:
    """How well smaller sizes predict the largest one, and the transfer metrics of Kalra and Barkeshli."""
    found, held_out = group.quality, group.quality.held_out
    if held_out is not None:
        cost = "diverges there" if held_out.regret.value is None else f"costs {nats(held_out.regret)} there"
        smaller, largest = ("shorter", "longest horizon") if group.axis == HORIZON else ("smaller", "largest size")
        yield (
            f"held out: for the {largest} the {smaller} ones hand over log2 LR {held_out.log2_lr:.2f}, which {cost}; "
            f"they expect its optimum {held_out.error} octaves off"
        )
    metrics = [
        (found.fit_error, f"E {found.fit_error:.2f} octaves"),
        (found.robustness, f"kappa {found.robustness}"),
        (found.asymptotic_loss, f"asymptotic loss {nats(found.asymptotic_loss)}"),
    ]
    if available := [text for estimate, text in metrics if estimate.value is not None]:
        yield f"Kalra-Barkeshli: {', '.join(available)}"


def _difference_text(lower: Estimate) -> str:
    """A difference of losses, as "higher" or "lower" instead of a sign."""
    if lower.value is not None and lower.value < 0:
        return f"{nats(lower.negated)} higher"
    return f"{nats(lower)} lower"


def comparison_line(c: Comparison) -> str:
    """One line that compares two variants at one size, each at its own optimum."""
    tokens = "" if c.horizon is None else f", {si(c.horizon)} tokens"
    pair = f"{'/'.join(c.of)} against {'/'.join(c.over)} at width {c.width}, depth {c.depth}{tokens}"
    line = f"{pair}, each at its optimum: {_difference_text(c.lower)}"
    if c.speed_up != UNKNOWN:
        line += f", compute-equivalent speed-up {factor(c.speed_up)}"
    if c.asymptotic_penalty.value is not None:
        line += f"; extrapolated to infinite size: {_difference_text(c.asymptotic_penalty.negated)}"
    return line
