"""The modules that models are built from, each of the shape that the table of tensors declares.

B: batch, T: tokens, C: width, H: heads, D: head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mupsweep.models.architecture import Multipliers
from mupsweep.models.loss import linear_cross_entropy
from mupsweep.scaling import TensorSpec
from mupsweep.sizes import Size

if TYPE_CHECKING:
    from collections.abc import Callable

Table = Mapping[str, TensorSpec]


def parameter(table: Table, name: str) -> nn.Parameter | None:
    """An uninitialised parameter of the declared shape, or None where the table has no such tensor."""
    return nn.Parameter(torch.empty(table[name].shape)) if name in table else None


class Affine(nn.Module):
    """A weight, and a bias where the table declares one."""

    def __init__(self, table: Table, name: str) -> None:
        super().__init__()
        self.weight = parameter(table, f"{name}.weight")
        self.bias = parameter(table, f"{name}.bias")


class Linear(Affine):
    """y = W x (+ b), W (n_out, n_in)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)  # type: ignore[arg-type]


class LayerNorm(Affine):
    """LayerNorm with eps 1e-5 and a gain; a bias where declared."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, eps=1e-5)


class Embedding(nn.Module):
    """A row of `weight` (rows, C) per id."""

    def __init__(self, table: Table, name: str) -> None:
        super().__init__()
        self.weight = parameter(table, f"{name}.weight")

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)  # type: ignore[arg-type]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale * q . k) v over the past, all (B, H, T, D): torch's SDPA, but written out for bf16 on a CPU.

    There SDPA's backward pass alone takes longer than the three products below, forward and backward.
    """
    if q.device.type != "cpu" or q.dtype is not torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    T = q.shape[-2]
    future = torch.full((T, T), float("-inf"), dtype=q.dtype).triu(1)
    with torch.autocast("cpu", enabled=False):
        scores = torch.baddbmm(future, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=scale)
        return (scores.softmax(dim=-1) @ v.flatten(0, 1)).view_as(q)


class Attention(nn.Module):
    """Causal multi-head attention, softmax(scale * q . k) v."""

    def __init__(self, table: Table, name: str, size: Size, scale: float) -> None:
        super().__init__()
        self.head_dim, self.scale = size.head_dim, scale
        self.query = Linear(table, f"{name}.query")
        self.key = Linear(table, f"{name}.key")
        self.value = Linear(table, f"{name}.value")
        self.output = Linear(table, f"{name}.output")

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape

        def heads(y: Tensor) -> Tensor:  # (B, T, H * D) -> (B, H, T, D)
            return y.view(B, T, -1, self.head_dim).transpose(1, 2)

        q, k, v = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        y = causal_attention(q, k, v, self.scale)
        return self.output(y.transpose(1, 2).reshape(B, T, -1))


class GeluMLP(nn.Module):
    """down(gelu(up(x))), GELU in GPT-2's tanh form."""

    def __init__(self, table: Table, name: str) -> None:
        super().__init__()
        self.up = Linear(table, f"{name}.up")
        self.down = Linear(table, f"{name}.down")

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """x + m * attention(norm(x)), then x + m * mlp(norm(x)), m the block multiplier."""

    def __init__(
        self,
        table: Table,
        name: str,
        size: Size,
        multipliers: Multipliers,
        norm: Callable[[Table, str], nn.Module],
        mlp: Callable[[Table, str], nn.Module],
    ) -> None:
        super().__init__()
        self.multiplier = multipliers.block
        self.attention_norm = norm(table, f"{name}.attention_norm")
        self.attention = Attention(table, f"{name}.attention", size, multipliers.attention)
        self.mlp_norm = norm(table, f"{name}.mlp_norm")
        self.mlp = mlp(table, f"{name}.mlp")

    def forward(self, x: Tensor) -> Tensor:
        x = torch.add(x, self.attention(self.attention_norm(x)), alpha=self.multiplier)
        return torch.add(x, self.mlp(self.mlp_norm(x)), alpha=self.multiplier)


class Decoder(nn.Module):
    """Embeddings, blocks, a final norm and a head: logits without targets, the mean loss in nats with them."""

    def __init__(
        self,
        table: Table,
        size: Size,
        multipliers: Multipliers,
        norm: Callable[[Table, str], nn.Module],
        mlp: Callable[[Table, str], nn.Module],
    ) -> None:
        super().__init__()
        self.multiplier = multipliers.output
        self.token_embedding = Embedding(table, "token_embedding")
        self.position_embedding = Embedding(table, "position_embedding")
        self.blocks = nn.ModuleList(
            Block(table, f"blocks.{i}", size, multipliers, norm, mlp) for i in range(size.depth)
        )
        self.norm = norm(table, "norm")
        self.head = Linear(table, "head")
        if table["head.weight"].tied_to is not None:
            self.head.weight = self.token_embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        T = tokens.shape[1]
        x = self.token_embedding(tokens) + self.position_embedding.weight[:T]  # type: ignore[index]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if targets is None:
            return self.head(x) * self.multiplier
        weight = self.head.weight
        assert weight is not None
        return linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten(), self.multiplier)
