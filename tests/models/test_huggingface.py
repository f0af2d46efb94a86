"""Models of transformers: scaled by the fields of their config, with roles from shapes, trained as they are."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from own_model import LLAMA, TINY

from mupsweep.errors import ConfigError
from mupsweep.models.inferred import family
from mupsweep.scaling import Role
from mupsweep.sweep import plan, tensor_rules
from mupsweep.sweep.config import from_tree, load, to_tree
from mupsweep.sweep.run_identity import digest_of
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.training.build import build

WORDS = ["model=huggingface", "model.config=config.json", "model.context=8", *TINY[5:]]
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 50257}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": False}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 16, "layer_types": ["full_attention"] * 2}
CPU = torch.device("cpu")


def runs(config: Mapping[str, Any], *overrides: str) -> dict[tuple[float, float], RunSpec]:
    """The runs of a plan, by ratios of width and depth."""
    Path("config.json").write_text(json.dumps(config))
    return {(r.size.width_ratio, r.size.depth_ratio): r for r in plan.plan(load([*WORDS, *overrides]))}


def fields(run: RunSpec, *names: str) -> list[Any]:
    """Fields of the config at the size of a run."""
    values = run.resolved.model.values(run.size, {})  # type: ignore[attr-defined]
    return [values.get(name) for name in names]


def test_the_fields_of_the_shape_keep_their_proportions() -> None:
    run = runs(LLAMA, "sweep.depth_ratios=[1,3]")[2.0, 3.0]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    assert fields(run, *names) == [64, 6, 8, 4, 176]
    assert fields(run, "vocab_size", "bos_token_id", "max_position_embeddings", "torch_dtype") == [256, None, 64, None]
    small = runs(LLAMA, "model.width=16", "model.depth=1", "model.gqa_rule=fixed_kv_heads")[2.0, 1.0]
    assert fields(small, *names) == [32, 1, 4, 2, 88]
    per_layer = runs(QWEN3, "sweep.depth_ratios=[1,2]")[2.0, 2.0]
    assert fields(per_layer, "head_dim", "layer_types") == [16, ["full_attention"] * 4]
    wide_heads = runs(LLAMA, "model.heads=4", "parametrization=sp")[2.0, 1.0]
    assert fields(wide_heads, "num_attention_heads", "num_key_value_heads") == [4, 2]
    named = runs(LLAMA | {"inner_size": 10}, "model.scaled={inner_size:heads}")[2.0, 1.0]
    assert fields(named, "inner_size") == [20]


def test_a_token_costs_the_experts_that_compute_it() -> None:
    mixtral = {**LLAMA, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    run = runs(mixtral)[2.0, 1.0]
    experts = sum(math.prod(t.shape) for t in run.resolved.model.tensors(run.size) if ".experts." in t.name)
    assert experts == 2 * 8 * 3 * 64 * fields(run, "intermediate_size")[0]  # blocks, experts, matrices, width
    assert run.cost.active_parameters == run.cost.parameters - 0.75 * experts
    dense = runs({**mixtral, "num_experts_per_tok": 8})[2.0, 1.0]
    assert dense.cost.active_parameters is None
    assert dense.cost.flops - run.cost.flops == pytest.approx(6 * 0.75 * experts * run.cost.tokens, rel=1e-12)


def test_roles_are_those_of_the_table_of_models() -> None:
    run = runs(LLAMA, "model.gqa_rule=fixed_kv_heads")[2.0, 1.0]
    tensors = {family(t.name): t for t in run.resolved.model.tensors(run.size)}
    assert tensors["model.embed_tokens.weight"].role is Role.INPUT
    assert tensors["lm_head.weight"].role is Role.OUTPUT
    assert tensors["model.layers.#.self_attn.k_proj.weight"].role is Role.HIDDEN
    assert tensors["model.layers.#.self_attn.k_proj.weight"].repeats == 4  # 8 heads share the features of 2
    assert tensors["model.norm.weight"].role is Role.INPUT_VECTOR
    rows = {row.name: row for row in tensor_rules.rules(run.resolved, run.size, 2**-6)}
    assert rows["model.layers.0.self_attn.k_proj.weight"].lr_ratio == pytest.approx(0.5)
    assert rows["lm_head.weight"].lr_ratio == pytest.approx(0.5)  # the multiplier is folded into it


@pytest.mark.parametrize("config", [LLAMA, GPT2, QWEN3], ids=lambda config: config["model_type"])
def test_at_the_base_shape_it_trains_the_bits_of_a_plain_loop(config: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    run = replace(runs(config)[1.0, 1.0], seed=5)
    ours, tokens = build(run, CPU), torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))
    values = {k: v for k, v in config.items() if k not in ("architectures", "torch_dtype", "vocab_size")}
    theirs = AutoConfig.for_model(values.pop("model_type"), **values, vocab_size=256, use_cache=False)
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(theirs).train()
    adamw = run.resolved.optimizers[0].optimizer
    step = torch.optim.AdamW(model.parameters(), 2**-6, adamw.betas, adamw.eps, 0.0, fused=True)  # type: ignore[attr-defined]
    for _ in range(2):
        loss = ours.network(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        ours.optimizer.step(1.0)
        plain = F.cross_entropy(model(input_ids=tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
        step.zero_grad()
        plain.backward()
        step.step()
        assert loss.item() == plain.item()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, ours.network.get_parameter(name)), name


def test_matrices_that_are_stored_the_other_way_round_are_stepped_as_they_act() -> None:
    """transformers' GPT-2 stores (n_in, n_out): a step of Muon there is that on the transposed matrix."""
    run = runs(GPT2, "optimizer=muon", "optimizer.ns_steps=2")[2.0, 1.0]
    setup, tokens = build(run, CPU), torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))
    name = "transformer.h.0.mlp.c_fc.weight"
    weight = setup.network.get_parameter(name)
    assert tuple(weight.shape) == (64, 256)
    spec = next(t for t in run.resolved.model.tensors(run.size) if t.name == name)
    assert (spec.dims, spec.role) == ((256, 64), Role.HIDDEN)
    group = next(group for group in setup.groups if name in group["tensors"])
    assert group["transposed"]
    setup.network(tokens[:, :-1], tokens[:, 1:]).backward()
    before, grad = weight.detach().clone(), weight.grad
    assert grad is not None
    other = torch.nn.Parameter(before.mT.clone())
    other.grad = grad.mT.clone()
    muon = run.resolved.optimizers[0].optimizer.build(
        [{"params": [other], "lr": group["lr"], "peak_lr": group["lr"], "weight_decay": 0.0, "eps": group["eps"]}]
    )
    muon.step()
    setup.optimizer.step(1.0)
    torch.testing.assert_close(weight.detach(), other.detach().mT)


def test_a_sweep_keeps_what_the_file_holds() -> None:
    Path("config.json").write_text(json.dumps(LLAMA))
    config = load(WORDS)
    digest = digest_of(config.variants[0])
    Path("config.json").write_text(json.dumps(LLAMA | {"rms_norm_eps": 1e-3}))
    assert digest_of(load(WORDS).variants[0]) != digest
    Path("config.json").unlink()
    assert digest_of(from_tree(to_tree(config)).variants[0]) == digest


def test_constants_that_a_config_has_are_set_there() -> None:
    granite = LLAMA | {"model_type": "granite", "logits_scaling": 2.0, "residual_multiplier": 0.5}
    words = ["model.fields={output_multiplier:1/logits_scaling,block_multiplier:residual_multiplier}"]
    run = runs(granite, *words, "sweep.depth_ratios=[1,2]")[2.0, 2.0]
    forward = tensor_rules.multipliers(run.resolved, run.size)
    assert (forward.output, forward.block) == (0.5, 0.5)
    network = run.resolved.model.network(run.size, forward)
    assert network.config.logits_scaling == 4.0  # type: ignore[attr-defined, union-attr]
    assert network.config.residual_multiplier == 0.25  # type: ignore[attr-defined, union-attr]
    assert all(tensor.fold is None for tensor in run.resolved.model.tensors(run.size))


@pytest.mark.parametrize(
    ("config", "words", "message"),
    [
        ({"hidden_size": 32}, [], "model.config has no model_type"),
        ({"model_type": "llama"}, [], "model.config has none of hidden_size, n_embd"),
        ({**LLAMA, "model_type": "no_such_model"}, [], "no_such_model"),
        ({**LLAMA, "hidden_size": "wide"}, [], r"hidden_size=wide: expected a field of model\.config that holds"),
        (LLAMA, ["model.width=24"], "heads, which cannot share keys in groups of 2"),
        (LLAMA, ["model.scaled={nothing:width}"], r"model\.scaled\.nothing=None: expected a field of model\.config"),
        (LLAMA, ["model.scaled={hidden_size:size}"], "valid: depth, heads, width"),
        (LLAMA, ["model.fields={length:hidden_size}"], r"model\.fields\.length: no part of a shape"),
        ({**GPT2, "resid_pdrop": 0.1}, [], "set dropout to 0, such as transformer"),
        (
            {**LLAMA, "tie_word_embeddings": True},
            [],
            r"untie the head where it is tied \('model\.settings=\{tie_word_embeddings:false\}'\)",
        ),
    ],
    ids=lambda value: "",
)
def test_a_config_that_cannot_be_used_is_refused_in_one_line(
    config: dict[str, Any], words: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        runs(config, *words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_a_file_that_is_no_config_is_refused(content: str) -> None:
    Path("config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"model\.config=config\.json .*: name a config\.json"):
        load(WORDS)
    with pytest.raises(ConfigError, match=r"model\.config=nowhere\.json cannot be read"):
        load([*WORDS, "model.config=nowhere.json"])
