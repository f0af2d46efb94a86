"""PyTorch: a snippet with the optimizers, the start and the forward constants of the target, by patterns of names."""

from __future__ import annotations

from collections.abc import Mapping
from pprint import pformat
from typing import Any

from mupsweep.recipes.tensors import groups, starts, torch_class

SUFFIX = ".py"
MADE_FOR = "torch 2.13"

BODY = '''import math
import re

import torch

BLOCK_MULTIPLIER = {block!r}  # on the output of every attention and MLP branch, before it joins the residual stream
OUTPUT_MULTIPLIER = {output!r}  # on the logits
ATTENTION_SCALE = {attention!r}  # on query . key
CLIP_NORM = {clip!r}  # of the gradients of all parameters together; None: do not clip
TRAINING = {training}
# pattern of names -> standard deviation of a tensor at the start, or "ones", "zeros" or "fixed"
INIT = {init}
# weight_decay is coupled, as in torch: a step subtracts lr * weight_decay * W. schedule() multiplies every lr.
GROUPS = {groups}
OPTIMIZERS = {{{optimizers}}}


def optimizers(model, rename=lambda name: name):
    """One torch optimizer per class, over every parameter once; `rename` makes the patterns' names of yours."""
    members = {{name: [] for name in OPTIMIZERS}}
    left = {{name: p for name, p in model.named_parameters() if p.requires_grad}}
    for group in GROUPS:
        names = [name for name in left if any(re.search(pattern, rename(name)) for pattern in group["patterns"])]
        if not names:
            raise ValueError(f"no parameter fits {{group['patterns']}}: give optimizers() a rename for your names")
        numbers = {{key: value for key, value in group.items() if key not in ("patterns", "optimizer")}}
        members[group["optimizer"]].append({{"params": [left.pop(name) for name in names], **numbers}})
    if left:
        raise ValueError(f"no pattern fits {{sorted(left)}}: give optimizers() a rename for your names")
    return [make(members[name]) for name, make in OPTIMIZERS.items() if members[name]]


def schedule(optimizer):
    """The sweep's warm-up and decay, as a factor on every LR of an optimizer; call its step() after the optimizer's."""
    steps, warmup, floor = TRAINING["steps"], TRAINING["warmup_steps"], TRAINING["min_lr_frac"]
    decays = {{"wsd": round(TRAINING["decay_fraction"] * steps), "constant": 0}}
    decay = decays.get(TRAINING["schedule"], steps - warmup)

    def factor(step):
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, max(0.0, (step - steps + decay) / max(1, decay)))
        left = 0.5 * (1 + math.cos(math.pi * progress)) if TRAINING["schedule"] == "cosine" else 1 - progress
        return floor + (1 - floor) * left

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def initialise(model, rename=lambda name: name):
    """Draw the start of every parameter."""
    for name, parameter in model.named_parameters():
        (start,) = [start for pattern, start in INIT.items() if re.search(pattern, rename(name))]
        if start == "fixed":
            continue  # as the model sets it, whatever the seed
        if start in ("ones", "zeros"):
            parameter.fill_(start == "ones")
        else:
            parameter.normal_(0.0, start)
'''
DECOUPLED_SGD = '''

class DecoupledSGD(torch.optim.SGD):
    """SGD with weight decay beside the momentum; torch's goes through it, 1 / (1 - momentum) times as strong."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, weight_decay in zip(self.param_groups, decays):
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * weight_decay)
            group["weight_decay"] = 0.0
        super().step()
        for group, weight_decay in zip(self.param_groups, decays):
            group["weight_decay"] = weight_decay
        return loss
'''
FOREIGN = '''

def from_mupsweep(**section):
    """An optimizer that torch does not have."""
    from mupsweep.schema import instantiate

    return instantiate(section, "optimizer").build
'''


def render(recipe: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The snippet; it runs with torch alone wherever torch has the optimizers."""
    lines, foreign, helpers = [], [], ""
    for optimizer in recipe["optimizers"]:
        torch_optimizer = torch_class(optimizer)
        if torch_optimizer is None:
            foreign.append(optimizer["name"])
            lines.append(f"{optimizer['name']!r}: from_mupsweep(**{literal(optimizer, 8)})")
        else:
            arguments = "".join(f", {key}={value!r}" for key, value in torch_optimizer[1].items())
            class_name = f"torch.optim.{torch_optimizer[0]}"
            if torch_optimizer[0] == "SGD" and optimizer["momentum"] and optimizer["weight_decay"]:
                class_name, helpers = "DecoupledSGD", DECOUPLED_SGD
            lines.append(f"{optimizer['name']!r}: lambda groups: {class_name}(groups{arguments})")
    body = BODY.format(
        block=recipe["block_multiplier"],
        output=recipe["output_multiplier"],
        attention=recipe["attention_scale"],
        clip=recipe["clip"],
        training=literal(recipe["training"]),
        init=literal(starts(recipe)),
        groups=literal(groups(recipe)),
        optimizers="".join(f"\n    {line}," for line in lines) + "\n",
    )
    helpers += FOREIGN if foreign else ""
    if helpers:
        body = body.replace("\nBLOCK_MULTIPLIER", helpers + "\n\nBLOCK_MULTIPLIER", 1)
    if not foreign:
        return body, []
    return body, [f"torch has no {' or '.join(foreign)}: the snippet takes mupsweep's, which has to be installed"]


def literal(value: Any, indent: int = 0) -> str:
    """Python source of plain data, a line per entry."""
    text = pformat(value, width=110 - indent, sort_dicts=False)
    return text.replace("\n", "\n" + " " * indent)
