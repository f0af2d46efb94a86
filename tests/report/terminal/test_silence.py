"""A worker that hangs is seen: it lives, but gives no sign of life."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mupsweep.report.terminal.status import show_status
from mupsweep.store.run_dir import RUNNING
from mupsweep.sweep import plan
from mupsweep.sweep.config import load


@pytest.mark.parametrize(("minutes", "reported"), [(0, False), (4, False), (12, True)])
def test_a_worker_without_a_sign_of_life_is_named_with_its_silence(
    minutes: int, reported: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, runs = plan.save(load(["experiment=smoke", f"out={tmp_path}"]), "")
    folder = sweep.run(runs[0].run_id)
    claim = folder.claim()
    assert claim is not None
    folder.write_status(RUNNING)
    os.utime(claim.path, (time.time() - 60 * minutes - 1,) * 2)
    show_status(sweep, per_run=False, as_json=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("silent")]
    assert len(lines) == reported
    if reported:
        assert lines[0].startswith(f"silent for 12 min: {runs[0].run_id}: its worker (pid {os.getpid()} on ")
    claim.release()
    show_status(sweep, per_run=False, as_json=False)
    assert "silent" not in capsys.readouterr().out
