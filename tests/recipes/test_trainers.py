"""Settings for other trainers: what they can express equals the rule, and every part that they cannot is named."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import stand_ins
import torch
import transformers
from exported import by_parameter, content, exported, run

from mupsweep import recipes
from mupsweep.data import prepare
from mupsweep.errors import ConfigError
from mupsweep.recipes.formats import olmo, torchtitan
from mupsweep.recipes.tensors import folded
from mupsweep.store.run_dir import RunDir
from mupsweep.sweep import tensor_rules
from mupsweep.training import build
from mupsweep.training.trainer import lr_factor, train

TOLERANCE = {"numbers": 1e-9, "logits": 1e-5, "losses": 1e-4}  # relative; of the largest, fp32; nats
CPU = torch.device("cpu")
PARTS = ("lr ", "weight decay ", "eps ", "init std ", "multiplier ")  # how a limit begins that names a wrong number


class Uninterrupted:
    """The control of a run that nothing stops."""

    def stop_requested(self) -> bool:
        return False

    def lease_lost(self) -> bool:
        return False


def numbers_off(limits: tuple[str, ...]) -> list[str]:
    return [limit for limit in limits if limit.startswith(PARTS)]


def test_the_formats_are_found_by_their_files() -> None:
    assert recipes.names() == ["huggingface", "json", "megatron", "nanogpt", "olmo", "pytorch", "torchtitan"]
    with pytest.raises(ConfigError, match="--format nanogtp: did you mean 'nanogpt'"):
        recipes.export("nanogtp", {})


def test_a_model_without_norms_has_only_a_format_for_any_model() -> None:
    settings = content(run("model.bias=true", "model.norms=false"))
    with pytest.raises(ConfigError, match=r"^--format megatron .*model\.norms=false: use --format pytorch$"):
        recipes.export("megatron", settings)
    assert "_norm" not in recipes.export("pytorch", settings).text


@pytest.mark.parametrize("name", recipes.names())
def test_the_version_and_every_limit_stand_at_the_top_of_the_file_too(name: str) -> None:
    if name == recipes.JSON:
        return
    export = recipes.export(name, content(run("model=llama" if name in ("torchtitan", "olmo") else "model.bias=true")))
    for limit in export.limits:
        assert f"# NOT HERE: {limit}\n" in export.text
    made_for = importlib.import_module(f"mupsweep.recipes.formats.{name}").MADE_FOR
    assert f"# made for {made_for}" in export.text.splitlines()[:3]


# --- nanoGPT ---

# EleutherAI/nanoGPT-mup, branch completep at commit 6f8bc3b: the fields of GPTConfig, and the settings of train.py
KNOWN = """n_layer n_head n_embd block_size bias dropout init_std mup_enabled mup_width_multiplier mup_input_alpha
mup_output_alpha mup_disable_attention_scaling depth_alpha_enabled depth_multiplier depth_alpha_exp batch_size
gradient_accumulation_steps max_iters lr_decay_iters warmup_iters decay_lr grad_clip learning_rate min_lr weight_decay
beta1 beta2 adam_eps"""


@pytest.mark.parametrize("parametrization", ["mup", "spectral", "depth_mup", "sp"])
def test_nanogpt_expresses_these_rules_of_adamw_whole(parametrization: str) -> None:
    spec = run(f"parametrization={parametrization}", "optimizer.weight_decay=0.1", "model.tied=true")
    export, settings = exported("nanogpt", spec)
    assert {limit.split()[0] for limit in numbers_off(export.limits)} <= {"eps"}
    assert not any("tie" in limit for limit in export.limits)
    keys = {key for key in settings if not key.startswith("__")}
    assert keys == set(KNOWN.split())
    assert settings["learning_rate"] == pytest.approx(spec.base_lr, rel=TOLERANCE["numbers"])
    assert settings["min_lr"] == pytest.approx(0.1 * spec.base_lr, rel=TOLERANCE["numbers"])
    scaled = parametrization != "sp"
    assert settings["mup_width_multiplier"] == (4.0 if scaled else 1.0)
    depth = {"spectral": (2.0, 1.0), "depth_mup": (2.0, 0.5)}.get(parametrization, (1.0, 1.0))
    assert (settings["depth_multiplier"], settings["depth_alpha_exp"]) == pytest.approx(depth, rel=TOLERANCE["numbers"])


@pytest.mark.parametrize("name", ["nanogpt", "olmo", "torchtitan"])
def test_a_model_without_names_in_a_format_is_refused(name: str) -> None:
    recipe = content(run())
    recipe["architecture"]["kind"] = "mine.Experts"
    with pytest.raises(ConfigError, match=r"builds no nanogpt model \(Experts\), only .*: use --format .*pytorch"):
        recipes.export(name, recipe)


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
    assert any("the warm-up: it starts with an LR of 0" in line for line in muon.limits)
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


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The configs of torchtitan and OLMo-core, in the place of the packages."""
    for name, module in stand_ins.importable().items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("trainers")
@pytest.mark.parametrize("optimizer", ["adamw", "muon_bernstein"])
def test_torchtitan_gets_every_tensor_of_its_llama(optimizer: str) -> None:
    spec = run("model=llama", f"optimizer={optimizer}", "optimizer.weight_decay=0.1")
    export, space = exported("torchtitan", spec)
    rows = {torchtitan.rename(row["name"]): row for row in content(spec)["tensors"]}
    assert rows.keys() == set(stand_ins.llama3_names(4))
    for wrapped in (False, True):
        found = stand_ins.torchtitan_groups(stand_ins.llama3_names(4, wrapped), space["PARAM_GROUPS"])
        assert len(found) == len(rows)
        for name, group in found.items():
            row = rows[name.replace("_checkpoint_wrapped_module.", "")]
            assert group.optimizer_name == ("AdamW" if row["optimizer"] == "adamw" else "DistMuon")
            for key in ("lr", "weight_decay"):
                assert group.optimizer_kwargs[key] == pytest.approx(row[key], rel=TOLERANCE["numbers"]), name
    muon = [group for group in space["PARAM_GROUPS"] if group.optimizer_name == "DistMuon"]
    if optimizer == "adamw":
        assert export.limits == ()
        assert muon == []
    else:  # one group, without the kernels that it lacks; and every matrix has an owner
        (group,) = muon
        assert group.optimizer_kwargs["adjust_lr_fn"] == "spectral_unclamped"
        assert not group.optimizer_kwargs["fused"]
        keywords = space["OPTIMIZER"].optimizer_factory_kwargs_by_name["DistMuon"]
        matrices = {name for name, row in rows.items() if row["optimizer"] == "muon_bernstein"}
        assert keywords["compute_sharding_by_fqn"].keys() == matrices
        assert sorted(name for bucket in keywords["bucket_configs"] for name in bucket.patterns) == sorted(matrices)
        assert {limit.split(" of ")[0].split()[0] for limit in export.limits} == {"eps"}
    model = space["model"](stand_ins.config("RoPE", "dim theta scaling")(), stand_ins.config("Flex", "")())
    assert (space["BLOCK_MULTIPLIER"], space["OUTPUT_MULTIPLIER"], len(model.layers)) == (0.5, 0.25, 4)
    draw = model.layers[3].attention.wo.param_init["weight"]
    assert draw.keywords["std"] == rows["layers.3.attention.wo.weight"]["init_std"]


def test_torchtitan_refuses_what_it_would_raise_at() -> None:
    with pytest.raises(ConfigError, match="torchtitan builds no nanogpt model"):
        recipes.export("torchtitan", content(run()))
    for words, why in [
        (("optimizer=lion",), "lion: torchtitan's optimizers are Adam, AdamW and DistMuon; sweep with adamw, muon_"),
        (
            ("optimizer=muon",),
            r"DistMuon takes one LR and weight decay .* \(LRs 0.009021, 0.01562, 0.01632\); sweep with ",
        ),
        (("model.projections=fused",), "sweep with model.projections=split"),
    ]:
        with pytest.raises(ConfigError, match=why):
            recipes.export("torchtitan", content(run("model=llama", *words)))


# --- OLMo-core ---


@pytest.mark.usefixtures("trainers")
def test_olmo_gets_every_tensor_its_branches_and_a_head_that_took_up_the_logits_multiplier() -> None:
    spec = run("model=llama", "optimizer.weight_decay=0.1")
    export, space = exported("olmo", spec)
    rows = {olmo.rename(row["name"]): row for row in folded(content(spec), ("output",))[0]["tensors"]}
    names = stand_ins.olmo_names(4)
    found = stand_ins.olmo_groups(names, space["OPTIM"].group_overrides)
    assert found.keys() == rows.keys() == set(names)
    for name, override in found.items():
        expected = {key: rows[name][key] for key in ("lr", "weight_decay", "eps")}
        assert override.opts == pytest.approx(expected, rel=TOLERANCE["numbers"]), name
    assert rows["lm_head.w_out.weight"]["lr"] == pytest.approx(spec.base_lr / 4, rel=TOLERANCE["numbers"])
    assert space["MODEL"].block.attention_residual_alpha == space["MODEL"].block.feed_forward_residual_alpha == 0.5
    assert [limit.split(" (")[0] for limit in export.limits] == ["clipping as it was swept"]
    assert "put the multipliers (0.25 on the logits) into the model" in export.limits[0]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("optimizer=muon",), "the sweep trains with muon and adamw, and of OLMo-core's optimizers only AdamW"),
        (("model.projections=fused",), "sweep with model.projections=split"),
        (("model.rope_theta=10000.5",), "rotary base is a whole number, unlike model.rope_theta=10000.5"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_olmo_refuses_what_its_config_cannot_hold(overrides: tuple[str, ...], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        recipes.export("olmo", content(run("model=llama", *overrides)))


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
def test_the_exported_schedule_is_ours(schedule: str) -> None:
    spec = run("model=llama", f"training.schedule={schedule}", "training.steps=40")
    _, space = exported("huggingface", spec)
    member = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = space["schedule"](member)
    for step in range(40):
        assert scheduler.get_last_lr() == pytest.approx([lr_factor(step, 40, spec.resolved.training)], rel=1e-12)
        member.step()
        scheduler.step()


def test_ten_steps_of_the_trainer_have_our_losses(tmp_path: Path) -> None:
    """Equal starts and batches; muP with its multipliers, weight decay, warm-up, decay and clipping."""
    spec = run(
        "model=llama", "optimizer.weight_decay=0.1", "training.steps=10", "training.clip=0.5", "training.eval_batches=1"
    )
    data = prepare(spec.resolved.variant.data)
    batches = [data.train_batch(32, 4, spec.seed, step) for step in range(10)]
    setup = build.build(spec, CPU)
    _, space = exported("huggingface", spec)
    theirs = space["make_model"]()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(setup.network.get_parameter(space["rename"](name)))
    found: list[float] = []

    class Recorded(transformers.Trainer):
        def training_step(self, *args: Any, **keywords: Any) -> torch.Tensor:
            loss = super().training_step(*args, **keywords)
            found.append(float(loss))
            return loss

    rows: Any = [{"input_ids": row, "labels": row} for batch in batches for row in torch.as_tensor(batch).long()]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        **space["TRAINING_ARGUMENTS"],
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        train_sampling_strategy="sequential",
    )
    (optimizer,) = space["optimizers"](theirs, space["rename"])
    Recorded(theirs, arguments, train_dataset=rows, optimizers=(optimizer, space["schedule"](optimizer))).train()

    train(spec, setup, data, RunDir(tmp_path), CPU, Uninterrupted())
    ours = [json.loads(line)["train_loss"] for line in RunDir(tmp_path).metrics_path.read_text().splitlines()]
    assert len(ours) == len(found) == 10
    assert found[0] - found[-1] > 0.3  # it learns
    assert found == pytest.approx(ours, abs=TOLERANCE["losses"])
