"""nanoGPT: a config file for EleutherAI/nanoGPT-mup, branch completep; its model.py says which tensor gets what.

That fork has the width rule (mup_*) and the depth rule (depth_*) of AdamW: hidden LR 1/m_d * m_L^(a-1), hidden init std
1/sqrt(m_d), weight decay m_d, branches m_L^-a, logits 1/m_d, and one eps for all tensors, adam_eps / m_d * m_L^-a. It
ties the head. Its warm-up is a step behind the sweep's, with an LR of 0 at the first step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mupsweep.recipes.tensors import differences, named, need_model, only_adamw, ratios

SUFFIX = ".py"
MADE_FOR = "EleutherAI/nanoGPT-mup, branch completep, at commit 6f8bc3b (2025-05-09)"
MULTIPLIERS = ("mup_width_multiplier", "depth_multiplier", "depth_alpha_exp")
REMEDIES = {
    "lr": "scale it in configure_optimizers",
    "weight_decay": "set it in configure_optimizers",
    "eps": "it has one eps for all tensors, and one as small as this has no effect",
    "init_std": "set it in GPT.__init__",
    "multiplier": "multiply there in GPT.forward or Block.forward",
}


def render(recipe: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The config, and what it lacks."""
    need_model(recipe, "nanoGPT", ("NanoGPT",), "huggingface, torchtitan, olmo, megatron or pytorch")
    settings, limits = _model(recipe), _limits(recipe)
    if only_adamw(recipe):
        (adamw,) = recipe["optimizers"]
        embedding = named(recipe, "token_embedding.weight")
        eps = named(recipe, "mlp.up.weight")["eps"]
        limits += differences(recipe, lambda row: _theirs(row, settings, embedding, eps), REMEDIES)
        m_d, m_L, a = (settings[key] for key in MULTIPLIERS)
        settings |= {
            "adam_eps": eps * m_d * m_L**a,
            "learning_rate": embedding["lr"],
            "min_lr": embedding["lr"] * recipe["training"]["min_lr_frac"],
            "weight_decay": embedding["weight_decay"],
            "beta1": adamw["betas"][0],
            "beta2": adamw["betas"][1],
        }
    else:
        names = " and ".join(optimizer["name"] for optimizer in recipe["optimizers"])
        limits.append(
            f"LRs: nanoGPT trains with AdamW alone, the sweep with {names}; return optimizers() of --format pytorch "
            "from GPT.configure_optimizers"
        )
    return "\n".join(f"{key} = {value!r}" for key, value in settings.items()) + "\n", limits


def _model(recipe: Mapping[str, Any]) -> dict[str, Any]:
    target, training = recipe["target"], recipe["training"]
    r_n, r_L = ratios(recipe)
    hidden = named(recipe, "mlp.up.weight")
    r_n = r_n if hidden["lr_ratio"] != 1 or hidden["init_var_ratio"] != 1 else 1.0
    r_L = r_L if hidden["multiplier_ratio"] != 1 else 1.0
    alpha = -math.log(hidden["multiplier_ratio"]) / math.log(r_L) if r_L != 1 else 1.0
    return {
        "n_layer": target["depth"],
        "n_head": target["heads"],
        "n_embd": target["width"],
        "block_size": target["context"],
        "bias": recipe["architecture"]["bias"],
        "dropout": 0.0,
        "init_std": named(recipe, "token_embedding.weight")["init_std"],
        "mup_enabled": True,  # with multipliers of 1 it is SP without GPT-2's smaller projections, as in the sweep
        "mup_width_multiplier": r_n,
        "mup_input_alpha": 1.0,
        "mup_output_alpha": recipe["output_multiplier"] * r_n,
        "mup_disable_attention_scaling": True,
        "depth_alpha_enabled": True,
        "depth_multiplier": r_L,
        "depth_alpha_exp": alpha,
        "batch_size": training["batch_size"],
        "gradient_accumulation_steps": 1,
        "max_iters": training["steps"],
        "lr_decay_iters": training["steps"],
        "warmup_iters": training["warmup_steps"],
        "decay_lr": training["schedule"] != "constant",
        "grad_clip": recipe["clip"] or 0.0,
    }


def _theirs(row: Mapping[str, Any], settings: Mapping[str, Any], embedding: Mapping[str, Any], eps: float) -> Any:
    """What that model.py gives a tensor."""
    m_d, m_L, a = (settings[key] for key in MULTIPLIERS)
    inside, matrix = row["role"].startswith("hidden"), row["role"] == "hidden"
    numbers = {
        "lr": embedding["lr"] * (m_L ** (a - 1) if inside else 1.0) / (m_d if matrix else 1.0),
        "eps": eps,
        "weight_decay": 0.0 if row["role"].endswith("vector") else embedding["weight_decay"] * (m_d if matrix else 1.0),
    }
    if row["init"] == "normal":
        numbers["init_std"] = settings["init_std"] / (m_d**0.5 if matrix else 1.0)
    if inside or row["role"] == "output":
        numbers["multiplier"] = m_L**-a if inside else settings["mup_output_alpha"] / m_d
    return numbers


def _limits(recipe: Mapping[str, Any]) -> list[str]:
    target, limits = recipe["target"], []
    if not any(row["tied_to"] for row in recipe["tensors"]):
        limits.append(
            "the untied head: remove the line that ties wte to lm_head in GPT.__init__, and add lm_head.weight to "
            "emb_params in GPT.configure_optimizers"
        )
    if not math.isclose(recipe["attention_scale"], target["head_dim"] ** -0.5):
        limits.append(f"the attention scale {recipe['attention_scale']:.6g}: set it in CausalSelfAttention.forward")
    if recipe["training"]["warmup_steps"]:
        limits.append("the warm-up: it starts with an LR of 0, a step behind the sweep's; change get_lr in train.py")
    if recipe["training"]["schedule"] not in ("cosine", "constant"):
        limits.append(f"the schedule {recipe['training']['schedule']}: change get_lr in train.py")
    if target["ffn_width"] != 4 * target["width"]:
        limits.append(f"the MLP's width {target['ffn_width']}: change MLP.__init__")
    limits.append("GELU in GPT-2's tanh form: nn.GELU(approximate='tanh') in MLP.__init__")
    return limits
