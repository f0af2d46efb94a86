"""NanoGPT: GPT-2 as Karpathy's nanoGPT writes it (Radford et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from mupsweep.models.architecture import DecoderArchitecture, Multipliers
from mupsweep.models.shape import Size
from mupsweep.scaling import Init, Role, TensorSpec

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class NanoGPT(DecoderArchitecture):
    """Pre-norm decoder with learned positions, LayerNorm and a GELU MLP.

    Attributes:
        bias: biases in the linear layers and LayerNorms.
    """

    bias: bool = False

    def tensors(self, size: Size) -> Iterator[TensorSpec]:
        n, ffn, std = size.width, size.ffn_width, self.init_std

        def norm(name: str, role: Role) -> Iterator[TensorSpec]:
            if not self.norms:
                return
            yield TensorSpec(f"{name}.weight", (n,), role, Init.ONES, decay=False)
            if self.bias:
                yield TensorSpec(f"{name}.bias", (n,), role, Init.ZEROS, decay=False)

        def linear(name: str, n_out: int, n_in: int) -> Iterator[TensorSpec]:
            yield TensorSpec(f"{name}.weight", (n_out, n_in), Role.HIDDEN, init_std=std)
            if self.bias:
                yield TensorSpec(f"{name}.bias", (n_out,), Role.HIDDEN_VECTOR, Init.ZEROS, decay=False)

        yield TensorSpec("token_embedding.weight", (size.vocab_size, n), Role.INPUT, init_std=std)
        yield TensorSpec("position_embedding.weight", (size.context, n), Role.INPUT, init_std=std)
        for i in range(size.depth):
            yield from norm(f"blocks.{i}.attention_norm", Role.HIDDEN_VECTOR)
            for matrix, rows in self.projected("qkv", query=n, key=n, value=n).items():
                yield from linear(f"blocks.{i}.attention.{matrix}", rows, n)
            yield from linear(f"blocks.{i}.attention.output", n, n)
            yield from norm(f"blocks.{i}.mlp_norm", Role.HIDDEN_VECTOR)
            yield from linear(f"blocks.{i}.mlp.up", ffn, n)
            yield from linear(f"blocks.{i}.mlp.down", n, ffn)
        yield from norm("norm", Role.INPUT_VECTOR)
        yield self.head(size, embedding="token_embedding.weight")

    def network(self, size: Size, multipliers: Multipliers) -> nn.Module:
        from torch import nn

        from mupsweep.models.layers import Attention, Decoder, GeluMLP, LayerNorm

        norm = LayerNorm if self.norms else nn.Identity
        attention = partial(Attention, size=size, scale=multipliers.attention)
        return Decoder({t.name: t for t in self.tensors(size)}, size, multipliers, norm, attention, GeluMLP)
