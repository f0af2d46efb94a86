"""The modules that models are built from; the table of tensors declares their shapes.

B: batch, T: tokens, C: width, H: heads, K: heads of keys and values, D: head_dim; of experts: E: all of them, K: those
of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

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


class Router(Affine):
    """The logit of every expert, (..., E), in fp32 at least: bf16 would round different logits to ties."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype))


class MixtureOfExperts(nn.Module):
    """Each token through the `per_token` experts of its largest router logits, weighed, and through shared experts.

    No token is dropped: an expert computes as many as chose it. Sorting and its inverse are permutations, so that the
    backward pass adds up in a fixed order on every device. An expert that no token chose has a gradient of zeros, so
    that all ranks of a distributed run reduce the same tensors.
    """

    def __init__(
        self, table: Table, name: str, experts: int, per_token: int, shared: int, weights_sum_to_one: bool
    ) -> None:
        super().__init__()
        self.per_token, self.weights_sum_to_one = per_token, weights_sum_to_one
        self.router = Router(table, f"{name}.router")
        self.experts = nn.ModuleList(GeluMLP(table, f"{name}.experts.{i}") for i in range(experts))
        self.shared_experts = nn.ModuleList(GeluMLP(table, f"{name}.shared_experts.{i}") for i in range(shared))
        self.balance_loss: Tensor | None = None  # of the last forward pass, for `MoEDecoder`

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        logits = self.router(x)
        chosen_logits, chosen = logits.topk(self.per_token, dim=-1)  # (B, T, K)
        if self.weights_sum_to_one:
            weights, affinity = chosen_logits.softmax(dim=-1), logits.softmax(dim=-1)
        else:
            weights, affinity = chosen_logits.sigmoid(), logits.sigmoid()
            affinity = affinity / affinity.sum(dim=-1, keepdim=True)
        self.balance_loss = balance_loss(affinity, chosen)

        # Every token once per expert that it chose, the tokens of the first expert first.
        order = chosen.flatten().argsort(stable=True)
        counts = (chosen.flatten() == torch.arange(len(self.experts), device=x.device)[:, None]).sum(dim=1).tolist()
        tokens = x[:, :, None].expand(B, T, self.per_token, C).reshape(-1, C).index_select(0, order)
        outputs = [expert(rows) for expert, rows in zip(self.experts, tokens.split(counts), strict=True)]

        # Back in the order of the tokens, weighed and added up.
        y = torch.cat(outputs).index_select(0, order.argsort()).view(B, T, self.per_token, C)
        y = (weights.to(y.dtype)[..., None] * y).sum(dim=2)
        for expert in self.shared_experts:
            y = y + expert(x)
        return y


def balance_loss(affinity: Tensor, chosen: Tensor) -> Tensor:
    """The load-balancing loss of Fedus et al. 2101.03961 for each sequence by itself, the mean over sequences.

    It is 1 where experts are used evenly, and more where those that are chosen often also have large affinities. Per
    sequence (DeepSeek V3, 2412.19437, equations 17 to 20) it depends on no micro-batch and no rank.

    Args:
        affinity: (B, T, E), adding up to 1 over the experts.
        chosen: (B, T, K) numbers of experts.
    """
    n_experts, per_token = affinity.shape[-1], chosen.shape[-1]
    uses = F.one_hot(chosen, n_experts).sum(dim=2).to(affinity.dtype)  # (B, T, E)
    return n_experts / per_token * (uses.mean(dim=1) * affinity.mean(dim=1)).sum(dim=-1).mean()


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


class MoEDecoder(Decoder):
    """A decoder with a mixture of experts in every block, whose loss also has the gradient of their balance loss.

    The value of the loss is that of the cross-entropy alone, in nats. Blocks share the balance loss as they share the
    change of features, so that both parts of a router's gradient go with the depth alike.
    """

    def __init__(self, *args: Any, balance: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.balance = balance

    def forward(self, tokens: Tensor, targets: Tensor | None = None, draws: Tensor | None = None) -> Tensor:
        result = super().forward(tokens, targets, draws)
        balance = torch.stack(list(self._take_balance_losses())).mean()
        if targets is None:  # with draws, curvature is that of the cross-entropy
            return result
        return result + self.balance * (balance - balance.detach())

    def _take_balance_losses(self) -> Iterator[Tensor]:
        """Those of all blocks, which keep no graph of them."""
        for module in self.modules():
            if isinstance(module, MixtureOfExperts) and module.balance_loss is not None:
                yield module.balance_loss
                module.balance_loss = None
