"""Roles read off networks: every tensor of transformers' models against a table by hand, and what is refused."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import mupsweep
from mupsweep import models
from mupsweep.errors import ConfigError
from mupsweep.models.inference import InferredTensor, infer
from mupsweep.scaling import Role

PAGE = (Path(models.__file__).parent / "ROLES.md").read_text()
TABLES = {
    title: re.findall(r"^\| (\S*[.]\S*) \| (.*) \|$", text, re.MULTILINE)
    for title, text in re.findall(r"^### (.*)\n((?:(?!###).*\n)*)", PAGE, re.MULTILINE)
}


def causal(kind: str, kv_heads: Callable[[int], int] | None = None, **keys: object) -> Callable[[int], nn.Module]:
    """A causal LM of a width, two blocks deep, with heads of 16 features."""

    def build(width: int) -> nn.Module:
        scaled = {k: v(width) if callable(v) else v for k, v in keys.items()}
        heads = {"num_attention_heads": width // 16, "num_hidden_layers": 2}
        if kv_heads is not None:
            heads["num_key_value_heads"] = kv_heads(width)
        sizes = {"vocab_size": 512, "hidden_size": width, "intermediate_size": 3 * width}
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config = getattr(transformers, f"{kind}Config")(**heads | sizes | tokens | scaled)
        return getattr(transformers, f"{kind}ForCausalLM")(config)

    return build


def gpt2(width: int) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=512, n_positions=96, n_embd=width, n_layer=2, n_head=width // 16, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def vit(width: int) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 16,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )
    return transformers.ViTForImageClassification(config)


def t5(width: int) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=512, d_model=width, d_ff=3 * width, d_kv=16, num_heads=width // 16, num_layers=2
    )
    return transformers.T5ForConditionalGeneration(config)


def whisper(width: int) -> nn.Module:
    sides = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in (("layers", 2), ("attention_heads", width // 16), ("ffn_dim", 3 * width))
    }
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    positions = {"max_source_positions": 100, "max_target_positions": 50}
    config = transformers.WhisperConfig(vocab_size=512, d_model=width, **sides, **tokens, **positions)
    return transformers.WhisperForConditionalGeneration(config)


def fixed(_: int) -> int:
    return 2


def growing(width: int) -> int:
    return width // 32


DEEPSEEK = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
EXPERTS = {"n_routed_experts": 8, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
MODELS: dict[str, Callable[[int], nn.Module]] = {
    "GPT2LMHeadModel": gpt2,
    "LlamaForCausalLM, fixed key-value heads": causal("Llama", fixed, head_dim=16),
    "LlamaForCausalLM, growing key-value heads, tied": causal("Llama", growing, head_dim=16, tie_word_embeddings=True),
    "Qwen3ForCausalLM": causal("Qwen3", fixed, head_dim=16),
    "MistralForCausalLM": causal("Mistral", fixed, head_dim=16),
    "GemmaForCausalLM": causal("Gemma", lambda _: 1, head_dim=16),
    "MixtralForCausalLM": causal("Mixtral", growing, head_dim=16, num_local_experts=4),
    "DeepseekV3ForCausalLM": causal(
        "DeepseekV3", lambda n: n // 16, moe_intermediate_size=lambda n: n, **DEEPSEEK, **EXPERTS
    ),
    "Olmo2ForCausalLM": causal("Olmo2", lambda n: n // 16),
    "GPTNeoXForCausalLM": causal("GPTNeoX"),
    "Phi3ForCausalLM": causal("Phi3", fixed),
    "Mamba2ForCausalLM": causal("Mamba2", num_heads=lambda n: n // 8, head_dim=16, state_size=16, n_groups=1),
    "ViTForImageClassification": vit,
    "T5ForConditionalGeneration": t5,
    "WhisperForConditionalGeneration": whisper,
}


def on_meta(build: Callable[[int], nn.Module], *widths: int) -> list[nn.Module]:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kernels that transformers looks for
        return [build(width) for width in widths]


def expanded(pattern: str) -> Iterator[str]:
    """The names that a.{b,c} stands for."""
    parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
    return map("".join, itertools.product(*parts))


def word(tensor: InferredTensor) -> str:
    """A tensor's role as the tables say it, "tied" aside."""
    (n_out, n_in), (base_out, base_in) = tensor.spec.dims, tensor.base.dims
    shared = tensor.spec.role is Role.HIDDEN and n_out == base_out and n_in > base_in
    return tensor.spec.role.value + (", shared" if shared else "") + (", stacked" if tensor.spec.stacked else "")


def test_the_page_has_a_table_of_every_model() -> None:
    assert TABLES.keys() == MODELS.keys()
    names = [name for table in TABLES.values() for pattern, _ in table for name in expanded(pattern)]
    assert len(names) > 250


@pytest.mark.parametrize("title", MODELS)
def test_every_tensor_has_the_role_of_the_table(title: str) -> None:
    by_hand = {name: role for pattern, role in TABLES[title] for name in expanded(pattern)}
    base, model = on_meta(MODELS[title], 64, 128)
    inferred: dict[str, str] = {}
    seen: set[torch.Tensor] = set()
    for tensor in infer(model, base):
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "#", tensor.name)
        role = word(tensor) + (", tied" if tensor.parameter in seen else "")
        assert inferred.setdefault(kind, role) == role, tensor.name
        seen.add(tensor.parameter)
    assert inferred == by_hand


def test_deeper_models_count_blocks_and_not_what_stands_in_some_of_them() -> None:
    """DeepSeek V3's first block has no experts: four blocks for two are twice as many, not three times."""
    (base,) = on_meta(MODELS["DeepseekV3ForCausalLM"], 64)
    deep = causal(
        "DeepseekV3",
        lambda n: n // 16,
        moe_intermediate_size=lambda n: n,
        num_hidden_layers=4,
        **DEEPSEEK,
        **EXPERTS,
    )
    (model,) = on_meta(deep, 128)
    ratios = {tensor.name: tensor.depth_ratio for tensor in infer(model, base)}
    assert {name: ratio for name, ratio in ratios.items() if ratio != 2} == {
        "model.embed_tokens.weight": 1,
        "model.norm.weight": 1,
        "lm_head.weight": 1,
    }


class Block(nn.Module):
    """A tensor of every kind that stands in blocks."""

    def __init__(self, width: int, stacked: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(width, width),
                "k_proj": nn.Linear(width, 32),
                "kv_a_proj": nn.Linear(width, 24),
                "kv_b_proj": nn.Linear(24, width),
            }
        )
        if stacked:
            self.attn["qkv"] = nn.Linear(width, width + 64)
        self.mlp = nn.ModuleDict(
            {"gate": nn.Linear(width, 8), "experts": nn.ModuleList(nn.Linear(width, width) for _ in range(8))}
        )


class Kinds(nn.Module):
    def __init__(self, width: int, depth: int, stacked: bool = True) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(100, width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, stacked) for _ in range(depth))
        self.head = nn.Linear(width, 100)


ROWS = (  # one tensor for each row of the table of rules
    "embedding.weight",
    "blocks.3.mlp.experts.7.weight",
    "head.weight",
    "norm.weight",
    "blocks.3.norm.bias",
    "blocks.3.attn.k_proj.weight",
    "blocks.3.attn.kv_a_proj.weight",
    "blocks.3.attn.kv_b_proj.weight",
    "blocks.3.mlp.gate.weight",
    "blocks.3.attn.qkv.weight",
)
RULES = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.split("## Rules")[1].split("\n")
    if line.count("|") == 8 and "---" not in line and "| kind |" not in line
]


def at(cell: str, r_n: float, r_L: float) -> float:  # noqa: N803
    """The value of a cell such as "r_n^-1/2 r_L"."""
    value = 1.0
    for factor in cell.split() if cell != "1" else ():
        base, _, power = factor.partition("^")
        top, _, bottom = (power or "1").partition("/")
        value *= {"r_n": r_n, "r_L": r_L}[base] ** (int(top) / int(bottom or 1))
    return value


@pytest.mark.parametrize(("column", "optimizer"), [(2, "adamw"), (3, "adamw"), (4, "muon"), (5, "sgd")])
def test_the_table_of_rules_holds_what_groups_hold(column: int, optimizer: str) -> None:
    refused = RULES[-1][column] == "refused"
    with torch.device("meta"):
        base, model, whole = Kinds(128, 2, not refused), Kinds(512, 4, not refused), (Kinds(512, 4), Kinds(128, 2))
    assert len(RULES) == len(ROWS)
    if refused:
        with pytest.raises(ConfigError, match=r"attn\.qkv\.weight: rows that grow .* are stacked in it, and"):
            mupsweep.param_groups(*whole, lr=1.0, optimizer=optimizer, parametrization="spectral")
    groups = mupsweep.param_groups(model, base, lr=1.0, optimizer=optimizer, parametrization="spectral", details=True)
    group_of = {name: group for group in groups for name in group["names"]}
    for row, name in zip(RULES, ROWS, strict=True):
        if row[column] == "refused":
            continue
        group = group_of[name]
        assert group["role"] == row[1].partition(",")[0], name
        if row[column] == "AdamW":
            assert group["optimizer"] == "adamw", name
        else:
            value = group["init_std_ratio" if column == 2 else "lr"]
            assert value == pytest.approx(at(row[column], 4, 2), rel=1e-12), name
        if optimizer == "adamw":
            in_block, is_head = name.startswith("blocks"), name.startswith("head")
            assert group["multiplier"] == (1 / 2 if in_block else 1 / 4 if is_head else 1), name


def test_routers_have_the_published_rule_for_a_fixed_number_of_experts() -> None:
    """2605.14200's code, `MupFixedE`, without multipliers: powers of the width of (std, LR, eps) under Adam."""
    published = {"router": (-1, -1, 0), "hidden": (-1 / 2, -1, -1), "input": (0, 0, -1)}
    with torch.device("meta"):
        model, base = Kinds(1024, 2), Kinds(128, 2)
    groups = mupsweep.param_groups(model, base, lr=1.0, eps=1.0, details=True)
    for name in ("blocks.1.mlp.gate.weight", "blocks.1.mlp.experts.0.weight", "embedding.weight"):
        (group,) = (group for group in groups if name in group["names"])
        numbers = group["init_std_ratio"], group["lr"], group["eps"]
        assert numbers == pytest.approx([8.0**power for power in published[group["role"]]], rel=1e-12), name


@pytest.mark.parametrize("kv_heads", [(4, 16), (4, 8), (4, 4), (2, 4)])
def test_keys_start_at_their_size_whatever_number_of_queries_shares_them(kv_heads: tuple[int, int]) -> None:
    heads = dict(zip((64, 256), kv_heads, strict=True))
    base, model = on_meta(causal("Llama", heads.__getitem__, head_dim=16), 64, 256)
    groups = mupsweep.param_groups(model, base, lr=1.0, details=True)
    (group,) = (group for group in groups if "model.layers.0.self_attn.k_proj.weight" in group["names"])
    assert (group["init_std_ratio"], group["lr"]) == pytest.approx((1 / 2, 1 / 4), rel=1e-12)


class Attention(nn.Module):
    """Blocks that hold one matrix, beside what the models of the tests have."""

    def __init__(self, **shape: tuple[int, ...]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, max(next(iter(shape.values()))))
        self.layers = nn.ModuleList(nn.ModuleDict() for _ in range(2))
        for layer in self.layers:
            for name, (n_out, *kernel, n_in) in shape.items():
                if name.startswith("raw_"):
                    layer.register_parameter(name, nn.Parameter(torch.empty(n_out, *kernel, n_in)))
                else:
                    layer.add_module(name, nn.Linear(n_in, n_out, bias=False))


def refused(big: dict[str, tuple[int, ...]], small: dict[str, tuple[int, ...]], **keys: object) -> str:
    with torch.device("meta"), pytest.raises(ConfigError) as error:
        infer(Attention(**big), Attention(**small), **keys)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_matrix_in_a_block_that_nothing_explains_is_refused_with_the_line_that_settles_it() -> None:
    said = refused({"mystery": (8, 128)}, {"mystery": (8, 64)})
    assert "layers.0.mystery.weight (8, 128) has no clear role: only one of its dimensions grows" in said
    line = re.search(r"roles=\{'(.*?)': '(.*?)'\}", said)
    assert line is not None
    assert line.groups() == ("layers.*.mystery.weight", "hidden")
    with torch.device("meta"):
        model, base = Attention(mystery=(8, 128)), Attention(mystery=(8, 64))
    for role in ("hidden", "router", "output"):
        tensors = infer(model, base, roles={line[1]: role})
        assert {t.spec.role.value for t in tensors if "mystery" in t.name} == {role}


@pytest.mark.parametrize(
    ("big", "small", "said"),
    [
        ({"k_proj": (8, 128)}, {"k_proj": (8, 64)}, "no clear role"),  # no queries beside it
        ({"raw_mix": (8, 128)}, {"raw_mix": (8, 64)}, "nothing says which of its dimensions is n_in"),
        ({"raw_mix": (96, 128)}, {"raw_mix": (64, 64)}, "nothing says which of its dimensions is n_in"),
        ({"raw_mix": (8, 128, 128)}, {"raw_mix": (4, 64, 64)}, "grows along 3 axes"),
        ({"raw_experts": (8, 128, 128)}, {"raw_experts": (4, 64, 64)}, "number of experts differs"),
        ({"router": (16, 128)}, {"router": (8, 64)}, "number of experts differs"),
    ],
    ids=["lonely keys", "raw", "raw with two ratios", "three axes", "stacked experts", "router"],
)
def test_what_shapes_cannot_tell_is_refused(
    big: dict[str, tuple[int, ...]], small: dict[str, tuple[int, ...]], said: str
) -> None:
    assert said in refused(big, small)


def test_a_low_rank_projection_is_not_taken_for_a_stack() -> None:
    with torch.device("meta"):
        model, base = (Attention(in_proj=(8, n), out_proj=(n, 8)) for n in (128, 64))
        roles = {t.name: word(t) for t in infer(model, base) if t.name.startswith("layers.0")}
    assert roles == {"layers.0.in_proj.weight": "hidden, shared", "layers.0.out_proj.weight": "hidden"}


def test_a_single_block_is_a_block() -> None:
    def net(width: int) -> nn.Module:
        return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mystery": nn.Linear(width, 3)})])})

    with torch.device("meta"), pytest.raises(ConfigError, match=r"layers\.0\.mystery\.weight .* no clear role"):
        infer(net(128), net(64))


def test_a_stack_of_experts_is_a_matrix_for_each() -> None:
    class Experts(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(8, 3 * width, width))

    with torch.device("meta"):
        (tensor,) = infer(nn.ModuleList([Experts(128)]), nn.ModuleList([Experts(64)]))
    assert (tensor.spec.role, tensor.spec.dims, tensor.base.dims) == (Role.HIDDEN, (384, 128), (192, 64))


def test_a_list_of_more_experts_is_no_depth() -> None:
    def net(experts: int, width: int) -> nn.Module:
        layers = nn.ModuleList(
            nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(width, width) for _ in range(experts))}) for _ in range(2)
        )
        return nn.ModuleDict({"layers": layers})

    with torch.device("meta"), pytest.raises(ConfigError, match="the number of experts differs from the base"):
        infer(net(8, 128), net(4, 64))


def test_the_last_layers_of_chains_read_out_and_lists_of_equal_ones_are_refused() -> None:
    def chain(width: int, heads: int) -> nn.Module:
        body = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))
        return nn.ModuleDict({"body": body, "heads": nn.ModuleList(nn.Linear(width, 5) for _ in range(heads))})

    with torch.device("meta"):
        roles = {t.name: t.spec.role.value for t in infer(chain(32, 1), chain(16, 1)) if t.name.endswith("weight")}
        assert roles == {
            "body.0.weight": "input",
            "body.2.weight": "hidden",
            "body.4.weight": "output",
            "heads.0.weight": "output",
        }
        ends = [nn.Sequential(nn.Embedding(9, n), nn.Linear(n, n), nn.Linear(n, 9)) for n in (32, 16)]
        assert [t.spec.role.value for t in infer(*ends) if "weight" in t.name] == ["input", "hidden", "output"]
        with pytest.raises(ConfigError, match=r"heads\.0\.weight .* no clear role.*'heads\.\*\.weight'"):
            infer(chain(32, 2), chain(16, 2))


def test_convolutions_are_matrices_over_their_channels() -> None:
    def net(width: int) -> nn.Module:
        block = {
            "full": nn.Conv1d(width, 3 * width, 5),
            "depthwise": nn.Conv1d(width, width, 5, groups=width),
            "up": nn.ConvTranspose1d(3 * width, width, 2),
        }
        stem = nn.Conv2d(3, width, 7)
        return nn.ModuleDict({"stem": stem, "layers": nn.ModuleList(nn.ModuleDict(block) for _ in range(2))})

    with torch.device("meta"):
        tensors = {t.name: t for t in infer(net(128), net(64)) if t.name.endswith("weight")}
    found = {name: (t.spec.role.value, t.spec.dims) for name, t in tensors.items() if not name.startswith("layers.1")}
    assert found == {
        "stem.weight": ("input", (128, 147)),
        "layers.0.full.weight": ("hidden", (384, 128)),
        "layers.0.depthwise.weight": ("hidden_vector", (128, 1)),
        "layers.0.up.weight": ("hidden", (128, 384)),
    }


def test_names_are_those_without_wrappers() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def net(width: int) -> Kinds:
        return Kinds(width, 2)

    with torch.device("meta"):
        model, base = net(256), net(128)
        plain = mupsweep.param_groups(net(256), base, lr=1.0, weight_decay=0.1, no_decay=["*.bias"], details=True)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)
        block.attn["q_proj"] = torch.compile(block.attn["q_proj"], backend="eager")
    wrapped = nn.ModuleDict({"module": torch.compile(model, backend="eager")})  # as DistributedDataParallel names it
    names = {name for name, _ in wrapped.named_parameters()}
    assert any(
        name.startswith("module._orig_mod.blocks.0._checkpoint_wrapped_module.attn.q_proj._orig_mod.") for name in names
    )
    groups = mupsweep.param_groups(
        wrapped, base, lr=1.0, weight_decay=0.1, no_decay=["module._orig_mod.*.bias"], details=True
    )
    without_params = [[{k: v for k, v in g.items() if k != "params"} for g in side] for side in (groups, plain)]
    assert without_params[0] == without_params[1]
    assert sum(len(g["params"]) for g in groups) == len(names)
