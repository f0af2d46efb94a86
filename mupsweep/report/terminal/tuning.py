"""What is printed of hyperparameters that were varied beside the LR."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from mupsweep.analysis.estimate import UNKNOWN, Estimate
from mupsweep.analysis.transfer import Analysis
from mupsweep.analysis.tuning import GapAfterTuning, SizeTuning, Tuning, gaps_after_tuning, remarks, said, tunings
from mupsweep.report.terminal.console import table_of

Gap = tuple[tuple[str, ...], list[tuple[str, ...]]]  # head and rows of a table


def tuning_text(analysis: Analysis) -> Iterator[str | Table]:
    """A line per variant and hyperparameter, the gaps to SP at every size, and what closes them."""
    lines, gaps = tuning_summary(analysis)
    yield from lines
    for head, rows in gaps:
        table = table_of(*head)
        for row in rows:
            table.add_row(*row)
        yield table


def tuning_summary(analysis: Analysis) -> tuple[list[str], list[Gap]]:
    """What stands in every view: a line per hyperparameter and the remarks, and the tables of the gaps to SP."""
    tuned = tunings(analysis)
    closed = gaps_after_tuning(analysis, tuned)
    kinds = dict.fromkeys((c.before[-1].of, c.before[-1].axis) for c in closed)
    gaps = [gap([c for c in closed if (c.before[-1].of, c.before[-1].axis) == kind]) for kind in kinds]
    return [*map(tuning_line, tuned), *remarks(closed)], gaps


def tuning_line(one: Tuning) -> str:
    """The best value at the base and at the largest size, what it gains there, and whether it transfers."""
    ends = one.sizes if len(one.sizes) == 1 else (one.sizes[0], one.sizes[-1])
    best = ", ".join(f"{said(at.best)}{_around(at)} at {at.width}x{at.depth}" for at in ends)
    why = f" ({one.reasons[0]})" if one.reasons else ""
    last, default = one.sizes[-1], said(one.default)
    than = f"{nats(last.gain)} lower there than the default, {default}" if last.best != one.default else "the default"
    return f"{'/'.join(one.names[1:])}, {one.hyperparameter} in {one.axis}: best {best}, {than}; {one.verdict}{why}"


def _around(at: SizeTuning) -> str:
    """What is known beyond the best of the values that were trained."""
    if at.edge is not None:
        return f" (the {at.edge} tried)"
    return "" if at.minimum.value is None else f" (minimum {at.minimum:.3g})"


def gap(closed: list[GapAfterTuning]) -> Gap:
    """A parametrization against SP at every size, each at its own optimum."""
    first = closed[0].before[0]
    title = f"{first.of[2]} against {first.over[2]}, {first.of[1]}, {first.axis}"
    head = (title, "width", "depth", "lower by", "compute-equivalent speed-up")
    sides = [("both at the defaults", max((c.before for c in closed), key=len))]
    sides += [(f"each at its best {c.hyperparameter}", c.after) for c in closed]
    rows = [
        (name, str(c.width), str(c.depth), nats(c.lower), "" if c.speed_up == UNKNOWN else factor(c.speed_up))
        for name, sizes in sides
        for c in sizes
    ]
    return head, rows


def factor(estimate: Estimate) -> str:
    """A speed-up: 0.004 is not 0.00."""
    ends = [end for end in (estimate.value, estimate.low, estimate.high) if end is not None]
    return f"{estimate:{'.2f' if min(ends, default=1.0) >= 0.05 else '.2g'}}"


def nats(estimate: Estimate) -> str:
    """A difference of losses."""
    return "unknown" if estimate == UNKNOWN else f"{estimate:.4f} nats"
