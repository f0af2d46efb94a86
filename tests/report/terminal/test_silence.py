"""A worker that hangs is seen: it lives, but its run shows no progress."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from mupsweep.report.terminal.status import show_status
from mupsweep.store.run_dir import RUNNING
from mupsweep.sweep import plan
from mupsweep.sweep.config import load

CASES = [(0, 0, False), (4, 0, False), (12, 0, True), (12, 5, False)]


@pytest.mark.parametrize(("minutes", "row_minutes", "reported"), CASES)
def test_a_worker_without_progress_is_named_with_its_silence(
    minutes: int, row_minutes: int, reported: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, runs = plan.save(load(["experiment=smoke", f"out={tmp_path}"]), "")
    folder, cost, steps = sweep.run(runs[0].run_id), runs[0].cost, runs[0].resolved.steps
    claim = folder.claim()
    assert claim is not None
    speed = {"tokens_per_second": cost.tokens / steps / row_minutes / 60} if row_minutes else {}
    folder.write_status(RUNNING, step=1, steps=steps, **speed)
    os.utime(folder.status_path, (time.time() - 60 * minutes - 1,) * 2)
    show_status(sweep, per_run=False, as_json=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("silent")]
    assert len(lines) == reported
    if reported:
        assert lines[0].startswith(f"silent for 12 min: {runs[0].run_id}: its worker (pid {os.getpid()} on ")
    claim.release()
    show_status(sweep, per_run=False, as_json=False)
    assert "silent" not in capsys.readouterr().out


def test_the_status_of_a_run_without_its_number_of_steps_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, runs = plan.save(load(["experiment=smoke", f"out={tmp_path}"]), "")
    folder = sweep.run(runs[0].run_id)
    claim = folder.claim()
    assert claim is not None
    cases: list[dict[str, Any]] = [{}, {"steps": 0}]
    for damaged in cases:
        folder.write_status(RUNNING, tokens_per_second=100.0, **damaged)
        show_status(sweep, per_run=False, as_json=False)
        assert "running 1" in capsys.readouterr().out
