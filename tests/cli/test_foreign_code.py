"""Code that a config names: reading imports none, and training asks the person who starts it, on the command line."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mupsweep.launchers.slurm import Site, Slurm
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.config import load

Cli = Callable[..., tuple[int, str, str]]

STORED = Path(__file__).parents[1] / "stored" / "sweep"
OURS = "from mupsweep.optimizers.adamw import AdamW\n\n\nclass Planted(AdamW):\n    pass\n"
FOREIGN_OPTIMIZER = {"kind": "mupsweep.optimizers.foreign.Foreign", "path": "planted.Planted", "name": "adamw"}
OWN_MODEL = {"kind": "mupsweep.models.own.Own", "path": "planted.Planted", "name": "nanogpt", "width": 8, "depth": 1}
PLACES: dict[str, Callable[[dict[str, Any]], None]] = {
    "model": lambda tree: tree["variants"][0]["model"].update(kind="planted.Planted"),
    "own": lambda tree: tree["variants"][0].update(model=OWN_MODEL),
    "optimizer": lambda tree: tree["variants"][0]["optimizer"].update(kind="planted.Planted"),
    "rest": lambda tree: tree["variants"][0]["optimizer"].update(rest={"kind": "planted.Planted"}),
    "graft": lambda tree: tree["variants"][0]["optimizer"].update(graft={"kind": "planted.Planted"}),
    "list": lambda tree: tree["variants"][0]["optimizer"].update(graft=[{"kind": "planted.Planted"}]),
    "foreign": lambda tree: tree["variants"][0].update(optimizer=FOREIGN_OPTIMIZER),
    "parametrization": lambda tree: tree["variants"][0]["parametrization"].update(kind="planted.Planted"),
    "data": lambda tree: tree["variants"][0]["data"].update(kind="planted.Planted"),
    "launcher": lambda tree: tree["launcher"].update(kind="planted.Planted"),
    "tracker": lambda tree: tree["tracker"].update(kind="planted.Planted"),
}


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of somebody else's, which can be imported, and the mark that it leaves then."""
    Path("planted.py").write_text(f"from pathlib import Path\n\nPath('imported').touch()\n{OURS}")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.setenv("PYTHONPATH", f"{Path.cwd()}:{Path(__file__).parents[2]}")
    monkeypatch.delitem(sys.modules, "planted", raising=False)
    return Path("imported")


def stored(place: str) -> SweepDir:
    """Somebody else's sweep, whose config names the planted code in one place and says that this is allowed."""
    shutil.copytree(STORED, "sweeps/stored")
    sweep = SweepDir(Path("sweeps/stored"))
    tree = yaml.safe_load(sweep.config_path.read_text())
    PLACES[place](tree)
    sweep.config_path.write_text(yaml.safe_dump(tree | {"allow_imports": True}))
    return sweep


@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=() if place in ("foreign", "model") else pytest.mark.slow) for place in PLACES]
)
def test_no_command_on_a_stored_sweep_imports_the_code_that_it_names(place: str, planted: Path, cli: Cli) -> None:
    sweep = str(stored(place).path)
    for command in (["status", sweep], ["report", sweep]):
        code, _, err = cli(*command)
        assert code == 0, err
    refused = [["worker", sweep], ["transfer", sweep, "--validate", "--yes", "--to", "width=16"]]
    if place not in ("launcher", "tracker"):  # a recipe needs neither
        refused.append(["transfer", sweep, "--to", "width=16"])
    for command in refused:
        code, _, err = cli(*command)
        assert code == 2, command
        assert err.splitlines()[-1].startswith("mupsweep: "), err
        assert "planted.Planted is code outside mupsweep" in err
        assert "--allow-imports" in err
    assert not planted.exists()


def test_a_command_line_allows_the_code_and_a_yaml_does_not(planted: Path, cli: Cli) -> None:
    own = Path("mine", "experiment", "mine.yaml")
    own.parent.mkdir(parents=True)
    own.write_text("# @package _global_\nallow_imports: true\noptimizer: {kind: planted.Planted}\n")
    words = ["plan", "experiment=mine", "--config-dir", "mine", "training.steps=2"]
    code, _, err = cli(*words)
    assert code == 2
    assert "optimizer.kind=planted.Planted is code outside mupsweep: add allow_imports=true" in err
    assert not planted.exists()
    assert cli(*words, "allow_imports=true")[0] == 0
    assert planted.exists()


@pytest.mark.usefixtures("_forked_workers")
def test_workers_inherit_what_the_command_line_of_their_launcher_allows(planted: Path, cli: Cli) -> None:
    tiny = ["model.width=4", "model.depth=1", "model.head_dim=4", "model.context=8", "data.tokenizer=bytes"]
    tiny += ["training.steps=2", "training.batch_size=2", "training.eval_batches=1", "sweep.width_ratios=[1]"]
    tiny += ["sweep.log2_lrs=[-7]", "sweep.name=tiny"]
    words = [*tiny, "optimizer.kind=planted.Planted", "launcher.devices=[cpu]", "launcher.slots_per_device=1"]
    code, _, err = cli("run", *words, "allow_imports=true")
    assert code == 0, err
    sweep = SweepDir.open("sweeps/tiny")
    assert sweep.counts() == {"done": 1}
    planted.unlink()
    code, _, err = cli("run", *words[:-3], "optimizer.lr_ratio=0.5", "optimizer.name=half")
    assert code == 2
    assert "optimizer.kind=planted.Planted is code outside mupsweep" in err  # of the sweep that this one extends
    code, _, err = cli("report", str(sweep.path))
    assert "no rules of nanogpt/adamw/spectral: optimizer.kind=planted.Planted is code outside mupsweep" in err
    assert code == 0
    assert "no rules" not in cli("report", str(sweep.path), "--allow-imports")[2]


@pytest.mark.parametrize("allowed", [True, False])
def test_job_scripts_say_what_the_person_who_submitted_them_allowed(allowed: bool) -> None:
    site = Site.of(SweepDir(Path("sweeps/x"), allow_imports=allowed))
    assert ("--allow-imports" in Slurm().analysis_text(site)) is allowed
    assert site.mupsweep("worker")[5:] == (("--allow-imports",) if allowed else ())


@pytest.fixture
def started() -> SweepDir:
    """A sweep of one run whose program leaves a mark when it is started, as the person left it who made it."""
    overrides = ["trainer=command", "trainer.command='touch started'", "trainer.metrics=log.jsonl"]
    overrides += ["sweep.log2_lrs=[-7]", "sweep.width_ratios=[1]", "training.steps=2", "sweep.name=theirs"]
    return plan.save(load(overrides), "")[0]


@pytest.mark.parametrize("command", [["worker"], ["transfer", "--validate", "--yes", "--to", "width=512"]])
def test_a_stored_program_is_started_only_where_the_command_line_allows_it(
    command: list[str], started: SweepDir, cli: Cli
) -> None:
    code, _, err = cli(command[0], str(started.path), *command[1:])
    assert code == 2
    assert "trainer.command=touch started is code outside mupsweep" in err
    assert "--allow-imports" in err
    assert not Path("started").exists()
    if command == ["worker"]:
        assert cli("worker", str(started.path), "--device", "cpu", "--allow-imports")[0] == 0
        assert Path("started").exists()


def test_reading_a_sweep_of_programs_asks_for_nothing(started: SweepDir, cli: Cli) -> None:
    for command in (["status"], ["report"]):
        code, _, err = cli(command[0], str(started.path))
        assert (code, "outside" in err) == (0, False), err


def test_the_command_line_that_names_a_program_allows_this_one_alone(started: SweepDir, cli: Cli) -> None:
    other = ["trainer=command", "trainer.command='touch mine'", "trainer.metrics=log.jsonl", "optimizer=muon"]
    other += ["sweep.log2_lrs=[-7]", "sweep.width_ratios=[1]", "training.steps=2", "sweep.name=theirs"]
    code, _, err = cli("run", *other, "launcher=inline")
    assert code == 2
    assert "trainer.command=touch started is code outside mupsweep" in err
    assert not Path("started").exists()


def test_a_program_that_only_an_experiment_names_is_refused(cli: Cli) -> None:
    theirs = Path("theirs", "experiment", "theirs.yaml")
    theirs.parent.mkdir(parents=True)
    trainer = "{name: command, kind: mupsweep.trainers.command.Command, command: touch started, metrics: a.jsonl}"
    theirs.write_text(f"# @package _global_\ntrainer: {trainer}\n")
    words = ["plan", "experiment=theirs", "--config-dir", "theirs", "sweep.log2_lrs=[-7]", "sweep.width_ratios=[1]"]
    code, _, err = cli(*words)
    assert code == 2
    assert "trainer.command=touch started is code outside mupsweep: add allow_imports=true" in err
    assert cli(*words, "allow_imports=true")[0] == 0
