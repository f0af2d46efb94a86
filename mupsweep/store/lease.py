"""Leases: which worker owns a run. A lease is a numbered claim file; whoever creates the next number owns the run.

Two workers never train one run, on any file system with atomic link or exclusive create, and no file is deleted that
another worker might be looking at. A lease expires when its owner releases it or dies. Of a process on this host the
pid says whether it lives; of one on another host the heartbeat does, or Slurm where it knows that the job has ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mupsweep.atomic_files import create_text, make_folder, read_json, temporary_beside, write_json
from mupsweep.errors import RecordError
from mupsweep.store import slurm_queue
from mupsweep.store.records import is_owner

HEARTBEAT_INTERVAL = 15.0  # seconds between heartbeats
# A damaged claim, or one whose Slurm job has ended, expires after this many seconds without a heartbeat.
HEARTBEAT_GRACE = 2 * HEARTBEAT_INTERVAL
LEASE_TIMEOUT = 600.0  # a claim of another host expires after this many seconds without a heartbeat
CLAIM_NAME = re.compile(r"[0-9]{4,18}\.json")
MAX_WORKER_DEATHS = 2  # workers that a run may cost: after that it waits for all others, or counts as failed


@dataclass
class Lease:
    """The right to train a run, until it is released or its owner dies.

    Attributes:
        path: the claim file.
        owner: the content of the claim file: host, process and Slurm job of the owner.
        lost: whether a heartbeat found that another worker had taken the run over.
    """

    path: Path
    owner: dict[str, Any]
    lost: bool = False

    @contextlib.contextmanager
    def renewed(self) -> Iterator[None]:
        """Give signs of life for the duration of the context.

        They come from a thread, since a step, a compilation or an evaluation may take longer than LEASE_TIMEOUT.
        """
        ended = threading.Event()
        thread = threading.Thread(target=self._renew, args=(ended,), daemon=True, name="heartbeat")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _renew(self, ended: threading.Event) -> None:
        while not self.lost and not ended.wait(HEARTBEAT_INTERVAL):
            with contextlib.suppress(OSError):  # a file server may be unreachable for a moment
                os.utime(self.path)
            self.lost = not self.is_held()

    def is_held(self) -> bool:
        """Return False once another worker took the run over, for instance while this process was suspended."""
        return newest(self.path.parent) == self.path

    def deaths(self) -> int:
        """Count the earlier owners that never released the run: it killed them, or their machine failed."""
        numbers = (int(name.removesuffix(".json")) for name in _claim_names(self.path.parent))
        earlier = (self.path.with_name(_claim_name(number)) for number in numbers if number < int(self.path.stem))
        return sum(not (read_json(path) or {}).get("released") for path in earlier)

    def release(self) -> None:
        """Let another worker acquire the run."""
        with contextlib.suppress(RecordError):  # on a full disk the lease expires when this process ends
            write_json(self.path, {**self.owner, "released": True}, durable=False)


def acquire(folder: Path) -> Lease | None:
    """Acquire the lease of a run by the next number in its folder of claims; None where the newest owner lives."""
    last = newest(folder)
    if last is None:
        make_folder(folder)
    elif not _may_be_taken_over(last):
        return None
    path = folder / _claim_name(int(last.stem) + 1 if last is not None else 0)
    owner = owner_record()
    return Lease(path, owner) if create_text(path, json.dumps(owner)) else None


def is_owned_by(path: Path, pid: int) -> bool:
    """Return whether a claim file names a process of this host as its owner."""
    owner = _read_owner(path) or {}
    return (owner.get("host"), owner.get("boot"), owner.get("pid")) == (socket.gethostname(), _boot_id(), pid)


def holder(folder: Path) -> str | None:
    """Return the pid and host of who holds the newest lease in a folder of claims; None where nobody alive does."""
    owner = living_owner(folder)
    return None if owner is None else f"pid {owner.get('pid')} on {owner.get('host')}"


def living_owner(folder: Path) -> dict[str, Any] | None:
    """Return what the newest lease in a folder of claims says of its owner; None where nobody alive holds it."""
    path = newest(folder)
    with contextlib.suppress(FileNotFoundError):  # a lock that is released at this moment
        if path is not None and not is_expired(path):
            return _read_owner(path) or {}
    return None


def is_alive_here(owner: dict[str, Any]) -> bool:
    """Return whether a process of this machine, container and boot is the one that a claim or a record names."""
    pid = owner.get("pid")
    alive = isinstance(pid, int) and pid > 0 and is_here(owner)
    return alive and process_start_time(int(owner["pid"])) == owner.get("born") is not None


def newest(folder: Path) -> Path | None:
    """Return the claim file that counts, the one of the largest number.

    It lists names and opens nothing, since every worker asks for every run, and mostly in vain.
    """
    names = _claim_names(folder)
    return folder / max(names, key=lambda name: (len(name), name)) if names else None  # 10000 comes after 9999


def _claim_names(folder: Path) -> list[str]:
    with contextlib.suppress(OSError):  # no claims yet
        return [name for name in os.listdir(folder) if CLAIM_NAME.fullmatch(name)]
    return []


def _read_owner(path: Path) -> dict[str, Any] | None:
    """The content of a claim file; None where it names no owner."""
    owner = read_json(path)
    return owner if owner is not None and is_owner(owner) else None


def _claim_name(number: int) -> str:
    return f"{number:04d}.json"


def owner_record(pid: int | None = None) -> dict[str, Any]:
    """Return what a claim of a process says of its owner; of this one by default."""
    pid = os.getpid() if pid is None else pid
    return {
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "pid": pid,
        "born": process_start_time(pid),
        **slurm_queue.own_job(),
        "taken": time.time(),
    }


def is_expired(path: Path, clock: Callable[[Path], float] = lambda _: time.time()) -> bool:
    """Return whether a lease was released or its owner is dead.

    Args:
        path: the claim file.
        clock: returns the time by which the heartbeats in a folder are judged.
    """
    owner = _read_owner(path)
    # The file is damaged, another user's, or not yet written where the file system has no hard links.
    if owner is None:
        limit = HEARTBEAT_GRACE if os.access(path, os.R_OK) else LEASE_TIMEOUT
        return clock(path.parent) - _last_heartbeat(path) > limit
    if owner.get("released"):
        return True
    if is_here(owner):
        return process_start_time(int(owner["pid"])) != owner.get("born")
    return clock(path.parent) - _last_heartbeat(path) > LEASE_TIMEOUT


def _may_be_taken_over(path: Path) -> bool:
    """Return whether the newest claim may be followed by another; this may wait."""
    try:
        return is_expired(path, _file_clock) or (_lost_its_job(path) and _wait_for_expiry(path))
    except FileNotFoundError:  # a lock that is released at this moment: somebody else may hold it already
        return False


def _lost_its_job(path: Path) -> bool:
    """Return whether the owner was a Slurm job of another host that has ended, or this job before Slurm restarted it.

    Only jobs ask, and apart from `is_expired`, which views call for every run: it may call squeue.

    It is no proof. A controller that lost its state numbers jobs from 1 again, and two clusters may share a name. Then
    squeue may not know a job that is alive, which is why `_wait_for_expiry` follows; or the number is another job's by
    now, and the dead owner's lease times out like any other.
    """
    own_job = slurm_queue.own_job()
    owner = (_read_owner(path) or {}) if own_job["slurm_job"] is not None else {}
    if is_here(owner) or owner.get("slurm_job") is None:
        return False
    if owner.get("slurm_cluster") != own_job["slurm_cluster"] or path.stat().st_uid != os.getuid():
        return False  # squeue knows its own cluster only, and may hide other users' jobs
    if owner["slurm_job"] == own_job["slurm_job"]:
        return owner.get("slurm_restarts") != own_job["slurm_restarts"]
    return slurm_queue.is_over(owner["slurm_job"])


def _wait_for_expiry(path: Path) -> bool:
    """Wait until a claim is HEARTBEAT_GRACE without a heartbeat; False where one comes, since its owner lives."""
    last = _last_heartbeat(path)
    remaining = HEARTBEAT_GRACE - max(0.0, _file_clock(path.parent) - last)
    deadline = time.monotonic() + remaining
    while time.monotonic() < deadline:
        time.sleep(min(1.0, remaining))
        if _last_heartbeat(path) != last:
            return is_expired(path, _file_clock)
    return True


def _last_heartbeat(path: Path) -> float:
    """Return when a claim file was written or touched."""
    with contextlib.suppress(OSError), path.open("rb") as file:  # NFS may report an old time for a closed file
        return os.fstat(file.fileno()).st_mtime
    return path.stat().st_mtime


def _file_clock(folder: Path) -> float:
    """Return the time by the clock that dates the files of a folder.

    For most network file systems that is their server's, since the clock of this host may be wrong, or jump.
    """
    probe = temporary_beside(folder / "clock")
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:  # the folder is read-only
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def is_here(owner: dict[str, Any]) -> bool:
    """Return whether the owner's pid means something here: it is of this host, container and boot."""
    return (owner.get("host"), owner.get("boot")) == (socket.gethostname(), _boot_id())


@cache
def _boot_id() -> str:
    """Identify this boot of the host and the pid namespace.

    Two containers of one host may share its name, and know nothing of each other's pids.
    """
    identity = ""
    with contextlib.suppress(OSError):
        identity = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        identity += f" {os.stat('/proc/self/ns/pid').st_ino}"
    return identity


def process_start_time(pid: int) -> str | None:
    """Return when a process of this host started, which exposes a reused pid; None where the process is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if Path("/proc/self").exists():
            return None
        try:  # without /proc (macOS) only whether it lives can be asked
            os.kill(pid, 0)
        except OSError:
            return None
        return "alive"
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
