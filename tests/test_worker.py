"""Workers: whatever interrupts a run, its results are those of an undisturbed one, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mupsweep import data, plan
from mupsweep.config import load
from mupsweep.records import DIVERGED, DONE, FAILED, PENDING, RUNNING, RunDir, SweepDir, write_json

CPU = ["launcher=inline", "launcher.device=cpu"]
LONG = ["experiment=smoke", *CPU, "training.steps=400", "sweep.width_ratios=[2]", "sweep.log2_lrs=[-7]"]
MANY = ["experiment=smoke", *CPU, "training.steps=10", "sweep.log2_lrs=[-9,-7,-5]", "sweep.seeds=[0,1]"]
DEADLINE = 120.0
OF_THE_CLOCK = ("seconds", "tokens_per_second")  # all else in a summary is a result


def planned(overrides: list[str], out: Path) -> SweepDir:
    """A sweep on disk whose corpus is prepared; nothing is trained."""
    config = load([*overrides, f"out={out}"])
    data.prepare(config.variants[0].data)
    return plan.save(config, "")[0]


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mupsweep", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **environment})


def work(sweep: SweepDir, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A worker process, to its end."""
    process = start("worker", str(sweep.path), "--device", "cpu", *arguments, **environment)
    out, err = process.communicate(timeout=DEADLINE)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until something is true, while the process lives."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        try:
            process.wait(0.01)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"the process ended early: {process.communicate()}")


def results(sweep: SweepDir) -> dict[str, tuple[dict[str, object], bytes]]:
    """What every run came to: its summary without the clock, and the bytes of its metrics."""
    found = {}
    for row in sweep.read_plan():
        run = sweep.run(row["run_id"])
        summary = run.summary()
        assert summary is not None, f"{run.run_id}: {run.status()}"
        found[run.run_id] = (
            {k: v for k, v in summary.items() if k not in OF_THE_CLOCK},
            run.metrics_path.read_bytes(),
        )
    return found


def rows(run: RunDir) -> int:
    """How many rows a run has logged; it may be writing."""
    return run.metrics_path.read_bytes().count(b"\n") if run.metrics_path.exists() else 0


def statuses(sweep: SweepDir) -> dict[str, str]:
    return {row["run_id"]: sweep.run(row["run_id"]).status()["status"] for row in sweep.read_plan()}


def owners(sweep: SweepDir, run_id: str) -> int:
    """How often a run was claimed."""
    return len(list((sweep.run(run_id).path / "claims").glob("*.json")))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[list[str]], SweepDir]]:
    """Sweeps trained by one worker in one go, made once each."""
    made: dict[str, SweepDir] = {}

    def get(overrides: list[str]) -> SweepDir:
        key = " ".join(overrides)
        if key not in made:
            made[key] = planned(overrides, tmp_path_factory.mktemp("undisturbed"))
            done = work(made[key])
            assert done.returncode == 0, done.stderr
        return made[key]

    yield get


def test_a_worker_stopped_by_every_signal_in_turn_leaves_checkpoints_and_ends_with_the_same_bits(
    tmp_path: Path, undisturbed: Callable[[list[str]], SweepDir]
) -> None:
    sweep = planned(LONG, tmp_path)
    run = sweep.run(sweep.read_plan()[0]["run_id"])
    latest, _ = run.checkpoints
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        worker = start("worker", str(sweep.path), "--device", "cpu")
        goal = rows(run) + 10
        until(lambda goal=goal: run.status()["status"] == RUNNING and rows(run) >= goal, worker)
        worker.send_signal(number)
        out, err = worker.communicate(timeout=DEADLINE)
        assert (worker.returncode, out, err) == (130, "", "")
        assert latest.stat().st_size > 0
        assert run.status() == {"status": PENDING}
        assert not run.is_claimed()
        assert run.summary() is None

    done = work(sweep)
    assert done.returncode == 0, done.stderr
    assert run.log_path.read_text().count("resuming at step") == 4
    assert results(sweep) == results(undisturbed(LONG))
    assert not latest.parent.exists()
    assert owners(sweep, run.run_id) == 5


@pytest.mark.parametrize("minutes", [0, 10])
def test_a_killed_workers_run_goes_on_to_the_same_bits(
    minutes: int, tmp_path: Path, undisturbed: Callable[[list[str]], SweepDir]
) -> None:
    sweep = planned([*LONG, f"training.checkpoint_minutes={minutes}"], tmp_path)
    run = sweep.run(sweep.read_plan()[0]["run_id"])
    latest, previous = run.checkpoints
    worker = start("worker", str(sweep.path), "--device", "cpu")
    until(lambda: rows(run) > 5 and (minutes > 0 or previous.exists()), worker)
    worker.kill()
    worker.communicate(timeout=DEADLINE)
    assert worker.returncode == -signal.SIGKILL
    assert run.summary() is None
    assert latest.exists() == (minutes == 0)
    assert sweep.state(run.run_id) == {"status": PENDING}

    done = work(sweep)
    assert done.returncode == 0, done.stderr
    assert ("resuming at step" in run.log_path.read_text()) == (minutes == 0)
    assert results(sweep) == results(undisturbed(LONG))


def test_damage_that_a_crash_leaves_does_not_change_a_runs_results(
    tmp_path: Path, undisturbed: Callable[[list[str]], SweepDir]
) -> None:
    sweep = planned([*LONG, "training.checkpoint_minutes=0"], tmp_path)
    run = sweep.run(sweep.read_plan()[0]["run_id"])
    latest, previous = run.checkpoints
    worker = start("worker", str(sweep.path), "--device", "cpu")
    until(previous.exists, worker)
    worker.kill()
    worker.communicate(timeout=DEADLINE)
    shutil.copy(previous, tmp_path / "kept.pt")
    latest.write_bytes(
        (tmp_path / "kept.pt").read_bytes()[:1000]
    )  # a checkpoint cut short: the one before it counts
    with run.metrics_path.open("a") as file:
        file.write('{"step": 300, "tok')  # a line cut short
    run.status_path.write_text("")

    done = work(sweep)
    assert done.returncode == 0, done.stderr
    assert statuses(sweep) == {run.run_id: DONE}, run.status()
    log = run.log_path.read_text()
    assert "latest.pt cannot be read" in log
    assert "resuming at step" in log
    assert results(sweep) == results(undisturbed(LONG))


def test_two_workers_at_once_train_every_run_once_with_the_results_of_one(
    tmp_path: Path, undisturbed: Callable[[list[str]], SweepDir]
) -> None:
    sweep = planned(MANY, tmp_path)
    both = [start("worker", str(sweep.path), "--device", "cpu") for _ in range(2)]
    for worker in both:
        _, err = worker.communicate(timeout=DEADLINE)
        assert worker.returncode == 0, err
    assert results(sweep) == results(undisturbed(MANY))
    assert len(statuses(sweep)) == 12
    assert {owners(sweep, run_id) for run_id in statuses(sweep)} == {1}


def test_the_named_runs_alone_are_trained_and_those_that_are_done_never_again(
    tmp_path: Path, undisturbed: Callable[[list[str]], SweepDir]
) -> None:
    sweep = planned(MANY, tmp_path)
    first, second = (row["run_id"] for row in sweep.read_plan()[:2])
    assert work(sweep, first, second).returncode == 0
    assert [run_id for run_id, status in statuses(sweep).items() if status == DONE] == [first, second]
    whole = undisturbed(MANY)
    before = {p: p.stat().st_mtime_ns for p in whole.path.glob("runs/*/*")}
    assert work(whole).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in whole.path.glob("runs/*/*")} == before


def test_a_failing_run_is_recorded_with_its_traceback_and_the_others_go_on(tmp_path: Path) -> None:
    sweep = planned([*MANY, "sweep.seeds=[0]"], tmp_path)
    broken = sweep.read_plan()[0]["run_id"]  # the first that a worker takes
    (sweep.run(broken).path / "groups.json").mkdir(parents=True)  # a folder where it writes a file
    (sweep.run(broken).path / "groups.json" / "x").touch()
    done = work(sweep)
    assert done.returncode == 0, done.stderr
    found = statuses(sweep)
    assert found.pop(broken) == FAILED
    assert set(found.values()) == {DONE}
    assert len(found) == 5
    assert "groups.json" in sweep.run(broken).status()["error"]
    assert "cannot write" in sweep.run(broken).log_path.read_text()
    assert not sweep.run(broken).is_claimed()

    assert work(sweep).returncode == 0  # a worker leaves what failed alone; `mupsweep run` retries
    assert owners(sweep, broken) == 1


def test_an_unforeseen_error_is_recorded_with_its_traceback_and_run_retries_it(tmp_path: Path) -> None:
    # an optimizer of the user's own that fails in one run and not in the others
    (tmp_path / "brittle.py").write_text(
        "from dataclasses import dataclass\n"
        "from pathlib import Path\n"
        "from mupsweep.optimizers.adamw import AdamW\n\n\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Brittle(AdamW):\n"
        "    def build(self, groups):\n"
        "        if groups[0]['lr'] > 2**-6 and not Path('mended').exists():\n"
        "            raise ZeroDivisionError('brittle')\n"
        "        return super().build(groups)\n"
    )
    chosen = [
        "experiment=smoke",
        *CPU,
        "training.steps=20",
        "optimizer.kind=brittle.Brittle",
        "allow_imports=true",
    ]
    arguments = ["run", *chosen, "sweep.width_ratios=[1]"]
    first = start(*arguments, PYTHONPATH=str(tmp_path))
    _, err = first.communicate(timeout=DEADLINE)
    sweep = SweepDir.open("sweeps/smoke")
    by_lr = {row["log2_lr"]: sweep.run(row["run_id"]) for row in sweep.read_plan()}
    assert {lr: run.status()["status"] for lr, run in by_lr.items()} == {-9: DONE, -7: DONE, -5: FAILED}
    broken = by_lr[-5.0]
    assert broken.status() == {"status": FAILED, "error": "ZeroDivisionError: brittle"}
    log = broken.log_path.read_text()
    assert "Traceback (most recent call last)" in log
    assert "brittle.py" in log
    assert first.returncode == 1
    assert err.strip().splitlines()[-1] == (
        f"1 runs failed, the first is {broken.run_id} (see {broken.log_path}); run the same command to retry"
    )

    (tmp_path / "mended").touch()
    second = start(*arguments, PYTHONPATH=str(tmp_path))
    _, err = second.communicate(timeout=DEADLINE)
    assert second.returncode == 0, err
    assert broken.status() == {"status": DONE}
    assert [owners(sweep, run.run_id) for run in by_lr.values()] == [2, 1, 1]


def test_a_diverged_run_is_a_result_that_is_never_retried(tmp_path: Path) -> None:
    diverging = [
        "experiment=smoke",
        *CPU,
        "sweep.width_ratios=[1]",
        "sweep.log2_lrs=[9,-7]",
        "training.clip=null",
    ]
    sweep = planned(diverging, tmp_path)
    done = work(sweep)
    assert done.returncode == 0, done.stderr
    by_lr = {row["log2_lr"]: sweep.run(row["run_id"]) for row in sweep.read_plan()}
    assert by_lr[-7.0].status() == {"status": DONE}
    assert by_lr[9.0].status() == {"status": DIVERGED}
    summary = by_lr[9.0].summary()
    assert summary is not None
    assert summary["status"] == DIVERGED
    assert summary["val_loss"] is None
    assert 1 <= summary["diverged_at_step"] == summary["steps"] < 30
    assert "NaN" not in by_lr[9.0].summary_path.read_text() + by_lr[9.0].metrics_path.read_text()
    assert not by_lr[9.0].checkpoints[0].exists()

    before = by_lr[9.0].summary_path.read_bytes()
    assert work(sweep).returncode == 0
    assert owners(sweep, by_lr[9.0].run_id) == 1
    assert by_lr[9.0].summary_path.read_bytes() == before


def test_no_record_holds_a_secret_of_the_environment(tmp_path: Path) -> None:
    secret = "0123456789abcdef" * 2
    command = [
        "run",
        "experiment=smoke",
        *CPU,
        "sweep.width_ratios=[1]",
        "sweep.log2_lrs=[-7]",
        f"out={tmp_path}/s",
    ]
    process = start(*command, WANDB_API_KEY=secret, HF_TOKEN=secret, SOME_PASSWORD=secret)
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, err
    files = [p for p in (tmp_path / "s").rglob("*") if p.is_file()]
    assert {"environment.json", "config.yaml", "summary.json", "report.html"} <= {p.name for p in files}
    assert [p.name for p in files if secret.encode() in p.read_bytes()] == []


def test_a_run_that_another_worker_took_over_is_left_to_it(tmp_path: Path) -> None:
    sweep = planned(LONG, tmp_path)
    run = sweep.run(sweep.read_plan()[0]["run_id"])
    worker = start("worker", str(sweep.path), "--device", "cpu")
    until(lambda: rows(run) > 5, worker)
    mine = run.path / "claims" / "0000.json"
    write_json(run.path / "claims" / "0001.json", {**json.loads(mine.read_text()), "host": "elsewhere"})
    _, err = worker.communicate(timeout=DEADLINE)
    assert worker.returncode == 0, err
    assert run.summary() is None
    assert run.status()["status"] == "running"
    assert run.is_claimed()
    assert "another worker took this run over" in run.log_path.read_text()
