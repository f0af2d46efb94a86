"""A program of the user's in a process group of its own: how it is started, stopped, and outlives nobody."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mupsweep.atomic_files import read_json, write_json
from mupsweep.errors import RecordError
from mupsweep.store.lease import is_here, owner_record, process_start_time
from mupsweep.store.records import is_owner

# Ends the group of a program whose worker was killed: the worker alone holds the other end of its standard input, and
# writes a line there when the program has ended.
WATCH = """
trap '' INT TERM HUP USR1 USR2
read -r line && exit
kill -s TERM -- "-$1" 2>/dev/null
waited=0
while [ "$waited" -lt "$2" ] && kill -s 0 -- "-$1" 2>/dev/null; do sleep 1; waited=$((waited + 1)); done
kill -s KILL -- "-$1" 2>/dev/null
"""
KILL_SECONDS = 10.0  # how long killed processes may take to disappear


@dataclass(frozen=True)
class Program:
    """A running program, whose pid is also the id of its process group.

    Attributes:
        grace: seconds that it has to end by itself after it was asked to.
    """

    process: subprocess.Popen[bytes]
    grace: float

    @property
    def code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self.process.returncode

    def wait(self, seconds: float) -> bool:
        """Wait for its end, for so many seconds at most; return whether it has ended."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self) -> None:
        """End the program and all that it started: ask it first, and kill what is left after its grace."""
        offspring: dict[int, str | None] = {}
        if self.process.poll() is None:
            offspring = descendants(self.process.pid)
            signal_group(self.process.pid, signal.SIGTERM)
            if not self.wait(self.grace):
                offspring |= descendants(self.process.pid)
                signal_group(self.process.pid, signal.SIGKILL)
                self.process.wait()
        kill_group(self.process.pid, offspring)  # also what a program that ended by itself left behind


@contextlib.contextmanager
def started(
    command: Sequence[str],
    environment: Mapping[str, str],
    cwd: str | None,
    output: IO[bytes],
    record: Path,
    grace: float,
) -> Iterator[Program]:
    """Start a program for the duration of the context, at whose end nothing of it runs.

    Args:
        environment: added to this process's.
        cwd: the folder that it runs in; None for this process's.
        output: what it prints, errors included.
        record: a file that holds the running program, by which `end_earlier` finds it.

    Raises:
        RecordError: the system cannot start it.
    """
    try:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=cwd,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        where = f" in trainer.cwd={cwd}" if cwd else ""
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecordError(f"trainer.command: cannot start {command[0]}{where}: {reason}") from error
    program = Program(process, grace)
    watch = None
    try:
        watch = subprocess.Popen(
            ["/bin/sh", "-c", WATCH, "watch", str(process.pid), str(max(1, round(grace)))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        write_json(record, owner_record(process.pid), durable=False)
        yield program
    finally:
        program.stop()
        with contextlib.suppress(OSError):
            record.unlink()
        if watch is not None and watch.stdin is not None:
            with contextlib.suppress(OSError):
                watch.stdin.write(b"\n")
                watch.stdin.close()
            watch.wait()


def end_earlier(record: Path) -> None:
    """Kill the program of an earlier attempt, where its worker was killed and it still runs on this machine."""
    owner = read_json(record)
    if owner is None or not is_owner(owner) or not is_here(owner):
        return
    born = process_start_time(owner["pid"])
    if born in (None, owner.get("born")):  # it, or what is left of its group; else another process has its pid
        kill_group(owner["pid"])
    with contextlib.suppress(OSError):
        record.unlink()


def kill_group(pid: int, offspring: Mapping[int, str | None] | None = None) -> None:
    """Kill a process group, and wait until none of it runs.

    Args:
        offspring: processes that have left the group, and when each started, to be killed with it.
    """
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        left = [other for other, born in (offspring or {}).items() if born and process_start_time(other) == born]
        for other in left:
            with contextlib.suppress(OSError):
                os.kill(other, signal.SIGKILL)
        # members that are left but do not run have ended, and wait for their parents to ask how
        runs = signal_group(pid, signal.SIGKILL) and any(process_start_time(member) for member in members(pid))
        if not left and not runs:
            return
        time.sleep(0.01)


def signal_group(pid: int, number: signal.Signals) -> bool:
    """Send a signal to a process group; return False where it has no process."""
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):  # macOS answers so for a group of zombies
        return False
    return True


def members(group: int) -> list[int]:
    """The pids of a process group; its id alone where the system has no /proc."""
    found = []
    for pid, (_, member_of) in processes().items():
        if member_of == group:
            found.append(pid)
    return found or [group]


def descendants(pid: int) -> dict[int, str | None]:
    """The pids of all processes that a process started, and that these started, with their start times.

    torchrun's workers have groups of their own, so the group is not enough.
    """
    children: dict[int, list[int]] = {}
    for child, (parent, _) in processes().items():
        children.setdefault(parent, []).append(child)
    found: dict[int, str | None] = {}
    remaining = [pid]
    while remaining:
        for child in children.get(remaining.pop(), []):
            found[child] = process_start_time(child)
            remaining.append(child)
    return found


def processes() -> dict[int, tuple[int, int]]:
    """Pid -> (parent, process group) of every process of this host; empty where the system has no /proc."""
    table: dict[int, tuple[int, int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            _, parent, group = entry.read_text().rpartition(")")[2].split()[:3]
            table[int(entry.parent.name)] = int(parent), int(group)
    return table


def visible_devices(device: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment that shows a program the devices of its slot, and no others.

    Args:
        device: a torch device, "auto", or several separated by commas.
        environment: of this process, whose CUDA devices the indices count.
    """
    names = [name.strip() for name in device.split(",")]
    if names[0] == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    indices = [name.partition(":")[2] for name in names if name.startswith("cuda:")]
    if len(indices) < len(names):
        return {}  # auto, cuda without an index, mps: whatever this process sees
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    chosen = [visible[int(index)] if int(index) < len(visible) else index for index in indices]
    return {"CUDA_VISIBLE_DEVICES": ",".join(chosen)}
