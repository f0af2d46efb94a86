"""What Slurm's queue holds: one bounded call of squeue, which needs no accounting."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mupsweep.errors import RecordError

SECONDS = 30.0  # a controller that is busy answers late; nobody waits longer than this
OF_THE_SITE = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS")  # how Slurm is reached; not of a job
UNKNOWN = "Invalid job id"  # what squeue says where no job of the list is known any more


@dataclass(frozen=True)
class Job:
    """A job or a task of a job array that is queued or runs, as squeue shows it.

    Attributes:
        job_id: 123, or 123_4 for task 4 of the array 123.
        state: PENDING, RUNNING, COMPLETING, ...
        reason: why a pending one waits: Resources, Priority, Dependency, ...; None where it does not.
    """

    job_id: str
    state: str
    reason: str

    def __str__(self) -> str:
        return f"{self.job_id} {self.state}" + ("" if self.reason == "None" else f" ({self.reason})")


@dataclass(frozen=True)
class Queue:
    """The jobs of a sweep that are queued or run.

    Attributes:
        runs: the job of every run that one will train or trains.
        analysis: the jobs that analyse the sweep afterwards.
        arrays: the job arrays with tasks left.
    """

    runs: Mapping[str, Job] = field(default_factory=dict)
    analysis: Sequence[Job] = ()
    arrays: Sequence[str] = ()

    def lines(self) -> list[str]:
        """What a person wants to know, counted by tasks."""
        counts = Counter((job.state, job.reason) for job in {job.job_id: job for job in self.runs.values()}.values())
        told = [
            f"{count} {state}" + ("" if reason == "None" else f" ({reason})")
            for (state, reason), count in sorted(counts.items())
        ]
        lines = [f"Slurm tasks: {', '.join(told)}"] if told else []
        return lines + [f"Slurm analysis job: {job}" for job in self.analysis]


def of_sweep(rows: Iterable[Mapping[str, Any]]) -> Queue:
    """What is left of the jobs that a sweep recorded; asks nobody where it recorded none.

    Args:
        rows: what SweepDir.read_jobs gives: the `job` and its `tasks`, a list of run ids each; the analysis has none.

    Raises:
        RecordError: Slurm cannot be asked.
    """
    rows = list(rows)
    jobs = ask([row["job"] for row in rows]) if rows else {}
    runs, analysis, arrays = {}, [], []
    for row in rows:
        tasks = {jobs[f"{row['job']}_{i}"]: ids for i, ids in enumerate(row["tasks"]) if f"{row['job']}_{i}" in jobs}
        runs |= {run_id: job for job, ids in tasks.items() for run_id in ids}
        arrays += [row["job"]] if tasks else []
        analysis += [jobs[row["job"]]] if row["job"] in jobs else []
    return Queue(runs, analysis, arrays)


def ask(job_ids: Sequence[str]) -> dict[str, Job]:
    """The named jobs, and the tasks of the named arrays, that are queued or run.

    Raises:
        RecordError: Slurm cannot be asked.
    """
    command = ["squeue", "--noheader", "--array", "--format=%i|%T|%r", f"--jobs={','.join(job_ids)}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except OSError as error:
        raise RecordError(f"cannot ask Slurm: no squeue here ({error.strerror})") from error
    except subprocess.TimeoutExpired as error:
        raise RecordError(f"cannot ask Slurm: squeue did not answer within {SECONDS:.0f}s") from error
    if done.returncode and UNKNOWN not in done.stderr:
        raise RecordError(f"cannot ask Slurm: {' '.join(done.stderr.split()) or f'squeue ended {done.returncode}'}")
    jobs = [Job(*line.split("|")) for line in done.stdout.splitlines() if line.count("|") == 2]
    return {job.job_id: job for job in jobs}


def own_job() -> dict[str, str | None]:
    """The job that this process belongs to, as a claim names its owner; None for every part outside Slurm.

    The last task of an array has the array's own number as SLURM_JOB_ID, so there that number would mean every task.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return {
        "slurm_cluster": os.environ.get("SLURM_CLUSTER_NAME"),
        "slurm_job": f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID"),
        "slurm_restarts": os.environ.get("SLURM_RESTART_COUNT"),
    }


def outside() -> dict[str, str]:
    """The environment without what Slurm says in it of the job that this process belongs to, if any: sbatch would hand
    it on to a job that it submits, whose srun refuses what contradicts its own (SLURM_MEM_PER_CPU, ..._PER_NODE)."""
    inside = "SLURM_JOB_ID" in os.environ
    return {k: v for k, v in os.environ.items() if not (inside and k.startswith("SLURM_") and k not in OF_THE_SITE)}


def is_over(job_id: str) -> bool:
    """Whether Slurm says that a job neither runs nor waits; False where it cannot be asked."""
    try:
        return not ask([job_id])
    except RecordError:
        return False
