"""torchtitan: the optimizer of its config registry (ParamGroupConfig, pytorch/torchtitan pull requests 2859 and 3269).

torchtitan has no muP of its own, but every group has its own optimizer, LR, decay and eps, and it refuses a pattern
that fits nothing. Its Llama has no multipliers, so they are folded into the weights behind them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mupsweep.recipes.tensors import folded, groups, need_model, starts, torch_class

SUFFIX = ".py"
NAMES = {  # ours -> those of torchtitan's llama3
    "token_embedding": "tok_embeddings",
    "blocks": "layers",
    "attention.query.": "attention.wq.",
    "attention.key.": "attention.wk.",
    "attention.value.": "attention.wv.",
    "attention.output.": "attention.wo.",
    "mlp_norm": "ffn_norm",
    "mlp.gate.": "feed_forward.w1.",
    "mlp.down.": "feed_forward.w2.",
    "mlp.up.": "feed_forward.w3.",
    "head.": "output.",
}
CLASSES = ("AdamW", "Muon")


def rename(name: str) -> str:
    """A tensor's name in torchtitan's llama3."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def render(recipe: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The optimizer's config and the start of the weights, and what they lack."""
    need_model(recipe, "torchtitan", "Llama", "nanogpt, huggingface, megatron or pytorch")
    target, training = recipe["target"], recipe["training"]
    folding, limits = folded(recipe)
    classes = {optimizer["name"]: torch_class(optimizer) for optimizer in recipe["optimizers"]}
    missing = [name for name, named in classes.items() if named is None or named[0] not in CLASSES]
    if missing:
        limits.append(
            f"{' and '.join(missing)}: torchtitan's container takes {', '.join(CLASSES)}; add a class to "
            "OptimizersContainer._resolve_optimizer_cls"
        )
    lines = []
    for group in groups(folding, rename):
        name, keywords = classes[group["optimizer"]] or (group["optimizer"], {})
        numbers = {k: v for k, v in group.items() if k not in ("optimizer", "patterns")} | keywords
        lines.append(
            f"    ParamGroupConfig(\n        pattern={'|'.join(group['patterns'])!r},\n"
            f"        optimizer_name={name!r},\n        optimizer_kwargs={numbers!r},\n    ),\n"
        )
    limits += [
        "the start of the weights: torchtitan draws them in its model's init_weights; use INIT below there (pattern of "
        "names -> standard deviation)",
        *_limits(recipe),
    ]
    stds = "".join(f"    {key!r}: {value!r},\n" for key, value in starts(folding, rename).items())
    text = (
        "from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig\n\n"
        f"# dim={target['width']}, n_layers={target['depth']}, n_heads={target['heads']}, "
        f"n_kv_heads={target['kv_heads']}, hidden dim {target['ffn_width']}, seq_len={target['context']}\n"
        f"# steps={training['steps']}, global_batch_size={training['batch_size']}, "
        f"max_norm={recipe['clip']}, warmup_steps={training['warmup_steps']}, schedule {training['schedule']} down to "
        f"{training['min_lr_frac']:g} of the peak\n"
        f"PARAM_GROUPS = [\n{''.join(lines)}]\nOPTIMIZER = OptimizersContainer.Config(param_groups=PARAM_GROUPS)\n"
        f"INIT = {{\n{stds}}}\n"
    )
    return text, limits


def _limits(recipe: Mapping[str, Any]) -> list[str]:
    target, architecture, limits = recipe["target"], recipe["architecture"], []
    if not math.isclose(recipe["attention_scale"], target["head_dim"] ** -0.5):
        limits.append(f"the attention scale {recipe['attention_scale']:.6g}: pass it to the model's attention")
    if architecture["projections"] == "fused":
        limits.append("fused projections: torchtitan's are split; sweep with model.projections=split")
    if architecture["qk_norm"] != "none" or not architecture["norm_gains"]:
        limits.append("the norms: torchtitan's Llama has gains on every norm, and none for queries and keys")
    return limits
