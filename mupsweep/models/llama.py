"""Llama: RMSNorm, rotary positions, SwiGLU, grouped queries, no biases (Touvron et al. 2302.13971, 2307.09288)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from mupsweep.errors import ConfigError
from mupsweep.models.architecture import DecoderArchitecture, Multipliers
from mupsweep.models.shape import GQA_RULES, BaseShape, Size
from mupsweep.scaling import Init, Role, TensorSpec
from mupsweep.schema import one_of

if TYPE_CHECKING:
    from torch import nn

QK_NORMS = ("none", "plain", "gains")


@dataclass(frozen=True, kw_only=True)
class Llama(DecoderArchitecture):
    """Pre-norm decoder with rotary positions, RMSNorm and a SwiGLU MLP.

    Attributes:
        ffn_multiple: the MLP width, ffn_ratio * width, is rounded up to a multiple of this.
        kv_heads: heads of keys and values at the base shape; None: as many as heads.
        gqa_rule: what is held fixed at other widths, "fixed_ratio" (heads / kv_heads) or "fixed_kv_heads".
        rope_theta: base of the rotary positions' frequencies.
        norm_gains: whether RMSNorms have trainable gains.
        qk_norm: RMSNorm of queries and keys per head, whatever `norms` says: "none", "plain" or with trainable "gains".
    """

    ffn_ratio: float = 8 / 3
    ffn_multiple: int = 8
    kv_heads: int | None = None
    gqa_rule: str = "fixed_ratio"
    rope_theta: float = 10_000.0
    norm_gains: bool = True
    qk_norm: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ffn_multiple < 1:
            raise ConfigError(f"model.ffn_multiple={self.ffn_multiple}: expected at least 1, which rounds nothing")
        if self.kv_heads is not None and self.kv_heads < 1:
            raise ConfigError(f"model.kv_heads={self.kv_heads}: expected at least 1, or null for as many as heads")
        one_of(self.gqa_rule, GQA_RULES, "model.gqa_rule")
        if self.rope_theta <= 1:
            raise ConfigError(f"model.rope_theta={self.rope_theta:g}: expected a number above 1; Llama 2 has 10000")
        one_of(self.qk_norm, QK_NORMS, "model.qk_norm")
        if self.projections == "fused" and self.gqa_rule == "fixed_kv_heads":
            # Queries would grow with the width and keys would not: no single std or LR fits the stack of both.
            raise ConfigError(
                "model.gqa_rule=fixed_kv_heads makes the shares of queries and keys in model.projections=fused change "
                "with the width, and with them the rule: set model.projections=split"
            )

    @property
    def base(self) -> BaseShape:
        return replace(super().base, ffn_multiple=self.ffn_multiple, kv_heads=self.kv_heads, gqa_rule=self.gqa_rule)

    def tensors(self, size: Size) -> Iterator[TensorSpec]:
        if size.head_dim % 2:
            raise ConfigError(
                f"width {size.width} has {size.head_dim} features per head, and rotary positions turn them in pairs: "
                "choose an even model.head_dim, or fewer model.heads"
            )
        n, ffn, gains = size.width, size.ffn_width, self.norms and self.norm_gains
        n_kv, group = size.kv_heads * size.head_dim, size.heads // size.kv_heads

        def gain(name: str, rows: int, role: Role, repeats: int = 1) -> TensorSpec:
            return TensorSpec(f"{name}.weight", (rows,), role, Init.ONES, decay=False, repeats=repeats)

        def matrix(name: str, n_out: int, n_in: int, repeats: int = 1) -> TensorSpec:
            return TensorSpec(f"{name}.weight", (n_out, n_in), Role.HIDDEN, init_std=self.init_std, repeats=repeats)

        yield TensorSpec("token_embedding.weight", (size.vocab_size, n), Role.INPUT, init_std=self.init_std)
        for i in range(size.depth):
            attention, mlp = f"blocks.{i}.attention", f"blocks.{i}.mlp"
            if gains:
                yield gain(f"{attention}_norm", n, Role.HIDDEN_VECTOR)
            for name, rows in self.projected("qkv", query=n, key=n_kv, value=n_kv).items():
                yield matrix(f"{attention}.{name}", rows, n, repeats=group if name in ("key", "value") else 1)
            if self.qk_norm == "gains":  # shared by all heads
                yield gain(f"{attention}.query_norm", size.head_dim, Role.HIDDEN_VECTOR, repeats=size.heads)
                yield gain(f"{attention}.key_norm", size.head_dim, Role.HIDDEN_VECTOR, repeats=size.heads)
            yield matrix(f"{attention}.output", n, n)
            if gains:
                yield gain(f"{mlp}_norm", n, Role.HIDDEN_VECTOR)
            for name, rows in self.projected("gate_up", gate=ffn, up=ffn).items():
                yield matrix(f"{mlp}.{name}", rows, n)
            yield matrix(f"{mlp}.down", n, ffn)
        if gains:
            yield gain("norm", n, Role.INPUT_VECTOR)
        yield self.head(size, embedding="token_embedding.weight")

    def network(self, size: Size, multipliers: Multipliers) -> nn.Module:
        from torch import nn

        from mupsweep.models.layers import Attention, Decoder, RMSNorm, SwiGLU

        norm = RMSNorm if self.norms else nn.Identity
        table = {t.name: t for t in self.tensors(size)}
        attention = partial(Attention, size=size, scale=multipliers.attention, qk_norm=self.qk_norm != "none")
        return Decoder(table, size, multipliers, norm, attention, SwiGLU, rope_theta=self.rope_theta)
