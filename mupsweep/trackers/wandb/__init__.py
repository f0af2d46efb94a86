"""Weights & Biases: one W&B run per training run, one that summarises the sweep, and a saved Workspace.

The id of a W&B run follows from the sweep and the run, and it is opened with resume="allow": the server names the last
step that it holds, and only later rows are sent. So a run that was killed, moved to another node, or mirrored weeks
later by `mupsweep sync` ends as if nothing had happened, and pushing again adds nothing. Each W&B run carries the
fingerprint of the records that it was made from, so the server knows which runs are logged in full.

W&B never takes the id of a deleted run again, so such a run goes on under the id with the next number. The summary's
id also has a digest of the sweep's variants, and its config names them: another sweep of this name has another summary.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mupsweep.atomic_files import make_folder
from mupsweep.errors import ConfigError, RecordError
from mupsweep.schema import one_of, require
from mupsweep.store.run_dir import FAILED, FINISHED, RunDir
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.trackers import RunLogger, fingerprint, require_package

log = logging.getLogger("mupsweep")

MODES = ("offline", "online")
PROJECT = "mupsweep"
SUMMARY = "summary"  # the name and the job type of the run that summarises a sweep
MAX_DELETED = 20  # runs of one name that may have been deleted on the server
MAX_ID_LENGTH = 64  # characters that W&B allows
FIRST_INIT_TIMEOUT = 4.0  # seconds of the first attempt to open a run, after which its id may turn out to be deleted
MIRRORED = "mirrored"  # the key of a W&B run's summary that holds the fingerprint of its records
COMPLETE = ("finished", "failed", "preempted")  # states of a W&B run of which every row arrived
SHUTDOWN_TIMEOUT = 5.0  # seconds that an ending process waits for the client's service; every row has arrived by then


@dataclass(frozen=True)
class Wandb:
    """Mirrors records to W&B.

    Attributes:
        project: the project on the server; None for WANDB_PROJECT, or else "mupsweep".
        entity: the user or team on the server; None for WANDB_ENTITY, or else the account's default.
        mode: "offline" does nothing until `mupsweep sync`; "online" pushes rows as they are logged; None for
            WANDB_MODE, or else "offline".
        workspace: save a Workspace of the sweep's curves and drift, with the package wandb-workspaces.
        init_timeout: seconds to wait for the server before carrying on without it.
        finish_timeout: seconds to wait at the end of a run until every row has arrived.
    """

    name: str = "wandb"
    project: str | None = None
    entity: str | None = None
    mode: str | None = None
    workspace: bool = True
    init_timeout: float = 20.0
    finish_timeout: float = 20.0

    def __post_init__(self) -> None:
        if self.mode is not None:
            one_of(self.mode, MODES, "tracker.mode")
        for key in ("init_timeout", "finish_timeout"):
            require(getattr(self, key) > 0, f"tracker.{key}", getattr(self, key), "positive")
        require_package(self.name, "wandb")

    @property
    def active(self) -> bool:
        return (self.mode or os.environ.get("WANDB_MODE")) == "online"

    def open(self, sweep: SweepDir, run: RunDir) -> RunLogger:
        return WandbLogger(self, sweep, run)

    def held(self, sweep: SweepDir) -> Mapping[str, str]:
        stored = self.stored_runs(sweep)
        held: dict[str, str] = {}
        for run_id in (row["run_id"] for row in sweep.read_plan()):
            found = next((stored[key] for key in numbered(wandb_id(sweep, run_id)) if key in stored), None)
            if found is not None and found.fingerprint is not None:
                held[run_id] = found.fingerprint
        return held

    def analysed(self, sweep: SweepDir) -> None:
        from mupsweep.trackers.wandb import summary, workspace

        with summary.of_whole_results(sweep):
            digest = summary.digest(sweep)
        if digest is None:
            return
        stored = self.stored_runs(sweep)
        variants = sorted({row["variant"] for row in sweep.read_plan()})
        name = summary_id(sweep, variants, stored)
        if name not in stored or stored[name].fingerprint != digest:
            with summary.of_whole_results(sweep):
                tags, content, verdicts = summary.tags(sweep), summary.content(sweep), summary.verdicts(sweep)
            config = {"sweep": sweep.name, "variants": variants}
            with Session(self, sweep, name, SUMMARY, SUMMARY, tags, config) as session:
                session.run.log(content)
                session.run.summary.update(verdicts | {MIRRORED: digest})
        if self.workspace:
            workspace.save(sweep, *self.address())

    def stored_runs(self, sweep: SweepDir) -> dict[str, StoredRun]:
        """Return the sweep's runs on the server by W&B id, and those of other sweeps of its name."""
        api, (entity, project) = self._api(), self.address()
        by_id: dict[str, StoredRun] = {}
        try:
            for run in api.runs(f"{entity}/{project}", filters={"group": sweep.name}, per_page=200, lazy=False):
                mirrored = run.summary.get(MIRRORED) if run.state in COMPLETE else None
                variants = run.config.get("variants")
                by_id[run.id] = StoredRun(mirrored, tuple(variants) if isinstance(variants, list) else None)
        except ValueError:  # there is no such project yet; the first run creates it
            pass
        return by_id

    def address(self) -> tuple[str, str]:
        """Return (entity, project) on the server."""
        return self.entity or os.environ.get("WANDB_ENTITY") or self._api().default_entity, self.project_name

    @property
    def project_name(self) -> str:
        return self.project or os.environ.get("WANDB_PROJECT") or PROJECT

    def _api(self) -> Any:
        import wandb

        require_login()
        start_service()
        return wandb.Api(timeout=round(self.init_timeout) or 1)


@dataclass(frozen=True)
class StoredRun:
    """What the server says of a W&B run.

    Attributes:
        fingerprint: of the records that it was made from; None where not all of them have arrived.
        variants: the digests of the sweep's variants, which a summary names since it is told apart by them.
    """

    fingerprint: str | None
    variants: tuple[str, ...] | None


class Session:
    """An open W&B run; the client's files are removed when it ends, since the records hold all of it.

    Attributes:
        run: the client's run object.
    """

    def __init__(
        self,
        tracker: Wandb,
        sweep: SweepDir,
        run_id: str,
        name: str,
        job_type: str,
        tags: Sequence[str],
        config: Mapping[str, Any],
    ) -> None:
        import wandb

        require_login()
        start_service()
        self.folder = client_folder()

        def open_run(numbered_id: str, init_timeout: float) -> Any:
            settings = wandb.Settings(
                init_timeout=init_timeout,
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
            return wandb.init(
                project=tracker.project_name,
                entity=tracker.entity,
                id=numbered_id,
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

        try:
            self.run = open_first_free(open_run, run_id, tracker.init_timeout)
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
        config = run.config()
        labels = [config[group]["name"] for group in ("model", "optimizer", "parametrization")]
        # what people group runs by, as keys that W&B's menus offer
        config |= {"curve": "/".join(labels), "size": f"w{config['width']}-d{config['depth']}"}
        self.record, self.tags = run, labels
        self.session = Session(tracker, sweep, wandb_id(sweep, run.run_id), run.run_id, "train", labels, config)
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
    """Return the id of a W&B run, a function of the sweep and the name; readable where W&B allows its characters.

    The name of a training run ends in a digest of all that it trains, so two sweeps of one name share no other run.
    """
    return _id_of(f"{sweep.name}-{name}")


def summary_id(sweep: SweepDir, variants: Sequence[str], stored: Mapping[str, StoredRun]) -> str:
    """Return the id of a sweep's summary: the one that the server holds for its variants, or else a new one.

    Args:
        sweep: the sweep.
        variants: digests of its variants, sorted.
        stored: the runs on the server of this sweep and others of its name.
    """
    for key, run in stored.items():
        if run.variants is not None and set(run.variants) & set(variants):
            return key
    # Older versions named summaries by the sweep alone: it is this sweep's where no other sweep has runs there.
    old = wandb_id(sweep, SUMMARY)
    planned = {key for row in sweep.read_plan() for key in numbered(wandb_id(sweep, row["run_id"]))}
    others = [key for key, run in stored.items() if run.variants is None and key != old and key not in planned]
    if old in stored and stored[old].variants is None and not others:
        return old
    return _id_of(f"{sweep.name}-{SUMMARY}-{hashlib.sha256(' '.join(variants).encode()).hexdigest()[:8]}")


def numbered(run_id: str) -> Iterator[str]:
    """Yield the ids that a run may have on the server, each where the one before was deleted there."""
    yield run_id
    for number in range(2, MAX_DELETED + 1):
        yield f"{run_id[: MAX_ID_LENGTH - 3]}-{number}"


def open_first_free(open_run: Callable[[str, float], Any], run_id: str, init_timeout: float) -> Any:
    """Open a run under the first of its ids that was not deleted on the server, and return the client's run.

    The client takes the refusal of a deleted id for a conflict that passes, and asks again until its timeout, which is
    all that bounds this request alone. So the first attempt is short; where its failure has another reason, such as a
    slow server, a second one has the rest of the time.

    Args:
        open_run: opens an id, within a number of seconds.
        run_id: the run's first id.
        init_timeout: seconds for each id.

    Raises:
        ConfigError: all ids of the run were deleted.
    """
    import wandb

    longer = init_timeout - FIRST_INIT_TIMEOUT
    attempts = [FIRST_INIT_TIMEOUT, longer] if longer > FIRST_INIT_TIMEOUT else [init_timeout]
    for numbered_id in numbered(run_id):
        for attempt, seconds in enumerate(attempts, 1):
            try:
                return open_run(numbered_id, seconds)
            except wandb.Error as error:
                if was_deleted(error):
                    break
                if attempt == len(attempts):
                    raise
                shut_down()  # the client's service takes the id for in use
                start_service()
        log.warning(
            "the W&B run %s was deleted there, and W&B never takes its id again: it goes on under another", numbered_id
        )
    raise ConfigError(f"W&B has deleted {MAX_DELETED} runs {run_id}: choose another project or sweep.name")


def was_deleted(error: BaseException) -> bool:
    """Return whether the server refused an id because its run was deleted."""
    return re.search(r"previously created and deleted", str(error)) is not None


def require_login() -> None:
    """Check that the client has a login, without a question.

    Raises:
        ConfigError: it has none; the message says what to do.
    """
    import wandb

    try:
        from wandb.sdk.lib.wbauth import authenticate_session
    except ImportError:  # another version of the client, which says so itself
        return
    host = wandb.setup(wandb.Settings(silent=True)).settings.base_url
    if authenticate_session(host=host, source="mupsweep", prompt=False, update_session=False) is None:
        raise ConfigError(f"no login for {host}: run `wandb login`, or set WANDB_API_KEY (and WANDB_BASE_URL)")


def client_folder() -> str:
    """Make a folder for the client's files of one run, in WANDB_DIR where that can be written."""
    parent = os.environ.get("WANDB_DIR")
    if parent:
        with contextlib.suppress(OSError, RecordError):
            make_folder(Path(parent))
            return tempfile.mkdtemp(prefix="mupsweep-wandb-", dir=parent)
    return tempfile.mkdtemp(prefix="mupsweep-wandb-")


def _id_of(plain: str) -> str:
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
