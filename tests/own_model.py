"""A small model of somebody's own, and ways to spoil it; its text is what tests write into a module."""

from __future__ import annotations

MODEL = """
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, n, heads, scale):
        super().__init__()
        self.heads, self.scale = heads, scale
        self.norm, self.mlp_norm = nn.LayerNorm(n), nn.LayerNorm(n)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(n, n) for _ in range(4))
        self.up, self.fc2 = nn.Linear(n, 4 * n), nn.Linear(4 * n, n)

    def forward(self, x):
        B, T, n = x.shape
        maps = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (m(self.norm(x)).view(B, T, self.heads, -1).transpose(1, 2) for m in maps)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.scale * self.o_proj(y.transpose(1, 2).reshape(B, T, n))
        return x + self.scale * self.fc2(F.gelu(self.up(self.mlp_norm(x))))


class Net(nn.Module):
    def __init__(self, width, depth, heads, vocab_size, context, output_scale=1.0, branch_scale=1.0):
        super().__init__()
        self.output_scale = output_scale
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(context, width)
        self.register_buffer("index", torch.arange(context), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads, branch_scale) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab_size, bias=False)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(self.index[: ids.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.output_scale * self.head(self.norm(x))


def build(width, depth, heads, vocab_size, context):
    return Net(width, depth, heads, vocab_size, context)


def with_multipliers(width, depth, heads, vocab_size, context, output_multiplier, block_multiplier):
    return Net(width, depth, heads, vocab_size, context, output_multiplier, block_multiplier)


def wide_heads(width, depth, vocab_size, context):
    return Net(width, depth, 2, vocab_size, context)
"""
TINY = [
    *("model=own", "model.width=16", "model.depth=2", "model.head_dim=8", "model.context=8", "data.tokenizer=bytes"),
    *("training.batch_size=2", "training.steps=3", "training.warmup=0", "training.eval_tokens=64"),
    *("training.precision=fp32", "sweep.width_ratios=[1,2]", "sweep.log2_lrs=[-6]"),
]
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "vocab_size": 32000,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
