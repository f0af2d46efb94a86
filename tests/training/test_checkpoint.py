"""Checkpoints: a bad checkpoint never replaces a good one, and what another worker owns by now is left to it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import CPU, NEVER, Killed, Result, TrainControl, assert_same, attempt, checkpoint, run

from mupsweep.data import Dataset, prepare
from mupsweep.errors import RecordError
from mupsweep.store.run_dir import RUNNING, RunDir
from mupsweep.training.build import build
from mupsweep.training.checkpoint import Checkpointer, TrainState

OFTEN = "training.checkpoint_minutes=0"


@pytest.fixture(scope="module")
def data() -> Dataset:
    return prepare(run().resolved.variant.data)


@pytest.fixture(scope="module")
def straight(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return attempt(run(), data, tmp_path_factory.mktemp("straight"))


@pytest.fixture(scope="module")
def killed_once(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that died at step 12 with checkpoints of steps 12 and 11."""
    path = tmp_path_factory.mktemp("killed")
    with pytest.raises(Killed):
        attempt(run(OFTEN), data, path, TrainControl(kill=12))
    return path


@pytest.fixture
def killed(killed_once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(killed_once, tmp_path / "run")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_damaged_checkpoint_never_takes_the_place_of_the_good_one_before(
    data: Dataset, straight: Result, killed: Path
) -> None:
    latest, previous = checkpoint(killed), checkpoint(killed, "previous.pt")
    latest.write_bytes(latest.read_bytes()[:-40])
    good = previous.read_bytes()
    with pytest.raises(Killed):
        attempt(run(OFTEN), data, killed, TrainControl(kill=1))  # resumes at 11 and saves once, at 12
    assert previous.read_bytes() == good
    latest.write_bytes(b"")  # damaged again
    assert_same(attempt(run(), data, killed), straight)


def test_a_checkpoint_that_cannot_be_read_falls_back_to_the_one_before(
    data: Dataset, straight: Result, killed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint(killed).unlink()
    checkpoint(killed).mkdir()
    with caplog.at_level("INFO", "mupsweep"):
        assert_same(attempt(run(), data, killed), straight)
    assert "resuming at step 11 from previous.pt" in caplog.text


def test_what_a_killed_process_was_writing_does_not_stay_on_the_disk(
    data: Dataset, straight: Result, killed: Path
) -> None:
    checkpoint(killed, ".latest.pt.0123456789ab.tmp").write_bytes(bytes(1000))
    assert_same(attempt(run(), data, killed), straight)
    assert {p.name for p in (killed / "checkpoint").iterdir()} == {"latest.pt", "previous.pt"}


class LeaseLost(TrainControl):
    """Another host takes the run over before the twelfth step; this process finds out late."""

    folder: Path

    def heartbeat(self) -> None:
        if self.asked == 12:
            owner = json.loads((self.folder / "claims" / "0000.json").read_text())
            (self.folder / "claims" / "0001.json").write_text(json.dumps({**owner, "host": "elsewhere"}))
            self.before = files(self.folder)


def test_after_it_was_taken_over_a_process_writes_nothing_of_the_run(data: Dataset, tmp_path: Path) -> None:
    folder = RunDir(tmp_path / "run")
    assert folder.claim() is not None
    control = LeaseLost()
    control.folder = folder.path
    attempt(run(OFTEN), data, folder.path, control)
    assert set(control.before) >= {"metrics.jsonl", "checkpoint/latest.pt", "checkpoint/previous.pt"}
    assert files(folder.path) == control.before


def test_a_checkpoint_of_another_version_is_named_and_kept(killed: Path) -> None:
    path = checkpoint(killed)
    saved = torch.load(io.BytesIO(path.read_bytes()[:-32]), weights_only=True)
    buffer = io.BytesIO()
    torch.save({**saved, "new": 1}, buffer)
    path.write_bytes(buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())
    before = files(killed)
    with pytest.raises(RecordError, match=r"latest\.pt is of another version of mupsweep: delete \S+/checkpoint to"):
        Checkpointer(build(run(), CPU), RunDir(killed), is_main_process=True, interval=60.0)
    assert files(killed) == before


@pytest.mark.parametrize("is_main_process", [True, False])
def test_only_the_main_process_removes_the_checkpoints_of_a_damaged_trunk(is_main_process: bool, killed: Path) -> None:
    folder = RunDir(killed)
    folder.trunk_checkpoint.write_bytes(b"damaged" * 20)
    checkpointer = Checkpointer(build(run(), CPU), folder, is_main_process, interval=60.0)
    before = files(killed)
    with pytest.raises(Exception, match="the next try starts anew"):
        checkpointer.resume_trunk({})
    assert folder.trunk_checkpoint.exists() == (not is_main_process)
    assert is_main_process or files(killed) == before


def test_a_rank_other_than_the_main_process_writes_nothing(killed: Path) -> None:
    before = files(killed)
    checkpointer = Checkpointer(build(run(), CPU), RunDir(killed), is_main_process=False, interval=0.0)
    checkpointer.last_status -= 60
    checkpointer.update_status({"step": 12, "train_loss": 1.0}, 30, 1.0)
    checkpointer.append({"step": 12})
    checkpointer.save()
    checkpointer.start_cooldown()
    assert files(killed) == before


def test_a_status_is_shown_while_the_run_is_its_own(killed: Path) -> None:
    folder = RunDir(killed)
    assert folder.claim() is not None
    checkpointer = Checkpointer(build(run(), CPU), folder, is_main_process=True, interval=60.0)
    assert checkpointer.state.step == 12
    checkpointer.last_status -= 60
    checkpointer.update_status({"step": 12, "train_loss": 1.0}, 30, 1.0)
    assert folder.status() == {"status": RUNNING, "step": 12, "steps": 30, "train_loss": 1.0, "tokens_per_second": 1.0}
    assert folder.is_owned_by(os.getpid())


def test_the_train_state_survives_its_checkpoint(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    checkpointer = Checkpointer(build(run(), CPU), folder, is_main_process=True, interval=60.0)
    checkpointer.state = TrainState(
        step=7, losses=[3.5, 3.25], micro_batch=2, horizon=1, branching=True, branches=[{"val_loss": 3.0}]
    )
    checkpointer.save()
    again = Checkpointer(build(run(), CPU), folder, is_main_process=True, interval=60.0).state
    assert {**vars(again), "seconds": 0.0} == {**vars(checkpointer.state), "seconds": 0.0}


def test_a_checkpoint_is_due_after_its_interval_and_one_new_step(tmp_path: Path) -> None:
    checkpointer = Checkpointer(build(run(), CPU), RunDir(tmp_path), is_main_process=True, interval=60.0)
    checkpointer.last_save -= 61
    assert not checkpointer.due()  # nothing new since it was loaded
    checkpointer.steps = 1
    assert checkpointer.due()
    checkpointer.save()
    assert not checkpointer.due()
    checkpointer.last_save -= 59
    assert not checkpointer.due()
    checkpointer.last_save -= 2
    assert checkpointer.due()


def test_writing_a_checkpoint_takes_its_size_in_memory_once(tmp_path: Path) -> None:
    wide = run("model.width=256")
    checkpointer = Checkpointer(build(wide, CPU), RunDir(tmp_path), True, NEVER)
    tracemalloc.start()
    try:
        checkpointer.save()
        size = checkpoint(tmp_path).stat().st_size
        assert size < tracemalloc.get_traced_memory()[1] < 1.6 * size  # a buffer grows by an eighth or so at a time
    finally:
        tracemalloc.stop()


FOREIGN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "an object of a class": lambda saved: Path("x"),
    "a list": lambda saved: [1],
    "a mapping": lambda saved: {"a": 1},
    "weights of nothing": lambda saved: {**saved, "network": {}},
    "weights that are none": lambda saved: {**saved, "network": 3},
    "weights of another shape": lambda saved: {**saved, "network": {key: torch.ones(3) for key in saved["network"]}},
    "an optimizer that is none": lambda saved: {**saved, "optimizer": 3},
    "an optimizer of nothing": lambda saved: {**saved, "optimizer": {}},
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_checkpoint_of_something_else_is_named_and_nobody_is_told_to_unpickle_it(
    content: Callable[[dict[str, Any]], Any], killed: Path
) -> None:
    path = checkpoint(killed)
    saved = torch.load(io.BytesIO(path.read_bytes()[:-32]), weights_only=True)
    buffer = io.BytesIO()
    torch.save(content(saved), buffer)
    path.write_bytes(buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())
    before = files(killed)
    expected = r"latest\.pt holds something else than a checkpoint: delete \S+/checkpoint to start the run anew$"
    with pytest.raises(RecordError, match=expected) as caught:
        Checkpointer(build(run(), CPU), RunDir(killed), is_main_process=True, interval=60.0)
    assert "weights_only" not in str(caught.value)
    assert files(killed) == before
