"""The base class of all models: the keys they share, their tensors, and their network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mupsweep.errors import ConfigError
from mupsweep.models.shape import BaseShape, Size
from mupsweep.scaling import Init, Role, TensorSpec
from mupsweep.schema import one_of, require

if TYPE_CHECKING:
    from torch import nn

ATTENTION_SCALES = ("parametrization", "standard", "mup")
PROJECTIONS = ("split", "fused")


@dataclass(frozen=True)
class Multipliers:
    """Forward constants at one size.

    Attributes:
        block: factor of every residual branch.
        output: factor of the logits.
        attention: factor of query . key.
    """

    block: float
    output: float
    attention: float


@dataclass(frozen=True, kw_only=True)
class Architecture(ABC):
    """What all models share; a subclass adds keys of its own.

    Attributes:
        name: the model's name in curves and reports.
        width, depth: features per token and number of blocks at the base shape.
        context: tokens per sequence.
        head_dim: features per head, fixed along a ladder; `heads` fixes the number of heads instead.
    """

    name: str
    width: int = 256
    depth: int = 4
    context: int = 1024
    head_dim: int = 64
    heads: int | None = None

    compiles: ClassVar[bool] = True  # whether torch.compile meets the same shapes in every batch
    inferred: ClassVar[bool] = False  # whether roles are read off shapes; else `tensors` declares them

    def __post_init__(self) -> None:
        self.require_positive("width", "depth", "context", "head_dim")
        at_least_one = self.heads is None or self.heads >= 1
        require(at_least_one, "model.heads", self.heads, "at least 1, or null to hold head_dim fixed")

    def require_positive(self, *keys: str) -> None:
        """Refuse keys without a positive number."""
        for key in keys:
            require(getattr(self, key) > 0, f"model.{key}", getattr(self, key), "a positive number")

    @property
    @abstractmethod
    def base(self) -> BaseShape:
        """The base shape: ratio 1 of width and depth."""

    @abstractmethod
    def multipliers(self, size: Size, block: float, output: float, attention_power: float) -> Multipliers:
        """Forward constants at `size`, given the rules' ratios and the power of d_head in the attention scale."""

    @abstractmethod
    def tensors(self, size: Size) -> Iterable[TensorSpec]:
        """Every tensor of the model at `size`, in the order of the forward pass."""

    @abstractmethod
    def network(self, size: Size, multipliers: Multipliers) -> nn.Module:
        """The network, uninitialised, on the current torch device; its parameters are exactly `tensors(size)`."""

    def features(self, size: Size) -> str:
        """The path of the module whose output is the features that the head reads."""
        return f"blocks.{size.depth - 1}"

    def content(self) -> dict[str, Any]:
        """What decides the network beside the keys of its section: of code, the digest of its text."""
        return {}

    def check(self, size: Size, vocab_size: int) -> None:  # noqa: B027, what this repository declares needs no check
        """Refuse, before anything is trained, a network that cannot be trained.

        Args:
            size: the base shape.
            vocab_size: how many different tokens the corpus may have.
        """

    def remarks(self, size: Size) -> list[str]:
        """Notes on the model that a user should read before training."""
        return []


@dataclass(frozen=True, kw_only=True)
class DecoderArchitecture(Architecture):
    """The keys that the decoders of this folder share.

    Attributes:
        ffn_ratio: MLP width / width.
        projections: "split" keeps query, key and value, and a gated MLP's two inputs, as matrices of their own; "fused"
            stacks them into one tensor each.
        norms: whether there are norm layers before every branch and the head; False leaves out their tensors too.
        tied: whether the head shares the token embedding.
        init_std: standard deviation of every matrix at the base shape; `head_init_std` overrides the head's (0: zeros).
        block_multiplier, output_multiplier, attention_multiplier: forward constants at the base shape, tunable at small
            size: on residual branches, logits and attention logits.
        attention_scale: "parametrization" follows the rule; "standard" (1/sqrt(d)) and "mup" (1/d) force one.
    """

    ffn_ratio: float = 4.0
    projections: str = "split"
    norms: bool = True
    tied: bool = False
    init_std: float = 0.02
    head_init_std: float | None = None
    block_multiplier: float = 1.0
    output_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    attention_scale: str = "parametrization"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("ffn_ratio", "init_std")
        one_of(self.attention_scale, ATTENTION_SCALES, "model.attention_scale")
        one_of(self.projections, PROJECTIONS, "model.projections")
        if self.tied and self.head_init_std is not None:
            raise ConfigError("model.head_init_std has no meaning with model.tied=true: set it to null")

    @property
    def base(self) -> BaseShape:
        return BaseShape(self.width, self.depth, self.head_dim, self.heads, self.ffn_ratio, self.context)

    def multipliers(self, size: Size, block: float, output: float, attention_power: float) -> Multipliers:
        """Forward constants at `size`, given the rules' ratios and the power of d_head in the attention scale.

        At the base shape the attention scale is exactly attention_multiplier/sqrt(d_head) for every power.
        """
        power = {"parametrization": attention_power, "standard": -0.5, "mup": -1.0}[self.attention_scale]
        base = self.base.scaled(1.0, 1.0, size.vocab_size)
        return Multipliers(
            block=self.block_multiplier * block,
            output=self.output_multiplier * output,
            attention=self.attention_multiplier * base.head_dim**-0.5 * (size.head_dim / base.head_dim) ** power,
        )

    def projected(self, fused: str, **rows: int) -> dict[str, int]:
        """Rows of every matrix applied to one input: as given, or all stacked in one tensor called `fused`.

        The rules hold for both forms. Where every matrix grows with the width, so does the stack, and its ratios of
        init std, 1/sqrt(r_n), and of LR to the base shape are those of its matrices. A constant of matrix optimizers
        differs: the orthogonalised stack of three square matrices has a third of the squared norm that the three have
        when orthogonalised one by one, so a base LR that was tuned for one form does not fit the other.
        """
        return rows if self.projections == "split" else {fused: sum(rows.values())}

    def head(self, size: Size, embedding: str) -> TensorSpec:
        """The head's tensor: a matrix of its own, or the storage of the embedding under the rule of an output."""
        std = self.init_std if self.head_init_std is None else self.head_init_std
        return TensorSpec(
            "head.weight",
            (size.vocab_size, size.width),
            Role.OUTPUT,
            init=Init.NORMAL if std > 0 else Init.ZEROS,
            init_std=std,
            tied_to=embedding if self.tied else None,
        )

    def remarks(self, size: Size) -> list[str]:
        if self.attention_scale == "parametrization":
            return []
        return [f"attention scale {self.attention_scale} is forced by model.attention_scale"]
