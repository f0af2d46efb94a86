"""The files of results/: what is in them, and what is read of a sweep to write them."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from run_results import results

from mupsweep.analysis.analysis import analyse
from mupsweep.analysis.labels import DIVERGED, DONE
from mupsweep.analysis.run_result import COLUMNS
from mupsweep.atomic_files import write_chunks, write_json
from mupsweep.report.results_files import _csv, _run_line, write_results
from mupsweep.store.results import read, read_runs
from mupsweep.store.run_dir import FAILED, PENDING, RUNNING
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.config import load

NAMES = {"model": "llama", "parametrization": "mup", "optimizer": "muon"}
SIZE = {"width": 64, "depth": 2, "width_ratio": 2.0, "depth_ratio": 0.5}
SUMMARIES: list[dict[str, Any]] = [
    {
        "run_id": "a",
        **NAMES,
        **SIZE,
        "log2_lr": -8.0,
        "seed": 0,
        "status": DONE,
        "steps": 20,
        "tokens": 400,
        "train_loss": 3.25,
        "val_loss": 3.5,
        "val_bits_per_byte": 5.049,
        "diverged_at_step": None,
        "horizon": 400,
        "branches": [{"horizon": 200, "status": DONE, "steps": 10, "tokens": 200, "val_loss": 3.75}],
        "seconds": 1.5,
        "tokens_per_second": 266.7,
        "device": "cpu",
        "devices": 1,
        "precision": "fp32",
    },
    {
        "run_id": "b",
        **NAMES,
        **SIZE,
        "log2_lr": -8.0,
        "seed": 1,
        "status": DONE,
        "steps": 20,
        "tokens": 400,
        "train_loss": 3.125,
        "val_loss": 3.25,
        "val_bits_per_byte": None,
        "diverged_at_step": None,
        "horizon": 400,
        "branches": [],
        "seconds": 2,
        "tokens_per_second": 200.0,
        "device": "cpu",
    },
    {
        "run_id": "c",
        **NAMES,
        **SIZE,
        "log2_lr": -4.5,
        "seed": 0,
        "status": DIVERGED,
        "steps": 3,
        "tokens": 60,
        "train_loss": 6.5,
        "val_loss": None,
        "val_bits_per_byte": None,
        "diverged_at_step": 3,
        "horizon": 400,
        "branches": [{"horizon": 200, "status": DIVERGED, "val_loss": None}],
        "seconds": 0.5,
    },
    {
        "run_id": "d",
        **NAMES,
        "hyperparameter": "model.init_std",
        "value": 0.02,
        "default": 1,
        **SIZE,
        "log2_lr": -8.0,
        "seed": 0,
        "status": DONE,
        "steps": 20,
        "val_loss": 4.0,
        "horizon": 400,
    },
]
GOLDEN = Path(__file__).parent  # runs.csv and curves.csv of these runs


@pytest.fixture
def sweep_of_four(tmp_path: Path) -> SweepDir:
    """A sweep whose runs have branches, diverge, or differ in a hyperparameter."""
    sweep = SweepDir(tmp_path / "sweep")
    sweep.path.mkdir()
    sweep.write_plan(
        {**summary, "variant": f"v{summary.get('value')}", "tokens": 400, "flops": 1e6} for summary in SUMMARIES
    )
    for summary in SUMMARIES:
        folder = sweep.run(summary["run_id"])
        folder.path.mkdir(parents=True)
        folder.write_summary(summary)
        folder.write_status(summary["status"])
    return sweep


def test_runs_csv_and_curves_csv_stay_what_they_were(sweep_of_four: SweepDir) -> None:
    write_results(sweep_of_four.results, analyse(read_runs([sweep_of_four])))
    for name in ("runs.csv", "curves.csv"):
        assert (sweep_of_four.results / name).read_text() == (GOLDEN / name).read_text()


def test_a_table_is_written_without_holding_its_text(tmp_path: Path) -> None:
    [row] = results([{**NAMES, **SIZE, "log2_lr": -8.0, "seed": 3, "status": DONE, "val_loss": 3.25}])
    tracemalloc.start()
    write_chunks(tmp_path / "runs.csv", _csv(COLUMNS, (_run_line(row) for _ in range(20_000))), durable=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "runs.csv").stat().st_size > 800_000
    assert peak < 200_000


def test_one_walk_through_a_plan_finds_runs_states_and_costs(tmp_path: Path) -> None:
    sweep, planned = plan.save(load(["experiment=smoke", f"out={tmp_path}"]), "")
    states = (DONE, DIVERGED, FAILED, RUNNING, PENDING, PENDING)
    for run, row, state in zip(planned, sweep.read_plan(), states, strict=True):
        folder = sweep.run(run.run_id)
        if state != PENDING:
            folder.path.mkdir(parents=True)
            folder.write_status(state)
        if state in (DONE, DIVERGED):
            write_json(folder.summary_path, {**row, "status": state, "val_loss": 3.0, "seconds": 1.5})
    rows, [ledger] = read([sweep])
    assert {run.run_id: run.status for run in rows} == dict(zip([r.run_id for r in planned], states[:2], strict=False))
    assert rows == read_runs([sweep])
    counts = sum(ledger.values(), Counter())
    assert [counts[key] for key in ("runs", DONE, DIVERGED, FAILED, RUNNING, PENDING)] == [6, 1, 1, 1, 1, 2]
    assert counts["seconds"] == 3.0
    assert counts["flops"] == sum(run.cost.flops for run in planned)
    assert {key[1:] for key in ledger} == {(r.size.width, r.size.depth, r.cost.parameters) for r in planned}
