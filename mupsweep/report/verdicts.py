"""What `run`, `transfer` and `report` print: curves, optima, verdicts, recipes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mupsweep.cost import si
from mupsweep.optimum import CONFIDENCE
from mupsweep.quality import Comparison, comparisons, quality
from mupsweep.records import DIVERGED, DONE
from mupsweep.report.curves_text import curve_text
from mupsweep.report.terminal import console_of, table_of
from mupsweep.report.tuning_text import factor, nats, tuning_text
from mupsweep.transfer import DRIFTS, HORIZON, TRANSFERS, Analysis, Estimate, Group
from mupsweep.validation import Validation


def show_analysis(analysis: Analysis, sweeps: Sequence[tuple[Path, Counter[str]]], files: Sequence[Path]) -> None:
    """Curves, the optimum of every size, and the verdicts."""
    console = console_of()
    for path, counts in sweeps:
        unfinished = sum(n for status, n in counts.items() if status not in (DONE, DIVERGED))
        if unfinished:
            console.print(
                f"{path}: {unfinished} of {counts.total()} runs are not finished; what follows rests on the rest"
            )
    if not analysis.groups:
        console.print("no finished runs yet: go on with mupsweep run")
        return
    for group in analysis.groups:
        console.print(f"\n{'/'.join(group.label)}, {group.axis} ladder", style="bold")
        console.print(curve_text([o.curve for o in group.optima]))
        console.print(_optimum_table(group))
    console.print()
    for group in analysis.groups:
        style = {TRANSFERS: "bold green", DRIFTS: "bold red"}.get(group.verdict, "bold yellow")
        console.print(f"{'/'.join(group.label)} in {group.axis}: ", end="")
        console.print(group.verdict.upper(), style=style)
        console.print(
            f"  drift {group.drift} octaves per doubling, {group.total_drift} in all; regret {nats(group.regret)}"
        )
        for line in (*group.reasons, *quality_lines(group)):
            console.print(f"  {line}", markup=False)
    for compared in comparisons(analysis):
        console.print(comparison_line(compared), markup=False)
    for remark in analysis.remarks:
        console.print(remark, markup=False)
    for told in tuning_text(analysis):
        console.print(told, markup=False)
    console.print(f"intervals: {CONFIDENCE:.0%}")
    for file in files:
        console.print(f"wrote {file}", markup=False)


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
    console.print(content["basis"])
    console.print(f"LR {content['horizon']['note']}", markup=False)
    roles: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    keys = ("role", "optimizer", "init", "init_std", "multiplier", "lr", "weight_decay", "eps")
    for row in content["tensors"]:
        roles[tuple(row[k] for k in keys)].append(row["name"])
    table = table_of("role", "optimizer", "tensors", "init std", "multiplier", "LR", "weight decay", "eps")
    for (role, optimizer, init, std, *numbers), names in roles.items():
        start = f"{std:.4g}" if init == "normal" else init
        table.add_row(role, optimizer, str(len(names)), start, *(f"{n:.4g}" for n in numbers))
    console.print(table)
    console.print(f"attention scale {content['attention_scale']:.4g}, gradient clipping {content['clip']}")
    for path in files:
        console.print(f"wrote {path}", markup=False)
    for limit in limits:
        console.print(f"not in {files[-1].name}: {limit}", markup=False)


def show_validation(outcome: Validation) -> None:
    """What the transferred LR was worth at a target that has been trained since."""
    console = console_of()
    where = f"{'/'.join(outcome.label)} at width {outcome.size.width}, depth {outcome.size.depth}"
    console.print(f"\n{where}: validation of the transferred LR", style="bold")
    console.print(
        f"transferred log2 LR {outcome.log2_lr:g}, from the smaller sizes; best there {outcome.optimum}; "
        f"regret {nats(outcome.regret)}"
    )
    for reason in outcome.reasons:
        console.print(reason, markup=False)


def _optimum_table(group: Group) -> Table:
    tokens = ["tokens"] if group.axis == HORIZON else []
    rest = ("runs", "x", "optimal log2 LR", "loss", "the base's LR costs")  # 80 columns hold them
    table = table_of("width", "depth", *tokens, *rest)
    for o, regret in zip(group.optima, group.regrets, strict=True):
        where = str(Estimate(o.log2_lr, o.low, o.high)).replace("+", "")
        loss = "" if o.loss is None else f"{o.loss:.4f}"
        table.add_row(
            str(o.curve.width),
            str(o.curve.depth),
            *(si(o.curve.horizon or 0) for _ in tokens),
            str(o.curve.n_runs),
            str(o.curve.n_diverged or ""),
            where,
            loss,
            nats(regret).removesuffix(" nats"),
        )
    return table


def quality_lines(group: Group) -> Iterator[str]:
    """What is known of a ladder beyond its verdict."""
    found = quality(group)
    if found.held_out is not None:
        lost = "" if found.held_out.regret.value is None else f", which costs {nats(found.held_out.regret)}"
        shorter = (
            "shorter horizons predict the longest" if group.axis == HORIZON else "smaller sizes predict the largest"
        )
        yield f"the {shorter} one's optimum {found.held_out.error} octaves off{lost}"
    told = {"E": found.fit_error, "kappa": found.robustness, "asymptotic loss": found.asymptotic_loss}
    known = [f"{name} {estimate}" for name, estimate in told.items() if estimate.value is not None]
    if known:
        yield f"Kalra-Barkeshli: {', '.join(known)}"


def comparison_line(c: Comparison) -> str:
    """One line on what a variant is worth against another."""
    of, over = (
        "/".join(name for i, name in enumerate(label) if i == 0 or c.of[i] != c.over[i]) for label in (c.of, c.over)
    )
    line = f"{of} against {over} at width {c.width}, depth {c.depth}, each at its optimum: {nats(c.lower)} lower"
    if (speed_up := factor(c.speed_up)) is not None:
        line += f", compute-equivalent speed-up {speed_up}"
    if c.asymptotic_penalty.value is not None:
        line += f", R(inf) {nats(c.asymptotic_penalty)}"
    return line
