"""On a real Slurm, whatever interrupts a sweep, it ends with the same bits as one process leaves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import NODES, Cluster, missing, until
from outcome import results

from mupsweep import data
from mupsweep.analysis.labels import DONE
from mupsweep.store.run_dir import FINISHED, RUNNING, RunDir
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.config import load

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

SMOKE = ["experiment=smoke", "training.steps=60", "training.checkpoint_minutes=0"]
ON_CPU = ["launcher=slurm", "launcher.device=cpu"]  # the cluster's GPUs are none that torch could use
ONE = ["sweep.width_ratios=[1]", "sweep.log2_lrs=[-7]"]
THREE = ["sweep.width_ratios=[1]", "sweep.log2_lrs=[-9,-8,-7]"]
SMOKE_SECONDS = 60 * 0.004  # what a run is estimated to take: its FLOPs are nothing


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster in a folder with a short name."""
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        slurm = Cluster(Path(folder))
        patch.setenv("SLURM_CONF", str(slurm.conf))
        try:
            slurm.start()
            yield slurm
        finally:
            slurm.stop()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, object], bytes]]:
    """What one process makes of all runs of this file."""
    return trained(tmp_path_factory.mktemp("undisturbed"), "cpu", "sweep.log2_lrs=[-10,-9,-8,-7]")


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, object], bytes]]:
    """What two ranks on one machine make of one run."""
    return trained(tmp_path_factory.mktemp("by-two"), "cpu,cpu", *ONE)


def trained(out: Path, device: str, *overrides: str) -> dict[str, tuple[dict[str, object], bytes]]:
    """What one worker makes of a sweep."""
    config = load([*SMOKE, f"out={out}", *overrides])
    data.prepare(config.variants[0].data)
    sweep = plan.save(config, "")[0]
    subprocess.run([sys.executable, "-m", "mupsweep", "worker", str(sweep.path), "--device", device], check=True)
    return results(sweep)


def mupsweep(*arguments: str) -> tuple[str, str]:
    """(stdout, stderr) of a command that succeeds."""
    command = [sys.executable, "-m", "mupsweep", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def submit(*overrides: str) -> SweepDir:
    """A sweep of this file, handed to Slurm."""
    mupsweep("run", *SMOKE, *ON_CPU, *overrides)
    return SweepDir.open("sweeps/smoke")


def concluded(sweep: SweepDir, seconds: float = 120.0) -> None:
    """Wait until the analysis after the last arrays has ended."""
    last = max(int(job["job"]) for job in sweep.read_jobs())
    until(lambda: show(last)[0]["JobState"] == "COMPLETED", f"the analysis: {logs(sweep)}", seconds)


def show(job: int | str) -> list[dict[str, str]]:
    """What Slurm knows of a job's tasks."""
    command = ["scontrol", "show", "job", "--oneliner", str(job)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
    return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines if line]


def logs(sweep: SweepDir) -> str:
    """What the jobs printed."""
    return "\n".join(f"{path.name}: {path.read_text()}" for path in sorted(sweep.logs.iterdir()))


def owners(run: RunDir) -> list[dict[str, Any]]:
    """Who claimed a run, in order."""
    return [json.loads(path.read_text()) for path in sorted(run.claims.glob("*.json"))]


def only_run(sweep: SweepDir) -> RunDir:
    """The run of a sweep that has one."""
    (row,) = sweep.read_plan()
    return sweep.run(row["run_id"])


def suspended(run: RunDir) -> int:
    """The pid of a run's worker, suspended in the middle of the training: it then takes as long as the test needs."""

    def in_the_middle() -> bool:
        written = run.metrics_path.read_bytes().count(b"\n") if run.metrics_path.exists() else 0
        return run.status()["status"] == RUNNING and written > 3

    until(in_the_middle, f"{run.run_id} to train")
    pid = owners(run)[-1]["pid"]
    os.kill(pid, signal.SIGSTOP)
    assert run.status()["status"] == RUNNING, "it was over before it could be suspended"
    return pid


def has_waiting(pid: int, number: signal.Signals) -> bool:
    """Whether a suspended process was sent a signal."""
    match = re.search(r"^ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return match is not None and bool(int(match[1], 16) >> (number - 1) & 1)


def test_an_array_is_bundled_and_throttled_and_its_analysis_comes_after_it(
    cluster: Cluster, undisturbed: dict[str, tuple[dict[str, object], bytes]]
) -> None:
    minutes = 2.5 * SMOKE_SECONDS / 60  # so that four runs are two tasks
    sweep = submit("sweep.log2_lrs=[-10,-9,-8,-7]", f"launcher.minutes_per_task={minutes}", "launcher.throttle=1")
    concluded(sweep)
    assert results(sweep) == undisturbed
    assert json.loads((sweep.results / "transfer.json").read_text())["groups"][0]["sizes"][1]["n_runs"] == 4

    *arrays, analysis = sorted(sweep.read_jobs(), key=lambda job: int(job["job"]))
    assert [[len(task) for task in job["tasks"]] for job in arrays] == [[2, 2], [2, 2]]
    ends = []
    for job in arrays:
        first, second = sorted(show(job["job"]), key=lambda task: task["StartTime"])
        assert first["ArrayTaskThrottle"] == second["ArrayTaskThrottle"] == "1"
        assert first["EndTime"] <= second["StartTime"]
        ends.append(second["EndTime"])
        for index, task in enumerate(job["tasks"]):
            claims = [owners(sweep.run(run_id)) for run_id in task]
            assert [[c["slurm_job"] for c in claim] for claim in claims] == [[f"{job['job']}_{index}"]] * 2
            assert len({claim[0]["pid"] for claim in claims}) == 1  # one process for the bundle
    assert show(analysis["job"])[0]["StartTime"] >= max(ends)
    assert len(re.findall(r"GPUs: [01]: ", logs(sweep))) == 4


def test_a_time_limit_interrupts_a_run_that_goes_on_in_a_new_job(
    cluster: Cluster, undisturbed: dict[str, tuple[dict[str, object], bytes]]
) -> None:
    # Slurm may signal a minute early, and a busy machine needs 20 s until it trains.
    sweep = submit(*ONE, "launcher.time='00:03:00'", "launcher.signal_seconds=90")
    run = only_run(sweep)
    pid = suspended(run)
    until(lambda: has_waiting(pid, signal.SIGUSR1), "the signal before the time limit")
    os.kill(pid, signal.SIGCONT)
    concluded(sweep)
    assert results(sweep).items() <= undisturbed.items()
    attempts = owners(run)
    assert len({claim["slurm_job"] for claim in attempts}) == 1
    assert all(claim["released"] for claim in attempts)
    restarts = [int(claim["slurm_restarts"] or 0) for claim in attempts]
    assert len(restarts) > 1  # on a busy machine the limit may come twice
    assert restarts == sorted(set(restarts))
    assert re.search(r"resuming at step \d+ from ", run.log_path.read_text())


def test_a_preempted_run_goes_on_when_the_node_is_free_again(
    cluster: Cluster, undisturbed: dict[str, tuple[dict[str, object], bytes]]
) -> None:
    sweep = submit(*ONE, "launcher.partition=low", "launcher.cpus=2", "launcher.analysis_options=['--partition=debug']")
    run = only_run(sweep)
    suspended(run)
    subprocess.run(["sbatch", "--partition=high", "--cpus-per-task=2", "--output=/dev/null", "--wrap=true"], check=True)
    concluded(sweep)
    assert results(sweep).items() <= undisturbed.items()
    *_, analysis = sorted(sweep.read_jobs(), key=lambda job: int(job["job"]))
    assert show(analysis["job"])[0]["Partition"] == "debug"  # of two options the later one wins
    first, second = owners(run)
    assert (first["slurm_restarts"], second["slurm_restarts"]) == (None, "1")
    assert first["released"]  # it had the time to checkpoint and to say so
    assert re.search(r"resuming at step \d+ from ", run.log_path.read_text())


def test_a_run_of_a_dead_node_goes_on_at_once_on_another(
    cluster: Cluster, undisturbed: dict[str, tuple[dict[str, object], bytes]]
) -> None:
    if not cluster.has_host_names:
        pytest.skip("no right to give the nodes host names of their own")
    sweep = submit(*ONE)
    run = only_run(sweep)
    suspended(run)
    node = owners(run)[0]["host"]
    try:
        cluster.fail_node(node)
        concluded(sweep)
    finally:
        cluster.start_node(node)
        until(lambda: node in cluster.idle(), f"{node} to come back")
    assert results(sweep).items() <= undisturbed.items()
    first, second = owners(run)
    assert {first["host"], second["host"]} == {"n1", "n2"}
    assert first["slurm_job"] == second["slurm_job"]
    assert "released" not in first
    assert re.search(r"resuming at step \d+ from ", run.log_path.read_text())


def test_a_run_on_two_nodes_survives_a_time_limit_and_the_death_of_its_second_node(
    cluster: Cluster, by_two: dict[str, tuple[dict[str, object], bytes]]
) -> None:
    if not cluster.has_host_names:
        pytest.skip("no right to give the nodes host names of their own")
    larger = "launcher.sizes={w16-d2:{nodes:2,devices_per_run:2}}"
    sweep = submit(*ONE, larger)
    run, job = only_run(sweep), min(row["job"] for row in sweep.read_jobs())
    pid = suspended(run)
    cluster.ask("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the time limit
    until(lambda: has_waiting(pid, signal.SIGUSR1), "the signal")
    os.kill(pid, signal.SIGCONT)
    until(lambda: len(owners(run)) == 2, "the second attempt")
    suspended(run)
    other = next(node for node in NODES if node != owners(run)[-1]["host"])
    try:
        cluster.fail_node(other)
        until(lambda: show(job)[0]["JobState"] == "PENDING", "the job to be queued again")
    finally:
        cluster.start_node(other)
    concluded(sweep)
    assert results(sweep) == by_two
    assert show(job)[0]["NumNodes"] == "2"
    first, second, third = owners(run)
    assert [claim["slurm_restarts"] for claim in (first, second, third)] == [None, "1", "2"]
    assert first["released"]
    assert "released" not in second
    assert {claim["slurm_job"] for claim in (first, second, third)} == {f"{job}_0"}


def test_a_cancelled_sweep_keeps_what_it_has_and_submits_only_what_is_missing(
    cluster: Cluster, undisturbed: dict[str, tuple[dict[str, object], bytes]]
) -> None:
    minutes = 0.5 * SMOKE_SECONDS / 60  # a task for every run
    options = [*THREE, f"launcher.minutes_per_task={minutes}"]
    sweep = submit(*options, "launcher.throttle=1")
    until(lambda: sweep.counts()[DONE] == 1, "the first run")
    runs = [sweep.run(row["run_id"]) for row in sweep.read_plan()]
    until(lambda: any(run.status()["status"] == RUNNING for run in runs), "the second run")
    held = next(run for run in runs if run.status()["status"] == RUNNING)
    pid = suspended(held)

    shown = json.loads(mupsweep("status", str(sweep.path), "--json")[0])
    jobs = {run["run_id"]: run["job"] for run in shown["runs"] if run["job"]}
    assert sorted((job["state"], job["reason"]) for job in jobs.values()) == [
        ("PENDING", "JobArrayTaskLimit"),
        ("RUNNING", "None"),
    ]
    assert jobs[held.run_id]["state"] == "RUNNING"

    _, again = mupsweep("run", *SMOKE, *ON_CPU, *options)
    assert "2 runs in queued or running jobs" in again
    assert len(sweep.read_jobs()) == 2

    _, message = mupsweep("cancel", str(sweep.path))
    assert re.match(r"cancelled jobs \d+, \d+ with 2 runs", message)
    until(lambda: not cluster.ask("squeue", "--noheader"), "the jobs to end")
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text()
    assert not held.is_claimed()
    assert held.checkpoints[0].exists()
    assert not (sweep.results / "transfer.json").exists()  # the analysis went first
    finished = {row["run_id"] for row in sweep.read_plan() if sweep.state(row["run_id"])["status"] in FINISHED}
    assert len(finished) == 1

    _, message = mupsweep("run", *SMOKE, *ON_CPU, *options)
    assert "jobs ended without finishing 2 runs" in message
    newest = sorted(sweep.read_jobs(), key=lambda job: int(job["job"]))[-2]
    assert {run_id for task in newest["tasks"] for run_id in task} == {run.run_id for run in runs} - finished
    concluded(sweep)
    assert results(sweep).items() <= undisturbed.items()
    assert sorted(len(owners(run)) for run in runs) == [1, 1, 2]
    assert (sweep.results / "transfer.json").exists()


def test_a_job_script_can_be_submitted_by_hand(
    cluster: Cluster, undisturbed: dict[str, tuple[dict[str, object], bytes]]
) -> None:
    folder = Path("it's 100% mine")
    out, _ = mupsweep("run", *SMOKE, *ON_CPU, *ONE, f'out="{folder}"', "launcher.workers=2", "--dry-run")
    sweep = SweepDir.open(folder / "smoke")
    script = sweep.script("w16-d2")
    assert script.read_text() in out
    assert sweep.read_jobs() == []
    job = cluster.ask("sbatch", "--parsable", str(script.resolve())).strip()
    until(lambda: sweep.counts()[DONE] == 1, "the run")
    until(lambda: show(job)[0]["JobState"] == "COMPLETED", "the job")
    assert results(sweep).items() <= undisturbed.items()
    assert [path.name for path in sweep.logs.iterdir()] == [f"smoke-w16-d2-{job}_0.out"]
