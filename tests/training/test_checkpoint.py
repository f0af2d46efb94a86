"""Checkpoints: a bad checkpoint never replaces a good one, and what another worker owns by now is left to it."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import damaged_bytes, of_one_folder, places, undamaged_copy
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trainer import CPU, NEVER, TOTAL, Killed, Result, TrainControl, assert_same, attempt, checkpoint, run

from mupsweep.analysis.labels import DIVERGED, DONE
from mupsweep.data import Dataset, prepare
from mupsweep.errors import RecordError
from mupsweep.store.run_dir import RUNNING, RunDir
from mupsweep.training import checkpoint as checkpoint_files
from mupsweep.training.build import build
from mupsweep.training.checkpoint import DIGEST_BYTES, Checkpointer, TrainState
from mupsweep.training.distributed import SINGLE_PROCESS, DistributedContext
from mupsweep.training.session import TorchSession
from mupsweep.training.signals import StopSignal
from mupsweep.training.worker import LeaseControl, execute_run

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

    def lease_lost(self) -> bool:
        if self.asked == 12:
            owner = json.loads((self.folder / "claims" / "0000.json").read_text())
            (self.folder / "claims" / "0001.json").write_text(json.dumps({**owner, "host": "elsewhere"}))
            self.before = files(self.folder)
        return False


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
        Checkpointer(build(run(), CPU), RunDir(killed), SINGLE_PROCESS, interval=60.0)
    assert files(killed) == before


@pytest.mark.parametrize("is_main_process", [True, False])
def test_only_the_main_process_removes_the_checkpoints_of_a_damaged_trunk(is_main_process: bool, killed: Path) -> None:
    folder = RunDir(killed)
    folder.trunk_checkpoint.write_bytes(b"damaged" * 20)
    rank = DistributedContext(rank=int(not is_main_process))
    checkpointer = Checkpointer(build(run(), CPU), folder, rank, interval=60.0)
    before = files(killed)
    with pytest.raises(Exception, match="the next try starts anew"):
        checkpointer.resume_trunk({})
    assert folder.trunk_checkpoint.exists() == (not is_main_process)
    assert is_main_process or files(killed) == before


def test_a_rank_other_than_the_main_process_writes_nothing(killed: Path) -> None:
    before = files(killed)
    checkpointer = Checkpointer(build(run(), CPU), RunDir(killed), DistributedContext(rank=1), interval=0.0)
    checkpointer.last_status -= 60
    checkpointer.update_status({"step": 12, "train_loss": 1.0}, 30, 1.0)
    checkpointer.append({"step": 12})
    checkpointer.save()
    checkpointer.start_cooldown()
    assert files(killed) == before


def test_a_status_is_shown_while_the_run_is_its_own(killed: Path) -> None:
    folder = RunDir(killed)
    assert folder.claim() is not None
    checkpointer = Checkpointer(build(run(), CPU), folder, SINGLE_PROCESS, interval=60.0)
    assert checkpointer.state.step == 12
    checkpointer.last_status -= 60
    checkpointer.update_status({"step": 12, "train_loss": 1.0}, 30, 1.0)
    assert folder.status() == {"status": RUNNING, "step": 12, "steps": 30, "train_loss": 1.0, "tokens_per_second": 1.0}
    assert folder.is_owned_by(os.getpid())


def test_the_train_state_survives_its_checkpoint(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    checkpointer = Checkpointer(build(run(), CPU), folder, SINGLE_PROCESS, interval=60.0)
    checkpointer.state = TrainState(
        step=2, losses=[3.5, 3.25], micro_batch=2, horizon=1, branching=True, branches=[{"val_loss": 3.0}]
    )
    checkpointer.save()
    again = Checkpointer(build(run(), CPU), folder, SINGLE_PROCESS, interval=60.0).state
    assert {**vars(again), "seconds": 0.0} == {**vars(checkpointer.state), "seconds": 0.0}


def test_a_checkpoint_is_due_after_its_interval_and_one_new_step(tmp_path: Path) -> None:
    checkpointer = Checkpointer(build(run(), CPU), RunDir(tmp_path), SINGLE_PROCESS, interval=60.0)
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
    checkpointer = Checkpointer(build(wide, CPU), RunDir(tmp_path), SINGLE_PROCESS, NEVER)
    tracemalloc.start()
    try:
        checkpointer.save()
        size = checkpoint(tmp_path).stat().st_size
        assert size < tracemalloc.get_traced_memory()[1] < 1.6 * size  # a buffer grows by an eighth or so at a time
    finally:
        tracemalloc.stop()


def test_reading_a_checkpoint_takes_no_copy_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "PIECE", 2**20)
    wide = run("model.width=256")
    Checkpointer(build(wide, CPU), RunDir(tmp_path), SINGLE_PROCESS, NEVER).save()
    setup = build(wide, CPU)
    tracemalloc.start()  # it sees bytes of Python, and no tensors
    try:
        Checkpointer(setup, RunDir(tmp_path), SINGLE_PROCESS, NEVER)
        assert tracemalloc.get_traced_memory()[1] < 3 * 2**20 < 0.5 * checkpoint(tmp_path).stat().st_size
    finally:
        tracemalloc.stop()


def test_a_checkpoint_that_is_mapped_as_for_an_accelerator_resumes_the_same(
    data: Dataset, straight: Result, killed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda path, **options: load(path, **{**options, "mmap": True}))
    assert_same(attempt(run(), data, killed), straight)


FOREIGN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "an object of a class": lambda saved: Path("x"),
    "a list": lambda saved: [1],
    "a mapping": lambda saved: {"a": 1},
    "weights of nothing": lambda saved: {**saved, "network": {}},
    "weights that are none": lambda saved: {**saved, "network": 3},
    "weights of another shape": lambda saved: {**saved, "network": {key: torch.ones(3) for key in saved["network"]}},
    "an optimizer that is none": lambda saved: {**saved, "optimizer": 3},
    "an optimizer of nothing": lambda saved: {**saved, "optimizer": {}},
    "a step that is none": lambda saved: {**saved, "step": "12"},
    "losses of other steps": lambda saved: {**saved, "losses": saved["losses"][1:]},
    "the checkpoint of another run": lambda saved: {**saved, "run_id": run("sweep.log2_lrs=[-5]").run_id},
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
    expected = r"latest\.pt holds something else than a checkpoint of this run: delete \S+/checkpoint to start the run"
    with pytest.raises(RecordError, match=expected) as caught:
        Checkpointer(build(run(), CPU), RunDir(killed), SINGLE_PROCESS, interval=60.0)
    assert "weights_only" not in str(caught.value)
    assert files(killed) == before


STRANGE = st.sampled_from(
    [None, True, 0, -1, 3, 10**400, 1e30, math.nan, math.inf, "", "abc", [], {}, [[]], torch.ones(3), torch.tensor(0.0)]
)


@st.composite
def damaged_checkpoint(draw: st.DrawFn, content: bytes) -> bytes:
    """A checkpoint whose bytes were cut or flipped; or one with its digest, in which a value is another or missing."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged_bytes(content))
    saved = torch.load(io.BytesIO(content[:-DIGEST_BYTES]), weights_only=True)
    saved = {**saved, "network": dict(saved["network"])}
    # The values within are trusted, since the digest and the run's id stand for them.
    *path, key = draw(st.sampled_from([place for place in places(saved) if 1 <= len(place) <= 2]))
    parent = saved
    for step in path:
        parent = parent[step]
    if isinstance(parent, dict) and draw(st.integers(0, 3)) == 0:
        del parent[key]
    else:
        parent[key] = draw(STRANGE)
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()


@pytest.fixture(scope="module")
def nearly_done(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that died before its last step but one."""
    path = tmp_path_factory.mktemp("nearly")
    with pytest.raises(Killed):
        attempt(run(OFTEN), data, path, TrainControl(kill=TOTAL - 2))
    return path


@given(draws=st.data())
@settings(of_one_folder, max_examples=12)
def test_a_run_with_a_damaged_checkpoint_ends_or_fails_in_one_line(
    data: Dataset, nearly_done: Path, tmp_path: Path, draws: st.DataObject
) -> None:
    folder = RunDir(tmp_path / "run")
    undamaged_copy(nearly_done, folder.path)
    latest, previous = folder.checkpoints
    latest.write_bytes(draws.draw(damaged_checkpoint(latest.read_bytes())))
    if draws.draw(st.booleans()):
        previous.unlink()
    lease = folder.claim()
    assert lease is not None
    session = TorchSession(CPU, datasets={run().resolved.digest: data})
    execute_run(run(), folder, session, LeaseControl(lease, StopSignal()))
    status = folder.status()
    if status["status"] not in (DONE, DIVERGED):
        error = status["error"]
        assert error.endswith(f"delete {folder.path}/checkpoint to start the run anew")
        assert len(error.splitlines()) == 1
        assert "weights_only" not in error
