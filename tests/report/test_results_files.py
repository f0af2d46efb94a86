"""Tables of runs that were trained elsewhere."""

from __future__ import annotations

import csv
import json
import math
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mupsweep.analysis.analysis import analyse
from mupsweep.analysis.labels import DIVERGED, DONE
from mupsweep.analysis.run_result import COLUMNS
from mupsweep.atomic_files import write_chunks, write_json
from mupsweep.errors import DataError
from mupsweep.report.generate import conclude_table
from mupsweep.report.results_files import _csv, _run_line, write_results
from mupsweep.store.results import read, read_runs, read_table
from mupsweep.store.run_dir import FAILED, PENDING, RUNNING
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.config import load

WIDTHS, LRS = (128, 256, 512), range(-12, -3)
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


def table(folder: Path, rows: list[dict[str, Any]]) -> str:
    """The rows as a csv, with the columns of the first."""
    path = folder / "runs.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def runs(drift: float = 0.0, **more: Any) -> list[dict[str, Any]]:
    """Four columns suffice; above 2^-5 (plus drift) the loss is missing."""
    rows = []
    for octave, width in enumerate(WIDTHS):
        for log2_lr in LRS:
            d = log2_lr + 8 - drift * octave
            loss = "" if d > 3 else 3 + 0.05 * d * d
            rows.append({"parametrization": "mup", "width": width, "log2_lr": log2_lr, "val_loss": loss, **more})
    return rows


@pytest.fixture
def sweep_of_four(tmp_path: Path) -> SweepDir:
    """A sweep whose runs have branches, diverge, or differ in a hyperparameter."""
    sweep = SweepDir(tmp_path / "sweep")
    sweep.path.mkdir()
    sweep.write_plan({**summary, "variant": summary.get("value"), "tokens": 400, "flops": 1e6} for summary in SUMMARIES)
    for summary in SUMMARIES:
        folder = sweep.run(summary["run_id"])
        folder.path.mkdir(parents=True)
        folder.write_summary(summary)
        folder.write_status(summary["status"])
    return sweep


@pytest.mark.parametrize("drift", [0.0, -1.0])
def test_four_columns_suffice(tmp_path: Path, drift: float) -> None:
    [group] = analyse(read_table(table(tmp_path, runs(drift)))).groups
    assert group.verdict == ("drifts" if drift else "transfers")
    assert group.drift.value == pytest.approx(drift, abs=0.01)
    assert [o.curve.width_ratio for o in group.optima] == [1, 2, 4]


def test_an_lr_may_stand_for_its_logarithm(tmp_path: Path) -> None:
    rows = runs()
    plain = [{k: v for k, v in row.items() if k != "log2_lr"} | {"lr": 2.0 ** row["log2_lr"]} for row in rows]
    assert read_table(table(tmp_path, plain)) == read_table(table(tmp_path, rows))


@pytest.mark.parametrize("loss", ["", " ", "nan", "NaN", "inf", "-inf"])
def test_a_loss_that_is_no_number_is_a_diverged_run(tmp_path: Path, loss: str) -> None:
    [row] = read_table(table(tmp_path, [{"parametrization": "sp", "width": 8, "log2_lr": -3, "val_loss": loss}]))
    assert (row.status, row.val_loss) == (DIVERGED, None)


def test_repetitions_without_seeds_are_numbered(tmp_path: Path) -> None:
    found = read_table(table(tmp_path, runs() + runs()))
    assert {(row.width, row.log2_lr, row.seed) for row in found} == {
        (w, x, s) for w in WIDTHS for x in LRS for s in (0, 1)
    }


def test_our_own_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = read_table(table(tmp_path, runs(-1.0, seed=3, model="m", optimizer="o", depth=4, depth_ratio=2.0)))
    path = tmp_path / "again.csv"
    path.write_bytes(b"".join(_csv(COLUMNS, map(_run_line, rows))))
    again = read_table(str(path))
    assert again == rows
    assert {row.depth_ratio for row in again} == {2.0}
    assert {row.status for row in again} == {DONE, DIVERGED}


def test_runs_csv_and_curves_csv_stay_what_they_were(sweep_of_four: SweepDir) -> None:
    write_results(sweep_of_four, analyse(read_runs([sweep_of_four])))
    for name in ("runs.csv", "curves.csv"):
        assert (sweep_of_four.results / name).read_text() == (GOLDEN / name).read_text()


def test_a_table_is_written_without_holding_its_text(tmp_path: Path) -> None:
    [row] = read_table(table(tmp_path, runs(seed=3, model="m", optimizer="o")[:1]))
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


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"width": "wide"}, ("line 2", "width='wide'", "expected a whole number from 1")),
        ({"width": "16.5"}, ("line 2", "width='16.5'", "expected a whole number from 1")),
        ({"width": "1e400"}, ("line 2", "width='1e400'", "to 1e+30")),
        ({"width": "nan"}, ("line 2", "width='nan'", "expected a whole number")),
        ({"width_ratio": "0"}, ("line 2", "width_ratio='0'", "from 1e-30")),
        ({"seed": "x"}, ("line 2", "seed='x'", "expected a whole number")),
        ({"log2_lr": "65"}, ("line 2", "log2_lr=65", "octaves, -64 to 64")),
        ({"log2_lr": "x"}, ("line 2", "log2_lr='x'")),
        ({"log2_lr": "nan"}, ("line 2", "log2_lr='nan'", "expected a number")),
        ({"width": "0"}, ("line 2", "width='0'", "from 1")),
        ({"parametrization": ""}, ("line 2", "parametrization=''")),
        ({"val_loss": "low"}, ("line 2", "val_loss='low'")),
    ],
)
def test_a_bad_cell_is_named(tmp_path: Path, change: dict[str, str], told: tuple[str, ...]) -> None:
    rows = [{**row, **(change if i == 0 else {})} for i, row in enumerate(runs())]
    with pytest.raises(DataError) as caught:
        read_table(table(tmp_path, rows))
    for part in told:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("sp,16,-8,3,1", "line 2: expected 6 cells, as in the first line"),
        ("sp,16,-8,3,5,1,0", "line 2: expected 6 cells, as in the first line"),
    ],
)
def test_a_line_that_cannot_be_meant_is_refused(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(f"parametrization,width,log2_lr,val_loss,width_ratio,seed\n{line}\n")
    with pytest.raises(DataError, match=told):
        read_table(str(path))


@pytest.mark.parametrize("column", ["parametrization", "width", "log2_lr", "val_loss"])
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    rows = [{k: v for k, v in row.items() if k != column} for row in runs()]
    with pytest.raises(DataError, match=f"has no column {column}: it has"):
        read_table(table(tmp_path, rows))


def test_no_file_and_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_table(str(tmp_path / "none.csv"))
    (tmp_path / "empty.csv").write_text("parametrization,width,log2_lr,val_loss\n")
    with pytest.raises(DataError, match="has no runs"):
        read_table(str(tmp_path / "empty.csv"))


def test_the_verdict_is_printed_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = table(tmp_path, runs())
    assert conclude_table(path, [], True, None, None) == ["transfers"]
    [group] = json.loads(capsys.readouterr().out)["groups"]
    assert group["sizes"][0]["n_diverged"] == sum(8 + x > 3 for x in LRS)
    assert math.isclose(group["drift"]["octaves_per_doubling"], 0.0, abs_tol=0.01)
    assert [p.name for p in tmp_path.iterdir()] == ["runs.csv"]
