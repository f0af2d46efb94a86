"""Claims of Slurm jobs: taken over as soon as Slurm says that their job is over, and never before."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_slurm import Fake

from mupsweep.store import lease


@pytest.fixture
def foreign(tmp_path: Path) -> Callable[..., Path]:
    """A claim of another host by a job of this cluster, whose owner has missed two heartbeats."""

    def made(silent: float = lease.HEARTBEAT_GRACE + 1, **owner: str | None) -> Path:
        folder = tmp_path / "claims"
        claim = lease.acquire(folder)
        assert claim is not None
        job = {"slurm_cluster": "here", "slurm_job": "50_3", "slurm_restarts": None}
        claim.path.write_text(json.dumps({**claim.owner, "host": "another", **job, **owner}))
        last = claim.path.stat().st_mtime - silent
        os.utime(claim.path, (last, last))
        return folder

    return made


@pytest.fixture
def in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "60")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "50")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")


def test_a_claim_names_the_task_of_its_array(slurm: Fake, in_a_job: None, tmp_path: Path) -> None:
    claim = lease.acquire(tmp_path / "claims")
    assert claim is not None
    expected = {"slurm_cluster": "here", "slurm_job": "50_4", "slurm_restarts": None}
    assert {key: claim.owner[key] for key in expected} == expected


def test_a_claim_of_a_job_that_is_over_is_taken_over_at_once(
    slurm: Fake, in_a_job: None, foreign: Callable[..., Path]
) -> None:
    folder = foreign()
    slurm.queue("50_3|RUNNING|None")
    assert lease.acquire(folder) is None
    assert slurm.calls("squeue") == ["--noheader --array --format=%i|%T|%r --jobs=50_3"]
    slurm.queue()
    assert lease.acquire(folder) is not None


def test_a_claim_of_a_job_that_slurm_has_forgotten_is_taken_over_at_once(
    slurm: Fake, in_a_job: None, foreign: Callable[..., Path]
) -> None:
    slurm.write("squeue-says", "Invalid job id specified")
    assert lease.acquire(foreign()) is not None


def test_a_restarted_job_takes_over_what_it_had_on_another_node(
    slurm: Fake, in_a_job: None, foreign: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.queue("50_4|RUNNING|None")
    folder = foreign(slurm_job="50_4")
    assert lease.acquire(folder) is None  # another node of this very job
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert lease.acquire(folder) is not None
    assert slurm.calls("squeue") == []


@pytest.mark.parametrize("beats", [False, True])
def test_a_claim_whose_job_slurm_does_not_know_is_taken_over_once_it_misses_its_heartbeats(
    beats: bool, slurm: Fake, in_a_job: None, foreign: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A controller that lost its state does not know the jobs that still run, and numbers new ones from 1 again."""
    slurm.queue()
    folder = foreign(silent=0.0)
    path = lease.newest(folder)
    assert path is not None
    slept: list[float] = []

    def sleep(seconds: float) -> None:  # as long as it takes, in no time
        slept.append(seconds)
        late = path.stat().st_mtime + seconds
        if beats and len(slept) == 5:
            os.utime(path, (late, late))

    clock = SimpleNamespace(time=time.time, monotonic=lambda: sum(slept), sleep=sleep)  # of claims, not of subprocess
    monkeypatch.setattr(lease, "time", clock)
    assert (lease.acquire(folder) is None) == beats
    assert len(slept) == 5 if beats else lease.HEARTBEAT_GRACE - 2 < sum(slept) < lease.HEARTBEAT_GRACE + 1


def test_a_dead_owner_whose_jobs_number_is_another_jobs_by_now_goes_stale_like_any_other(
    slurm: Fake, in_a_job: None, foreign: Callable[..., Path]
) -> None:
    slurm.queue("50_3|RUNNING|None")
    folder = foreign()
    assert lease.acquire(folder) is None
    path = lease.newest(folder)
    assert path is not None
    os.utime(path, (0, 0))
    assert lease.acquire(folder) is not None


def test_a_claim_is_left_alone_where_slurm_cannot_tell(
    slurm: Fake, in_a_job: None, foreign: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.queue()
    for owner in ({"slurm_cluster": "there"}, {"slurm_job": None}):
        folder = foreign(**owner)
        assert lease.acquire(folder) is None
        lease.newest(folder).unlink()  # type: ignore[union-attr]
    folder = foreign()
    (slurm.folder / "queue").unlink()
    slurm.write("squeue-says", "Unable to contact slurm controller")
    assert lease.acquire(folder) is None
    slurm.queue()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: os.geteuid() + 1)
        assert lease.acquire(folder) is None  # somebody else's, whose jobs squeue may not show
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID")
    assert lease.acquire(folder) is None  # not a job itself: it may be on another cluster
