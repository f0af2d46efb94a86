"""Configs: overrides in, one validated and frozen config with the right types out."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import chosen
import own_model
import pytest
import yaml
from composition import compose, compose_once

from mupsweep.analysis.config import AnalysisConfig
from mupsweep.errors import ConfigError
from mupsweep.sweep import plan, run_spec
from mupsweep.sweep.compose import nearest_key
from mupsweep.sweep.config import COMPARABLE, GRID, choices, config_root, from_tree, load, to_tree, variant_tree

GROUPS = sorted(p.name for p in config_root().iterdir() if p.is_dir())
EXPERIMENTS = choices("experiment")
LOCAL = "Text of a corpus.\n" * 100


def choice_of_every_group() -> list[str]:
    return [f"{group}={name}" for group in GROUPS if group != "experiment" for name in choices(group)]


@pytest.fixture
def local_text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(LOCAL)
    return f"data.path={path}"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_shipped_experiment_composes_and_plans(name: str) -> None:
    sweep_config = load([f"experiment={name}"])
    grid = sweep_config.sweep
    runs = plan.plan(sweep_config)
    lrs = sum(len(grid.of(variant.optimizer).log2_lrs) for variant in sweep_config.variants)
    first_round = 2  # LRs of the smallest size
    assert len(runs) == (lrs * len(grid.ratios) * len(grid.seeds) if grid.search == GRID else first_round)
    assert len({run.run_id for run in runs}) == len(runs)


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=demo", "training.steps=7", "sweep.log2_lrs=[-9,-7]", "model.width=96", "data.tokenizer=gpt2-1024"],
        ["optimizer=muon", "optimizer@optimizer.rest=lion", "optimizer.rest.betas=[0.9,0.95]", "model=llama"],
        ["launcher=slurm", "launcher.sizes=null", "launcher.sizes={w32-d2:{threads:2}}", "sweep.axes={a.b:[0,1.5]}"],
    ],
)
def test_what_the_tests_compose_in_two_steps_is_what_hydra_composes_in_one(overrides: list[str]) -> None:
    assert repr(compose_once(overrides, None)) == repr(compose(overrides, None))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_shipped_experiment_names_its_command_in_its_header(name: str) -> None:
    lines = (config_root() / "experiment" / f"{name}.yaml").read_text().splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    commands = re.findall(r"mupsweep (?:run|check) ([^,;]*)", " ".join(line.lstrip("# ") for line in header))
    assert commands, header
    overrides = [w for w in commands[0].split() if re.fullmatch(r"[a-z_.]+=\S+", w)]
    assert f"experiment={name}" in overrides
    load(overrides)


@pytest.mark.parametrize("choice", choice_of_every_group())
def test_every_choice_of_every_group_composes_and_has_the_name_of_its_file(choice: str, local_text: str) -> None:
    group, name = choice.split("=")
    words = {"data=local": [local_text], "model": ["sweep.width_ratios=[1]"]}  # half a preset may be no whole model
    words["trainer=command"] = ["trainer.command=train {lr} {width}", "trainer.metrics=log.jsonl"]
    Path("my_module.py").write_text(own_model.MODEL)  # of the example of model=own
    Path("config.json").write_text(json.dumps(own_model.LLAMA))  # of model=huggingface
    sweep_config = load([*chosen.words(group, name), *words.get(choice, []), *words.get(group, [])])
    section = sweep_config.variants[0]
    if group in COMPARABLE:
        assert getattr(section, group)["name"] == name
    elif group == "data":
        assert section.data.name == name
    elif group == "trainer":
        assert section.trainer["name"] == name
    elif group in ("launcher", "tracker"):
        assert getattr(sweep_config, group)["name"] == name
    assert plan.plan(sweep_config)


def test_several_choices_become_variants_in_the_order_they_are_written() -> None:
    sweep_config = load(["optimizer=muon,adamw", "parametrization=sp,spectral,mup"])
    assert [v.label for v in sweep_config.variants] == [
        ("nanogpt", optimizer, parametrization)
        for optimizer in ("muon", "adamw")
        for parametrization in ("sp", "spectral", "mup")
    ]


def test_a_key_of_a_comparable_group_applies_to_every_variant_that_is_chosen() -> None:
    sweep_config = load(["optimizer=adamw,sgd", "optimizer.weight_decay=0.25", "model.width=128"])
    assert [v.optimizer["weight_decay"] for v in sweep_config.variants] == [0.25, 0.25]
    assert [v.model["width"] for v in sweep_config.variants] == [128, 128]


def test_the_command_line_wins_over_the_experiment_and_that_over_the_groups() -> None:
    sweep_config = load(["experiment=smoke", "training.steps=7"])
    training = sweep_config.variants[0].training
    assert (training.steps, training.batch_size, training.warmup) == (7, 4, 0.1)


def test_values_arrive_in_their_types() -> None:
    sweep_config = load(
        ["experiment=smoke", "sweep.width_ratios=[1,2]", "sweep.seeds=[0,1]", "training.clip=null", "out=7"]
    )
    variant = sweep_config.variants[0]
    assert sweep_config.sweep.width_ratios == (1.0, 2.0)
    assert [type(r) for r in sweep_config.sweep.width_ratios] == [float, float]
    assert [type(s) for s in sweep_config.sweep.seeds] == [int, int]
    assert sweep_config.sweep.log2_lrs == (-8.0, -6.0, -5.0)
    assert (type(variant.training.min_lr_frac), type(variant.training.steps)) == (float, int)
    assert variant.training.clip is None
    assert variant.training.compile is False
    assert sweep_config.allow_imports is False
    assert sweep_config.out == "7"
    assert load(["experiment=smoke", "training.min_lr_frac=0"]).variants[0].training.min_lr_frac == 0.0
    optimizer = run_spec.resolve(variant).optimizer
    assert optimizer.betas == (0.9, 0.95)  # type: ignore[attr-defined]
    assert isinstance(optimizer.eps, float)
    assert optimizer.eps == 1e-12


def test_a_whole_number_may_be_written_with_an_exponent_and_is_the_same_run() -> None:
    plain, short = (load(["experiment=smoke", f"training.steps={n}", f"data.max_tokens={n}"]) for n in ("30", "3e1"))
    assert type(short.variants[0].training.steps) is int
    assert type(short.variants[0].data.max_tokens) is int
    assert [run.run_id for run in plan.plan(plain)] == [run.run_id for run in plan.plan(short)]
    with pytest.raises(ConfigError, match=r"training\.steps=10\.5: expected a whole number"):
        load(["experiment=smoke", "training.steps=10.5"])
    with pytest.raises(ConfigError, match=r"model\.width=16\.0: expected a whole number"):
        load(["experiment=smoke", "model.width=1.6e1"])


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("True", True)])
def test_allow_imports_is_a_truth_value(text: str, value: bool) -> None:
    assert load(["experiment=smoke", f"allow_imports={text}"]).allow_imports is value


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["experiment=demo", "parametrization=sp,mup"],
        ["optimizer=muon,adamw", "tracker=wandb", "launcher=inline", "sweep.pair=true", "sweep.depth_ratios=[1,2,4]"],
    ],
)
def test_a_config_survives_its_tree_json_and_yaml(overrides: list[str]) -> None:
    sweep_config = load(overrides)
    assert from_tree(to_tree(sweep_config)) == sweep_config
    assert from_tree(json.loads(json.dumps(to_tree(sweep_config)))) == sweep_config
    assert from_tree(yaml.safe_load(yaml.safe_dump(json.loads(json.dumps(to_tree(sweep_config)))))) == sweep_config


def test_a_config_cannot_be_changed() -> None:
    sweep_config = load(["experiment=smoke"])
    for frozen in (
        sweep_config,
        sweep_config.sweep,
        sweep_config.variants[0],
        sweep_config.variants[0].training,
        sweep_config.variants[0].data,
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            frozen.name = "x"  # type: ignore[misc, union-attr]


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    (folder / "optimizer").mkdir(parents=True)
    (folder / "optimizer" / "gentle.yaml").write_text(
        "name: gentle\nkind: mupsweep.optimizers.adamw.AdamW\nbetas: [0.8, 0.9]\nweight_decay: 0.5\n"
    )
    return folder


def test_a_folder_of_the_users_own_adds_an_optimizer_beside_the_shipped_ones(own_folder: Path) -> None:
    sweep_config = load(["experiment=smoke", "optimizer=adamw,gentle"], str(own_folder))
    assert [v.optimizer["name"] for v in sweep_config.variants] == ["adamw", "gentle"]
    assert sweep_config.variants[1].optimizer["weight_decay"] == 0.5
    assert choices("optimizer", str(own_folder)) == sorted([*choices("optimizer"), "gentle"])
    assert "gentle" not in choices("optimizer")
    with pytest.raises(ConfigError, match="no optimizer named 'gentl'; did you mean 'gentle'"):
        load(["optimizer=gentl"], str(own_folder))


def test_a_file_of_the_users_own_with_a_shipped_name_is_refused(own_folder: Path) -> None:
    own = own_folder / "optimizer" / "adamw.yaml"
    own.write_text("name: adamw\nkind: mupsweep.optimizers.adamw.AdamW\nbetas: [0.5, 0.5]\n")
    with pytest.raises(
        ConfigError, match=r"adamw\.yaml: mupsweep ships optimizer=adamw itself; give yours another name"
    ):
        load(["experiment=smoke"], str(own_folder))


def test_a_broken_file_of_the_users_own_is_one_line_that_names_it(own_folder: Path) -> None:
    (own_folder / "optimizer" / "broken.yaml").write_text("name: [unclosed\n")
    with pytest.raises(ConfigError, match="broken") as caught:
        load(["experiment=smoke", "optimizer=broken"], str(own_folder))
    assert "\n" not in str(caught.value)


def test_code_outside_the_package_is_imported_only_when_it_is_allowed(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_folder / "outside_code.py").write_text(
        "from pathlib import Path\nfrom mupsweep.optimizers.adamw import AdamW\n"
        "Path('imported').touch()\nMine = AdamW\n"
    )
    monkeypatch.syspath_prepend(str(own_folder))
    rest = ["optimizer=muon", "optimizer.rest.kind=outside_code.Mine"]
    for overrides in (["optimizer.kind=outside_code.Mine"], rest, ["data.kind=outside_code.Mine"]):
        with pytest.raises(ConfigError, match=r"outside_code\.Mine is code outside mupsweep: add allow_imports=true"):
            plan.plan(load(["experiment=smoke", *overrides]))
        assert not Path("imported").exists()
    sweep_config = load(["experiment=smoke", "allow_imports=true", *rest])
    assert run_spec.resolve(sweep_config.variants[0]).optimizer.members()[1].name == "adamw"
    assert Path("imported").exists()


def test_warmup_below_one_is_a_fraction_and_from_one_on_a_number_of_steps() -> None:
    for text, steps in (("0", 0), ("0.2", 6), ("1", 1), ("12", 12)):
        training = load(["experiment=smoke", f"training.warmup={text}"]).variants[0].training
        assert training.warmup_steps(30) == steps


def test_the_hint_for_an_unknown_name_puts_the_nearest_first() -> None:
    with pytest.raises(ConfigError, match=r"^unknown key 'training\.stpes'; did you mean 'training\.steps'\? valid: "):
        load(["training.stpes=3"])
    assert nearest_key("mdel.width", ["model", "model.width", "out"]) == "did you mean 'model.width'?"
    several = ["data", "data.name", "model", "model.name"]
    assert nearest_key("modle.name", several) == "did you mean 'model'? valid: data, model"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("analysis.verdict.octaves=-1", "analysis.verdict.octaves=-1.0: expected a number above 0"),
        ("analysis.curve.noise=0", "analysis.curve.noise=0.0: expected a number above 0"),
        ("analysis.curve.left.powers=[2]", "expected as many numbers as analysis.curve.left.powers has, 1"),
        ("analysis.curve.right.powers=[]", "analysis.curve.right.powers=[]: expected numbers above 0, one at least"),
        ("analysis.curve.right.same_shape=2", "analysis.curve.right.same_shape=2.0: expected a chance, at most 1"),
        ("analysis.curve.walk.step_sds=[]", "analysis.curve.walk.step_sds=[]: expected numbers above 0"),
    ],
)
def test_a_number_that_the_model_cannot_have_is_refused_before_anything_is_trained(
    override: str, expected: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)):
        load([override])


def test_the_yaml_of_the_analysis_has_the_numbers_of_its_dataclasses() -> None:
    assert load([]).analysis == AnalysisConfig()


def lrs_of(words: list[str]) -> dict[str, list[float]]:
    """The base LRs of every optimizer of a plan."""
    lrs: dict[str, set[float]] = {}
    for run in plan.plan(load(["experiment=smoke", "sweep.width_ratios=[1]", *words])):
        lrs.setdefault(run.resolved.optimizer.name, set()).add(run.log2_lr)
    return {name: sorted(values) for name, values in lrs.items()}


def test_optimizers_have_a_grid_each_by_default_and_by_name() -> None:
    adamw, muon = [-11.0, -10.0, -9.0, -8.0, -7.0, -6.0, -5.0], [-7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0]
    both = "optimizer=adamw,muon"
    assert lrs_of([both, "sweep.log2_lrs=null"]) == {"adamw": adamw, "muon": muon}
    assert lrs_of([both, "sweep.log2_lrs={muon:[-4,-3.5],adamw:[-9]}"]) == {"adamw": [-9], "muon": [-4, -3.5]}
    assert lrs_of([both, "sweep.log2_lrs={muon:[-4]}"]) == {"adamw": adamw, "muon": [-4]}
    assert lrs_of([both, "sweep.log2_lrs=[-5,-4]"]) == {"adamw": [-5, -4], "muon": [-5, -4]}
    assert lrs_of(["sweep.log2_lrs=null", "optimizer.log2_lr_range=null"]) == {"adamw": adamw}
    assert lrs_of(["sweep.log2_lrs=null", "optimizer.log2_lr_range=[-3.5,-1]"]) == {"adamw": [-3.5, -2.5, -1.5]}
    tree = to_tree(load([both, "sweep.log2_lrs={muon:[-4],adamw:[-9]}"]))
    assert from_tree(yaml.safe_load(yaml.safe_dump(json.loads(json.dumps(tree))))).sweep.log2_lrs == {
        "muon": (-4.0,),
        "adamw": (-9.0,),
    }


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("sweep.log2_lrs={muo:[-4]}", "sweep.log2_lrs: the sweep has no optimizer 'muo'; did you mean 'muon'? valid: "),
        ("sweep.log2_lrs={muon:-4}", "sweep.log2_lrs: muon=-4: expected a list of numbers"),
        ("sweep.log2_lrs={muon:[]}", "sweep.log2_lrs: muon=[]: expected a list with at least one value"),
        ("sweep.log2_lrs={muon:[-4,-4]}", "sweep.log2_lrs: muon=[-4.0, -4.0]: expected a list without repeats"),
        ("sweep.log2_lrs={muon:[99]}", "sweep.log2_lrs: muon=[99.0]: expected octaves, -64 to 64"),
        ("sweep.log2_lrs={muon:[0.01]}", "these look like LRs, and octaves are wanted"),
        ("sweep.log2_lrs={muon:{a:[-4]}}", "sweep.log2_lrs: muon={'a': [-4]}: expected a list of numbers"),
        ("optimizer.log2_lr_range=[-1,-7]", "optimizer.log2_lr_range=[-1.0, -7.0]: expected [LOWEST,HIGHEST]"),
    ],
)
def test_a_wrong_grid_of_an_optimizer_is_one_line(word: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(complaint)) as caught:
        load(["optimizer=adamw,muon", word])
    assert "\n" not in str(caught.value)


def test_the_range_of_lrs_is_no_part_of_a_runs_identity_and_no_hyperparameter() -> None:
    words = ["experiment=smoke", "optimizer=shampoo2"]  # with a graft and a rest, which are optimizers too
    ranges = [[], ["optimizer.log2_lr_range=null"], ["optimizer.rest.log2_lr_range=[-2,0]"]]
    ids = [[run.run_id for run in plan.plan(load([*words, *others]))] for others in ranges]
    assert ids[0] == ids[1] == ids[2]
    with pytest.raises(ConfigError, match="no key with a number"):
        load([*words, "sweep.axes={optimizer.log2_lr_range.0:[-3]}"])


@pytest.mark.parametrize("name", [name for name in choices("optimizer") if name != "foreign"])
def test_every_optimizer_says_where_its_lrs_lie(name: str) -> None:
    low, high = load([f"optimizer={name}"]).variants[0].optimizer["log2_lr_range"]
    assert 4 <= high - low <= 8


def test_the_plan_warns_of_a_grid_that_lies_mostly_outside_of_an_optimizers_range() -> None:
    def remarks(*words: str) -> list[str]:
        return plan.grid_remarks(plan.plan(load(["experiment=smoke", *words])))

    words = "optimizer=adamw,muon", "sweep.log2_lrs=[-11,-10,-9,-8,-7,-6,-5]"
    assert remarks(*words) == [
        "muon: 4 of 7 LRs lie outside of 2^-7 to 2^-1, where its best LRs lie as a rule; to look there: "
        "'sweep.log2_lrs={adamw:[-11,-10,-9,-8,-7,-6,-5],muon:[-7,-6,-5,-4,-3,-2,-1]}'"
    ]
    assert remarks("optimizer=adamw", "sweep.log2_lrs=[-4,-3]") == [
        "adamw: 2 of 2 LRs lie outside of 2^-11 to 2^-5, where its best LRs lie as a rule; to look there: "
        "'sweep.log2_lrs=[-11,-10,-9,-8,-7,-6,-5]'"
    ]
    assert remarks("optimizer=adamw,muon", "sweep.log2_lrs=[-8,-7,-6,-5]") == []  # half of Muon's
    assert remarks("optimizer=adamw,muon", "sweep.log2_lrs=null") == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training.norm_points=-1"], r"training\.norm_points=-1: expected at least 0, which is off"),
        (["training.norm_points=2", "launcher.devices_per_run=2"], r"measures runs on one device.*devices_per_run=2"),
    ],
)
def test_norms_that_cannot_be_measured_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan.plan(load(["experiment=smoke", *words]))


def test_untracked_norms_are_no_part_of_a_runs_identity() -> None:
    (plain, tracked) = (plan.plan(load(["experiment=smoke", f"training.norm_points={n}"]))[0] for n in (0, 5))
    assert "norm_points" not in variant_tree(plain.resolved.variant)["training"]
    assert plain.run_id != tracked.run_id
