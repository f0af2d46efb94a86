"""The text of job scripts, by pure functions. Every argument is quoted and every option checked."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mupsweep.errors import ConfigError
from mupsweep.formatting import counted, duration

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


def array_script(
    header: Sequence[str], setup: Sequence[str], tasks: Sequence[Task], command: Sequence[str], options: Sequence[str]
) -> str:
    """Return the script of a job array, one task per bundle of runs.

    Args:
        header: the first lines, as `header` returns them.
        setup: shell lines that prepare the environment.
        tasks: the runs of every task.
        command: the command line of the supervisor of a task's workers; run ids and `options` follow.
        options: the end of that command line.
    """
    return "\n".join(
        [
            *header,
            "# USR1, which Slurm sends near the time limit, is ignored until the supervisor below takes it.",
            "trap '' USR1",
            "set -e",
            *setup,
            "",
            'case "$SLURM_ARRAY_TASK_ID" in',
            *(f"{i}) runs=({shlex.join(task.run_ids)}) ;;  # {_summary(task)}" for i, task in enumerate(tasks)),
            '*) echo "no task $SLURM_ARRAY_TASK_ID in this script" >&2; exit 2 ;;',
            "esac",
            'echo "$(date +%FT%T) on $(hostname), GPUs: ${CUDA_VISIBLE_DEVICES:-none}: ${runs[*]}"',
            "",
            "# exec: Slurm's signals are for the process of this shell. The options: mupsweep worker --help",
            f'exec {shlex.join(command)} "${{runs[@]}}" {shlex.join(options)}',
            "",
        ]
    )


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
    return f"{counted(len(task.run_ids), 'run')}, roughly {duration(task.seconds)}"
