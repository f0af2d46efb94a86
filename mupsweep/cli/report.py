"""mupsweep report"""

from __future__ import annotations

from mupsweep.cli.options import Sweep


def report(sweep: Sweep) -> None:
    """Analyse a sweep again and write its tables, figures and report.html.

    Example: mupsweep report sweeps/demo
    """
    from mupsweep.records import SweepDir
    from mupsweep.report.conclude import conclude

    conclude([SweepDir.open(sweep)])
