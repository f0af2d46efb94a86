"""Claims: who trains a run. Numbered files that are only ever added; whoever creates the next number owns the run.

So two workers never train one run, on any file system with atomic link or exclusive create, and nothing is deleted
that another worker might be looking at. A claim is free again when it was released or its owner is dead: told by the
pid on this host, by a missing heartbeat elsewhere, and sooner where Slurm says that the owner's job is over.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mupsweep.atomic_files import make_folder, read_json, temporary_beside, write_json
from mupsweep.errors import RecordError
from mupsweep.store import slurm_queue

HEARTBEAT_INTERVAL = 15.0  # from one heartbeat to the next, unless a step takes longer
HEARTBEAT_GRACE = (
    2 * HEARTBEAT_INTERVAL
)  # one that is damaged, or whose job is over, is taken over after so long without
MAX_WORKER_DEATHS = 2  # workers that a run may cost: after so many it waits for all others, or counts as failed
LEASE_TIMEOUT = 600.0  # a claim of another host without a heartbeat for so long is taken over


@dataclass
class Lease:
    """The right to train a run, until released or the owner dies."""

    path: Path
    owner: dict[str, Any]
    beat: float = field(default_factory=time.monotonic)

    def heartbeat(self) -> bool:
        """Tell other hosts now and then that the owner lives, cheap enough for every step; True when it did."""
        if time.monotonic() - self.beat <= HEARTBEAT_INTERVAL:
            return False
        with contextlib.suppress(OSError):  # a server that is away for a moment
            os.utime(self.path)
        self.beat = time.monotonic()
        return True

    def is_held(self) -> bool:
        """False once another worker took the run over, for instance after this process was suspended for long."""
        return newest(self.path.parent) == self.path

    def deaths(self) -> int:
        """How many owners before this one never released the run: they died of it, or with their machine."""
        before = (self.path.with_name(_claim_name(number)) for number in range(int(self.path.stem)))
        return sum(not (read_json(path) or {}).get("released") for path in before)

    def release(self) -> None:
        with contextlib.suppress(RecordError):  # a full disk: the claim is free when this process has ended
            write_json(self.path, {**self.owner, "released": True}, durable=False)


def take(folder: Path) -> Lease | None:
    """The next claim in a run's folder of claims, or None where the newest one's owner lives."""
    last = newest(folder)
    if last is None:
        make_folder(folder)
    elif not _is_given_up(last):
        return None
    path = folder / _claim_name(int(last.stem) + 1 if last is not None else 0)
    owner = _owner()
    return Lease(path, owner) if _create(path, json.dumps(owner)) else None


def is_of(path: Path, pid: int) -> bool:
    """Whether a claim is that of a process of this host."""
    owner = read_json(path) or {}
    return (owner.get("host"), owner.get("boot"), owner.get("pid")) == (socket.gethostname(), _boot_id(), pid)


def silence(folder: Path) -> tuple[float, str] | None:
    """Seconds since the newest claim's owner gave a sign of life, and who that is; None where nobody owns the run."""
    path = newest(folder)
    with contextlib.suppress(FileNotFoundError):  # a lock that is let go at this moment
        if path is not None and not is_free(path):
            owner = read_json(path) or {}
            return time.time() - path.stat().st_mtime, f"pid {owner.get('pid')} on {owner.get('host')}"
    return None


def newest(folder: Path) -> Path | None:
    """The claim that counts. Cheap: every worker asks for every run, and most of them in vain."""
    names: list[str] = []
    with contextlib.suppress(OSError):  # no claims yet
        names = [name for name in os.listdir(folder) if name[0].isdigit() and name.endswith(".json")]
    return folder / max(names, key=lambda name: (len(name), name)) if names else None  # 10000 comes after 9999


def _claim_name(number: int) -> str:
    return f"{number:04d}.json"


def _owner() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "pid": os.getpid(),
        "born": born(os.getpid()),
        **slurm_queue.own_job(),
        "taken": time.time(),
    }


def is_free(path: Path, clock: Callable[[Path], float] = lambda _: time.time()) -> bool:
    """Whether a claim was released or its owner is gone.

    Args:
        clock: the time by which heartbeats in a folder are judged.
    """
    owner = read_json(path)
    if owner is None:  # damaged, or not yet written on a file system without hard links, or another user's
        limit = HEARTBEAT_GRACE if os.access(path, os.R_OK) else LEASE_TIMEOUT
        return clock(path.parent) - _last_beat(path) > limit
    if owner.get("released"):
        return True
    if _is_here(owner):
        return born(int(owner["pid"])) != owner.get("born")
    return clock(path.parent) - _last_beat(path) > LEASE_TIMEOUT


def _is_given_up(path: Path) -> bool:
    """Whether the newest claim may be followed by another; this may wait."""
    try:
        return is_free(path, _file_clock) or (_lost_its_job(path) and _falls_silent(path))
    except FileNotFoundError:  # a lock that is let go at this moment: somebody else may have it already
        return False


def _lost_its_job(path: Path) -> bool:
    """Whether the owner was a Slurm job of another host that is over, or this very job before Slurm restarted it.

    Asked by jobs only, and apart from `is_free`, which views call for every run: it may call squeue.

    It is no proof. A controller that lost its state numbers jobs from 1 again, and two clusters may have one name: then
    squeue does not know a job that lives, hence `_falls_silent`; or the number is another job's by now, and the dead
    owner's claim goes stale like any other.
    """
    mine = slurm_queue.own_job()
    owner = (read_json(path) or {}) if mine["slurm_job"] is not None else {}
    if _is_here(owner) or owner.get("slurm_job") is None:
        return False
    if owner.get("slurm_cluster") != mine["slurm_cluster"] or path.stat().st_uid != os.getuid():
        return False  # squeue knows its own cluster only, and may keep other people's jobs to itself
    if owner["slurm_job"] == mine["slurm_job"]:
        return owner.get("slurm_restarts") != mine["slurm_restarts"]
    return slurm_queue.is_over(owner["slurm_job"])


def _falls_silent(path: Path) -> bool:
    """Wait until a claim has gone HEARTBEAT_GRACE without a heartbeat; one that comes meanwhile is a live owner's."""
    beat = _last_beat(path)
    left = HEARTBEAT_GRACE - max(0.0, _file_clock(path.parent) - beat)
    until = time.monotonic() + left
    while time.monotonic() < until:
        time.sleep(min(1.0, left))
        if _last_beat(path) != beat:
            return is_free(path, _file_clock)
    return True


def _last_beat(path: Path) -> float:
    """When a claim was written or touched."""
    with contextlib.suppress(OSError), path.open("rb") as file:  # NFS may tell an old time of a closed file
        return os.fstat(file.fileno()).st_mtime
    return path.stat().st_mtime


def _file_clock(folder: Path) -> float:
    """The time by the clock that dates the files of a folder, for most network file systems their server's: the clock
    of this host may be wrong, or jump."""
    probe = temporary_beside(folder / "clock")
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:  # it may only be read
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _is_here(owner: dict[str, Any]) -> bool:
    """Whether the owner's pid is one that this process can see: of this host, since it was booted."""
    return (owner.get("host"), owner.get("boot")) == (socket.gethostname(), _boot_id())


def _create(path: Path, text: str) -> bool:
    """Create `path` with its whole content, or return False because it exists."""
    temporary = temporary_beside(path)
    try:
        temporary.write_text(text)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return temporary.stat().st_nlink > 1  # NFS asks again where an answer was lost, and finds what it made
        except OSError:  # a file system without hard links
            try:
                with path.open("x") as file:
                    file.write(text)
            except FileExistsError:
                return False
        return True
    except OSError as error:
        raise RecordError(
            f"cannot write {path}: {error.strerror}; is the sweep folder writable and the disk not full?"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@cache
def _boot_id() -> str:
    """Of this host, and of the container: two of one host may share its name, and know nothing of each other's pids."""
    known = ""
    with contextlib.suppress(OSError):
        known = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        known += f" {os.stat('/proc/self/ns/pid').st_ino}"
    return known


def born(pid: int) -> str | None:
    """When a process of this host started, so that a reused pid is told apart; None where it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if Path("/proc/self").exists():
            return None
        try:  # no /proc (macOS): alive is all that can be told
            os.kill(pid, 0)
        except OSError:
            return None
        return "alive"
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
