"""What a few training steps do to one network: coordinates on a fixed probe batch, weights and their changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mupsweep.models.observation import WatchAttention
from mupsweep.scaling import Role
from mupsweep.training.norms import rms_norm, rms_operator_norm

FEATURES, LOGITS, ATTENTION, ROUTING = "features", "logits", "attention logits", "router logits"
COORDINATES = (FEATURES, LOGITS, ATTENTION, ROUTING)
CHANGE = "change of "
WEIGHT, UPDATE = "||W||_R", "||dW||_R"

Values = dict[tuple[str, str], float]  # (quantity, tensor or "") -> size


@dataclass(frozen=True)
class Matrix:
    """How a stored tensor acts.

    Attributes:
        dims: (n_out, n_in).
        transposed: whether it is stored (n_in, n_out).
        constant: the forward constant that it has taken up, which the weight of the rules stands behind.
    """

    dims: tuple[int, int]
    transposed: bool
    constant: float

    def of(self, stored: Tensor, role: Role) -> Tensor:
        """The weight of the rules."""
        weight = stored / self.constant
        if not role.is_matrix or role is Role.INPUT or stored.ndim < 2:
            return weight
        return (
            weight.mT if self.transposed else weight if stored.ndim == 2 else weight.reshape(*self.dims, -1).flatten(1)
        )


@dataclass(frozen=True)
class Probe:
    """A network and what is measured on it.

    Attributes:
        network: called with `inputs`, it returns the logits.
        step: one training step, from whatever the network's weights are.
        features: the part of the network whose output is the features, such as its last block.
        inputs: arguments of the network, the probe batch.
        roles: of every tensor, by name.
        matrices: of the tensors that are stored otherwise than they act.
        routers: the parts of the network that return the logits of experts.
    """

    network: nn.Module
    step: Callable[[], object]
    features: nn.Module
    inputs: tuple[Any, ...]
    roles: Mapping[str, Role]
    matrices: Mapping[str, Matrix] = field(default_factory=dict)
    routers: tuple[nn.Module, ...] = ()

    def weight(self, name: str, stored: Tensor) -> Tensor:
        """A tensor, or a change of it, as the rules speak of it."""
        return self.matrices[name].of(stored, self.roles[name]) if name in self.matrices else stored


def measure(probe: Probe, at: Sequence[int]) -> dict[int, Values]:
    """Take steps and measure after each count of `at` (ascending); 0 stands for the start.

    Returns:
        per step count: RMS norms of features, logits, attention logits, router logits, and of their changes since the
        start; the norm of every weight and of its change. Step counts after which one is inf or nan are left out.
    """
    weights = dict(probe.network.named_parameters())
    first = observe(probe)
    initial = {name: p.detach().clone() for name, p in weights.items()}
    values_at = {0: {(c, ""): rms_norm(h) for c, h in first.items()}}
    values_at[0] |= {
        (WEIGHT, name): weight_norm(probe.weight(name, w), probe.roles[name]) for name, w in initial.items()
    }
    for count in range(1, max(at) + 1):
        probe.step()
        if count not in at:
            continue
        current = observe(probe)
        if not all(h.isfinite().all() for h in current.values()):
            break
        values: Values = {}
        for name, h in current.items():
            values[name, ""], values[CHANGE + name, ""] = rms_norm(h), rms_norm(h - first[name])
        for name, w in weights.items():
            values[WEIGHT, name] = weight_norm(probe.weight(name, w), probe.roles[name])
            values[UPDATE, name] = update_norm(probe.weight(name, w.detach() - initial[name]), probe.roles[name])
        values_at[count] = values
    return values_at


def weight_norm(weight: Tensor, role: Role) -> float:
    """||W||_R as `solve` counts it: of a dimension that does not grow, such as the vocabulary, every index is a vector
    of its own, and their norms are averaged (root mean square)."""
    if role is Role.HIDDEN:
        return rms_operator_norm(weight)
    return rms_norm(weight) * (weight.shape[1] if role in (Role.OUTPUT, Role.ROUTER) else 1)


def update_norm(change: Tensor, role: Role) -> float:
    """||dW||_R; one-hot inputs meet one row of an embedding at a time, so there it is the RMS over rows."""
    return rms_operator_norm(change) if role.is_matrix and role is not Role.INPUT else rms_norm(change)


def observe(probe: Probe) -> dict[str, Tensor]:
    """The coordinates on the probe batch; attention logits where the network calls torch's attention."""
    features, routers = recorded(probe.features), recorded(*probe.routers)
    with torch.no_grad(), features as hidden, routers as routing, WatchAttention(attention_logits) as attention:
        logits = probe.network(*probe.inputs)
    coordinates = {FEATURES: hidden[-1], LOGITS: logits.float()}
    coordinates |= {ATTENTION: torch.cat(attention.seen)} if attention.seen else {}
    return coordinates | ({ROUTING: torch.cat([h.flatten() for h in routing])} if routing else {})


@contextmanager
def recorded(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of modules, call by call; of several outputs the first."""
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).float())

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def attention_logits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scale * q . k of the pairs that may meet, flat; a mask's own values are left out."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    logits = (query.shape[-1] ** -0.5 if scale is None else scale) * (query.float() @ key.float().mT)
    pairs = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device)
    return logits[..., pairs.tril() if is_causal else pairs].flatten()
