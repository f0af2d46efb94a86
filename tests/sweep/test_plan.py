"""The plan: run ids name what a run computes and nothing else, so that no run is ever trained twice."""

from __future__ import annotations

import json
import os
import re
import shutil
from functools import cache
from pathlib import Path

import pytest

from mupsweep.atomic_files import make_folder
from mupsweep.errors import ConfigError, DataError, RecordError
from mupsweep.store import lease, workers
from mupsweep.sweep import plan
from mupsweep.sweep.config import load

SMOKE = ("experiment=smoke",)

# What a user's finished runs are called. A change here makes every sweep on every disk train again: bump the version
# and say so in the changelog.
GOLDEN = {
    ("sweep.log2_lrs=[-9,-7,-5]",): {
        "w16-d2-lr-9.00-s0-060a5409",
        "w16-d2-lr-7.00-s0-db4a6e62",
        "w16-d2-lr-5.00-s0-e22a7b08",
        "w32-d2-lr-9.00-s0-3d5154fe",
        "w32-d2-lr-7.00-s0-0fba6474",
        "w32-d2-lr-5.00-s0-c2383acf",
    },
    (
        "optimizer=muon_kimi",
        "parametrization=mup",
        "sweep.width_ratios=[4]",
        "sweep.log2_lrs=[-6.5]",
        "sweep.seeds=[1]",
    ): {"w64-d2-lr-6.50-s1-33d0a125"},
    (
        "optimizer=sgd",
        "parametrization=sp",
        "data.tokenizer=gpt2-1024",
        "sweep.width_ratios=[1]",
        "sweep.log2_lrs=[-1]",
    ): {"w16-d2-lr-1.00-s0-0957625e"},
}


@cache
def ids(*overrides: str) -> tuple[str, ...]:
    return tuple(run.run_id for run in plan.plan(load([*SMOKE, *overrides])))


@pytest.mark.parametrize("overrides", GOLDEN, ids=lambda o: " ".join(o) or "smoke")
def test_run_ids_stay_what_they_were(overrides: tuple[str, ...]) -> None:
    """The sweeps of these runs had batches of validation; tokens of it, which nobody reads then, change nothing."""
    for read in ("training.eval_tokens=65536", "training.eval_tokens=1"):
        assert set(ids("training.eval_batches=4", read, *overrides)) == GOLDEN[overrides]


def test_a_run_id_is_readable() -> None:
    (one,) = ids("sweep.width_ratios=[32]", "sweep.depth_ratios=[2]", "sweep.log2_lrs=[-7.5]", "sweep.seeds=[3]")
    assert re.fullmatch(r"w512-d4-lr-7\.50-s3-[0-9a-f]{8}", one)
    (positive,) = ids("sweep.width_ratios=[1]", "sweep.log2_lrs=[0.25]")
    assert re.fullmatch(r"w16-d2-lr0\.25-s0-[0-9a-f]{8}", positive)


@pytest.mark.parametrize(
    "override",
    [
        "launcher=inline",
        "launcher.threads=2",
        "tracker=wandb",
        "out=elsewhere",
        "data.cache=elsewhere",
        "sweep.name=other",
        "training.checkpoint_minutes=0",
        "sweep.pair=false",
        "allow_imports=true",
        "sweep.log2_lrs=[-8.0,-6.0,-5.0]",  # the same numbers, written as floats
        "model.width=16",  # a default, said aloud
    ],
)
def test_a_run_id_does_not_depend_on(override: str) -> None:
    assert ids(override) == ids()


@pytest.mark.parametrize(
    "override",
    [
        "model.head_dim=16",
        "model.context=64",
        "model.ffn_ratio=2",
        "model.bias=true",
        "model.init_std=0.03",
        "model.output_multiplier=2",
        "model.attention_scale=mup",
        "model.heads=2",
        "optimizer=sgd",
        "optimizer.betas=[0.9,0.99]",
        "optimizer.eps=1e-8",
        "optimizer.weight_decay=0.1",
        "optimizer.lr_ratio=0.5",
        "parametrization=mup",
        "parametrization.output=init",
        "parametrization.depth_exponent=1/2",
        "parametrization.weight_decay_rule=unscaled",
        "data.tokenizer=gpt2-1024",
        "data.validation_fraction=0.1",
        "data.max_tokens=100000",
        "training.steps=31",
        "training.batch_size=5",
        "training.warmup=0.2",
        "training.schedule=linear",
        "training.min_lr_frac=0",
        "training.decay_fraction=0.3",
        "training.clip=null",
        "training.precision=fp32",
        "training.eval_tokens=5000",
        "training.eval_batches=5",
        "training.evals=2",
        "training.divergence_patience=0.2",
        "training.compile=true",
    ],
)
def test_every_run_id_depends_on(override: str) -> None:
    assert not set(ids(override)) & set(ids())


def test_a_nested_key_of_a_hybrid_optimizer_is_part_of_the_id() -> None:
    assert not set(ids("optimizer=muon", "optimizer.rest.eps=1e-8")) & set(ids("optimizer=muon"))


def test_the_same_text_under_another_path_gives_the_same_ids(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("Some text.\n" * 50)
    same = [ids("data=local", f"data.path={tmp_path / name}") for name in ("a", "b")]
    assert same[0] == same[1]
    ids.cache_clear()
    (tmp_path / "b" / "x.txt").write_text("Other text\n" * 50)
    assert not set(ids("data=local", f"data.path={tmp_path / 'b'}")) & set(same[0])


def test_the_base_shape_is_part_of_the_id_although_the_size_is_the_same() -> None:
    wide = ids("sweep.width_ratios=[2]", "sweep.log2_lrs=[-7]")
    base = ids("model.width=32", "sweep.width_ratios=[1]", "sweep.log2_lrs=[-7]")
    assert wide[0].split("-s0-")[0] == base[0].split("-s0-")[0] == "w32-d2-lr-7.00"
    assert wide != base


@pytest.mark.parametrize(
    "longer",
    [
        "sweep.log2_lrs=[-9,-8,-7,-6,-5]",
        "sweep.width_ratios=[1,2,4]",
        "sweep.seeds=[0,1]",
        "sweep.depth_ratios=[1,2]",
        "parametrization=spectral,sp",
    ],
)
def test_a_longer_grid_keeps_the_ids_it_had(longer: str) -> None:
    before, after = ids(), ids(longer)
    assert set(before) < set(after)
    assert len(after) == len(set(after))


def test_lrs_that_look_the_same_have_ids_of_their_own() -> None:
    made = ids("sweep.width_ratios=[1]", "sweep.log2_lrs=[-7,-7.001]")
    assert len({name[:-8] for name in made}) == 1
    assert len(set(made)) == 2


def test_a_variant_chosen_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="'optimizer=adamw,adamw': each choice once"):
        ids("optimizer=adamw,adamw")


def test_the_most_expensive_runs_come_first() -> None:
    runs = plan.plan(load([*SMOKE, "sweep.width_ratios=[1,4,2]", "sweep.depth_ratios=[1,3]"]))
    flops = [run.cost.flops for run in runs]
    assert flops == sorted(flops, reverse=True)
    assert [(r.size.width, r.size.depth) for r in (runs[0], runs[-1])] == [(64, 6), (16, 2)]


def test_the_order_is_the_same_whatever_the_order_of_the_grid() -> None:
    assert ids("sweep.log2_lrs=[-5,-8,-6]", "sweep.width_ratios=[2,1]") == ids()


def test_ten_thousand_runs_are_planned_saved_and_loaded() -> None:
    seeds = ",".join(map(str, range(1000)))
    config = load([*SMOKE, f"sweep.seeds=[{seeds}]", "sweep.log2_lrs=[-9,-8,-7,-6,-5]"])
    sweep, runs = plan.save(config, "many")
    assert len({run.run_id for run in runs}) == 10_000
    assert plan.load(sweep) == runs


def test_a_saved_plan_is_the_plan_that_is_loaded() -> None:
    config = load([*SMOKE, "optimizer=adamw,muon", "parametrization=sp,mup", "sweep.depth_ratios=[1,2]"])
    sweep, runs = plan.save(config, "header")
    assert len(runs) == 2 * 2 * 2 * 2 * 3
    assert plan.load(sweep) == runs == plan.plan(config)
    assert [row["run_id"] for row in sweep.read_plan()] == [run.run_id for run in runs]
    assert sweep.config_path.read_text().startswith("# header\n")


def test_saving_a_longer_grid_extends_the_plan_and_a_shorter_one_keeps_it() -> None:
    sweep, short = plan.save(load(SMOKE), "")
    _, long = plan.save(load([*SMOKE, "sweep.log2_lrs=[-7]"]), "")
    assert len(short) == 6
    assert len(long) == 8
    assert {run.run_id for run in short} < {run.run_id for run in long}
    assert plan.save(load(SMOKE), "")[1] == long == plan.load(sweep)


def test_another_variant_joins_a_sweep_of_the_same_name() -> None:
    plan.save(load(SMOKE), "")
    sweep, runs = plan.save(load([*SMOKE, "parametrization=sp"]), "")
    assert {run.resolved.variant.label[2] for run in runs} == {"spectral", "sp"}
    assert plan.load(sweep) == runs


def test_the_name_of_a_sweep_is_the_same_whatever_its_grid_and_names_its_choices() -> None:
    def name(*overrides: str) -> str:
        return plan.sweep_name(load([*SMOKE, "sweep.name=null", *overrides]))

    assert re.fullmatch(r"nanogpt-adamw-spectral-[0-9a-f]{6}", name())
    assert name() == name("sweep.log2_lrs=[-3,-2]", "sweep.width_ratios=[4]", "sweep.seeds=[1,2]", "launcher=inline")
    assert name() != name("training.steps=31")
    both = name("optimizer=adamw,muon", "parametrization=sp,mup")
    assert re.fullmatch(r"nanogpt-adamw\+muon-sp\+mup-[0-9a-f]{6}", both)
    assert plan.sweep_name(load(SMOKE)) == "smoke"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.steps=40", "training.steps=40 (there: 30)"),
        ("optimizer.weight_decay=0.1", "optimizer.weight_decay=0.1 (there: 0.0)"),
        ("model.init_std=0.5", "model.init_std=0.5 (there: 0.02)"),
        ("data.max_tokens=9000", "data.max_tokens=9000 (there: None)"),
    ],
)
def test_a_namesake_with_other_settings_is_refused_naming_the_key(override: str, expected: str) -> None:
    sweep, runs = plan.save(load(SMOKE), "")
    assert sweep.run(runs[0].run_id).claim() is not None  # it is trained
    before = {p: p.read_bytes() for p in sweep.path.iterdir() if p.is_file()}
    with pytest.raises(ConfigError) as caught:
        plan.save(load([*SMOKE, override]), "")
    message = str(caught.value)
    assert message.startswith("sweep sweeps/smoke already holds nanogpt/adamw/spectral with other settings: ")
    assert expected in message
    assert "choose another sweep.name" in message
    assert {p: p.read_bytes() for p in sweep.path.iterdir() if p.is_file()} == before


def test_a_start_that_trained_nothing_does_not_occupy_its_name() -> None:
    sweep, planned = plan.save(load(SMOKE), "first")
    # what a killed process leaves behind does not change that
    make_folder(sweep.workers)
    dead = {**lease.owner_record(), "pid": os.getpid(), "born": "1"}
    (sweep.workers / "dead.json").write_text(json.dumps(dead))
    (sweep.workers / "damaged.json").write_text(json.dumps({**lease.owner_record(), "slurm_job": 7}))
    _, runs = plan.save(load([*SMOKE, "training.steps=40"]), "second")
    assert {row["run_id"] for row in sweep.read_plan()} == {run.run_id for run in runs}
    assert not {run.run_id for run in runs} & {run.run_id for run in planned}
    assert sweep.read_config()["variants"][0]["training"]["steps"] == 40
    _, longer = plan.save(load([*SMOKE, "training.steps=40", "sweep.log2_lrs=[-3]"]), "third")
    assert {run.run_id for run in longer} > {run.run_id for run in runs}  # settings that are one extend it

    with workers.registered(sweep), pytest.raises(ConfigError, match="already holds"):
        plan.save(load(SMOKE), "")
    sweep.write_job("7", sweep.script("x"), [[runs[0].run_id]])
    with pytest.raises(ConfigError, match="already holds"):
        plan.save(load(SMOKE), "")
    shutil.rmtree(sweep.jobs)
    sweep.run(runs[0].run_id).path.mkdir(parents=True)
    with pytest.raises(ConfigError, match="already holds"):
        plan.save(load(SMOKE), "")


def test_a_namesake_names_only_what_decides_the_numbers() -> None:
    sweep, runs = plan.save(load(SMOKE), "")
    assert sweep.run(runs[0].run_id).claim() is not None
    with pytest.raises(ConfigError) as caught:
        plan.save(load([*SMOKE, "training.steps=40", "data.cache=elsewhere", "training.checkpoint_minutes=1"]), "")
    assert "training.steps" in str(caught.value)
    assert "data.cache" not in str(caught.value)
    assert "checkpoint_minutes" not in str(caught.value)


def test_settings_that_do_not_decide_the_numbers_may_change_between_two_commands() -> None:
    _, before = plan.save(load(SMOKE), "")
    changed = ["training.checkpoint_minutes=3", "data.cache=elsewhere", "launcher=inline", "tracker=wandb"]
    sweep, after = plan.save(load([*SMOKE, *changed]), "")
    assert [run.run_id for run in after] == [run.run_id for run in before]
    assert plan.load(sweep)[0].resolved.training.checkpoint_minutes == 3  # what was said last counts
    assert plan.load(sweep)[0].resolved.variant.data.cache == "elsewhere"


def test_a_corpus_that_changed_under_a_sweep_is_told_in_one_line(tmp_path: Path) -> None:
    text = tmp_path / "corpus.txt"
    text.write_text("Some text.\n" * 50)
    config = load([*SMOKE, "data=local", f"data.path={text}"])
    sweep, _ = plan.save(config, "")
    text.write_text("Other text\n" * 50)
    for again in (lambda: plan.load(sweep), lambda: plan.save(config, "")):
        with pytest.raises(Exception, match=re.escape(str(text))) as caught:
            again()
        assert type(caught.value).__module__ == "mupsweep.errors", repr(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [
        (["sweep.width_ratios=[1,2]", "sweep.depth_ratios=[1,2]"], {(16, 2), (16, 4), (32, 2), (32, 4)}),
        (["sweep.width_ratios=[1,2]", "sweep.depth_ratios=[1,2]", "sweep.pair=true"], {(16, 2), (32, 4)}),
        (["sweep.width_ratios=[0.5,1.5]"], {(8, 2), (24, 2)}),
    ],
)
def test_ratios_are_crossed_unless_they_are_paired(overrides: list[str], sizes: set[tuple[int, int]]) -> None:
    assert {(r.size.width, r.size.depth) for r in plan.plan(load([*SMOKE, *overrides]))} == sizes


def test_steps_from_tokens_are_rounded_up() -> None:
    (one, *_) = plan.plan(load([*SMOKE, "training.steps=null", "training.tokens=1000"]))
    assert one.resolved.steps == 8  # of 4 x 32 tokens
    assert one.cost.tokens == 1024


def test_a_sweep_is_shown_without_its_corpus_and_trained_on_no_other(tmp_path: Path) -> None:
    text = tmp_path / "my.jsonl"
    text.write_text('{"text": "a"}\n')
    corpus = ["data=local", f"data.path={text}"]
    axes = "sweep.axes={model.init_std:[0.03]}"
    sweep, runs = plan.save(load(["experiment=smoke", "parametrization=sp,mup", axes, *corpus, f"out={tmp_path}"]), "")
    text.unlink()
    assert plan.load(sweep, to_train=False) == runs
    with pytest.raises(DataError, match=r"my\.jsonl does not exist"):
        plan.load(sweep)
    text.write_text('{"text": "another"}\n')
    with pytest.raises(RecordError, match=r"was planned on another text than \S+my\.jsonl holds now"):
        plan.load(sweep)
