"""Slurm's queue, read by one bounded call of squeue, which needs no accounting."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mupsweep.errors import RecordError

SQUEUE_TIMEOUT = 30.0  # seconds to wait for a busy controller
CLIENT_VARIABLES = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS")  # how Slurm is reached
UNKNOWN_JOB = "Invalid job id"  # in squeue's error where it knows no job of the list any more


@dataclass(frozen=True)
class Job:
    """A job or a task of a job array that is queued or runs, as squeue shows it.

    Attributes:
        job_id: 123, or 123_4 for task 4 of the array 123.
        state: PENDING, RUNNING, COMPLETING, ...
        reason: why a pending job waits: Resources, Priority, Dependency, ...; "None" where it does not wait.
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
        runs: by run id, the job that trains or will train the run.
        analysis: the jobs that analyse the sweep afterwards.
        arrays: ids of the job arrays that have queued or running tasks.
    """

    runs: Mapping[str, Job] = field(default_factory=dict)
    analysis: Sequence[Job] = ()
    arrays: Sequence[str] = ()

    def lines(self) -> list[str]:
        """Return the queue in lines for a person: tasks counted by state, and every analysis job."""
        tasks = {job.job_id: job for job in self.runs.values()}
        counts = Counter((job.state, job.reason) for job in tasks.values())
        summary = [
            f"{count} {state}" + ("" if reason == "None" else f" ({reason})")
            for (state, reason), count in sorted(counts.items())
        ]
        lines = [f"Slurm tasks: {', '.join(summary)}"] if summary else []
        return lines + [f"Slurm analysis job: {job}" for job in self.analysis]


def of_sweep(rows: Iterable[Mapping[str, Any]]) -> Queue:
    """Return the jobs of a sweep that are queued or running; without recorded jobs Slurm is not asked.

    Args:
        rows: the recorded jobs, as SweepDir.read_jobs returns them: `job`, and in `tasks` a list of run ids per task;
            the analysis has no tasks.

    Raises:
        RecordError: Slurm cannot be asked.
    """
    rows = list(rows)
    jobs = ask([row["job"] for row in rows]) if rows else {}
    runs: dict[str, Job] = {}
    analysis: list[Job] = []
    arrays: list[str] = []
    for row in rows:
        job_id, has_tasks = row["job"], False
        for index, run_ids in enumerate(row["tasks"]):
            task = jobs.get(f"{job_id}_{index}")
            if task is not None:
                has_tasks = True
                runs |= dict.fromkeys(run_ids, task)
        if has_tasks:
            arrays.append(job_id)
        if job_id in jobs:
            analysis.append(jobs[job_id])
    return Queue(runs, analysis, arrays)


def submitted_runs(rows: Iterable[Mapping[str, Any]]) -> set[str]:
    """Return the runs that some recorded jobs were submitted for, whether those have ended or not."""
    return {run_id for row in rows for task in row["tasks"] for run_id in task}


def ask(job_ids: Sequence[str]) -> dict[str, Job]:
    """Return those of the named jobs, and of the tasks of the named arrays, that are queued or running.

    Raises:
        RecordError: Slurm cannot be asked.
    """
    command = ["squeue", "--noheader", "--array", "--format=%i|%T|%r", f"--jobs={','.join(job_ids)}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_TIMEOUT)
    except OSError as error:
        raise RecordError(f"cannot ask Slurm: no squeue here ({error.strerror})") from error
    except subprocess.TimeoutExpired as error:
        raise RecordError(f"cannot ask Slurm: squeue did not answer within {SQUEUE_TIMEOUT:.0f}s") from error
    if done.returncode and UNKNOWN_JOB not in done.stderr:
        raise RecordError(f"cannot ask Slurm: {' '.join(done.stderr.split()) or f'squeue ended {done.returncode}'}")
    jobs = [Job(*line.split("|")) for line in done.stdout.splitlines() if line.count("|") == 2]
    return {job.job_id: job for job in jobs}


def own_job() -> dict[str, str | None]:
    """Return the job of this process as a claim file names it; outside Slurm every part is None.

    The last task of an array has the array's number as SLURM_JOB_ID, so a task is named by array and index instead.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return {
        "slurm_cluster": os.environ.get("SLURM_CLUSTER_NAME"),
        "slurm_job": f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID"),
        "slurm_restarts": os.environ.get("SLURM_RESTART_COUNT"),
    }


def outside() -> dict[str, str]:
    """Return the environment without the variables of the job that this process belongs to, if any.

    sbatch would hand them on to the job that it submits, whose srun refuses those that contradict its own
    (SLURM_MEM_PER_CPU, SLURM_MEM_PER_NODE).
    """
    inside = "SLURM_JOB_ID" in os.environ
    return {
        k: v for k, v in os.environ.items() if not (inside and k.startswith("SLURM_") and k not in CLIENT_VARIABLES)
    }


def is_over(job_id: str) -> bool:
    """Return whether Slurm knows that a job neither runs nor waits; False where Slurm cannot be asked."""
    try:
        return not ask([job_id])
    except RecordError:
        return False
