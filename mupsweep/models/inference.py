"""The role of every tensor of a network, from its shapes at two sizes and from what the modules around it do.

Dimensions that differ between the two sizes are those that grow with the width. A matrix that grows on both sides is
hidden. One that grows on one side only is judged by its place: outside the blocks it reads the input or reads out;
inside it is a router, keys or values that groups of queries share, one half of a low-rank pair, or refused by name.
ROLES.md beside this file has the rule of every kind with its source.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

from mupsweep.errors import ConfigError
from mupsweep.formatting import nearest
from mupsweep.scaling import Role, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

Shape = tuple[int, ...]

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module")
QUERY_OF = {"k": "q", "v": "q", "kv": "q", "key": "query", "value": "query", "wk": "wq", "wv": "wq"}  # parts of names
QUERIES = frozenset(QUERY_OF.values())
FUSED = re.compile(r"qkv|query_key_value|c_attn|in_proj")  # projections of several things, stacked
PER_CHANNEL = re.compile(r"bias|^A_log$")  # raw parameters whose entries act on a channel each, whatever their shape


@dataclass(frozen=True)
class InferredTensor:
    """One tensor of a network beside the tensor of the base network that it grew from.

    Attributes:
        name: without the prefixes of wrappers such as torch.compile's.
        spec, base: as the solver takes them, with its n_out and n_in.
        width_ratio: of the dimension that sums run over: n_in of hidden matrices, routers and the head, n_out of the
            rest.
        depth_ratio: how many times more blocks the network has around it than the base.
        grows: whether one of its dimensions does.
    """

    name: str
    parameter: torch.Tensor
    spec: TensorSpec
    base: TensorSpec
    width_ratio: float
    depth_ratio: float
    grows: bool


def infer(
    model: nn.Module,
    base_model: nn.Module,
    delta_model: nn.Module | None = None,
    roles: Mapping[str, str] | None = None,
) -> list[InferredTensor]:
    """Every parameter of a network with its role and its counterpart in the base; a tied one under each of its names.

    Args:
        delta_model: the base at another width, which tells what grows where `model` does not.
        roles: pattern of names -> role, where shapes cannot tell; the first that fits counts.

    Raises:
        ConfigError: a tensor without a counterpart, or one whose role nothing tells.
    """
    network, base = Network(model), Network(base_model)
    delta = base if delta_model is None else Network(delta_model)
    if delta.shapes.keys() != base.shapes.keys():
        raise ConfigError(f"delta_model and base_model differ in {min(delta.shapes.keys() ^ base.shapes.keys())}")
    counterparts = _counterparts(network, base)
    growths = {
        name: _growth(name, network, base.shapes[like], delta.shapes[like]) for name, like in counterparts.items()
    }
    given = {without_wrappers(pattern): _parse_role(role) for pattern, role in (roles or {}).items()}
    tensors = []
    for name, parameter in network.parameters.items():
        growth = growths[name]
        role = next((role for pattern, role in given.items() if fnmatchcase(name, pattern)), None)
        stacked = False  # as a fused projection of many queries and a fixed number of keys is
        if role is None:
            role = _judge(name, network, growths)
            stacked = len(growth.axes) == 2 and bool(FUSED.search(name)) and growth.out_ratio < growth.in_ratio
        base_shape = base.shapes[counterparts[name]]
        shared = role is Role.HIDDEN and (growth.only_in or _shares_rows(name, growths))
        shapes = network.shapes[name], base_shape
        spec, base_spec = (replace(_spec(name, shape, role, growth, shared), stacked=stacked) for shape in shapes)
        fan_in_or_out = 1 if role.is_matrix and role is not Role.INPUT else 0  # the index in dims, (n_out, n_in)
        width_ratio = spec.dims[fan_in_or_out] / base_spec.dims[fan_in_or_out]
        depth_ratio = _depth_ratio(name, network, base)
        grows = bool(growth.axes)
        tensors.append(InferredTensor(name, parameter, spec, base_spec, width_ratio, depth_ratio, grows))
    if len(factors := {tensor.depth_ratio for tensor in tensors} - {1.0}) > 1:
        raise ConfigError(
            f"numbered blocks grow by different factors ({', '.join(f'{r:g}' for r in sorted(factors))}): scale the "
            "depth of all of them alike, or count only what residual blocks repeat"
        )
    return tensors


def without_wrappers(name: str) -> str:
    """The name of a parameter in the network itself, without what torch.compile, checkpointing, DDP and FSDP add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


class Network:
    """The parameters of a network, by the names that they have without wrappers, and the modules that hold them."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters: dict[str, torch.Tensor] = {}
        self.shapes: dict[str, Shape] = {}
        self.numbers: dict[str, set[str]] = defaultdict(set)  # of every numbered list, such as layers.#
        self.first: dict[str, str] = {}  # a name with one number replaced by # -> the first name of this form
        for wrapped, parameter in module.named_parameters(remove_duplicate=False):
            name = without_wrappers(wrapped)
            if name in self.parameters:
                raise ConfigError(f"{wrapped} and another parameter are both {name} without wrappers: rename one")
            self.parameters[name], self.shapes[name] = parameter, tuple(parameter.shape)
            for form in forms_of(name):
                self.numbers[form.list_name].add(form.number)
                self.first.setdefault(form.alike, name)
        # Wrappers come before what they wrap, whose name without wrappers is the same.
        self.modules = {without_wrappers(path): m for path, m in module.named_modules(remove_duplicate=False)}

    def owner(self, name: str) -> nn.Module:
        """The module that holds a parameter."""
        return self.modules[name.rpartition(".")[0]]

    def embeds(self, name: str) -> bool:
        return "embed" in type(self.owner(name)).__name__.lower()

    def matrix_axes(self, name: str) -> tuple[int, int]:
        """The axes of n_out and n_in; the last two of a parameter that is no module's weight."""
        leaf, owner = name.rpartition(".")[2], self.owner(name)
        if "weight" not in leaf:
            return len(self.shapes[name]) - 2, len(self.shapes[name]) - 1
        in_out = type(owner).__name__ == "Conv1D" or getattr(owner, "transposed", False)  # transformers' Conv1D
        return (1, 0) if in_out else (0, 1)

    def in_block(self, name: str) -> bool:
        """Whether a matrix is part of what a numbered list repeats, rather than one layer of a chain."""
        for form in forms_of(name):
            is_chain = type(self.modules[form.path]).__name__ == "Sequential"
            if form.rest.count(".") >= (2 if is_chain else 1):
                return True
            others = (form.alike.replace("#", number) for number in self.numbers[form.list_name] - {form.number})
            same_shape = [other for other in others if self.shapes.get(other) == self.shapes[name]]
            if any(type(self.owner(other)) is type(self.owner(name)) for other in same_shape):
                return True
        return False

    def routes(self, name: str) -> bool:
        """Whether a module chooses or weighs experts: it is called a router, or a gate beside experts."""
        path, _, module = name.rpartition(".")[0].rpartition(".")
        if "router" in f"{path.rpartition('.')[2]} {module} {type(self.owner(name)).__name__}".lower():
            return True
        return module.split("_")[-1] == "gate" and any("expert" in n for n, _ in self.modules[path].named_children())


class _Form(NamedTuple):
    """A name as one of those that differ in one number, such as layers.3.mlp.weight and layers.4.mlp.weight.

    Attributes:
        path: of the numbered list, "layers".
        list_name: its path with other numbers as #.
        number: "3".
        rest: what follows the number, "mlp.weight".
        alike: the whole name with this number as #.
    """

    path: str
    list_name: str
    number: str
    rest: str
    alike: str


def forms_of(name: str) -> Iterator[_Form]:
    """Every form of a name, one for each of its numbers."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            list_name = ".".join("#" if p.isdecimal() else p for p in parts[:i])
            alike = ".".join([*parts[:i], "#", *parts[i + 1 :]])
            yield _Form(".".join(parts[:i]), list_name, part, ".".join(parts[i + 1 :]), alike)


def _counterparts(network: Network, base: Network) -> dict[str, str]:
    """Per name of the network, its name in the base or that of its like there."""
    counterparts = {}
    for name in network.shapes:
        alike = (base.first[form.alike] for form in forms_of(name) if form.alike in base.first)
        like = name if name in base.shapes else next(alike, None)
        if like is None:
            raise ConfigError(f"{name} has no counterpart in the base model; {nearest(name, base.shapes)}")
        if len(network.shapes[name]) != len(base.shapes[like]):
            raise ConfigError(
                f"{name} has shape {network.shapes[name]}, but {base.shapes[like]} in the base model: they must differ "
                "in size only"
            )
        counterparts[name] = like
    unused = base.shapes.keys() - counterparts.values()
    unused -= {name for name in unused if any(form.alike in network.first for form in forms_of(name))}
    if unused:
        raise ConfigError(f"{min(unused)} of the base model has no counterpart in the model")
    return counterparts


def _depth_ratio(name: str, network: Network, base: Network) -> float:
    """How many times longer the numbered lists are that a tensor stands in."""
    ratio = 1.0
    for form in forms_of(name):
        here, there = len(network.numbers[form.list_name]), len(base.numbers[form.list_name])
        if here != there and "expert" in form.list_name.rpartition(".")[2]:
            raise _more_experts(name)
        ratio *= here / there
    return ratio


@dataclass(frozen=True)
class _Growth:
    """How a tensor differs between two widths.

    Attributes:
        axes: those that grow.
        n_out, n_in: the axes of a matrix; those that grow where two do.
        out_ratio, in_ratio: n_out and n_in / those of the base.
    """

    axes: tuple[int, ...]
    n_out: int
    n_in: int
    out_ratio: float
    in_ratio: float

    @property
    def only_out(self) -> bool:
        return self.axes == (self.n_out,)

    @property
    def only_in(self) -> bool:
        return self.axes == (self.n_in,)


def _growth(name: str, network: Network, base: Shape, delta: Shape) -> _Growth:
    shape = network.shapes[name]
    axes = tuple(i for i, sizes in enumerate(zip(shape, base, delta, strict=True)) if len(set(sizes)) > 1)
    if len(shape) < 2:
        return _Growth(axes, 0, -1, 1.0, 1.0)
    n_out, n_in = network.matrix_axes(name)
    if len(axes) == 2:
        n_out, n_in = axes if n_out < n_in else axes[::-1]
    return _Growth(axes, n_out, n_in, shape[n_out] / base[n_out], shape[n_in] / base[n_in])


def _judge(name: str, network: Network, growths: Mapping[str, _Growth]) -> Role:
    """The role of a tensor from what grows and from what it does.

    Raises:
        ConfigError: nothing tells, with the line that settles it.
    """
    growth, in_block, matrix = growths[name], network.in_block(name), len(network.shapes[name]) > 1
    embeds, routes = network.embeds(name), matrix and network.routes(name)
    if len(growth.axes) > (1 if embeds else 2):
        if "expert" in name:
            raise _more_experts(name)
        raise ConfigError(f"{name} grows along {len(growth.axes)} axes: keep all but {1 if embeds else 2} fixed")
    vector = Role.HIDDEN_VECTOR if any(part.isdecimal() for part in name.split(".")) else Role.INPUT_VECTOR
    if not matrix or _per_channel(name, network, growth):
        return vector
    if embeds:
        return Role.INPUT if growth.axes else vector
    if routes and growth.axes:
        if not growth.only_in:
            raise _more_experts(name)
        return Role.ROUTER
    if not growth.axes:
        return Role.HIDDEN if in_block and "weight" in name.rpartition(".")[2] else vector
    if "weight" not in name.rpartition(".")[2]:
        return _judge_raw(name, network, growth, in_block)
    if len(growth.axes) == 2:
        return Role.HIDDEN
    if growth.only_out:
        return Role.HIDDEN if in_block else Role.INPUT
    if growth.only_in and (_shares_rows(name, growths) or (in_block and _low_rank(name, network, growths))):
        return Role.HIDDEN
    if growth.only_in and not in_block:
        return Role.OUTPUT
    raise _unclear(name, network, "only one of its dimensions grows, and neither name nor neighbours say what for")


def _judge_raw(name: str, network: Network, growth: _Growth, in_block: bool) -> Role:
    """The role of a parameter that is no module's weight: nobody says which of its axes is n_in."""
    if len(growth.axes) == 2 and math.isclose(growth.out_ratio, growth.in_ratio):
        return Role.HIDDEN
    if len(growth.axes) == 1 and not in_block:
        return Role.INPUT  # as a position embedding
    raise _unclear(name, network, "it is no module's weight, so nothing says which of its dimensions is n_in")


def _per_channel(name: str, network: Network, growth: _Growth) -> bool:
    """Whether a tensor of several dimensions acts on every channel by itself, as a gain or a bias does."""
    shape, leaf = network.shapes[name], name.rpartition(".")[2]
    if len(growth.axes) != 1 or network.embeds(name):
        return False
    if "weight" in leaf:
        return growth.only_out and getattr(network.owner(name), "groups", 1) > 1  # sums do not grow, channels do
    is_list = any(part.isdecimal() for part in name.split("."))
    return bool(PER_CHANNEL.search(leaf)) or (is_list and math.prod(shape) == shape[growth.axes[0]])


def _shares_rows(name: str, growths: Mapping[str, _Growth]) -> bool:
    """Whether a matrix makes keys or values for groups of queries: the queries beside it grow on both sides."""
    path, _, leaf = name.rpartition(".")
    path, _, module = path.rpartition(".")
    parts = module.split("_")
    for i, part in enumerate(parts):
        if part in QUERY_OF:
            query = "_".join([*parts[:i], QUERY_OF[part], *parts[i + 1 :]])
            beside = growths.get(f"{path}.{query}.{leaf}".lstrip("."))
            if beside is not None and len(beside.axes) == 2:
                return True
    return False


def _low_rank(name: str, network: Network, growths: Mapping[str, _Growth]) -> bool:
    """Whether a matrix is the first of a low-rank pair: one beside it leads from as few features or fewer to many."""
    path, _, leaf = name.rpartition(".")
    path, n_out = path.rpartition(".")[0], network.shapes[name][growths[name].n_out]
    for other, growth in growths.items():
        other_path, _, other_leaf = other.rpartition(".")
        if (other_path.rpartition(".")[0], other_leaf) == (path, leaf) and growth.only_out:
            shape = network.shapes[other]
            if len(shape) > 1 and not network.embeds(other) and shape[growth.n_in] <= n_out:
                return True
    return False


def _spec(name: str, shape: Shape, role: Role, growth: _Growth, shared: bool) -> TensorSpec:
    """What the solver takes; further axes, such as those of a convolution's kernel, do not grow and cancel.

    Args:
        shared: whether ever more heads share the features that the tensor makes.
    """
    axes = growth.axes
    if not role.is_matrix:
        return TensorSpec(name, (shape[axes[0]] if axes else 1,), role)
    if len(shape) < 2:
        raise ConfigError(f"{name} of shape {shape} cannot be {role.value}: that is a role of matrices")
    if role is Role.INPUT:
        grown = axes[0] if axes else -1
        return TensorSpec(name, (math.prod(shape) // shape[grown], shape[grown]), role, init_std=1.0)
    n_out, n_in = shape[growth.n_out], shape[growth.n_in]
    repeats = max(1.0, n_in / n_out) if shared else 1  # such features start as those of a square matrix would
    return TensorSpec(name, (n_out, n_in), role, init_std=1.0, repeats=repeats)


def _parse_role(role: str) -> Role:
    try:
        return Role(role)
    except ValueError:
        raise ConfigError(f"roles: no role '{role}'; {nearest(role, Role)}") from None


def _unclear(name: str, network: Network, why: str) -> ConfigError:
    first, *parts = name.split(".")
    pattern = ".".join([first, *("*" if part.isdecimal() else part for part in parts)])
    return ConfigError(
        f"{name} {network.shapes[name]} has no clear role: {why}; say it with roles={{'{pattern}': 'hidden'}} (keys, "
        "values, low-rank latents; (n_out, n_in)), 'router', 'output' (its result is divided as the logits are) or "
        "'hidden_vector' (a number per channel)"
    )


def _more_experts(name: str) -> ConfigError:
    return ConfigError(
        f"{name}: the number of experts differs from the base, and no rule leads from one number to another "
        "(2605.14200): hold it fixed"
    )
