"""Slurm's commands, which write down how they were called and answer what a test tells them."""

from __future__ import annotations

from pathlib import Path

FAKES = {
    # every call is a line of `calls`; sbatch numbers jobs from 100 and can be told to fail from some number on,
    # or to refuse a script as it does where the queue is full
    "sbatch": """
        id=$((100 + $(grep -c ^sbatch "$FAKE/calls")))
        [ "$id" -lt "$(cat "$FAKE/sbatch-fails-from" 2>/dev/null || echo 999)" ] ||
            { echo "sbatch: error: Invalid qos specification" >&2; exit 1; }
        [ ! -e "$FAKE/sbatch-refuses" ] || [[ "$*" != *"$(cat "$FAKE/sbatch-refuses")"* ]] ||
            { echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; }
        [ ! -e "$FAKE/sbatch-interrupts" ] || kill -INT "$PPID"
        env | grep ^SLURM_ | sort > "$FAKE/environment"
        echo "sbatch $*" >> "$FAKE/calls"; echo "$id;cluster"
    """,
    "squeue": """
        echo "squeue $*" >> "$FAKE/calls"
        [ ! -e "$FAKE/squeue-hangs" ] || exec tail -f /dev/null
        [ -e "$FAKE/queue" ] || { echo "slurm_load_jobs error: $(cat "$FAKE/squeue-says")" >&2; exit 1; }
        cat "$FAKE/queue"
    """,
    "scancel": """echo "scancel $*" >> "$FAKE/calls" """,
    "scontrol": """
        echo "scontrol $*" >> "$FAKE/calls"
        echo "MaxArraySize            = $(cat "$FAKE/max-array-size" 2>/dev/null || echo 3)"
    """,
}


class Fake:
    """The folder that goes on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, body in FAKES.items():
            (folder / name).write_text(f"#!/bin/bash\n{body}")
            (folder / name).chmod(0o755)
        self.write("calls", "")
        self.write("squeue-says", "Invalid job id specified")

    def write(self, name: str, content: str) -> None:
        (self.folder / name).write_text(content)

    def queue(self, *jobs: str) -> None:
        """What squeue shows from now on: ID|STATE|REASON each."""
        self.write("queue", "".join(f"{job}\n" for job in jobs))

    def calls(self, command: str) -> list[str]:
        """The arguments of a command, a line per call."""
        lines = (self.folder / "calls").read_text().splitlines()
        return [line.removeprefix(f"{command} ") for line in lines if line.split()[0] == command]
