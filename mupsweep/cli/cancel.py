"""mupsweep cancel"""

from __future__ import annotations

from mupsweep.cli.options import Sweep


def cancel(sweep: Sweep) -> None:
    """Cancel a sweep's Slurm jobs; what they trained so far is kept.

    Example: mupsweep cancel sweeps/demo
    """
    from mupsweep.launchers import slurm
    from mupsweep.store.sweep_dir import SweepDir

    slurm.cancel(SweepDir.open(sweep))
