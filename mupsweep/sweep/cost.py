"""The cost of a run: parameters, FLOPs, memory and a time estimate, from the table of tensors alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mupsweep.models.shape import MAX_LOGITS, Size
from mupsweep.scaling import Role, TensorSpec

STEP_SECONDS = 0.004  # what a step costs beyond its FLOPs: kernel launches and Python
FLOPS_PER_SECOND = {"cpu": 1e11, "cuda": 1e14, "mps": 3e12}  # sustained, per CPU thread or per device; rough


@dataclass(frozen=True)
class Cost:
    """The cost of one run.

    Attributes:
        parameters: number of trained parameters, a tied head counted once.
        tokens: number of training tokens.
        flops: FLOPs of the forward and backward passes over all tokens.
        memory: bytes of weights, gradients, optimizer state, the activations of a step and the logits that the loss
            computes at once, on each device, all in fp32.
        known: whether it is that of the run. Otherwise a program of the user's trains, and the cost is that of the
            model whose tensors the config declares: good for an order of the runs, and nothing to show.
        active_parameters: number of parameters that compute one token, where experts leave some out; None: all of them.
    """

    parameters: int
    tokens: int
    flops: float
    memory: float
    known: bool = True
    active_parameters: int | None = None

    def seconds(self, steps: int, device: str) -> float:
        """A rough wall-clock estimate on one CPU thread or one accelerator."""
        return steps * STEP_SECONDS + self.flops / FLOPS_PER_SECOND[device]


def estimate(
    tensors: Iterable[TensorSpec],
    size: Size,
    steps: int,
    batch_size: int,
    micro_batch: int | None = None,
    state: int = 0,
    devices: int = 1,
    shard: bool = False,
) -> Cost:
    """The cost of `steps` steps of `batch_size` sequences, computed `micro_batch` at a time on each of some devices.

    FLOPs per token are 6 per weight that multiplies activations plus 12 * depth * width * context for attention scores
    and values (Chowdhery et al. 2204.02311, appendix B; causality not discounted), which grouped queries share without
    saving any of these. Embedding look-ups are free. An expert's weights count for the tokens that it computes.

    Args:
        state: how many numbers the optimizer keeps between steps.
        shard: whether the devices divide weights, gradients and optimizer state, and not only the batch.
    """
    table = list(tensors)
    parameters = sum(math.prod(t.shape) for t in table if t.tied_to is None)
    active = round(sum(t.active * math.prod(t.shape) for t in table if t.tied_to is None))
    multiplied = sum(t.active * math.prod(t.shape) for t in table if t.role.is_matrix and t.role is not Role.INPUT)
    per_token = 6 * multiplied + 12 * size.depth * size.width * size.context
    tokens = steps * batch_size * size.context
    # the activations that a block keeps for its backward pass are about the inputs and outputs of its matrices
    sequences = -(-batch_size // devices)
    tokens_at_once = min(sequences, micro_batch or sequences) * size.context
    activations = tokens_at_once * sum(t.active * sum(t.shape) for t in table if t.role is Role.HIDDEN)
    logits = 2 * min(tokens_at_once * size.vocab_size, MAX_LOGITS)  # these and their log-probabilities
    persistent = (2 * parameters + state) / (devices if shard else 1)  # weights, gradients and optimizer state
    return Cost(
        parameters,
        tokens,
        float(per_token) * tokens,
        4.0 * (persistent + activations + logits),
        active_parameters=active if active < parameters else None,
    )
