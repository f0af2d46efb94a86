"""Checkpoints of one run: what it leaves on disk while it trains, and how it resumes from there bit for bit."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pickle
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mupsweep.atomic_files import write_bytes
from mupsweep.errors import RecordError
from mupsweep.store import records
from mupsweep.store.run_dir import RUNNING, RunDir
from mupsweep.training.build import TrainingSetup
from mupsweep.training.distributed import DistributedContext

log = logging.getLogger("mupsweep")

DIGEST_BYTES = hashlib.sha256().digest_size
PIECE = 2**24  # bytes that are read at once, since a checkpoint may fill half of the memory that a job is given
STATE: dict[str, records.Check] = {  # what the values of a TrainState can be
    "step": records.is_count,
    "losses": lambda value: isinstance(value, list) and all(type(loss) is float for loss in value),
    "seconds": records.is_number,
    "micro_batch": records.or_none(records.is_positive_count),
    "horizon": records.is_count,
    "branching": lambda value: isinstance(value, bool),
    "branches": lambda value: isinstance(value, list) and all(isinstance(branch, dict) for branch in value),
}
STATUS_SECONDS = 0.5  # status.json is refreshed at most this often, for `mupsweep status` and the board


@dataclass
class TrainState:
    """What a checkpoint holds beside weights and optimizer state; the field names are keys of stored checkpoints.

    Attributes:
        losses: the loss of every step so far, in nats per token.
        seconds: the time spent in the training loop, over all attempts.
        micro_batch: the largest micro-batch that fitted in memory, or None where memory never ran out.
        horizon: the index of the horizon (`TrainingConfig.horizons`) that is trained for now.
        branching: whether the run is in the cooldown of a shorter horizon.
        branches: the outcomes of the shorter horizons that have ended.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    micro_batch: int | None = None
    horizon: int = 0
    branching: bool = False
    branches: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Saved:
    """What a checkpoint file holds.

    Attributes:
        network: the tensors of the network by name.
        optimizer: the state dict of every optimizer of the run.
    """

    path: Path
    network: dict[str, Any]
    optimizer: list[dict[str, Any]]
    state: TrainState


@dataclass
class Checkpointer:
    """Checkpoints, rows of metrics and the status of a run. Only rank 0 writes, and only while it holds the lease.

    Attributes:
        interval: seconds between two checkpoints.
        state: the state of the run, which the training loop updates.
        damaged: checkpoint files that could not be read.
        pending_losses: this rank's parts of the losses of the latest steps, still on the device.
        steps: the number of steps that this attempt has taken.
    """

    setup: TrainingSetup
    folder: RunDir
    ranks: DistributedContext
    interval: float
    state: TrainState = field(init=False)
    damaged: set[Path] = field(default_factory=set)
    pending_losses: list[Tensor] = field(default_factory=list)
    steps: int = 0
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.last_save = self.last_status = self.started
        self.state = self.restore()
        forced = self.ranks.broadcast_object(self.folder.fitting_micro_batch())
        fitting = [size for size in (self.state.micro_batch, forced) if size is not None]
        self.state.micro_batch = min(fitting, default=None)  # a resumed run must not run out of memory once more
        self.earlier_seconds = self.state.seconds
        if self.should_write():
            self.folder.remove_unfinished_checkpoints()
            # the steps after the checkpoint are trained again, so their rows go
            self.folder.write_metrics(row for row in self.folder.metrics() if row["step"] <= self.state.step)

    def restore(self) -> TrainState:
        """Load the newest undamaged checkpoint into the run; a fresh state where there is none."""
        return self._load(self._newest() if self.ranks.is_main_process else None) or TrainState()

    def should_write(self) -> bool:
        """Whether this process may write the run's files.

        Another worker may have taken the run over while this process was suspended; it learns so only at its next
        heartbeat, which may come after a write.
        """
        return self.ranks.is_main_process and not self.folder.is_taken_over(os.getpid())

    def due(self) -> bool:
        """Whether the interval has passed and there is something new to save."""
        return self.ranks.is_main_process and self.steps > 0 and time.monotonic() - self.last_save > self.interval

    def save(self) -> None:
        """Write a checkpoint and keep the previous one. Collective: shards are gathered from every rank."""
        content = self._serialise()
        latest, previous = self.folder.checkpoints
        if self.should_write():
            self.folder.keep_metrics()
            if latest.exists() and latest not in self.damaged:
                latest.replace(previous)
            _write(latest, content)
            self.damaged.clear()
        self.last_save = time.monotonic()

    def start_cooldown(self) -> None:
        """Save the trunk, from which the run continues when the cooldown that starts here has ended."""
        content = self._serialise()
        if self.should_write():
            _write(self.folder.trunk_checkpoint, content)
        self.state.branching = True

    def resume_trunk(self, branch: dict[str, Any]) -> None:
        """Return to where the cooldown left the trunk, and keep its outcome, `branch`.

        Raises:
            RecordError: the trunk's checkpoint is damaged; every checkpoint of the run is removed.
        """
        self.read_losses()
        self.clock()
        cooldown, path = self.state, self.folder.trunk_checkpoint
        trunk = self._load(self._read(path) if self.ranks.is_main_process and path.exists() else None)
        if trunk is None:
            if self.should_write():
                self.folder.remove_checkpoints()
            raise RecordError(f"{path} is damaged, so the run cannot go on from its branch: the next try starts anew")
        self.state = replace(
            trunk,
            seconds=cooldown.seconds,
            micro_batch=cooldown.micro_batch,
            horizon=cooldown.horizon + 1,
            branches=[*cooldown.branches, branch],
        )
        self.save()  # a later start would log the trunk's steps twice if it went on from within the cooldown

    def read_losses(self) -> None:
        """Read the pending losses off the device, in one sum over the ranks and one transfer for many steps."""
        if self.pending_losses:
            losses = torch.stack(self.pending_losses)
            self.ranks.all_reduce_sum(losses)
            self.state.losses += losses.tolist()
            self.pending_losses.clear()

    def clock(self) -> float:
        """Bring the run's seconds up to date and return the steps per second of this attempt."""
        elapsed = time.monotonic() - self.started
        self.state.seconds = self.earlier_seconds + elapsed
        return self.steps / max(elapsed, 1e-9)

    def append(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl."""
        if self.should_write():
            self.folder.append_metrics(row)

    def update_status(self, row: dict[str, Any], total_steps: int, tokens_per_second: float) -> None:
        """Refresh status.json, at most once in STATUS_SECONDS."""
        if time.monotonic() - self.last_status <= STATUS_SECONDS or not self.should_write():
            return
        self.folder.write_status(
            RUNNING,
            durable=False,
            step=row["step"],
            steps=total_steps,
            train_loss=row["train_loss"],
            tokens_per_second=tokens_per_second,
        )
        self.last_status = time.monotonic()

    def _serialise(self) -> bytes:
        """The content of a checkpoint file on rank 0: all that the rest of the run depends on, and the digest of it."""
        self.read_losses()
        self.clock()
        saved = {
            "run_id": self.setup.run_id,
            "network": network_state(self.setup, self.ranks),
            "optimizer": self.setup.optimizer.state_dict(),
            **asdict(self.state),
        }
        buffer = io.BytesIO()
        if self.ranks.is_main_process:
            torch.save(saved, buffer)
            buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
        return buffer.getvalue()

    def _newest(self) -> Saved | None:
        """Read the newest undamaged checkpoint; None where there is none."""
        for path in self.folder.checkpoints:
            if not path.exists():
                continue
            saved = self._read(path)
            if saved is not None:
                log.info("resuming at step %d from %s", saved.state.step, path.name)
                return saved
            log.warning("%s is damaged; trying an older one", path)
            self.damaged.add(path)
        return None

    def _read(self, path: Path) -> Saved | None:
        """Read a checkpoint of this run; None if it is damaged."""
        if not _is_whole(path):
            return None
        # What goes to another device is mapped and not read, since a copy may not fit in memory.
        mapped = next(self.setup.network.parameters()).device.type != "cpu"
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except (pickle.UnpicklingError, EOFError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise self._foreign(path) from error
        if not isinstance(saved, dict) or not {"network", "optimizer"} <= saved.keys():
            raise self._foreign(path)
        # Checkpoints of earlier versions do not name their run.
        if saved.pop("run_id", self.setup.run_id) != self.setup.run_id:
            raise self._foreign(path)
        if saved.keys() - {"network", "optimizer"} != {f.name for f in fields(TrainState)}:
            raise RecordError(f"{path} is of another version of mupsweep: delete {path.parent} to start the run anew")
        network, optimizer = saved.pop("network"), saved.pop("optimizer")
        if records.wrong_in(saved, STATE, {}) or len(saved["losses"]) != saved["step"]:
            raise self._foreign(path)
        return Saved(path, network, optimizer, TrainState(**saved))

    def _load(self, saved: Saved | None) -> TrainState | None:
        """Load the checkpoint that rank 0 has read into the run on every rank; return its TrainState."""
        state = self.ranks.broadcast_object(saved and saved.state)
        if state is None:
            return None
        try:
            load_network_state(self.setup, saved.network if saved else {}, self.ranks)
            load_optimizer_state(self.setup, saved.optimizer if saved else None, self.ranks)
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
            # on one of several ranks it may as well be another that has failed
            if isinstance(error, torch.OutOfMemoryError) or saved is None or self.ranks.size > 1:
                raise
            raise self._foreign(saved.path) from error
        return state

    def _foreign(self, path: Path) -> RecordError:
        """The error of a file whose content is no checkpoint of this run, though its digest is right."""
        return RecordError(
            f"{path} holds something else than a checkpoint of this run: delete {path.parent} to start the run anew"
        )


def network_state(setup: TrainingSetup, ranks: DistributedContext) -> dict[str, Tensor]:
    """The full tensors of the network by name; where ranks share them, on rank 0 alone."""
    if not setup.sharded:
        return setup.network.state_dict() if ranks.is_main_process else {}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(setup.network, options=options)  # type: ignore[return-value]


def load_network_state(setup: TrainingSetup, saved: dict[str, Any], ranks: DistributedContext) -> None:
    """Load the full tensors that rank 0 has read into the network of every rank."""
    if ranks.size == 1:
        setup.network.load_state_dict(saved)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(setup.network, saved, options=options)


def load_optimizer_state(setup: TrainingSetup, saved: list[dict[str, Any]] | None, ranks: DistributedContext) -> None:
    """Load what rank 0 has read into the optimizers of every rank, which keeps its share.

    `set_optimizer_state_dict` would do for neither whole matrices, whose state is that of parameters on one rank alone,
    nor optimizers of others, which it steps to make their state.
    """
    optimizer = setup.optimizer
    if ranks.size == 1:
        optimizer.load_state_dict(saved or [])
        return
    shares = []
    for member in range(len(optimizer.members)):
        of_rank_0 = saved[member] if saved is not None else {"state": {}, "param_groups": []}
        param_groups = ranks.broadcast_object(of_rank_0["param_groups"])
        states = {}
        for number in (number for group in param_groups for number in group["params"]):
            # One parameter at a time; a clone, since a view would be sent with all the storage that it looks at.
            state = ranks.broadcast_object(
                {
                    key: value.clone() if isinstance(value, Tensor) else value
                    for key, value in of_rank_0["state"].get(number, {}).items()
                }
            )
            if share := optimizer.own_share(member, number, state):
                states[number] = share
        shares.append({"state": states, "param_groups": param_groups})
    optimizer.load_state_dict(shares)


def _is_whole(path: Path) -> bool:
    """Whether a checkpoint file ends with the digest of all that comes before."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            remaining = os.fstat(file.fileno()).st_size - DIGEST_BYTES
            while remaining > 0 and (piece := file.read(min(remaining, PIECE))):
                digest.update(piece)
                remaining -= len(piece)
            return digest.digest() == file.read()
    except OSError:  # a bad disk
        return False


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, content)
