"""The coordinate check of a model and a training step of your own.

Example: a muP network that ends in 4 logits, trained by Adam.

>>> import torch
>>> from torch import nn
>>> from mupsweep.check import coordinates
>>> x, y = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 4
>>> class Net(nn.Module):
...     def __init__(self, width):
...         super().__init__()
...         self.body = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
...         self.head, self.scale = nn.Linear(width, 4, bias=False), 32 / width
...         nn.init.normal_(self.head.weight, std=0.02)
...     def forward(self, x):
...         return self.head(self.body(x)) * self.scale
>>> def model_fn(width, depth):
...     net = Net(width)
...     hidden = [{"params": net.body[2].weight, "lr": 0.01 * 32 / width}]
...     rest = [{"params": [p for p in net.parameters() if p is not net.body[2].weight], "lr": 0.01}]
...     adam = torch.optim.Adam(hidden + rest)
...     def step():
...         adam.zero_grad()
...         nn.functional.cross_entropy(net(x), y).backward()
...         adam.step()
...     return net, step
>>> found = coordinates(model_fn, probe=(x,), features=lambda net: net.body, widths=[32, 64, 128, 256])
>>> found.passed
True
>>> round(found.row("width", "change of logits").final_exponent.value)
0
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mupsweep.check.coordinate_check import STEPS
from mupsweep.check.exponents import DEPTH, STABLE, STABLE_WIDTH, WIDTH, Coordinates, Point, family, fit
from mupsweep.check.measure import Probe, measure
from mupsweep.errors import ConfigError
from mupsweep.models.inference import infer, without_wrappers
from mupsweep.scaling import Role

ModelFn = Callable[[int, int], tuple[nn.Module, Callable[[], object]]]


def coordinates(
    model_fn: ModelFn,
    *,
    probe: tuple[Any, ...],
    features: Callable[[nn.Module], nn.Module],
    widths: Sequence[int],
    depths: Sequence[int] = (1,),
    seeds: Sequence[int] = (0, 1, 2),
    at: Sequence[int] = STEPS,
    name: str = "model",
    roles: Mapping[str, str] | None = None,
) -> Coordinates:
    """Fit how features, logits, attention logits, weights and updates go with the width and the depth of your model.

    What is judged: the changes of features and logits keep their size along both axes, those of attention logits
    (seen where the model calls `scaled_dot_product_attention`) along the widths.

    Args:
        model_fn: (width, depth) -> a network, and a function that takes one training step of it. Called under
            `torch.manual_seed(seed)`, once per size and seed.
        probe: the network's arguments, the same at every size; it returns the logits.
        features: the part of the network whose output is the features, such as its last block.
        widths, depths: the ladders, each at the first entry of the other; at least three sizes, or one for no ladder.
        seeds: of which the geometric mean is fitted.
        at: step counts to measure after; the last one is judged.
        name: of the model.
        roles: pattern of names -> role, where shapes cannot tell, as for `mupsweep.param_groups`.

    Returns:
        The exponents with 95 % intervals; `passed`, `violations` (the worst first) and `causes()` judge them.

    Raises:
        ConfigError: a ladder of two sizes, none, a tensor with more than two dimensions or of an unclear role.
    """
    ladders = {axis: sizes for axis, sizes in ((WIDTH, widths), (DEPTH, depths)) if len(sizes) > 1}
    if not ladders:
        raise ConfigError("coordinates: one width and one depth; give widths=[64,128,256,512] or depths=[2,4,8,16]")
    role_of = _roles(model_fn, widths, depths[0], roles)
    points = []
    for axis, sizes in ladders.items():
        for size in sizes:
            width, depth = (size, depths[0]) if axis == WIDTH else (widths[0], size)
            for seed in seeds:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    network, step = model_fn(width, depth)
                    of_tensors = {
                        n: role_of.get(family(without_wrappers(n)), Role.HIDDEN if p.ndim > 1 else Role.HIDDEN_VECTOR)
                        for n, p in network.named_parameters()
                    }
                    subject = Probe(network, step, features(network), probe, of_tensors)
                    points.append(Point(axis, size, seed, measure(subject, at)))
    promised = {WIDTH: STABLE_WIDTH, DEPTH: STABLE}
    return fit((name, "own", "own"), None, points, role_of, promised)


def _roles(model_fn: ModelFn, widths: Sequence[int], depth: int, given: Mapping[str, str] | None) -> Mapping[str, Role]:
    """The role of every tensor, by family, from what grows between two widths."""
    with torch.random.fork_rng(devices=[]):
        (small, _), (big, _) = (model_fn(width, depth) for width in (min(widths), max(widths)))
    for name, p in small.named_parameters():
        if p.ndim > 2:
            raise ConfigError(f"{name} has shape {tuple(p.shape)}: only vectors and matrices can be checked")
    return {family(tensor.name): tensor.spec.role for tensor in infer(big, small, roles=given)}
