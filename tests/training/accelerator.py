"""Steps on an accelerator that is not there: torch's fake tensors know their device, and have no values.

In a process of its own, since a device that was registered stays.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from composition import compose_once
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from mupsweep.sweep import config
from mupsweep.sweep.plan import plan
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.training import build, trainer
from mupsweep.training.build import TrainingSetup
from mupsweep.training.microbatch import MicroBatcher

NAME = "nowhere"
STEPS = 2  # before a resume; some optimizers only look at the first gradient


def to_empty(network: nn.Module, *, device: torch.device, recurse: bool = True) -> nn.Module:
    """What torch's own does; it cannot give fake tensors to parameters that are none."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device=device))
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device=device)
    return network


def resumed(setup: TrainingSetup, run: RunSpec, device: torch.device) -> TrainingSetup:
    """Build a run anew, with the weights and the state of `setup`, which come from a file and so from the CPU."""
    network, state = (
        pytree.tree_map_only(Tensor, lambda t: t.detach().cpu(), part.state_dict())
        for part in (setup.network, setup.optimizer)
    )
    rebuilt = build.build(run, device)
    rebuilt.network.load_state_dict(network)
    rebuilt.optimizer.load_state_dict(state)
    return rebuilt


def wrong(overrides: list[str]) -> str:
    """What goes wrong in the first steps of the run that `overrides` describe, and in the first one after a resume."""
    device = torch.device(NAME)
    run = plan(config.load(overrides))[0]
    training, batches = run.resolved.training, MicroBatcher()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):  # constants
            setup = build.build(run, device)
            loss_of = partial(trainer.mean_loss, setup.network, training.precision)
            for step in range(STEPS + 1):
                if step == STEPS:
                    setup = resumed(setup, run, device)
                    loss_of = partial(trainer.mean_loss, setup.network, training.precision)
                tokens = torch.zeros((training.batch_size, run.size.context + 1), dtype=torch.long, device=device)
                if setup.optimizer.curvature_due(step):
                    inputs = tokens[:, :-1]
                    trainer.observe_curvature(setup.network, setup, inputs, run.seed, step, training.precision, batches)
                batches.backward(setup.network.parameters(), loss_of, tokens)
                trainer.clip(setup)
                setup.optimizer.step(1.0)
            with torch.no_grad():
                loss_of(tokens)
            leaves: list[Any] = pytree.tree_leaves(setup.optimizer.state_dict())
            large = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]  # no step counts
            elsewhere = {str(leaf.device) for leaf in large} - {f"{NAME}:0"}
        return f"state on {elsewhere}" if elsewhere else ""
    except DataDependentOutputException as error:
        return f"waits for the device: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def steps(cases: list[list[str]], report: Path) -> None:
    """Write what goes wrong in the first steps of every case, a list of overrides; an empty string where nothing does.

    To be called in a process that ends after it.
    """
    config.compose = compose_once
    _setup_privateuseone_for_python_backend(NAME)
    getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16]
    nn.Module.to_empty = to_empty  # type: ignore[assignment]
    build.initialise = lambda *_: None  # there are no values
    report.write_text(json.dumps([wrong(overrides) for overrides in cases]))
