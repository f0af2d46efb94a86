"""Hyperparameters beside the LR: how their values become variants, with which names, and which keys are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mupsweep.analysis.labels import HyperparameterOverride, label_of
from mupsweep.errors import ConfigError
from mupsweep.sweep import plan, run_spec, tensor_rules
from mupsweep.sweep.config import from_tree, load, to_tree

SMOKE = ["experiment=smoke"]
HYBRID = ["optimizer.roles=[hidden,output,input_vector,hidden_vector]", "optimizer.rest=adamw"]
AXES = "sweep.axes={optimizer.lr_ratio:[0.5,1,4],model.init_std:[0.08]}"


def test_values_form_a_star_around_the_default() -> None:
    sweep_config = load([*SMOKE, *HYBRID, AXES, "parametrization=sp,mup"])
    default = sweep_config.variants[0].model["init_std"]
    assert [v.label for v in sweep_config.variants] == [
        ("nanogpt", "adamw", name, *change)
        for name in ("sp", "mup")
        for change in ((), ("optimizer.lr_ratio=0.5",), ("optimizer.lr_ratio=4",), ("model.init_std=0.08",))
    ]
    assert [v.optimizer["lr_ratio"] for v in sweep_config.variants[:4]] == [1.0, 0.5, 4.0, 1.0]
    assert [v.model["init_std"] for v in sweep_config.variants[:4]] == [default, default, default, 0.08]
    assert sweep_config.variants[1].change == HyperparameterOverride("optimizer.lr_ratio", 0.5, 1.0)


def test_a_list_entry_a_nested_key_and_a_null_are_keys_too() -> None:
    muon = ["optimizer=muon", "sweep.axes={optimizer.rest.betas.1:[0.99],model.head_init_std:[0.1]}"]
    _, beta, head = load([*SMOKE, *muon]).variants
    assert beta.optimizer["rest"]["betas"] == [0.9, 0.99]
    assert beta.change == HyperparameterOverride("optimizer.rest.betas.1", 0.99, 0.95)
    assert head.model["head_init_std"] == 0.1
    assert head.change == HyperparameterOverride("model.head_init_std", 0.1, None)
    assert run_spec.resolve(beta).optimizers[1].optimizer.betas == (0.9, 0.99)  # type: ignore[attr-defined]


def test_a_key_of_one_optimizer_is_varied_in_that_one() -> None:
    sweep_config = load([*SMOKE, "optimizer=muon,sgd", "sweep.axes={optimizer.ns_steps:[3]}"])
    assert [v.label[1:] for v in sweep_config.variants] == [
        ("muon", "spectral"),
        ("muon", "spectral", "optimizer.ns_steps=3"),
        ("sgd", "spectral"),
    ]
    assert type(sweep_config.variants[1].optimizer["ns_steps"]) is int


def test_a_config_survives_its_file() -> None:
    sweep_config = load([*SMOKE, AXES])
    assert from_tree(to_tree(sweep_config)) == sweep_config


def test_axes_of_the_command_line_replace_those_of_an_experiment(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\nsweep:\n  axes: {model.init_std: [0.5]}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    assert [v.label[3:] for v in load(["experiment=mine"], str(tmp_path)).variants] == [(), ("model.init_std=0.5",)]
    sweep_config = load(["experiment=mine", "sweep.axes={training.warmup:[0.2]}"], str(tmp_path))
    assert [v.label[3:] for v in sweep_config.variants] == [(), ("training.warmup=0.2",)]


def test_the_default_shares_its_runs_and_its_folder_with_a_sweep_without_axes() -> None:
    plain, varied = (load([*SMOKE, *overrides]) for overrides in ([], [AXES]))
    ids, more = ({run.run_id for run in plan.plan(sweep_config)} for sweep_config in (plain, varied))
    assert ids < more
    assert len(more) == 4 * len(ids)  # 0.5, 4 and 0.08 beside the default
    assert plan.sweep_name(plain) == plan.sweep_name(varied)


def test_a_value_shares_its_runs_with_a_sweep_whose_default_it_is() -> None:
    varied = plan.plan(load([*SMOKE, "sweep.axes={model.init_std:[0.08]}"]))
    mine = {run.run_id for run in varied if run.resolved.variant.change is not None}
    assert mine == {run.run_id for run in plan.plan(load([*SMOKE, "model.init_std=0.08"]))}


def test_a_line_of_the_plan_says_what_was_changed() -> None:
    rows = [run.row() for run in plan.plan(load([*SMOKE, "sweep.axes={model.init_std:[0.08]}"]))]
    changed = [row for row in rows if "hyperparameter" in row]
    assert len(changed) == len(rows) / 2
    assert {(row["hyperparameter"], row["value"]) for row in changed} == {("model.init_std", 0.08)}
    assert {label_of(row)[3:] for row in rows} == {(), ("model.init_std=0.08",)}
    assert HyperparameterOverride.of({**changed[0], "value": "0.08", "default": ""}) == HyperparameterOverride(
        "model.init_std", 0.08, None
    )  # of a csv


def test_more_values_extend_a_sweep(tmp_path: Path) -> None:
    overrides = [*SMOKE, f"out={tmp_path}", "sweep.name=one"]
    sweep, first = plan.save(load(overrides), "")
    for axes, times in (("{model.init_std:[0.08]}", 2), ("{model.init_std:[0.16],training.clip:[2]}", 4)):
        sweep, runs = plan.save(load([*overrides, f"sweep.axes={axes}"]), "")
        assert len(runs) == times * len(first)
    assert {run.resolved.variant.label[3:] for run in plan.load(sweep)} == {
        (),
        ("model.init_std=0.08",),
        ("model.init_std=0.16",),
        ("training.clip=2",),
    }


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (
            "{optimizer.lr_ratoi:[1,2]}",
            r"optimizer\.lr_ratoi is no key with a number; did you mean 'optimizer\.lr_ratio'",
        ),
        ("{optimizer.name:[1]}", "optimizer.name is no key with a number"),
        ("{model.tied:[1]}", "model.tied is no key with a number"),
        ("{data.max_tokens:[1]}", "data.max_tokens is no key with a number; valid: model, optimizer"),
        ("{optimizer.lr_ratio:[]}", "expected a list of different numbers"),
        ("{optimizer.lr_ratio:[2,2]}", "expected a list of different numbers"),
        ("{optimizer.lr_ratio:[a]}", "expected a list of different numbers"),
        ("{optimizer.lr_ratio:[nan]}", "expected a list of different numbers"),
        ("{optimizer.lr_ratio:2}", "expected a list of different numbers"),
        ("{optimizer.lr_ratio:[-2]}", "optimizer.lr_ratio=-2"),
        ("{optimizer.betas.1:[1.5]}", r"optimizer.betas=\[0.9, 1.5\]"),
        ("[1]", r"sweep.axes=\[1\]: expected {optimizer.lr_ratio:\[1,2\]}"),
        ("{model.width:[64]}", "model.width is no hyperparameter to tune; sweep.width_ratios varies it"),
        ("{training.eval_batches:[2]}", "training.eval_batches is no hyperparameter to tune$"),
    ],
)
def test_what_is_no_axis_is_refused(axes: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load([*SMOKE, f"sweep.axes={axes}"])


def test_several_values_of_a_key_are_told_to_be_an_axis() -> None:
    with pytest.raises(ConfigError, match=r"sweep\.axes={optimizer\.lr_ratio:\[a,b\]}"):
        load([*SMOKE, "optimizer.lr_ratio=1,2"])


def test_a_budget_is_one_of_a_search() -> None:
    with pytest.raises(ConfigError, match=r"sweep\.search=adaptive"):
        load([*SMOKE, "sweep.max_flops=1e12"])
    assert load([*SMOKE, "sweep.max_flops=1e12", "sweep.search=adaptive"]).sweep.max_flops == 1e12
    with pytest.raises(ConfigError, match=r"sweep\.max_flops=0"):
        load([*SMOKE, "sweep.max_flops=0", "sweep.search=adaptive"])


def test_an_attention_multiplier_scales_the_attention_logits_and_at_one_changes_no_run() -> None:
    default, doubled = load([*SMOKE, "sweep.axes={model.attention_multiplier:[2]}"]).variants
    plain, twice = run_spec.resolve(default), run_spec.resolve(doubled)
    size = plain.size(2.0, 1.0)
    assert tensor_rules.multipliers(twice, size).attention == 2 * tensor_rules.multipliers(plain, size).attention
    before = dict(default.model)
    del before["attention_multiplier"]  # as sweeps hold it that are older than the key
    assert run_spec.resolve(replace(default, model=before)).digest == plain.digest != twice.digest
