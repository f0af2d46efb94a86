"""Bad input: exit code 2, one line that names the value and what would be right, and nothing on the disk.

The table runs through `mupsweep.cli.main` in this process, with the arguments in `sys.argv`; what must not depend on
that is done again in processes of its own.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mupsweep import data
from mupsweep.analysis.labels import DONE
from mupsweep.cli import main
from mupsweep.errors import MupsweepError, RecordError
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.config import load

SMOKE = "experiment=smoke"


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command line, in this process."""

    def call(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["mupsweep", *arguments])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return Outcome(code, *capsys.readouterr())

    return call


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def refused(outcome: Outcome, expected: tuple[str, ...]) -> None:
    """Exit code 2 and one line on stderr that holds every part of `expected`, and no control characters."""
    assert outcome.code == 2, outcome.err
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("mupsweep: ")
    assert lines[0].isprintable()
    for part in expected:
        assert part in lines[0]


# overrides -> what the line must hold: the offending value, and the nearest valid name or what to do
OVERRIDES: list[tuple[str, tuple[str, ...]]] = [
    # names
    ("modle=nanogpt", ("'modle'", "did you mean 'model'?")),
    ("model=nanogtp", ("'nanogtp'", "did you mean 'nanogpt'?")),
    ("optimizer=adam", ("'adam'", "did you mean 'adamw'?", "muon")),
    ("optimizer=adamw,muno", ("'muno'", "did you mean 'muon'?")),
    ("optimizer=[adamw,muon]", ("adamw", "valid: ")),
    ("optimizer=", ("no optimizer named ''", "valid: ")),
    ("optimizer=AdamW", ("'AdamW'", "did you mean 'adamw'?")),
    ("parametrization=muP", ("'muP'", "did you mean 'mup'?")),
    ("parametrization=μP", ("'μP'", "did you mean 'mup'?")),
    ("parametrization=µp", ("'µp'", "did you mean 'mup'?")),
    ("parametrization=sp,μP", ("'sp,μP'", "did you mean 'mup'?")),
    ("model=null", ("no model named", "valid: ")),
    ("experimnt=smoke", ("'experimnt'", "did you mean 'experiment'?")),
    ("experiment=smok", ("'smok'", "did you mean 'smoke'?")),
    ("experiment=None", ("None", "smoke")),
    ("launcher=lcoal", ("'lcoal'", "did you mean 'local'?")),
    ("launcher.sizes={w32-d2:{gpus:1}}", ("'launcher.sizes.w32-d2.gpus'", "valid: ", "devices_per_run")),
    ("tracker=jsnl", ("'jsnl'", "did you mean 'jsonl'?")),
    ("model.widht=32", ("'model.widht'", "did you mean 'model.width'?")),
    ("training.foo=1", ("'training.foo'", "valid: ", "training.steps")),
    ("sweep.log2_lr=[-7]", ("'sweep.log2_lr'", "did you mean 'sweep.log2_lrs'?")),
    ("optimizer.beta=0.9", ("'optimizer.beta'", "did you mean 'optimizer.betas'?")),
    ("parametrization=sp parametrization.output=init", ("'parametrization.output'",)),
    ("width=3", ("'width'", "did you mean 'model.width'?")),
    ("seeds=[0]", ("'seeds'", "did you mean 'sweep.seeds'?")),
    ("optimizer.lr=0.001", ("'optimizer.lr'", "sweep.log2_lrs=[-10,-9,-8]")),
    ("depht=3", ("'depht'", "valid: ")),
    ("hydra.verbose=true", ("hydra", "valid: ")),
    ("hydra.searchpath=[file:///tmp]", ("hydra", "valid: ")),
    # grammar
    ("model.width", ("'model.width'", "key=value")),
    ("=3", ("'=3'", "key=value")),
    ("demo", ("'demo'", "did you mean experiment=demo?")),
    ("sweep.seeds=[0,", ("'sweep.seeds=[0,'", "'sweep.seeds=[0,1]'")),
    ("+model.width=32", ("'+model.width=32'", "model.width=VALUE")),
    ("++model.width=32", ("'++model.width=32'", "model.width=VALUE")),
    ("~model.width", ("'~model.width'", "model.width=VALUE")),
    ("+experiment=demo", ("'+experiment=demo'", "experiment=VALUE")),
    ("data=sotu,local", ("'data=sotu,local'", "only model, optimizer, parametrization take several choices")),
    ("training.steps=10,20", ("'training.steps=10,20'", "[a,b]")),
    ("sweep.log2_lrs=-8,-9", ("'sweep.log2_lrs=-8,-9'", "[a,b]")),
    ("training.steps=${nope}", ("nope", "training.steps")),
    # types
    ("training.steps=many", ("training.steps", "'many'", "whole number")),
    ("training.steps=10.5", ("training.steps", "10.5", "whole number")),
    ("model.width=true", ("model.width", "True", "whole number")),
    ("model.init_std=small", ("model.init_std", "'small'", "a number")),
    ("model.bias=maybe", ("model.bias", "'maybe'", "true or false")),
    ("allow_imports=nope", ("allow_imports", "nope")),
    ("sweep.log2_lrs=-7", ("sweep.log2_lrs", "-7", "list")),
    ("sweep.width_ratios=null", ("sweep.width_ratios", "list")),
    ("sweep.width_ratios={a:1}", ("sweep.width_ratios={a:1}", "write one, as [1,2]")),
    ("sweep.width_ratios=[[1,2]]", ("sweep.width_ratios", "[1, 2]")),
    ("sweep.seeds=[0.5]", ("sweep.seeds", "0.5", "whole number")),
    ("optimizer.betas=0.9", ("optimizer.betas", "0.9", "list")),
    ("optimizer.betas=[0.9]", ("optimizer.betas", "[0.9]", "two numbers")),
    ("optimizer.betas=[0.9,0.9,0.9]", ("optimizer.betas", "[0.9, 0.9, 0.9]", "two numbers")),
    ("optimizer=muon optimizer.rest=adamww", ("no optimizer named 'adamww' for optimizer.rest", "'adamw'?")),
    ("optimizer=muon optimizer.graft=muon optimizer.graft.scaling=kimy", ("optimizer.scaling=kimy", "kimi")),
    ("optimizer=adamw optimizer.rest=sgd", ("optimizer.rest of adamw", "takes every tensor", "null")),
    ("optimizer=muon optimizer.roles=[hidden,output,input_vector]", ("optimizer.roles=", "muon", "input_vector")),
    ("optimizer.roles=[]", ("optimizer.roles=[]", "some of input, hidden")),
    ("optimizer=muon optimizer.roles=[hiden]", ("optimizer.roles=", "hidden")),
    ("optimizer=adamw optimizer.hyperball=true", ("optimizer.hyperball", "matrices", "roles=[hidden]")),
    (
        "optimizer=muon optimizer.hyperball=true optimizer.weight_decay=0.1",
        ("optimizer.weight_decay=0.1", "fixes the norm"),
    ),
    ("optimizer=muon optimizer.block_size=0", ("optimizer.block_size=0", "positive")),
    ("parametrization=sp parametrization.init=fan_out", ("parametrization.init=fan_out", "fan_in")),
    ("parametrization=sp_per_layer parametrization.alignment=half", ("parametrization.alignment=half", "full")),
    ("parametrization=sp parametrization.weight_decay_rule=wd", ("parametrization.weight_decay_rule=wd", "coupled")),
    ("training.batch_rule=sde", ("training.base_batch_size", "both or neither")),
    ("training.base_tokens=1000", ("training.base_tokens", "horizon_exponent")),
    ("training.batch_rule=linear", ("training.batch_rule=linear", "sde", "sqrt")),
    ("optimizer=muon training.batch_rule=sde training.base_batch_size=4", ("rule=sde", "muon", "batch_rule=sqrt")),
    ("optimizer=sgd training.batch_rule=sqrt training.base_batch_size=4", ("sgd", "training.batch_rule=sde")),
    (
        "training.batch_rule=sde training.base_batch_size=1 training.batch_size=64",
        ("training.batch_rule=sde", "base_batch_size"),
    ),
    # ranges
    ("training.steps=0", ("training.steps", "0", "positive")),
    ("training.steps=null", ("training.steps=None", "training.tokens=None", "set exactly one")),
    ("training.tokens=100", ("training.steps=30", "training.tokens=100", "training.steps=null")),
    ("training.warmup=30", ("training.warmup=30", "30 steps", "lower warmup or train longer")),
    ("training.warmup=0.99", ("training.warmup=0.99", "lower warmup or train longer")),
    ("training.warmup=-1", ("training.warmup=-1", "a fraction below 1 or a number of steps")),
    ("training.batch_size=0", ("training.batch_size=0", "positive")),
    ("training.schedule=cosin", ("training.schedule=cosin", "did you mean 'cosine'?")),
    ("training.precision=1", ("training.precision=1: valid: auto, bf16, fp32",)),
    ("training.precision=fp16", ("training.precision=fp16", "bf16")),
    ("training.min_lr_frac=2", ("training.min_lr_frac=2", "[0, 1]")),
    ("training.clip=0", ("training.clip=0", "null")),
    ("training.checkpoint_minutes=-1", ("training.checkpoint_minutes=-1", "at least 0")),
    ("data.validation_fraction=1.5", ("data.validation_fraction=1.5", "(0, 1)")),
    ("data.max_tokens=0", ("data.max_tokens=0", "positive")),
    ("optimizer.betas=[0.9,1.5]", ("optimizer.betas=[0.9, 1.5]", "[0, 1)")),
    ("optimizer.eps=-1", ("optimizer.eps=-1", "at least 0")),
    ("optimizer.eps=nan", ("optimizer.eps=nan",)),
    ("optimizer.weight_decay=inf", ("optimizer.weight_decay=inf",)),
    ("optimizer.lr_ratio=0", ("optimizer.lr_ratio=0", "positive")),
    ("optimizer.rest={name:x}", ("optimizer.rest", "null")),
    ("parametrization.output=inti", ("parametrization.output=inti", "did you mean 'init'?")),
    ("parametrization.depth_exponent=2", ("parametrization.depth_exponent=2", "0 to 1")),
    ("parametrization.weight_decay_rule=x", ("parametrization.weight_decay_rule=x", "coupled_constant")),
    ("model.depth=0", ("model.depth=0", "positive")),
    ("model.init_std=nan", ("model.init_std=nan",)),
    ("model.init_std=inf", ("model.init_std=inf",)),
    ("model.ffn_ratio=0.0001", ("model.ffn_ratio=0.0001", "raise it")),
    ("model.heads=0", ("model.heads=0",)),
    ("model.heads=3", ("width 16", "model.heads=3")),
    ("model.attention_scale=mupp", ("model.attention_scale=mupp", "did you mean 'mup'?")),
    ("model.tied=true model.head_init_std=0", ("model.head_init_std", "set it to null")),
    # the grid
    ("sweep.width_ratios=[0.3]", ("width_ratio=0.3", "4.8", "choose a ratio")),
    ("sweep.width_ratios=[0.25]", ("width 4", "model.head_dim=8")),
    ("sweep.depth_ratios=[0.75]", ("depth_ratio=0.75", "1.5", "choose a ratio")),
    ("sweep.width_ratios=[0]", ("sweep.width_ratios=[0.0]", "positive")),
    ("sweep.width_ratios=[inf]", ("sweep.width_ratios", "inf")),
    ("sweep.width_ratios=[]", ("sweep.width_ratios=[]", "at least one")),
    ("sweep.log2_lrs=[]", ("sweep.log2_lrs=[]", "at least one")),
    ("sweep.log2_lrs=[-7,-7.0]", ("sweep.log2_lrs=[-7.0, -7.0]", "without repeats")),
    ("sweep.log2_lrs=[nan]", ("sweep.log2_lrs", "nan")),
    ("sweep.log2_lrs=[5000]", ("sweep.log2_lrs", "5000")),
    ("sweep.log2_lrs=[0.001,0.01,0.1]", ("[0.001, 0.01, 0.1]", "octaves", "'sweep.log2_lrs=[-10,-6.5,-3.5]'")),
    ("sweep.seeds=[1,1]", ("sweep.seeds=[1, 1]", "without repeats")),
    ("sweep.pair=true", ("width_ratios (2)", "depth_ratios (1)", "equal length")),
    ("sweep.width_ratios=[1e300]", ("sweep.width_ratios=[1e+300]", "up to 1e+30")),
    ("training.batch_size=1" + 40 * "0", ("training.batch_size=1000", "up to 1e+30")),
    ("sweep.search=adaptive sweep.max_flops=1", ("sweep.max_flops=1:", "give more")),
    ("out=", ("out=:", "out=sweeps")),
    ("out=null", ("out=None", "out=sweeps")),
    ("out=[a]", ("out=['a']", "out=sweeps")),
    ("sweep.name=a/b", ("sweep.name='a/b'", "plain folder name")),
    ("sweep.name=..", ("sweep.name='..'", "plain folder name")),
    ("sweep.name=", ("sweep.name=''", "plain folder name")),
    ("sweep.name=a\x1b[31mb", ("sweep.name='a\\x1b[31mb'", "without slashes, control characters")),
    ("out=a\x1b[31mb", ("out='a\\x1b[31mb'", "a folder without control characters")),
    ("model=a\x1b[31mb", ("'a\\x1b[31mb'", "valid: ")),
    ("model.depth=1000000", ("depth 1000000", "at most 4,096")),
    ("launcher.slots_per_device=100000", ("launcher.slots_per_device=100000", "at most 1024")),
    ("optimizer.name=a/b", ("optimizer.name", "a/b")),
    ("optimizer.name=", ("optimizer.name=:", "letters, digits")),
    # code and data
    ("model.kind=os.PathLike", ("model.kind=os.PathLike", "allow_imports=true")),
    ("data.kind=os.PathLike", ("data.kind=os.PathLike", "allow_imports=true")),
    ("optimizer=muon optimizer.rest.kind=os.PathLike", ("optimizer.rest.kind=os.PathLike", "allow_imports=true")),
    ("tracker.kind=mupsweep.nowhere.X", ("tracker.kind=mupsweep.nowhere.X", "package.module.Class")),
    ("tracker.kind=mupsweep.errors.ConfigError", ("tracker.kind=mupsweep.errors.ConfigError", "dataclass")),
    ("data.kind=mupsweep.errors.DataError", ("data.kind=mupsweep.errors.DataError", "Source")),
    ("data.path=${oc.env:HOME}/x", ("data.path=${oc.env:HOME}/x", "nothing is taken from the environment")),
    ("sweep.name=${hydra:runtime.cwd}", ("sweep.name=${hydra:runtime.cwd}", "write the value itself")),
    ("optimizer.name='${oc.decode:a}'", ("optimizer.name=${oc.decode:a}", "write the value itself")),
    ("data.tokenizer=gpt3", ("data.tokenizer=gpt3", "did you mean 'gpt2'?")),
    ("data.tokenizer=gpt2-70000", ("data.tokenizer=gpt2-70000", "50256")),
    ("data=local", ("data.path=FILE_OR_FOLDER",)),
    ("data=local data.path=nowhere.txt", ("data.path=nowhere.txt", ".jsonl")),
    ("data.path=my.txt", ("data.path=my.txt", "data=local")),
]


@pytest.mark.parametrize(("overrides", "expected"), OVERRIDES, ids=[overrides[:60] for overrides, _ in OVERRIDES])
def test_a_bad_override_is_refused_in_one_line_and_writes_nothing(
    overrides: str, expected: tuple[str, ...], cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    before = tree(tmp_path)
    planned = cli("plan", SMOKE, *overrides.split())
    refused(planned, expected)
    assert tree(tmp_path) == before


@pytest.fixture
def sweep(tmp_path: Path) -> SweepDir:
    """A planned sweep, nothing trained."""
    return plan.save(load([SMOKE]), "mupsweep run experiment=smoke")[0]


# arguments of a command on a sweep -> what the line must hold
COMMANDS: list[tuple[str, tuple[str, ...]]] = [
    ("status sweeps/smok", ("sweeps/smok is not a sweep", "did you mean 'sweeps/smoke'? valid: ")),
    ("status sweeps", ("sweeps is not a sweep", "valid: sweeps/smoke")),
    ("transfer smoke", ("smoke is not a sweep", "did you mean 'sweeps/smoke'?")),
    ("status sweeps/smoke/plan.jsonl", ("sweeps/smoke/plan.jsonl is not a sweep",)),
    ("status nowhere", ("nowhere is not a sweep", "valid: sweeps/smoke")),
    ("status no\x1b[31mwhere", ("no\\x1b[31mwhere is not a sweep", "valid: sweeps/smoke")),
    ("transfer --from no\x1b[31mwhere.csv", ("--from no\\x1b[31mwhere.csv cannot be read",)),
    (
        "transfer sweeps/smoke foo=1",
        ("foo=1: expected sweep folders, analysis.KEY=VALUE, or a target as --to width=N",),
    ),
    ("transfer sweeps/smoke --to width=64 foo=1", ("--to foo=1", "depth")),
    ("transfer sweeps/smoke analysis.foo=1", ("unknown key 'analysis.foo'", "valid: ")),
    ("report sweeps/smok", ("sweeps/smok is not a sweep", "smoke")),
    ("transfer sweeps/smok", ("sweeps/smok is not a sweep", "smoke")),
    ("worker sweeps/smok", ("sweeps/smok is not a sweep", "smoke")),
    ("transfer sweeps/smoke --to nonsense", ("--to nonsense", "--to width=4096 depth=32")),
    ("transfer sweeps/smoke --to width=0", ("--to width=0", "width, depth")),
    ("transfer sweeps/smoke --to width=²", ("--to width=²", "width, depth")),
    ("transfer sweeps/smoke --to width=64 depht=4", ("--to depht=4", "width, depth")),
    ("transfer sweeps/smoke --to width=64.5", ("--to width=64.5", "whole numbers")),
    ("transfer sweeps/smoke --to width=1e300", ("--to width=1e300", "whole numbers")),
    ("transfer sweeps/smoke --to width=inf", ("--to width=inf", "whole numbers")),
    ("transfer sweeps/smoke --to width=64 --to width=128", ("width=64", "width=128", "one target a command")),
    ("transfer sweeps/smoke --to width=64", ("no finished runs", "mupsweep run")),
    ("transfer sweeps/smoke --to width=64 --validate --format pytorch", ("--format pytorch", "leave it out")),
    ("transfer sweeps/smoke --to width=64 --validate analysis.verdict.costly=0.1", ("analysis.verdict.costly=0.1",)),
    ("transfer sweeps/smoke --law", ("no finished runs, so there is no law", "mupsweep run")),
    ("transfer --law", ("no sweep given: mupsweep transfer sweeps/NAME --law",)),
    ("transfer sweeps/smoke --to width=64 parameters=3e6", ("--to parameters=3e6: only a law carries an LR there",)),
    (
        "transfer sweeps/smoke --to batch_size=64 --validate",
        ("--validate is of a ladder's verdict", "leave one of them"),
    ),
    ("transfer sweeps/smoke --law --to batch_size=64.5", ("--to batch_size=64.5", "whole numbers", "batch_size")),
    ("plan sweeps/smoke", ("'sweeps/smoke'", "mupsweep status, transfer and report")),
    ("transfer sweeps/smoke width=64", ("width=64", "--to")),
    ("transfer width=64", ("width=64", "--to")),
    ("run experiment=smoke optimizer.nmae=x", ("'optimizer.nmae'", "did you mean 'optimizer.name'?")),
    ("rules experiment=smoke sweep.log2_lrs=[5000]", ("sweep.log2_lrs", "5000")),
    ("plan experiment=smoke --config-dir nowhere", ("--config-dir nowhere", "optimizer/mine.yaml")),
    ("plan experiment=smoke optimizer=gentle --config-dir sweeps", ("'gentle'", "valid: ")),
    ("report sweeps/smoke --figures papers", ("--figures papers", "did you mean 'paper'?")),
    ("check --figure x.gif", ("--figure x.gif", ".png or .svg")),
    ("check --figure none/x.png", ("--figure none/x.png", "none is no folder", "such as check.png")),
    ("check --figure sweeps/smoke/plan.jsonl/x.png", ("plan.jsonl is no folder", "such as check.png")),
    ("check law optimizer=foreign", ("optimizer.path=null", "package.module.Class")),
    (
        "check law optimizer=foreign optimizer.path=no_module.Mine allow_imports=true",
        ("optimizer.path=no_module.Mine", "No module named 'no_module'", "PYTHONPATH"),
    ),
    ("data prepare data.tokenizer=gpt3", ("data.tokenizer=gpt3", "did you mean 'gpt2'?")),
    ("data verify data.cache=nowhere", ("nowhere", "mupsweep data prepare")),
    ("data list data=nope", ("'nope'", "valid: ")),
]


@pytest.mark.parametrize(("command", "expected"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_a_bad_command_on_a_sweep_is_refused_in_one_line_and_writes_nothing(
    command: str, expected: tuple[str, ...], cli: Callable[..., Outcome], sweep: SweepDir, tmp_path: Path
) -> None:
    before = tree(tmp_path)
    refused(cli(*command.split()), expected)
    assert tree(tmp_path) == before


YAMLS = [
    ("optimizer/mine.yaml", "a: [1", ("a yaml file cannot be read", "optimizer/mine.yaml")),
    ("optimizer/mine.yaml", "\udcff", ("a yaml file cannot be read", "utf-8")),
    ("optimizer/mine.yaml", "", ("optimizer.name=None", "expected a word")),
    ("optimizer/mine.yaml", "defaults: [adamw, _self_]\nbetta: 1", ("'optimizer.betta'", "did you mean 'betas'?")),
    ("experiment/mine.yaml", "model: {width: 64}", ("'experiment'", "begins with the line # @package _global_")),
    ("experiment/mine.yaml", "# @package _global_\ntraning: {steps: 5}", ("'traning'", "did you mean 'training'?")),
    ("experiment/mine.yaml", "# @package _global_\nmodel: {widht: 5}", ("'model.widht'", "did you mean 'width'?")),
]


@pytest.mark.parametrize(
    ("path", "content", "expected"), YAMLS, ids=[f"{path} {content!r}" for path, content, _ in YAMLS]
)
def test_a_bad_yaml_of_the_user_is_refused_in_one_line(
    path: str, content: str, expected: tuple[str, ...], cli: Callable[..., Outcome]
) -> None:
    file = Path("mine", path)
    file.parent.mkdir(parents=True)
    file.write_bytes(content.encode(errors="surrogateescape"))
    refused(cli("plan", f"{file.parent.name}=mine", "--config-dir", "mine"), expected)


@pytest.mark.parametrize("command", ["report", "transfer"])
def test_a_summary_of_something_else_is_refused_in_one_line(
    command: str, cli: Callable[..., Outcome], sweep: SweepDir
) -> None:
    run = sweep.run(sweep.read_plan()[0]["run_id"])
    run.path.mkdir(parents=True)
    run.write_summary({"a": 1})
    run.write_status(DONE)
    message = (str(run.summary_path), "it has no run_id", "delete it and run the command")
    refused(cli(command, str(sweep.path)), message)


IMPOSSIBLE = {"val_loss": [1e30, "abc", -1, True, [1]], "status": ["sleeping", 3, None], "width": [10**400, "wide"]}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in IMPOSSIBLE.items() for value in values])
def test_a_summary_with_a_value_that_no_run_can_have_is_refused_in_one_line(
    key: str, value: Any, cli: Callable[..., Outcome]
) -> None:
    sweep = SweepDir(Path("sweep"))
    shutil.copytree(Path(__file__).parents[1] / "stored" / "sweep", sweep.path)
    run = sweep.run("w8-d1-lr-4.00-s0-bffae01d")
    run.summary_path.write_text(json.dumps((run.summary() or {}) | {key: value}))
    for command in (["transfer", "sweep"], ["transfer", "sweep", "--to", "width=16"], ["report", "sweep"]):
        refused(
            cli(*command), (str(run.summary_path), f"{key}={value!r:.80} cannot be", "delete it and run the command")
        )


@pytest.mark.parametrize("run_id", ["../../x", "..", "a/b", ".hidden", "", "x\x1b[31m", None])
def test_a_planned_run_whose_folder_would_lie_elsewhere_is_refused_and_nothing_is_written(
    run_id: Any, cli: Callable[..., Outcome], sweep: SweepDir, tmp_path: Path
) -> None:
    first, *others = sweep.read_plan()
    sweep.write_plan([{**first, "run_id": run_id}, *others])
    before = tree(tmp_path)
    folder = str(sweep.path)
    for command in (["status", folder], ["report", folder], ["transfer", folder], ["cancel", folder]):
        refused(cli(*command), ("plan.jsonl is damaged", f"run_id={run_id!r} cannot be", "delete it"))
    assert tree(tmp_path) == before


def test_a_worker_writes_nothing_outside_of_a_sweep_whose_plan_leads_there(
    sweep: SweepDir, cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    sweep.write_plan([{**row, "run_id": "../../x"} for row in sweep.read_plan()])
    refused(cli("worker", str(sweep.path), "--device", "cpu"), ("plan.jsonl is damaged", "run_id='../../x' cannot"))
    assert not list(tmp_path.rglob("x"))


def test_a_plan_without_runs_says_how_to_go_on(cli: Callable[..., Outcome], sweep: SweepDir, tmp_path: Path) -> None:
    sweep.write_plan([])
    assert "no run is planned yet: go on with the mupsweep run" in cli("status", str(sweep.path)).out
    for command in ("transfer", "report"):
        outcome = cli(command, str(sweep.path))
        assert outcome.code == 0, outcome.err
        assert "no finished runs yet: go on with mupsweep run" in outcome.out
    refused(cli("transfer", str(sweep.path), "--to", "width=64"), ("no finished runs", "mupsweep run first"))
    assert plan.save(load([SMOKE]), "mupsweep run experiment=smoke")[1] == plan.load(sweep)
    assert len(sweep.read_plan()) == 6


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_finished_run_without_its_summary_counts_as_one_to_train(content: str, cli: Callable[..., Outcome]) -> None:
    shutil.copytree(Path(__file__).parents[1] / "stored" / "sweep", "sweeps/stored")
    sweep = SweepDir(Path("sweeps/stored"))
    words = shlex.split(sweep.config_path.read_text().splitlines()[0])[3:]
    assert "2 of 4 runs to train" in cli("plan", *words).out
    sweep.run("w8-d1-lr-4.00-s0-bffae01d").summary_path.write_text(content)
    assert "3 of 4 runs to train" in cli("plan", *words).out
    assert "3 of 4 runs not finished; what follows rests on the rest" in cli("transfer", "sweeps/stored").out


CONFIG_DAMAGE = ["", "only words\n", "- a\n- b\n", "a: [1\n", "out: sweeps\n", "\x00", "variants: 3\nsweep: 4\n"]
PLAN_DAMAGE = ['{"run_id": "w1', "[]\n", "null\n", '{"a": 1}\n', "words\n"]


@pytest.mark.parametrize("command", ["report", "transfer"])
@pytest.mark.parametrize("content", CONFIG_DAMAGE, ids=repr)
def test_a_damaged_config_is_refused_in_one_line(
    command: str, content: str, cli: Callable[..., Outcome], sweep: SweepDir
) -> None:
    sweep.config_path.write_text(content)
    refused(cli(command, str(sweep.path)), ("sweeps/smoke/config.yaml", "run the command that made the sweep again"))


@pytest.mark.parametrize("command", ["status", "report", "transfer"])
@pytest.mark.parametrize("content", PLAN_DAMAGE, ids=repr)
def test_a_damaged_plan_is_refused_in_one_line(
    command: str, content: str, cli: Callable[..., Outcome], sweep: SweepDir
) -> None:
    sweep.plan_path.write_text(content)
    refused(cli(command, str(sweep.path)), ("sweeps/smoke/plan.jsonl is damaged", "delete it and run the command"))


@pytest.mark.parametrize("content", CONFIG_DAMAGE, ids=repr)
def test_the_plan_of_a_damaged_config_is_refused_in_one_line(content: str, sweep: SweepDir) -> None:
    sweep.config_path.write_text(content)
    with pytest.raises(RecordError, match=r"config\.yaml .*run the command that made the sweep again") as caught:
        plan.load(sweep)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", PLAN_DAMAGE, ids=repr)
def test_a_damaged_plan_cannot_be_loaded(content: str, sweep: SweepDir) -> None:
    sweep.plan_path.write_text(content)
    with pytest.raises(RecordError, match=r"plan\.jsonl is damaged .*delete it and run the command") as caught:
        plan.load(sweep)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", CONFIG_DAMAGE, ids=repr)
def test_the_advice_for_a_damaged_config_works(content: str, sweep: SweepDir) -> None:
    before = plan.load(sweep)
    sweep.config_path.write_text(content)
    assert plan.save(load([SMOKE]), "mupsweep run experiment=smoke")[1] == before == plan.load(sweep)


@pytest.mark.parametrize("content", PLAN_DAMAGE, ids=repr)
def test_the_advice_for_a_damaged_plan_works_and_finished_runs_are_kept(content: str, sweep: SweepDir) -> None:
    before = plan.load(sweep)
    folder = sweep.run(before[0].run_id)
    folder.path.mkdir(parents=True)
    folder.write_summary({"status": DONE, "val_loss": 2.0})
    folder.write_status(DONE)
    sweep.plan_path.write_text(content)
    sweep.plan_path.unlink()
    assert plan.save(load([SMOKE]), "mupsweep run experiment=smoke")[1] == before
    assert sweep.counts()[DONE] == 1


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [("out=a-file", ("a-file", "out=DIR")), ("sweep.name=" + 300 * "x", ("xxx", "128"))],
    ids=["out is a file", "long name"],
)
def test_a_folder_that_cannot_be_made_is_one_line(overrides: str, expected: tuple[str, ...]) -> None:
    Path("a-file").write_text("where a folder is wanted")
    with pytest.raises(MupsweepError) as caught:
        plan.save(load([SMOKE, overrides]), "")
    refused(Outcome(caught.value.exit_code, "", f"mupsweep: {caught.value}"), expected)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data=local", "data.path=my.txt"], "holds no text"),
        (["training.batch_size=1000000"], "the train split has 10387712 tokens, 324615 blocks of context 32"),
    ],
    ids=["empty", "short"],
)
def test_a_corpus_that_cannot_be_used_leaves_nothing_and_its_name_free(
    overrides: list[str], expected: str, cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    data.prepare(load([SMOKE]).variants[0].data)
    Path("my.txt").write_text("")
    refused(cli("run", SMOKE, *overrides), (expected,))
    assert not Path("sweeps").exists()


def process(*arguments: str) -> Outcome:
    """The command line, in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "mupsweep", *arguments], capture_output=True, text=True)
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_a_worker_refuses_a_run_that_is_not_planned_and_a_device_that_is_none(
    sweep: SweepDir, cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    before = tree(tmp_path)
    planned = sweep.read_plan()[0]["run_id"]
    misspelt = planned[:-1] + ("0" if planned[-1] != "0" else "1")
    refused(cli("worker", str(sweep.path), misspelt), (f"'{misspelt}'", f"did you mean '{planned}'"))
    refused(cli("worker", str(sweep.path), "--device", "gpu7"), ("gpu7", "cuda"))
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["transfer"], "no sweep given: mupsweep transfer sweeps/NAME, or mupsweep transfer --from runs.csv"),
        (["run", SMOKE, "optimizer=adam"], "did you mean 'adamw'?"),
    ],
)
def test_a_refusal_is_the_same_in_a_process_of_its_own(arguments: list[str], expected: str, tmp_path: Path) -> None:
    outcome = process(*arguments)
    refused(outcome, (expected,))
    assert outcome.out == ""
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "--nonsense"],
        ["nonsense"],
        ["status"],
        ["worker", "x", "--threads", "0"],
        ["worker", "x", "--threads", "99999"],
    ],
)
def test_wrong_usage_exits_with_2_and_no_traceback(arguments: list[str], cli: Callable[..., Outcome]) -> None:
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert "Usage" in outcome.err


def test_a_refused_command_prints_no_json(cli: Callable[..., Outcome]) -> None:
    outcome = cli("plan", SMOKE, "optimizer=adam", "--json")
    refused(outcome, ("'adam'",))
    with pytest.raises(json.JSONDecodeError):
        json.loads(outcome.out)
