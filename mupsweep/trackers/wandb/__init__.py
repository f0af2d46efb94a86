"""Weights & Biases: one W&B run per training run, one that sums the sweep up, and a saved Workspace.

Every W&B run has an id that is always the same and is opened with resume="allow": the server says which step it holds
last, and only later rows are sent. So a run that was killed, moved to another node, or mirrored weeks later by
`mupsweep sync` ends as if nothing had happened, and pushing again adds nothing. Which runs are whole is asked of the
server: each carries the fingerprint of the records that it was made from.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import re
import shutil
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from mupsweep.schema import one_of, require
from mupsweep.store.run_dir import FAILED, FINISHED, RunDir
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.trackers import RunLogger, fingerprint, require_package

MODES = ("offline", "online")
LONGEST_ID = 64  # characters that W&B allows
MIRRORED = "mirrored"  # the key of a W&B run's summary that holds the fingerprint of its records
COMPLETE = ("finished", "failed", "preempted")  # states of a W&B run of which every row arrived
PARTING = 5.0  # seconds that a process which ends waits for the client's service to end; every row has arrived before


@dataclass(frozen=True)
class Wandb:
    """Mirrors records to W&B.

    Attributes:
        project, entity: where on the server; no entity is the account's default.
        mode: "offline" does nothing until `mupsweep sync`; "online" pushes rows as they are logged.
        workspace: save a Workspace of the sweep's curves and drift, with the package wandb-workspaces.
        init_timeout: seconds to wait for the server before carrying on without it.
        finish_timeout: seconds to wait at the end of a run until every row has arrived.
    """

    name: str = "wandb"
    project: str = "mupsweep"
    entity: str | None = None
    mode: str = "offline"
    workspace: bool = True
    init_timeout: float = 20.0
    finish_timeout: float = 20.0

    def __post_init__(self) -> None:
        one_of(self.mode, MODES, "tracker.mode")
        for key in ("init_timeout", "finish_timeout"):
            require(getattr(self, key) > 0, f"tracker.{key}", getattr(self, key), "positive")
        require_package(self.name, "wandb")

    @property
    def active(self) -> bool:
        return self.mode == "online"

    def open(self, sweep: SweepDir, run: RunDir) -> RunLogger:
        return RunPage(self, sweep, run)

    def held(self, sweep: SweepDir) -> Mapping[str, str]:
        stored = self.stored(sweep)
        run_ids = [row["run_id"] for row in sweep.read_plan()]
        return {run_id: stored[wandb_id(sweep, run_id)] for run_id in run_ids if wandb_id(sweep, run_id) in stored}

    def analysed(self, sweep: SweepDir) -> None:
        from mupsweep.trackers.wandb import summary, workspace

        content = summary.digest(sweep)
        if content is None:
            return
        if self.stored(sweep).get(wandb_id(sweep, "summary")) != content:
            with Session(self, sweep, "summary", "summary", summary.tags(sweep), {"sweep": sweep.name}) as session:
                session.run.log(summary.content(sweep))
                session.run.summary.update(summary.verdicts(sweep) | {MIRRORED: content})
        if self.workspace:
            workspace.save(sweep, self.address()[0], self.project)

    def stored(self, sweep: SweepDir) -> dict[str, str]:
        """The fingerprints of the sweep's complete W&B runs, by W&B id."""
        api, (entity, project) = self._api(), self.address()
        found = {}
        try:
            for run in api.runs(f"{entity}/{project}", filters={"group": sweep.name}, per_page=200, lazy=False):
                if run.state in COMPLETE and MIRRORED in run.summary:
                    found[run.id] = run.summary[MIRRORED]
        except ValueError:  # no such project: the first run makes it
            pass
        return found

    def address(self) -> tuple[str, str]:
        """(entity, project) on the server."""
        return self.entity or self._api().default_entity, self.project

    def _api(self) -> Any:
        import wandb

        start_service()
        return wandb.Api(timeout=round(self.init_timeout) or 1)


class Session:
    """An open W&B run; what the client writes to the disk goes with it, since the records hold it all.

    Attributes:
        run: the client's object.
    """

    def __init__(
        self,
        tracker: Wandb,
        sweep: SweepDir,
        name: str,
        job_type: str,
        tags: Sequence[str],
        config: Mapping[str, Any],
    ) -> None:
        import wandb

        start_service()
        self.folder = tempfile.mkdtemp(prefix="mupsweep-wandb-")
        settings = wandb.Settings(
            init_timeout=tracker.init_timeout,
            finish_timeout=tracker.finish_timeout,
            finish_timeout_raises=True,
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,  # the user, the command line and the machine
            x_disable_stats=True,
            x_save_requirements=False,
        )
        try:
            self.run = wandb.init(
                project=tracker.project,
                entity=tracker.entity,
                id=wandb_id(sweep, name),
                name=name if job_type == "train" else f"{sweep.name} {name}",
                group=sweep.name,
                job_type=job_type,
                tags=[tag[:64] for tag in tags],
                config=dict(config),
                dir=self.folder,
                mode="online",
                resume="allow",
                reinit="create_new",
                settings=settings,
            )
        except BaseException:
            self._clean()
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish(0 if kind is None else 1)

    def finish(self, exit_code: int) -> None:
        """Wait until everything arrived.

        Raises:
            TimeoutError: not in `finish_timeout` seconds.
        """
        try:
            self.run.finish(exit_code)
        finally:
            self._clean()

    def _clean(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class RunPage:
    """A training run as a W&B run."""

    def __init__(self, tracker: Wandb, sweep: SweepDir, run: RunDir) -> None:
        config = yaml.safe_load(run.config_path.read_text())
        labels = [config[group]["name"] for group in ("model", "optimizer", "parametrization")]
        # what people group runs by, where W&B's menus can reach it
        config |= {"curve": "/".join(labels), "size": f"w{config['width']}-d{config['depth']}"}
        self.record, self.tags = run, labels
        self.session = Session(tracker, sweep, run.run_id, "train", labels, config)
        self.shown = self.session.run
        self.first_step = self.shown.starting_step  # the server holds all before
        self.shown.define_metric("tokens")
        self.shown.define_metric("*", step_metric="tokens")

    def add(self, row: Mapping[str, Any]) -> None:
        if row["step"] >= self.first_step:
            values = {k: v for k, v in row.items() if k != "step" and v is not None}
            self.shown.log(values, step=row["step"], commit=True)

    def close(self, status: str) -> None:
        told = {k: v for k, v in (self.record.summary() or {}).items() if v is not None}
        self.shown.summary.update(told | {"status": status, MIRRORED: fingerprint(self.record)})
        self.shown.tags = (*self.tags, status)
        if status not in (*FINISHED, FAILED):
            self.shown.mark_preempting()  # it goes on later
        self.session.finish(0 if status in FINISHED else 1)


def wandb_id(sweep: SweepDir, name: str) -> str:
    """The id of a W&B run: readable where W&B allows it, always the same."""
    plain = f"{sweep.name}-{name}"
    if re.fullmatch(r"[\w.-]+", plain, re.ASCII) and len(plain) <= LONGEST_ID:
        return plain
    return hashlib.sha256(plain.encode()).hexdigest()[:32]


def start_service() -> None:
    """Start the client's service, and keep its remarks off the terminal, its telemetry at home and its end short.

    Its warnings are ours to give. Telemetry of client 0.31 that tells of a service which does not start waits forever,
    for a lock of its own thread.
    """
    import wandb

    with contextlib.suppress(ImportError):
        from wandb.analytics.opentelemetry.opentelemetry_proxy import disable

        disable()
    wandb.setup(wandb.Settings(silent=True)).ensure_service()
    atexit.unregister(leave)
    atexit.register(leave)  # again after every start of a service: it must run before the client's own wait


def leave() -> None:
    """End the client's service, and wait for it but a moment.

    The client waits forever, at the end of a process too. If it gave a server up just before, its word to the service
    may be lost (0.31): then the service waits for the end of this process, and this process for the service.
    """
    import wandb

    def part() -> None:
        with contextlib.suppress(Exception):  # the service is gone
            wandb.teardown()

    parting = threading.Thread(target=part, name="parting", daemon=True)
    parting.start()
    parting.join(PARTING)
