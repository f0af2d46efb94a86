"""Trainers: every one of them has the name of its file, explains its keys, and refuses others."""

from __future__ import annotations

import re

import pytest

from mupsweep.errors import ConfigError
from mupsweep.schema import instantiate
from mupsweep.sweep.config import OWN_TRAINER, choices, config_root, load
from mupsweep.sweep.run_identity import digest_of

TRAINERS = choices("trainer")
NEEDED = {"command": ["trainer.command='train --lr {lr} --width {width}'", "trainer.metrics=log.jsonl"]}


def section(name: str) -> dict[str, object]:
    return load([f"trainer={name}", *NEEDED.get(name, [])]).variants[0].trainer


def test_the_trainers_are_found() -> None:
    assert TRAINERS == ["command", "mupsweep"]


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_has_the_name_of_its_file_and_can_be_made(name: str) -> None:
    trainer = instantiate(section(name), "trainer")
    assert trainer.name == name
    assert type(trainer).__module__ == f"mupsweep.trainers.{name}"
    assert isinstance(trainer.runs_program, bool)


@pytest.mark.parametrize("name", TRAINERS)
def test_every_key_of_a_trainers_yaml_is_explained(name: str) -> None:
    for line in (config_root() / "trainer" / f"{name}.yaml").read_text().splitlines():
        assert line.startswith(("#", "name:", "kind:")) or " # " in line, line


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_refuses_an_unknown_key_naming_the_valid_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'trainer.names'; did you mean '(trainer\.)?name'\?"):
        load([f"trainer={name}", *NEEDED.get(name, []), "trainer.names=1"])


def test_the_own_trainer_is_no_part_of_a_runs_identity_and_not_stored() -> None:
    assert section("mupsweep") == OWN_TRAINER
    assert digest_of(load().variants[0]) == digest_of(load(["trainer=mupsweep"]).variants[0])


def digest(*overrides: str) -> str:
    return digest_of(load(["trainer=command", *NEEDED["command"], *overrides]).variants[0])


@pytest.mark.parametrize(
    "override",
    [
        "trainer.command='train --lr {lr} --width {width} --fast'",
        "trainer.metrics=other.jsonl",
        "trainer.loss=eval_loss",
        "trainer.step=iter",
        "trainer.shell=true",
        "training.batch_size=7",
        "data.tokenizer=bytes",
    ],
)
def test_what_decides_a_programs_result_is_part_of_its_runs_identity(override: str) -> None:
    assert digest(override) != digest()


@pytest.mark.parametrize(
    "override",
    [
        *(
            "trainer.timeout=60",
            "trainer.silence=5",
            "trainer.grace=1",
            "trainer.cwd=/tmp",
            "trainer.resume='-r {dir}'",
        ),
        *("trainer.train_loss=loss", "data=local", "training.checkpoint_minutes=1"),
    ],
)
def test_what_decides_no_result_is_not(override: str) -> None:
    assert digest(override) == digest()


def test_no_corpus_is_read_for_a_program() -> None:
    assert re.fullmatch("[0-9a-f]{16}", digest("data=local", "data.path=/no/such/folder"))
