"""Llama against transformers' Llama and Qwen 3; rotary positions, grouped queries and refusals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from tiny import network, resolve, scaled, tiny, tokens
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from mupsweep.errors import ConfigError
from mupsweep.models.layers import causal_attention, rotate, rotation
from mupsweep.models.llama import Llama
from mupsweep.models.shape import Size
from mupsweep.scaling import Init, Role, TensorSpec
from mupsweep.sweep import tensor_rules
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.training import build

TOLERANCE = {
    "logits": 1e-5,  # fp32, logits of size 1
    "fp32": 1e-6,  # of entries of size 1
    "float64": 1e-12,
    "rule": 1e-12,  # relative, float64
    "bf16": 0.02,  # of attention over 16 tokens, relative to its spread
    "keys": 0.1,  # relative, of the RMS of some 10 000 random entries
}


def llama(
    *, width: int = 32, depth: int = 2, head_dim: int = 8, vocab: int = 71, context: int = 16, **keys: object
) -> tuple[Llama, Size]:
    model = Llama(name="llama", width=width, depth=depth, head_dim=head_dim, context=context, **keys)  # type: ignore[arg-type]
    return model, model.base.scaled(1.0, 1.0, vocab)


def transformers_config(kind: type[PretrainedConfig], model: Llama, size: Size) -> PretrainedConfig:
    return kind(
        vocab_size=size.vocab_size,
        hidden_size=size.width,
        intermediate_size=size.ffn_width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=size.context,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        rms_norm_eps=1e-5,
        tie_word_embeddings=model.tied,
        attn_implementation="eager",
    )


def with_our_weights(theirs: PreTrainedModel, size: Size, ours: dict[str, Tensor]) -> PreTrainedModel:
    """A Llama or Qwen 3 of transformers with our weights; gains that we do not have are left at 1."""
    kv = size.kv_heads * size.head_dim
    weights = {
        "model.embed_tokens.weight": ours["token_embedding.weight"],
        "model.norm.weight": ours.get("norm.weight"),
        "lm_head.weight": ours["head.weight"],
    }
    for i in range(size.depth):
        h, b = f"model.layers.{i}", f"blocks.{i}"
        qkv = {m: ours.get(f"{b}.attention.{m}.weight") for m in ("query", "key", "value")}
        if f"{b}.attention.qkv.weight" in ours:
            stack = ours[f"{b}.attention.qkv.weight"].split([size.width, kv, kv])
            qkv = dict(zip(qkv, stack, strict=True))
        gated = {m: ours.get(f"{b}.mlp.{m}.weight") for m in ("gate", "up")}
        if f"{b}.mlp.gate_up.weight" in ours:
            gated = dict(zip(gated, ours[f"{b}.mlp.gate_up.weight"].chunk(2), strict=True))
        weights |= {
            f"{h}.input_layernorm.weight": ours.get(f"{b}.attention_norm.weight"),
            f"{h}.self_attn.q_proj.weight": qkv["query"],
            f"{h}.self_attn.k_proj.weight": qkv["key"],
            f"{h}.self_attn.v_proj.weight": qkv["value"],
            f"{h}.self_attn.q_norm.weight": ours.get(f"{b}.attention.query_norm.weight"),
            f"{h}.self_attn.k_norm.weight": ours.get(f"{b}.attention.key_norm.weight"),
            f"{h}.self_attn.o_proj.weight": ours[f"{b}.attention.output.weight"],
            f"{h}.post_attention_layernorm.weight": ours.get(f"{b}.mlp_norm.weight"),
            f"{h}.mlp.gate_proj.weight": gated["gate"],
            f"{h}.mlp.up_proj.weight": gated["up"],
            f"{h}.mlp.down_proj.weight": ours[f"{b}.mlp.down.weight"],
        }
    given = {name: weight for name, weight in weights.items() if weight is not None}
    missing, unexpected = theirs.load_state_dict(given, strict=False)
    assert unexpected == []
    assert all("norm" in name for name in missing)  # and those start as ones
    return theirs.eval()


def assert_equal_logits(model: Llama, size: Size, theirs: PreTrainedModel, length: int | None = None) -> None:
    ours = network(model, size)
    reference = with_our_weights(theirs, size, ours.state_dict())
    ids = tokens(size, length=length)
    with torch.no_grad():
        expected, got = reference(ids).logits, ours(ids)
    assert expected.std() > 0.2  # the comparison is of numbers that matter
    torch.testing.assert_close(got, expected, rtol=TOLERANCE["logits"], atol=TOLERANCE["logits"])


@pytest.mark.parametrize("projections", ["split", "fused"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("shape", "length"),
    [
        ({}, 16),
        ({"kv_heads": 2}, 16),
        ({"kv_heads": 1}, 16),  # every query shares the one key
        ({"head_dim": 32}, 16),  # one head
        ({"heads": 2, "width": 24}, 16),
        ({"heads": 6, "width": 48, "kv_heads": 2, "depth": 3}, 16),
        ({"ffn_ratio": 3.5, "ffn_multiple": 1}, 16),
        ({"ffn_multiple": 100}, 16),
        ({"rope_theta": 100.0, "head_dim": 16}, 16),
        ({"rope_theta": 500_000.0, "context": 64, "kv_heads": 2}, 64),
        ({"norm_gains": False}, 16),
        ({"context": 32}, 7),  # shorter than the longest
        ({"depth": 1}, 1),
    ],
    ids=str,
)
def test_logits_equal_those_of_transformers_llama(
    shape: dict[str, int], length: int, tied: bool, projections: str
) -> None:
    model, size = llama(tied=tied, projections=projections, **shape)  # type: ignore[arg-type]
    theirs = LlamaForCausalLM(transformers_config(LlamaConfig, model, size))  # type: ignore[arg-type]
    assert_equal_logits(model, size, theirs, length)


@pytest.mark.parametrize("qk_norm", ["plain", "gains"])
@pytest.mark.parametrize("kv_heads", [None, 2, 1])
def test_logits_with_qk_norm_equal_those_of_transformers_qwen3(kv_heads: int | None, qk_norm: str) -> None:
    model, size = llama(kv_heads=kv_heads, qk_norm=qk_norm)
    theirs = Qwen3ForCausalLM(transformers_config(Qwen3Config, model, size))  # type: ignore[arg-type]
    assert_equal_logits(model, size, theirs)


@pytest.mark.parametrize(
    ("shape", "vocab", "parameters"),
    [
        ({"width": 4096, "depth": 32, "head_dim": 128}, 32_000, 6_738_415_616),  # Llama 2 7B
        ({"width": 5120, "depth": 40, "head_dim": 128}, 32_000, 13_015_864_320),  # Llama 2 13B
        ({"width": 2048, "depth": 22, "head_dim": 64, "kv_heads": 4}, 32_000, 1_100_048_384),  # TinyLlama
        (
            {"width": 4096, "depth": 32, "head_dim": 128, "kv_heads": 8, "ffn_ratio": 3.5, "ffn_multiple": 1024},
            128_256,
            8_030_261_248,  # Llama 3 8B
        ),
    ],
    ids=["7B", "13B", "TinyLlama", "8B"],
)
def test_published_llamas_have_their_number_of_parameters(shape: dict[str, int], vocab: int, parameters: int) -> None:
    model, size = llama(vocab=vocab, **{"ffn_multiple": 256, **shape})  # type: ignore[arg-type]
    assert sum(math.prod(t.shape) for t in model.tensors(size)) == parameters


# Rotary positions.


@pytest.mark.parametrize(("head_dim", "theta"), [(2, 10_000.0), (8, 100.0), (64, 500_000.0)])
def test_every_pair_is_turned_by_position_times_its_frequency(head_dim: int, theta: float) -> None:
    x = torch.randn(1, 1, 5, head_dim, generator=torch.Generator().manual_seed(0))
    got = rotate(x, rotation(5, head_dim, theta, x.device))
    half = head_dim // 2
    for position in range(5):
        for i in range(half):
            angle = position * theta ** (-2 * i / head_dim)
            pair = complex(x[0, 0, position, i], x[0, 0, position, i + half])
            turned = pair * complex(math.cos(angle), math.sin(angle))
            assert got[0, 0, position, i].item() == pytest.approx(turned.real, abs=TOLERANCE["fp32"])
            assert got[0, 0, position, i + half].item() == pytest.approx(turned.imag, abs=TOLERANCE["fp32"])


def test_scores_depend_on_the_distance_of_two_tokens_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(8, generator=generator, dtype=torch.float64) for _ in range(2))
    angles = rotation(12, 8, 10_000.0, torch.device("cpu"))
    queries, keys = (rotate(y.expand(1, 1, 12, 8), angles)[0, 0] for y in (q, k))
    scores = queries @ keys.T
    for distance in range(12):
        along = scores.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=TOLERANCE["fp32"], atol=TOLERANCE["fp32"])
    assert (scores[0, 0] - scores[1, 0]).abs() > 1e-3
    assert torch.equal(queries[0], q)  # position 0 is not turned


# Grouped queries.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_a_group_of_queries_attends_to_the_key_it_shares(kv_heads: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, 16, 8, generator=generator)
    k, v = (torch.randn(2, kv_heads, 16, 8, generator=generator) for _ in range(2))
    expected = torch.empty_like(q)
    future = torch.ones(16, 16, dtype=torch.bool).triu(1)
    for head in range(6):
        shared = head // (6 // kv_heads)
        scores = 0.3 * q[:, head] @ k[:, shared].mT
        expected[:, head] = scores.masked_fill(future, -math.inf).softmax(-1) @ v[:, shared]
    got = causal_attention(q.to(dtype), k.to(dtype), v.to(dtype), 0.3)
    assert got.dtype is dtype
    tolerance = TOLERANCE["fp32"] if dtype is torch.float32 else TOLERANCE["bf16"]
    assert (got.float() - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_attention_has_its_shape_on_a_device_that_is_no_cpu(kv_heads: int) -> None:
    """The meta device takes an accelerator's branch and computes nothing."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k = (torch.empty(2, heads, 16, 8, device="meta", dtype=dtype) for heads in (4, kv_heads))
        assert causal_attention(q, k, k, 1.0).shape == q.shape


def test_keys_are_not_repeated_where_autocast_will_multiply_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's autocast has QK-norms in fp32, and casts what attention is given."""
    seen: list[tuple[int, bool]] = []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, **how: seen.append((len(k[0]), how["enable_gqa"]))
    )
    q, k = (torch.empty(2, heads, 16, 8, device="meta") for heads in (4, 1))
    for dtype in (torch.bfloat16, torch.float32):
        causal_attention(q, k, k.to(dtype), 1.0)
    assert seen == [(1, True), (4, False)]


RATIOS = ("init_var_ratio", "multiplier_ratio", "lr_ratio", "weight_decay_ratio", "eps_ratio")


def rules(run: RunSpec) -> dict[str, tensor_rules.TensorRule]:
    return {row.name: row for row in tensor_rules.rules(run.resolved, run.size, run.base_lr)}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon", "muon_kimi"])
def test_keys_shared_in_groups_of_one_size_follow_the_rule_of_every_hidden_matrix(optimizer: str) -> None:
    run = scaled(tiny("llama", optimizer, width=32, kv_heads=2), 4.0, 2.0)
    rows = rules(run)
    for name in ("key", "value"):
        row, query = rows[f"blocks.3.attention.{name}.weight"], rows["blocks.3.attention.query.weight"]
        assert row.shape == (64, 128)
        for ratio in RATIOS:
            assert getattr(row, ratio) == pytest.approx(getattr(query, ratio), rel=TOLERANCE["rule"]), (name, ratio)


# r_n = 4 with two keys held: rows that repeat leave ||W||_R as it is. (init std, LR, weight decay, eps) of keys.
HELD = {
    "adamw": (1 / 2, 1 / 4, 4, 1),
    "muon": (1 / 2, 1 / 2, 2, 2),
    "sgd": (1 / 2, 1 / 4, 4, None),
}


@pytest.mark.parametrize("optimizer", HELD)
def test_held_keys_have_the_init_of_the_repeated_matrix_and_the_lr_of_their_own_shape(optimizer: str) -> None:
    run = scaled(tiny("llama", optimizer, width=32, kv_heads=2, gqa_rule="fixed_kv_heads"), 4.0)
    std, lr, weight_decay, eps = HELD[optimizer]
    rows = rules(run)
    for name in ("key", "value"):
        row = rows[f"blocks.1.attention.{name}.weight"]
        assert row.shape == (16, 128)
        assert math.sqrt(row.init_var_ratio) == pytest.approx(std, rel=TOLERANCE["rule"])
        assert row.lr_ratio == pytest.approx(lr, rel=TOLERANCE["rule"])
        assert row.weight_decay_ratio == pytest.approx(weight_decay, rel=TOLERANCE["rule"])
        if eps is not None:
            assert row.eps_ratio == pytest.approx(eps, rel=TOLERANCE["rule"])
    assert rows["blocks.1.attention.query.weight"].lr_ratio == pytest.approx(
        {"adamw": 1 / 4, "muon": 1, "sgd": 1}[optimizer], rel=TOLERANCE["rule"]
    )


@pytest.mark.parametrize("gqa_rule", ["fixed_ratio", "fixed_kv_heads"])
def test_keys_start_equally_large_at_every_width(gqa_rule: str) -> None:
    run = tiny("llama", width=32, kv_heads=2, gqa_rule=gqa_rule)
    sizes = []
    for ratio in (1.0, 4.0, 16.0):
        built = build.build(scaled(run, ratio), torch.device("cpu"))
        x = torch.randn(400, built.network.norm.weight.shape[0], generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            sizes.append(built.network.blocks[0].attention.key(x).square().mean().sqrt().item())
    assert sizes[1:] == pytest.approx([sizes[0]] * 2, rel=TOLERANCE["keys"])


def test_a_gain_that_all_heads_share_scales_as_a_vector_whose_size_is_fixed() -> None:
    """Its LR does not follow the width, and neither does its eps: there are ever more heads, not more gains."""
    rows = rules(scaled(tiny("llama", qk_norm="gains"), 4.0, 2.0))
    for name in ("query", "key"):
        row = rows[f"blocks.3.attention.{name}_norm.weight"]
        assert (row.shape, row.role, row.init) == ((8,), Role.HIDDEN_VECTOR, Init.ONES)
        assert row.lr_ratio == pytest.approx(1.0, rel=TOLERANCE["rule"])
        assert row.eps_ratio == pytest.approx(1 / 2, rel=TOLERANCE["rule"])  # 1 / r_L
    assert rows["blocks.3.attention_norm.weight"].eps_ratio == pytest.approx(1 / 8, rel=TOLERANCE["rule"])


def test_heads_of_growing_dimension_have_gains_that_grow() -> None:
    run = scaled(tiny("llama", qk_norm="gains", heads=2, kv_heads=1), 4.0)
    assert (run.size.heads, run.size.kv_heads, run.size.head_dim) == (2, 1, 32)
    row = rules(run)["blocks.0.attention.query_norm.weight"]
    assert row.shape == (32,)
    assert row.eps_ratio == pytest.approx(1 / 4, rel=TOLERANCE["rule"])
    assert tensor_rules.multipliers(run.resolved, run.size).attention == pytest.approx(
        math.sqrt(8) / 32, rel=TOLERANCE["rule"]
    )


class WrongRole(Llama):
    """Keys that would be right if the width only reached their input."""

    def tensors(self, size: Size) -> Iterator[TensorSpec]:
        for t in super().tensors(size):
            yield replace(t, role=Role.OUTPUT) if t.name == "blocks.1.attention.key.weight" else t


class NotRepeated(Llama):
    """Shared tensors that do not say so, and therefore do not seem to grow."""

    def tensors(self, size: Size) -> Iterator[TensorSpec]:
        return (replace(t, repeats=1) for t in super().tensors(size))


@pytest.mark.parametrize(
    ("cls", "keys", "message"),
    [
        (
            WrongRole,
            {"kv_heads": 1},
            r"^blocks\.1\.attention\.key\.weight is declared output.*\(16, 16\) to \(32, 32\)",
        ),
        (
            NotRepeated,
            {"kv_heads": 1, "gqa_rule": "fixed_kv_heads"},
            r"^blocks\.0\.attention\.key\.weight is declared hidden.*\(8, 16\) to \(8, 32\)",
        ),
        (NotRepeated, {"qk_norm": "gains"}, r"^blocks\.0\.attention\.query_norm.*hidden_vector.*\(8, 1\) to \(8, 1\)"),
    ],
)
def test_a_role_that_its_shape_contradicts_is_refused(cls: type[Llama], keys: dict[str, object], message: str) -> None:
    run = tiny("llama", **keys)
    wrong = cls(**vars(run.resolved.model))
    with pytest.raises(ConfigError, match=message):
        tensor_rules.rules(replace(run.resolved, model=wrong), run.size, run.base_lr)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.kv_heads=0"], ["model.kv_heads=0", "null"]),
        (["model.ffn_multiple=0"], ["model.ffn_multiple=0", "at least 1"]),
        (["model.gqa_rule=refuse"], ["model.gqa_rule=refuse", "fixed_ratio", "fixed_kv_heads"]),
        (["model.rope_theta=1"], ["model.rope_theta=1", "10000"]),
        (["model.qk_norm=gain"], ["model.qk_norm=gain", "'gains'", "none", "plain"]),
        (["model.projections=fuse"], ["model.projections=fuse", "'fused'", "split"]),
        (
            ["model.projections=fused", "model.gqa_rule=fixed_kv_heads"],
            ["model.projections=fused", "model.gqa_rule=fixed_kv_heads", "split"],
        ),
        (["model.kv_heads=3"], ["model.kv_heads=3", "4 heads", "model.width=256"]),
    ],
    ids=" ".join,
)
def test_a_value_that_llama_cannot_have_is_refused_in_one_line(overrides: list[str], expected: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve("model=llama", *overrides).size(1.0, 1.0)
    for word in expected:
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)


def test_heads_of_odd_dimension_have_no_pairs_to_turn() -> None:
    for keys in ({"head_dim": 3}, {"heads": 8}):
        model, size = llama(width=24, **keys)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="width 24 has 3 features per head"):
            list(model.tensors(size))
