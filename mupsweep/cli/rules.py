"""mupsweep rules"""

from __future__ import annotations

from typing import Annotated

import typer

from mupsweep.cli.options import ConfigDir, Json, Overrides
from mupsweep.report.terminal.rules import show_rules


def rules(
    overrides: Overrides = None,
    config_dir: ConfigDir = None,
    json: Json = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="One line per tensor instead of per role.")] = False,
    papers: Annotated[bool, typer.Option("--papers", help="The papers' tables, compared with the solver.")] = False,
) -> None:
    """Print the scaling rules, in symbols and numbers, and audit them.

    Example: mupsweep rules optimizer=muon_kimi parametrization=sp,spectral 'sweep.width_ratios=[1,4]'
    """
    if papers:
        from mupsweep.report.terminal.published_tables import show_papers  # imports torch

        show_papers(as_json=json)
    else:
        from mupsweep.sweep.config import load

        show_rules(load(overrides or (), config_dir), as_json=json, per_tensor=tensors)
