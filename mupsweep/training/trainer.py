"""The training loop of one run: step, clip, evaluate, notice divergence, checkpoint, resume bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mupsweep.analysis.labels import DIVERGED, DONE
from mupsweep.data import Dataset
from mupsweep.models.loss import DRAWS
from mupsweep.store.run_dir import METRICS_ROWS, RunDir
from mupsweep.sweep.config import TrainingConfig
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.training.build import TrainingSetup, generator
from mupsweep.training.checkpoint import Checkpointer, TrainState
from mupsweep.training.devices import autocast, choose_precision, device_name
from mupsweep.training.distributed import SINGLE_PROCESS, DistributedContext, Signal, SignalExchange
from mupsweep.training.divergence import diverged_at
from mupsweep.training.microbatch import MicroBatcher
from mupsweep.training.norm_tracker import NormTracker
from mupsweep.training.signals import LeaseLost, StopRequested

RECOMPILE_LIMIT = 64  # graphs of a compiled network; beyond it torch would run eagerly, which gives other bits


class TrainControl(Protocol):
    """What the training loop asks whoever started it at every step."""

    def stop_requested(self) -> bool: ...

    def lease_lost(self) -> bool:
        """Whether another host took this process for dead and trains the run."""
        ...


def train(
    run: RunSpec,
    setup: TrainingSetup,
    data: Dataset,
    folder: RunDir,
    device: torch.device,
    control: TrainControl,
    ranks: DistributedContext = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Train a run to its end and return its summary.

    Raises:
        StopRequested: `control` of some rank asked to stop; a checkpoint was written after the last finished step.
        LeaseLost: another worker trains the run.
    """
    training = run.resolved.training
    total_steps, context = run.resolved.steps, run.size.context
    tokens_per_step = training.batch_size * context
    log_interval = max(1, total_steps // METRICS_ROWS)
    eval_steps = {round(total_steps * (i + 1) / training.evals) for i in range(training.evals)}
    norm_tracker = NormTracker(run, setup)
    horizons = training.horizons(total_steps)  # (first step of the cooldown, last step); the run's own is the last
    precision = choose_precision(training.precision, device)
    if training.compile:  # within DistributedDataParallel, as the network is kept for the next run of its size
        compiled(setup.network)
    network, no_sync = data_parallel(setup, ranks, find_unused=run.resolved.model.inferred)

    checkpointer = Checkpointer(setup, folder, ranks, 60 * training.checkpoint_minutes)
    micro_batcher = MicroBatcher(ranks, training.micro_batch, checkpointer.state.micro_batch, no_sync)
    exchange = SignalExchange(ranks)
    loss_of = partial(mean_loss, network, precision)

    while True:
        state = checkpointer.state
        cooldown_start, horizon = horizons[state.horizon]

        # Save or stop, or leave. All ranks do it before the same step, since every rank contributes to a checkpoint.
        act_on(exchange(local_signal(control, checkpointer)), checkpointer)

        # Where the cooldown of a shorter horizon begins, keep the trunk: the run returns to it after the cooldown.
        if state.step == cooldown_start and horizon < total_steps and not state.branching:
            checkpointer.start_cooldown()

        # The batch depends on the seed and the step alone, so that a resumed run and every rank see the same one.
        batch = data.train_batch(context, training.batch_size, run.seed, state.step)
        tokens = to_device(ranks.local_shard(batch), device)

        # DistributedDataParallel orders its sums by its first backward pass, which is therefore taken twice: then a
        # resumed run sums in the order of one that was never stopped.
        if checkpointer.steps == 0 and ranks.size > 1 and not setup.sharded:
            micro_batcher.backward(setup.network.parameters(), loss_of, tokens)

        # Second-order optimizers observe the curvature now and then, before the gradient that they use it for.
        if setup.optimizer.curvature_due(state.step):
            observed = tokens
            if setup.optimizer.observes_new_batch:
                observed = to_device(ranks.local_shard(curvature_batch(data, run, state.step)), device)
            observe_curvature(network, setup, observed[:, :-1], run.seed, state.step, precision, micro_batcher)

        # Forward and backward. The loss stays on the device: to read it here would make every step wait for it.
        loss = micro_batcher.backward(setup.network.parameters(), loss_of, tokens)
        checkpointer.pending_losses.append(loss)
        state.micro_batch = micro_batcher.oom_micro_batch  # a resumed run must not run out of memory once more

        # Update the weights, of which the tracker keeps a copy where their change is to be measured.
        norm_tracker.before_step(state)
        grad_norm = clip(setup)
        lr_multiplier = lr_factor(state.step, total_steps, training, horizon)
        setup.optimizer.step(lr_multiplier)
        state.step += 1
        checkpointer.steps += 1

        # Most steps end here: only logged steps read the losses and look for divergence.
        at_horizon = state.step == horizon
        evaluates = at_horizon or (state.step in eval_steps and not state.branching)
        logs = evaluates or state.step % log_interval == 0
        if not logs and not norm_tracker.due:
            continue
        checkpointer.read_losses()
        row = metrics_row(state, log_interval, tokens_per_step, run.base_lr * lr_multiplier, grad_norm)
        bad_step = diverged_at(state.losses, training.divergence_patience, total_steps) if logs else None
        row |= norm_tracker.after_step()
        if evaluates and bad_step is None:
            row |= evaluate(network, data, run, precision, device, micro_batcher)
            if not math.isfinite(row["val_loss"]):
                bad_step = state.step
        ended = at_horizon or bad_step is not None

        # A cooldown logs no rows, since the metrics are the trunk's; its outcome is kept, and the trunk goes on.
        if state.branching:
            if ended:
                branch = {"horizon": horizon * tokens_per_step}
                checkpointer.resume_trunk(branch | outcome(state.losses, row, bad_step, tokens_per_step))
            continue

        checkpointer.append(row)
        tokens_per_second = checkpointer.clock() * tokens_per_step
        if ended:
            return summarise(run, state, row, bad_step, tokens_per_second, precision, device, ranks.size)
        checkpointer.update_status(row, total_steps, tokens_per_second)


def local_signal(control: TrainControl, checkpointer: Checkpointer) -> Signal:
    """What this rank alone would do before the next step."""
    stop_requested = control.stop_requested()
    if control.lease_lost():
        return Signal.LEASE_LOST
    if stop_requested:
        return Signal.STOP
    return Signal.SAVE if checkpointer.due() else Signal.OK


def act_on(signal: Signal, checkpointer: Checkpointer) -> None:
    """Save, stop or leave the run, as the ranks have agreed.

    Raises:
        StopRequested: some rank was asked to stop; the run is checkpointed.
        LeaseLost: another worker trains the run.
    """
    if signal in (Signal.SAVE, Signal.STOP) and checkpointer.steps > 0:  # else nothing is new since the last one
        checkpointer.save()
    if signal == Signal.STOP:
        raise StopRequested
    if signal == Signal.LEASE_LOST:
        raise LeaseLost


def data_parallel(
    setup: TrainingSetup, ranks: DistributedContext, find_unused: bool
) -> tuple[nn.Module, Callable[[], AbstractContextManager[object]]]:
    """The network that averages gradients over the ranks during its backward pass, and its `no_sync`.

    Args:
        find_unused: whether a pass may leave parameters out, as a network of the user's may.
    """
    if ranks.size == 1 or setup.sharded:
        return setup.network, nullcontext
    network = DistributedDataParallel(
        setup.network,
        init_sync=False,  # every rank draws or reads equal weights
        gradient_as_bucket_view=True,
        find_unused_parameters=find_unused,
    )
    network.broadcast_buffers = False  # they are constant; the option's name changed in torch 2.13, this one did not
    return network, network.no_sync


def compiled(network: nn.Module) -> nn.Module:
    """Have torch.compile run a network, one graph per shape; one that an earlier run compiled keeps its graphs."""
    if network._compiled_call_impl is None:
        torch._dynamo.reset()  # graphs that runs of other sizes left in this process
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        network.compile(dynamic=False)
    return network


def metrics_row(
    state: TrainState, log_interval: int, tokens_per_step: int, lr: float, grad_norm: Tensor | None
) -> dict[str, Any]:
    """A row of metrics.jsonl, whose loss is the mean since the row before."""
    row = {
        "step": state.step,
        "tokens": state.step * tokens_per_step,
        "train_loss": mean(state.losses[-log_interval:]),
        "lr": lr,
    }
    return row if grad_norm is None else row | {"grad_norm": float(grad_norm)}


def mean_loss(network: Callable[..., Tensor], precision: str, tokens: Tensor) -> Tensor:
    """Mean loss of the targets tokens[:, 1:] after the inputs tokens[:, :-1]."""
    with autocast(precision, tokens.device):
        return network(tokens[:, :-1], tokens[:, 1:])


def lr_factor(step: int, total: int, training: TrainingConfig, end: int | None = None) -> float:
    """The LR of `step` (from 0) / the peak LR: linear warm-up, then the schedule down to `min_lr_frac`.

    Args:
        end: the last step of the horizon that is trained for; None: of the run, after `total` steps.
    """
    warmup, end = training.warmup_steps(total), end or total
    if step < warmup:
        return (step + 1) / warmup
    start = {"wsd": end - round(training.decay_fraction * end), "constant": end}.get(training.schedule, warmup)
    progress = min(1.0, max(0.0, (step - start) / max(1, end - start)))
    decay = 0.5 * (1 + math.cos(math.pi * progress)) if training.schedule == "cosine" else 1 - progress
    return training.min_lr_frac + (1 - training.min_lr_frac) * decay


def curvature_batch(data: Dataset, run: RunSpec, step: int) -> NDArray[np.int64]:
    """The tokens for an observation of the curvature that sees another batch than the step's gradient.

    They come in an order of their own, that of a seed which no run has.
    """
    return data.train_batch(run.size.context, run.resolved.training.batch_size, ~run.seed, step)


def observe_curvature(
    network: Callable[..., Tensor],
    setup: TrainingSetup,
    inputs: Tensor,
    seed: int,
    step: int,
    precision: str,
    micro_batcher: MicroBatcher | None = None,
) -> None:
    """Show the optimizers gradients whose squares estimate the diagonal of the Gauss-Newton matrix, never clipped.

    They are gradients of sqrt(tokens) times the loss for labels drawn from the predictions (Liu et al. 2305.14342,
    Algorithm 2).

    Args:
        inputs: (B, T), this rank's rows. The draws are those of the global batch, whatever rank computes them.
    """
    micro_batcher = micro_batcher or MicroBatcher()
    global_shape = (len(inputs) * micro_batcher.ranks.size, inputs.shape[1])
    draws = torch.randint(DRAWS, global_shape, generator=generator("curvature", seed, step))

    def loss_of(inputs: Tensor, draws: Tensor) -> Tensor:
        with autocast(precision, inputs.device):
            return math.prod(global_shape) ** 0.5 * network(inputs, draws=draws)

    local_draws = micro_batcher.ranks.local_shard(draws).to(inputs.device)
    micro_batcher.backward(setup.network.parameters(), loss_of, inputs, local_draws)
    setup.optimizer.observe(step)


def clip(setup: TrainingSetup) -> Tensor | None:
    """Clip the global gradient norm and return the norm before it; None where the scaling rule forbids clipping."""
    if setup.clip is None:
        return None
    norm = nn.utils.clip_grad_norm_(setup.network.parameters(), setup.clip)
    return norm.full_tensor() if setup.sharded else norm  # type: ignore[attr-defined]


def evaluate(
    network: Callable[..., Tensor],
    data: Dataset,
    run: RunSpec,
    precision: str,
    device: torch.device,
    micro_batcher: MicroBatcher,
) -> dict[str, float]:
    """Mean loss over the fixed validation blocks, in nats per token and in bits per byte of text."""
    training, context = run.resolved.training, run.size.context
    if training.eval_batches is None:
        blocks = data.validation_blocks(context, training.eval_tokens)
    else:
        blocks = data.first_validation_blocks(context, training.batch_size, training.eval_batches)
    n_tokens, n_bytes = 0, 0
    nats = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(blocks), training.batch_size):
        batch = data.validation_batch(context, blocks[start : start + training.batch_size])
        batch = batch[: len(batch) - len(batch) % micro_batcher.ranks.size]  # every device has equally many
        if not len(batch):
            continue
        tokens = to_device(micro_batcher.ranks.local_shard(batch), device)

        def total_nats(tokens: Tensor = tokens) -> float:
            total = 0.0
            for (rows,) in micro_batcher.micro_batches(tokens):
                total += mean_loss(network, precision, rows).item() * rows[:, 1:].numel()
            return total

        with torch.no_grad():
            nats += micro_batcher.retry_on_oom(total_nats, len(tokens))
        n_tokens += batch[:, 1:].size
        n_bytes += data.byte_count(batch[:, 1:])
    micro_batcher.ranks.all_reduce_sum(nats)
    return {"val_loss": nats.item() / n_tokens, "val_bits_per_byte": nats.item() / math.log(2) / n_bytes}


def mean(values: list[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def outcome(losses: list[float], row: dict[str, Any], bad_step: int | None, tokens_per_step: int) -> dict[str, Any]:
    """The result of a run, or of one of its shorter horizons."""
    last_twentieth = losses[-max(1, len(losses) // 20) :]
    return {
        "status": DONE if bad_step is None else DIVERGED,
        "steps": len(losses),
        "tokens": len(losses) * tokens_per_step,
        "train_loss": mean(last_twentieth),
        "val_loss": row.get("val_loss") if bad_step is None else None,
        "val_bits_per_byte": row.get("val_bits_per_byte") if bad_step is None else None,
        "diverged_at_step": bad_step,
    }


def summarise(
    run: RunSpec,
    state: TrainState,
    row: dict[str, Any],
    bad_step: int | None,
    tokens_per_second: float,
    precision: str,
    device: torch.device,
    n_devices: int,
) -> dict[str, Any]:
    """The run's summary.json: a line of results/runs.csv and the settings that only the machine could decide."""
    tokens_per_step = run.resolved.training.batch_size * run.size.context
    *shorter, (_, last) = run.resolved.training.horizons(run.resolved.steps)
    horizons: dict[str, Any] = {}
    if shorter:
        branches = list(state.branches)
        for _, end in shorter[len(branches) :]:  # horizons that a diverged trunk never reached
            branches.append({"horizon": end * tokens_per_step, "status": DIVERGED, "val_loss": None})
        horizons = {"horizon": last * tokens_per_step, "branches": branches}
    return {
        "run_id": run.run_id,
        **run.label_columns(),
        **outcome(state.losses, row, bad_step, tokens_per_step),
        **horizons,
        "seconds": state.seconds,
        "tokens_per_second": tokens_per_second,
        "device": device_name(device),
        "devices": n_devices,
        "precision": precision,
        **({} if state.micro_batch is None else {"micro_batch": state.micro_batch}),
    }


def to_device(block: Any, device: torch.device) -> Tensor:
    """A numpy block of tokens as a tensor on `device`."""
    tokens = torch.from_numpy(block)
    return tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens.to(device)
