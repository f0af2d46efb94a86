"""The loop of one run: step, clip, evaluate, notice divergence, checkpoint, resume bit for bit."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mupsweep.batches import Batches
from mupsweep.build import Built, generator
from mupsweep.config import TrainingConfig
from mupsweep.data import Dataset
from mupsweep.files import write_bytes
from mupsweep.models.loss import DRAWS
from mupsweep.plan import RunSpec
from mupsweep.ranks import ALONE, OK, SAVE, STOP, Interrupted, Ranks
from mupsweep.records import DIVERGED, DONE, RUNNING, RunDir

log = logging.getLogger("mupsweep")

ROWS = 200  # about so many rows of metrics.jsonl per run, whatever its length
DIVERGED_RATIO = 1.05  # a mean loss above the start's by this factor is divergence, not noise
DIGEST_BYTES = hashlib.sha256().digest_size
STATUS_SECONDS = 0.5  # how often status.json is refreshed for whoever watches


class Control(Protocol):
    """What the loop asks its owner at every step."""

    def stop_requested(self) -> bool: ...

    def heartbeat(self) -> None: ...


@dataclass
class Progress:
    """What a checkpoint holds beside weights and optimizer state."""

    step: int = 0
    losses: list[float] = field(default_factory=list)  # of every step, nats per token
    seconds: float = 0.0  # in the loop, over all attempts
    micro_batch: int | None = None  # that memory asked for


@dataclass
class Journal:
    """What a run leaves on disk while it trains: checkpoints, rows of metrics, its status. Written by rank 0 alone.

    Attributes:
        seconds: between two checkpoints.
        pending: losses of the latest steps, still on the device.
    """

    built: Built
    folder: RunDir
    progress: Progress
    leads: bool
    seconds: float
    pending: list[Tensor] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.saved = self.shown = self.started
        self.first_step, self.spent = self.progress.step, self.progress.seconds
        if self.leads:
            self.folder.write_metrics(row for row in self.folder.metrics() if row["step"] <= self.first_step)

    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return self.leads and time.monotonic() - self.saved > self.seconds

    def save(self) -> None:
        """Write a checkpoint; what is sharded is collected from every rank."""
        flush(self.pending, self.progress)
        self.clock()
        state = {"network": self.built.network.state_dict(), "optimizer": self.built.optimizer.state_dict()}
        if self.leads:
            save_checkpoint({**state, **asdict(self.progress)}, self.folder)
        self.saved = time.monotonic()

    def clock(self) -> float:
        """Steps per second of this attempt."""
        passed = time.monotonic() - self.started
        self.progress.seconds = self.spent + passed
        return (self.progress.step - self.first_step) / max(passed, 1e-9)

    def append(self, row: dict[str, Any]) -> None:
        """Log a row of metrics."""
        if self.leads:
            self.folder.append_metrics(row)

    def show(self, row: dict[str, Any], total: int, rate: float) -> None:
        """Tell whoever watches, now and then."""
        if not self.leads or time.monotonic() - self.shown <= STATUS_SECONDS:
            return
        details = {"step": row["step"], "steps": total, "train_loss": row["train_loss"], "tokens_per_second": rate}
        self.folder.write_status(RUNNING, durable=False, **details)
        self.shown = time.monotonic()


def train(
    run: RunSpec,
    built: Built,
    data: Dataset,
    folder: RunDir,
    device: torch.device,
    control: Control,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train a run to its end and return its summary.

    Raises:
        Interrupted: `control` of any rank asked to stop; a checkpoint was written after a finished step.
    """
    training = run.recipe.training
    total, context = run.recipe.steps, run.size.context
    interval = max(1, total // ROWS)
    evaluations = {round(total * (i + 1) / training.evals) for i in range(training.evals)}
    precision = choose_precision(training.precision, device)
    network = compiled(built.network) if training.compile else built.network

    progress = resume(built, folder)
    batches = Batches(ranks, training.micro_batch, progress.micro_batch, built.rewrap)
    journal = Journal(built, folder, progress, ranks.leads, 60 * training.checkpoint_minutes)
    while progress.step < total:
        word = ranks.exchange(STOP if control.stop_requested() else SAVE if journal.due() else OK)
        if word in (SAVE, STOP):
            journal.save()
        if word == STOP:
            raise Interrupted
        control.heartbeat()
        factor = lr_factor(progress.step, total, training)
        block = data.train_batch(context, training.batch_size, run.seed, progress.step)
        tokens = _to_device(ranks.rows(block), device)
        if built.optimizer.curvature_due(progress.step):
            observe_curvature(network, built, tokens[:, :-1], run.seed, progress.step, precision, batches)
        loss_of = partial(loss_of_rows, network, precision)
        journal.pending.append(batches.backward(built.network.parameters(), loss_of, tokens))
        progress.micro_batch = batches.forced
        grad_norm = clip(built)
        built.optimizer.step(factor)
        progress.step += 1

        if progress.step % interval == 0 or progress.step in evaluations:
            flush(journal.pending, progress)
            row = row_of(progress, interval, training.batch_size * context, run.base_lr * factor, grad_norm)
            bad_step = diverged_at(progress.losses, training.divergence_patience, total)
            if bad_step is None and progress.step in evaluations:
                row |= evaluate(network, data, run, precision, device, batches)
                if not math.isfinite(row["val_loss"]):
                    bad_step = progress.step
            journal.append(row)
            rate = journal.clock() * training.batch_size * context
            if bad_step is not None or progress.step == total:
                return summarise(run, progress, row, bad_step, rate, precision, device, ranks.size)
            journal.show(row, total, rate)
    raise AssertionError("a finished run has no checkpoint to resume from")


def compiled(network: nn.Module) -> Callable[..., Tensor]:
    """The network through torch.compile."""
    torch._dynamo.reset()  # runs of other sizes in this process would use up the limit of recompilations
    return torch.compile(network, dynamic=False)


def row_of(
    progress: Progress, interval: int, tokens_per_step: int, lr: float, grad_norm: Tensor | None
) -> dict[str, Any]:
    """A row of metrics; its loss is the mean since the row before."""
    row = {
        "step": progress.step,
        "tokens": progress.step * tokens_per_step,
        "train_loss": mean(progress.losses[-interval:]),
        "lr": lr,
    }
    return row if grad_norm is None else row | {"grad_norm": float(grad_norm)}


def loss_of_rows(network: Callable[..., Tensor], precision: str, tokens: Tensor) -> Tensor:
    """Mean loss of the targets [:, 1:] after the inputs [:, :-1]."""
    with autocast(precision, tokens.device):
        return network(tokens[:, :-1], tokens[:, 1:])


def lr_factor(step: int, total: int, training: TrainingConfig) -> float:
    """The LR of `step` (from 0) / the peak LR: linear warm-up, then the schedule down to `min_lr_frac`."""
    warmup = training.warmup_steps(total)
    if step < warmup:
        return (step + 1) / warmup
    start = {"wsd": total - round(training.decay_fraction * total), "constant": total}.get(training.schedule, warmup)
    done = min(1.0, max(0.0, (step - start) / max(1, total - start)))
    shape = 0.5 * (1 + math.cos(math.pi * done)) if training.schedule == "cosine" else 1 - done
    return training.min_lr_frac + (1 - training.min_lr_frac) * shape


def choose_precision(wanted: str, device: torch.device) -> str:
    """`auto` is bf16 where the device multiplies bf16 matrices in hardware, else fp32."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and torch.cpu._is_amx_tile_supported() else "fp32"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 matrix products over fp32 weights, or nothing."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def observe_curvature(
    network: Callable[..., Tensor],
    built: Built,
    inputs: Tensor,
    seed: int,
    step: int,
    precision: str,
    batches: Batches | None = None,
) -> None:
    """Gradients of sqrt(tokens) times the loss for labels drawn from the predictions, never clipped: their squares
    estimate the diagonal of the Gauss-Newton matrix (Liu et al. 2305.14342, Algorithm 2).

    Args:
        inputs: this rank's rows; the draws are those of the whole batch, whoever computes it.
    """
    batches = batches or Batches()
    whole = (len(inputs) * batches.ranks.size, inputs.shape[1])
    draws = torch.randint(DRAWS, whole, generator=generator("curvature", seed, step))

    def loss_of(inputs: Tensor, draws: Tensor) -> Tensor:
        with autocast(precision, inputs.device):
            return math.prod(whole) ** 0.5 * network(inputs, draws=draws)

    batches.backward(built.network.parameters(), loss_of, inputs, batches.ranks.rows(draws).to(inputs.device))
    built.optimizer.observe(step)


def clip(built: Built) -> Tensor | None:
    """Clip the global gradient norm where the rule allows it; the norm before clipping."""
    if built.clip is None:
        return None
    norm = nn.utils.clip_grad_norm_(built.network.parameters(), built.clip)
    return norm.full_tensor() if built.rewrap else norm  # type: ignore[attr-defined]


def evaluate(
    network: Callable[..., Tensor],
    data: Dataset,
    run: RunSpec,
    precision: str,
    device: torch.device,
    batches: Batches,
) -> dict[str, float]:
    """Mean loss over the fixed validation batches, in nats per token and in bits per byte of text."""
    training, context = run.recipe.training, run.size.context
    tokens, n_bytes = 0, 0
    nats = torch.zeros((), dtype=torch.float64)
    for index in range(min(training.eval_batches, data.validation_batches(context, training.batch_size))):
        block = data.validation_batch(context, training.batch_size, index)
        mine = _to_device(batches.ranks.rows(block), device)

        def compute(mine: Tensor = mine) -> float:
            pieces = (piece for (piece,) in batches.pieces(mine))
            return sum(loss_of_rows(network, precision, p).item() * p[:, 1:].numel() for p in pieces)

        with torch.no_grad():
            nats += batches.fitting(compute, len(mine))
        tokens += block[:, 1:].size
        n_bytes += data.byte_count(block[:, 1:])
    batches.ranks.add([nats])
    mean_loss = nats.item() / tokens
    return {"val_loss": mean_loss, "val_bits_per_byte": nats.item() / math.log(2) / n_bytes}


def diverged_at(losses: list[float], patience: float, total: int) -> int | None:
    """The step (from 1) at which a run is lost, or None.

    Lost is a loss that is not finite, or a mean over the last `patience` (a fraction of the run below 1, else steps)
    above DIVERGED_RATIO times the loss of the first step.
    """
    for step, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            return step
    window = max(1, round(patience * total) if patience < 1 else round(patience))
    if len(losses) > window and mean(losses[-window:]) > DIVERGED_RATIO * losses[0]:
        return len(losses)
    return None


def summarise(
    run: RunSpec,
    progress: Progress,
    row: dict[str, Any],
    bad_step: int | None,
    rate: float,
    precision: str,
    device: torch.device,
    devices: int,
) -> dict[str, Any]:
    """The run's summary.json: a line of results/runs.csv and the settings that only the machine could decide."""
    tail = max(1, progress.step // 20)
    return {
        "run_id": run.run_id,
        **run.identity(),
        "status": DONE if bad_step is None else DIVERGED,
        "steps": progress.step,
        "tokens": row["tokens"],
        "train_loss": mean(progress.losses[-tail:]),
        "val_loss": row.get("val_loss") if bad_step is None else None,
        "val_bits_per_byte": row.get("val_bits_per_byte") if bad_step is None else None,
        "diverged_at_step": bad_step,
        "seconds": progress.seconds,
        "tokens_per_second": rate,
        "device": device_name(device),
        "devices": devices,
        "precision": precision,
    }


def save_checkpoint(state: dict[str, Any], folder: RunDir) -> None:
    """Everything that the rest of the run depends on, followed by its digest; the checkpoint before is kept."""
    latest, previous = folder.checkpoints
    latest.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    if latest.exists():
        latest.replace(previous)
    write_bytes(latest, content + hashlib.sha256(content).digest())


def resume(built: Built, folder: RunDir) -> Progress:
    """Load the newest whole checkpoint into the run; a fresh start where there is none."""
    for path in folder.checkpoints:
        if not path.exists():
            continue
        stored = path.read_bytes()
        content, digest = stored[:-DIGEST_BYTES], stored[-DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != digest:
            log.warning("%s is damaged; trying an older one", path)
            continue
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        built.network.load_state_dict(saved.pop("network"))
        built.optimizer.load_state_dict(saved.pop("optimizer"))
        log.info("resuming at step %d from %s", saved["step"], path.name)
        return Progress(**saved)
    return Progress()


def flush(pending: list[Tensor], progress: Progress) -> None:
    """Read the pending losses off the device, once for many steps."""
    if pending:
        progress.losses += torch.stack(pending).tolist()
        pending.clear()


def device_name(device: torch.device) -> str:
    """What results call the device: cpu, or the accelerator's own name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def mean(values: list[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def _to_device(block: Any, device: torch.device) -> Tensor:
    tokens = torch.from_numpy(block)
    return tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens.to(device)
