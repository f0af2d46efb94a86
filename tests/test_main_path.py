"""The main path on the smallest models: what `mupsweep run` leaves behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import mupsweep

SMOKE = ["experiment=smoke", "launcher=inline"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a process of its own has trained the sweep."""
    folder = tmp_path_factory.mktemp("finished")
    command = [sys.executable, "-m", "mupsweep", "run", *SMOKE]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_sweep_ends_with_verdict_figures_and_report(finished: Path) -> None:
    results = finished / "sweeps" / "smoke" / "results"
    for name in (
        "runs.csv",
        "curves.csv",
        "transfer.json",
        "report.html",
        "figures/curves.png",
        "figures/drift.svg",
    ):
        assert (results / name).stat().st_size > 0, name
    group = json.loads((results / "transfer.json").read_text())["groups"][0]
    assert [size["n_runs"] for size in group["sizes"]] == [3, 3]


def test_running_again_trains_nothing_and_a_longer_grid_trains_only_the_new_runs(finished: Path) -> None:
    shutil.copytree(finished / "sweeps", "sweeps")
    before = {p: p.stat().st_mtime_ns for p in Path("sweeps/smoke/runs").glob("*/summary.json")}
    assert len(before) == 6
    code, out, err = mupsweep("run", *SMOKE)
    assert code == 0, err
    assert "[" not in out.split("nanogpt")[0]  # no progress line
    assert mupsweep("run", *SMOKE, "sweep.log2_lrs=[-8,-7,-6,-5]")[0] == 0
    after = {p: p.stat().st_mtime_ns for p in Path("sweeps/smoke/runs").glob("*/summary.json")}
    assert len(after) == len(before) + 2
    assert all(after[p] == t for p, t in before.items())
