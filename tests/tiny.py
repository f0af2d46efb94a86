"""Every model of configs/model, and each of them small enough to build and train in a test."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from mupsweep.models import Architecture, Multipliers
from mupsweep.models.shape import Size
from mupsweep.sweep import config, run_spec
from mupsweep.sweep.run_spec import ResolvedVariant, RunSpec

MODELS = [name for name in config.choices("model") if name not in ("own", "huggingface")]  # which need code
# The yamls that name a class; presets inherit theirs.
ARCHITECTURES = [name for name in MODELS if "\nkind:" in (config.config_root() / "model" / f"{name}.yaml").read_text()]


@cache
def resolve(*overrides: str) -> ResolvedVariant:
    """The recipe that these words choose."""
    return run_spec.resolve(config.load(overrides).variants[0])


def tiny(name: str, optimizer: str = "adamw", parametrization: str = "spectral", **keys: object) -> RunSpec:
    """A run of `model=name`: width 16, two blocks, two heads, 16 tokens, at the base shape; keys are the model's."""
    model = resolve(f"model={name}").model
    shape: dict[str, object] = {"width": 16, "depth": 2, "head_dim": 8, "context": 16}
    if hasattr(model, "kv_heads"):
        shape["kv_heads"] = None
    resolved = replace(
        resolve("data.tokenizer=bytes"),
        model=replace(model, **(shape | keys)),  # type: ignore[arg-type]
        optimizer=resolve(f"optimizer={optimizer}").optimizer,
        parametrization=resolve(f"parametrization={parametrization}").parametrization,
    )
    return RunSpec(
        "tiny", resolved, resolved.size(1.0, 1.0), log2_lr=-6.0, seed=0, cost=resolved.cost(resolved.size(1.0, 1.0))
    )


def scaled(run: RunSpec, width_ratio: float, depth_ratio: float = 1.0) -> RunSpec:
    """The run at other ratios."""
    return replace(run, size=run.resolved.size(width_ratio, depth_ratio))


def network(model: Architecture, size: Size, multipliers: Multipliers | None = None, std: float = 0.2) -> nn.Module:
    """The network with every weight, gain and bias drawn at random, large enough for each to matter."""
    net = model.network(size, multipliers or Multipliers(1.0, 1.0, size.head_dim**-0.5))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * std)
            if p.ndim == 1:
                p.add_(1.0)
    return net


def tokens(size: Size, batch: int = 3, length: int | None = None) -> Tensor:
    """Random token ids."""
    shape = (batch, length or size.context)
    return torch.randint(size.vocab_size, shape, generator=torch.Generator().manual_seed(1))
