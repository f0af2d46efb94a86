"""The journal of one run: what it leaves on disk while it trains, and how it goes on from there bit for bit."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mupsweep.atomic_files import write_bytes
from mupsweep.errors import RecordError
from mupsweep.store.run_dir import RUNNING, RunDir
from mupsweep.training.build import TrainingSetup

log = logging.getLogger("mupsweep")

DIGEST_BYTES = hashlib.sha256().digest_size
STATUS_SECONDS = 0.5  # how often status.json is refreshed for whoever watches


@dataclass
class TrainState:
    """What a checkpoint holds beside weights and optimizer state.

    Attributes:
        losses: of every step, nats per token.
        seconds: in the loop, over all attempts.
        micro_batch: that memory asked for.
        horizon: which of the run's horizons comes next.
        branching: whether the steps are those of a branch, which ends before the run.
        branches: what the branches so far came to.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    micro_batch: int | None = None
    horizon: int = 0
    branching: bool = False
    branches: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Checkpointer:
    """Checkpoints, rows of metrics and the status of a run. Written by rank 0 alone, while the run is its own.

    Attributes:
        interval: seconds between two checkpoints.
        pending: losses of the latest steps, still on the device.
        steps: how many this attempt has taken.
        damaged: checkpoints that are.
    """

    built: TrainingSetup
    folder: RunDir
    is_main_process: bool
    interval: float
    progress: TrainState = field(init=False)
    damaged: set[Path] = field(default_factory=set)
    pending: list[Tensor] = field(default_factory=list)
    steps: int = 0
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.saved = self.shown = self.started
        self.progress = self.resumed()
        self.spent = self.progress.seconds
        if self.writes():
            self.folder.remove_unfinished_checkpoints()
            self.folder.write_metrics(row for row in self.folder.metrics() if row["step"] <= self.progress.step)

    def resumed(self) -> TrainState:
        """Load the newest whole checkpoint into the run; a fresh start where there is none."""
        for path in self.folder.checkpoints:
            if not path.exists():
                continue
            if (progress := self._loaded(path)) is not None:
                log.info("resuming at step %d from %s", progress.step, path.name)
                return progress
            log.warning("%s is damaged; trying an older one", path)
            self.damaged.add(path)
        return TrainState()

    def writes(self) -> bool:
        """Whether the files are this process's to write. Another worker may have taken the run over while this process
        was suspended, which it notices at its next heartbeat only."""
        return self.is_main_process and not self.folder.is_taken_over(os.getpid())

    def due(self) -> bool:
        """Whether it is time for a checkpoint, and there is something new to keep."""
        return self.is_main_process and self.steps > 0 and time.monotonic() - self.saved > self.interval

    def save(self) -> None:
        """Write a checkpoint, and keep the one before; what is sharded is collected from every rank."""
        content = self._content()
        latest, previous = self.folder.checkpoints
        if self.writes():
            self.folder.keep_metrics()
            if latest.exists() and latest not in self.damaged:
                latest.replace(previous)
            _write(latest, content)
            self.damaged.clear()
        self.saved = time.monotonic()

    def start_cooldown(self) -> None:
        """Remember where the run stands; what follows is a branch of it."""
        content = self._content()
        if self.writes():
            _write(self.folder.trunk_checkpoint, content)
        self.progress.branching = True

    def resume_trunk(self, branch: dict[str, Any]) -> None:
        """A branch has ended with `branch`: back to where it left."""
        self.flush()
        self.clock()
        ended, path = self.progress, self.folder.trunk_checkpoint
        trunk = self._loaded(path) if path.exists() else None
        if trunk is None:
            if self.writes():
                self.folder.remove_checkpoints()
            raise RecordError(f"{path} is damaged, so the run cannot go on from its branch: the next try starts anew")
        self.progress = replace(
            trunk,
            seconds=ended.seconds,
            micro_batch=ended.micro_batch,
            horizon=ended.horizon + 1,
            branches=[*ended.branches, branch],
        )

    def flush(self) -> None:
        """Read the pending losses off the device, once for many steps."""
        if self.pending:
            self.progress.losses += torch.stack(self.pending).tolist()
            self.pending.clear()

    def clock(self) -> float:
        """Steps per second of this attempt."""
        passed = time.monotonic() - self.started
        self.progress.seconds = self.spent + passed
        return self.steps / max(passed, 1e-9)

    def append(self, row: dict[str, Any]) -> None:
        """Log a row of metrics."""
        if self.writes():
            self.folder.append_metrics(row)

    def show(self, row: dict[str, Any], total: int, rate: float) -> None:
        """Tell whoever watches, now and then."""
        if time.monotonic() - self.shown <= STATUS_SECONDS or not self.writes():
            return
        details = {"step": row["step"], "steps": total, "train_loss": row["train_loss"], "tokens_per_second": rate}
        self.folder.write_status(RUNNING, durable=False, **details)
        self.shown = time.monotonic()

    def _content(self) -> bytes:
        """Everything that the rest of the run depends on, followed by its digest."""
        self.flush()
        self.clock()
        buffer = io.BytesIO()
        state = {"network": self.built.network.state_dict(), "optimizer": self.built.optimizer.state_dict()}
        if self.is_main_process:
            torch.save({**state, **asdict(self.progress)}, buffer)
        buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
        return buffer.getvalue()

    def _loaded(self, path: Path) -> TrainState | None:
        """What a checkpoint holds, its weights and state loaded into the run; None where it is damaged."""
        try:
            stored = path.read_bytes()
        except OSError:  # a bad disk
            return None
        content, digest = stored[:-DIGEST_BYTES], stored[-DIGEST_BYTES:]
        del stored  # it may be as large as the memory that a job is given
        if hashlib.sha256(content).digest() != digest:
            return None
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if saved.keys() - {"network", "optimizer"} != {f.name for f in fields(TrainState)}:
            raise RecordError(f"{path} is of another version of mupsweep: delete {path.parent} to start the run anew")
        self.built.network.load_state_dict(saved.pop("network"))
        self.built.optimizer.load_state_dict(saved.pop("optimizer"))
        return TrainState(**saved)


def mean(values: list[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, content)
