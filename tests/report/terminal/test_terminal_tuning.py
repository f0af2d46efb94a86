"""What is printed and written of a sweep whose hyperparameters were varied beside the LR."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from mupsweep.analysis.comparison import Comparison
from mupsweep.analysis.estimate import Estimate
from mupsweep.analysis.tuning import GapAfterTuning, SizeTuning, Tuning
from mupsweep.analysis.verdict import TRANSFERS
from mupsweep.launchers import Launcher
from mupsweep.launchers.driver import train
from mupsweep.report.generate import generate
from mupsweep.report.terminal.status import show_status
from mupsweep.report.terminal.tuning import gap_table, tuning_line
from mupsweep.schema import instantiate
from mupsweep.sweep import plan
from mupsweep.sweep.config import load

NONE = Estimate(None, None, None)


def at(width: int, best: float, gain: float) -> SizeTuning:
    estimate = Estimate(gain, gain - 0.01, gain + 0.01)
    return SizeTuning(width, 4, None, {1.0: estimate, best: estimate}, best, None, estimate, NONE, NONE)  # type: ignore[arg-type]


def test_a_hyperparameter_is_a_line_with_its_ends() -> None:
    names = ("nanogpt", "adamw", "mup")
    sizes = (at(32, 4.0, 0.02), at(64, 2.0, 0.03), at(128, 4.0, 0.05))
    tuning = Tuning(names, "optimizer.lr_ratio", 1.0, "width", sizes, NONE, TRANSFERS, ("it stays",))
    assert tuning_line(tuning) == (
        "adamw/mup, optimizer.lr_ratio in width: best 4 at 32x4, 4 at 128x4, 0.0500 [0.0400, 0.0600] nats lower there "
        "than the default, 1; transfers (it stays)"
    )


def test_the_gap_has_a_line_for_every_size_and_hyperparameter() -> None:
    def along(*lower: float) -> tuple[Comparison, ...]:
        of, over = ("nanogpt", "adamw", "mup"), ("nanogpt", "adamw", "sp")
        sizes = (32, 64)
        return tuple(
            Comparison(of, over, "width", size, 4, Estimate(nats, nats - 0.01, nats + 0.01), speed_up, NONE)
            for size, nats, speed_up in zip(sizes, lower, (Estimate(1.5, 1.2, None), NONE), strict=True)
        )

    closed = [
        GapAfterTuning("a", along(-0.02, -0.04), along(0.0, 0.01)),
        GapAfterTuning("b", along(-0.02, -0.04), along(0.0, -0.03)),
    ]
    _, rows = gap_table(closed)
    cells = [list(column) for column in zip(*rows, strict=True)]
    assert cells[0] == ["both at the defaults"] * 2 + ["each at its best a"] * 2 + ["each at its best b"] * 2
    assert cells[1] == ["32", "64"] * 3
    assert cells[3][1] == "-0.0400 [-0.0500, -0.0300] nats"
    assert cells[3][3] == "0.0100 [0.0000, 0.0200] nats"
    assert set(cells[4]) == {"1.50 [at least 1.20]", ""}
    assert [c.share for c in closed] == [pytest.approx(1.25), pytest.approx(0.25)]


def test_a_sweep_with_axes_is_reported_with_its_values_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [
        "experiment=smoke",
        "parametrization=sp,mup",
        "sweep.axes={model.init_std:[0.08],training.min_lr_frac:[0]}",
        "training.steps=4",
        "launcher=inline",
    ]
    config = load([*overrides, f"out={tmp_path}"])
    sweep, runs = plan.save(config, "")
    launcher: Launcher = instantiate(config.launcher, "launcher")
    assert train(launcher, sweep, runs)
    generate([sweep])
    show_status(sweep, per_run=False, as_json=False)
    output = capsys.readouterr().out
    assert "nanogpt/adamw/mup/model.init_std=0.08" in output  # the status
    with (sweep.results / "runs.csv").open(newline="") as file:
        values = [row["value"] for row in csv.DictReader(file)]
    assert {value: values.count(value) for value in set(values)} == {"": 12, "0.08": 12, "0.0": 12}
    written = json.loads((sweep.results / "transfer.json").read_text())
    assert [size["n_runs"] for group in written["groups"] for size in group["sizes"]] == [3, 3, 3, 3]
    assert "nanogpt / adamw / mup / model.init_std=0.08" in (sweep.results / "report.html").read_text()
