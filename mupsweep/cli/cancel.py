"""mupsweep cancel"""

from __future__ import annotations

from typing import Annotated

import typer

from mupsweep.cli.options import Sweep


def cancel(
    sweep: Sweep,
    validation: Annotated[
        bool, typer.Option("--validation", help="Forget the runs that transfer --validate trained or planned.")
    ] = False,
) -> None:
    """Stop a sweep's Slurm jobs and its workers on this machine; what they trained so far is kept.

    Example: mupsweep cancel sweeps/demo
    """
    from mupsweep.store.sweep_dir import SweepDir

    folder = SweepDir.open(sweep)
    if validation:
        from mupsweep.formatting import counted
        from mupsweep.sweep.plan import forget_validations

        print(f"{folder.path}: {counted(len(forget_validations(folder)), 'run')} of validations forgotten")
        return
    from mupsweep.launchers.cancel import cancel_training

    cancel_training(folder)
