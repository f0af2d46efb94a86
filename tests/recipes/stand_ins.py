"""What exports import from trainers that are no dependency of ours: the fields of their configs, and how they group.

Facts read from torchtitan at commit b5bcd76 and from OLMo-core at commit fa6c501; test_real_trainers.py has the
trainers themselves, where they can be imported.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import make_dataclass
from fnmatch import fnmatch
from typing import Any


def config(name: str, fields: str) -> type:
    """A dataclass with these fields, keywords only, each of them optional."""
    return make_dataclass(name, [(field, Any, None) for field in fields.split()], kw_only=True)


def component(name: str, fields: str) -> type:
    """A class of torchtitan's with its nested Config."""
    return type(name, (), {"Config": config("Config", f"{fields} param_init")})


MODULES: dict[str, dict[str, Any]] = {
    "torchtitan.components.loss": {"CrossEntropyLoss": component("CrossEntropyLoss", "global_vocab_size")},
    "torchtitan.components.optimizer": {
        "ParamGroupConfig": config("ParamGroupConfig", "pattern optimizer_name optimizer_kwargs"),
        "OptimizersContainer": component(
            "OptimizersContainer", "param_groups implementation optimizer_factory_kwargs_by_name"
        ),
        "LRSchedulersContainer": component(
            "LRSchedulersContainer", "warmup_steps total_steps decay_ratio decay_type min_lr_factor"
        ),
    },
    "torchtitan.distributed.flex_shard": {
        "BucketConfig": config("BucketConfig", "patterns name"),
        "ComputeLayout": config("ComputeLayout", "shardings_by_mesh_axis shard_order_by_tensor_dim"),
        "Owned": config("Owned", ""),
    },
    "torchtitan.models.common": {
        "Embedding": component("Embedding", "num_embeddings embedding_dim"),
        "Linear": component("Linear", "in_features out_features bias"),
        "RMSNorm": component("RMSNorm", "normalized_shape eps elementwise_affine"),
    },
    "torchtitan.models.common.attention": {
        "GQAttention": component(
            "GQAttention", "n_heads dim qkv_linear wo qk_norm n_kv_heads head_dim inner_attention rope"
        ),
        "QKVLinear": component("QKVLinear", "head_dim wq wkv"),
    },
    "torchtitan.models.common.feed_forward": {"FeedForward": component("FeedForward", "w1 w2 w3")},
    "torchtitan.models.llama3": {
        "Llama3Model": component("Llama3Model", "dim vocab_size lm_head tok_embeddings norm layers enable_weight_tying")
    },
    "torchtitan.models.llama3.model": {
        "Llama3TransformerBlock": component(
            "Llama3TransformerBlock", "attention feed_forward moe attention_norm ffn_norm"
        )
    },
    "olmo_core.nn.attention": {
        "AttentionConfig": config(
            "AttentionConfig", "n_heads n_kv_heads head_dim bias rope qk_norm use_head_qk_norm backend"
        )
    },
    "olmo_core.nn.feed_forward": {"FeedForwardConfig": config("FeedForwardConfig", "hidden_size bias activation")},
    "olmo_core.nn.layer_norm": {
        "LayerNormConfig": config("LayerNormConfig", "name eps elementwise_affine bias"),
        "LayerNormType": types.SimpleNamespace(rms="rms"),
    },
    "olmo_core.nn.lm_head": {"LMHeadConfig": config("LMHeadConfig", "name layer_norm bias")},
    "olmo_core.nn.rope": {"RoPEConfig": config("RoPEConfig", "name theta scaling")},
    "olmo_core.nn.transformer": {
        "TransformerBlockConfig": config(
            "TransformerBlockConfig",
            "sequence_mixer layer_norm feed_forward attention_residual_alpha feed_forward_residual_alpha",
        ),
        "TransformerConfig": config(
            "TransformerConfig", "d_model vocab_size n_layers block lm_head init_std tie_word_embeddings"
        ),
    },
    "olmo_core.optim": {
        "AdamWConfig": config("AdamWConfig", "lr betas eps weight_decay group_overrides"),
        "OptimGroupOverride": config("OptimGroupOverride", "params opts"),
    },
    "olmo_core.optim.scheduler": {
        "ComposableScheduler": config("ComposableScheduler", "stages override_decay"),
        "ComposableSchedulerStage": config(
            "ComposableSchedulerStage", "duration shape start_lr start_lr_fraction end_lr end_lr_fraction"
        ),
    },
}


def importable() -> dict[str, types.ModuleType]:
    """The stand-ins and their parent packages, for sys.modules."""
    found = {}
    for name, contents in MODULES.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            found.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        vars(found[name]).update(contents)
    return found


LLAMA3 = """attention.qkv_linear.wq attention.qkv_linear.wk attention.qkv_linear.wv attention.wo feed_forward.w1
feed_forward.w2 feed_forward.w3 attention_norm ffn_norm"""
OLMO = """attention.w_q attention.w_k attention.w_v attention.w_out feed_forward.w1 feed_forward.w2 feed_forward.w3
attention_norm feed_forward_norm"""


def llama3_names(depth: int, wrapped: bool = False) -> list[str]:
    """Names of torchtitan's llama3 without fused projections; `wrapped` under activation checkpointing."""
    inside = "_checkpoint_wrapped_module." if wrapped else ""
    blocks = [f"layers.{i}.{inside}{name}.weight" for i in range(depth) for name in LLAMA3.split()]
    return ["tok_embeddings.weight", *blocks, "norm.weight", "lm_head.weight"]


def olmo_names(depth: int) -> list[str]:
    """Names of OLMo-core's Transformer."""
    blocks = [f"blocks.{i}.{name}.weight" for i in range(depth) for name in OLMO.split()]
    return ["embeddings.weight", *blocks, "lm_head.norm.weight", "lm_head.w_out.weight"]


def torchtitan_groups(names: Sequence[str], groups: Sequence[Any]) -> dict[str, Any]:
    """Name -> its ParamGroupConfig: the first whose pattern is found in it; a pattern that finds nothing raises."""
    taken: dict[str, Any] = {}
    for group in groups:
        fits = [name for name in names if name not in taken and re.search(group.pattern, name)]
        if not fits:
            raise ValueError(f"{group.pattern} matched no parameters")
        taken |= dict.fromkeys(fits, group)
    return taken


def olmo_groups(names: Sequence[str], overrides: Sequence[Any]) -> Mapping[str, Any]:
    """Name -> its OptimGroupOverride: globs over whole names, each of which has to fit one."""
    taken: dict[str, Any] = {}
    for override in overrides:
        for glob in override.params:
            fits = [name for name in names if fnmatch(name, glob)]
            if not fits:
                raise ValueError(f"{glob} does not match any parameters")
            assert not taken.keys() & set(fits), "a parameter in two groups"
            taken |= dict.fromkeys(fits, override)
    return taken
