"""The loop of one run: step, clip, evaluate, notice divergence, checkpoint, resume bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mupsweep.analysis.labels import DIVERGED, DONE
from mupsweep.data import Dataset
from mupsweep.errors import RecordError
from mupsweep.models.loss import DRAWS
from mupsweep.store.run_dir import RunDir
from mupsweep.sweep.config import TrainingConfig
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.training.build import TrainingSetup, generator
from mupsweep.training.checkpoint import Checkpointer, TrainState, mean
from mupsweep.training.devices import autocast, choose_precision, device_name
from mupsweep.training.distributed import OK, SAVE, SINGLE_PROCESS, STOP, DistributedContext, StopRequested
from mupsweep.training.microbatch import MicroBatcher

METRICS_ROWS = 200  # about so many rows of metrics.jsonl per run, whatever its length
RECOMPILE_LIMIT = (
    64  # of a compiled network, by shape and purpose; torch would run further ones uncompiled, in other bits
)
DIVERGED_RATIO = 1.05  # a mean loss above the start's by this factor is divergence, not noise


class TrainControl(Protocol):
    """What the loop asks its owner at every step."""

    def stop_requested(self) -> bool: ...

    def heartbeat(self) -> None: ...


def train(
    run: RunSpec,
    built: TrainingSetup,
    data: Dataset,
    folder: RunDir,
    device: torch.device,
    control: TrainControl,
    ranks: DistributedContext = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Train a run to its end and return its summary.

    Raises:
        Interrupted: `control` of any rank asked to stop; a checkpoint was written after a finished step.
    """
    training = run.recipe.training
    total, context = run.recipe.steps, run.size.context
    per_step = training.batch_size * context
    interval, horizons = max(1, total // METRICS_ROWS), training.horizons(total)
    evaluations = {round(total * (i + 1) / training.evals) for i in range(training.evals)}
    precision = choose_precision(training.precision, device)
    network = compiled(built.network) if training.compile else built.network

    journal = Checkpointer(built, folder, ranks.is_main_process, 60 * training.checkpoint_minutes)
    if ranks.differ(journal.progress.step):
        raise RecordError(
            f"the processes that train this run together found different checkpoints in {folder.path}: a network file "
            "system showed one of them old files; run the same command again"
        )
    batches = MicroBatcher(ranks, training.micro_batch, journal.progress.micro_batch, built.reapply_fsdp)
    while True:
        progress = journal.progress
        decay, end = horizons[progress.horizon]
        word = ranks.all_reduce_max(STOP if control.stop_requested() else SAVE if journal.due() else OK)
        if word in (SAVE, STOP) and journal.steps:  # or there is nothing new to keep
            journal.save()
        if word == STOP:
            raise StopRequested
        control.heartbeat()
        if progress.step == decay and end < total and not progress.branching:
            journal.start_cooldown()
        factor = lr_factor(progress.step, total, training, end)
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
        journal.steps += 1

        at_end = progress.step == end
        if at_end or progress.step % interval == 0 or (progress.step in evaluations and not progress.branching):
            journal.flush()
            row = row_of(progress, interval, per_step, run.base_lr * factor, grad_norm)
            bad_step = diverged_at(progress.losses, training.divergence_patience, total)
            if bad_step is None and (at_end or (progress.step in evaluations and not progress.branching)):
                row |= evaluate(network, data, run, precision, device, batches)
                if not math.isfinite(row["val_loss"]):
                    bad_step = progress.step
            if progress.branching:
                if at_end or bad_step is not None:
                    journal.resume_trunk(
                        {"horizon": end * per_step, **outcome(progress.losses, row, bad_step, per_step)}
                    )
                continue
            journal.append(row)
            rate = journal.clock() * per_step
            if bad_step is not None or at_end:
                return summarise(run, progress, row, bad_step, rate, precision, device, ranks.size)
            journal.show(row, total, rate)


def compiled(network: nn.Module) -> Callable[..., Tensor]:
    """The network through torch.compile."""
    torch._dynamo.reset()  # what runs of other sizes in this process left
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    return torch.compile(network, dynamic=False)


def row_of(
    progress: TrainState, interval: int, tokens_per_step: int, lr: float, grad_norm: Tensor | None
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


def lr_factor(step: int, total: int, training: TrainingConfig, end: int | None = None) -> float:
    """The LR of `step` (from 0) / the peak LR: linear warm-up, then the schedule down to `min_lr_frac`.

    Args:
        end: of the branch that the step belongs to; None: of the run, after `total` steps.
    """
    warmup, end = training.warmup_steps(total), end or total
    if step < warmup:
        return (step + 1) / warmup
    start = {"wsd": end - round(training.decay_fraction * end), "constant": end}.get(training.schedule, warmup)
    done = min(1.0, max(0.0, (step - start) / max(1, end - start)))
    shape = 0.5 * (1 + math.cos(math.pi * done)) if training.schedule == "cosine" else 1 - done
    return training.min_lr_frac + (1 - training.min_lr_frac) * shape


def observe_curvature(
    network: Callable[..., Tensor],
    built: TrainingSetup,
    inputs: Tensor,
    seed: int,
    step: int,
    precision: str,
    batches: MicroBatcher | None = None,
) -> None:
    """Gradients of sqrt(tokens) times the loss for labels drawn from the predictions, never clipped: their squares
    estimate the diagonal of the Gauss-Newton matrix (Liu et al. 2305.14342, Algorithm 2).

    Args:
        inputs: this rank's rows; the draws are those of the whole batch, whoever computes it.
    """
    batches = batches or MicroBatcher()
    whole = (len(inputs) * batches.ranks.size, inputs.shape[1])
    draws = torch.randint(DRAWS, whole, generator=generator("curvature", seed, step))

    def loss_of(inputs: Tensor, draws: Tensor) -> Tensor:
        with autocast(precision, inputs.device):
            return math.prod(whole) ** 0.5 * network(inputs, draws=draws)

    batches.backward(built.network.parameters(), loss_of, inputs, batches.ranks.rows(draws).to(inputs.device))
    built.optimizer.observe(step)


def clip(built: TrainingSetup) -> Tensor | None:
    """Clip the global gradient norm where the rule allows it; the norm before clipping."""
    if built.clip is None:
        return None
    norm = nn.utils.clip_grad_norm_(built.network.parameters(), built.clip)
    return norm.full_tensor() if built.reapply_fsdp else norm  # type: ignore[attr-defined]


def evaluate(
    network: Callable[..., Tensor],
    data: Dataset,
    run: RunSpec,
    precision: str,
    device: torch.device,
    batches: MicroBatcher,
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


def outcome(losses: list[float], row: dict[str, Any], bad_step: int | None, per_step: int) -> dict[str, Any]:
    """What a run, or a branch of one, came to."""
    tail = max(1, len(losses) // 20)
    return {
        "status": DONE if bad_step is None else DIVERGED,
        "steps": len(losses),
        "tokens": len(losses) * per_step,
        "train_loss": mean(losses[-tail:]),
        "val_loss": row.get("val_loss") if bad_step is None else None,
        "val_bits_per_byte": row.get("val_bits_per_byte") if bad_step is None else None,
        "diverged_at_step": bad_step,
    }


def summarise(
    run: RunSpec,
    progress: TrainState,
    row: dict[str, Any],
    bad_step: int | None,
    rate: float,
    precision: str,
    device: torch.device,
    devices: int,
) -> dict[str, Any]:
    """The run's summary.json: a line of results/runs.csv and the settings that only the machine could decide."""
    per_step = run.recipe.training.batch_size * run.size.context
    *branches, (_, last) = run.recipe.training.horizons(run.recipe.steps)
    reached = progress.branches
    lost = [{"horizon": end * per_step, "status": DIVERGED, "val_loss": None} for _, end in branches[len(reached) :]]
    return {
        "run_id": run.run_id,
        **run.identity(),
        **outcome(progress.losses, row, bad_step, per_step),
        **({"horizon": last * per_step, "branches": [*reached, *lost]} if branches else {}),
        "seconds": progress.seconds,
        "tokens_per_second": rate,
        "device": device_name(device),
        "devices": devices,
        "precision": precision,
    }


def _to_device(block: Any, device: torch.device) -> Tensor:
    tokens = torch.from_numpy(block)
    return tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens.to(device)
