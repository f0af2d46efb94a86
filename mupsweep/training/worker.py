"""A worker: takes the runs of a sweep that nobody trains yet, has their trainer train them and records what happened.

execute -> lease -> the trainer's session -> summary.json -> status.json

torch is imported by trainers that need it, so that a worker which only starts programs is there at once.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from mupsweep.errors import MupsweepError, RecordError
from mupsweep.formatting import nearest
from mupsweep.schema import instantiate
from mupsweep.store.lease import MAX_WORKER_DEATHS, Lease
from mupsweep.store.run_dir import FAILED, PENDING, RUNNING, RunDir
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.config import from_tree, trainers_of
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.sweep.settings import run_config
from mupsweep.sweep.trainer import PlannedTrainer
from mupsweep.sweep.twins import Twins
from mupsweep.trackers.live import LiveTracker
from mupsweep.training.signals import LeaseLost, StopRequested, StopSignal
from mupsweep.training.slot import Slot

log = logging.getLogger("mupsweep")


class Session(Protocol):
    """A trainer that is ready to train runs, one after the other, in this process."""

    def prepare(self, run: RunSpec) -> None:
        """Load what the runs of a variant have in common."""
        ...

    def train(self, run: RunSpec, folder: RunDir, control: LeaseControl) -> dict[str, Any]:
        """Train a run to its end, write the rules that it trains with, and return its summary.

        Raises:
            StopRequested: `control` asked to stop; the run goes on when it is started again.
            LeaseLost: another worker took the run over.
        """
        ...

    def failure_message(self, error: Exception, run: RunSpec) -> str:
        """Say in one line why a run failed; never return where this process could train no other run."""
        ...

    def tidy(self) -> None:
        """Free what the last run used."""
        ...


class Trainer(PlannedTrainer, Protocol):
    """What trains runs: a dataclass whose fields are the keys of its yaml."""

    def work(self, sweep: SweepDir, slot: Slot, stop: StopSignal, take_runs: Callable[[Session], bool]) -> bool:
        """Open a session on the devices of a slot and have it take runs; return False if asked to stop."""
        ...


def execute(
    sweep: SweepDir,
    slot: Slot | None = None,
    on_finished: Callable[[], None] = lambda: None,
    stop: StopSignal | None = None,
    programs: bool = True,
) -> bool:
    """Train the pending runs of a sweep that no other worker holds a lease of, the longest first.

    Args:
        slot: where to train, and which runs; None for all runs on the device that `auto` means.
        on_finished: called after every run.
        stop: the flag that asks for an end; None installs one that stop signals set.
        programs: whether to train also the runs of trainers that start programs of the user's.

    Returns:
        False if it was asked to stop before every run was taken.
    """
    slot, stop = slot or Slot(), stop or StopSignal.install()
    for section in trainers_of(from_tree(sweep.read_config(), sweep.allow_imports)):

        def take_runs(session: Session, section: dict[str, Any] = section) -> bool:
            with LiveTracker(sweep) as tracker:
                return run_main(sweep, slot.run_ids, session, stop, on_finished, tracker, section)

        trainer: Trainer = instantiate(section, "trainer")
        if trainer.runs_program and not programs:
            continue
        if not trainer.work(sweep, slot, stop, take_runs):
            return False
    return True


def run_main(
    sweep: SweepDir,
    run_ids: Sequence[str],
    session: Session,
    stop: StopSignal,
    on_finished: Callable[[], None],
    tracker: LiveTracker,
    trainer: dict[str, Any] | None = None,
) -> bool:
    """Train runs under their leases and write their records; return False if asked to stop.

    Args:
        trainer: the section of the session's trainer, whose runs alone are trained; None for all runs.
    """
    planned = plan.load(sweep)
    runs = select(planned, run_ids)
    if trainer is not None:
        runs = [run for run in runs if run.resolved.variant.trainer == trainer]
    twins, selected = Twins(planned), {run.run_id: place for place, run in enumerate(runs)}
    deferred: list[RunSpec] = []
    for run in chain(runs, deferred):
        folder = sweep.run(run.run_id)
        if folder.has_ended():
            continue
        alike = twins.of(run)
        if record_twin(run, sweep, alike, tracker):
            on_finished()
            continue
        if any(selected.get(twin.run_id, len(runs)) < selected[run.run_id] for twin in alike):
            continue  # whoever trains the first twin records the others
        lease = folder.claim()
        if lease is None:
            continue
        try:
            # Another worker may have finished the run between the first check and the lease.
            if folder.has_ended():
                continue
            if stop.signalled:
                return False
            # A run that keeps killing its workers comes last, or the other runs would never be trained.
            if lease.deaths() >= MAX_WORKER_DEATHS and run not in deferred:
                deferred.append(run)
                continue
            with lease.renewed():
                session.prepare(run)
                with tracker.track(folder):
                    execute_run(run, folder, session, LeaseControl(lease, stop))
        except StopRequested:
            if lease.is_held():
                folder.write_status(PENDING)
            return False
        finally:
            lease.release()
        session.tidy()
        on_finished()
        for twin in alike:
            if record_twin(twin, sweep, [run], tracker):
                on_finished()
    return True


def record_twin(run: RunSpec, sweep: SweepDir, twins: Sequence[RunSpec], tracker: LiveTracker) -> bool:
    """Record for a run what a twin's training came to, if a twin has ended and nobody trains the run itself.

    Returns:
        Whether it did.
    """
    folder = sweep.run(run.run_id)
    trained = next((other for twin in twins if (other := sweep.run(twin.run_id)).has_ended()), None)
    lease = folder.claim() if trained is not None else None
    if trained is None or lease is None:
        return False
    try:
        summary, status = trained.summary() or {}, trained.status()
        if folder.has_ended() or (status["status"] != FAILED and not summary):
            return False
        with tracker.track(folder), log_to(folder):
            log.info("the same training as %s, and not trained again", trained.run_id)
            if status["status"] != FAILED:
                groups = None
                with contextlib.suppress(OSError, ValueError):  # it is for readers, and no result rests on it
                    groups = trained.groups()
                folder.write_rules(run_config(run), groups)
                folder.write_metrics(trained.metrics())
                own = {"run_id": run.run_id, **run.label_columns(), "twin_of": trained.run_id}
                folder.write_summary(summary | own)
            folder.write_status(**status)
            folder.remove_checkpoints()
        return True
    finally:
        lease.release()


def execute_run(run: RunSpec, folder: RunDir, session: Session, control: LeaseControl) -> None:
    """Train one run under its lease and write its records, `status.json` last. A failure is recorded, not raised.

    Raises:
        StopRequested: it was asked to stop; the run is checkpointed.
        RecordError: not even the failure can be recorded.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(log_to(folder))
            if reason := folder.failure():
                folder.forget_failures()
                raise RecordError(reason)
            folder.write_status(RUNNING, durable=False, step=0, steps=run.resolved.steps)
            summary = session.train(run, folder, control)
            if not control.lease.is_held():
                raise LeaseLost
            folder.write_summary(summary)
            folder.write_status(summary["status"])
            folder.remove_checkpoints()
        except StopRequested:
            log.info("stopped as asked; checkpointed")
            raise
        except LeaseLost:
            log.warning("another worker took this run over meanwhile; leaving the records to it")
        except Exception as error:
            log.error("%s", error if isinstance(error, MupsweepError) else traceback.format_exc())
            message = session.failure_message(error, run)
            if not isinstance(error, MupsweepError) and message == one_line(error) and folder.checkpoints[0].is_file():
                message += f"; if it fails again, delete {folder.checkpoints[0].parent} to start the run anew"
            if control.lease.is_held():
                folder.write_status(FAILED, error=message)


def one_line(error: Exception) -> str:
    """The message of an error, with its class where it is not one for users."""
    if isinstance(error, MupsweepError):
        return str(error)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


@contextlib.contextmanager
def log_to(folder: RunDir) -> Iterator[None]:
    """Write log messages to the run's log for the duration of the context."""
    try:
        handler = LogFile(folder.log_path)
    except OSError as error:
        raise RecordError(f"cannot write {folder.log_path}: {error.strerror}") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()


class LogFile(logging.FileHandler):
    """A log whose own write errors are ignored: on a full disk the records decide whether the run can go on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        pass


@dataclass(frozen=True)
class LeaseControl:
    """The control of a run on the process that holds its lease: it ends the run when the lease is lost."""

    lease: Lease
    stop: StopSignal

    def stop_requested(self) -> bool:
        return self.stop.signalled

    def lease_lost(self) -> bool:
        return self.lease.lost


def select(runs: list[RunSpec], names: Sequence[str]) -> list[RunSpec]:
    """Return the runs with these ids, or of sizes with these names; all runs where no name is given."""
    valid = {run.run_id for run in runs} | {run.size.name for run in runs}
    for name in names:
        if name not in valid:
            hint = nearest(name, valid) if len(valid) < 20 else "see mupsweep status SWEEP --runs"
            raise RecordError(f"no run '{name}' in this sweep; {hint}")
    selected = set(names) or valid
    return [run for run in runs if run.run_id in selected or run.size.name in selected]
