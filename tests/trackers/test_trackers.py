"""Trackers: views of the records that never cost a run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from mupsweep import plan, trackers
from mupsweep.config import choices, load
from mupsweep.records import SweepDir
from mupsweep.report.conclude import conclude
from mupsweep.sections import instantiate
from mupsweep.worker import execute

SMALL = ["experiment=smoke", "sweep.width_ratios=[1]", "sweep.log2_lrs=[-9,-7,-5]", "sweep.name=tracked"]


def planned(*words: str) -> SweepDir:
    sweep, _ = plan.save(load([*SMALL, *words]), "")
    return sweep


@pytest.mark.parametrize("name", choices("tracker"))
def test_every_tracker_composes_under_its_own_name(name: str) -> None:
    assert instantiate(load([f"tracker={name}"]).tracker, "tracker").name == name


def test_wandb_gets_one_complete_run_per_training_run_and_a_summary_whatever_happens_twice() -> None:
    wandb = pytest.importorskip("wandb")
    sweep = planned("tracker=wandb")
    assert execute(sweep)
    conclude([sweep])
    tracker = trackers.load(sweep)
    for row in sweep.read_plan():  # a retry mirrors again under the same id
        tracker.finished(sweep.run(row["run_id"]))
    conclude([sweep])
    wandb.teardown()
    folders = [p.name for p in (sweep.trackers / "wandb" / "wandb").glob("offline-run-*")]
    ids = sorted(name.split("-", 3)[3] for name in folders)
    assert ids == sorted([*(f"tracked-{row['run_id']}" for row in sweep.read_plan()), "tracked-summary"])


def test_an_unreachable_server_costs_one_wait_and_no_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: nothing listens
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    sweep = planned("tracker=wandb", "tracker.mode=online", "tracker.init_timeout=3")
    with caplog.at_level(logging.WARNING, logger="mupsweep"):
        assert execute(sweep)
    wandb.teardown()
    assert sweep.counts()["done"] == 3
    warnings = [r.message for r in caplog.records if "W&B is out of reach" in r.message]
    assert len(warnings) == 1
    assert len(list((sweep.trackers / "wandb" / "wandb").glob("offline-run-*"))) == 3


def test_a_tracker_that_raises_is_a_warning(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    class Broken:
        def finished(self, *_: Any) -> None:
            raise OSError("disk on fire")

        analysed = finished

    safe = trackers.Safe(Broken(), SweepDir(tmp_path))
    with caplog.at_level(logging.WARNING, logger="mupsweep"):
        safe.finished(SweepDir(tmp_path).run("x"))
        safe.analysed()
    assert [r.message for r in caplog.records] == [
        "tracker: OSError: disk on fire; training goes on, the records are complete"
    ] * 2
