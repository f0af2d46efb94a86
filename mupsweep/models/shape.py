"""Sizes of models, from a base shape and ratios of width and depth."""

from __future__ import annotations

from dataclasses import dataclass, field

from mupsweep.errors import ConfigError

LARGEST_WIDTH, LARGEST_DEPTH = 2**24, 4096  # of a model whose tensors can still be listed in seconds
MAX_LOGITS = 2**27  # that the loss computes at once on an accelerator, 512 MiB in fp32: few large products
GQA_RULES = ("fixed_ratio", "fixed_kv_heads")


@dataclass(frozen=True, order=True)
class Size:
    """The shape of one model.

    Attributes:
        width: features per token, d_model.
        depth: transformer blocks.
        heads: attention heads; width = heads * head_dim.
        kv_heads: heads of keys and values; heads / kv_heads queries share one.
        head_dim: features per head.
        ffn_width: features inside the MLP.
        vocab_size: rows of the embedding and of the head.
        context: tokens per sequence.
        width_ratio, depth_ratio: width and depth of this size / those of the base.
        label: what the user's list of sizes calls it, if it does.
    """

    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int
    vocab_size: int
    context: int
    width_ratio: float = 1.0
    depth_ratio: float = 1.0
    label: str | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """A short name such as w512-d4."""
        return f"w{self.width}-d{self.depth}"


@dataclass(frozen=True)
class BaseShape:
    """The shape at ratio 1, as configs declare it.

    Attributes:
        head_dim: features per head, held fixed while heads are added; ignored where `heads` is given.
        heads: a fixed number of heads whose dimension grows with the width; None holds head_dim fixed.
        ffn_ratio: MLP width / width.
        ffn_multiple: the MLP width is rounded up to a multiple of this.
        kv_heads: heads of keys and values; None: as many as heads.
        gqa_rule: what is held fixed at other widths, "fixed_ratio" (heads / kv_heads) or "fixed_kv_heads".
    """

    width: int
    depth: int
    head_dim: int
    heads: int | None
    ffn_ratio: float
    context: int
    ffn_multiple: int = 1
    kv_heads: int | None = None
    gqa_rule: str = "fixed_ratio"

    def scaled(self, width_ratio: float, depth_ratio: float, vocab_size: int) -> Size:
        """The size at the given ratios.

        Raises:
            ConfigError: a ratio that gives no whole number of features, blocks, heads or key heads.
        """
        width = _whole(self.width * width_ratio, f"model.width={self.width} * width_ratio={width_ratio:g}")
        depth = _whole(self.depth * depth_ratio, f"model.depth={self.depth} * depth_ratio={depth_ratio:g}")
        for value, largest, what in ((width, LARGEST_WIDTH, "width"), (depth, LARGEST_DEPTH, "depth")):
            if value > largest:
                raise ConfigError(f"{what} {value}: expected at most {largest:,}; no such model can be listed or built")
        where = f"width {width} (model.width={self.width} * width_ratio={width_ratio:g})"
        heads = self.heads or width // self.head_dim
        if heads < 1 or width % heads or (self.heads is None and width % self.head_dim):
            divisor = f"model.heads={self.heads}" if self.heads else f"model.head_dim={self.head_dim}"
            raise ConfigError(
                f"{where} is not a multiple of {divisor}: change the ratio, model.width or {divisor.split('=')[0]}"
            )
        if (ffn_width := round(self.ffn_ratio * width)) < 1:
            raise ConfigError(f"{where}: model.ffn_ratio={self.ffn_ratio:g} leaves its MLP no features; raise it")
        return Size(
            width=width,
            depth=depth,
            heads=heads,
            kv_heads=heads if self.kv_heads is None else self._kv_heads(heads, self.kv_heads, where),
            head_dim=width // heads,
            ffn_width=-(-ffn_width // self.ffn_multiple) * self.ffn_multiple,
            vocab_size=vocab_size,
            context=self.context,
            width_ratio=float(width_ratio),
            depth_ratio=float(depth_ratio),
        )

    def _kv_heads(self, heads: int, kv_heads: int, where: str) -> int:
        """The number of key and value heads at a size with `heads` query heads, for `kv_heads` at the base."""
        base_heads = self.heads or self.width // self.head_dim
        if base_heads < kv_heads or base_heads % kv_heads:
            raise ConfigError(
                f"model.kv_heads={kv_heads} does not divide the {base_heads} heads of model.width={self.width}: "
                "choose a divisor, or null for as many as heads"
            )
        if self.gqa_rule == "fixed_kv_heads":
            if heads < kv_heads or heads % kv_heads:
                raise ConfigError(
                    f"{where} has {heads} heads, not a multiple of model.kv_heads={kv_heads}, which "
                    "model.gqa_rule=fixed_kv_heads holds fixed: change the ratio or model.kv_heads"
                )
            return kv_heads
        group = base_heads // kv_heads
        if heads % group:
            raise ConfigError(
                f"{where} has {heads} heads, which cannot share keys in groups of {group} as {base_heads} heads with "
                f"model.kv_heads={kv_heads} do at the base: change the ratio or model.kv_heads, or hold kv_heads "
                "itself fixed with model.gqa_rule=fixed_kv_heads"
            )
        return heads // group


def _whole(value: float, what: str) -> int:
    """`value` as an int, which must be a whole number of at least 1."""
    if value < 1 or abs(value - round(value)) > 1e-9:
        raise ConfigError(f"{what} = {value:g} is not a whole number: choose a ratio that makes it one")
    return round(value)
