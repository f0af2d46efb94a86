"""Sizes: whole numbers or a refusal that names the numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mupsweep.errors import ConfigError
from mupsweep.models.shape import BaseShape, Size


def base(
    width: int = 48,
    depth: int = 4,
    head_dim: int = 16,
    heads: int | None = None,
    ffn_ratio: float = 4.0,
    multiple: int = 1,
    kv_heads: int | None = None,
    gqa_rule: str = "fixed_ratio",
) -> BaseShape:
    return BaseShape(
        width, depth, head_dim, heads, ffn_ratio, 32, ffn_multiple=multiple, kv_heads=kv_heads, gqa_rule=gqa_rule
    )


def test_a_size_is_the_base_shape_times_its_ratios() -> None:
    assert base().scaled(2, 1.5, 256) == Size(
        width=96,
        depth=6,
        heads=6,
        kv_heads=6,
        head_dim=16,
        ffn_width=384,
        vocab_size=256,
        context=32,
        width_ratio=2.0,
        depth_ratio=1.5,
    )


def test_ratios_below_one_and_binary_fractions_of_thirds_are_ratios_too() -> None:
    assert base().scaled(1 / 3, 0.25, 256).name == "w16-d1"
    assert base(width=768, head_dim=64).scaled(1 / 3, 1, 256).width == 256
    assert base().scaled(4 / 3, 1, 256).width == 64


def test_fixed_heads_grow_in_dimension_and_a_fixed_dimension_grows_in_heads() -> None:
    fixed_dim, fixed_heads = base().scaled(4, 1, 256), base(heads=3).scaled(4, 1, 256)
    assert (fixed_dim.heads, fixed_dim.head_dim) == (12, 16)
    assert (fixed_heads.heads, fixed_heads.head_dim) == (3, 64)


@pytest.mark.parametrize(
    ("shape", "ratios", "numbers"),
    [
        ({}, (1.1, 1), ["model.width=48", "width_ratio=1.1", "52.8"]),
        ({}, (1, 0.3), ["model.depth=4", "depth_ratio=0.3", "1.2"]),
        ({}, (1, 0.125), ["model.depth=4", "depth_ratio=0.125", "0.5"]),
        ({}, (1, 0.2), ["model.depth=4", "depth_ratio=0.2", "0.8"]),
        ({}, (0.5, 1), ["width 24", "model.width=48", "width_ratio=0.5", "model.head_dim=16"]),
        ({}, (0.25, 1), ["width 12", "width_ratio=0.25", "model.head_dim=16"]),  # narrower than one head
        ({}, (1.25, 1), ["width 60", "width_ratio=1.25", "model.head_dim=16"]),
        ({"heads": 5}, (1, 1), ["width 48", "width_ratio=1", "model.heads=5"]),
        ({"heads": 32}, (0.5, 1), ["width 24", "width_ratio=0.5", "model.heads=32"]),
    ],
    ids=str,
)
def test_a_ratio_without_whole_features_blocks_or_heads_is_refused_with_its_numbers(
    shape: dict[str, int], ratios: tuple[float, float], numbers: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        base(**shape).scaled(*ratios, 256)  # type: ignore[arg-type]
    for number in numbers:
        assert number in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("ratio", "multiple", "ffn_width"), [(4.0, 1, 192), (8 / 3, 1, 128), (2.5, 64, 128), (8 / 3, 100, 200)]
)
def test_the_mlp_is_rounded_up_to_its_multiple(ratio: float, multiple: int, ffn_width: int) -> None:
    assert base(ffn_ratio=ratio, multiple=multiple).scaled(1, 1, 256).ffn_width == ffn_width


@pytest.mark.parametrize(
    ("width", "multiple", "ffn_width"),
    [(4096, 256, 11008), (5120, 256, 13824), (6656, 256, 17920), (8192, 256, 22016), (2048, 256, 5632)],
)
def test_two_thirds_of_four_widths_rounded_up_are_llamas_mlps(width: int, multiple: int, ffn_width: int) -> None:
    """Llama 7B, 13B, 33B and 65B (2302.13971, Table 2, with their multiple_of), TinyLlama."""
    size = base(width=width, head_dim=128, ffn_ratio=8 / 3, multiple=multiple).scaled(1, 1, 256)
    assert size.ffn_width == ffn_width


@pytest.mark.parametrize(
    ("shape", "kv_heads"),
    [
        ({"width": 64, "kv_heads": 1}, {1: 1, 2: 2, 4: 4, 3: 3}),  # 4 heads at the base
        ({"width": 64, "kv_heads": 2}, {0.5: 1, 1: 2, 1.5: 3, 4: 8}),
        ({"width": 64, "kv_heads": 4}, {0.25: 1, 1: 4, 2: 8}),
        ({"width": 64, "heads": 4, "kv_heads": 2}, {0.5: 2, 1: 2, 4: 2}),  # a fixed number of heads
        ({"width": 64, "kv_heads": 2, "gqa_rule": "fixed_kv_heads"}, {0.5: 2, 1: 2, 1.5: 2, 4: 2}),
        ({"width": 64}, {0.5: 2, 1: 4, 2: 8}),
    ],
    ids=str,
)
def test_heads_share_keys_in_groups_of_one_size_unless_kv_heads_is_held(
    shape: dict[str, int], kv_heads: dict[float, int]
) -> None:
    sizes = {ratio: base(**shape).scaled(ratio, 1, 256) for ratio in kv_heads}  # type: ignore[arg-type]
    assert {ratio: size.kv_heads for ratio, size in sizes.items()} == kv_heads
    assert all(size.heads % size.kv_heads == 0 for size in sizes.values())


@pytest.mark.parametrize(
    ("shape", "ratio", "overrides"),
    [
        ({"kv_heads": 3}, 1, ["model.kv_heads=3", "4 heads", "model.width=64"]),
        ({"kv_heads": 8}, 2, ["model.kv_heads=8", "4 heads", "model.width=64"]),  # though 8 would do at width 128
        ({"kv_heads": 1}, 0.5, ["width 32", "2 heads", "groups of 4", "model.kv_heads=1", "fixed_kv_heads"]),
        ({"kv_heads": 2}, 1.25, ["width 80", "5 heads", "groups of 2", "model.gqa_rule=fixed_kv_heads"]),
        ({"kv_heads": 4, "gqa_rule": "fixed_kv_heads"}, 0.5, ["2 heads", "model.kv_heads=4", "holds fixed"]),
        ({"kv_heads": 4, "gqa_rule": "fixed_kv_heads"}, 1.25, ["5 heads", "model.kv_heads=4"]),
    ],
    ids=str,
)
def test_a_size_that_cannot_share_keys_as_the_rule_says_is_refused_in_one_line(
    shape: dict[str, int], ratio: float, overrides: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        base(width=64, **shape).scaled(ratio, 1, 256)  # type: ignore[arg-type]
    for word in overrides:
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)


@given(
    width_heads=st.integers(1, 12),
    head_dim=st.sampled_from([1, 8, 64, 80, 128]),
    depth=st.integers(1, 24),
    fixed=st.booleans(),
    r_n=st.fractions(min_value="1/8", max_value=16, max_denominator=12),
    r_L=st.fractions(min_value="1/8", max_value=16, max_denominator=12),
)
def test_every_size_is_exact_or_refused(
    width_heads: int,
    head_dim: int,
    depth: int,
    fixed: bool,
    r_n: object,
    r_L: object,  # noqa: N803
) -> None:
    width = width_heads * head_dim
    shape = base(width, depth, head_dim, width_heads if fixed else None)
    exact_width, exact_depth = r_n * width, r_L * depth  # type: ignore[operator]
    unit = width_heads if fixed else head_dim
    legal = exact_width.denominator == exact_depth.denominator == 1 and exact_width % unit == 0
    if not legal:
        with pytest.raises(ConfigError):
            shape.scaled(float(r_n), float(r_L), 256)  # type: ignore[arg-type]
        return
    size = shape.scaled(float(r_n), float(r_L), 256)  # type: ignore[arg-type]
    assert (size.width, size.depth) == (exact_width, exact_depth)
    assert size.heads * size.head_dim == size.width
    assert (size.heads if fixed else size.head_dim) == unit
    assert size.ffn_width == 4 * size.width
