"""mupsweep plan"""

from __future__ import annotations

from typing import Annotated

import typer

from mupsweep.cli.options import Columns, ConfigDir, Filters, Json, Overrides, Unit, refuse_without_table
from mupsweep.report.terminal.plan import show_plan


def plan(
    overrides: Overrides = None,
    config_dir: ConfigDir = None,
    table: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Runs trained elsewhere, or wandb:ENTITY/PROJECT: say which to train next. "
            "A heading alone is a start.",
        ),
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="With --from: the sizes that can be trained, columns width, depth and perhaps cost."
        ),
    ] = None,
    log2_lrs: Annotated[
        str | None,
        typer.Option("--log2-lrs", metavar="LOW:HIGH", help="With --from: the range of log2 LRs, as -14:-5."),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option("--next", metavar="N", help="With --from: how many LRs, chosen together; 1 by default."),
    ] = None,
    to: Annotated[
        list[str] | None,
        typer.Option(metavar="width=N", help="With --from: the target whose LR is wanted, --to width=8192 depth=32."),
    ] = None,
    columns: Columns = None,
    unit: Unit = None,
    filters: Filters = None,
    json: Json = False,
) -> None:
    """Show what a sweep would train and what that costs, or which run of a table to train next; write nothing.

    Example: mupsweep plan optimizer=muon 'sweep.width_ratios=[1,2,4]'
    """
    from mupsweep.errors import ConfigError

    asked = {"--sizes": sizes, "--log2-lrs": log2_lrs, "--next": count, "--to": to, "--columns": columns}
    asked |= {"--unit": unit, "--filter": filters}
    if table is None:
        refuse_without_table("plan", asked)
        from mupsweep.sweep.config import load

        show_plan(load(overrides or (), config_dir), as_json=json)
        return
    from mupsweep.report.generate import read_target
    from mupsweep.report.terminal.next_runs import show_next_runs
    from mupsweep.store.tables import TableOptions

    words = list(overrides or ())
    of_analysis = [word for word in words if word.startswith("analysis.")]
    of_target = [word for word in words if word not in of_analysis]
    if of_target and not to:
        raise ConfigError(
            f"{of_target[0]}: of a sweep, not of a table; --from takes --to width=N and analysis.KEY=VALUE"
        )
    if log2_lrs is None:
        raise ConfigError("--from needs the range of LRs that may be trained: --log2-lrs=-14:-5")
    if count is not None and count < 1:
        raise ConfigError(f"--next {count}: expected how many LRs to train next, 1 or more")
    options = TableOptions.parse(columns or (), unit or "nats", filters or (), None, is_start=True)
    target = read_target([*(to or ()), *of_target])
    show_next_runs(table, options, sizes, log2_lrs, count or 1, target, of_analysis, json)
