"""The modules that models are built from; the table of tensors declares their shapes.

B: batch, T: tokens, C: width, H: heads, K: heads of keys and values, D: head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from mupsweep.models.architecture import Multipliers
from mupsweep.models.loss import linear_cross_entropy, sample_labels
from mupsweep.models.shape import Size
from mupsweep.scaling import TensorSpec

Table = Mapping[str, TensorSpec]
MakeModule = Callable[[Table, str], nn.Module]  # (table, name) -> the module of that name in the table
Rotation = tuple[Tensor, Tensor]  # cosines and signed sines, each (T, D)


def parameter(table: Table, name: str) -> nn.Parameter | None:
    """An uninitialised parameter of the declared shape; None where the table does not declare it."""
    return nn.Parameter(torch.empty(table[name].shape)) if name in table else None


class Affine(nn.Module):
    """A weight and a bias, each where the table declares it."""

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


class RMSNorm(Affine):
    """x / RMS(x) over the last dimension, eps 1e-5 (Zhang and Sennrich 1910.07467); a gain where declared."""

    def forward(self, x: Tensor) -> Tensor:
        gain = None if self.weight is None else self.weight.to(x.dtype)  # under autocast, queries and keys are bf16
        return F.rms_norm(x, x.shape[-1:], gain, eps=1e-5)


class Embedding(nn.Module):
    """An embedding: the row of `weight` (rows, C) of every id."""

    def __init__(self, table: Table, name: str) -> None:
        super().__init__()
        self.weight = parameter(table, f"{name}.weight")

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)  # type: ignore[arg-type]


def rotation(tokens: int, head_dim: int, theta: float, device: torch.device) -> Rotation:
    """Cosines and sines of rotary positions (Su et al. 2104.09864), as `rotate` takes them.

    The angle of a position and of the pair of features (i, i + D/2) is position * theta^(-2i / D). Pairs are half a
    head apart, as in transformers' Llama. The sines are negative for the first half of the features.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle = torch.arange(tokens, dtype=torch.float32, device=device)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, angles: Rotation) -> Tensor:
    """Rotate every pair of features of x (B, H, T, D) by the angle of its position, in the dtype of x."""
    cos, sin = (a.to(x.dtype) for a in angles)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale * q . k) v over the past: torch's SDPA, but written out for bf16 on a CPU.

    For bf16 on a CPU, SDPA's backward pass alone takes longer than the three products here, forward and backward.

    Args:
        q: (B, H, T, D).
        k, v: (B, K, T, D); query head h attends to key head h // (H / K).
        scale: factor of q . k.
    """
    B, H, T, D = q.shape
    K = k.shape[1]
    if q.device.type == "cpu" and q.dtype is torch.bfloat16:
        future = torch.full((T, T), float("-inf"), dtype=q.dtype).triu(1).repeat(H // K, 1)
        with torch.autocast("cpu", enabled=False):  # the queries that share a key are further rows of one product
            scores = torch.baddbmm(future, q.reshape(B * K, -1, D), k.flatten(0, 1).mT, alpha=scale)
            return (scores.softmax(dim=-1) @ v.flatten(0, 1)).view(B, H, T, D)
    if K < H and v.dtype is torch.float32 and q.device.type != "cpu":
        # Fused fp32 kernels of accelerators need equal numbers of heads; with enable_gqa, SDPA would fall back to
        # unfused products. v decides, since CUDA's autocast keeps normed q and k in fp32 where products are bf16.
        k, v = (y[:, :, None].expand(B, K, H // K, T, D).reshape(B, H, T, D) for y in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=k.shape[1] < H)


class Projections(nn.Module):
    """Several linear maps of one input, as one matrix each or stacked in one called `fused`, as the table declares."""

    def __init__(self, table: Table, name: str, fused: str, **rows: int) -> None:
        super().__init__()
        self.rows = list(rows.values())
        self.maps = [fused] if f"{name}.{fused}.weight" in table else list(rows)
        for map_name in self.maps:
            self.add_module(map_name, Linear(table, f"{name}.{map_name}"))

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """The outputs of the maps, in order."""
        outputs = [getattr(self, map_name)(x) for map_name in self.maps]
        return outputs if len(outputs) > 1 else outputs[0].split(self.rows, dim=-1)


class Attention(Projections):
    """Causal multi-head attention, softmax(scale * q . k) v, with grouped queries where there are fewer key heads.

    With `qk_norm`, queries and keys are normalised per head. Given angles, they are rotated by their positions.
    """

    def __init__(self, table: Table, name: str, size: Size, scale: float, qk_norm: bool = False) -> None:
        q, kv = size.heads * size.head_dim, size.kv_heads * size.head_dim
        super().__init__(table, name, "qkv", query=q, key=kv, value=kv)
        self.head_dim, self.scale = size.head_dim, scale
        self.query_norm = RMSNorm(table, f"{name}.query_norm") if qk_norm else nn.Identity()
        self.key_norm = RMSNorm(table, f"{name}.key_norm") if qk_norm else nn.Identity()
        self.output = Linear(table, f"{name}.output")

    def forward(self, x: Tensor, angles: Rotation | None) -> Tensor:
        B, T, _ = x.shape
        # (B, T, heads * D) -> (B, heads, T, D)
        q, k, v = (y.view(B, T, -1, self.head_dim).transpose(1, 2) for y in self.project(x))
        q, k = self.query_norm(q), self.key_norm(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
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


class SwiGLU(Projections):
    """down(silu(gate(x)) * up(x)) (Shazeer 2002.05202)."""

    def __init__(self, table: Table, name: str) -> None:
        ffn = table[f"{name}.down.weight"].shape[1]
        super().__init__(table, name, "gate_up", gate=ffn, up=ffn)
        self.down = Linear(table, f"{name}.down")

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.project(x)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """x + m * attention(norm(x)), then x + m * mlp(norm(x)), m the block multiplier."""

    def __init__(
        self, table: Table, name: str, multiplier: float, norm: MakeModule, attention: MakeModule, mlp: MakeModule
    ) -> None:
        super().__init__()
        self.multiplier = multiplier
        self.attention_norm = norm(table, f"{name}.attention_norm")
        self.attention = attention(table, f"{name}.attention")
        self.mlp_norm = norm(table, f"{name}.mlp_norm")
        self.mlp = mlp(table, f"{name}.mlp")

    def forward(self, x: Tensor, angles: Rotation | None) -> Tensor:
        x = torch.add(x, self.attention(self.attention_norm(x), angles), alpha=self.multiplier)
        return torch.add(x, self.mlp(self.mlp_norm(x)), alpha=self.multiplier)


class Decoder(nn.Module):
    """A decoder: embeddings, blocks, a final norm and a head.

    `forward` returns logits, or the mean loss in nats where targets are given. With `draws` (B, T) instead of targets,
    the loss is that of labels sampled from the model's own predictions. Positions are learned where the table has a
    position embedding, and rotary where `rope_theta` is given.
    """

    def __init__(
        self,
        table: Table,
        size: Size,
        multipliers: Multipliers,
        norm: MakeModule,
        attention: MakeModule,
        mlp: MakeModule,
        rope_theta: float | None = None,
    ) -> None:
        super().__init__()
        self.multiplier = multipliers.output
        self.head_dim, self.rope_theta = size.head_dim, rope_theta
        self.token_embedding = Embedding(table, "token_embedding")
        learned = "position_embedding.weight" in table
        self.position_embedding = Embedding(table, "position_embedding") if learned else None
        self.blocks = nn.ModuleList(
            Block(table, f"blocks.{i}", multipliers.block, norm, attention, mlp) for i in range(size.depth)
        )
        self.norm = norm(table, "norm")
        self.head = Linear(table, "head")
        if table["head.weight"].tied_to is not None:
            self.head.weight = self.token_embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None, draws: Tensor | None = None) -> Tensor:
        T = tokens.shape[1]
        x = self.token_embedding(tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding.weight[:T]  # type: ignore[index]
        angles = None if self.rope_theta is None else rotation(T, self.head_dim, self.rope_theta, x.device)
        for block in self.blocks:
            x = block(x, angles)
        x = self.norm(x)
        if targets is None and draws is None:
            return self.head(x) * self.multiplier
        features, weight = x.flatten(0, 1), self.head.weight
        assert weight is not None
        if draws is not None:
            targets = sample_labels(features, weight, draws.flatten(), self.multiplier)
        assert targets is not None
        return linear_cross_entropy(features, weight, targets.flatten(), self.multiplier)
