"""torchtitan: the model, optimizers and schedule of its Llama 3, for a config registry of one's own.

Read at commit b5bcd76: `ParamGroupConfig` has LR, decay and eps of its own for every pattern, the first pattern that
fits a name takes it, one that fits none raises, and names have `_checkpoint_wrapped_module` in them under activation
checkpointing. Matrices can have `DistMuon`, in a single group. Its Llama has no multipliers, so the file has a block,
an attention and a head of its own that do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mupsweep.errors import ConfigError
from mupsweep.optimizers.muon import convert
from mupsweep.recipes.formats.pytorch import literal
from mupsweep.recipes.tensors import differences, groups, kind, kinds, need_model, own, torch_class, with_names_of

SUFFIX = ".py"
MADE_FOR = "torchtitan at commit b5bcd76 (2026-08-21), and its release 0.3.0"
NAMES = {  # ours -> those of torchtitan's llama3 without fused projections
    "token_embedding": "tok_embeddings",
    "blocks": "layers",
    "attention.query.": "attention.qkv_linear.wq.",
    "attention.key.": "attention.qkv_linear.wk.",
    "attention.value.": "attention.qkv_linear.wv.",
    "attention.query_norm": "attention.q_norm",
    "attention.key_norm": "attention.k_norm",
    "attention.output.": "attention.wo.",
    "mlp_norm": "ffn_norm",
    "mlp.gate.": "feed_forward.w1.",
    "mlp.down.": "feed_forward.w2.",
    "mlp.up.": "feed_forward.w3.",
    "head.": "lm_head.",
}
MUON = {"jordan": "original", "kimi": "match_rms_adamw", "bernstein": "spectral_unclamped"}  # ours -> adjust_lr_fn
REMEDIES = {"eps": "DistMuon takes one eps, and an eps as small as this has no effect"}
SCHEDULES = {  # ours -> decay_type, and decay_ratio where it is not the whole run after the warm-up
    "cosine": ("cosine", None),
    "linear": ("linear", None),
    "constant": ("linear", 0.0),
}

HEAD = """from dataclasses import dataclass, replace
from functools import partial

from torch import nn
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig
"""
FLEX_SHARD = "from torchtitan.distributed.flex_shard import BucketConfig, ComputeLayout, Owned\n"
BODY = '''from torchtitan.models.common import Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import GQAttention, QKVLinear
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.llama3 import Llama3Model
from torchtitan.models.llama3.model import Llama3TransformerBlock

BLOCK_MULTIPLIER = {block!r}  # on the output of every attention and MLP branch, before it joins the residual stream
OUTPUT_MULTIPLIER = {output!r}  # on the logits
ATTENTION_SCALE = {attention!r}  # on query . key
STEPS = {steps!r}
BATCH_SIZE = {batch_size!r}  # sequences of a step
CONTEXT = {context!r}
MAX_NORM = {max_norm}  # of the gradients of all parameters together
INIT = {init}  # standard deviations


def pattern(*names):
    """A regular expression of names, * for the number of a block, with and without activation checkpointing."""
    dot = r"\\.(?:_checkpoint_wrapped_module\\.)?"
    return "|".join("^" + name.replace(".", dot).replace("*", r"\\d+") + "$" for name in names)


PARAM_GROUPS = [
{groups}]
OPTIMIZER = OptimizersContainer.Config(param_groups=PARAM_GROUPS{factories})
LR_SCHEDULER = LRSchedulersContainer.Config(
    warmup_steps={warmup_steps!r}, decay_ratio={decay_ratio!r}, decay_type={decay_type!r}, min_lr_factor={floor!r}
)


class Attention(GQAttention):
    """Attention with the recipe's scale."""

    @dataclass(kw_only=True, slots=True)
    class Config(GQAttention.Config):
        pass

    def __init__(self, config):
        super().__init__(config)
        self.scaling = ATTENTION_SCALE


class Block(Llama3TransformerBlock):
    """A block with the multiplier on its branches."""

    @dataclass(kw_only=True, slots=True)
    class Config(Llama3TransformerBlock.Config):
        pass

    def forward(self, x, attention_masks, positions=None):
        h = x + BLOCK_MULTIPLIER * self.attention(self.attention_norm(x), attention_masks, positions)
        return h + BLOCK_MULTIPLIER * self.feed_forward(self.ffn_norm(h))


class Head(Linear):
    """The logits, with their multiplier."""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        pass

    def forward(self, input):
        return OUTPUT_MULTIPLIER * super().forward(input)


def linear(n_in, n_out, name, made_by=Linear):
    return made_by.Config(in_features=n_in, out_features=n_out, param_init=normal(name))


def normal(name):
    return {{"weight": partial(nn.init.normal_, std=INIT[name])}}


def norm(features, gains):
    return RMSNorm.Config(
        normalized_shape=features,
        eps=1e-5,
        elementwise_affine=gains,
        param_init={{"weight": nn.init.ones_}} if gains else {{}},
    )


def block(rope, inner_attention):
    """The config of a block."""
    attention = Attention.Config(
        dim={width},
        n_heads={heads},
        n_kv_heads={kv_heads},
        head_dim={head_dim},
        qkv_linear=QKVLinear.Config(
            head_dim={head_dim},
            wq=linear({width}, {q_rows}, "attention.query"),
            wkv=linear({width}, {kv_rows}, "attention.key"),
        ),
        wo=linear({q_rows}, {width}, "attention.output"),
        qk_norm={qk_norm},
        rope=replace(rope, dim={head_dim}, theta={rope_theta!r}, scaling="none"),
        inner_attention=replace(inner_attention),
    )
    feed_forward = FeedForward.Config(
        w1=linear({width}, {ffn_width}, "mlp.gate"),
        w2=linear({ffn_width}, {width}, "mlp.down"),
        w3=linear({width}, {ffn_width}, "mlp.up"),
    )
    norms = {{"attention_norm": norm({width}, {gains}), "ffn_norm": norm({width}, {gains})}}
    return Block.Config(attention=attention, feed_forward=feed_forward, **norms)


def model(rope, inner_attention):
    """The config of the model; rotary cache and attention kernel are those of your config."""
    return Llama3Model.Config(
        dim={width},
        vocab_size={vocab_size},
        enable_weight_tying={tied},
        tok_embeddings=Embedding.Config(
            num_embeddings={vocab_size}, embedding_dim={width}, param_init=normal("token_embedding")
        ),
        layers=[block(rope, inner_attention) for _ in range({depth})],
        norm=norm({width}, {gains}),
        lm_head=linear({width}, {vocab_size}, {head!r}, Head),
    )


def configure(config):
    """A Trainer.Config of yours for llama3, such as llama3_8b(), with the recipe's model, optimizers and schedule."""
    attention = config.model_spec.model.layers[0].attention
    config.model_spec = replace(config.model_spec, model=model(attention.rope, attention.inner_attention))
    for _, loss, _, _ in config.loss.traverse(CrossEntropyLoss.Config):
        loss.global_vocab_size = {vocab_size}
    config.optimizer, config.lr_scheduler = OPTIMIZER, LR_SCHEDULER
    training = config.training
    training.steps, training.max_norm = STEPS, MAX_NORM
    if hasattr(training, "seq_len"):  # release 0.3.0
        training.seq_len, training.global_batch_size = CONTEXT, BATCH_SIZE
    else:
        training.max_context_length, training.num_tokens_per_train_step = CONTEXT, BATCH_SIZE * CONTEXT
    return config
'''
DIST_MUON = """
# Every matrix is orthogonalised whole, on the rank that owns it, and a block's matrices travel together.
MATRICES = [[f"layers.{{i}}.{{name}}" for name in {names}] for i in range({depth})]
OWNED = ComputeLayout(shardings_by_mesh_axis={{"dp_shard": Owned()}})
OPTIMIZER.optimizer_factory_kwargs_by_name = {{
    "DistMuon": {{
        "compute_sharding_by_fqn": {{name: OWNED for names in MATRICES for name in names}},
        "bucket_configs": tuple(BucketConfig(patterns=tuple(names)) for names in MATRICES),
    }}
}}
"""


def rename(name: str) -> str:
    """A tensor's name in torchtitan's llama3."""
    return with_names_of(NAMES, name)


def render(recipe: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The module, and what it lacks."""
    need_model(recipe, "torchtitan", ("Llama",), "nanogpt, huggingface, megatron, olmo or pytorch")
    target, architecture, training = recipe["target"], recipe["architecture"], recipe["training"]
    if architecture["projections"] == "fused":
        raise ConfigError(
            "--format torchtitan: its fused projections interleave queries, keys and values of each key head, unlike "
            "the sweep's; sweep with model.projections=split, or use --format pytorch"
        )
    members = _groups(recipe)
    decay_type, decay_ratio = SCHEDULES.get(training["schedule"], ("linear", training["decay_fraction"]))
    gains, kv_rows = architecture["norm_gains"], target["kv_heads"] * target["head_dim"]
    qk_norm = {"none": "None", "plain": f"norm({target['head_dim']}, False)"}
    muon = [group for group in members if group["optimizer_name"] == "DistMuon"]
    body = BODY.format(
        block=recipe["block_multiplier"],
        output=recipe["output_multiplier"],
        attention=recipe["attention_scale"],
        **{key: training[key] for key in ("steps", "batch_size", "warmup_steps")},
        max_norm='float("inf")' if recipe["clip"] is None else repr(recipe["clip"]),
        init=literal(_init(recipe)),
        groups="".join(_written(group) for group in members),
        factories=', implementation="foreach"' if muon else "",
        decay_type=decay_type,
        decay_ratio=decay_ratio,
        floor=training["min_lr_frac"],
        **target,
        q_rows=target["heads"] * target["head_dim"],
        kv_rows=kv_rows,
        qk_norm=qk_norm.get(architecture["qk_norm"], f"norm({target['head_dim']}, True)"),
        rope_theta=architecture["rope_theta"],
        gains=gains,
        tied=architecture["tied"],
        head="token_embedding" if architecture["tied"] else "head",
    )
    text, limits = HEAD + (FLEX_SHARD if muon else "") + body, []
    if muon:
        eps, matrices = muon[0]["optimizer_kwargs"]["eps"], kinds(recipe)
        limits = differences(recipe, lambda row: {"eps": eps} if matrices[row["optimizer"]] == "Muon" else {}, REMEDIES)
        names = [name.removeprefix("layers.*.") for name in muon[0]["names"]]
        factories = DIST_MUON.format(names=literal(names), depth=target["depth"])
        text = text.replace("LR_SCHEDULER = ", factories.lstrip("\n") + "LR_SCHEDULER = ", 1)
    return text, limits


def _groups(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Parameter groups: optimizer_name, optimizer_kwargs, and the names that they take.

    Raises:
        ConfigError: an optimizer that torchtitan lacks, or matrices that its single group for Muon cannot hold.
    """
    classes = {optimizer["name"]: torch_class(optimizer) for optimizer in recipe["optimizers"]}
    missing = [name for name, found in classes.items() if found is None or found[0] not in ("AdamW", "Muon")]
    if missing:
        raise ConfigError(
            f"--format torchtitan: {' and '.join(missing)}: torchtitan's optimizers are Adam, AdamW and DistMuon; "
            "sweep with adamw, muon_jordan, muon_bernstein or muon_kimi, or use --format pytorch"
        )
    members = []
    for group in groups(recipe, rename):
        if kinds(recipe)[group["optimizer"]] == "Muon":
            continue
        numbers = {key: value for key, value in group.items() if key not in ("optimizer", "patterns")}
        numbers |= (classes[group["optimizer"]] or ("", {}))[1]
        members.append({"optimizer_name": "AdamW", "names": _names(group["patterns"]), "optimizer_kwargs": numbers})
    return [*(_muon(recipe, optimizer) for optimizer in recipe["optimizers"] if kind(optimizer) == "Muon"), *members]


def _muon(recipe: Mapping[str, Any], optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """The group of DistMuon, its LR in the convention of adjust_lr_fn."""
    scaling = optimizer["scaling"]
    convention = scaling if scaling in MUON else "jordan"
    rows = [row for row in own(recipe) if row["optimizer"] == optimizer["name"]]
    factors = [convert(1.0, scaling, convention, *row["shape"]) for row in rows]
    numbers = [(row["lr"] * f, row["weight_decay"] / f) for row, f in zip(rows, factors, strict=True)]
    if any(not math.isclose(a, b, rel_tol=1e-9) for other in numbers for a, b in zip(numbers[0], other, strict=True)):
        lrs = sorted({f"{lr:.4g}" for lr, _ in numbers}, key=float)
        raise ConfigError(
            "--format torchtitan: its DistMuon takes one LR and weight decay for all matrices, and the recipe has "
            f"several (LRs {', '.join(lrs)}); sweep with optimizer=muon_bernstein and without group_lr, or use "
            "--format pytorch"
        )
    lr, weight_decay = numbers[0]
    keywords = {key: optimizer[key] for key in ("momentum", "nesterov", "ns_steps")}
    keywords |= {"lr": lr, "weight_decay": weight_decay, "eps": rows[0]["eps"]}
    keywords |= {"adjust_lr_fn": MUON[convention], "fused": False, "foreach": False}
    names = list(dict.fromkeys(_any_block(rename(row["name"])) for row in rows))
    return {"optimizer_name": "DistMuon", "names": names, "optimizer_kwargs": keywords}


def _names(patterns: list[str]) -> list[str]:
    """Names as the module's `pattern` takes them."""
    return [p.removeprefix("^").removesuffix("$").replace(r"\d+", "*").replace(r"\.", ".") for p in patterns]


def _any_block(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _written(group: Mapping[str, Any]) -> str:
    names = "".join(f"            {name!r},\n" for name in group["names"])
    return (
        f"    ParamGroupConfig(\n        pattern=pattern(\n{names}        ),\n"
        f"        optimizer_name={group['optimizer_name']!r},\n"
        f"        optimizer_kwargs={literal(group['optimizer_kwargs'], 8)},\n    ),\n"
    )


def _init(recipe: Mapping[str, Any]) -> dict[str, float]:
    """Standard deviations of the matrices, by our names without the number of the block."""
    first = [row for row in own(recipe) if len(row["shape"]) == 2 and not row["name"].startswith("blocks.")]
    first += [row for row in own(recipe) if len(row["shape"]) == 2 and row["name"].startswith("blocks.0.")]
    return {row["name"].removeprefix("blocks.0.").removesuffix(".weight"): row["init_std"] for row in first}
