"""A search on Slurm up to Slurm's door: the job after the arrays of a round submits the next, until it is cancelled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fake_slurm import Fake

from mupsweep.store.sweep_dir import SweepDir

SMOKE = ["experiment=smoke", "launcher=slurm", "launcher.gpus=0", "sweep.search=adaptive", "training.steps=2"]
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def trained(slurm: Fake, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> SweepDir:
    """A search whose first round was trained, in the job that analyses it."""
    assert cli("run", *SMOKE)[0] == 0
    assert [Path(call.split()[-1]).name for call in slurm.calls("sbatch")] == [
        "submit-w16-d2.sbatch",
        "submit-report.sbatch",
    ]
    assert cli("worker", "sweeps/smoke", "--device", "cpu")[0] == 0
    slurm.queue("101|RUNNING|None")
    monkeypatch.setenv("SLURM_JOB_ID", "101")
    return SweepDir.open("sweeps/smoke")


def test_the_analysis_submits_the_next_round_and_itself_after_it(trained: SweepDir, slurm: Fake, cli: Cli) -> None:
    assert trained.script("report").read_text().endswith(f"report {trained.path.resolve()} --next-round\n")
    first = len(trained.read_plan())
    code, _, err = cli("report", "sweeps/smoke", "--next-round")
    assert code == 0, err
    arrays, analysis = trained.read_jobs()[2:]
    new = [run_id for task in arrays["tasks"] for run_id in task]
    assert len(new) == len(trained.read_plan()) - first > 0
    assert analysis["tasks"] == []
    assert slurm.calls("sbatch")[-1].startswith("--parsable --dependency=afterany:102 ")

    slurm.queue("102_0|PENDING|Resources", "103|PENDING|Dependency")
    assert cli("cancel", "sweeps/smoke")[0] == 0
    assert slurm.calls("scancel") == ["--quiet 103 102"]


def test_a_cancelled_analysis_submits_nothing(trained: SweepDir, slurm: Fake, cli: Cli) -> None:
    slurm.queue("101|COMPLETING|None")
    _, _, err = cli("report", "sweeps/smoke", "--next-round")
    assert "this job was cancelled: it submits nothing" in err
    assert len(slurm.calls("sbatch")) == 2


def test_a_round_that_was_not_finished_is_left_to_the_user(trained: SweepDir, slurm: Fake, cli: Cli) -> None:
    trained.run(trained.read_plan()[0]["run_id"]).write_status("failed", error="out of memory")
    code, out, _ = cli("report", "sweeps/smoke", "--next-round")
    assert code == 0
    assert "the search stops here: 1 run not finished; the command that made the sweep goes on" in out
    assert len(slurm.calls("sbatch")) == 2


def test_the_analysis_of_a_grid_submits_nothing(slurm: Fake, cli: Cli) -> None:
    assert cli("run", *SMOKE, "sweep.search=grid")[0] == 0
    assert "--next-round" not in SweepDir.open("sweeps/smoke").script("report").read_text()
