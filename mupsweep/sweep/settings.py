"""All the numbers that a run is trained with, as a recipe's JSON holds them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mupsweep.models.shape import Size
from mupsweep.scaling.group_lr import without_ones
from mupsweep.sweep import tensor_rules
from mupsweep.sweep.config import variant_tree
from mupsweep.sweep.run_spec import ResolvedVariant, RunSpec

SHAPE = ("width", "depth", "heads", "kv_heads", "head_dim", "ffn_width", "vocab_size", "context")
NOT_EXPORTED = ("log2_lr_range", "group_lr")  # keys of an optimizer: its groups hold the LRs themselves
SCHEDULE = ("batch_size", "schedule", "min_lr_frac", "decay_fraction", "precision")


def settings(resolved: ResolvedVariant, size: Size, base_lr: float) -> dict[str, Any]:
    """Everything that a run of `resolved` at a size is trained with; all that an export to another trainer needs."""
    resolved = resolved.at(size)
    forward = tensor_rules.multipliers(resolved, size)
    training, group_lr = resolved.training, without_ones(resolved.optimizer.group_lr)
    return {
        "target": {key: getattr(size, key) for key in SHAPE},
        "base": {key: getattr(resolved.size(1.0, 1.0), key) for key in SHAPE},
        "base_lr": base_lr,
        **({"group_lr": group_lr} if group_lr else {}),
        "parameters": resolved.cost(size).parameters,
        "block_multiplier": forward.block,
        "output_multiplier": forward.output,
        "attention_scale": forward.attention,
        "clip": tensor_rules.clip_norm(resolved),
        "architecture": dict(resolved.variant.model),
        "training": {
            "tokens": resolved.tokens,
            "steps": resolved.steps,
            "warmup_steps": training.warmup_steps(resolved.steps),
            **{key: getattr(training, key) for key in SCHEDULE},
        },
        "optimizers": [
            {
                "kind": f"{type(part.optimizer).__module__}.{type(part.optimizer).__qualname__}",
                **{key: value for key, value in asdict(part.optimizer).items() if key not in NOT_EXPORTED},
            }
            for part in resolved.optimizers
        ],
        "tensors": [tensor_rules.rule_record(row) for row in tensor_rules.rules(resolved, size, base_lr)],
    }


def run_config(run: RunSpec) -> dict[str, Any]:
    """What the config.yaml of a run holds: the run, the sections of its variant, and the rules of its roles."""
    return run.row() | variant_tree(run.resolved.variant) | {"rules": tensor_rules.role_records(run)}


def run_recipe(run: RunSpec) -> dict[str, Any]:
    """The recipe of a run: the keys that a recipe for a target has too, and the run's own id and seed."""
    model, optimizer, parametrization = run.resolved.variant.names
    return {
        "run_id": run.run_id,
        "model": model,
        "optimizer": optimizer,
        "parametrization": parametrization,
        "log2_lr": run.log2_lr,
        "seed": run.seed,
        **settings(run.resolved, run.size, run.base_lr),
    }
