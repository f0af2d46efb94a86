"""The folder of one run: its files, its status and its lease."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mupsweep.analysis.labels import DIVERGED, DONE
from mupsweep.atomic_files import create_text, finite, make_folder, read_json, write_json, write_text
from mupsweep.documents import parse_json, parse_yaml
from mupsweep.errors import RecordError, reason
from mupsweep.store import lease, records
from mupsweep.store.lease import Lease
from mupsweep.store.records import FAILED as FAILED
from mupsweep.store.records import PENDING as PENDING
from mupsweep.store.records import RUNNING as RUNNING

FINISHED = (DONE, DIVERGED)  # these are results: such a run is not trained again
MAX_RESTARTS = 2  # of the processes that train a run together, before the run has failed
METRICS_ROWS = 200  # of metrics.jsonl, which a run aims at, whatever its length


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
        return records.readable_status(read_json(self.status_path))

    def seconds_since_status(self) -> float:
        """Return how long ago the status was written; 0 where there is none."""
        try:
            return time.time() - self.status_path.stat().st_mtime
        except OSError:
            return 0.0

    def state(self) -> dict[str, Any]:
        """Return the status; a run whose worker died, or whose summary is lost, is pending."""
        status = self.status()
        is_dead = status["status"] == RUNNING and not self.is_claimed()
        is_lost = status["status"] in FINISHED and self.summary() is None
        return {"status": PENDING} if is_dead or is_lost else status

    def has_ended(self) -> bool:
        """Return whether the run has a result or failed, so that no worker takes it."""
        return self.status()["status"] in (*FINISHED, FAILED)

    def is_open(self) -> bool:
        """Return whether the run still needs training: it has no result, or its summary is damaged."""
        return self.status()["status"] not in FINISHED or self.summary() is None

    def write_status(self, status: str, durable: bool = True, **details: Any) -> None:
        write_json(self.status_path, {"status": status, **details}, durable)

    def summary(self) -> dict[str, Any] | None:
        """Read summary.json; None where it is missing or holds no mapping.

        Raises:
            RecordError: it holds values that no run can have, or is that of another run.
        """
        summary = read_json(self.summary_path)
        if summary is not None and (wrong := records.wrong_in_summary(summary, self.run_id)):
            raise self.no_summary(wrong)
        return summary

    def no_summary(self, wrong: str) -> RecordError:
        """The error of a summary.json that is none, with what is wrong with it."""
        return RecordError(
            f"{self.summary_path} is no summary of this run, {wrong}: delete it and run the command that made the "
            "sweep again, which trains this run anew"
        )

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_json(self.summary_path, summary)

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    def config(self) -> dict[str, Any]:
        """Read the resolved config of the run.

        Raises:
            RecordError: it is missing or damaged.
        """
        try:
            config = parse_yaml(self.config_path.read_bytes())
            for section in ("model", "optimizer", "parametrization"):
                if not isinstance(config, dict) or not isinstance(config.get(section), dict):
                    raise ValueError(f"no {section}")
                if not records.is_name(config[section].get("name")):
                    raise ValueError(f"no {section}.name")
            if wrong := records.wrong_in(config, records.SIZE, records.CHANGE):
                raise ValueError(wrong)
        except (OSError, ValueError) as error:
            raise RecordError(f"{self.config_path} cannot be read ({reason(error)})") from error
        return config

    @property
    def groups_path(self) -> Path:
        return self.path / "groups.json"

    def groups(self) -> list[dict[str, Any]]:
        """Read the parameter groups that the run trains with."""
        return parse_json(self.groups_path.read_bytes())

    def write_rules(self, config: Mapping[str, Any], groups: Any = None) -> None:
        """Write what the run is: its resolved config, and the parameter groups that it trains with if they are ours."""
        write_text(self.config_path, yaml.safe_dump(_plain(config), sort_keys=False, width=110), durable=False)
        if groups is not None:
            write_json(self.groups_path, groups, durable=False)

    @property
    def recipe_path(self) -> Path:
        """Every number that a program of the user's may train the run with."""
        return self.path / "recipe.json"

    @property
    def output(self) -> Path:
        """The folder of a program of the user's."""
        return self.path / "output"

    @property
    def process_path(self) -> Path:
        """The running program of the user's."""
        return self.path / "process.json"

    def metrics(self) -> list[dict[str, Any]]:
        """Read the logged rows, in order of steps, up to the first that was not written whole or cannot be."""
        rows: list[dict[str, Any]] = []
        with contextlib.suppress(OSError, ValueError):
            for line in self.metrics_path.read_bytes().splitlines():
                row = parse_json(line)
                if records.wrong_in(row, records.METRICS, records.METRICS_OPTIONS):
                    break
                rows.append(row)
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

    def record_failure(
        self, reason: str, micro_batch: int | None = None, final: bool = False, replace: bool = False
    ) -> None:
        """Record why the processes that train this run together end; the first of them to do so has its say.

        Args:
            micro_batch: the micro-batch to go on with, where memory ran out; it is no failure of the run then.
            final: whether to start them again would be in vain.
            replace: whether to replace what another process has recorded.
        """
        claim = lease.newest(self.claims)
        path = self.checkpoints[0].parent / f"failure-{claim.stem if claim else 0}.json"
        make_folder(path.parent)
        write = write_text if replace else create_text
        write(path, json.dumps({"reason": reason, "micro_batch": micro_batch, "final": final}))

    def failure(self) -> str | None:
        """Return why this run has failed, where its processes failed once too often; else None."""
        failures = [record for record in self.failures() if record["micro_batch"] is None]
        if len(failures) > MAX_RESTARTS or any(record["final"] for record in failures):
            return str(failures[-1]["reason"])
        return None

    def fitting_micro_batch(self) -> int | None:
        """Return the micro-batch to go on with after the processes of this run ran out of memory; else None."""
        return min((size for record in self.failures() if (size := record["micro_batch"])), default=None)

    def forget_failures(self) -> None:
        """Let the processes of this run fail as often again."""
        for path in self.checkpoints[0].parent.glob("failure-*.json"):
            path.unlink(missing_ok=True)

    def failures(self) -> list[dict[str, Any]]:
        """Read what the processes of this run recorded of their failures, in order of leases."""
        paths = sorted(self.checkpoints[0].parent.glob("failure-*.json"), key=lambda path: (len(path.name), path.name))
        return [record for record in map(read_json, paths) if record is not None and records.is_failure(record)]

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

    def holder(self) -> str | None:
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
