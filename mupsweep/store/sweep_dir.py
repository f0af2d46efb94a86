"""Records: what a sweep leaves on disk. Only this room knows the names of its files.

    <sweep>/  config.yaml  plan.jsonl  environment.json  submit-*.sbatch  jobs/  logs/  workers/  results/
    <sweep>/runs/<run-id>/  config.yaml  groups.json  status.json  metrics.jsonl  summary.json  train.log
                            claims/  checkpoint/
                            recipe.json  output/  where a program of the user's trains

A run's `status.json` is written last: without it, or with "running" and a dead owner, the run is trained again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mupsweep.atomic_files import make_folder, read_json, write_json, write_text
from mupsweep.documents import parse_json, parse_yaml
from mupsweep.errors import RecordError, reason
from mupsweep.formatting import nearest
from mupsweep.schema import Consent
from mupsweep.store import lease, records
from mupsweep.store.run_dir import RunDir, _plain

log = logging.getLogger("mupsweep")
FIGURES = "figures"  # the folder of figures in a folder of results

LAW_FILE = "law.json"  # in a folder of results

SECTIONS = {"variants": list, "sweep": dict, "launcher": dict, "tracker": dict}  # what a config.yaml cannot lack


@dataclass(frozen=True)
class SweepDir:
    """The folder of a sweep.

    Attributes:
        path: the folder.
        results_folder: where results are written; None for the sweep's own.
        allow_imports: which of the code outside mupsweep that the sweep's config names the person allows who started
            this command. It goes from command line to command line and is read from no file.
    """

    path: Path
    results_folder: Path | None = None
    allow_imports: Consent = False

    @classmethod
    def open(cls, path: str | Path, allow_imports: Consent = False) -> SweepDir:
        """Open the folder of an existing sweep.

        Raises:
            RecordError: the folder is no sweep; the message names sweeps that may be meant.
        """
        sweep = cls(Path(path), allow_imports=allow_imports)
        if not sweep.plan_path.is_file():
            hint = "start one with mupsweep run"
            for folder in (sweep.path, sweep.path.parent, Path("sweeps")):
                if existing := sorted(str(p.parent) for p in folder.glob("*/plan.jsonl") if p.is_file()):
                    hint = nearest(str(path), existing)
                    break
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

    def script(self, name: str) -> Path:
        """Return the path of a job script, which holds the text that was submitted last."""
        return self.path / f"submit-{name}.sbatch"

    @property
    def workers(self) -> Path:
        """The folder of the records of living workers."""
        return self.path / "workers"

    @property
    def jobs(self) -> Path:
        return self.path / "jobs"

    def read_jobs(self) -> list[dict[str, Any]]:
        """Read the jobs that were ever submitted for this sweep: id, script, and the run ids of every task."""
        recorded = (records.readable_job(read_json(path)) for path in sorted(self.jobs.glob("[0-9]*.json")))
        return [job for job in recorded if job is not None]

    def write_job(self, job_id: str, script: Path, tasks: Sequence[Sequence[str]]) -> None:
        """Record a submitted job in a file of its own, so that no earlier record can be lost."""
        make_folder(self.jobs)
        write_json(self.jobs / f"{job_id}.json", {"job": job_id, "script": script.name, "tasks": tasks})

    @property
    def results(self) -> Path:
        return self.path / "results" if self.results_folder is None else self.results_folder

    @property
    def check_path(self) -> Path:
        """The outcome of a coordinate check of this sweep's config, if one was kept."""
        return self.path / "results" / "check.json"

    @property
    def law_path(self) -> Path:
        """The law over size, tokens and batch, if one was asked for."""
        return self.results / LAW_FILE

    @property
    def figures(self) -> Path:
        return self.results / FIGURES

    @property
    def trackers(self) -> Path:
        """The folder in which trackers keep their own files."""
        return self.path / "trackers"

    @property
    def runs(self) -> Path:
        return self.path / "runs"

    def started(self) -> list[str]:
        """Return the ids of the runs that have a folder."""
        try:
            return [name for name in os.listdir(self.runs) if records.is_run_id(name)]
        except OSError:  # none yet
            return []

    def count_failures(self) -> int:
        """Count the failures of ranks that are recorded of runs without a result."""
        return sum(len(self.run(row["run_id"]).failures()) for row in self.read_plan())

    def held_by(self, pid: int | None) -> RunDir | None:
        """Return the run that a process of this host trains, or trained when it ended."""
        for row in self.read_plan():
            run = self.run(row["run_id"])
            if run.status()["status"] == records.RUNNING and pid is not None and run.is_owned_by(pid):
                return run
        return None

    def run(self, run_id: str) -> RunDir:
        """Return the folder of a run.

        Raises:
            RecordError: this is no id of a run, and might lead out of the sweep.
        """
        records.checked_run_id(run_id, str(self.path))
        return RunDir(self.path / f"runs/{run_id}")  # one join, since joins take most of the time for 100,000 runs

    def state(self, run_id: str) -> dict[str, Any]:
        """Return a run's status, with a run whose owner died as pending."""
        return self.run(run_id).state()

    def counts(self) -> Counter[str]:
        """Count the planned runs in each state."""
        return Counter(self.state(row["run_id"])["status"] for row in self.read_plan())

    def write_config(self, tree: Mapping[str, Any], header: str) -> None:
        """Write the resolved config of the sweep as yaml, under a header of comments."""
        comments = "".join(f"# {line}\n" for line in header.splitlines())
        write_text(self.config_path, comments + yaml.safe_dump(_plain(tree), sort_keys=False, width=110))

    def read_config(self) -> dict[str, Any]:
        try:
            tree = parse_yaml(self.config_path.read_bytes())  # UTF-8 in every locale
            if not isinstance(tree, dict):
                raise ValueError("no mapping")
            for key, kind in SECTIONS.items():
                if not isinstance(tree.get(key), kind):
                    raise ValueError(f"no {key}")
        except (OSError, ValueError) as error:
            raise RecordError(
                f"{self.config_path} cannot be read ({reason(error)}): run the command that made the "
                "sweep again, it writes the file anew and keeps every finished run"
            ) from error
        return tree

    def write_plan(self, rows: Iterable[Mapping[str, Any]]) -> None:
        write_text(self.plan_path, "".join(json.dumps(row) + "\n" for row in rows))

    def read_plan(self) -> list[dict[str, Any]]:
        """Read the planned runs, one mapping each; empty before the first plan."""
        if not self.plan_path.is_file():
            return []
        try:
            lines = self.plan_path.read_text(encoding="utf-8").splitlines()
            rows = parse_json(f"[{','.join(lines)}]")  # as one document the rows share their keys: half the memory
            for number, row in enumerate(rows, 1):
                if wrong := records.wrong_in_planned(row):
                    raise ValueError(f"run {number} is no planned run, {wrong}")
            return rows
        except (OSError, ValueError) as error:
            raise RecordError(
                f"{self.plan_path} is damaged ({reason(error)}): delete it and run the command that made the sweep "
                "again; finished runs are kept"
            ) from error

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the sweep while its plan is extended, so that no command loses the runs of another at the same time.

        The lock is a lease like that of a run, since many network file systems cannot lock.
        """
        folder, pause = self.path / ".planning", 0.02
        while (claim := lease.acquire(folder)) is None:
            time.sleep(pause := min(2 * pause, 1.0))
            if 0.5 < pause < 1.0 and (holder := lease.holder(folder)):  # once, after a second
                log.warning("waiting for %s, which plans this sweep", holder)
        try:
            with claim.renewed():  # a busy Slurm controller takes minutes for a job
                yield
        finally:
            with contextlib.suppress(OSError):
                if claim.is_held():
                    claim.path.unlink()
