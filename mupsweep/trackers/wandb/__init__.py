"""Weights & Biases: one W&B run per training run, one that summarises the sweep, and a saved Workspace.

The id of a W&B run follows from the sweep and the run, and it is opened with resume="allow": the server names the last
step that it holds, and only later rows are sent. So a run that was killed, moved to another node, or mirrored weeks
later by `mupsweep sync` ends as if nothing had happened, and pushing again adds nothing. Each W&B run carries the
fingerprint of the records that it was made from, so the server knows which runs are logged in full.
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
MAX_ID_LENGTH = 64  # characters that W&B allows
MIRRORED = "mirrored"  # the key of a W&B run's summary that holds the fingerprint of its records
COMPLETE = ("finished", "failed", "preempted")  # states of a W&B run of which every row arrived
SHUTDOWN_TIMEOUT = 5.0  # seconds that an ending process waits for the client's service; every row has arrived by then


@dataclass(frozen=True)
class Wandb:
    """Mirrors records to W&B.

    Attributes:
        project: the project on the server.
        entity: the user or team on the server; None for the account's default.
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
        return WandbLogger(self, sweep, run)

    def held(self, sweep: SweepDir) -> Mapping[str, str]:
        fingerprints = self.fingerprints(sweep)
        wandb_ids = {row["run_id"]: wandb_id(sweep, row["run_id"]) for row in sweep.read_plan()}
        return {run_id: fingerprints[key] for run_id, key in wandb_ids.items() if key in fingerprints}

    def analysed(self, sweep: SweepDir) -> None:
        from mupsweep.trackers.wandb import summary, workspace

        content = summary.digest(sweep)
        if content is None:
            return
        if self.fingerprints(sweep).get(wandb_id(sweep, "summary")) != content:
            with Session(self, sweep, "summary", "summary", summary.tags(sweep), {"sweep": sweep.name}) as session:
                session.run.log(summary.content(sweep))
                session.run.summary.update(summary.verdicts(sweep) | {MIRRORED: content})
        if self.workspace:
            workspace.save(sweep, self.address()[0], self.project)

    def fingerprints(self, sweep: SweepDir) -> dict[str, str]:
        """Return the fingerprints of the sweep's complete W&B runs, by W&B id."""
        api, (entity, project) = self._api(), self.address()
        by_id = {}
        try:
            for run in api.runs(f"{entity}/{project}", filters={"group": sweep.name}, per_page=200, lazy=False):
                if run.state in COMPLETE and MIRRORED in run.summary:
                    by_id[run.id] = run.summary[MIRRORED]
        except ValueError:  # there is no such project yet; the first run creates it
            pass
        return by_id

    def address(self) -> tuple[str, str]:
        """Return (entity, project) on the server."""
        return self.entity or self._api().default_entity, self.project

    def _api(self) -> Any:
        import wandb

        start_service()
        return wandb.Api(timeout=round(self.init_timeout) or 1)


class Session:
    """An open W&B run; the client's files are removed when it ends, since the records hold all of it.

    Attributes:
        run: the client's run object.
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
            x_disable_meta=True,  # no user name, command line or machine
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
            self._remove_files()
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish(0 if kind is None else 1)

    def finish(self, exit_code: int) -> None:
        """End the run and wait until every row has arrived.

        Raises:
            TimeoutError: they have not arrived within `finish_timeout` seconds.
        """
        try:
            self.run.finish(exit_code)
        finally:
            self._remove_files()

    def _remove_files(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class WandbLogger:
    """Logs a training run as a W&B run."""

    def __init__(self, tracker: Wandb, sweep: SweepDir, run: RunDir) -> None:
        config = yaml.safe_load(run.config_path.read_text())
        labels = [config[group]["name"] for group in ("model", "optimizer", "parametrization")]
        # what people group runs by, as keys that W&B's menus offer
        config |= {"curve": "/".join(labels), "size": f"w{config['width']}-d{config['depth']}"}
        self.record, self.tags = run, labels
        self.session = Session(tracker, sweep, run.run_id, "train", labels, config)
        self.wandb_run = self.session.run
        self.first_step = self.wandb_run.starting_step  # the server holds the steps before it
        self.wandb_run.define_metric("tokens")
        self.wandb_run.define_metric("*", step_metric="tokens")

    def add(self, row: Mapping[str, Any]) -> None:
        if row["step"] >= self.first_step:
            values = {k: v for k, v in row.items() if k != "step" and v is not None}
            self.wandb_run.log(values, step=row["step"], commit=True)

    def close(self, status: str) -> None:
        summary = {k: v for k, v in (self.record.summary() or {}).items() if v is not None}
        self.wandb_run.summary.update(summary | {"status": status, MIRRORED: fingerprint(self.record)})
        self.wandb_run.tags = (*self.tags, status)
        if status not in (*FINISHED, FAILED):
            self.wandb_run.mark_preempting()  # it will be resumed
        self.session.finish(0 if status in FINISHED else 1)


def wandb_id(sweep: SweepDir, name: str) -> str:
    """Return the id of a W&B run, a function of the sweep and the name; readable where W&B allows its characters."""
    plain = f"{sweep.name}-{name}"
    if re.fullmatch(r"[\w.-]+", plain, re.ASCII) and len(plain) <= MAX_ID_LENGTH:
        return plain
    return hashlib.sha256(plain.encode()).hexdigest()[:32]


def start_service() -> None:
    """Start the client's service without its terminal output and its telemetry, and bound its shutdown.

    Warnings about the tracker are given by this package instead. Telemetry of client 0.31 about a service that does
    not start waits forever, for a lock that its own thread holds.
    """
    import wandb

    with contextlib.suppress(ImportError):
        from wandb.analytics.opentelemetry.opentelemetry_proxy import disable

        disable()
    wandb.setup(wandb.Settings(silent=True)).ensure_service()
    atexit.unregister(shut_down)
    atexit.register(shut_down)  # anew after every start of a service, since it must run before the client's own handler


def shut_down() -> None:
    """End the client's service, and wait for it for SHUTDOWN_TIMEOUT seconds at most.

    The client itself waits forever, at the end of a process too. If it has just given a server up, its message to the
    service may be lost (0.31): then the service waits for this process to end, and this process for the service.
    """
    import wandb

    def tear_down() -> None:
        with contextlib.suppress(Exception):  # the service has ended already
            wandb.teardown()

    thread = threading.Thread(target=tear_down, name="wandb-teardown", daemon=True)
    thread.start()
    thread.join(SHUTDOWN_TIMEOUT)
