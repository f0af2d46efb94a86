"""Interpolations: a config takes values from itself alone, and no record holds what the environment does."""

from __future__ import annotations

from pathlib import Path

import pytest

from mupsweep.errors import ConfigError
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.compose import compose
from mupsweep.sweep.config import from_tree, load, to_tree

SECRET = "hush-hush-hush"
RESOLVERS = [
    "data.path=${oc.env:MY_TOKEN}",
    "data.path=a/${oc.env:MY_TOKEN,none}/b",
    "data.path=${oc.decode:${oc.env:MY_TOKEN}}",
    "data.path=${${data.text_column}.env:MY_TOKEN}",
    "sweep.name=${hydra:runtime.cwd}",
    "optimizer.name='${oc.env:MY_TOKEN}'",
    "sweep.axes={optimizer.betas.0:['${oc.env:MY_TOKEN}']}",
]


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", SECRET)


@pytest.mark.parametrize("override", RESOLVERS)
def test_a_value_from_elsewhere_than_the_config_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="nothing is taken from the environment") as caught:
        load(["experiment=smoke", override])
    assert SECRET not in str(caught.value)


def test_a_yaml_of_the_user_takes_nothing_from_the_environment() -> None:
    own = Path("mine", "optimizer", "mine.yaml")
    own.parent.mkdir(parents=True)
    own.write_text("defaults: [adamw, _self_]\nname: ${oc.env:MY_TOKEN}\n")
    with pytest.raises(ConfigError, match=r"optimizer\.name=\$\{oc\.env:MY_TOKEN\}"):
        load(["experiment=smoke", "optimizer=mine"], "mine")


def test_the_value_of_another_key_can_be_taken() -> None:
    assert compose(["training.steps=${training.batch_size}"], None)["training"]["steps"] == 8


def test_text_in_the_form_of_an_interpolation_stays_text() -> None:
    words = ["experiment=smoke", "launcher=slurm", r"launcher.setup=['export A=\${HOME:-x}']"]
    assert load(words).launcher["setup"] == ["export A=${HOME:-x}"]


def test_a_stored_config_that_names_the_environment_is_read_as_text() -> None:
    sweep, _ = plan.save(load(["experiment=smoke"]), "")
    tree = to_tree(load(["experiment=smoke"]))
    tree["out"] = "${oc.env:MY_TOKEN}"
    tree["overrides"] = ["${oc.env:MY_TOKEN}"]
    tree["sweep"]["axes"] = {"a": "${oc.env:MY_TOKEN}"}
    tree["sweep"]["name"] = "${oc.env:MY_TOKEN}"
    sweep.write_config(tree, "")
    stored = from_tree(SweepDir.open(sweep.path).read_config(), to_read=True)
    assert stored.sweep.name == "${oc.env:MY_TOKEN}"
    assert stored.sweep.axes == {"a": "${oc.env:MY_TOKEN}"}
    assert SECRET not in str(stored)
