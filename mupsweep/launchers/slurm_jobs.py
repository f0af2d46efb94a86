"""Slurm's commands on the jobs of a sweep: submitted and recorded, queued again, cancelled."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mupsweep.errors import ConfigError
from mupsweep.formatting import counted
from mupsweep.store import slurm_queue
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.training.signals import defer_signals

CALL_TIMEOUT = 120.0  # seconds that one call of Slurm's commands may take
DEFAULT_MAX_ARRAY = 1001  # MaxArraySize where Slurm's administrator chose none
QUEUE_LIMIT = re.compile(r"MaxSubmitJob|Job violates accounting/QOS policy")  # in sbatch's words for a full queue


def submit(sweep: SweepDir, script: Path, tasks: Sequence[Sequence[str]], *options: str) -> str:
    """Hand a script to sbatch and record the job's id.

    Raises:
        ConfigError: sbatch is missing or refuses the script.
    """
    with defer_signals():  # a Ctrl-C would leave a job without a record
        job = call("sbatch", "--parsable", *options, str(script), hint=_advice)
        job = job.strip().partition(";")[0]  # a federation adds its cluster
        sweep.write_job(job, script, tasks)
    return job


def requeue(limit: int) -> None:
    """Queue the job of this process again, or its task of an array, unless Slurm has restarted it `limit` times.

    Raises:
        ConfigError: Slurm does not queue it.
    """
    job = slurm_queue.own_job()
    if job["slurm_job"] is not None and int(job["slurm_restarts"] or 0) < limit:
        call("scontrol", "requeue", job["slurm_job"])


def was_cancelled(jobs: Sequence[Mapping[str, Any]], queue: slurm_queue.Queue) -> bool:
    """Return whether this process is an analysis of the sweep that was cancelled; it must not submit any more."""
    own_job = slurm_queue.own_job()["slurm_job"]
    running = {job.job_id for job in queue.analysis if job.state == "RUNNING"}
    return own_job in {job["job"] for job in jobs} - running


def cancel(sweep: SweepDir) -> None:
    """Cancel the queued and running jobs of a sweep, and so the next rounds of a search; what they trained is kept."""
    with sweep.lock():  # an analysis that is submitting finishes first, or finds that it was cancelled
        queue = slurm_queue.of_sweep(sweep.read_jobs())
        jobs = [*(job.job_id for job in queue.analysis), *queue.arrays]  # the analysis first, or it would start
        if jobs:
            call("scancel", "--quiet", *jobs)
    if jobs:
        n_runs = counted(len(queue.runs), "run")
        _print(f"cancelled jobs {', '.join(jobs)} with {n_runs}; those in progress checkpoint and end")
        _print("go on with the command that made the sweep")
    else:
        _print(f"no Slurm job of {sweep.path} is queued or running")


def max_array_size() -> int:
    """Return how many tasks the cluster takes in one array."""
    try:
        settings = call("scontrol", "show", "config")
    except ConfigError:
        return DEFAULT_MAX_ARRAY
    setting = re.search(r"^MaxArraySize\s*=\s*(\d+)", settings, re.MULTILINE)
    limit = int(setting[1]) if setting else DEFAULT_MAX_ARRAY
    if limit == 0:
        raise ConfigError("this cluster takes no job arrays (MaxArraySize=0): in a job of your own use launcher=local")
    return limit


def call(*command: str, hint: Callable[[str], str] = lambda _: "") -> str:
    """Run one of Slurm's commands and return what it prints.

    Args:
        hint: what to add to the reason why the command failed.

    Raises:
        ConfigError: the command is missing, fails or does not answer.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CALL_TIMEOUT, env=slurm_queue.outside())
    except OSError as error:
        raise ConfigError(
            f"cannot run {command[0]} ({error.strerror}): launcher=slurm works on a machine that submits to a Slurm "
            "cluster; elsewhere use launcher=local"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{shlex.join(command)} did not answer within {CALL_TIMEOUT:.0f}s; try again") from error
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ConfigError(f"{shlex.join(command)} failed: {reason}{hint(reason)}")
    return done.stdout


def _advice(reason: str) -> str:
    """Return what to do where sbatch refuses a job."""
    if QUEUE_LIMIT.search(reason):
        return "; keep fewer in the queue by launcher.max_submitted=N and run the same command again"
    return "; change launcher.* and run the same command again"


def _print(line: str) -> None:
    """Print a line for the user to stderr."""
    print(line, file=sys.stderr)
