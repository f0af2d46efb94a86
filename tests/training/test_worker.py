"""Workers: whatever interrupts a run, its results are those of an undisturbed one, bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from command_line import mupsweep
from forked import Forked
from outcome import results
from polling import DEADLINE, until

from mupsweep import data
from mupsweep.analysis.labels import DIVERGED, DONE
from mupsweep.atomic_files import write_json
from mupsweep.store.run_dir import FAILED, PENDING, RUNNING, RunDir
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.config import load
from mupsweep.training import devices, session
from mupsweep.training import worker as working
from mupsweep.training.distributed import DistributedContext
from mupsweep.training.session import TorchSession, run_replica
from mupsweep.training.signals import StopSignal

CPU = ["launcher=inline", "launcher.device=cpu"]
LONG = ["experiment=smoke", *CPU, "training.steps=250", "sweep.width_ratios=[2]", "sweep.log2_lrs=[-7]"]
MANY = ["experiment=smoke", *CPU, "training.steps=10", "sweep.log2_lrs=[-9,-7,-5]", "sweep.seeds=[0,1]"]


def planned(overrides: list[str], out: Path) -> SweepDir:
    """A sweep on disk whose corpus is prepared; nothing is trained."""
    config = load([*overrides, f"out={out}"])
    data.prepare(config.variants[0].data)
    return plan.save(config, "")[0]


def work(sweep: SweepDir, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A worker in this process, to its end."""
    command = ("worker", str(sweep.path), "--device", "cpu", *arguments)
    return subprocess.CompletedProcess(command, *mupsweep(*command))


def kill(process: Forked) -> None:
    process.kill()
    process.communicate(timeout=DEADLINE)
    assert process.returncode == -signal.SIGKILL


def rows(run: RunDir) -> int:
    """How many rows a run has logged; it may be writing."""
    return run.metrics_path.read_bytes().count(b"\n") if run.metrics_path.exists() else 0


def statuses(sweep: SweepDir) -> dict[str, str]:
    return {row["run_id"]: sweep.run(row["run_id"]).status()["status"] for row in sweep.read_plan()}


def owners(sweep: SweepDir, run_id: str) -> int:
    """How many leases of a run were taken."""
    return len(list((sweep.run(run_id).path / "claims").glob("*.json")))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], SweepDir]:
    """Sweeps trained by one worker in one go, each only once."""
    sweeps: dict[str, SweepDir] = {}

    def get(overrides: list[str]) -> SweepDir:
        key = " ".join(overrides)
        if key not in sweeps:
            sweeps[key] = planned(overrides, tmp_path_factory.mktemp("undisturbed"))
            done = work(sweeps[key])
            assert done.returncode == 0, done.stderr
        return sweeps[key]

    return get


@pytest.mark.parametrize(
    "signals",
    [
        (signal.SIGTERM, signal.SIGINT),
        pytest.param((signal.SIGUSR1, signal.SIGUSR2), marks=pytest.mark.slow),
    ],
)
def test_a_worker_stopped_by_one_signal_after_the_other_leaves_checkpoints_and_ends_with_the_same_bits(
    signals: tuple[signal.Signals, ...], tmp_path: Path, undisturbed: Callable[[list[str]], SweepDir]
) -> None:
    sweep = planned(LONG, tmp_path)
    run = sweep.run(sweep.read_plan()[0]["run_id"])
    latest, _ = run.checkpoints
    for number in signals:
        worker = Forked("worker", str(sweep.path), "--device", "cpu")
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
    assert run.log_path.read_text().count("resuming at step") == 2
    assert results(sweep) == results(undisturbed(LONG))
    assert not latest.parent.exists()
    assert owners(sweep, run.run_id) == 3


def test_a_run_killed_before_its_first_checkpoint_starts_over_to_the_same_bits(
    tmp_path: Path, undisturbed: Callable[[list[str]], SweepDir]
) -> None:
    sweep = planned(LONG, tmp_path)
    run = sweep.run(sweep.read_plan()[0]["run_id"])
    worker = Forked("worker", str(sweep.path), "--device", "cpu")
    until(lambda: rows(run) > 5, worker)
    kill(worker)
    assert run.summary() is None
    assert not run.checkpoints[0].exists()
    assert sweep.state(run.run_id) == {"status": PENDING}
    done = work(sweep)
    assert done.returncode == 0, done.stderr
    assert "resuming" not in run.log_path.read_text()
    assert results(sweep) == results(undisturbed(LONG))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> SweepDir:
    """A sweep whose only run was killed in the middle, with a checkpoint at every step."""
    sweep = planned([*LONG, "training.checkpoint_minutes=0"], tmp_path_factory.mktemp("killed"))
    run = sweep.run(sweep.read_plan()[0]["run_id"])
    worker = Forked("worker", str(sweep.path), "--device", "cpu")
    until(lambda: rows(run) > 5 and run.checkpoints[1].exists(), worker)
    kill(worker)
    return sweep


def resumed(sweep: SweepDir, run: RunDir) -> None:
    """Finish a killed sweep; it went on from a checkpoint."""
    done = work(sweep)
    assert done.returncode == 0, done.stderr
    assert run.status() == {"status": DONE}
    assert "resuming at step" in run.log_path.read_text()


def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_bits(
    killed: SweepDir, tmp_path: Path, undisturbed: Callable[[list[str]], SweepDir]
) -> None:
    sweep = SweepDir(shutil.copytree(killed.path, tmp_path / "copy"))
    resumed(sweep, sweep.run(sweep.read_plan()[0]["run_id"]))
    assert results(sweep) == results(undisturbed(LONG))


def test_files_cut_short_by_a_crash_do_not_change_a_runs_results(
    killed: SweepDir, tmp_path: Path, undisturbed: Callable[[list[str]], SweepDir]
) -> None:
    sweep = SweepDir(shutil.copytree(killed.path, tmp_path / "copy"))
    run = sweep.run(sweep.read_plan()[0]["run_id"])
    latest, previous = run.checkpoints
    latest.write_bytes(previous.read_bytes()[:1000])  # the one before it counts
    with run.metrics_path.open("a") as file:
        file.write('{"step": 300, "tok')
    run.status_path.write_text("")
    resumed(sweep, run)
    assert "latest.pt is damaged; trying an older one" in run.log_path.read_text()
    assert results(sweep) == results(undisturbed(LONG))


def test_two_workers_at_once_train_every_run_once_with_the_results_of_one(
    tmp_path: Path, undisturbed: Callable[[list[str]], SweepDir]
) -> None:
    sweep = planned(MANY, tmp_path)
    both = [Forked("worker", str(sweep.path), "--device", "cpu") for _ in range(2)]
    for worker in both:
        _, err = worker.communicate(timeout=DEADLINE)
        assert worker.returncode == 0, err
    assert results(sweep) == results(undisturbed(MANY))
    assert len(statuses(sweep)) == 12
    assert {owners(sweep, run_id) for run_id in statuses(sweep)} == {1}


def test_a_replica_knows_the_runs_that_were_planned_after_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["experiment=smoke", f"out={tmp_path}"]
    sweep, old = plan.save(load(overrides), "")
    trained: list[str] = []

    class Second(DistributedContext):
        def wait_for_run_id(self) -> str:
            """The run that rank 0 begins: one that another command has just planned; then none."""
            self.run_counter += 1
            if self.run_counter > 1:
                return ""
            return next(run.run_id for run in plan.save(load([*overrides, "sweep.seeds=[1]"]), "")[1] if run not in old)

    monkeypatch.setattr("mupsweep.training.session.train", lambda run, *_: trained.append(run.run_id))
    assert run_replica(sweep, TorchSession(torch.device("cpu"), Second(rank=1)), StopSignal())
    assert len(trained) == 1


def test_a_failing_run_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    sweep = planned([*MANY, "sweep.seeds=[0]"], tmp_path)
    broken, second, *others = (row["run_id"] for row in sweep.read_plan())
    groups = sweep.run(broken).path / "groups.json"  # a folder where the first run that a worker takes writes a file
    (groups / "inside").mkdir(parents=True)
    done = work(sweep, second, broken)  # only the named runs
    assert done.returncode == 0, done.stderr
    assert statuses(sweep) == {broken: FAILED, second: DONE, **dict.fromkeys(others, PENDING)}
    assert "groups.json" in sweep.run(broken).status()["error"]
    assert "cannot write" in sweep.run(broken).log_path.read_text()
    assert not sweep.run(broken).is_claimed()

    assert work(sweep).returncode == 0  # a worker leaves what failed alone; `mupsweep run` tries again
    assert statuses(sweep) == {broken: FAILED, second: DONE, **dict.fromkeys(others, DONE)}
    assert {owners(sweep, run_id) for run_id in statuses(sweep)} == {1}


SECRET = "0123456789abcdef" * 2
BRITTLE = """
from dataclasses import dataclass
from pathlib import Path
from mupsweep.optimizers.adamw import AdamW

@dataclass(frozen=True, kw_only=True)
class Brittle(AdamW):
    def build(self, groups):
        if groups[0]["lr"] > 2**-6 and not Path(__file__).with_name("mended").exists():
            raise ZeroDivisionError("brittle")
        return super().build(groups)
"""


@pytest.fixture(scope="module")
def mended(tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepDir, list[tuple[int, str, dict[float, object]]]]:
    """A sweep with an optimizer of the user's own that raises in one run, run, then mended and run again.

    Returns it with (exit code, stderr, status per LR) of both commands; secrets are in the environment of both.
    """
    folder = tmp_path_factory.mktemp("mended")
    (folder / "brittle.py").write_text(BRITTLE)
    kind = ["optimizer.kind=brittle.Brittle", "allow_imports=true"]
    overrides = ["experiment=smoke", *CPU, *kind, "training.steps=10", "sweep.width_ratios=[1]", f"out={folder}"]
    secrets = {"WANDB_API_KEY": SECRET, "HF_TOKEN": SECRET, "SOME_PASSWORD": SECRET}
    sweep, outcomes = SweepDir(folder / "smoke"), []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(folder)
        for name, secret in secrets.items():
            monkeypatch.setenv(name, secret)
        for _ in range(2):
            code, _, err = mupsweep("run", *overrides)
            status_of = {row["log2_lr"]: sweep.run(row["run_id"]).status() for row in sweep.read_plan()}
            outcomes.append((code, err, status_of))
            (folder / "mended").touch()
    return sweep, outcomes


def test_an_unforeseen_error_is_recorded_with_its_traceback_and_run_tries_again(
    mended: tuple[SweepDir, list[tuple[int, str, dict[float, object]]]],
) -> None:
    sweep, ((code, err, status_of), (code_again, err_again, status_again)) = mended
    assert status_of == {
        -8: {"status": DONE},
        -6: {"status": DONE},
        -5: {"status": FAILED, "error": "ZeroDivisionError: brittle"},
    }
    broken = next(sweep.run(row["run_id"]) for row in sweep.read_plan() if row["log2_lr"] == -5)
    log = broken.log_path.read_text()
    assert "Traceback (most recent call last)" in log
    assert "brittle.py" in log
    assert err.strip().splitlines()[-1] == (
        f"1 run failed, the first is {broken.run_id} (see {broken.log_path}); run the same command to retry"
    )
    assert code == 1
    assert status_again == {lr: {"status": DONE} for lr in (-8, -6, -5)}
    assert code_again == 0, err_again
    assert sorted(owners(sweep, run_id) for run_id in statuses(sweep)) == [1, 1, 2]


def test_no_record_holds_a_secret_of_the_environment(
    mended: tuple[SweepDir, list[tuple[int, str, dict[float, object]]]],
) -> None:
    files = [p for p in mended[0].path.rglob("*") if p.is_file()]
    assert {"environment.json", "config.yaml", "summary.json", "train.log", "plan.jsonl"} <= {p.name for p in files}
    assert [p.name for p in files if SECRET.encode() in p.read_bytes()] == []


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


def test_a_run_that_another_worker_took_over_is_left_to_it(tmp_path: Path) -> None:
    sweep = planned([*LONG, "training.steps=100"], tmp_path)
    run = sweep.run(sweep.read_plan()[0]["run_id"])
    worker = Forked("worker", str(sweep.path), "--device", "cpu")
    until(lambda: rows(run) > 0, worker)
    first_lease = run.path / "claims" / "0000.json"
    write_json(run.path / "claims" / "0001.json", {**json.loads(first_lease.read_text()), "host": "elsewhere"})
    _, err = worker.communicate(timeout=DEADLINE)
    assert worker.returncode == 0, err
    assert run.summary() is None
    assert run.status()["status"] == "running"
    assert run.is_claimed()
    assert "another worker took this run over" in run.log_path.read_text()


GPU_SETTINGS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_NVLS_ENABLE": "0", "NCCL_COLLNET_ENABLE": "0"}


def test_a_gpu_is_set_to_repeat_its_bits_before_the_ranks_meet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NCCL omits the algorithm that does not repeat its bits if torch is deterministic when the group forms."""
    seen: list[object] = []

    @contextlib.contextmanager
    def met(*_: object) -> Iterator[DistributedContext]:
        seen.append(torch.are_deterministic_algorithms_enabled())
        seen.append({name: os.environ.get(name) for name in GPU_SETTINGS})
        yield DistributedContext()

    torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 in the environment does
    for name in GPU_SETTINGS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(
            name, {"RANK": "9", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "9"}.get(name, "2")
        )
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    monkeypatch.setattr(devices, "make_handles", lambda _: seen.append(os.environ["CUBLAS_WORKSPACE_CONFIG"]))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append("room"))
    monkeypatch.setattr(session, "process_group", met)
    monkeypatch.setattr(working, "execute_run", lambda *_: None)
    try:
        assert working.execute(planned(MANY, Path("sweeps")), stop=StopSignal())
        assert torch._inductor.config.deterministic  # else torch.compile chooses kernels by how long they take
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.get_float32_matmul_precision() == "highest"
    assert seen[:4] == [torch.device("cuda:1"), ":4096:8", True, GPU_SETTINGS]
    assert seen[4:] == ["room"] * 12  # after every run
