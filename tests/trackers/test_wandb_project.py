"""Projects of W&B as tables: the real client reads runs that it sent, or that a server of this machine holds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from wandb_server import StoredRun, WandbServer

from mupsweep.analysis.labels import DIVERGED
from mupsweep.errors import ConfigError, DataError
from mupsweep.store.results import read_runs
from mupsweep.store.tables import TableOptions
from mupsweep.sweep import plan
from mupsweep.sweep.config import load
from mupsweep.trackers.wandb import project, shut_down
from mupsweep.trackers.wandb.project import read_project
from mupsweep.training.worker import execute

SOURCE = "wandb:lab/lrs"
LOSSES = {-8.0: 3.5, -7.0: 3.25, -6.0: 3.75}


def store(server: WandbServer, name: str, log2_lr: float, loss: Any, state: str = "finished", **more: Any) -> StoredRun:
    """Put a run of another trainer into the project; `more` is of its config."""
    run = server.run(name)
    config = {"optimizer": {"name": "muon", "lr": 2.0**log2_lr}, "n_embd": 64, "loss": "cross_entropy", **more}
    run.fields = {"project": "lrs", "groupName": "first", "displayName": f"run of {name}"}
    run.fields["config"] = json.dumps({key: {"value": value} for key, value in config.items()} | {"_wandb": {}})
    run.summary = {"eval/loss": loss, "train/loss": 1.0, "lr": 0.0, "_step": 9, "_runtime": 12.5}
    run.state = state
    return run


@pytest.fixture
def three(server: WandbServer) -> WandbServer:
    for log2_lr, loss in LOSSES.items():
        store(server, f"lr{log2_lr:g}", log2_lr, loss)
    return server


def test_a_sweep_of_ours_is_read_as_its_records_are(server: WandbServer) -> None:
    overrides = ["sweep.width_ratios=[1]", "sweep.log2_lrs=[-9,-8,-7]", "sweep.name=ours", "training.steps=4"]
    sweep, _ = plan.save(load(["experiment=smoke", *overrides, "tracker=wandb", "tracker.mode=online"]), "")
    assert execute(sweep)
    table = read_project("wandb:lab/mupsweep", TableOptions(filters={"group": "ours"}))
    compared = ("names", "size", "width_ratio", "log2_lr", "seed", "status", "val_loss", "tokens")
    assert [[getattr(run, key) for key in compared] for run in table.runs] == [
        [getattr(run, key) for key in compared] for run in read_runs([sweep])
    ]


def test_config_says_how_and_summary_how_well(three: WandbServer) -> None:
    table = read_project(SOURCE, TableOptions())
    assert {run.log2_lr: run.val_loss for run in table.runs} == LOSSES
    assert {(run.optimizer, run.parametrization, run.width) for run in table.runs} == {("muon", "given", 64)}
    assert table.notes == (
        "read from wandb:lab/lrs: optimizer = optimizer.name, width = n_embd, lr = optimizer.lr, status = state, "
        "val_loss = eval/loss",
        "no column parametrization: all runs are of one, called given",
    )


def test_states_decide_what_counts(three: WandbServer) -> None:
    store(three, "on", -5, 3.0, "running")
    store(three, "dead", -4, 3.0, "crashed")
    store(three, "lost", -3, "NaN", "failed")
    store(three, "exploded", -2, math.inf)
    store(three, "silent", -1, None)
    store(three, "ours", 0, 9.0).summary["status"] = "diverged"
    table = read_project(SOURCE, TableOptions())
    assert {run.log2_lr for run in table.runs if run.status == DIVERGED} == {-3.0, -2.0, 0.0}
    assert table.notes[2:] == (
        "left out, crashed or failed, though the loss is no blow-up: run dead (run of dead)",
        "left out, no loss: run silent (run of silent)",
        "left out, still running: run on (run of on)",
    )


@pytest.mark.parametrize("filters", [{"group": "second"}, {"state": "killed"}, {"weight_decay": "0.1"}])
def test_filters_are_of_runs_and_of_their_config(three: WandbServer, filters: dict[str, str]) -> None:
    for log2_lr in LOSSES:
        run = store(three, f"other{log2_lr:g}", log2_lr, 9.0, "killed" if "state" in filters else "finished")
        run.fields["groupName"] = "second"
        run.summary["eval/loss"] = "NaN" if "state" in filters else 9.0
        config = json.loads(run.fields["config"]) | {"weight_decay": {"value": 0.1}}
        run.fields["config"] = json.dumps(config)
    if "state" in filters:
        with pytest.raises(DataError, match="the most is 0"):
            read_project(SOURCE, TableOptions(filters=filters))
        return
    table = read_project(SOURCE, TableOptions(filters=filters))
    assert {run.val_loss for run in table.runs} == {9.0}
    assert len(table.runs) == 3


def test_every_page_of_a_project_is_read(three: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(project, "PAGE", 2)
    assert len(read_project(SOURCE, TableOptions()).runs) == 3


def test_a_key_of_the_wrong_place_may_be_named(three: WandbServer) -> None:
    for run in three.runs.values():
        run.summary["lr"] = json.loads(run.fields["config"])["optimizer"]["value"]["lr"] / 2
    columns = {"lr": "lr", "val_loss": "train/loss"}
    table = read_project(SOURCE, TableOptions(columns=columns))
    assert {run.log2_lr: run.val_loss for run in table.runs} == {x - 1: 1.0 for x in LOSSES}


def test_losses_are_averaged_over_the_last_logged_ones(three: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(project, "STEPS", 50)
    store(three, "on", -5, 3.0, "running")
    store(three, "lost", -4, 3.0)
    for name, run in three.runs.items():
        rows = [{"_step": step, "train/loss": 1.0} for step in range(300)]
        for i, step in enumerate((0, 100, 200, 299)):  # not all within the last steps
            rows[step]["eval/loss"] = run.summary["eval/loss"] + (4 if i == 0 else 1) - i
        run.lines = {i: json.dumps(row) for i, row in enumerate(rows)}
        if name == "lost":
            run.lines[299] = json.dumps({"_step": 299, "eval/loss": "NaN"})
    table = read_project(SOURCE, TableOptions(average=3))
    assert {run.log2_lr: run.val_loss for run in table.runs} == {-8.0: 2.5, -7.0: 2.25, -6.0: 2.75, -4.0: None}
    assert table.notes[-1] == "losses are means over the last 3 that were logged"


def refusal(source: str = SOURCE, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_project(source, TableOptions(**options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_there_is_refused(three: WandbServer) -> None:
    assert refusal("wandb:lab/none") == (
        f"--from wandb:lab/none: no project lab/none on {three.url}, or none that this key may read: compare with the "
        "address of its page, wandb login --relogin changes the key"
    )
    assert refusal(filters={"group": "third"}) == (
        "--from wandb:lab/lrs has no runs with group=third: --filter chooses by group, state, tags or a config key"
    )
    assert refusal(filters={"n_embd": "65"}) == "--from wandb:lab/lrs has no run with n_embd=65: n_embd is 64"
    assert refusal(columns={"val_loss": "dev"}) == (
        "--from wandb:lab/lrs has no column dev (--columns val_loss=dev): it has state, optimizer.name, optimizer.lr, "
        "n_embd, eval/loss, train/loss, _step, _runtime"
    )
    store(three, "bad", -5, 0.0)
    assert refusal().startswith("--from wandb:lab/lrs, run bad (run of bad): eval/loss='0.0': expected a loss above 0")


def test_no_key_and_no_server_are_refused(three: WandbServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    three.broken = True
    monkeypatch.setattr(project, "TIMEOUT", 1)
    assert refusal().startswith(f"--from wandb:lab/lrs: {three.url} does not answer or refuses the API key (")
    three.broken = False
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY")
    shut_down()
    assert refusal() == (f"--from wandb:lab/lrs: no API key for {three.url}: wandb login, or set WANDB_API_KEY")


def test_an_address_has_an_entity() -> None:
    with pytest.raises(ConfigError) as caught:
        read_project("wandb:lrs", TableOptions())
    assert str(caught.value) == (
        "--from wandb:lrs: expected wandb:ENTITY/PROJECT, as in the address of the project's page"
    )


def test_the_command_reads_a_project(three: WandbServer, cli: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = cli("transfer", "--from", SOURCE, "--filter", "group=first", "--save", "runs.csv", "--json")
    assert (code, err) == (0, "")
    content = json.loads(out)
    assert content["groups"][0]["optimizer"] == "muon"
    assert len(content["notes"]) == 2
    code, out, _ = cli("transfer", "--from", "runs.csv", "--json")
    assert (code, json.loads(out)["groups"]) == (0, content["groups"])
