"""mupsweep check: what it prints, its JSON, its figure, its exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mupsweep.optimizers.adamw import AdamW
from mupsweep.report.html import coordinates
from mupsweep.scaling import Role
from mupsweep.scaling.laws import GRADIENT
from mupsweep.sweep import config, plan, tensor_rules
from mupsweep.training import build

SMALL = ("model.width=16", "sweep.depth_ratios=[1]", "sweep.seeds=[0]", "sweep.log2_lrs=[-9]", "parametrization=mup")
KNOWN = (*SMALL, "sweep.seeds=[0,1,2]")  # with one seed the interval of attention logits is too wide to tell
FOREIGN = ("optimizer=foreign", "optimizer.path=torch.optim.NAdam", "allow_imports=true")

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def dropped_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden matrices keep the LR of the base."""
    right = tensor_rules.rules

    def wrong(*arguments: object) -> tuple[tensor_rules.TensorRule, ...]:
        rows = right(*arguments)  # type: ignore[arg-type]
        return tuple(replace(r, lr=r.lr / r.lr_ratio) if r.role is Role.HIDDEN else r for r in rows)

    monkeypatch.setattr(build, "rules", wrong)


@pytest.mark.slow
def test_overrides_alone_check_coordinates_draw_a_figure_and_are_kept_with_a_sweep(cli: Cli, tmp_path: Path) -> None:
    figure = tmp_path / "check.svg"
    sweep, _ = plan.save(config.load(["experiment=smoke", f"out={tmp_path}"]), "")
    code, out, _ = cli("check", *KNOWN, "--figure", str(figure), "--into", str(sweep.path))
    assert code == 0
    assert "nanogpt/adamw/mup, base LR 2^-9" in out
    assert "nanogpt/adamw/sp," not in out  # stands beside, in a column
    head = next(line for line in out.splitlines() if line.startswith("exponent of the width"))
    assert head.split()[-5:] == ["95", "%", "interval", "promise", "sp"]
    for name in ("change of features", "change of logits", "||dW||_R hidden", "||W||_R hidden"):
        (line,) = (line for line in out.splitlines() if line.startswith(f"{name} "))
        assert line.endswith("ok"), line
    assert "passed: 13 promises kept within 0.1" in out
    assert figure.read_text().startswith("<?xml")
    (label, mup), *_ = [pair for pair in coordinates.read(sweep) if pair[0][2] == "mup"]
    assert label == ("nanogpt", "adamw", "mup")
    lines = {line[2]: line for line in coordinates.table_rows([(label, mup)])}
    assert lines["change of features"][4:] == ("0", "ok")
    assert "13 of 13 promises kept" in coordinates.verdicts([(label, mup)])


def test_an_outcome_is_kept_with_a_sweep_that_is_there_as_its_json(cli: Cli, tmp_path: Path) -> None:
    assert cli("check", *SMALL, "--into", "sweeps/none")[0] == 2
    sweep, _ = plan.save(config.load(["experiment=smoke", f"out={tmp_path}"]), "")
    _, out, _ = cli("check", *SMALL, "sweep.width_ratios=[1,2,4]", "--json", "--into", str(sweep.path))
    assert json.loads(sweep.check_path.read_text()) == json.loads(out)


def test_an_interval_too_wide_to_tell_is_inconclusive_and_not_ok(cli: Cli) -> None:
    code, out, _ = cli("check", *SMALL)
    assert code == 1
    (line,) = (line for line in out.splitlines() if line.startswith("change of attention logits "))
    assert line.endswith("too wide"), line
    assert "inconclusive, add sizes or seeds: change of attention logits goes as width^" in out
    assert "INCONCLUSIVE: 1 of 13 intervals is wider than 0.5" in out
    assert "passed: " not in out


def test_a_check_that_diverges_everywhere_fails_whatever_the_search(cli: Cli) -> None:
    code, out, _ = cli("check", *SMALL, "sweep.log2_lrs=[40]", "sweep.search=adaptive")
    assert code == 1
    widths = ", ".join(f"width {16 * ratio}" for ratio in (8, 4, 2, 1))
    assert f"{widths} diverged: give a lower LR" in out
    assert "FAILED: some runs diverged" in out


def test_sp_alone_is_shown_and_promises_nothing(cli: Cli) -> None:
    code, out, _ = cli("check", *SMALL, "parametrization=sp")  # the last word counts
    assert code == 0
    assert "nanogpt/adamw/sp, base LR 2^-9" in out
    assert "sp promises nothing along the width" in out


def test_a_broken_rule_exits_with_1_and_names_the_tensor(cli: Cli, dropped_rule: None) -> None:
    code, out, _ = cli("check", "coordinates", *SMALL)
    assert code == 1
    assert "FAILED: " in out
    assert any(line.startswith("hidden: its LR") and "||dW||_R of blocks.*." in line for line in out.splitlines())
    (line,) = (line for line in out.splitlines() if line.startswith("||dW||_R hidden "))
    assert "off blocks.*." in line


def test_coordinates_as_json(cli: Cli, dropped_rule: None) -> None:
    code, out, _ = cli("check", *SMALL, "--json")
    assert code == 1
    sp, mup = json.loads(out)["variants"]
    label = {"model", "optimizer", "parametrization"}
    assert set(mup) == label | {"log2_lr", "passed", "diverged", "causes", "roles", "rows"}
    assert (sp["parametrization"], sp["passed"], mup["parametrization"], mup["passed"]) == ("sp", True, "mup", False)
    assert mup["causes"][0].startswith("hidden: its LR or eps does not fit its updates: ")
    keys = {"axis", "quantity", "tensor", "role", "promised", "off", "sizes", "after"}
    assert all(set(row) == keys for row in mup["rows"])
    row = next(row for row in mup["rows"] if (row["quantity"], row["tensor"]) == ("||dW||_R", "head.weight"))
    assert (row["role"], row["promised"], row["off"], row["sizes"]) == ("output", "1", False, [16, 32, 64, 128])
    assert set(row["after"]) == {"2", "5", "10"}
    assert set(row["after"]["10"]) == {"value", "low", "high", "values"}
    assert any(row["off"] and row["role"] == "hidden" for row in mup["rows"])


def test_a_law_that_agrees_exits_with_0(cli: Cli) -> None:
    code, out, _ = cli("check", "law", "optimizer=adamw")
    assert code == 0
    declared, by_condition = out.split("rank 1 after")
    lines = {line.split("  ")[0]: line for line in declared.splitlines()}
    assert lines["degree"].endswith("+0.00  ok")
    assert lines["n_out and n_in"].endswith("+1.00  ok")
    lines = {line.split("  ")[0]: line.split()[-5:] for line in by_condition.splitlines()}
    assert lines["degree"] == ["+0.00"] * 4 + ["ok"]
    assert "LR under spectral: input 1, hidden r_n^-1, output 1, input_vector 1, hidden_vector 1" in out
    assert "weight decay: a step subtracts lr * weight_decay * W" in out
    assert "use it" not in out


def test_a_law_that_is_wrong_exits_with_1_and_names_its_exponents(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdamW, "base_law", lambda self, dims=None: GRADIENT)
    code, out, _ = cli("check", "law", "optimizer=adamw")
    assert code == 1
    assert "off: degree is +0.00 [-0.05, +0.05], declared +1.00" in out


def test_a_foreign_law_is_printed_as_the_override_that_uses_it(cli: Cli) -> None:
    code, out, _ = cli("check", "law", *FOREIGN)
    assert code == 0
    (line,) = (line for line in out.splitlines() if line.startswith("use it: "))
    overrides = "optimizer=foreign optimizer.path=torch.optim.NAdam allow_imports=true"
    assert line == f"use it: mupsweep run {overrides} 'optimizer.law={{degree: 0, n_out: 1/2, n_in: 1/2}}'"
    law = line.rpartition("'optimizer.law=")[2].rstrip("'")
    code, out, _ = cli("rules", "experiment=smoke", *FOREIGN, f"optimizer.law={law}")
    assert code == 0
    assert next(line for line in out.splitlines() if line.startswith("hidden ")).split()[4] == "r_n^-1"


def test_a_law_that_changes_exits_with_1_and_gives_no_rule(cli: Cli) -> None:
    code, out, _ = cli("check", "law", *(word.replace("NAdam", "RAdam") for word in FOREIGN))
    assert code == 1
    ends = "+0.00 on fresh gradients after 50 steps and +1.00 on fresh gradients after 3 steps"
    assert f"changes: degree is {ends}: no rule fits both" in out
    assert "no law follows from exponents that change: take another optimizer" in out
    assert "use it" not in out
    assert "LR under" not in out


def test_laws_as_json(cli: Cli) -> None:
    code, out, _ = cli("check", "law", *FOREIGN, "--json")
    assert code == 0
    (found,) = json.loads(out)["optimizers"]
    assert found["law"] == {"degree": "0", "n_out": "1/2", "n_in": "1/2"}
    assert found["path"] == "torch.optim.NAdam"
    assert found["lr"]["hidden"] == "r_n^-1"
    assert set(found["exponents"]) == {"degree", "n_out", "n_in", "n_out and n_in", "depth", "weight norm"}
    assert set(found["exponents"]["n_out"]) == {"rank_1", "real", "declared", "snapped", "off", "under", "changes"}
    conditions = [(condition["fresh"], condition["steps"]) for condition in found["exponents"]["degree"]["under"]]
    assert conditions == [(False, 3), (True, 3), (False, 50), (True, 50)]
    assert found["exponents"]["depth"]["rank_1"] is None
    assert (found["agrees"], found["monomial"]) == (True, True)


def test_a_foreign_optimizer_without_a_law_is_refused_in_one_line_by_rules_and_run(cli: Cli, tmp_path: Path) -> None:
    for command in ("rules", "run", "plan"):
        code, out, err = cli(command, "experiment=smoke", *FOREIGN)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1
        assert "mupsweep check law optimizer=foreign optimizer.path=torch.optim.NAdam allow_imports=true" in err
    assert not (tmp_path / "sweeps").exists()


def test_foreign_code_is_refused_without_consent(cli: Cli) -> None:
    code, _, err = cli("check", "law", *FOREIGN[:-1])
    assert code == 2
    assert "add allow_imports=true if you trust it" in err
