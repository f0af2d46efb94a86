"""A notebook gets the records, curves and verdicts of every other view, as dataclasses and as frames."""

from __future__ import annotations

import csv
import doctest
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from run_results import results

import mupsweep
from mupsweep.analysis.analysis import analyse
from mupsweep.analysis.run_result import COLUMNS
from mupsweep.atomic_files import write_json
from mupsweep.errors import ConfigError, RecordError
from mupsweep.report import notebook
from mupsweep.report.notebook import Sweep
from mupsweep.report.results_files import write_results
from mupsweep.store.sweep_dir import SweepDir


@pytest.fixture
def finished(rows: Callable, save: Callable, tmp_path: Path) -> SweepDir:
    """sweeps/demo: SP and muP at four widths and six LRs, each with two seeds."""
    table_rows = rows(widths=(32, 64, 128, 256), log2_lrs=(-11, -10, -9, -8, -7, -6, -5, -4, -3), seeds=2, noise=0.001)
    (tmp_path / "sweeps").mkdir()
    sweep = save(tmp_path / "sweeps", table_rows)
    for row in table_rows:
        sweep.run(row["run_id"]).path.mkdir(parents=True, exist_ok=True)
        write_json(sweep.run(row["run_id"]).summary_path, row, durable=False)
        sweep.run(row["run_id"]).write_status(row["status"], durable=False)
    return sweep


def test_the_example_of_the_module_says_what_it_prints(finished: SweepDir) -> None:
    pytest.importorskip("pandas")
    assert doctest.testmod(notebook) == doctest.TestResults(failed=0, attempted=11)


def test_frames_hold_what_the_csv_files_hold(finished: SweepDir) -> None:
    pandas = pytest.importorskip("pandas")
    sweep = mupsweep.load("sweeps/demo")
    write_results(finished.results, sweep.analysis)
    for frame, name in ((sweep.runs_frame(), "runs.csv"), (sweep.curves_frame(), "curves.csv")):
        pandas.testing.assert_frame_equal(frame, pandas.read_csv(finished.results / name), check_dtype=False)
    verdicts = sweep.verdicts_frame()
    assert len(verdicts) == sum(len(group.optima) for group in sweep.verdicts)
    last = verdicts.iloc[-1]
    group = sweep.verdicts[-1]
    assert (last.width, last.verdict, last.drift_octaves_per_doubling) == (256, group.verdict, group.drift.value)
    assert last.loss_optimum == group.optima[-1].loss.value
    run = next(run for run in sweep.runs if run.seed == 0)  # of which the fixture logs metrics
    logged = sweep.metrics_frame([run])
    assert logged.step.to_list() == [row["step"] for row in finished.run(run.run_id).metrics()]
    assert logged.val_loss.dtype == float


def test_a_run_has_the_columns_of_the_csv_file(finished: SweepDir) -> None:
    write_results(finished.results, mupsweep.load(finished.path).analysis)
    with (finished.results / "runs.csv").open() as file:
        (first, *_) = csv.DictReader(file)
    run = mupsweep.load(finished.path).runs[0]
    assert list(first) == list(COLUMNS)
    assert {k: "" if getattr(run, k) is None else str(getattr(run, k)) for k in COLUMNS} == first


def test_an_unfinished_sweep_is_loaded_and_what_is_none_is_refused(rows: Callable, save_sweep: Callable) -> None:
    sweep = mupsweep.load(save_sweep(rows(seeds=1)).path)
    assert (sweep.runs, sweep.curves, sweep.verdicts, sweep.planned) == ((), (), (), 64)
    assert "0 of 64 runs finished" in repr(sweep)
    with pytest.raises(RecordError, match="is not a sweep"):
        mupsweep.load("nowhere")


def test_without_pandas_frames_say_what_to_install(finished: SweepDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    sweep = mupsweep.load(finished.path)
    with pytest.raises(ConfigError, match=r"pip install 'mupsweep\[notebook\]'"):
        sweep.runs_frame()


def test_loading_imports_neither_pandas_nor_torch(finished: SweepDir) -> None:
    code = (
        f"import sys, mupsweep; mupsweep.load({str(finished.path)!r}); print({{'pandas', 'torch'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_branches_of_a_run_are_not_counted_as_runs(rows: Callable, save_sweep: Callable) -> None:
    table_rows = rows(widths=[32], parametrizations=["sp"], seeds=1)
    branches = [{**row, "run_id": f"{row['run_id']}@1000", "horizon": 1000} for row in table_rows]
    sweep = Sweep(
        save_sweep(table_rows),
        analyse(results([*({**row, "horizon": 2000} for row in table_rows), *branches])),
        len(table_rows),
    )
    assert f"{len(table_rows)} of {len(table_rows)} runs finished" in repr(sweep)
