"""What networks of somebody else's code do: how they start, what their attention computes, whether they can train."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mupsweep.errors import ConfigError, MupsweepError
from mupsweep.models.inference import without_wrappers
from mupsweep.models.inferred import ATTENTION, BLOCK, OUTPUT, family
from mupsweep.models.loss import labels_of
from mupsweep.models.shape import Size
from mupsweep.scaling import Fold, Init, Role

if TYPE_CHECKING:
    from mupsweep.models.inferred import InferredArchitecture, Known

DRAWS = (2, 8)  # of the base, at least two to tell what is random, and more where tensors are small
ENOUGH_ENTRIES = 4096  # of a family, which make its root mean square right to a hundredth
FEW_TOKENS = 8  # of a sequence, where only structure is looked at
SAME = 1e-4  # relative difference of sums in another order


@dataclass(frozen=True)
class Start:
    """How the tensors of a family start at the base shape; rms is the root mean square of their entries."""

    init: Init
    rms: float


@dataclass(frozen=True)
class Attention:
    """The attention of a network, as its calls of `scaled_dot_product_attention` show it.

    Attributes:
        dims: features per head at the base and at another width; None where no call was seen.
        scale_at_base: of the attention logits.
        power: of the width in that scale.
    """

    dims: tuple[int, int] | None
    scale_at_base: float
    power: float

    @property
    def lacks_power(self) -> bool:
        """Whether heads widen with the model and logits are divided by the root of d_head."""
        return self.dims is not None and self.dims[0] != self.dims[1] and abs(self.power + 0.5) < 0.1

    def scale(self, size: Size) -> float:
        """The scale at a size, as the network computes it."""
        return self.scale_at_base * size.width_ratio**self.power


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from a seed, by torch, numpy or Python, and leave what others draw as it was."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def built(model: InferredArchitecture, size: Size, constants: Mapping[str, float]) -> nn.Module:
    """The network that a model's code builds.

    Raises:
        ConfigError: the code raises, or returns something else.
    """
    where = f"{model.where} at width {size.width}, depth {size.depth}"
    try:
        network = model.construct(size, constants)
    except ConfigError:
        raise
    except Exception as error:  # of somebody else's code, which may raise anything
        raise ConfigError(f"{where}: {described(error)}") from error
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"{where} returns {type(network).__name__}: expected a torch.nn.Module from token ids to logits"
        )
    return network


def outline(model: InferredArchitecture, size: Size) -> nn.Module:
    """The network without values; with values where its code cannot do without.

    Raises:
        ConfigError: it cannot be built, has wrappers in it, or parameters that nothing here trains.
    """
    constants = dict.fromkeys(model.takes, 1.0)
    try:
        with seeded(0), torch.device("meta"):
            network = built(model, size, constants)
    except ConfigError:  # a build that reads its own values, say
        with seeded(0):
            network = built(model, size, constants)
    for name, parameter in network.named_parameters():
        if name != without_wrappers(name):
            raise ConfigError(
                f"{model.where}: {name} is wrapped: return the bare network; training.compile compiles it"
            )
        if parameter.dtype is not torch.float32 or not parameter.requires_grad:
            what = str(parameter.dtype) if parameter.requires_grad else "frozen (requires_grad=False)"
            raise ConfigError(f"{model.where}: {name} is {what}: every parameter is trained, in float32")
    return network


def drawn(model: InferredArchitecture, size: Size, seed: int = 0) -> nn.Module:
    """The network with its own initial values under a seed."""
    with seeded(seed):
        return built(model, size, dict.fromkeys(model.takes, 1.0)).train()


def starts(model: InferredArchitecture, size: Size) -> dict[str, Start]:
    """How the tensors of every family start."""
    networks: list[dict[str, Tensor]] = []
    members: dict[str, list[str]] = defaultdict(list)
    for seed in range(DRAWS[1]):
        networks.append({n: p.detach() for n, p in drawn(model, size, seed).named_parameters(remove_duplicate=False)})
        if seed == 0:
            for name in networks[0]:
                members[family(name)].append(name)
        elif seed + 1 >= DRAWS[0]:
            is_random = (names for names in members.values() if not torch.equal(*(n[names[0]] for n in networks[:2])))
            entries = (sum(networks[0][name].numel() for name in names) for names in is_random)
            if min(entries, default=ENOUGH_ENTRIES) * len(networks) >= ENOUGH_ENTRIES:
                break
    draws = {name: [tuple(n[member] for n in networks) for member in names] for name, names in members.items()}
    return {name: _start(tensors) for name, tensors in draws.items()}


def _start(tensors: list[tuple[Tensor, ...]]) -> Start:
    flat = torch.cat([draw.flatten() for draws in tensors for draw in draws])
    rms = root_mean_square(flat)
    if not all(torch.equal(draws[0], draws[1]) for draws in tensors):
        return Start(Init.OWN, rms)
    if (flat == 0).all():
        return Start(Init.ZEROS, 0.0)
    return Start(Init.ONES if (flat == 1).all() else Init.FIXED, rms)


def root_mean_square(values: Tensor) -> float:
    """The root of the mean square of all entries."""
    return values.detach().double().square().mean().sqrt().item()


def rescale(network: nn.Module, stds: Mapping[str, float], factors: Mapping[str, float]) -> None:
    """Scale what a network's own code has drawn.

    Args:
        stds: root mean square of the tensors that are drawn; those of a family together.
        factors: factor of the tensors that are set.
    """
    members: dict[str, list[tuple[str, Tensor]]] = defaultdict(list)
    parameters = dict(network.named_parameters())
    for name in stds:
        members[family(name)].append((name, parameters[name]))
    with torch.no_grad():
        for tensors in members.values():
            rms = root_mean_square(torch.cat([p.flatten() for _, p in tensors]))
            for name, p in tensors:
                p.mul_(stds[name] / rms if rms > 0 else 1.0)
        for name, factor in factors.items():
            parameters[name].mul_(factor)


def as_language_model(network: nn.Module, read: Callable[[Any], Any]) -> nn.Module:
    """The network with a forward pass that returns logits, or the mean loss in nats where targets are given.

    Its class is replaced by a subclass, as FSDP does it, so that names of tensors and modules stay its own. With
    `draws` (B, T) in place of targets the loss is that of labels sampled from its own predictions.
    """
    original = type(network)

    def forward(self: nn.Module, tokens: Tensor, targets: Tensor | None = None, draws: Tensor | None = None) -> Tensor:
        logits = read(original.forward(self, tokens))
        if targets is None and draws is None:
            return logits
        logits = logits.flatten(0, 1).float()
        if draws is not None:
            targets = labels_of(logits, draws.flatten())
        assert targets is not None
        return F.cross_entropy(logits, targets.flatten())

    network.__class__ = type(original.__name__, (original,), {"forward": forward, "__module__": original.__module__})
    return network


class WatchAttention(TorchFunctionMode):
    """Keeps what `look` makes of every call of `scaled_dot_product_attention`."""

    def __init__(self, look: Callable[..., Any]) -> None:
        super().__init__()
        self.look = look
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.seen.append(self.look(*args, **kwargs))
        return func(*args, **kwargs)


def _query_and_scale(query: Tensor, *_: Any, scale: float | None = None, **__: Any) -> tuple[Tensor, float]:
    return query.detach().clone(), query.shape[-1] ** -0.5 if scale is None else float(scale)


def attention(model: InferredArchitecture, base: Size, wide: Size) -> Attention:
    """The attention of a model, from its networks at two widths."""
    first: list[tuple[Tensor, float]] = []  # call at each width
    for size in (base, wide):
        try:
            with torch.no_grad(), WatchAttention(_query_and_scale) as calls:
                drawn(model, size)(few_tokens(size))
        except Exception:  # `check` says what is wrong with it
            break
        first += calls.seen[:1]
    if len(first) < 2:
        return Attention(None, base.head_dim**-0.5, 0.0)
    (query, scale), (wide_query, wide_scale) = first
    power = float(np.log(wide_scale / scale) / np.log(wide.width / base.width))
    dims = query.shape[-1], wide_query.shape[-1]
    return Attention(dims, scale, round(2 * power) / 2 if abs(2 * power - round(2 * power)) < 0.1 else power)


def few_tokens(size: Size) -> Tensor:
    """Some tokens of two short texts."""
    shape = (2, min(FEW_TOKENS, size.context))
    return torch.randint(min(size.vocab_size, 64), shape, generator=torch.Generator().manual_seed(0))


def check(model: InferredArchitecture, size: Size, vocab_size: int) -> None:
    """Refuse a model that cannot be trained, from what its network at the base shape does with random tokens.

    Raises:
        ConfigError: it returns no logits, is not deterministic, keeps a state, sees the future, or has idle parameters.
    """
    where = model.where
    model.tensors(size)  # whose roles and dtypes may be refused, which says more than what follows from them
    network, again = (as_language_model(drawn(model, size), model.read) for _ in range(2))
    for (name, one), other in zip(network.named_parameters(), again.parameters(), strict=True):
        if not torch.equal(one, other):
            raise ConfigError(
                f"{where} is not deterministic: {name} starts at other values under the same seed; draw them with "
                "torch, without a generator of its own"
            )
    shape = (2, size.context)
    tokens = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))
    tokens[0, 0] = vocab_size - 1
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    logits = _logits(model, network, tokens)
    if logits.shape[:2] != shape or logits.shape[2] < vocab_size:
        raise ConfigError(
            f"{where} returns logits of shape {tuple(logits.shape)} for {shape[0]} sequences of {shape[1]} tokens: "
            f"expected {(*shape, size.vocab_size)}, the vocabulary being {vocab_size} tokens of data.tokenizer"
        )
    for name, buffer in network.named_buffers():
        if name in buffers and not torch.equal(buffer, buffers[name]):
            raise ConfigError(f"{where}: a forward pass changes its buffer {name}: only constant buffers can be kept")
    if not torch.equal(logits, _logits(model, network, tokens)):
        dropouts = [n for n, m in network.named_modules() if "dropout" in type(m).__name__.lower() and _p(m) > 0]
        named = f", such as {dropouts[0]}" if dropouts else ""
        raise ConfigError(
            f"{where} is not deterministic: the same tokens have other logits the second time; set dropout to 0{named}"
        )
    _check_causal(model, network, tokens, logits)
    F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()).backward()
    for name, parameter in network.named_parameters():
        if parameter.grad is None:
            raise ConfigError(f"{where}: {name} has no gradient, so the logits do not depend on it: leave it out")


def _p(dropout: nn.Module) -> float:
    probability = getattr(dropout, "p", 0.0)
    return probability if isinstance(probability, float | int) else 0.0


def _logits(model: InferredArchitecture, network: nn.Module, tokens: Tensor) -> Tensor:
    """The logits of some tokens."""
    try:
        logits = network(tokens)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{model.where} cannot read {len(tokens)} sequences of {tokens.shape[1]} tokens, 0 to {int(tokens.max())}: "
            f"{described(error)}"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 3 or not logits.is_floating_point():
        what = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(f"{model.where} returns {what}: expected the logits alone, (sequences, tokens, vocabulary)")
    return logits


def _check_causal(model: InferredArchitecture, network: nn.Module, tokens: Tensor, logits: Tensor) -> None:
    """Refuse a network in which a token sees those behind it, which it would learn to copy."""
    if tokens.shape[1] < 2:
        return
    changed = tokens.clone()
    changed[:, -1] = (tokens[:, -1] + 1) % int(tokens.max() + 1)
    with torch.no_grad():
        moved = (_logits(model, network, changed) - logits)[:, :-1].abs().max()
    if moved > SAME * logits.abs().max():
        raise ConfigError(
            f"{model.where}: a token sees the tokens behind it, which are what it shall predict: mask them"
        )


def described(error: Exception) -> str:
    """An error of somebody else's code in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def why_not_folded(known: Known, constant: str, folds: Mapping[str, Fold | None]) -> str:
    """Why tensors cannot take a forward constant up, as their network shows; "" where they can.

    Args:
        folds: tensor -> what it would take up.
    """
    roles = {tensor.name: tensor.role for tensor in known.tensors(known.base_size)}
    names = [
        name for name, fold in folds.items() if fold is (Fold.ATTENTION if constant == ATTENTION else Fold.MULTIPLIER)
    ]
    try:
        if constant == OUTPUT:
            return _head(known, [name for name in names if roles[name] is Role.OUTPUT])
        if constant == BLOCK:
            return _branches(known, [name for name in names if roles[name] is not Role.OUTPUT])
        return _queries(known, names)
    except MupsweepError:
        raise
    except Exception as error:  # of somebody else's code
        return f"a few tokens cannot be read ({described(error)})"


def _head(known: Known, names: list[str]) -> str:
    """Whether logits are linear in the head."""
    if not names:
        return "the head shares the storage of an embedding" if _ties(known) else "no head was found"
    network = _trial(known, names)
    with torch.no_grad():
        none, once, twice = (known.model.read(network(few_tokens(known.base_size))) for _ in _scales(network, names))
    return "" if _is_double(twice - none, once - none) else f"logits are no linear function of {', '.join(names)}"


def _branches(known: Known, names: list[str]) -> str:
    """Whether every block is the identity without some tensors, and linear in each of them without the others."""
    if not names:
        return "no module is named as the last of a residual branch; name them in model.branch_ends"
    network, path = _trial(known, names), known.blocks
    block = network.get_submodule(f"{path}.0")
    inside = [name for name in names if name.startswith(f"{path}.0.")]
    parameters = dict(network.named_parameters())
    values = {name: parameters[name].detach().clone() for name in inside}

    def branch(scales: Mapping[str, float]) -> Tensor:
        with torch.no_grad():
            for name in inside:
                parameters[name].copy_(values[name] * scales.get(name, 0.0))
            seen: list[Tensor] = []
            hook = block.register_forward_hook(
                lambda _, given, kwargs, output: seen.extend([_first(given or tuple(kwargs.values())), _first(output)]),
                with_kwargs=True,
            )
            network(few_tokens(known.base_size))
            hook.remove()
        return seen[1] - seen[0]

    if not (branch({}) == 0).all():
        found = ", ".join(dict.fromkeys(map(family, names)))
        return f"a block is not the identity without {found}, so these are not the ends of all its residual branches"
    for name in inside:
        if not _is_double(branch({name: 2.0}), branch({name: 1.0})):
            return f"a residual branch is no linear function of {family(name)}"
    return ""


def _queries(known: Known, names: list[str]) -> str:
    """Whether queries are linear in some tensors."""
    if not names:
        return "no projection makes queries alone (q_proj, query, wq)"
    network = _trial(known, names)
    queries = []
    for _ in _scales(network, names):
        with torch.no_grad(), WatchAttention(_query_and_scale) as calls:
            network(few_tokens(known.base_size))
        queries.append(calls.seen[0][0])
    return "" if _is_double(queries[2], queries[1]) else f"queries are no linear function of {family(names[0])}"


def _trial(known: Known, names: list[str]) -> nn.Module:
    """A network at the base shape in which some tensors are random, also those that start at zero."""
    network = drawn(known.model, known.base_size)
    with seeded(0), torch.no_grad():
        for name in names:
            network.get_parameter(name).normal_(std=0.05)
    return network


def _scales(network: nn.Module, names: list[str]) -> Iterator[float]:
    """Have some tensors of a network at 0, 1 and 2 times their values."""
    values = {name: network.get_parameter(name).detach().clone() for name in names}
    for scale in (0.0, 1.0, 2.0):
        with torch.no_grad():
            for name, value in values.items():
                network.get_parameter(name).copy_(value * scale)
        yield scale


def _ties(known: Known) -> bool:
    return any(tensor.tied_to for tensor in known.tensors(known.base_size))


def _first(output: Any) -> Tensor:
    return (output[0] if isinstance(output, tuple) else output).float()


def _is_double(twice: Tensor, once: Tensor) -> bool:
    return bool(once.abs().max() > 0) and bool((twice - 2 * once).abs().max() <= SAME * once.abs().max())
