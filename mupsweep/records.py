"""Records: what a sweep leaves on disk. The only module that knows file names (design: every view reads these).

    <sweep>/  config.yaml  plan.jsonl  environment.json  logs/  results/
    <sweep>/runs/<run-id>/  config.yaml  groups.json  status.json  metrics.jsonl  summary.json  train.log
                            claims/  checkpoint/

Files are written to a temporary name and renamed, `status.json` last. A run is owned through numbered claim files,
which are only ever added: whoever creates the next number owns the run, so that two workers never train one run, on
any file system with atomic link or exclusive create.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mupsweep.errors import RecordError

PENDING, RUNNING, DONE, DIVERGED, FAILED = "pending", "running", "done", "diverged", "failed"
FINISHED = (DONE, DIVERGED)  # results; never trained again
STALE_SECONDS = 600.0  # a claim of another host without a heartbeat for so long is taken over


def write_text(path: Path, text: str, durable: bool = True) -> None:
    """Replace `path` by `text` in one step; `durable` also waits until it is on the disk."""
    write_bytes(path, text.encode(), durable)


def write_bytes(path: Path, content: bytes, durable: bool = True) -> None:
    """Replace `path` by `content` in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise RecordError(
            f"cannot write {path}: {error.strerror}; free space or choose another folder with out=DIR"
        ) from error


def write_json(path: Path, content: Any, durable: bool = True) -> None:
    """Replace `path` by readable json; a float that is not finite becomes null."""
    write_text(path, json.dumps(_finite(content), indent=2) + "\n", durable)


def read_json(path: Path) -> dict[str, Any] | None:
    """The mapping in a json file; None where there is none or it cannot be parsed."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


@dataclass(frozen=True)
class SweepDir:
    """A sweep's folder."""

    path: Path

    @classmethod
    def open(cls, path: str | Path) -> SweepDir:
        """An existing sweep.

        Raises:
            RecordError: the folder is none, naming the sweeps beside it.
        """
        sweep = cls(Path(path))
        if not sweep.plan_path.is_file():
            beside = sorted(p.parent.name for p in sweep.path.parent.glob("*/plan.jsonl"))
            hint = f"sweeps in {sweep.path.parent}: {', '.join(beside)}" if beside else "start one with mupsweep run"
            raise RecordError(f"{path} is not a sweep (it has no plan.jsonl); {hint}")
        return sweep

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def plan_path(self) -> Path:
        return self.path / "plan.jsonl"

    @property
    def environment_path(self) -> Path:
        return self.path / "environment.json"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def results(self) -> Path:
        return self.path / "results"

    @property
    def figures(self) -> Path:
        return self.results / "figures"

    @property
    def trackers(self) -> Path:
        """Where a tracker keeps its own files."""
        return self.path / "trackers"

    def run(self, run_id: str) -> RunDir:
        return RunDir(self.path / "runs" / run_id)

    def state(self, run_id: str) -> dict[str, Any]:
        """A run's status as it is: what its owner left as running when it died is pending again."""
        folder = self.run(run_id)
        status = folder.status()
        return {"status": PENDING} if status["status"] == RUNNING and not folder.is_claimed() else status

    def counts(self) -> Counter[str]:
        """How many runs are in each state."""
        return Counter(self.state(row["run_id"])["status"] for row in self.read_plan())

    def write_config(self, tree: Mapping[str, Any], header: str) -> None:
        """The resolved config of the sweep, readable and reloadable, under a header of comments."""
        comments = "".join(f"# {line}\n" for line in header.splitlines())
        write_text(self.config_path, comments + yaml.safe_dump(_plain(tree), sort_keys=False, width=110))

    def read_config(self) -> dict[str, Any]:
        try:
            tree = yaml.safe_load(self.config_path.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise RecordError(
                f"{self.config_path} cannot be read ({str(error).splitlines()[0]}): run the command that made the "
                "sweep again, it writes the file anew and keeps every finished run"
            ) from error
        return tree

    def write_plan(self, rows: Iterable[Mapping[str, Any]]) -> None:
        write_text(self.plan_path, "".join(json.dumps(row) + "\n" for row in rows))

    def read_plan(self) -> list[dict[str, Any]]:
        """The planned runs, one mapping each; empty before the first plan."""
        if not self.plan_path.is_file():
            return []
        try:
            return [json.loads(line) for line in self.plan_path.read_text().splitlines()]
        except ValueError as error:
            raise RecordError(
                f"{self.plan_path} is damaged ({error}): delete it and run the command that made the sweep again; "
                "finished runs are kept"
            ) from error

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held while the plan is extended; two commands planning at once take turns where the file system can lock."""
        self.path.mkdir(parents=True, exist_ok=True)
        import fcntl

        with (self.path / ".lock").open("w") as file:
            with contextlib.suppress(OSError):  # a file system without locks: plans are idempotent, so go on
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


@dataclass(frozen=True)
class RunDir:
    """One run's folder. Its name is the run id."""

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
        """(latest, the one before)."""
        return self.path / "checkpoint" / "latest.pt", self.path / "checkpoint" / "previous.pt"

    def status(self) -> dict[str, Any]:
        """What status.json says; pending where it is missing or damaged."""
        return read_json(self.status_path) or {"status": PENDING}

    def is_open(self) -> bool:
        """Whether the run still needs training: anything but a result."""
        return self.status()["status"] not in FINISHED

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
        """The parameter groups that the run trains with."""
        return json.loads(self.groups_path.read_text())

    def write_rules(self, config: Mapping[str, Any], groups: Any) -> None:
        """What the run is: its resolved config and the parameter groups it trains with."""
        write_text(self.config_path, yaml.safe_dump(_plain(config), sort_keys=False, width=110), durable=False)
        write_json(self.groups_path, groups, durable=False)

    def metrics(self) -> list[dict[str, Any]]:
        """The logged rows, in order of steps, up to the first that was not written whole."""
        rows = []
        try:
            for line in self.metrics_path.read_text().splitlines():
                rows.append(json.loads(line))
        except (OSError, ValueError):
            pass
        return rows

    def write_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        write_text(self.metrics_path, "".join(_line(row) for row in rows), durable=False)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        try:
            with self.metrics_path.open("a") as file:
                file.write(_line(row))
        except OSError as error:
            raise RecordError(f"cannot write {self.metrics_path}: {error.strerror}") from error

    def remove_checkpoints(self) -> None:
        for path in self.checkpoints:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.checkpoints[0].parent.rmdir()

    def claim(self) -> Claim | None:
        """Own this run, or None where somebody alive does."""
        folder = self.path / "claims"
        folder.mkdir(parents=True, exist_ok=True)
        numbers = sorted(int(p.stem) for p in folder.glob("[0-9]*.json"))
        if numbers and not _is_free(folder / _claim_name(numbers[-1])):
            return None
        path = folder / _claim_name(numbers[-1] + 1 if numbers else 0)
        owner = _owner()
        return Claim(path, owner) if _create(path, json.dumps(owner)) else None

    def is_claimed(self) -> bool:
        """Whether somebody alive owns this run."""
        newest = self._newest_claim()
        return newest is not None and not _is_free(newest)

    def owner_pid(self) -> int | None:
        """The process that owns this run, or owned it last."""
        newest = self._newest_claim()
        return None if newest is None else (read_json(newest) or {}).get("pid")

    def _newest_claim(self) -> Path | None:
        return max((self.path / "claims").glob("[0-9]*.json"), default=None)


@dataclass
class Claim:
    """The right to train a run, until released or the owner dies."""

    path: Path
    owner: dict[str, Any]
    beat: float = field(default_factory=time.monotonic)

    def heartbeat(self) -> None:
        """Tell other hosts that the owner lives; cheap enough for every step."""
        if time.monotonic() - self.beat > STALE_SECONDS / 20:
            os.utime(self.path)
            self.beat = time.monotonic()

    def is_held(self) -> bool:
        """False once another worker took the run over, for instance after this process was suspended for long."""
        return max(self.path.parent.glob("[0-9]*.json")) == self.path

    def release(self) -> None:
        write_json(self.path, {**self.owner, "released": True}, durable=False)


def _claim_name(number: int) -> str:
    return f"{number:04d}.json"


def _owner() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "pid": os.getpid(),
        "born": _born(os.getpid()),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "taken": time.time(),
    }


def _is_free(path: Path) -> bool:
    owner = read_json(path)
    if owner is None or owner.get("released"):
        return True
    if owner.get("host") == socket.gethostname() and owner.get("boot") == _boot_id():
        return _born(int(owner["pid"])) != owner.get("born")
    return time.time() - path.stat().st_mtime > STALE_SECONDS


def _create(path: Path, text: str) -> bool:
    """Create `path` with its whole content, or return False because it exists."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
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


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _born(pid: int) -> str | None:
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


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(_finite(row)) + "\n"


def _finite(value: Any) -> Any:
    """`value` with every float that json cannot hold as None."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def _plain(value: Any) -> Any:
    """Tuples as lists: yaml.safe_dump knows no tuples."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
