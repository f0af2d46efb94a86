"""mupsweep check: coordinates, law"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mupsweep.cli.options import ConfigDir, Json, Overrides


class CoordinatesUnlessNamed(TyperGroup):
    """`mupsweep check KEY=VALUE` is `mupsweep check coordinates KEY=VALUE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, "-h", "--help"):
            args = ["coordinates", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="check",
    help="Check a parametrization, or measure an optimizer's update law.",
    cls=CoordinatesUnlessNamed,
)


@app.command()
def coordinates(
    overrides: Overrides = None,
    config_dir: ConfigDir = None,
    json: Json = False,
    figure: Annotated[
        str | None, typer.Option(metavar="PATH", help="Draw what was measured into this .png or .svg.")
    ] = None,
    into: Annotated[
        str | None, typer.Option(metavar="SWEEP", help="Keep the outcome with this sweep, for its report.html.")
    ] = None,
) -> None:
    """Fit what grows with width and depth, and compare with what is promised.

    What is measured are features, logits, attention and router logits, weights and updates. Without an experiment it
    takes small models (experiment=check), SP beside them, and finds an LR by itself. Exits with 1 where a promised
    exponent is missed by more than 0.1 beyond its interval, or where an interval is too wide to tell.

    Example: mupsweep check coordinates optimizer=muon parametrization=mup,spectral
    """
    from mupsweep.check import coordinate_check
    from mupsweep.report.terminal import checks
    from mupsweep.store.sweep_dir import SweepDir

    sweep = None if into is None else SweepDir.open(into)
    measured = coordinate_check.check(coordinate_check.load(overrides or (), config_dir))
    raise typer.Exit(0 if checks.show_coordinates(measured, json, figure, sweep) else 1)


@app.command()
def law(overrides: Overrides = None, config_dir: ConfigDir = None, json: Json = False) -> None:
    """Measure how large an optimizer's updates are, and print its LR rule.

    On fresh and on repeated gradients, after 3 and after 50 steps. Also of your own: optimizer=foreign
    optimizer.path=my_module.MyOptimizer allow_imports=true. Exits with 1 where an optimizer of mupsweep does not do
    what it declares, or where its law changes, so that no rule follows.

    Example: mupsweep check law optimizer=adamw,muon
    """
    from mupsweep.report.terminal import checks
    from mupsweep.sweep.config import load

    raise typer.Exit(0 if checks.show_laws(load(overrides or (), config_dir), json) else 1)
