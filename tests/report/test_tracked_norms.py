"""Tracked norms as a table, in a notebook, in figures and in the report."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from xml.etree import ElementTree

import pytest
from run_results import results

import mupsweep
from mupsweep.analysis.analysis import analyse
from mupsweep.report.best_runs import best_runs
from mupsweep.report.generate import write_norm_views
from mupsweep.store.matrix_norms import MatrixNorm, columns, in_row
from mupsweep.store.sweep_dir import SweepDir

TRACKING = {"variants": [{"training": {"norm_points": 2}}], "sweep": {}, "launcher": {}, "tracker": {}}


@pytest.fixture
def sweep(rows: Callable, save_sweep: Callable[..., SweepDir], write_html: Callable) -> SweepDir:
    """Two variants at two widths; every run recorded two matrices after its first, middle and last step."""
    made = rows(widths=(32, 64), log2_lrs=(-8, -7, -6), seeds=1)
    sweep = save_sweep(made)
    sweep.write_config(TRACKING, "mupsweep run")
    for row in made:
        run = sweep.run(row["run_id"])
        norms = {
            step: [MatrixNorm("hidden", "up", row["width"] * step, 0.1), MatrixNorm("hidden", "down", 4.0 * step, 0.1)]
            for step in (1, 150, 300)
        }
        run.write_metrics({"step": step, "train_loss": 3.0, **columns(at_step)} for step, at_step in norms.items())
    write_html(sweep, analyse(results(made)))
    return sweep


def test_norms_are_a_table_two_figures_and_a_section_of_the_report(
    sweep: SweepDir, rows: Callable, write_html: Callable
) -> None:
    analysis = analyse(results(rows(widths=(32, 64), log2_lrs=(-8, -7, -6), seeds=1)))
    (table,) = write_norm_views([sweep], analysis)
    lines = list(csv.DictReader(table.read_text().splitlines()))
    assert len(lines) == 12 * 3 * 2
    line = next(line for line in lines if (line["width"], line["step"], line["tensor"]) == ("64", "150", "up"))
    assert [line[key] for key in ("role", "norm", "relative_update", "steps")] == ["hidden", "9600", "0.1", "300"]
    for name in ("norms", "updates"):
        svg = (sweep.figures / f"{name}.svg").read_text()
        ElementTree.fromstring(svg)
        drawn = {text.strip() for text in re.findall(r"<!--(.*?)-->", svg, re.DOTALL)}
        assert {"hidden", "SP", "width 32", "width 64", "share of the run"} <= drawn
    html = write_html(sweep, analysis).read_text()
    assert html.count("data:image/svg+xml;base64,") == 2
    assert "Norms through training" in html


def test_a_notebook_has_the_norms(sweep: SweepDir) -> None:
    norms = mupsweep.load(sweep.path).norms()
    assert {(row.role, row.tensor, row.step) for row in norms} == {
        ("hidden", tensor, step) for tensor in ("up", "down") for step in (1, 150, 300)
    }
    assert [row.norm for row in norms if row.width == 32 and row.tensor == "up"][:3] == [32, 4800, 9600]


def test_the_run_nearest_to_the_best_lr_is_shown(rows: Callable) -> None:
    analysis = analyse(results(rows(widths=(32, 64), seeds=2, parametrizations=["mup"])))
    assert {size: (run.log2_lr, run.seed) for (_, size), run in best_runs(analysis).items()} == {
        (32, 4, None): (-7.0, 0),
        (64, 4, None): (-7.0, 0),
    }


def test_without_norms_nothing_is_written(rows: Callable, save_sweep: Callable[..., SweepDir]) -> None:
    assert write_norm_views([save_sweep(rows(widths=[32], seeds=1))], analyse([])) == []


def test_a_row_gives_back_what_its_columns_say() -> None:
    norms = [MatrixNorm("hidden", "blocks.0.mlp.up.weight", 1.5, 0.25), MatrixNorm("output", "head.weight", None, None)]
    assert in_row({"step": 3, "grad_norm": 1.0, **columns(norms)}) == norms
    assert in_row({"step": 3, "norm_hidden/up": "wide", "val_loss": 2.0}) == []
