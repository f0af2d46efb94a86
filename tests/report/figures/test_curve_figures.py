"""The figures are files, the same bytes every time, for whatever a sweep has finished so far."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from run_results import results

from mupsweep.analysis.analysis import analyse
from mupsweep.errors import ConfigError
from mupsweep.report.figures.curves import LEGEND_CHARACTERS, _drift, _drift_legend, _mark_handles, draw
from mupsweep.report.figures.theme import figure_style
from mupsweep.report.forecasts import from_base


def test_same_analysis_gives_the_same_bytes(rows: Callable, tmp_path: Path) -> None:
    analysis = analyse(results(rows(widths=(32, 64), seeds=2)))
    first, second = (draw(analysis, tmp_path / name) for name in ("first", "second"))
    assert [p.name for p in first] == ["curves.png", "curves.svg", "drift.png", "drift.svg"]
    for file, again in zip(first, second, strict=True):
        assert file.read_bytes() == again.read_bytes()
    assert b"date" not in first[1].read_bytes()


def test_every_axis_has_its_own_figures(rows: Callable, tmp_path: Path) -> None:
    written = draw(analyse(results(rows(widths=(32, 64), depths=(4, 8), parametrizations=["mup"]))), tmp_path)
    assert {p.name for p in written if p.suffix == ".svg"} == {
        "curves.svg",
        "drift.svg",
        "curves-depth.svg",
        "drift-depth.svg",
    }


@pytest.mark.parametrize(
    "grid",
    [
        {"widths": [32], "log2_lrs": [-7], "seeds": 1},
        {"widths": [32, 64], "log2_lrs": [-2, -1, 0]},  # all diverged
        {"widths": [32, 64], "log2_lrs": [-10, -9, -8]},  # no optimum at any size
        {"widths": [32, 64], "seeds": 1, "log2_lrs": [-9, -8, -7, -6]},  # no intervals
        {"parametrizations": ["sp"], "widths": [32, 64, 128], "log2_lrs": [-8, -7.5, -7, -6.5]},  # one-sided bounds
        {"widths": [64, 128]},  # no base
        {"model": "a$b", "parametrizations": ["x^2", "$", "mup", "sp"], "widths": [32, 64]},
    ],
)
def test_degenerate_analyses_are_drawn(rows: Callable, tmp_path: Path, grid: dict) -> None:
    assert len(draw(analyse(results(rows(**grid))), tmp_path)) == 4


def test_a_trained_target_is_drawn_beside_its_forecast(rows: Callable) -> None:
    runs = rows(widths=(32, 64, 256), seeds=1)
    groups = analyse(results({**row, "validation": row["width"] == 256} for row in runs)).groups
    (axes,) = _drift(groups, figure_style("screen")).axes
    stars = [line.get_xydata()[0] for line in axes.get_lines() if line.get_marker() == "*"]
    measured = [from_base(v.optimum.estimate, g).value for g in groups for v in g.validations]
    assert [y for _, y in stars] == measured
    assert [x for x, _ in stars] == pytest.approx([3, 3], abs=0.05)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["32", "64", "×2", "256"]


def test_a_paper_gets_pdf_at_journal_widths_and_the_same_bytes_every_time(rows: Callable, tmp_path: Path) -> None:
    analysis = analyse(results(rows(widths=(32, 64), seeds=2)))
    first, second = (draw(analysis, tmp_path / name, "paper") for name in ("first", "second"))
    assert [p.name for p in first] == [f"{n}.{s}" for n in ("curves", "drift") for s in ("png", "svg", "pdf")]
    for file, again in zip(first, second, strict=True):
        assert file.read_bytes() == again.read_bytes()
    for pdf, inches in ((first[2], 6.9), (first[5], 3.35)):
        content = pdf.read_bytes()
        assert b"/FontFile2" in content  # TrueType
        assert b"/Type3" not in content
        box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ", content)
        assert box is not None
        assert float(box[1]) == pytest.approx(72 * inches)


def test_an_unknown_style_is_refused(rows: Callable, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--figures poster: did you mean 'paper'\?"):
        draw(analyse(results(rows(widths=(32,), seeds=1))), tmp_path, "poster")


def test_no_runs_no_figures(tmp_path: Path) -> None:
    assert draw(analyse([]), tmp_path) == []


def test_the_legend_names_what_is_drawn_and_no_more(rows: Callable) -> None:
    def marks(**grid: object) -> list[object]:
        return [
            line.get_label() for line in _mark_handles(analyse(results(rows(parametrizations=["sp"], **grid))).groups)
        ]

    cliff = ["valley, 95%", "cliff, and runs beyond it"]
    assert marks(widths=(32, 64)) == [*cliff, "optimum", "the base's optimum"]
    assert marks(widths=(32, 64), log2_lrs=[-10, -9, -8]) == ["valley, 95%", "optimum may lie beyond"]
    assert marks(widths=(32, 64), log2_lrs=[-10]) == []
    flat = [{**row, "val_loss": 3.0 + 1e-3 * row["seed"]} for row in rows(widths=[32], log2_lrs=range(-11, -6))]
    assert "optimum" not in [line.get_label() for line in _mark_handles(analyse(results(flat)).groups)]


def test_a_long_name_in_the_drift_legend_goes_on_below(rows: Callable) -> None:
    trained = rows(widths=(32, 64))
    groups = analyse(
        results([*trained, *({**row, "model": "llama_qiu_190m", "optimizer": "muon_plus_plus"} for row in trained)])
    ).groups
    lines = [line for g in groups for line in _drift_legend(g, groups, show_titles=True).splitlines()]
    assert max(map(len, lines)) <= LEGEND_CHARACTERS
