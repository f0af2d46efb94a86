"""What `run`, `transfer` and `report` print: curves, optima, verdicts, recipes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from rich.table import Table

from mupsweep.analysis.comparison import Comparison, comparisons, quality
from mupsweep.analysis.estimate import UNKNOWN, Estimate
from mupsweep.analysis.labels import DIVERGED, DONE
from mupsweep.analysis.optimum import CONFIDENCE, Optimum
from mupsweep.analysis.transfer import (
    DRIFTS,
    HORIZON,
    INCONCLUSIVE,
    TRANSFERS,
    Analysis,
    LadderResult,
    diverges,
    loss_of,
)
from mupsweep.formatting import counted, si
from mupsweep.recipes.validation import Validation
from mupsweep.report.names import slope_text
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
) -> None:
    """Curves, the optimum of every size, the verdicts, and what to do next."""
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
        at = f" at width {base.width}, depth {base.depth}" if group.axis == HORIZON else ""
        console.print(f"\n{'/'.join(group.label)}, {group.axis} ladder{at}", style="bold")
        console.print(curve_text(group.optima, min(72, console.width)))
        console.show(_optimum_table(group))
    console.print()
    for group in analysis.groups:
        style = {TRANSFERS: "bold green", DRIFTS: "bold red"}.get(group.verdict, "bold yellow")
        console.print(f"{'/'.join(group.label)} in {group.axis}: ", end="")
        console.print(group.verdict.upper(), style=style)
        for line in (*group.reasons, *_known_lines(group), *quality_lines(group)):
            console.say(line, indent=2)
    for line in (*map(comparison_line, comparisons(analysis)), *analysis.remarks):
        console.say(line)
    for told in tuning_text(analysis):
        console.say(told) if isinstance(told, str) else console.show(told)
    console.say(f"in brackets and after ±: {CONFIDENCE:.0%} intervals")
    for line in advice:
        console.say(line)
    for file in files:
        console.say(f"wrote {file}")


def advice_on(analysis: Analysis, sweep: SweepDir) -> Iterator[str]:
    """What to type next about a sweep."""
    undecided = any(g.verdict == INCONCLUSIVE and g.base is not g.optima[-1] for g in analysis.groups)
    if undecided and sweep.read_config()["sweep"].get("search", GRID) == GRID:
        yield (
            "inconclusive: the same mupsweep run with sweep.search=adaptive adds LRs and seeds until every optimum is "
            "known; mupsweep plan says what that costs"
        )
    if axes := {g.axis for g in analysis.groups if g.sloped}:  # those that give a recipe its LR
        shape = [f"{key}=N" for key in ("width", "depth") if axes & {key, "joint"}]
        yield (
            f"for the LR of {'a larger model' if shape else 'longer training'}: "
            f"mupsweep transfer {quote(str(sweep.path))} --to {' '.join(shape) or 'tokens=N'}"
        )


def show_recipe(content: dict[str, Any], files: Sequence[Path], limits: Sequence[str]) -> None:
    """What to train a target with, and what the last of the files cannot express of it."""
    console = console_of()
    target = content["target"]
    console.print(
        f"\n{content['optimizer']}/{content['parametrization']} at width {target['width']}, depth {target['depth']} "
        f"({si(content['parameters'])} parameters)",
        style="bold",
    )
    interval = Estimate(content["log2_lr"], content["log2_lr_low"], content["log2_lr_high"])
    console.print(f"base LR {content['base_lr']:.3g}, log2 {interval}")
    console.say(content["basis"])
    console.say(f"LR {content['horizon']['note']}")
    roles: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    keys = ("role", "optimizer", "init", "init_std", "multiplier", "lr", "weight_decay", "eps")
    for row in content["tensors"]:
        roles[tuple(row[k] for k in keys)].append(row["name"])
    table = table_of("role", "optimizer", "tensors", "init std", "multiplier", "LR", "weight decay", "eps")
    for (role, optimizer, init, std, *numbers), names in roles.items():
        start = f"{std:.4g}" if init == "normal" else init
        table.add_row(role, optimizer, str(len(names)), start, *(f"{n:.4g}" for n in numbers))
    console.show(table)
    console.say(f"attention scale {content['attention_scale']:.4g}, gradient clipping {content['clip']}")
    for path in files:
        console.say(f"wrote {path}")
    for limit in limits:
        console.say(f"not in {files[-1].name}: {limit}")


def show_validation(outcome: Validation) -> None:
    """What the transferred LR was worth at a target that has been trained since."""
    console = console_of()
    where = f"{'/'.join(outcome.label)} at width {outcome.size.width}, depth {outcome.size.depth}"
    console.print(f"\n{where}: validation of the transferred LR", style="bold")
    console.say(
        f"transferred log2 LR {outcome.log2_lr:g}, from the smaller sizes; best there {outcome.optimum}; "
        f"regret {nats(outcome.regret)}"
    )
    for reason in outcome.reasons:
        console.say(reason)


def _optimum_table(group: LadderResult) -> Table:
    size = ["tokens"] if group.axis == HORIZON else ["width", "depth"]
    rest = ("runs", "x", "optimal log2 LR", "loss", "the base's LR costs")  # 80 columns hold them
    table = table_of(*size, *rest)
    for o, regret in zip(group.optima, group.regrets, strict=True):
        table.add_row(
            *([si(o.curve.horizon or 0)] if group.axis == HORIZON else [str(o.curve.width), str(o.curve.depth)]),
            str(o.curve.n_runs),
            str(o.curve.n_diverged or ""),
            f"{Estimate(o.log2_lr, o.low, o.high):.2f}",
            _loss_words(o),
            "base" if o is group.base else "diverges" if diverges(group.base, o) else f"{regret:.4f}",
        )
    return table


def _loss_words(optimum: Optimum) -> str:
    """The loss at an optimum with the wider half of its interval: a table has no room for both."""
    loss = loss_of(optimum)
    if loss.value is None:
        return ""
    ends = [abs(end - loss.value) for end in (loss.low, loss.high) if end is not None]
    return f"{loss.value:.4f}" + (f" ±{max(ends):.4f}" if ends else "")


def _known_lines(group: LadderResult) -> Iterator[str]:
    """The LR that a ladder begins with, and what becomes of it along the ladder."""
    base, last = group.base, group.optima[-1]
    if base.log2_lr is not None:
        at = Estimate(base.log2_lr, base.low, base.high)
        yield f"best LR at {base.curve.place(group.axis)}: {2**base.log2_lr:.3g}, log2 {at:.2f}"
    told = [] if group.drift.value is None else [slope_text(group)]
    if base is not last and group.regret != UNKNOWN:
        told.append(f"at {last.curve.place(group.axis)} the base's LR costs {nats(group.regret)}")
    if told:
        yield "; ".join(told)


def quality_lines(group: LadderResult) -> Iterator[str]:
    """What is known of a ladder beyond its verdict."""
    found = quality(group)
    if found.held_out is not None:
        lost = "" if found.held_out.regret.value is None else f", which costs {nats(found.held_out.regret)}"
        shorter = (
            "shorter horizons predict the longest" if group.axis == HORIZON else "smaller sizes predict the largest"
        )
        yield f"the {shorter} one's optimum {found.held_out.error} octaves off{lost}"
    told = [
        (found.fit_error, f"E {found.fit_error:.2f} octaves"),
        (found.robustness, f"kappa {found.robustness}"),
        (found.asymptotic_loss, f"asymptotic loss {nats(found.asymptotic_loss)}"),
    ]
    if known := [words for estimate, words in told if estimate.value is not None]:
        yield f"Kalra-Barkeshli: {', '.join(known)}"


def _apart(lower: Estimate) -> str:
    """A difference of losses with its direction in words."""
    if lower.value is not None and lower.value < 0:
        return f"{nats(lower.negated)} higher"
    return f"{nats(lower)} lower"


def comparison_line(c: Comparison) -> str:
    """One line on what a variant is worth against another."""
    of, over = "/".join(c.of), "/".join(c.over)
    tokens = "" if c.horizon is None else f", {si(c.horizon)} tokens"
    line = f"{of} against {over} at width {c.width}, depth {c.depth}{tokens}, each at its optimum: {_apart(c.lower)}"
    if c.speed_up != UNKNOWN:
        line += f", compute-equivalent speed-up {factor(c.speed_up)}"
    if c.asymptotic_penalty.value is not None:
        line += f"; extrapolated to infinite size: {_apart(c.asymptotic_penalty.negated)}"
    return line
