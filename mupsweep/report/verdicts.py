"""What `run`, `transfer` and `report` print: curves, optima, verdicts, recipes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mupsweep.cost import si
from mupsweep.optimum import CONFIDENCE
from mupsweep.records import DIVERGED, DONE
from mupsweep.report.curves_text import curve_text
from mupsweep.report.terminal import console_of, table_of
from mupsweep.transfer import DRIFTS, TRANSFERS, Analysis, Estimate, Group


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
            f"  drift {group.drift} octaves per doubling, {group.total_drift} in all; regret {_nats(group.regret)}"
        )
        for reason in group.reasons:
            console.print(f"  {reason}", markup=False)
    for remark in analysis.remarks:
        console.print(remark, markup=False)
    console.print(f"intervals: {CONFIDENCE:.0%}")
    for file in files:
        console.print(f"wrote {file}", markup=False)


def show_recipe(content: dict[str, Any], path: Path) -> None:
    """What to train a target with."""
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
    console.print(f"wrote {path}", markup=False)


def _optimum_table(group: Group) -> Table:
    table = table_of("width", "depth", "runs", "diverged", "optimal log2 LR", "loss there", "regret of the base's LR")
    for o, regret in zip(group.optima, group.regrets, strict=True):
        where = str(Estimate(o.log2_lr, o.low, o.high)).replace("+", "")
        loss = "" if o.loss is None else f"{o.loss:.4f}"
        table.add_row(
            str(o.curve.width),
            str(o.curve.depth),
            str(o.curve.n_runs),
            str(o.curve.n_diverged or ""),
            where,
            loss,
            _nats(regret),
        )
    return table


def _nats(estimate: Estimate) -> str:
    if estimate.value is None:
        return "unknown"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.4f} nats"
    return f"{estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}] nats"
