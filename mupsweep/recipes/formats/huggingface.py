"""Hugging Face Trainer: the model's config, the optimizer with its groups, and the schedule.

Llama becomes transformers' Granite, which is Llama with the multipliers of muP; GPT-2 has none, so they are folded into
the weights behind them. Groups and schedule reach the Trainer as `optimizers`: its own optimizer knows one LR and two
weight decays, and its own warm-up is a step behind ours, with an LR of 0 at the first step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mupsweep.errors import ConfigError
from mupsweep.recipes.formats import pytorch
from mupsweep.recipes.tensors import folded, kinds, refuse_experts

SUFFIX = ".py"
MADE_FOR = "transformers 5.23"
GRANITE = {  # transformers -> ours
    "model.embed_tokens.": "token_embedding.",
    "model.layers.": "blocks.",
    "self_attn.q_proj.": "attention.query.",
    "self_attn.k_proj.": "attention.key.",
    "self_attn.v_proj.": "attention.value.",
    "self_attn.o_proj.": "attention.output.",
    "post_attention_layernorm.": "mlp_norm.",
    "input_layernorm.": "attention_norm.",
    "_proj.": ".",
    "model.norm.": "norm.",
    "lm_head.": "head.",
}
GPT2 = {
    "transformer.wte.": "token_embedding.",
    "transformer.wpe.": "position_embedding.",
    "transformer.h.": "blocks.",
    "transformer.ln_f.": "norm.",
    "ln_1.": "attention_norm.",
    "ln_2.": "mlp_norm.",
    "attn.c_attn.": "attention.query.",
    "attn.c_proj.": "attention.output.",
    "mlp.c_fc.": "mlp.up.",
    "mlp.c_proj.": "mlp.down.",
    "lm_head.": "head.",
}

BODY = '''

NAMES = {names}
MODEL = {model}
TRAINING_ARGUMENTS = {arguments}


def rename(name):
    """Our name of a parameter."""
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def make_model():
    """The model, drawn as the recipe says."""
    import transformers

    config = transformers.AutoConfig.for_model(**MODEL)
    model = transformers.AutoModelForCausalLM.from_config(config)
    initialise(model, rename)
    return model


# (optimizer,) = optimizers(model, rename)
# Trainer(model=model, args=TrainingArguments(output_dir=..., **TRAINING_ARGUMENTS),
#         optimizers=(optimizer, schedule(optimizer)), ...)
'''


def render(recipe: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The snippet: the PyTorch one for transformers' names, the model's config and the Trainer's arguments."""
    refuse_experts(recipe, "huggingface")
    limits: list[str] = []
    if recipe["architecture"]["kind"].endswith(".Llama"):
        names, model = GRANITE, _granite(recipe)
    else:
        names, model = GPT2, _gpt2(recipe)
        recipe, limits = folded(recipe)
    body, more = pytorch.render(recipe)
    limits = [*limits, *more]
    if len(recipe["optimizers"]) > 1:
        limits.append(
            "the second optimizer: the Trainer steps one; give it a torch.optim.Optimizer of yours that steps every "
            "member of optimizers(model, rename)"
        )
    arguments = {
        "max_steps": recipe["training"]["steps"],
        "per_device_train_batch_size": recipe["training"]["batch_size"],
        "max_grad_norm": recipe["clip"] or 0.0,
    }
    text = body + BODY.format(
        names=pytorch.literal(names), model=pytorch.literal(model), arguments=pytorch.literal(arguments)
    )
    return text, limits


def _granite(recipe: Mapping[str, Any]) -> dict[str, Any]:
    target, architecture = recipe["target"], recipe["architecture"]
    if architecture["projections"] == "fused" or architecture["qk_norm"] != "none" or not architecture["norm_gains"]:
        raise ConfigError(
            "--format huggingface: transformers' Granite has split projections, gains on its norms and no norm of "
            "queries and keys, unlike the sweep's model; use --format pytorch for a model of your own"
        )
    if target["head_dim"] * target["heads"] != target["width"]:
        raise ConfigError("--format huggingface: transformers' Granite has heads * head_dim = width")
    return {
        "model_type": "granite",
        "vocab_size": target["vocab_size"],
        "hidden_size": target["width"],
        "intermediate_size": target["ffn_width"],
        "num_hidden_layers": target["depth"],
        "num_attention_heads": target["heads"],
        "num_key_value_heads": target["kv_heads"],
        "max_position_embeddings": target["context"],
        "rope_parameters": {"rope_type": "default", "rope_theta": architecture["rope_theta"]},
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": architecture["tied"],
        "embedding_multiplier": 1.0,
        "residual_multiplier": recipe["block_multiplier"],
        "logits_scaling": 1 / recipe["output_multiplier"],
        "attention_multiplier": recipe["attention_scale"],
    }


def _gpt2(recipe: Mapping[str, Any]) -> dict[str, Any]:
    target, architecture = recipe["target"], recipe["architecture"]
    scale, factor = recipe["attention_scale"] * math.sqrt(target["head_dim"]), architecture["attention_multiplier"]
    lacking = [] if architecture["bias"] else ["model.bias=true"]
    if not math.isclose(scale, 1):
        lacking += ["model.attention_multiplier=1"] if factor != 1 else []
        lacking += [] if math.isclose(scale, factor) else ["model.heads=null, which fixes model.head_dim"]
    if lacking:
        raise ConfigError(
            "--format huggingface: transformers' GPT-2 has biases and the attention scale 1/sqrt(d_head), unlike the "
            f"sweep's model; sweep with {' and '.join(lacking)}, or use --format pytorch"
        )
    if set(kinds(recipe).values()) - {"AdamW", "SGD"}:
        raise ConfigError(
            "--format huggingface: transformers' GPT-2 stores query, key and value as one transposed matrix, which "
            "optimizers of matrices cannot take; use --format pytorch, or a Llama"
        )
    return {
        "model_type": "gpt2",
        "vocab_size": target["vocab_size"],
        "n_positions": target["context"],
        "n_embd": target["width"],
        "n_layer": target["depth"],
        "n_head": target["heads"],
        "n_inner": target["ffn_width"],
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": architecture["tied"],
    }
