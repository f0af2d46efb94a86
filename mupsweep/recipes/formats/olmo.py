"""OLMo-core: a model's config and what TransformerTrainModuleConfig takes, optimizer and schedule, for its Llama.

Read at commit fa6c501: `OptimGroupOverride` has LR, decay and eps for every pattern (a glob; one that fits nothing
raises), and a block scales its branches (`attention_residual_alpha`, `feed_forward_residual_alpha`). Logits have no
multiplier, so the head takes it up. Its Muon refuses groups of one's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mupsweep.errors import ConfigError
from mupsweep.recipes.formats.pytorch import literal
from mupsweep.recipes.tensors import folded, groups, need_model, only_adamw, starts, with_names_of

SUFFIX = ".py"
MADE_FOR = "OLMo-core at commit fa6c501 (2026-06-22), and its release 3.0.0"
NAMES = {  # ours -> those of OLMo-core's Transformer
    "token_embedding.": "embeddings.",
    "attention.query.": "attention.w_q.",
    "attention.key.": "attention.w_k.",
    "attention.value.": "attention.w_v.",
    "attention.output.": "attention.w_out.",
    "attention.query_norm.": "attention.q_norm.",
    "attention.key_norm.": "attention.k_norm.",
    "mlp_norm.": "feed_forward_norm.",
    "mlp.gate.": "feed_forward.w1.",
    "mlp.down.": "feed_forward.w2.",
    "mlp.up.": "feed_forward.w3.",
    "head.": "lm_head.w_out.",
}

BODY = '''import re

import torch
from olmo_core.nn.attention import AttentionConfig
from olmo_core.nn.feed_forward import FeedForwardConfig
from olmo_core.nn.layer_norm import LayerNormConfig, LayerNormType
from olmo_core.nn.lm_head import LMHeadConfig
from olmo_core.nn.rope import RoPEConfig
from olmo_core.nn.transformer import TransformerBlockConfig, TransformerConfig
from olmo_core.optim import AdamWConfig, OptimGroupOverride
from olmo_core.optim.scheduler import ComposableScheduler, ComposableSchedulerStage

STEPS = {steps!r}  # Trainer's max_duration=Duration.steps(STEPS)
GLOBAL_BATCH_SIZE = {batch_tokens!r}  # tokens
NORM = LayerNormConfig(name=LayerNormType.rms, eps=1e-5, bias=False, elementwise_affine={gains!r})
MODEL = TransformerConfig(
    d_model={width!r},
    vocab_size={vocab_size!r},
    n_layers={depth!r},
    block=TransformerBlockConfig(
        sequence_mixer=AttentionConfig(
            n_heads={heads!r},
            n_kv_heads={kv_heads!r},
            head_dim={head_dim!r},
            bias=False,
            rope=RoPEConfig(theta={theta!r}),
            qk_norm={qk_norm},
            use_head_qk_norm={use_qk_norm},
        ),
        feed_forward=FeedForwardConfig(hidden_size={ffn_width!r}, bias=False),
        layer_norm=NORM,
        attention_residual_alpha={block!r},
        feed_forward_residual_alpha={block!r},
    ),
    lm_head=LMHeadConfig(layer_norm=NORM, bias=False),
    tie_word_embeddings={tied!r},
)
OPTIM = AdamWConfig(
    lr={lr!r},
    betas={betas!r},
    group_overrides=[
{overrides}    ],
)
SCHEDULER = ComposableScheduler(
    stages=[
{stages}    ]
)
# TransformerTrainModuleConfig(rank_microbatch_size=..., **TRAIN_MODULE)
TRAIN_MODULE = {{
    "optim": OPTIM,
    "scheduler": SCHEDULER,
    "max_grad_norm": {clip!r},
    "max_sequence_length": {context!r},
}}
# pattern of names -> standard deviation of a tensor at the start, or "ones"
INIT = {init}


@torch.no_grad()
def initialise(model):
    """Draw the start of every parameter: of train_module.model, once the train module is built, which draws its own."""
    for name, parameter in model.named_parameters():
        name = name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
        (start,) = [start for pattern, start in INIT.items() if re.search(pattern, name)]
        parameter.fill_(1.0) if start == "ones" else parameter.normal_(0.0, start)
'''


def rename(name: str) -> str:
    """A tensor's name in OLMo-core's Transformer."""
    return "lm_head.norm.weight" if name == "norm.weight" else with_names_of(NAMES, name)


def render(recipe: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The module, and what it lacks."""
    need_model(recipe, "OLMo-core", ("Llama",), "nanogpt, huggingface, megatron, torchtitan or pytorch")
    target, architecture, training = recipe["target"], recipe["architecture"], recipe["training"]
    if not only_adamw(recipe):
        names = " and ".join(optimizer["name"] for optimizer in recipe["optimizers"])
        raise ConfigError(
            f"--format olmo: the sweep trains with {names}, and of OLMo-core's optimizers only AdamW takes an LR per "
            "group as the rules give it; sweep with adamw, or use --format pytorch"
        )
    if architecture["projections"] == "fused":
        raise ConfigError(
            "--format olmo: OLMo-core's projections are split; sweep with model.projections=split, or use "
            "--format pytorch"
        )
    theta = architecture["rope_theta"]
    if theta != round(theta):
        raise ConfigError(
            f"--format olmo: OLMo-core's rotary base is a whole number, unlike model.rope_theta={theta}; sweep with "
            f"model.rope_theta={round(theta)}, or use --format pytorch"
        )
    recipe, limits = folded(recipe, ("output",))
    if not math.isclose(recipe["attention_scale"], target["head_dim"] ** -0.5):
        limits.append(
            f"the attention scale {recipe['attention_scale']:.6g}: AttentionConfig has 1/sqrt(head_dim); give "
            "Attention a softmax_scale"
        )
    (adamw,) = recipe["optimizers"]
    qk_norm = architecture["qk_norm"]
    norm_of_heads = (
        "None"
        if qk_norm == "none"
        else f"LayerNormConfig(name=LayerNormType.rms, eps=1e-5, bias=False, elementwise_affine={qk_norm == 'gains'})"
    )
    text = BODY.format(
        **target,
        steps=training["steps"],
        batch_tokens=training["batch_size"] * target["context"],
        gains=architecture["norm_gains"],
        theta=round(theta),
        qk_norm=norm_of_heads,
        use_qk_norm=None if qk_norm == "none" else True,
        block=recipe["block_multiplier"],
        tied=architecture["tied"],
        lr=recipe["base_lr"],
        betas=tuple(adamw["betas"]),
        overrides="".join(_override(group) for group in groups(recipe, rename)),
        stages="".join(f"        ComposableSchedulerStage({stage}),\n" for stage in _stages(training)),
        clip=recipe["clip"],
        init=literal(starts(recipe, rename)),
    )
    return text, limits


def _override(group: Mapping[str, Any]) -> str:
    globs = [p.removeprefix("^").removesuffix("$").replace(r"\d+", "*").replace(r"\.", ".") for p in group["patterns"]]
    numbers = {key: value for key, value in group.items() if key not in ("optimizer", "patterns")}
    return f"        OptimGroupOverride(\n            params={globs!r},\n            opts={numbers!r},\n        ),\n"


def _stages(training: Mapping[str, Any]) -> list[str]:
    """Arguments of the stages; steps are counted from 1, and the last of the warm-up and the next have the peak."""
    steps, warmup, floor = training["steps"], training["warmup_steps"], training["min_lr_frac"]
    decay = {"wsd": round(training["decay_fraction"] * steps), "constant": 0}.get(training["schedule"], steps - warmup)
    shape = "cosine" if training["schedule"] == "cosine" else "linear"
    stages = [
        (warmup, 'shape="linear", start_lr_fraction=0.0, end_lr_fraction=1.0'),
        (steps + 1 - warmup - decay, 'shape="linear", start_lr_fraction=1.0, end_lr_fraction=1.0'),
        (decay, f'shape="{shape}", start_lr_fraction=1.0, end_lr_fraction={floor!r}'),
    ]
    return [f"duration={duration}, {rest}" for duration, rest in stages if duration > 0]
