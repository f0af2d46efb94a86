"""Cancellation: the training of a sweep ends wherever it goes on, in Slurm and on this machine."""

from __future__ import annotations

import sys

from mupsweep.formatting import counted
from mupsweep.launchers import slurm_jobs
from mupsweep.store import workers
from mupsweep.store.run_dir import RUNNING
from mupsweep.store.sweep_dir import SweepDir


def cancel_training(sweep: SweepDir) -> None:
    """Cancel the Slurm jobs of a sweep and stop its workers on this machine, whether their launcher lives or not."""
    jobs = sweep.read_jobs()
    if jobs:
        slurm_jobs.cancel(sweep)
    job_ids = {str(job["job"]) for job in jobs}
    running = [row["run_id"] for row in sweep.read_plan() if sweep.state(row["run_id"])["status"] == RUNNING]
    outside = [w for w in workers.living(sweep, running) if (w.slurm_job or "").partition("_")[0] not in job_ids]
    stopped, others = [], []
    for worker in outside:
        (stopped if worker.stop() else others).append(worker)
    if stopped:
        _print(f"asked {counted(len(stopped), 'worker')} to stop: {', '.join(map(str, stopped))}")
        _print("each finishes its step, checkpoints and ends; go on with the command that made the sweep")
    if others:
        _print(f"trained on by {', '.join(map(str, others))}: stop it there, as its user")
    if not jobs and not outside:
        _print(f"nobody trains {sweep.path} now, and no Slurm job of it is queued")


def _print(line: str) -> None:
    """Print a line for the user to stderr."""
    print(line, file=sys.stderr)
