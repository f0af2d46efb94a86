"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def complete_overrides(ctx: typer.Context, incomplete: str) -> list[str]:
    """What a KEY=VALUE word may become, for the shell."""
    from mupsweep.sweep.completion import complete

    return complete(ctx.params.get("overrides") or (), incomplete, ctx.params.get("config_dir"))


def complete_sweeps(incomplete: str) -> list[str]:
    """The sweeps of the default folder, or of the one that a path names."""
    folder = Path(incomplete).parent if "/" in incomplete else Path("sweeps")
    return sorted(name for path in folder.glob("*/plan.jsonl") if (name := str(path.parent)).startswith(incomplete))


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="group=choice (optimizer=adamw,muon compares several) and key=value ('sweep.seeds=[0,1]').",
        show_default=False,
        autocompletion=complete_overrides,
    ),
]
ConfigDir = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Your own yaml groups, beside the shipped ones.", show_default=False),
]
AllowImports = Annotated[
    bool, typer.Option("--allow-imports", help="Import the code outside mupsweep that the sweep's config names.")
]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with 3 when a verdict is 'drifts'.")]
Results = Annotated[
    Path | None,
    typer.Option("--results", metavar="DIR", help="Write tables, figures and recipes there, and nothing to the sweep."),
]
Sweep = Annotated[str, typer.Argument(metavar="SWEEP", help="A sweep's folder.", autocompletion=complete_sweeps)]

# of a table, which --from names
Columns = Annotated[
    list[str] | None,
    typer.Option(
        metavar="lr=NAME,...", help="With --from: what columns are called, as lr=optimizer.lr,val_loss=eval/loss."
    ),
]
Unit = Annotated[
    str | None, typer.Option(metavar="UNIT", help="With --from: of the losses, nats (default), bits or perplexity.")
]
Filters = Annotated[
    list[str] | None,
    typer.Option("--filter", metavar="NAME=VALUE", help="With --from: only these runs, as group=sweep-3."),
]


def refuse_without_table(command: str, options: dict[str, object]) -> None:
    """Raise a ConfigError for the first of a table's options that has a value: there is no table."""
    from mupsweep.errors import ConfigError

    for option, value in options.items():
        if value not in (None, []):
            raise ConfigError(f"{option} is of a table: name it too, mupsweep {command} --from FILE {option} ...")
