"""The Slurm launcher up to Slurm's door: what is submitted, shown and cancelled."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_slurm import Fake

from mupsweep.analysis.labels import DONE
from mupsweep.atomic_files import make_folder
from mupsweep.store import slurm_queue
from mupsweep.store.run_dir import FAILED, PENDING, RUNNING
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.config import load

SMOKE = ["experiment=smoke", "launcher=slurm", "launcher.gpus=0"]


def test_a_sweep_is_an_array_per_size_in_pieces_that_the_cluster_takes_and_an_analysis(
    slurm: Fake, cli: Callable[..., tuple[int, str, str]]
) -> None:
    alone = ["sweep.log2_lrs=[-10,-9,-8,-7,-6]", "launcher.minutes_per_task=0.0001", "launcher.throttle=2"]
    code, out, err = cli("run", *SMOKE, *alone)
    assert (code, out) == (0, ""), err
    names = ["w32-d2", "w32-d2-2", "w16-d2", "w16-d2-2", "report"]  # the longest first, three tasks at most
    scripts = [f"sweeps/smoke/submit-{name}.sbatch" for name in names]
    *arrays, analysis = slurm.calls("sbatch")
    assert arrays == [f"--parsable {script}" for script in scripts[:-1]]
    assert analysis == f"--parsable --dependency=afterany:100:101:102:103 {scripts[-1]}"
    ranges = [line for s in scripts[:-1] for line in Path(s).read_text().splitlines() if "--array=0" in line]
    assert ranges == ["#SBATCH --array=0-2%2", "#SBATCH --array=0-1%2"] * 2

    sweep = SweepDir.open("sweeps/smoke")
    jobs = sweep.read_jobs()
    assert [job["job"] for job in jobs] == ["100", "101", "102", "103", "104"]
    assert [Path(job["script"]).name for job in jobs] == [Path(script).name for script in scripts]
    assert [len(job["tasks"]) for job in jobs] == [3, 2, 3, 2, 0]
    trained = [run_id for job in jobs for task in job["tasks"] for run_id in task]
    assert sorted(trained) == sorted(row["run_id"] for row in sweep.read_plan())
    assert "submitted job 100: 3 runs in 3 tasks of roughly 0s (sweeps/smoke/submit-w32-d2.sbatch)" in err
    assert slurm.calls("squeue") == []  # nothing was recorded before

    code, _, _ = cli("run", *SMOKE, *alone, "sweep.name=wide", "launcher.max_array=100")
    assert code == 0
    assert len(slurm.calls("scontrol")) == 1  # asked once, and not where the config says it
    assert len(SweepDir.open("sweeps/wide").read_jobs()) == 3


def test_a_stop_while_a_job_is_submitted_waits_until_the_job_is_recorded(
    slurm: Fake, cli: Callable[..., tuple[int, str, str]]
) -> None:
    slurm.write("sbatch-interrupts", "")
    assert cli("run", *SMOKE)[0] == 130
    assert [job["job"] for job in SweepDir.open("sweeps/smoke").read_jobs()] == ["100"]
    assert len(slurm.calls("sbatch")) == 1


def test_what_is_submitted_from_within_a_job_hears_nothing_of_that_job(
    slurm: Fake, cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_MEM_PER_CPU", "SLURM_NTASKS"):
        monkeypatch.setenv(name, "7")
    assert cli("run", *SMOKE)[0] == 0
    assert (slurm.folder / "environment").read_text() == "SLURM_CONF=/etc/slurm.conf\n"
    monkeypatch.delenv("SLURM_JOB_ID")
    assert cli("run", *SMOKE, "sweep.name=outside")[0] == 0
    assert "SLURM_MEM_PER_CPU=7\n" in (slurm.folder / "environment").read_text()  # what a user chose is kept


def test_a_cluster_without_job_arrays_is_told_in_one_line(
    slurm: Fake, cli: Callable[..., tuple[int, str, str]]
) -> None:
    slurm.write("max-array-size", "0")
    code, _, err = cli("run", *SMOKE)
    assert code == 2
    assert err.splitlines()[-1].startswith("mupsweep: this cluster takes no job arrays (MaxArraySize=0): ")
    assert slurm.calls("sbatch") == []


def test_run_again_submits_what_is_in_no_job(slurm: Fake, cli: Callable[..., tuple[int, str, str]]) -> None:
    three = [*SMOKE, "sweep.width_ratios=[1]", "launcher.minutes_per_task=0.0001"]
    assert cli("run", *three)[0] == 0
    sweep = SweepDir.open("sweeps/smoke")
    first, second, third = (task[0] for task in sweep.read_jobs()[0]["tasks"])
    for run_id in (first, second):
        make_folder(sweep.run(run_id).path)

    slurm.queue("100_1|RUNNING|None", "100_2|PENDING|Resources", "101|PENDING|Dependency")
    sweep.run(first).write_summary({})
    sweep.run(first).write_status(DONE)
    code, _, err = cli("run", *three)
    assert code == 0
    assert len(slurm.calls("sbatch")) == 2  # nothing new
    assert "2 runs in queued or running jobs" in err

    sweep.run(first).write_status(FAILED, error="out of memory")
    code, out, err = cli("run", *three, "--json")
    assert code == 0
    assert json.loads(out)["jobs"] == sweep.read_jobs()
    assert "jobs ended without finishing 1 run; what they said is in sweeps/smoke/logs" in err
    assert sweep.read_jobs()[2]["tasks"] == [[first]]
    assert sweep.run(first).status()["status"] == PENDING
    assert slurm.calls("sbatch")[-1].startswith("--parsable --dependency=afterany:100:102 ")

    slurm.queue("100_2|RUNNING|None")  # somebody cancelled the analysis
    for run_id in (first, second):
        sweep.run(run_id).write_summary({})
        sweep.run(run_id).write_status(DONE)
    assert cli("run", *three)[0] == 0
    assert sweep.read_jobs()[-1]["tasks"] == []
    assert slurm.calls("sbatch")[-1].startswith("--parsable --dependency=afterany:100 ")
    assert third not in [run_id for job in sweep.read_jobs()[1:] for task in job["tasks"] for run_id in task]


def test_a_refused_array_keeps_what_was_submitted_before_it(
    slurm: Fake, cli: Callable[..., tuple[int, str, str]]
) -> None:
    slurm.write("sbatch-fails-from", "101")
    code, _, err = cli("run", *SMOKE)
    assert code == 2
    *_, last = err.splitlines()
    assert last == (
        "mupsweep: sbatch --parsable sweeps/smoke/submit-w16-d2.sbatch failed: sbatch: error: Invalid qos "
        "specification; change launcher.* and run the same command again"
    )
    assert [job["job"] for job in SweepDir.open("sweeps/smoke").read_jobs()] == ["100"]
    slurm.write("sbatch-fails-from", "999")
    slurm.queue("100_0|RUNNING|None")
    assert cli("run", *SMOKE)[0] == 0
    assert [Path(call.split()[-1]).name for call in slurm.calls("sbatch")] == [
        "submit-w32-d2.sbatch",
        "submit-w16-d2.sbatch",
        "submit-report.sbatch",
    ]


def test_a_full_queue_leaves_an_analysis_for_what_it_took_and_names_the_key(
    slurm: Fake, cli: Callable[..., tuple[int, str, str]]
) -> None:
    slurm.write("sbatch-refuses", "w16-d2")
    code, _, err = cli("run", *SMOKE)
    assert code == 2
    *_, last = err.splitlines()
    assert last == (
        "mupsweep: sbatch --parsable sweeps/smoke/submit-w16-d2.sbatch failed: sbatch: error: "
        "QOSMaxSubmitJobPerUserLimit; keep fewer in the queue by launcher.max_submitted=N and run the same command "
        "again"
    )
    assert slurm.calls("sbatch") == [
        "--parsable sweeps/smoke/submit-w32-d2.sbatch",
        "--parsable --dependency=afterany:100 sweeps/smoke/submit-report.sbatch",
    ]


def test_no_more_than_max_submitted_are_in_the_queue_and_the_analysis_submits_the_rest(
    slurm: Fake, cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [*SMOKE, "launcher.minutes_per_task=0.0001", "launcher.max_submitted=5"]
    code, _, err = cli("run", *few)
    assert code == 0, err
    sweep = SweepDir.open("sweeps/smoke")
    assert "launcher.max_submitted=5: 2 runs left for the analysis to submit" in err
    assert [len(job["tasks"]) for job in sweep.read_jobs()] == [3, 1, 0]  # six runs, a task each
    assert sweep.script("report").read_text().endswith(" --next-round\n")

    # In the analysis, which is in the queue itself.
    for job in sweep.read_jobs():
        for (run_id,) in job["tasks"]:
            make_folder(sweep.run(run_id).path)
            sweep.run(run_id).write_status(FAILED, error="out of memory")
    slurm.queue("102|RUNNING|None")
    monkeypatch.setenv("SLURM_JOB_ID", "102")
    code, _, err = cli("report", "sweeps/smoke", "--next-round")
    assert code == 0, err
    *_, array, analysis = sweep.read_jobs()
    submitted = [run_id for job in sweep.read_jobs() for task in job["tasks"] for run_id in task]
    assert sorted(submitted) == sorted(row["run_id"] for row in sweep.read_plan())  # what failed is not tried again
    assert (len(array["tasks"]), analysis["tasks"]) == (2, [])
    assert not sweep.script("report").read_text().endswith(" --next-round\n")

    monkeypatch.setenv("SLURM_JOB_ID", analysis["job"])
    slurm.queue(f"{analysis['job']}|RUNNING|None")
    assert cli("report", "sweeps/smoke", "--next-round")[0] == 0
    assert len(slurm.calls("sbatch")) == 5


def test_where_analyses_have_filled_the_queue_another_follows_them(
    slurm: Fake, cli: Callable[..., tuple[int, str, str]]
) -> None:
    sweep, _ = plan.save(load([*SMOKE, "launcher.max_submitted=3"]), "")
    for job in ("7", "8"):
        sweep.write_job(job, sweep.script("report"), [])
    slurm.queue("7|PENDING|Dependency", "8|PENDING|Dependency")
    code, _, err = cli("run", *SMOKE, "launcher.max_submitted=3")
    assert code == 0, err
    assert "launcher.max_submitted=3: 6 runs left for the analysis to submit" in err
    assert slurm.calls("sbatch") == ["--parsable --dependency=afterany:7:8 sweeps/smoke/submit-report.sbatch"]


def test_a_dry_run_writes_the_scripts_and_submits_nothing(
    slurm: Fake, cli: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = cli("run", *SMOKE, "--dry-run")
    assert code == 0, err
    sweep = SweepDir.open("sweeps/smoke")
    for name in ("w16-d2", "w32-d2", "report"):
        assert f"==> {sweep.script(name)} <==\n{sweep.script(name).read_text()}" in out
    assert slurm.calls("sbatch") == []
    assert sweep.read_jobs() == []
    code, _, err = cli("run", "experiment=smoke", "--dry-run", "sweep.name=other")
    assert code == 2
    assert "launcher=local writes no job scripts; mupsweep plan shows the runs" in err
    assert not Path("sweeps/other").exists()


def test_a_machine_without_slurm_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = cli("run", *SMOKE)
    assert code == 2
    assert err.splitlines()[-1].startswith("mupsweep: cannot run sbatch (No such file or directory): launcher=slurm ")


def test_status_shows_the_job_of_every_run_and_why_it_waits(
    slurm: Fake, cli: Callable[..., tuple[int, str, str]]
) -> None:
    assert cli("run", *SMOKE, "sweep.width_ratios=[1]", "launcher.minutes_per_task=0.0001")[0] == 0
    tasks = [task[0] for task in SweepDir.open("sweeps/smoke").read_jobs()[0]["tasks"]]
    slurm.queue("100_1|RUNNING|None", "100_2|PENDING|JobArrayTaskLimit", "101|PENDING|Dependency", "999_0|RUNNING|None")
    code, out, _ = cli("status", "sweeps/smoke")
    assert code == 0
    assert out.splitlines()[-2:] == [
        "Slurm tasks: 1 PENDING (JobArrayTaskLimit), 1 RUNNING",
        "Slurm analysis job: 101 PENDING (Dependency)",
    ]
    code, out, _ = cli("status", "sweeps/smoke", "--runs")
    assert [line.rsplit("pending", 1)[1].strip() for line in out.splitlines() if tasks[2] in line] == [
        "100_2 PENDING (JobArrayTaskLimit)"
    ]
    _, out, _ = cli("status", "sweeps/smoke", "--json")
    jobs = {run["run_id"]: run["job"] for run in json.loads(out)["runs"]}
    assert jobs == {
        tasks[0]: None,
        tasks[1]: {"job_id": "100_1", "state": "RUNNING", "reason": "None"},
        tasks[2]: {"job_id": "100_2", "state": "PENDING", "reason": "JobArrayTaskLimit"},
    }
    assert len(slurm.calls("squeue")) == 3  # one call each
    assert slurm.calls("squeue")[0] == "--noheader --array --format=%i|%T|%r --jobs=100,101"


def test_status_works_where_slurm_cannot_be_asked(
    slurm: Fake, cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cli("run", *SMOKE)[0] == 0
    code, _, err = cli("status", "sweeps/smoke")
    assert (code, err) == (0, "")  # the jobs are so old that Slurm has forgotten them

    slurm.write("squeue-says", "Unable to contact slurm controller (connect failure)")
    code, out, err = cli("status", "sweeps/smoke")
    assert (code, "pending 6" in out) == (0, True)
    assert err == (
        "cannot ask Slurm: slurm_load_jobs error: Unable to contact slurm controller (connect failure); "
        "the jobs of this sweep are not shown\n"
    )
    code, _, err = cli("run", *SMOKE)  # it would train everything twice
    assert code == 2
    assert err.splitlines()[-1].startswith("mupsweep: cannot ask Slurm: ")

    monkeypatch.setattr(slurm_queue, "SQUEUE_TIMEOUT", 0.1)
    slurm.write("squeue-hangs", "")
    code, out, err = cli("status", "sweeps/smoke")
    assert (code, "pending 6" in out) == (0, True)
    assert err.startswith("cannot ask Slurm: squeue did not answer within ")

    monkeypatch.setenv("PATH", str(tmp_path))
    code, out, err = cli("status", "sweeps/smoke")
    assert (code, "pending 6" in out) == (0, True)
    assert err.startswith("cannot ask Slurm: no squeue here")


def test_cancel_stops_the_analysis_and_every_array_that_is_left(
    slurm: Fake, cli: Callable[..., tuple[int, str, str]]
) -> None:
    plan.save(load(SMOKE), "")
    nobody = "nobody trains sweeps/smoke now, and no Slurm job of it is queued\n"
    assert cli("cancel", "sweeps/smoke") == (0, "", nobody)
    assert cli("run", *SMOKE)[0] == 0
    slurm.queue("101_0|RUNNING|None", "102|PENDING|Dependency")
    sweep = SweepDir.open("sweeps/smoke")
    elsewhere = sweep.read_jobs()[0]["tasks"][0][0]
    assert sweep.run(elsewhere).claim() is not None
    sweep.run(elsewhere).write_status(RUNNING)
    code, out, err = cli("cancel", "sweeps/smoke")
    assert (code, out) == (0, "")
    assert slurm.calls("scancel") == ["--quiet 102 101"]
    assert err.splitlines() == [
        "cancelled jobs 102, 101 with 3 runs; those in progress checkpoint and end",
        "go on with the command that made the sweep",
        f"trained on by pid {os.getpid()} on {socket.gethostname()} ({elsewhere}): stop it there, as its user",
    ]
    slurm.write("squeue-says", "Unable to contact slurm controller")
    (slurm.folder / "queue").unlink()
    code, _, err = cli("cancel", "sweeps/smoke")
    assert (code, err.startswith("mupsweep: cannot ask Slurm: ")) == (2, True)
