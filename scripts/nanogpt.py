"""The peer of speed comparisons: nanoGPT's network, without anything of mupsweep."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class NanoGPT(nn.Module):
    """nanoGPT's network: fused projections, LayerNorm without bias, GELU, logits of all positions."""

    def __init__(self, width: int, depth: int, head_dim: int, context: int, vocabulary: int) -> None:
        super().__init__()
        self.heads = width // head_dim
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList()
        n_in_out = {"qkv": (width, 3 * width), "output": (width, width)}
        n_in_out |= {"up": (width, 4 * width), "down": (4 * width, width)}
        for _ in range(depth):
            linears = {name: nn.Linear(*dims, bias=False) for name, dims in n_in_out.items()}
            norms = {name: nn.LayerNorm(width, bias=False) for name in ("attention_norm", "mlp_norm")}
            self.blocks.append(nn.ModuleDict({**linears, **norms}))
        self.norm, self.head = nn.LayerNorm(width, bias=False), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        B, T = tokens.shape
        x = self.tokens(tokens) + self.positions.weight[:T]
        for block in self.blocks:
            heads = block["qkv"](block["attention_norm"](x)).view(B, T, 3, self.heads, -1)  # type: ignore[index]
            y = F.scaled_dot_product_attention(*heads.permute(2, 0, 3, 1, 4).unbind(), is_causal=True)
            x = x + block["output"](y.transpose(1, 2).reshape(B, T, -1))  # type: ignore[index]
            x = x + block["down"](F.gelu(block["up"](block["mlp_norm"](x))))  # type: ignore[index]
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())
