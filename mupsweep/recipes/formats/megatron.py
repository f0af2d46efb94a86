"""Megatron-LM: arguments of pretrain_gpt.py, with its muP (--use-mup, NVIDIA/Megatron-LM pull request 3058).

For Adam it divides LR and eps of every matrix but embeddings and head by the width multiplier, hidden init stds by its
root (projections back into the stream also by sqrt(2 L)), and scales logits and attention. It knows no rule for depth,
and leaves weight decay as it is. An explicit --decoupled-lr keeps the LR of the head in versions that scale it. Its
warm-up is a step behind the sweep's, with an LR of 0 at the first step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mupsweep.recipes.tensors import LAST_OF_BRANCH, differences, named, only_adamw, own, ratios, refuse_experts

SUFFIX = ".sh"
MADE_FOR = "Megatron-LM at commit d98e8a6 (2026-08-22)"
STYLES = {"cosine": "cosine", "linear": "linear", "wsd": "WSD", "constant": "constant"}
REMEDIES = {
    "lr": "Megatron has no argument for it: give a ParamGroupOverride in config_overrides",
    "weight_decay": "Megatron's muP leaves weight decay alone: give a ParamGroupOverride with wd_mult",
    "eps": "an eps as small as this has no effect, else give a ParamGroupOverride with eps",
    "init_std": "give TransformerConfig init methods of your own",
    "multiplier": "Megatron's muP has no rule for depth, and takes 1 for unset at the logits: multiply in "
    "TransformerLayer and GPTModel",
}


def render(recipe: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The arguments as a bash array, and what they lack."""
    refuse_experts(recipe, "megatron")
    arguments, limits = _model(recipe) | _training(recipe), _limits(recipe)
    if only_adamw(recipe):
        more, lacking = _muP(recipe)
        arguments, limits = arguments | more, limits + lacking
    else:
        names = " and ".join(optimizer["name"] for optimizer in recipe["optimizers"])
        limits.append(
            f"the optimizer: Megatron's muP rule is Adam's, and its Muon has scale modes of its own; the LRs of "
            f"{names} are in --format pytorch, per tensor"
        )
    standard = math.isclose(recipe["attention_scale"], recipe["target"]["head_dim"] ** -0.5)
    if not standard and "--use-mup" not in arguments:
        limits.append(f"the attention scale {recipe['attention_scale']:.6g}: set softmax_scale in TransformerConfig")
    lines = [f"    {key}" if value is None else f"    {key} {value}" for key, value in arguments.items()]
    return "MEGATRON_ARGS=(\n" + "\n".join(lines) + "\n)\n", limits


def _muP(recipe: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:  # noqa: N802
    """Arguments of LR, decay and init; and where Megatron's rule differs from the recipe's."""
    embedding, hidden = named(recipe, "token_embedding.weight"), named(recipe, "attention.output.weight")
    (adamw,) = recipe["optimizers"]
    m = ratios(recipe)[0] if hidden["lr_ratio"] != 1 or hidden["init_var_ratio"] != 1 else 1.0
    minimum = recipe["training"]["min_lr_frac"]
    base = {"lr": embedding["lr"], "eps": hidden["eps"] * m, "weight_decay": hidden["weight_decay"]}
    arguments = {
        "--optimizer": "adam",
        "--lr": base["lr"],
        "--min-lr": base["lr"] * minimum,
        "--weight-decay": base["weight_decay"],  # of most parameters
        "--adam-beta1": adamw["betas"][0],
        "--adam-beta2": adamw["betas"][1],
        "--adam-eps": base["eps"],
        "--init-method-std": embedding["init_std"],
    }
    if m != 1:
        arguments |= {
            "--use-mup": None,
            "--mup-base-hidden-size": recipe["base"]["width"],
            "--mup-output-mult": recipe["output_multiplier"],
            "--decoupled-lr": base["lr"],
            "--decoupled-min-lr": base["lr"] * minimum,
            **_attention(recipe),
        }

    # left at 1, Megatron's muP makes it 1 / m
    logits = 1.0 if m == 1 else recipe["output_multiplier"] if recipe["output_multiplier"] != 1 else 1 / m

    def theirs(row: Mapping[str, Any]) -> dict[str, float]:
        matrix, vector = row["role"] == "hidden", row["role"].endswith("vector")
        numbers = {
            "lr": base["lr"] / (m if matrix else 1.0),
            "eps": base["eps"] / (m if matrix else 1.0),
            "weight_decay": 0.0 if vector else base["weight_decay"],
        }
        if row["init"] == "normal":
            into_stream = any(part in row["name"] for part in LAST_OF_BRANCH)
            projection = (2 * recipe["target"]["depth"]) ** -0.5 if into_stream else 1.0
            numbers["init_std"] = embedding["init_std"] * (m**-0.5 if matrix else 1.0) * projection
        if matrix or vector:
            numbers["multiplier"] = 1.0
        elif row["role"] == "output":
            numbers["multiplier"] = logits
        return numbers

    return arguments, differences(recipe, theirs, REMEDIES)


def _attention(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's scale is sqrt(base head dim) / head dim ** power."""
    d, d0 = recipe["target"]["head_dim"], recipe["base"]["head_dim"]
    power = 1.0 if d == d0 else math.log(d0**0.5 / recipe["attention_scale"]) / math.log(d)
    return {"--mup-base-head-dim": d0, "--mup-attn-scale-power": round(power, 12)}


def _model(recipe: Mapping[str, Any]) -> dict[str, Any]:
    target, architecture = recipe["target"], recipe["architecture"]
    arguments: dict[str, Any] = {
        "--num-layers": target["depth"],
        "--hidden-size": target["width"],
        "--ffn-hidden-size": target["ffn_width"],
        "--num-attention-heads": target["heads"],
        "--kv-channels": target["head_dim"],
        "--seq-length": target["context"],
        "--max-position-embeddings": target["context"],
        "--attention-dropout": 0.0,
        "--hidden-dropout": 0.0,
    }
    if target["kv_heads"] != target["heads"]:
        arguments |= {"--group-query-attention": None, "--num-query-groups": target["kv_heads"]}
    if not any(row["tied_to"] for row in recipe["tensors"]):
        arguments["--untie-embeddings-and-output-weights"] = None
    if not any(row["name"].endswith("mlp.up.bias") for row in own(recipe)):
        arguments["--disable-bias-linear"] = None
    if architecture.get("qk_norm", "none") != "none":
        arguments["--qk-layernorm"] = None
    if "rope_theta" in architecture:
        arguments |= {
            "--swiglu": None,
            "--normalization": "RMSNorm",
            "--position-embedding-type": "rope",
            "--rotary-base": round(architecture["rope_theta"]),
        }
    else:
        arguments["--position-embedding-type"] = "learned_absolute"
    return arguments


def _training(recipe: Mapping[str, Any]) -> dict[str, Any]:
    training = recipe["training"]
    arguments = {
        "--train-iters": training["steps"],
        "--global-batch-size": training["batch_size"],
        "--lr-warmup-iters": training["warmup_steps"],
        "--lr-decay-iters": training["steps"],
        "--lr-decay-style": STYLES[training["schedule"]],
        "--clip-grad": recipe["clip"] or 0.0,
    }
    if training["schedule"] == "wsd":
        decay = round(training["decay_fraction"] * training["steps"])
        arguments |= {"--lr-wsd-decay-style": "linear", "--lr-wsd-decay-iters": decay}
    return arguments


def _limits(recipe: Mapping[str, Any]) -> list[str]:
    architecture, limits = recipe["architecture"], []
    if architecture.get("qk_norm", "none") == "plain" or architecture.get("norm_gains") is False:
        limits.append("norms without gains: Megatron's always have them; freeze them at 1")
    if architecture.get("bias") is False:
        limits.append("norms without biases: Megatron's LayerNorm always has them; freeze them at 0")
        limits.append(
            "GELU in GPT-2's tanh form: Megatron has it only with biases; set activation_func in TransformerConfig"
        )
    if recipe["training"]["warmup_steps"]:
        limits.append(
            "the warm-up: it starts with an LR of 0, a step behind the sweep's; change OptimizerParamScheduler"
        )
    return limits
