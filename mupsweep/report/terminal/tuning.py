"""Hyperparameters that were varied beside the LR: lines and tables for the terminal and the HTML report."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from mupsweep.analysis.analysis import Analysis
from mupsweep.analysis.estimate import UNKNOWN, Estimate
from mupsweep.analysis.tuning import GapAfterTuning, SizeTuning, Tuning, value_text
from mupsweep.report.terminal.console import table_of

GapTable = tuple[tuple[str, ...], list[tuple[str, ...]]]  # header and rows


def tuning_text(analysis: Analysis) -> Iterator[str | Table]:
    """A line per variant and hyperparameter, then remarks, then tables of the gaps to SP at every size."""
    lines, gaps = tuning_summary(analysis)
    yield from lines
    for head, rows in gaps:
        table = table_of(*head)
        for row in rows:
            table.add_row(*row)
        yield table


def tuning_summary(analysis: Analysis) -> tuple[list[str], list[GapTable]]:
    """The content of every view: a line per hyperparameter with the remarks, and the tables of the gaps to SP."""
    closed = analysis.gaps_after_tuning
    kinds = dict.fromkeys((c.before[-1].of, c.before[-1].axis) for c in closed)
    gaps = [gap_table([c for c in closed if (c.before[-1].of, c.before[-1].axis) == kind]) for kind in kinds]
    lines = [line for tuning in analysis.tunings for line in (tuning_line(tuning), ridge_line(tuning)) if line]
    return [*lines, *analysis.tuning_remarks], gaps


def tuning_line(tuning: Tuning) -> str:
    """The best value at the base and at the largest size, its gain over the default, and whether it transfers."""
    first, last = tuning.sizes[0], tuning.sizes[-1]
    ends = (first,) if first is last else (first, last)
    best = ", ".join(f"{value_text(size.best)}{_minimum_text(size)} at {size.width}x{size.depth}" for size in ends)
    if last.best == tuning.default:
        gain = "the default"
    else:
        gain = f"{nats(last.gain)} lower there than the default, {value_text(tuning.default)}"
    reason = f" ({tuning.reasons[0]})" if tuning.reasons else ""
    name = f"{'/'.join(tuning.names[1:])}, {tuning.hyperparameter} in {tuning.axis}"
    return f"{name}: best {best}, {gain}; {tuning.verdict}{reason}"


def ridge_line(tuning: Tuning) -> str:
    """The pair of LR and value that is best at the base and at the largest size, and how the one moves with the other.

    Empty where no size has a best value between those trained.
    """
    known = [(size, size.ridge) for size in tuning.sizes if size.ridge is not None and size.ridge.log2_lr != UNKNOWN]
    if not known:
        return ""
    pairs = [
        f"2^{ridge.log2_lr:.2f} with {size.minimum:.3g} at {size.width}x{size.depth}, "
        f"{ridge.slope:+.2f} octaves of LR per octave of it"
        for size, ridge in (known if len(known) == 1 else (known[0], known[-1]))
    ]
    drifts = ""
    if tuning.lr_drift != UNKNOWN:
        drifts = (
            f"; from the first to the last the LR moves by {tuning.lr_drift}, the value by {tuning.total_drift} octaves"
        )
    return f"{'/'.join(tuning.names[1:])}, LR and {tuning.hyperparameter} together: {'; '.join(pairs)}{drifts}"


def _minimum_text(size: SizeTuning) -> str:
    """Where the minimum lies relative to the trained values: at an edge of them, or fitted between them."""
    if size.edge is not None:
        return f" (the {size.edge} tried)"
    return "" if size.minimum.value is None else f" (minimum {size.minimum:.3g})"


def gap_table(closed: list[GapAfterTuning]) -> GapTable:
    """A table of a parametrization against SP at every size, each at its own optimum."""
    first = closed[0].before[0]
    title = f"{first.of[2]} against {first.over[2]}, {first.of[1]}, {first.axis}"
    head = (title, "width", "depth", "lower by", "compute-equivalent speed-up")
    sides = [("both at the defaults", max((c.before for c in closed), key=len))]
    sides += [(f"each at its best {c.hyperparameter}", c.after) for c in closed]
    rows = []
    for name, sizes in sides:
        for c in sizes:
            speed_up = "" if c.speed_up == UNKNOWN else factor(c.speed_up)
            rows.append((name, str(c.width), str(c.depth), nats(c.lower), speed_up))
    return head, rows


def factor(estimate: Estimate) -> str:
    """A speed-up with enough digits that 0.004 does not read as 0.00."""
    ends = [end for end in (estimate.value, estimate.low, estimate.high) if end is not None]
    return f"{estimate:{'.2f' if min(ends, default=1.0) >= 0.05 else '.2g'}}"


def nats(estimate: Estimate) -> str:
    """A difference of losses, with its unit."""
    return "unknown" if estimate == UNKNOWN else f"{estimate:.4f} nats"
