"""The main path on the smallest models: what `mupsweep run` leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SMOKE = ["experiment=smoke", "launcher=inline"]


def mupsweep(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run([sys.executable, "-m", "mupsweep", *arguments], capture_output=True, text=True)


def test_a_sweep_ends_with_verdict_figures_and_report() -> None:
    done = mupsweep("run", *SMOKE)
    assert done.returncode == 0, done.stderr
    results = Path("sweeps/smoke/results")
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


def test_running_again_trains_nothing_and_a_longer_grid_trains_only_the_new_runs() -> None:
    mupsweep("run", *SMOKE)
    before = {p: p.stat().st_mtime_ns for p in Path("sweeps/smoke/runs").glob("*/summary.json")}
    again = mupsweep("run", *SMOKE)
    assert again.returncode == 0
    assert "[" not in again.stdout.split("nanogpt")[0]  # no progress line
    mupsweep("run", *SMOKE, "sweep.log2_lrs=[-9,-8,-7,-5]")
    after = {p: p.stat().st_mtime_ns for p in Path("sweeps/smoke/runs").glob("*/summary.json")}
    assert len(after) == len(before) + 2
    assert all(after[p] == t for p, t in before.items())
