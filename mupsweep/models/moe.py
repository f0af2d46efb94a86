"""Mixture of experts: NanoGPT whose MLPs are experts, a few of which compute each token (Shazeer et al. 1701.06538).

The number of experts is the same at every width, so that experts and router grow as ROLES.md beside this file says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from mupsweep.errors import ConfigError
from mupsweep.models.architecture import Multipliers
from mupsweep.models.nanogpt import NanoGPT
from mupsweep.models.shape import Size
from mupsweep.scaling import Role, TensorSpec
from mupsweep.schema import one_of

if TYPE_CHECKING:
    from torch import nn

SOFTMAX, SIGMOID = ROUTER_ACTIVATIONS = ("softmax", "sigmoid")


@dataclass(frozen=True, kw_only=True)
class MoE(NanoGPT):
    """NanoGPT with a router and experts in place of every MLP; each token has all the experts that it chooses.

    Attributes:
        experts: experts per block, each an MLP of NanoGPT, at every size.
        experts_per_token: how many of them compute a token, those of its largest router logits.
        shared_experts: further experts that compute every token.
        router_activation: the weights of a token's experts: "softmax" of their logits, which add up to 1, or the
            "sigmoid" of each.
        balance: coefficient of the loss that an even use of the experts minimises; 0 for none.
    """

    compiles = False  # how many tokens choose an expert changes with every batch

    experts: int = 8
    experts_per_token: int = 2
    shared_experts: int = 0
    router_activation: str = SOFTMAX
    balance: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.experts_per_token <= self.experts:
            raise ConfigError(
                f"model.experts_per_token={self.experts_per_token}: expected 1 to model.experts={self.experts}"
            )
        if self.shared_experts < 0:
            raise ConfigError(f"model.shared_experts={self.shared_experts}: expected at least 0")
        one_of(self.router_activation, ROUTER_ACTIVATIONS, "model.router_activation")
        if self.router_activation == SOFTMAX and self.experts_per_token == 1 < self.experts:
            raise ConfigError(
                "model.experts_per_token=1 leaves a softmax nothing to weigh, so that no loss would train the router: "
                "set model.router_activation=sigmoid"
            )
        if self.balance < 0:
            raise ConfigError(f"model.balance={self.balance:g}: expected at least 0, which balances nothing")

    def tensors(self, size: Size) -> Iterator[TensorSpec]:
        active = self.experts_per_token / self.experts
        for tensor in super().tensors(size):
            block, in_mlp, leaf = tensor.name.partition(".mlp.")
            if not in_mlp:
                yield tensor
                continue
            if leaf == "up.weight":
                router = f"{block}.mlp.router.weight"
                yield TensorSpec(router, (self.experts, size.width), Role.ROUTER, init_std=self.init_std)
            for i in range(self.experts):
                yield replace(tensor, name=f"{block}.mlp.experts.{i}.{leaf}", active=active)
            for i in range(self.shared_experts):
                yield replace(tensor, name=f"{block}.mlp.shared_experts.{i}.{leaf}")

    def network(self, size: Size, multipliers: Multipliers) -> nn.Module:
        from torch import nn

        from mupsweep.models.layers import Attention, LayerNorm, MixtureOfExperts, MoEDecoder

        norm = LayerNorm if self.norms else nn.Identity
        attention = partial(Attention, size=size, scale=multipliers.attention)
        mlp = partial(
            MixtureOfExperts,
            experts=self.experts,
            per_token=self.experts_per_token,
            shared=self.shared_experts,
            weights_sum_to_one=self.router_activation == SOFTMAX,
        )
        table = {t.name: t for t in self.tensors(size)}
        return MoEDecoder(table, size, multipliers, norm, attention, mlp, balance=self.balance)
