"""The folder of one run: its files, its status and its lease."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mupsweep.analysis.labels import DIVERGED, DONE
from mupsweep.atomic_files import finite, read_json, write_json, write_text
from mupsweep.errors import RecordError
from mupsweep.store import lease
from mupsweep.store.lease import Holder, Lease

PENDING, RUNNING, FAILED = "pending", "running", "failed"
FINISHED = (DONE, DIVERGED)  # these are results: such a run is not trained again


@dataclass(frozen=True)
class RunDir:
    """The folder of one run, whose name is the run id."""

    path: Path

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def log_path(self) -> Path:
        return self.path / "train.log"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def status_path(self) -> Path:
        return self.path / "status.json"

    @property
    def summary_path(self) -> Path:
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> tuple[Path, Path]:
        """The latest checkpoint and the one before."""
        return self.path / "checkpoint" / "latest.pt", self.path / "checkpoint" / "previous.pt"

    @property
    def trunk_checkpoint(self) -> Path:
        """The checkpoint at which a branch left the run, and from which the run goes on when the branch has ended."""
        return self.path / "checkpoint" / "trunk.pt"

    def status(self) -> dict[str, Any]:
        """Read status.json; a run without one, or with a damaged one, is pending."""
        status = read_json(self.status_path)
        return status if status is not None and "status" in status else {"status": PENDING}

    def state(self) -> dict[str, Any]:
        """Return the status, with a run that its owner left as running when it died as pending."""
        status = self.status()
        return {"status": PENDING} if status["status"] == RUNNING and not self.is_claimed() else status

    def is_open(self) -> bool:
        """Return whether the run still needs training: it has no result, or its summary is damaged."""
        return self.status()["status"] not in FINISHED or self.summary() is None

    def write_status(self, status: str, durable: bool = True, **details: Any) -> None:
        write_json(self.status_path, {"status": status, **details}, durable)

    def summary(self) -> dict[str, Any] | None:
        return read_json(self.summary_path)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_json(self.summary_path, summary)

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def groups_path(self) -> Path:
        return self.path / "groups.json"

    def groups(self) -> list[dict[str, Any]]:
        """Read the parameter groups that the run trains with."""
        return json.loads(self.groups_path.read_text())

    def write_rules(self, config: Mapping[str, Any], groups: Any) -> None:
        """Write what the run is: its resolved config and the parameter groups that it trains with."""
        write_text(self.config_path, yaml.safe_dump(_plain(config), sort_keys=False, width=110), durable=False)
        write_json(self.groups_path, groups, durable=False)

    def metrics(self) -> list[dict[str, Any]]:
        """Read the logged rows, in order of steps, up to the first that was not written whole."""
        rows: list[dict[str, Any]] = []
        try:
            for line in self.metrics_path.read_bytes().splitlines():
                rows.append(json.loads(line))
        except (OSError, ValueError):
            pass
        return rows

    def write_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        write_text(self.metrics_path, "".join(_line(row) for row in rows), durable=False)

    def keep_metrics(self) -> None:
        """Wait until the rows so far are on the disk, since a checkpoint must not be ahead of them."""
        with contextlib.suppress(OSError), self.metrics_path.open("rb") as file:
            os.fsync(file.fileno())

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        try:
            with self.metrics_path.open("a") as file:
                file.write(_line(row))
        except OSError as error:
            raise RecordError(f"cannot write {self.metrics_path}: {error.strerror}") from error

    def remove_checkpoints(self) -> None:
        folder = self.checkpoints[0].parent
        with contextlib.suppress(OSError):  # checkpoints that stay do no harm: the run has ended
            for path in folder.glob("*"):
                path.unlink(missing_ok=True)
            folder.rmdir()

    def remove_unfinished_checkpoints(self) -> None:
        """Remove what a killed process was writing, which is as large as a checkpoint."""
        with contextlib.suppress(OSError):
            for path in self.checkpoints[0].parent.glob(".*.tmp"):
                path.unlink(missing_ok=True)

    @property
    def claims(self) -> Path:
        return self.path / "claims"

    def claim(self) -> Lease | None:
        """Acquire the lease of this run; None where somebody alive holds it."""
        return lease.acquire(self.claims)

    def is_claimed(self) -> bool:
        """Return whether somebody alive holds the lease of this run."""
        newest = lease.newest(self.claims)
        return newest is not None and not lease.is_expired(newest)

    def holder(self) -> Holder | None:
        """Return who trains this run; None where nobody alive does."""
        return lease.holder(self.claims)

    def is_owned_by(self, pid: int) -> bool:
        """Return whether a process of this host holds the lease of this run, or held it last."""
        newest = lease.newest(self.claims)
        return newest is not None and lease.is_owned_by(newest, pid)

    def is_taken_over(self, pid: int) -> bool:
        """Return whether any other process holds the lease of this run, or held it last."""
        newest = lease.newest(self.claims)
        return newest is not None and not lease.is_owned_by(newest, pid)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(finite(row)) + "\n"


def _plain(value: Any) -> Any:
    """Turn tuples into lists, since yaml.safe_dump knows no tuples."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
