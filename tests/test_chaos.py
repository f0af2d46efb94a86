"""The drill: it finds a lost, a changed and a doubled run, and faults of twenty seconds leave none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from forked import Forked

from mupsweep import data
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.config import load

SCRIPTS = Path(__file__).parents[1] / "scripts"
pytestmark = pytest.mark.skipif(not SCRIPTS.is_dir(), reason="an installed package")
SMOKE = ["experiment=smoke", "training.steps=5", "sweep.width_ratios=[1]", "sweep.log2_lrs=[-7,-6]", "launcher=inline"]


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> SweepDir:
    """An undisturbed sweep of two runs."""
    config = load([*SMOKE, f"out={tmp_path_factory.mktemp('twin')}"])
    data.prepare(config.variants[0].data)
    sweep = plan.save(config, "")[0]
    assert Forked("worker", str(sweep.path), "--device", "cpu").wait() == 0
    return sweep


def test_the_drill_names_what_was_lost_changed_or_trained_twice(
    twin: SweepDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from chaos import differences  # pyright: ignore[reportMissingImports]

    sweep = SweepDir(shutil.copytree(twin.path, tmp_path / "sweep"))
    assert differences(twin, sweep) == []
    first, second = (sweep.run(row["run_id"]) for row in sweep.read_plan())

    summary = json.loads(first.summary_path.read_text())
    loss = summary["val_loss"]
    first.write_summary({**summary, "seconds": 9.0, "val_loss": loss + 1e-9})
    assert differences(twin, sweep) == [f"{first.run_id}: val_loss={loss + 1e-9}, undisturbed {loss}"]
    first.write_summary(summary)

    rows = first.metrics()
    first.write_metrics([*rows, rows[-1]])
    assert differences(twin, sweep) == [f"{first.run_id}: other metrics, 6 rows, undisturbed 5"]
    first.write_metrics(rows)

    owner = json.loads((first.claims / "0000.json").read_text())
    (first.claims / "0001.json").write_text(json.dumps(owner))
    assert differences(twin, sweep) == [f"{first.run_id} was trained twice at once: claim 0000 and 0001"]
    (first.claims / "0001.json").unlink()

    second.status_path.write_text('{"stat')
    assert differences(twin, sweep) == [f"{second.run_id} is lost: {{'status': 'pending'}}"]


@pytest.mark.slow
def test_a_sweep_that_is_killed_stopped_and_damaged_has_the_results_of_one_in_peace(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "chaos.py"), "--minutes", "0.33", "--launcher", "local"]
    command += ["--steps", "40", "--seeds", "1", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "IDENTICAL: " in done.stdout
