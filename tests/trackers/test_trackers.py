"""Trackers: views of the records that never cost a run."""

from __future__ import annotations

import importlib.util
import logging
import struct
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mupsweep import trackers
from mupsweep.errors import ConfigError
from mupsweep.report.generate import generate
from mupsweep.schema import instantiate
from mupsweep.store.run_dir import RunDir
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.config import choices, load
from mupsweep.trackers import RunLogger
from mupsweep.trackers.live import LiveTracker
from mupsweep.training.worker import execute

SMALL = ["experiment=smoke", "sweep.width_ratios=[1]", "sweep.log2_lrs=[-9,-7]", "sweep.name=tracked"]
PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboardX", "trackio": "trackio"}
KINDS = {"wandb": "wandb.Wandb", "tensorboard": "tensorboard.TensorBoard", "trackio": "trackio.Trackio"}
TRACKERS = choices("tracker")


def planned(*overrides: str) -> SweepDir:
    sweep, _ = plan.save(load([*SMALL, *overrides]), "")
    return sweep


def metrics(run: RunDir) -> list[tuple[int, str, float]]:
    """(step, key, value) of every metric of a run, as trackers log them by step."""
    return sorted(
        (row["step"], key, pytest.approx(value, rel=1e-6))
        for row in run.metrics()
        for key, value in row.items()
        if key not in ("step", "tokens") and value is not None
    )


@pytest.mark.parametrize("name", TRACKERS)
def test_every_tracker_composes_under_its_own_name(name: str) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    assert instantiate(load([f"tracker={name}"]).tracker, "tracker").name == name


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_a_missing_package_is_one_line_that_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ConfigError) as caught:
        instantiate({"name": name, "kind": load([]).tracker["kind"].replace("jsonl.Jsonl", KINDS[name])}, "tracker")
    assert str(caught.value) == f"tracker={name} needs the package {PACKAGES[name]}: pip install {PACKAGES[name]}"


def shown_by_tensorboard(sweep: SweepDir, run: RunDir) -> list[tuple[int, str, float]]:
    from tensorboardX.proto.event_pb2 import Event

    values = []
    for path in (sweep.trackers / "tensorboard" / run.run_id).rglob("events.*"):
        content, at = path.read_bytes(), 0
        while at < len(content):  # a record is its length, a checksum of that, the event, and its checksum
            (length,) = struct.unpack("<Q", content[at : at + 8])
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 16 + length
            keys = ("train_loss", "val_loss", "val_bits_per_byte", "lr", "grad_norm")
            values += [(event.step, v.tag, v.simple_value) for v in event.summary.value if v.tag in keys and event.step]
    return sorted(values)


def shown_by_trackio(sweep: SweepDir, run: RunDir) -> list[tuple[int, str, float]]:
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    (run_in_trackio,) = [r for r in trackio.Api().runs("mupsweep") if r.name == f"{sweep.name}-{run.run_id}"]
    rows = SQLiteStorage.get_logs("mupsweep", run_in_trackio.name, run_id=run_in_trackio.id)
    kept = ("step", "tokens", "timestamp")
    return sorted((row["step"], key, value) for row in rows for key, value in row.items() if key not in kept)


SHOWN: dict[str, Callable[[SweepDir, RunDir], list[tuple[int, str, float]]]] = {
    "tensorboard": shown_by_tensorboard,
    "trackio": shown_by_trackio,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", sorted(SHOWN))
def test_a_local_tracker_shows_every_run_once_also_after_an_interruption(name: str) -> None:
    pytest.importorskip(PACKAGES[name])
    sweep = planned(f"tracker={name}")
    assert execute(sweep)
    runs = [sweep.run(row["run_id"]) for row in sweep.read_plan()]
    assert [SHOWN[name](sweep, run) for run in runs] == [metrics(run) for run in runs]
    interrupted = runs[0]
    rows = interrupted.metrics()
    interrupted.write_metrics([*rows[:10], {**rows[10], "train_loss": 99.0}])  # what a killed worker left there
    generate([sweep])
    assert SHOWN[name](sweep, interrupted) == metrics(interrupted)
    interrupted.write_metrics(rows)
    generate([sweep])
    assert [SHOWN[name](sweep, run) for run in runs] == [metrics(run) for run in runs]
    assert trackers.load(sweep).held(sweep) == {run.run_id: trackers.fingerprint(run) for run in runs}


class Broken:
    """A tracker that fails at everything and counts how often it was called."""

    active = True

    def __init__(self) -> None:
        self.calls = 0

    def open(self, sweep: SweepDir, run: RunDir) -> RunLogger:
        self.calls += 1
        raise OSError("disk on fire:\nsmoke everywhere")

    def held(self, sweep: SweepDir) -> Mapping[str, str]:
        self.calls += 1
        raise OSError("disk on\nfire:\n  smoke everywhere")

    def analysed(self, sweep: SweepDir) -> None:
        raise AssertionError("nothing is held")


def test_a_tracker_that_raises_is_one_warning_and_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Broken()
    monkeypatch.setattr(trackers, "load", lambda sweep: broken)
    sweep = planned()
    with caplog.at_level(logging.WARNING, logger="mupsweep"):
        assert execute(sweep)
    assert sweep.counts()["done"] == 2
    assert broken.calls == 1
    warning = (
        "tracker: OSError: disk on fire: smoke everywhere; the records are complete, "
        f"`mupsweep sync {sweep.path}` mirrors them later"
    )
    assert [r.message for r in caplog.records] == [warning]
    generate([sweep])
    assert [r.message for r in caplog.records] == [warning] * 2


def test_a_tracker_that_is_stuck_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    released = threading.Event()

    class Stuck(Broken):
        def open(self, sweep: SweepDir, run: RunDir) -> RunLogger:
            released.wait()
            return super().open(sweep, run)

    monkeypatch.setattr(trackers, "load", lambda sweep: Stuck())
    run = SweepDir(tmp_path).run("x")
    run.path.mkdir(parents=True)
    warned = caplog.at_level(logging.WARNING, logger="mupsweep")
    with warned, LiveTracker(SweepDir(tmp_path), patience=0.01) as live, live.track(run):
        run.write_metrics([{"step": 1}])
    assert [r.message.split(";")[0] for r in caplog.records] == ["tracker: TimeoutError: still busy after 0.01 s"]
    released.set()
    live.thread.join()


def test_a_run_that_goes_back_to_a_checkpoint_is_shown_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    logs: list[list[Any]] = []

    class Recording(Broken):
        def open(self, sweep: SweepDir, run: RunDir) -> RunLogger:
            logs.append(log := [])

            class Recorder:
                add = log.append
                close = log.append

            return Recorder()  # type: ignore[return-value]

    monkeypatch.setattr(trackers, "load", lambda sweep: Recording())
    monkeypatch.setattr("mupsweep.trackers.live.POLL", 0.001)
    run = SweepDir(tmp_path).run("x")
    run.path.mkdir(parents=True)
    run.write_metrics([{"step": 1}, {"step": 2}])  # of an earlier attempt: the run has not begun yet
    with LiveTracker(SweepDir(tmp_path)) as live, live.track(run):
        run.write_metrics([{"step": 1}])
        run.append_metrics({"step": 2, "again": True})
        run.write_status("done")
    assert logs[-1] == [{"step": 1}, {"step": 2, "again": True}, "done"]
    assert all(log[1] != {"step": 2} for log in logs)
