"""mupsweep plan"""

from __future__ import annotations

from mupsweep.cli.options import ConfigDir, Json, Overrides
from mupsweep.report.terminal.plan import show_plan


def plan(overrides: Overrides = None, config_dir: ConfigDir = None, json: Json = False) -> None:
    """Show what a sweep would train and what that costs; write nothing.

    Example: mupsweep plan optimizer=muon 'sweep.width_ratios=[1,2,4]'
    """
    from mupsweep.sweep.config import load

    show_plan(load(overrides or (), config_dir), as_json=json)
