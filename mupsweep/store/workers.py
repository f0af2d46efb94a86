"""The processes that train a sweep: each has a record while it lives, by which `status` names it and `cancel` stops it.

A record is what a claim of a run says of its owner: host, boot, pid and when the process started. A pid that the system
has given to another process since is not taken for the worker.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mupsweep.atomic_files import make_folder, read_json, write_json
from mupsweep.errors import RecordError
from mupsweep.store import lease
from mupsweep.store.records import is_owner
from mupsweep.store.sweep_dir import SweepDir

ATTEMPTS = 3  # to leave a record: the last worker that ends removes the folder, perhaps in between


@dataclass(frozen=True)
class Worker:
    """A living process that trains runs of a sweep.

    Attributes:
        host: the machine on which it runs.
        pid: its process id there.
        born: when it started, as `process_start_time` says; None where that is unknown.
        is_here: whether its pid means something on this machine.
        slurm_job: the Slurm job that it belongs to, if any.
        run_ids: the runs that it holds.
    """

    host: str
    pid: int
    born: str | None
    is_here: bool
    slurm_job: str | None
    run_ids: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host} ({', '.join(self.run_ids) or 'between runs'})"

    def stop(self) -> bool:
        """Ask the process to checkpoint its run and end; return False where it cannot be asked or has ended."""
        if not self.is_here or self.pid == os.getpid() or not _is_ours(self.pid):
            return False
        try:
            if hasattr(os, "pidfd_open"):  # a handle of the process, which no later process of this pid can have
                handle = os.pidfd_open(self.pid)
                try:
                    if lease.process_start_time(self.pid) != self.born:
                        return False
                    signal.pidfd_send_signal(handle, signal.SIGINT)
                finally:
                    os.close(handle)
            elif lease.process_start_time(self.pid) == self.born:
                os.kill(self.pid, signal.SIGINT)
            else:
                return False
        except OSError:  # it has ended, or is another user's
            return False
        return True


@contextlib.contextmanager
def registered(sweep: SweepDir) -> Iterator[None]:
    """Leave a record of this process with a sweep for the duration of the context, if the sweep may be written."""
    owner = lease.owner_record()
    path = sweep.workers / f"{owner['host']}-{owner['pid']}.json"
    for _ in range(ATTEMPTS):
        with contextlib.suppress(RecordError):
            make_folder(sweep.workers)
            write_json(path, owner, durable=False)
            break
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        with contextlib.suppress(OSError):  # others still train
            sweep.workers.rmdir()


def living(sweep: SweepDir, running: Iterable[str]) -> list[Worker]:
    """The processes that train a sweep: those of this machine, and of others those that hold a run.

    Args:
        sweep: the sweep.
        running: the ids of its running runs.
    """
    owners: list[tuple[dict[str, Any], str | None]] = []
    for path in _records(sweep):
        owner = read_json(path)
        if owner is not None and is_owner(owner) and lease.is_alive_here(owner):
            owners.append((owner, None))
    for run_id in running:
        if owner := lease.living_owner(sweep.run(run_id).claims):
            owners.append((owner, run_id))

    workers: dict[tuple[Any, ...], Worker] = {}
    for owner, run_id in owners:
        key = owner.get("host"), owner.get("boot"), owner.get("pid")
        held = workers[key].run_ids if key in workers else ()
        workers[key] = Worker(
            host=str(owner.get("host")),
            pid=int(owner["pid"]),
            born=owner.get("born"),
            is_here=lease.is_alive_here(owner),
            slurm_job=owner.get("slurm_job"),
            run_ids=held if run_id is None else (*held, run_id),
        )
    return list(workers.values())


def _records(sweep: SweepDir) -> list[Path]:
    try:
        return sorted(sweep.workers.glob("[!.]*.json"))
    except OSError:  # somebody else's folder
        return []


def _is_ours(pid: int) -> bool:
    """Whether a process is one of mupsweep's, since a record may be of somebody else's making."""
    try:
        return b"mupsweep" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # without /proc nobody can tell
        return not Path("/proc/self").exists()
