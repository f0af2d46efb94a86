"""Exports given to the trainers that they are for, wherever those can be imported.

None is a dependency of ours. In an environment beside a checkout of ours, `pip install --no-deps torchtitan` and what
its import then names, or the trainer's own checkout on PYTHONPATH:
`PYTHONPATH=$PWD:../torchtitan python -m pytest tests/recipes/test_real_trainers.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import shlex
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import content, exported, run
from torch.nn.functional import scaled_dot_product_attention

from mupsweep import recipes
from mupsweep.recipes.formats import olmo
from mupsweep.recipes.formats import torchtitan as titan
from mupsweep.recipes.tensors import folded
from mupsweep.store.run_dir import RunDir
from mupsweep.sweep import config
from mupsweep.trainers.command import fill, placeholders, split
from mupsweep.training import build
from mupsweep.training.trainer import lr_factor

TOLERANCE = {"numbers": 1e-9, "logits": 1e-5, "std": 5.0}  # relative; of the largest, fp32; standard errors
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to mend
IDS = torch.randint(256, (1, 32), generator=torch.Generator().manual_seed(0))


def interleaved(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of queries or keys in the order of rotary positions that turn neighbours; ours turn i with i + d / 2."""
    heads = rows.view(-1, 2, head_dim // 2, rows.shape[-1])
    return heads.transpose(1, 2).reshape(rows.shape)


def check_start(name: str, parameter: torch.Tensor, row: Any) -> None:
    """Hold a tensor that a trainer has drawn against the start that the recipe gives it."""
    expected = row["init_std"] if row["init"] == "normal" else 0.0
    error = expected / (2 * parameter.numel()) ** 0.5
    assert float(parameter.std(correction=0)) == pytest.approx(expected, abs=TOLERANCE["std"] * error), name


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer.weight_decay=0.1", "model.kv_heads=1", "model.qk_norm=gains"),
        ("optimizer=muon_bernstein", "model.tied=true", "model.heads=2", "model.attention_scale=mup"),
        ("parametrization=mup", "model.qk_norm=plain", "model.norm_gains=false", "training.schedule=wsd"),
    ],
)
def test_torchtitan_builds_our_llama_with_every_number(overrides: tuple[str, ...]) -> None:
    optimizers_container = pytest.importorskip("torchtitan.components.optimizer").OptimizersContainer
    full_ac = pytest.importorskip("torchtitan.distributed.activation_checkpoint").FullAC
    llama3_debugmodel = pytest.importorskip("torchtitan.models.llama3.config_registry").llama3_debugmodel
    base: Any = pytest.importorskip("torchtitan.protocols.module").Module

    class Causal(base):
        """Causal attention without a batch: its kernels want a GPU, or compile for minutes."""

        @dataclass(kw_only=True, slots=True)
        class Config(base.Config):
            pass

        def __init__(self, config: Any) -> None:
            super().__init__()

        def forward(self, q: Any, k: Any, v: Any, *, scale: float, enable_gqa: bool, **_: Any) -> Any:
            q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
            mixed = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa)
            return mixed.transpose(-3, -2)

    spec = run("model=llama", *overrides)
    _, space = exported("torchtitan", spec)
    config = space["configure"](llama3_debugmodel())
    rope = config.model_spec.model.layers[0].attention.rope
    theirs = space["model"](rope, Causal.Config()).build()
    theirs.init_states()
    recipe = content(spec)
    rows = {titan.rename(row["name"]): row for row in recipe["tensors"] if row["tied_to"] is None}
    parameters = dict(theirs.named_parameters())
    assert parameters.keys() == rows.keys()
    ours = build.build(spec, CPU).network
    with torch.no_grad():
        for name, p in parameters.items():
            check_start(name, p, rows[name])
            weight = ours.get_parameter(rows[name]["name"])
            p.copy_(
                interleaved(weight, recipe["target"]["head_dim"])
                if name.endswith(("wq.weight", "wk.weight"))
                else weight
            )
        logits = theirs(IDS[0], torch.arange(32)) if hasattr(rope, "max_context_length") else theirs(IDS)[0]
        expected = ours(IDS)[0]
    assert (logits - expected).abs().max() <= TOLERANCE["logits"] * expected.abs().max()

    full_ac.Config().build().apply(theirs)
    groups, _ = optimizers_container._build_param_groups(theirs, space["PARAM_GROUPS"], {"fused": True})
    found = {name: group for members in groups.values() for group in members for name in group["param_names"]}
    assert found.keys() == rows.keys()
    for name, group in found.items():
        row = rows[name]
        assert group["lr"] == pytest.approx(row["lr"], rel=TOLERANCE["numbers"]), name
        assert group["weight_decay"] == pytest.approx(row["weight_decay"], rel=TOLERANCE["numbers"]), name
        assert row["optimizer"] != "adamw" or group["eps"] == row["eps"], name
    if "DistMuon" in groups:
        sharding = space["OPTIMIZER"].optimizer_factory_kwargs_by_name["DistMuon"]["compute_sharding_by_fqn"]
        assert sharding.keys() == {name for name, row in rows.items() if row["optimizer"] == "muon_bernstein"}
        factory = optimizers_container._resolve_optimizer_factory("DistMuon")
        keywords = space["OPTIMIZER"].optimizer_factory_kwargs_by_name["DistMuon"]
        with pytest.raises(TypeError, match="DistMuon requires DTensor parameters"):  # the groups were taken
            factory(groups["DistMuon"], **keywords)
        return
    optimizers = optimizers_container(replace(space["OPTIMIZER"], implementation="for-loop"), model_parts=[theirs])
    schedulers = config.lr_scheduler.build(optimizers=optimizers, training_steps=config.training.steps)
    for step in range(30):
        factor = schedulers.schedulers[0].get_last_lr()[0] / optimizers.optimizers[0].param_groups[0]["initial_lr"]
        assert factor == pytest.approx(lr_factor(step, 30, spec.resolved.training), rel=TOLERANCE["numbers"])
        optimizers.step()
        schedulers.step()


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer.weight_decay=0.1", "model.kv_heads=1", "model.qk_norm=gains", "training.clip=null"),
        ("parametrization=mup", "model.qk_norm=plain", "model.norm_gains=false", "training.schedule=wsd"),
        ("parametrization=sp", "model.tied=true", "training.schedule=constant", "training.warmup=0"),
    ],
)
def test_olmo_core_builds_our_llama_with_every_number(overrides: tuple[str, ...]) -> None:
    pytest.importorskip("olmo_core")
    spec = run("model=llama", *overrides)
    recipe = folded(content(spec), ("output",))[0]
    _, space = exported("olmo", spec)
    theirs = space["MODEL"].build()
    theirs.init_weights(max_seq_len=32)
    space["initialise"](theirs)
    rows = {olmo.rename(row["name"]): row for row in recipe["tensors"] if row["tied_to"] is None}
    parameters = dict(theirs.named_parameters())
    assert parameters.keys() == rows.keys()
    ours = build.build(spec, CPU).network
    with torch.no_grad():
        for name, p in parameters.items():
            row = rows[name]
            check_start(name, p, row)
            folded_in = recipe["output_multiplier"] != content(spec)["output_multiplier"] and row["role"] == "output"
            p.copy_(ours.get_parameter(row["name"]) * (content(spec)["output_multiplier"] if folded_in else 1.0))
        expected = ours(IDS)
        assert (theirs(IDS) - expected).abs().max() <= TOLERANCE["logits"] * expected.abs().max()
    optimizer = space["OPTIM"].build(theirs)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, p in parameters.items():
        for key in ("lr", "weight_decay", "eps"):
            assert groups[id(p)][key] == pytest.approx(rows[name][key], rel=TOLERANCE["numbers"]), (name, key)
    for step in range(30):
        factor = space["SCHEDULER"].get_lr(1.0, step + 1, 30)
        assert factor == pytest.approx(lr_factor(step, 30, spec.resolved.training), rel=TOLERANCE["numbers"])


@pytest.mark.parametrize("parametrization", ["mup", "spectral", "depth_mup", "sp"])
def test_nanogpt_mup_gives_every_tensor_the_numbers_of_the_config(parametrization: str, tmp_path: Path) -> None:
    """The checkout's model.py and train.py: types of the settings, init, multipliers and parameter groups."""
    theirs = pytest.importorskip("model", reason="the folder of nanoGPT-mup, branch completep, is not on PYTHONPATH")
    spec = run(f"parametrization={parametrization}", "optimizer.weight_decay=0.1", "model.tied=true")
    export, space = exported("nanogpt", spec)
    settings = {key: value for key, value in space.items() if not key.startswith("__")}
    head, _, _ = Path(theirs.__file__).with_name("train.py").read_text().partition("config_keys = ")
    defaults: dict[str, Any] = {}
    exec(head[head.index("out_dir = ") :], {"torch": torch}, defaults)
    assert {key: type(value) for key, value in settings.items()} == {key: type(defaults[key]) for key in settings}
    fields = {field.name for field in dataclasses.fields(theirs.GPTConfig)}
    network = theirs.GPT(theirs.GPTConfig(vocab_size=256, **{k: v for k, v in settings.items() if k in fields}))
    for block in network.transformer.h:  # as a limit says
        block.mlp.gelu = torch.nn.GELU(approximate="tanh")
    keys = ("weight_decay", "learning_rate")
    optimizer = network.configure_optimizers(*(settings[key] for key in keys), (0.9, 0.95), settings["adam_eps"], "cpu")
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    recipe = content(spec)
    rows = {row["name"]: row for row in recipe["tensors"]}
    ours = build.build(spec, CPU).network
    stored = {name: p.detach() for name, p in ours.named_parameters()}
    with torch.no_grad():
        for name, p in network.named_parameters():
            ours_name = nanogpt_name(name)
            joined = ours_name.endswith("attention.query.weight")
            names = [ours_name.replace("query", part) for part in ("query", "key", "value")] if joined else [ours_name]
            row = rows[ours_name]
            group = groups[id(p)]
            assert group["lr_scale"] * settings["learning_rate"] == pytest.approx(
                row["lr"], rel=TOLERANCE["numbers"]
            ), name
            assert group["weight_decay"] == pytest.approx(row["weight_decay"], rel=TOLERANCE["numbers"]), name
            off = any(limit.startswith(f"eps {row['eps']:.4g} of") for limit in export.limits)
            assert off or group["eps"] == pytest.approx(row["eps"], rel=TOLERANCE["numbers"]), name
            expected = row["init_std"] if row["init"] == "normal" else 0.0
            error = expected / (2 * p.numel()) ** 0.5
            assert float(p.std(correction=0)) == pytest.approx(expected, abs=TOLERANCE["std"] * error), name
            p.copy_(torch.cat([stored[part] for part in names]))
        logits, _ = network(IDS, IDS)  # without targets it takes the last position alone, and without the multiplier
        expected = ours(IDS)
    assert (logits - expected).abs().max() <= TOLERANCE["logits"] * expected.abs().max()


def nanogpt_name(name: str) -> str:
    """Our name of a parameter of nanoGPT's."""
    for theirs, our in {
        "transformer.wte": "token_embedding",
        "transformer.wpe": "position_embedding",
        "transformer.h": "blocks",
        "transformer.ln_f": "norm",
        "ln_1": "attention_norm",
        "ln_2": "mlp_norm",
        "attn.c_attn": "attention.query",
        "attn.c_proj": "attention.output",
        "mlp.c_fc": "mlp.up",
        "mlp.c_proj": "mlp.down",
    }.items():
        name = name.replace(theirs, our)
    return name


MEGATRON = {
    "embedding.word_embeddings": "token_embedding",
    "embedding.position_embeddings": "position_embedding",
    "decoder.layers": "blocks",
    "decoder.final_layernorm": "norm",
    "output_layer": "head",
    "input_layernorm": "attention_norm",
    "pre_mlp_layernorm": "mlp_norm",
    "self_attention.linear_qkv": "attention.query",
    "self_attention.linear_proj": "attention.output",
    "mlp.linear_fc1": "mlp.up",
    "mlp.linear_fc2": "mlp.down",
    "self_attention.q_layernorm": "attention.query_norm",
    "self_attention.k_layernorm": "attention.key_norm",
}
# What its command line wants beside a recipe, and what it takes without a GPU.
BESIDE = """--micro-batch-size 1 --tokenizer-type NullTokenizer --vocab-size 255 --transformer-impl local
--use-cpu-initialization --attention-backend unfused --no-persist-layer-norm --no-gradient-accumulation-fusion
--no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion"""


@pytest.mark.parametrize(
    "overrides",
    [
        ("parametrization=mup",),
        ("parametrization=sp", "model.bias=true", "training.schedule=wsd", "model.tied=true"),
        ("parametrization=mup", "model=llama", "model.kv_heads=1", "model.qk_norm=gains", "training.schedule=linear"),
    ],
)
def test_megatron_parses_its_arguments_and_gives_every_tensor_what_limits_do_not_name(
    overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its parser and checks of arguments, its model on the CPU, and the groups of its optimizer."""
    arguments = pytest.importorskip("megatron.training.arguments", exc_type=ImportError)
    names = "core.parallel_state core.models.gpt core.models.gpt.gpt_layer_specs core.optimizer training.training"
    parallel_state, gpt, layers, optimizers, training = (
        importlib.import_module(f"megatron.{name}") for name in names.split()
    )

    spec = run(*overrides, "optimizer.weight_decay=0.1", depth_ratio=1)
    recipe, export = content(spec), recipes.export("megatron", content(spec))
    body = export.text[export.text.index("(\n") + 2 : export.text.rindex(")")]
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *shlex.split(body), *shlex.split(BESIDE)])
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(key, value)
    args = arguments.validate_args(arguments.parse_args())
    args.padded_vocab_size = 256
    config = arguments.core_transformer_config_from_args(args)
    config.params_dtype = torch.float32
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    monkeypatch.setattr("megatron.training.global_vars._GLOBAL_ARGS", args)
    network = gpt.GPTModel(
        config,
        layers.get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=config.qk_layernorm),
        vocab_size=256,
        max_sequence_length=32,
        position_embedding_type=args.position_embedding_type,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
    )
    optimizer, groups_of = training.get_megatron_optimizer_config(args)
    if args.use_mup:
        groups_of |= optimizers.get_mup_config_overrides(optimizer, config.mup_width_mult, optimizer.optimizer)
    groups = {id(p): g for g in optimizers._get_param_groups([network], optimizer, groups_of) for p in g["params"]}
    rows = {row["name"]: row for row in recipe["tensors"]}
    seen = set()
    for name, p in network.named_parameters():
        ours = name
        for theirs, our in MEGATRON.items():
            ours = ours.replace(theirs, our)
        if ours not in rows:  # a bias of a norm, which a limit names
            assert ours.endswith("norm.bias"), ours
            assert any("norms without biases" in limit for limit in export.limits)
            continue
        row, group = rows[ours], groups[id(p)]
        seen.add(ours)
        found = {
            "lr": group["max_lr"],
            "weight_decay": args.weight_decay * group["wd_mult"],
            "eps": group.get("eps", args.adam_eps),
        }
        for key, value in found.items():
            short = ours.split(".", 2)[-1] if ours.startswith("blocks.") else ours
            said = [line for line in export.limits if line.startswith(f"{key.replace('_', ' ')} {row[key]:.4g} of ")]
            off = any(short in re.split(r"[ ,:]+", line) and f"would be {value:.4g};" in line for line in said)
            assert off or value == pytest.approx(row[key], rel=TOLERANCE["numbers"]), (name, key)
        std = float(p.std(correction=0)) if row["init"] == "normal" else 0.0
        error = TOLERANCE["std"] * row["init_std"] / (2 * p.numel()) ** 0.5
        if std != pytest.approx(row["init_std"], abs=error):
            assert ours.endswith(("attention.output.weight", "mlp.down.weight"))
            assert any("init std" in line and "mlp.down.weight" in line for line in export.limits)
    fused = {name for name in rows if re.search(r"attention\.(key|value)\.|mlp\.gate\.", name)}
    assert seen | fused == rows.keys() - {row["name"] for row in rows.values() if row["tied_to"]}
    assert config.softmax_scale in (None, pytest.approx(recipe["attention_scale"], rel=TOLERANCE["numbers"]))


# --- the command lines of configs/trainer/README.md ---

GUIDE = Path(config.config_root() / "trainer" / "README.md")


def command_line(trainer: str) -> list[str]:
    """The arguments after the name of the program, or module, of a trainer's command line, filled for a run."""
    text = next(part for part in GUIDE.read_text().split("```text\n")[1:] if trainer in part.partition("```")[0])
    (line,) = [line for line in text.splitlines() if line.startswith("trainer.command=")]
    spec = run("parametrization=mup")
    values = {**placeholders(spec, RunDir(Path("run")), content(spec)), "resume": ""}
    words = [fill(word, values) for word in split(line.partition("=")[2], "command")]
    (start,) = [i for i, word in enumerate(words) if word.endswith((trainer, f"{trainer}.py"))]
    return [word for word in words[start + 1 :] if word not in ("--", "...")]


@pytest.mark.parametrize("trainer", ["train.py", "scripts.base_train", "pretrain_gpt.py", "torchtitan.train"])
def test_command_lines_of_the_guide_have_known_placeholders(trainer: str) -> None:
    assert not any("{" in word for word in command_line(trainer))


def test_torchtitan_parses_the_command_line_of_the_guide(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = pytest.importorskip("torchtitan.config").ConfigManager
    llama3_debugmodel = pytest.importorskip("torchtitan.models.llama3.config_registry").llama3_debugmodel
    words = command_line("torchtitan.train")
    registry: Any = types.ModuleType("my_module")
    _, space = exported("torchtitan", run("model=llama"))
    setattr(registry, words[words.index("--config") + 1], lambda: space["configure"](llama3_debugmodel()))
    monkeypatch.setitem(sys.modules, "my_module", registry)
    parsed = manager().parse_args(words)
    assert (parsed.training.steps, parsed.lr_scheduler.warmup_steps, parsed.debug.seed) == (30, 3, 0)
    assert parsed.metrics.enable_tensorboard
    assert Path(parsed.dump_folder).parts[-2:] == RunDir(Path("run")).output.parts[-2:]
    assert parsed.model_spec.model.dim == 64


def test_megatron_parses_the_command_line_of_the_guide() -> None:
    arguments = pytest.importorskip("megatron.training.arguments", exc_type=ImportError)
    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    parsed = parser.parse_args(command_line("pretrain_gpt.py"))
    assert (parsed.hidden_size, parsed.train_iters, parsed.lr_warmup_iters, parsed.lr) == (64, 30, 3, 2.0**-6)
    assert (parsed.num_layers, parsed.global_batch_size, parsed.seed) == (4, 4, 0)


def test_nanochat_parses_the_command_line_of_the_guide(monkeypatch: pytest.MonkeyPatch) -> None:
    nanochat = pytest.importorskip("nanochat")
    (folder,) = nanochat.__path__
    source = Path(folder).with_name("scripts").joinpath("base_train.py").read_text()
    begin, end = source.index("parser = argparse"), source.index("args = parser.parse_args()")
    space: dict[str, Any] = {"argparse": argparse}
    exec(source[begin:end], space)
    parsed = space["parser"].parse_args(command_line("scripts.base_train"))
    assert (parsed.depth, parsed.num_iterations, parsed.warmup_steps) == (4, 30, 3)
    assert (parsed.matrix_lr, parsed.embedding_lr, parsed.unembedding_lr) == pytest.approx((2.0**-8, 2.0**-6, 2.0**-6))
