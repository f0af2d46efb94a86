"""Settings for other trainers: what they can express equals the rule, and every part that they cannot is named."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from typing import Any

import pytest
import torch
import transformers
from exported import by_parameter, content, exported, run

from mupsweep import recipes
from mupsweep.errors import ConfigError
from mupsweep.recipes.tensors import folded
from mupsweep.sweep import tensor_rules
from mupsweep.training import build
from mupsweep.training.trainer import lr_factor

TOLERANCE = {"numbers": 1e-9, "logits": 1e-5}  # relative; relative to the largest, fp32
CPU = torch.device("cpu")
PARTS = ("lr ", "weight decay ", "eps ", "init std ", "multiplier ")  # how a limit begins that names a wrong number


def numbers_off(limits: tuple[str, ...]) -> list[str]:
    return [limit for limit in limits if limit.startswith(PARTS)]


def test_the_formats_are_found_by_their_files() -> None:
    assert recipes.names() == ["huggingface", "json", "megatron", "nanogpt", "pytorch", "torchtitan"]
    with pytest.raises(ConfigError, match="--format nanogtp: did you mean 'nanogpt'"):
        recipes.export("nanogtp", {})


@pytest.mark.parametrize("name", recipes.names())
def test_every_limit_stands_at_the_top_of_the_file_too(name: str) -> None:
    if name == recipes.JSON:
        return
    export = recipes.export(name, content(run("model=llama" if name == "torchtitan" else "model.bias=true")))
    for limit in export.limits:
        assert f"# NOT HERE: {limit}\n" in export.text


# --- nanoGPT ---

# EleutherAI/nanoGPT-mup, branch completep: the fields of GPTConfig, and the settings of train.py
KNOWN = """n_layer n_head n_embd block_size bias dropout init_std mup_enabled mup_width_multiplier mup_input_alpha
mup_output_alpha mup_disable_attention_scaling depth_alpha_enabled depth_multiplier depth_alpha_exp batch_size
gradient_accumulation_steps max_iters lr_decay_iters warmup_iters decay_lr grad_clip learning_rate min_lr weight_decay
beta1 beta2"""


@pytest.mark.parametrize("parametrization", ["mup", "spectral", "depth_mup", "sp"])
def test_nanogpt_expresses_these_rules_of_adamw_whole(parametrization: str) -> None:
    spec = run(f"parametrization={parametrization}", "optimizer.weight_decay=0.1", "model.tied=true")
    export, settings = exported("nanogpt", spec)
    assert numbers_off(export.limits) == []
    assert not any("tie" in limit for limit in export.limits)
    keys = {key for key in settings if not key.startswith("__")}
    assert keys == set(KNOWN.split())
    assert settings["learning_rate"] == pytest.approx(spec.base_lr, rel=TOLERANCE["numbers"])
    assert settings["min_lr"] == pytest.approx(0.1 * spec.base_lr, rel=TOLERANCE["numbers"])
    scaled = parametrization != "sp"
    assert settings["mup_width_multiplier"] == (4.0 if scaled else 1.0)
    depth = {"spectral": (2.0, 1.0), "depth_mup": (2.0, 0.5)}.get(parametrization, (1.0, 1.0))
    assert (settings["depth_multiplier"], settings["depth_alpha_exp"]) == pytest.approx(depth, rel=TOLERANCE["numbers"])


def test_nanogpt_names_the_numbers_that_it_would_get_wrong() -> None:
    export, _ = exported("nanogpt", run("parametrization=sp_per_layer"))
    assert any(re.match(r"lr 0.003906 of head.weight: it would be 0.01562; scale it", line) for line in export.limits)
    assert any("head: remove the line that ties wte" in line for line in export.limits)
    hybrid, settings = exported("nanogpt", run("optimizer=muon"))
    assert "learning_rate" not in settings
    assert any("nanoGPT trains with AdamW alone, the sweep with muon and adamw" in line for line in hybrid.limits)
    with pytest.raises(ConfigError, match=r"nanoGPT builds no llama model .Llama., only NanoGPT: use --format"):
        recipes.export("nanogpt", content(run("model=llama")))


# --- Megatron-LM ---


def arguments(text: str) -> dict[str, str | None]:
    """--key -> value of a bash array."""
    lines = [line.split() for line in text.splitlines() if line.startswith("    --")]
    return {overrides[0]: overrides[1] if len(overrides) > 1 else None for overrides in lines}


def test_megatron_gets_its_mup_for_width_and_hears_of_the_rest() -> None:
    export = recipes.export("megatron", content(run("parametrization=mup", depth_ratio=1)))
    passed = arguments(export.text)
    assert passed["--use-mup"] is None
    assert passed["--untie-embeddings-and-output-weights"] is None
    expected = {
        "--mup-base-hidden-size": 16,
        "--hidden-size": 64,
        "--mup-base-head-dim": 8,
        "--mup-attn-scale-power": 1.0,
        "--mup-output-mult": 0.25,
        "--lr": 2.0**-6,
        "--min-lr": 0.1 * 2.0**-6,
        "--decoupled-lr": 2.0**-6,
        "--init-method-std": 0.02,
        "--adam-beta2": 0.95,
        "--clip-grad": 1.0,
        "--train-iters": 30,
        "--lr-warmup-iters": 3,
    }
    for key, value in expected.items():
        assert float(passed[key] or "nan") == pytest.approx(value, rel=TOLERANCE["numbers"]), key
    off = numbers_off(export.limits)
    # hidden std is .02 / sqrt(4) here, and there also / sqrt(2 * 2 layers) into the stream
    assert "init std 0.01 of attention.output.weight, mlp.down.weight: it would be 0.005; give" in off[-1]
    assert {line.split(" of ")[0].rsplit(" ", 1)[0] for line in off} == {"eps", "init std"}


def test_megatron_has_no_rule_for_depth_decay_or_other_optimizers() -> None:
    deep = recipes.export("megatron", content(run("optimizer.weight_decay=0.1"))).limits
    assert any("multiplier 0.5 of" in line and "no rule for depth" in line for line in deep)
    assert any("weight decay 0.1 of token_embedding.weight" in line and "it would be 0.4" in line for line in deep)
    muon = recipes.export("megatron", content(run("optimizer=muon")))
    assert "--lr" not in arguments(muon.text)
    assert any("Megatron's muP rule is Adam's" in line for line in muon.limits)
    inits = recipes.export("megatron", content(run("parametrization=mup", "parametrization.output=init"))).limits
    assert any(line.startswith("multiplier 1 of head.weight: it would be 0.25") for line in inits)
    assert any(line.startswith("init std 0.005 of head.weight: it would be 0.02") for line in inits)
    assert any(line.startswith("lr 0.003906 of head.weight: it would be 0.01562") for line in inits)
    grown = ["model.heads=2", "model.attention_scale=mup"]  # 8 to 32 features per head: sqrt(8) / 32
    strange = recipes.export("megatron", content(run("parametrization=sp", *grown))).limits
    assert any("the attention scale 0.0883883: set softmax_scale" in line for line in strange)
    scaled = arguments(recipes.export("megatron", content(run("parametrization=mup", *grown))).text)
    assert (scaled["--mup-base-head-dim"], scaled["--mup-attn-scale-power"]) == ("8", "1.0")
    plain = recipes.export("megatron", content(run("parametrization=sp")))
    assert "--use-mup" not in arguments(plain.text)
    llama = arguments(recipes.export("megatron", content(run("model=llama", "model.kv_heads=1"))).text)
    assert llama["--num-query-groups"] == "4"
    assert "--swiglu" in llama
    assert llama["--rotary-base"] == "10000"


# --- torchtitan ---


@dataclasses.dataclass(kw_only=True)
class ParamGroupConfig:
    """The fields of torchtitan's."""

    pattern: str
    optimizer_name: str
    optimizer_kwargs: dict[str, Any]


def titan(*overrides: str, monkeypatch: pytest.MonkeyPatch) -> tuple[recipes.Export, dict[str, Any]]:
    """The export, run with the shape of torchtitan's classes in the place of torchtitan."""
    module: Any = types.ModuleType("torchtitan.components.optimizer")
    module.ParamGroupConfig = ParamGroupConfig
    module.OptimizersContainer = types.SimpleNamespace(Config=lambda param_groups: param_groups)
    for name in ("torchtitan", "torchtitan.components"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return exported("torchtitan", run("model=llama", *overrides))


@pytest.mark.parametrize("optimizer", ["adamw", "muon_kimi"])
def test_torchtitan_gets_every_tensor_of_its_llama_with_folded_numbers(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    export, space = titan(f"optimizer={optimizer}", "optimizer.weight_decay=0.1", monkeypatch=monkeypatch)
    spec = run("model=llama", f"optimizer={optimizer}", "optimizer.weight_decay=0.1")
    theirs = {  # names in torchtitan's llama3
        "blocks.1.attention.output.weight": "layers.1.attention.wo.weight",
        "blocks.3.mlp.gate.weight": "layers.3.feed_forward.w1.weight",
        "blocks.0.mlp.down.weight": "layers.0.feed_forward.w2.weight",
        "blocks.0.mlp_norm.weight": "layers.0.ffn_norm.weight",
        "token_embedding.weight": "tok_embeddings.weight",
        "norm.weight": "norm.weight",
        "head.weight": "output.weight",
    }
    rows = {row["name"]: row for row in folded(content(spec))[0]["tensors"]}
    for ours, name in theirs.items():
        (group,) = [g for g in space["PARAM_GROUPS"] if re.search(g.pattern, name)]
        row = rows[ours]
        assert group.optimizer_name == {"adamw": "AdamW"}.get(row["optimizer"], "Muon")
        assert group.optimizer_kwargs["lr"] == pytest.approx(row["lr"], rel=TOLERANCE["numbers"]), name
        assert group.optimizer_kwargs["weight_decay"] == pytest.approx(row["weight_decay"], rel=TOLERANCE["numbers"])
        getattr(torch.optim, group.optimizer_name)([{"params": [torch.zeros(2, 2)], **group.optimizer_kwargs}])
        (start,) = [start for pattern, start in space["INIT"].items() if re.search(pattern, name)]
        assert start == ("ones" if "norm" in name else pytest.approx(row["init_std"], rel=TOLERANCE["numbers"]))
    head = rows["head.weight"]
    assert head["lr"] == pytest.approx(spec.base_lr / 4, rel=1e-9) or optimizer != "adamw"  # 1/4 on the logits
    assert any("init_weights" in line for line in export.limits)
    assert any("clipping as it was swept" in line for line in export.limits)


def test_torchtitan_has_no_gpt2_and_few_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="torchtitan builds no nanogpt model"):
        recipes.export("torchtitan", content(run()))
    export, _ = titan("optimizer=lion", monkeypatch=monkeypatch)
    assert any("lion: torchtitan's container takes AdamW, Muon" in line for line in export.limits)


# --- Hugging Face ---


def test_granite_is_our_llama_with_its_multipliers() -> None:
    spec = run("model=llama", "model.kv_heads=1", "optimizer.weight_decay=0.1")
    export, space = exported("huggingface", spec)
    assert export.limits == ()
    theirs, ours = space["make_model"](), build.build(spec, CPU).network
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(ours.get_parameter(space["rename"](name)))
    ids = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(0))
    expected = ours(ids)
    error = (theirs(ids).logits - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE["logits"]
    (member,) = space["optimizers"](theirs, space["rename"])
    rows = {row.name: row for row in tensor_rules.rules(spec.resolved, spec.size, spec.base_lr)}
    groups = by_parameter([member], "lr", "weight_decay", "eps")
    for name, p in theirs.named_parameters():
        row = rows[space["rename"](name)]
        assert groups[p] == pytest.approx({k: getattr(row, k) for k in groups[p]}, rel=TOLERANCE["numbers"]), name


def test_gpt2_takes_folded_numbers() -> None:
    spec = run("model.bias=true")
    export, space = exported("huggingface", spec)
    theirs = space["make_model"]()
    (member,) = space["optimizers"](theirs, space["rename"])
    groups = by_parameter([member], "lr")
    block = theirs.transformer.h[3]
    found = [groups[p]["lr"] / spec.base_lr for p in (block.attn.c_attn.weight, block.attn.c_proj.weight)]
    assert found == pytest.approx([1 / 4, 1 / 8], rel=TOLERANCE["numbers"])  # 1/r_n, and the branch's 1/2 folded in
    assert groups[theirs.lm_head.weight]["lr"] == pytest.approx(spec.base_lr / 4, rel=TOLERANCE["numbers"])
    assert [limit.split(" (")[0] for limit in export.limits] == ["clipping as it was swept"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), "sweep with model.bias=true, or use --format pytorch"),
        (("model.heads=2",), "sweep with model.bias=true and model.heads=null, which fixes model.head_dim, or use"),
        (("model.bias=true", "model.attention_multiplier=2"), "sweep with model.attention_multiplier=1, or use"),
        (("model.bias=true", "optimizer=muon"), "optimizers of matrices cannot take; use --format pytorch"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_what_gpt2_lacks_is_told_with_what_to_sweep_instead(overrides: tuple[str, ...], expected: str) -> None:
    with pytest.raises(ConfigError, match=rf"transformers' GPT-2 .*{expected}"):
        recipes.export("huggingface", content(run(*overrides)))


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "constant"])
def test_the_trainers_schedule_is_ours(schedule: str) -> None:
    spec = run("model=llama", f"training.schedule={schedule}", "training.steps=40")
    export, space = exported("huggingface", spec)
    found = space["TRAINING_ARGUMENTS"]
    assert found.keys() <= {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    member = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = transformers.get_scheduler(
        found["lr_scheduler_type"], member, found["warmup_steps"], found["max_steps"], found["lr_scheduler_kwargs"]
    )
    factors = []
    for _ in range(found["max_steps"]):
        factors.append(scheduler.get_last_lr()[0])
        member.step()
        scheduler.step()
    after = found["warmup_steps"]  # in warm-up the Trainer is a step behind: its first has LR 0
    if schedule == "linear":
        assert "the floor of the schedule, 0.1 of the peak" in export.limits[0]
        return
    ours = [lr_factor(step, 40, spec.resolved.training) for step in range(40)]
    if schedule == "constant":
        ours = [1.0] * 40
    assert factors[after:] == pytest.approx(ours[after:], rel=TOLERANCE["numbers"])
