"""What `mupsweep rules` says beside the rules, and when a sweep is over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mupsweep.analysis.labels import DONE
from mupsweep.atomic_files import write_json
from mupsweep.optimizers.muon import SHAPE_FACTORS
from mupsweep.report.terminal.rules import show_rules
from mupsweep.report.terminal.status import is_over
from mupsweep.store.run_dir import FAILED, RUNNING
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import config, plan

SMALL = ["experiment=smoke", "parametrization=mup", "sweep.width_ratios=[1,2]", "sweep.log2_lrs=[-5]"]


@pytest.mark.parametrize("name", ["muon", "muon_jordan", "muon_bernstein", "muon_kimi"])
def test_rules_of_muon_give_the_lr_of_the_same_step_in_every_convention(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    show_rules(config.load([*SMALL, f"optimizer={name}"]), as_json=True, per_tensor=False)
    document = json.loads(capsys.readouterr().out)
    own = name.partition("_")[2] or "plain"
    for size in document["sizes"]:
        lrs = {tuple(t["shape"]): t["lr"] for t in size["tensors"] if t["role"] == "hidden"}
        rows = size["muon_conventions"]
        assert {(row["n_out"], row["n_in"]) for row in rows} == set(lrs)
        for row in rows:
            n_out, n_in = row["n_out"], row["n_in"]
            assert row["scaling"] == own
            assert row[own] == pytest.approx(lrs[n_out, n_in])
            plain = row["plain"]
            assert row["jordan"] == pytest.approx(plain / max(1, n_out / n_in) ** 0.5)
            assert row["bernstein"] == pytest.approx(plain / (n_out / n_in) ** 0.5)
            assert row["kimi"] == pytest.approx(plain / (0.2 * max(n_out, n_in) ** 0.5))


@pytest.mark.parametrize("name", ["adamw", "muon_hyperball", "muon optimizer.block_size=8"])
def test_rules_of_others_give_none(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = config.load([*SMALL, *f"optimizer={name}".split()])
    show_rules(loaded, as_json=True, per_tensor=False)
    assert [size["muon_conventions"] for size in json.loads(capsys.readouterr().out)["sizes"]] == [[], []]
    show_rules(loaded, as_json=False, per_tensor=False)
    assert "the other conventions of Muon" not in capsys.readouterr().out


def test_the_table_names_torchs_conventions(capsys: pytest.CaptureFixture[str]) -> None:
    show_rules(config.load([*SMALL, "optimizer=muon"]), as_json=False, per_tensor=False)
    out = capsys.readouterr().out
    header = next(line for line in out.splitlines() if line.startswith("n_out x n_in"))
    assert all(convention in header for convention in SHAPE_FACTORS)
    assert "jordan (torch: original)" in header
    assert "kimi (torch: match_rms_adamw)" in header
    assert out.count("128x32") >= 2


def end(sweep: SweepDir, state: str = DONE) -> None:
    """Every run of a sweep has ended, with a loss that falls with the LR."""
    for row in sweep.read_plan():
        run = sweep.run(row["run_id"])
        run.path.mkdir(parents=True)
        run.write_status(state, durable=False)
        write_json(run.summary_path, {**row, "status": state, "val_loss": 3 - 0.1 * row["log2_lr"]}, durable=False)


def test_a_grid_is_over_when_every_run_has_its_result(tmp_path: Path, cli: Callable) -> None:
    sweep, runs = plan.save(config.load(["experiment=smoke", f"out={tmp_path}"]), "")
    assert not is_over(sweep)
    end(sweep)
    assert is_over(sweep)
    code, out, _ = cli("status", str(sweep.path), "--watch")  # which does not stay
    assert code == 0
    assert f"all planned runs have ended; what they say: mupsweep transfer {sweep.path}" in out
    for state in (RUNNING, FAILED):
        sweep.run(runs[0].run_id).write_status(state)
        assert not is_over(sweep)


def test_a_search_is_not_over_while_it_wants_runs(tmp_path: Path) -> None:
    sweep, _ = plan.save(config.load(["experiment=smoke", "sweep.search=adaptive", f"out={tmp_path}"]), "")
    end(sweep)
    assert not is_over(sweep)  # the best LR is the highest
