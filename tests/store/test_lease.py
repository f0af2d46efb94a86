"""Claims under contention: 64 workers on one sweep train every run once, and a claim costs what it costs one worker."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from mupsweep.analysis.labels import DONE
from mupsweep.atomic_files import write_json
from mupsweep.data import prepare
from mupsweep.store.run_dir import RUNNING, RunDir
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.config import load
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.trackers.live import LiveTracker
from mupsweep.training import worker
from mupsweep.training.session import TorchSession
from mupsweep.training.signals import StopSignal

WORKERS, SEEDS, LRS = 64, 32, 32
RUNS = SEEDS * LRS
LISTING = ("os.listdir", "os.scandir")  # what audit events call it
CALLS = ("open", "os.mkdir", "os.link", "os.rename", "os.remove", "os.utime", *LISTING)
PER_CLAIM = 16  # the claim and its release, and the records: each a new file that is renamed; two folders


def finish(folder: RunDir) -> None:
    """In place of training: the records of a run that takes no time."""
    folder.write_status(RUNNING, durable=False)
    with (folder.path / "trained").open("a") as file:
        file.write("once\n")
    folder.write_summary({"run_id": folder.run_id, "status": DONE})
    folder.write_status(DONE)


def work(sweep: SweepDir, start: Any, answer: Path) -> None:
    """One worker's whole way through the sweep; answers the runs it took, and its calls on the sweep's files."""
    calls: Counter[str] = Counter()
    listed: Counter[str] = Counter()
    taken: list[str] = []

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CALLS and str(arguments[0]).startswith(str(sweep.path)):
            calls[event] += 1
            if event in LISTING:
                listed[Path(str(arguments[0])).name] += 1

    def load_and_wait(folder: SweepDir) -> list[RunSpec]:
        runs = plan_of(folder)
        start.wait()  # all begin at the same moment
        sys.addaudithook(count)
        return runs

    def note(run: RunSpec, folder: RunDir, *_: Any) -> None:
        taken.append(folder.run_id)
        finish(folder)

    plan_of, plan.load, worker.execute_run = plan.load, load_and_wait, note
    with LiveTracker(sweep) as tracker:
        worker.run_main(sweep, (), TorchSession(torch.device("cpu")), StopSignal(), lambda: None, tracker)
    answer.write_text(json.dumps({"taken": taken, "calls": dict(calls), "listed": dict(listed)}))


def led(sweep: SweepDir, monkeypatch: pytest.MonkeyPatch, stop: StopSignal) -> tuple[bool, list[str]]:
    """How a worker ends, and the runs that it trained, in that order."""
    taken: list[str] = []

    def note(run: RunSpec, folder: RunDir, *_: Any) -> None:
        taken.append(folder.run_id)
        finish(folder)

    monkeypatch.setattr(worker, "execute_run", note)
    with LiveTracker(sweep) as tracker:
        done = worker.run_main(sweep, (), TorchSession(torch.device("cpu")), stop, lambda: None, tracker)
    return done, taken


def test_a_run_that_two_workers_died_of_is_trained_after_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, runs = plan.save(load(["experiment=smoke"]), "")
    deadly, unlucky, *_ = ids = [run.run_id for run in runs]
    for run_id in (deadly, deadly, unlucky):
        claim = sweep.run(run_id).claim()
        assert claim is not None
        write_json(claim.path, {**claim.owner, "born": "1"})
    assert led(sweep, monkeypatch, StopSignal()) == (True, [*ids[1:], deadly])


def test_a_worker_that_is_told_to_stop_before_it_begins_a_run_builds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, runs = plan.save(load(["experiment=smoke"]), "")
    assert led(sweep, monkeypatch, StopSignal(signalled=True)) == (False, [])
    assert not any(sweep.run(run.run_id).is_claimed() for run in runs)


@pytest.mark.slow
def test_64_workers_train_every_run_once_with_a_bounded_number_of_calls(tmp_path: Path) -> None:
    lrs = ",".join(f"{-16 + i / 2:g}" for i in range(LRS))
    overrides = ["experiment=smoke", "sweep.width_ratios=[1]", f"sweep.log2_lrs=[{lrs}]", f"out={tmp_path}"]
    sweep, runs = plan.save(load([*overrides, f"sweep.seeds={list(range(SEEDS))}".replace(" ", "")]), "")
    prepare(runs[0].resolved.variant.data)
    context = multiprocessing.get_context("fork")
    start = context.Barrier(WORKERS)
    answers = [tmp_path / f"{i}.json" for i in range(WORKERS)]
    processes = [context.Process(target=work, args=(sweep, start, answer)) for answer in answers]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * WORKERS

    lines = [json.loads(answer.read_text()) for answer in answers]
    assert Counter(run_id for one in lines for run_id in one["taken"]) == {run.run_id: 1 for run in runs}
    assert {(sweep.run(run.run_id).path / "trained").read_text() for run in runs} == {"once\n"}
    assert sweep.counts() == {DONE: RUNS}
    assert not [run.run_id for run in runs if sweep.run(run.run_id).is_open() or sweep.run(run.run_id).is_claimed()]
    for one in lines:
        looks, claims = sum(one["listed"].values()), one["calls"].get("os.link", 0)
        assert set(one["listed"]) <= {"claims"}  # no list that grows with the sweep
        assert looks <= RUNS  # of a run that is not finished the claims are listed, once, and the newest is read
        assert sum(one["calls"].values()) <= RUNS + 2 * looks + PER_CLAIM * claims
