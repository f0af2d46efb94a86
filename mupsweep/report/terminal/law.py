"""The law of the best LR over size, tokens and batch, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mupsweep.analysis.estimate import CONFIDENCE, Estimate
from mupsweep.analysis.labels import NAMES
from mupsweep.analysis.law import AXES, Law
from mupsweep.analysis.setting_curve import BLOCK
from mupsweep.formatting import counted, si
from mupsweep.recipes.from_law import formula
from mupsweep.report.terminal.console import console_of
from mupsweep.report.terminal.verdicts import lr_lines


def show_laws(laws: Sequence[Law], notes: Sequence[str], files: Sequence[Path]) -> None:
    """Print every law, and where they were written."""
    console = console_of()
    for law in laws:
        console.print(f"\n{law.variant.name}", style="bold")
        for line in law_lines(law):
            console.say(line)
    for line in notes:
        console.say(line)
    console.say(f"in brackets: {CONFIDENCE:.0%} intervals")
    for file in files:
        console.say(f"wrote {file}")


def law_lines(law: Law) -> Iterator[str]:
    """What the law is, how well it holds, and what it does not know."""
    power, others = law.power, f", {counted(law.left_out, 'other')} without" if law.left_out else ""
    yield f"{formula(power)}, through {counted(len(law.curves), 'curve')} with the best LR between two others{others}"
    if not any(curve.is_counted for curve in law.curves):
        yield f"no run has a count of parameters: {BLOCK} width^2 depth stands for it"
    for axis in power.axes:
        values = law.values(axis)
        factor = power.exponent(axis).map(lambda exponent: 2**exponent)
        yield f"twice the {axis} ({si(values[0])} to {si(values[-1])} were trained): {factor:.2f} times the LR"
    if power.curvature is not None:
        change = power.curvature.map(lambda curvature: 2 * curvature)
        batch = si(2 ** power.center[AXES.index("batch_size")])
        yield f"batch_size has this exponent around {batch}, and {change} more with every doubling"
    yield f"single curves are {Estimate.of(power.scatter):.2f} octaves off the law"
    if law.best_batch is not None:
        pairs = f"through {counted(law.best_batches, 'pair')}"
        if "tokens" in law.best_batch.missing:
            pairs += f", whose tokens {law.best_batch.missing['tokens']}"
        yield f"at the best batch size of every pair of parameters and tokens: {formula(law.best_batch)}, {pairs}"
    if law.held_out is not None:
        held = law.held_out
        at_top = f"{counted(held.curves, 'curve')} with {held.axis} {si(held.value)}"
        yield (
            f"held out: the other curves forecast the optima of the {at_top} {held.octaves:.2f} octaves off (root mean "
            f"square), {held.inside} of them in the interval"
        )
    for axis, why in power.missing.items():
        values = sorted(set(law.values(axis)))
        at = f" ({si(values[0])})" if values and why == "never varied" else ""
        yield f"{axis}: {why}{at}, so it has no exponent of its own"


def show_law_lr(content: Mapping[str, Any]) -> None:
    """Print the LR of a target whose base is not known, from a law."""
    console = console_of()
    target = ", ".join(f"{key} {si(value)}" for key, value in content["target"].items() if value is not None)
    console.print(f"\n{'/'.join(content[key] for key in NAMES)} at {target}", style="bold")
    for line in lr_lines(content):
        console.say(line)
