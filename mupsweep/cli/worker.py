"""mupsweep worker"""

from __future__ import annotations

from typing import Annotated

import typer

from mupsweep.cli.options import AllowImports, Sweep
from mupsweep.training.signals import MOST_THREADS


def worker(
    sweep: Sweep,
    run_ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN", help="Only these runs, or those of a size: w512-d4.", show_default=False),
    ] = None,
    device: Annotated[
        list[str], typer.Option(help="A torch device, auto, or several per run: cuda:0,cuda:1. One per worker.")
    ] = ["auto"],  # noqa: B006, typer copies it
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1, max=MOST_THREADS)] = 1,
    shard: Annotated[bool, typer.Option("--shard", help="Divide weights and optimizer state among them.")] = False,
    workers: Annotated[int, typer.Option(help="Workers that share a GPU's memory.", min=1)] = 1,
    allow_imports: AllowImports = False,
    restarts: Annotated[int, typer.Option(help="Replacements of a worker that a signal kills.", min=0)] = 0,
    nodes: Annotated[int, typer.Option(help="Slurm nodes per run, by srun.", min=1)] = 1,
    requeue: Annotated[int, typer.Option(help="Requeues of this Slurm task near its time limit.", min=0)] = 0,
) -> None:
    """Train what is left of a planned sweep; what launchers call.

    Runs follow one another. Any number of workers share a sweep: each takes the longest run that nobody has claimed.

    Example: mupsweep worker sweeps/demo --device cuda:1
    """
    from mupsweep.store import workers as records
    from mupsweep.store.sweep_dir import SweepDir

    folder, names = SweepDir.open(sweep, allow_imports), run_ids or ()
    if not folder.read_plan():
        print(f"no run is planned in {folder.path} yet: go on with the mupsweep run that made the sweep")
    if len(device) > 1 or restarts or nodes > 1 or requeue:
        from mupsweep.launchers.task_pool import TaskPool

        pool = TaskPool(folder, device, names, threads, shard, restarts=restarts, nodes=nodes, requeue=requeue)
        raise typer.Exit(pool.supervise())
    with records.registered(folder):
        from mupsweep.training.slot import Slot
        from mupsweep.training.worker import execute

        raise typer.Exit(0 if execute(folder, Slot(names, device[0], threads, shard, workers)) else 130)
