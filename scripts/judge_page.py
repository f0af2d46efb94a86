"""The page of `make judge`: what a reader says of every public sweep beside what mupsweep says, with pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from mupsweep.analysis.analysis import analyse
from mupsweep.analysis.transfer import LadderResult, diverges
from mupsweep.report.html.charts import Charts
from mupsweep.report.html.svg import Plot
from mupsweep.store.tables import read_table

HEAD = """# How good the answers are

Recorded by `make judge`, which asks mupsweep about [public LR sweeps](README.md): one seed, octave or half-octave
grids, cliffs, holes. Nobody knows their true optima, so the answers are judged by what parts of a sweep say of each
other; [judge.py](../../scripts/judge.py) explains the figures. On the right, what counts as a pass.

```text
{figures}
```

Below is every ladder with curves at three sizes or more. The reader draws a parabola through the best LR of a size and
its neighbours, looks how far its lowest point moves and what the base's costs, and says *inconclusive* where he would
not bet. The points of the pictures are all that he has. The shaded valleys and, below them, the intervals of the optima
are mupsweep's ([how to read them](../../mupsweep/report/README.md#in-pictures)); sizes go from light to dark. Of ten
ladders every second is drawn.
"""
COLUMNS = "| ladder | reader | mupsweep | the optimum moves, octaves | the base's LR costs at the largest size, nats |"
PANELS, MAX_PANELS = 3, 9  # panels side by side, and in one picture
TITLE, GAP = 24, 16  # height of a panel's title, and distance between panels
PALETTE = re.compile(r"^:root \{.*?^\}", re.DOTALL | re.MULTILINE)  # of the report's style, and what it says of charts:
LOOKS = re.compile(r"^(?:svg [.t]|\[data-size\]|\.(?:transfers|v0)).*$", re.MULTILINE)
OWN_LOOKS = "text { font-family: sans-serif; }", "svg .verdict { fill: var(--verdict); }"
ON_HOVER = re.compile(r' data-tip="[^"]*"| role="img" aria-label="[^"]*"')


def write(page: Path, tables: Iterable[Path], figures: str, reader: Callable[[LadderResult], str]) -> None:
    """Write the page, and beside it a picture of every table.

    Args:
        figures: of the judge, in lines.
        reader: gives the verdict on a ladder that no estimator had a hand in.
    """
    parts = [HEAD.format(figures=figures)]
    for table in tables:
        charts = Charts(analyse(read_table(str(table)).runs))
        groups = [g for g in charts.groups if len(g.posterior.fitted) >= 3]
        picture = page.with_name(f"{table.stem}.svg")
        picture.write_text(picture_of(charts, groups or charts.groups), encoding="utf-8")
        parts.append(f"## {table.stem}\n\n![Loss against LR of {table.stem}]({picture.name})\n")
        if groups:
            rows = [_row(charts, group, reader(group)) for group in groups]
            parts.append("\n".join([COLUMNS, "|---|---|---|---|---|", *rows]) + "\n")
    page.write_text("\n".join(parts), encoding="utf-8")


def _row(charts: Charts, group: LadderResult, reader: str) -> str:
    cost = "diverges" if diverges(group.base, group.optima[-1]) else f"{group.regret:.4f}"
    name = f"{charts.variant(group)}, {group.axis}"
    return f"| {name} | {reader} | {group.verdict} | {group.total_drift:+.2f} | {cost} |"


def picture_of(charts: Charts, groups: Sequence[LadderResult], panels_at_most: int = MAX_PANELS) -> str:
    """The panels of loss against LR in one file that needs no other, as the report draws them."""
    style = resources.files("mupsweep.report.html").joinpath("report.css").read_text("utf-8")
    rules = [PALETTE.search(style)[0], *LOOKS.findall(style), *OWN_LOOKS]  # type: ignore[index]
    panels = []
    shown = groups[:: math.ceil(len(groups) / panels_at_most)]
    for i, group in enumerate(shown):
        family = [g for g in groups if g.label[:2] == group.label[:2] and g.axis == group.axis]
        chart = ON_HOVER.sub("", charts.curves(group, family))
        x, y = i % PANELS * (Plot.WIDTH + GAP), i // PANELS * (Plot.HEIGHT + TITLE + GAP)
        place = f'x="{x}" y="{y + TITLE}" width="{Plot.WIDTH}" height="{Plot.HEIGHT}"'
        title = f'<text class="name" x="{x + Plot.LEFT}" y="{y + 16}">{escape(charts.variant(group))}</text>'
        verdict = f'<text class="end verdict {group.verdict}" x="{x + Plot.RIGHT}" y="{y + 16}">{group.verdict}</text>'
        panels.append(title + verdict + chart.replace('class="chart"', place, 1))
    width = min(len(shown), PANELS) * (Plot.WIDTH + GAP)
    height = math.ceil(len(shown) / PANELS) * (Plot.HEIGHT + TITLE + GAP)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">\n'
        f"<style>{' '.join(rules)}</style>\n"
        f'<rect width="{width}" height="{height}" fill="#fff"/>\n' + "\n".join(panels) + "\n</svg>\n"
    )
