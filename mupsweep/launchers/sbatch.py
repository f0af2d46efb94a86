"""The text of job scripts, by pure functions. Every argument is quoted and every option checked."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mupsweep.errors import ConfigError
from mupsweep.formatting import duration
from mupsweep.store.lease import MAX_WORKER_DEATHS

VALUE = re.compile(
    r"[\w.,:@+=/*&|()\[\]!%~^][\w.,:@+=/*&|()\[\]!%~^-]*", re.ASCII
)  # one argument: no blank, no quote, no leading dash
OPTION = re.compile(r"--(?P<name>[a-z][a-z0-9-]*)(=(?P<value>.*))?", re.DOTALL)
RESERVED_OPTIONS = (  # the script relies on its own values of these
    "array",
    "chdir",
    "dependency",
    "job-name",
    "no-requeue",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "open-mode",
    "output",
    "requeue",
    "signal",
    "wrap",
)


@dataclass(frozen=True)
class Task:
    """The runs of one task of a job array.

    Attributes:
        run_ids: the runs, in the order in which the task's workers take them.
        seconds: how long the task takes, roughly.
    """

    run_ids: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Worker:
    """How a task starts its workers, one process per device.

    Attributes:
        command: the command line up to the sweep's folder; run ids, the device and the threads follow.
        devices: the device of every worker, or its devices separated by commas; a device listed twice has two workers.
        threads: CPU threads of each process.
        shard: whether devices that train a run together divide its state.
        nodes: how many nodes train each run together; with several, `devices` has one entry, the devices of each node.
        cpus: CPUs of each process, where there are several nodes.
    """

    command: tuple[str, ...]
    devices: tuple[str, ...]
    threads: int
    shard: bool = False
    nodes: int = 1
    cpus: int = 1


def array_script(
    header: Sequence[str], setup: Sequence[str], tasks: Sequence[Task], worker: Worker, restarts: int
) -> str:
    """Return the script of a job array: one task per bundle of runs, requeued after up to `restarts` time limits."""
    command = f'{shlex.join(worker.command)} "${{runs[@]}}" --device "$1" --threads {worker.threads}'
    command += " --shard" * worker.shard
    start = f"train() {{ exec {command}; }}"
    if worker.nodes > 1:
        processes = len(worker.devices[0].split(","))
        start = SPREAD.format(
            python=shlex.quote(worker.command[0]),
            nodes=worker.nodes,
            processes=processes,
            world=worker.nodes * processes,
            cpus=worker.cpus,
            command=command,
        )
    return "\n".join(
        [
            *header,
            "set -e",
            *setup,
            "",
            'case "$SLURM_ARRAY_TASK_ID" in',
            *(f"{i}) runs=({shlex.join(task.run_ids)}) ;;  # {_summary(task)}" for i, task in enumerate(tasks)),
            '*) echo "no task $SLURM_ARRAY_TASK_ID in this script" >&2; exit 2 ;;',
            "esac",
            'echo "$(date +%FT%T) on $(hostname), GPUs: ${CUDA_VISIBLE_DEVICES:-none}: ${runs[*]}"',
            f"devices=({shlex.join(worker.devices)})",
            f"max_restarts={restarts}",
            f"max_deaths={MAX_WORKER_DEATHS + 1}",  # the last worker trains the other runs before the deadly one
            f"export OMP_NUM_THREADS={worker.threads} MKL_NUM_THREADS={worker.threads}",
            start,
            TRAIN,
        ]
    )


SPREAD = """\

# A process for every device of every node, each told its place as torchrun would tell it.
train() {{
    MASTER_PORT=$({python} -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    export MASTER_PORT WORLD_SIZE={world} LOCAL_WORLD_SIZE={processes}
    exec srun --nodes={nodes} --ntasks-per-node={processes} --cpus-per-task={cpus} --kill-on-bad-exit bash -c '
        export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID MASTER_ADDR=$SLURM_LAUNCH_NODE_IPADDR
        exec "$@"' mupsweep {command}
}}"""

TRAIN = """\

# When a signal kills a worker, as the kernel does where memory runs out, another goes on from the last checkpoint.
work() {
    stopped=""
    trap 'interrupted=yes; stopped=yes; kill -USR1 "$worker" 2>/dev/null || true' USR1 TERM
    for ((deaths = 1; ; deaths++)); do
        [ -z "$stopped" ] || exit 130
        train "$1" &
        worker=$!
        [ -z "$stopped" ] || kill -USR1 "$worker" 2>/dev/null || true  # told before there was a worker to tell
        await "$worker"
        if [ "$stopped" ] || [ "$code" -le 128 ] || [ "$code" -eq 130 ] || [ "$deaths" -ge "$max_deaths" ]; then
            exit "$code"
        fi
        echo "$(date +%FT%T) the worker on $1 ended with code $code; starting another" >&2
    done
}

# Sets code to how a process ended. A signal for this shell ends `wait` early, with a code of its own; bash keeps the
# code of a process that has ended, so that it can be waited for again.
await() {
    interrupted=yes
    while [ "$interrupted" ]; do
        interrupted=""
        code=0
        wait "$1" || code=$?
    done
}

# USR1 comes before the time limit: the workers checkpoint, and the task is queued again to go on from there.
# TERM comes when the job is cancelled, preempted or requeued; a preempted job is queued again by Slurm itself.
limit=""
told=""
tell() { interrupted=yes; told=yes; kill -USR1 "${workers[@]}" 2>/dev/null || true; }
trap 'limit=near; tell' USR1
trap tell TERM

# A worker per device. They share the runs out by claiming them, and skip what is finished.
workers=()
for device in "${devices[@]}"; do
    work "$device" &
    workers+=("$!")
done
[ -z "$told" ] || tell
worst=0
for worker in "${workers[@]}"; do
    await "$worker"
    [ "$code" -eq 0 ] || worst=$code
done
if [ "$limit" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$max_restarts" ]; then
    # not $SLURM_JOB_ID: for the last task of an array that is the number of the whole array
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
exit "$worst"
"""


def analysis_script(header: Sequence[str], setup: Sequence[str], command: Sequence[str]) -> str:
    """Return the script of the job that analyses the sweep after its arrays."""
    return "\n".join([*header, "set -e", *setup, "", shlex.join(command), ""])


def header(comment: Sequence[str], options: Sequence[str], login: bool) -> list[str]:
    """Return the first lines of a script: the shell (a login shell for `module`), comments and #SBATCH options."""
    shell = "#!/bin/bash -l" if login else "#!/bin/bash"
    return [shell, *(f"# {line}" for line in comment), *(f"#SBATCH {quoted(option)}" for option in options)]


def quoted(option: str) -> str:
    """Quote the value of --name=value as for a shell, which is how sbatch reads it too; a path may hold anything."""
    if not option.isprintable():
        raise ConfigError(f"{option!r} would be more than one line of a job script")
    name, equals, value = option.partition("=")
    return f"{name}{equals}{shlex.quote(value)}" if equals else name


def file_pattern(folder: Path, name: str) -> str:
    """Return the value of --output; Slurm replaces %A and the like in `name`, but not in the folder.

    Raises:
        ConfigError: a folder that no job script can name.
    """
    if "\\" in str(folder):
        raise ConfigError(f"{folder}: Slurm takes no path with a backslash; choose another out=DIR")
    return f"{str(folder).replace('%', '%%')}/{name}"


def checked_value(value: str, key: str) -> str:
    """Return an option's value, refused where sbatch could read it as anything else."""
    if not VALUE.fullmatch(value):
        raise ConfigError(f"{key}={value!r}: expected one word for sbatch, without blanks, quotes or a leading dash")
    return value


def checked_option(option: str, key: str) -> str:
    """Return an option given whole, such as --exclusive or --nice=100, refused where it is none or reserved."""
    match = OPTION.fullmatch(option)
    if match is None or (match["value"] is not None and not VALUE.fullmatch(match["value"])):
        raise ConfigError(f"{key}: {option!r} is no single option of sbatch; write --name or --name=value, long names")
    if match["name"] in RESERVED_OPTIONS:
        raise ConfigError(f"{key}: --{match['name']} is set by mupsweep, whose scripts rely on it")
    return option


def checked_line(line: str, key: str) -> str:
    """Return a line of shell code, refused where it is several."""
    if not line.isprintable():
        raise ConfigError(f"{key}: {line!r} is not one line; give a list with an entry per line")
    return line


def _summary(task: Task) -> str:
    """Return the comment beside a task: how many runs it has and how long it takes."""
    count = len(task.run_ids)
    return f"{count} run{'s' * (count > 1)}, roughly {duration(task.seconds)}"
