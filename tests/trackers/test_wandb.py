"""W&B: the real client sends a server every record, once, whatever happened to the sweep."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from damage import damaged_file, of_one_folder, undamaged_copy
from forked import Forked
from hypothesis import given, settings
from hypothesis import strategies as st
from outcome import OF_THE_CLOCK
from run_results import results
from wandb_server import API_KEY, StoredRun, WandbServer

from mupsweep.analysis.analysis import analyse
from mupsweep.analysis.labels import DIVERGED, DONE
from mupsweep.errors import RecordError
from mupsweep.report.generate import generate
from mupsweep.report.results_files import write_results
from mupsweep.store.run_dir import RunDir
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.config import load
from mupsweep.trackers import live
from mupsweep.trackers import wandb as wandb_tracker
from mupsweep.trackers.wandb import StoredRun as StoredSummary
from mupsweep.trackers.wandb import Wandb, client_folder, numbered, shut_down, summary, summary_id, wandb_id
from mupsweep.training.worker import execute

SMALL = ["experiment=smoke", "sweep.width_ratios=[1,2]", "sweep.log2_lrs=[-9,-7]", "sweep.name=tracked"]
ONLINE = ["tracker=wandb", "tracker.mode=online"]
ONE = ["sweep.width_ratios=[1]", "sweep.log2_lrs=[-8]", "training.steps=60", *ONLINE]
HELD = 20  # the step at which a test interferes


DRAWN = 0.15  # octaves

# wandb-workspaces still makes validators in the way of pydantic 1
of_the_clients_own = pytest.mark.filterwarnings("ignore:Pydantic V1 style")


def planned(*overrides: str) -> SweepDir:
    sweep, _ = plan.save(load([*SMALL, *overrides]), "")
    return sweep


def worker_of(sweep: SweepDir) -> list[str]:
    """Return the command of a worker whose tracker reads records as often as this process does."""
    code = f"import mupsweep.cli, mupsweep.trackers.live as live; live.POLL = {live.POLL}\nmupsweep.cli.main()"
    return [sys.executable, "-c", code, "worker", str(sweep.path), "--device", "cpu"]


def interfere(monkeypatch: pytest.MonkeyPatch, server: WandbServer, act: Callable[[], None]) -> None:
    """Do something once, when a run's training is at step HELD and the server knows it."""
    append, waiting = RunDir.append_metrics, [act]

    def hold(run: RunDir, row: dict[str, Any]) -> None:
        append(run, row)
        if row["step"] == HELD and waiting:
            server.wait_for_rows(wandb_id(SweepDir(run.path.parents[1]), run.run_id), HELD)
            waiting.pop()()

    monkeypatch.setattr(RunDir, "append_metrics", hold)


def content(run: StoredRun) -> dict[str, Any]:
    """Return what must not depend on how a run got to the server."""
    stored = run.content
    stored["summary"] = {k: v for k, v in stored["summary"].items() if k not in (*OF_THE_CLOCK, "mirrored")}
    return stored


def assert_mirrored(server: WandbServer, sweep: SweepDir) -> None:
    """Assert that the server holds exactly the runs of the sweep, every row of their records once."""
    ids = {row["run_id"]: wandb_id(sweep, row["run_id"]) for row in sweep.read_plan()}
    assert {name for name in server.runs if "-summary" not in name} == set(ids.values())
    for run_id, name in ids.items():
        record, stored = sweep.run(run_id), server.runs[name]
        rows = [{"_step" if k == "step" else k: v for k, v in row.items() if v is not None} for row in record.metrics()]
        assert stored.history == rows
        summary = record.summary()
        assert summary is not None
        assert {k: stored.summary.get(k) for k in summary} == summary
        assert stored.state == "finished"


def summary_of(server: WandbServer) -> StoredRun:
    """The run that summarises the sweep."""
    (name,) = [name for name in server.runs if name.startswith("tracked-summary-")]
    return server.runs[name]


def test_a_sweep_is_pushed_while_it_trains_with_its_rules_and_axes(server: WandbServer) -> None:
    sweep = planned(*ONLINE)
    assert execute(sweep)
    assert_mirrored(server, sweep)
    run = next(r for name, r in server.runs.items() if "w32" in name)
    assert run.fields["groupName"] == "tracked"
    assert run.fields["jobType"] == "train"
    assert run.fields["tags"] == ["nanogpt", "adamw", "spectral", "done"]
    assert set(run.config["rules"]) == {"input", "hidden", "output", "input_vector", "hidden_vector"}
    hidden = run.config["rules"]["hidden"]
    assert hidden["optimizer"] == "adamw"
    assert hidden["lr"] == pytest.approx(2 ** run.config["log2_lr"] / 2)  # the hidden LR of AdamW is 1 / width
    assert run.config["curve"] == "nanogpt/adamw/spectral"
    metrics = json.loads(run.fields["config"])["_wandb"]["value"]["m"]
    assert {metric.get("1") or metric.get("2") for metric in metrics} >= {"tokens", "*"}
    assert {metric.get("5") for metric in metrics} == {None, 1}  # all but the tokens are drawn over the first metric


def analysed(*overrides: str) -> SweepDir:
    """A sweep without rows whose losses are parabolas over log2 LR, lowest at -8 + log2(width / 16) / 2."""
    sweep = planned(*ONLINE, "sweep.log2_lrs=[-11,-10,-9,-8,-7,-6,-5]", *overrides)
    for run in plan.load(sweep):
        best = -8 + math.log2(run.size.width_ratio) / 2
        loss = 3 + 0.1 * (run.log2_lr - best) ** 2
        measured = {"status": DONE, "steps": 30, "tokens": 3840, "train_loss": loss, "val_loss": loss}
        unknown = dict.fromkeys(("val_bits_per_byte", "diverged_at_step", "tokens_per_second"))
        folder = sweep.run(run.run_id)
        folder.path.mkdir(parents=True)
        folder.write_summary(
            {"run_id": run.run_id, **run.label_columns(), **measured, **unknown, "seconds": 1, "device": "cpu"}
        )
        folder.write_status(DONE)
    generate([sweep])
    return sweep


@of_the_clients_own
def test_the_summary_run_has_charts_tables_verdicts_and_the_report(server: WandbServer) -> None:
    sweep = analysed("parametrization=sp,spectral")
    run = summary_of(server)
    assert len(server.runs) == 1
    assert run.state == "finished"
    assert run.fields["jobType"] == "summary"
    charts = json.loads(run.fields["config"])["_wandb"]["value"]["visualize"]
    curves = [f"loss_vs_lr/nanogpt/adamw/{name}" for name in ("sp", "spectral")]
    assert {key: chart["panel_config"]["panelDefId"] for key, chart in charts.items()} == dict.fromkeys(
        [*curves, "drift/width"], "wandb/lineseries/v0"
    )
    lines = {key: table(run, f"{key}_table") for key in charts}
    assert len(lines[curves[0]]) == 14
    assert lines[curves[0]]["width 32, depth 2", -8.0] == pytest.approx(3 + 0.1 * 0.5**2)
    for name in ("sp", "spectral"):
        assert lines["drift/width"][f"nanogpt/adamw/{name}", 0] == pytest.approx(-8, abs=DRAWN)
        assert lines["drift/width"][f"nanogpt/adamw/{name}", 1] == pytest.approx(-7.5, abs=DRAWN)
        ends = [lines["drift/width"][f"nanogpt/adamw/{name}, at {end}", 1] for end in ("least", "most")]
        assert ends[0] <= -7.5 <= ends[1]
    assert run.summary["tables/runs"]["nrows"] == 28
    assert run.summary["tables/drift"]["nrows"] == 4
    assert run.summary["tables/verdicts"]["nrows"] == 2
    assert run.summary["drift/nanogpt/adamw/sp/width"] == pytest.approx(0.5, abs=DRAWN)
    for name in ("drift", "total_drift", "regret"):  # an interval stands beside every estimate
        low, value, high = (
            run.summary[f"{key}/nanogpt/adamw/sp/width"] for key in (f"{name}_low", name, f"{name}_high")
        )
        assert low <= value <= high
    (verdict,) = {run.summary[f"verdict/nanogpt/adamw/{name}/width"] for name in ("sp", "spectral")}
    assert run.fields["tags"] == [verdict]
    for name in ("curves", "drift"):  # the report's figures
        assert run.files[run.summary[f"figures/{name}"]["path"]] == (sweep.figures / f"{name}.png").read_bytes()
    report = next(body for name, body in run.files.items() if name.endswith(".html"))
    assert report.decode() == (sweep.results / "report.html").read_text()


def test_a_chart_has_no_point_where_seeds_diverged_and_a_line_for_every_horizon(tmp_path: Path) -> None:
    sweep = SweepDir(tmp_path)
    names = {"model": "nanogpt", "optimizer": "adamw", "parametrization": "sp", "width": 32, "depth": 4}
    row = {**names, "width_ratio": 1.0, "depth_ratio": 1.0, "seed": 0, "status": DONE, "val_loss": 3.0}
    runs = [{**row, "log2_lr": lr, "horizon": tokens} for lr in (-8.0, -7.0) for tokens in (1000, 2000)]
    dead = {**row, "log2_lr": -7.0, "horizon": 2000, "seed": 1, "status": DIVERGED, "val_loss": None}
    write_results(sweep.results, analyse(results([*runs, dead])))
    assert summary.curve_charts(sweep)["loss_vs_lr/nanogpt/adamw/sp"] == {
        "width 32, depth 4, 1000 tokens": [(-8.0, 3.0), (-7.0, 3.0)],
        "width 32, depth 4, 2000 tokens": [(-8.0, 3.0)],
    }


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings of mupsweep."""
    return [r.message for r in caplog.records if r.name == "mupsweep" and r.levelno >= logging.WARNING]


def table(run: StoredRun, key: str) -> dict[tuple[str, float], float]:
    """(line, x) -> y of a line-series chart."""
    (path,) = [run.summary[key]["path"]]
    return {(line, x): y for x, line, y in json.loads(run.files[path])["data"]}


@of_the_clients_own
def test_pushing_again_sends_nothing(server: WandbServer, cli: Callable[..., tuple[int, str, str]]) -> None:
    sweep = planned(*ONLINE)
    assert execute(sweep)
    generate([sweep])
    before = {name: (run.sessions, dict(run.lines)) for name, run in server.runs.items()}
    generate([sweep])
    code, out, err = cli("sync", str(sweep.path))
    assert (code, out, err) == (0, "0 of 4 runs pushed to lab/mupsweep, group tracked\n", "")
    assert {name: (run.sessions, dict(run.lines)) for name, run in server.runs.items()} == before


@of_the_clients_own
def test_an_offline_sweep_that_is_synced_ends_like_an_online_one(
    server: WandbServer, cli: Callable[..., tuple[int, str, str]]
) -> None:
    online = planned(*ONLINE)
    assert execute(online)
    generate([online])
    expected = {name: content(run) for name, run in server.runs.items()}
    offline = planned("out=elsewhere")  # tracker=jsonl
    assert execute(offline)
    generate([offline])
    code, out, _ = cli("sync", str(offline.path), "--project", "later")
    assert code == 0
    assert out == "4 of 4 runs pushed to lab/later, group tracked\n"
    got = {name: content(run) for name, run in server.runs.items()}
    (summary_name,) = {name for name in expected if "-summary" in name}
    for stored in (expected, got):  # tables are named by what is in them, and that holds seconds
        stored.pop(summary_name)
    for name, run in expected.items():
        for key, value in run.items():
            assert got[name][key] == value


def test_a_stopped_run_is_preempted_and_ends_like_an_undisturbed_one(
    server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = planned(*ONE)
    interfere(monkeypatch, server, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert not execute(sweep)
    (run,) = server.runs.values()
    assert run.state == "preempted"
    assert len(run.lines) == HELD
    assert execute(sweep)
    assert_mirrored(server, sweep)
    assert len(run.lines) == 60


def hang_when_held(poll: float) -> None:
    """Have this process stop at step HELD, and read records as often as the test does."""
    append = RunDir.append_metrics

    def hang(run: RunDir, row: dict[str, Any]) -> None:
        append(run, row)
        if row["step"] >= HELD:
            time.sleep(600)

    live.POLL = poll
    RunDir.append_metrics = hang  # type: ignore[method-assign]


def test_a_killed_worker_leaves_neither_doubled_nor_missing_rows(server: WandbServer) -> None:
    sweep = planned(*ONE)
    worker = Forked("worker", str(sweep.path), "--device", "cpu", first=partial(hang_when_held, live.POLL))
    try:
        server.wait_for_rows(wandb_id(sweep, sweep.read_plan()[0]["run_id"]), HELD)
    finally:
        worker.kill()  # no checkpoint yet: the run starts again, behind what the server holds
        worker.wait()
    assert sweep.counts()["done"] == 0
    assert execute(sweep)
    assert_mirrored(server, sweep)


@pytest.mark.slow
@of_the_clients_own
def test_two_workers_on_one_sweep_push_every_run_once(server: WandbServer) -> None:
    sweep = planned(*ONLINE)
    workers = [subprocess.Popen(worker_of(sweep)) for _ in range(2)]
    assert [worker.wait() for worker in workers] == [0, 0]
    generate([sweep])
    assert_mirrored(server, sweep)
    assert {run.sessions for run in server.runs.values()} == {1}


@of_the_clients_own
def test_an_unreachable_server_costs_one_warning_and_no_run(
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cli: Callable[..., tuple[int, str, str]],
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: nothing listens
    sweep = planned(*ONLINE, "tracker.init_timeout=1")
    with caplog.at_level(logging.WARNING, logger="mupsweep"):
        assert execute(sweep)
    assert sweep.counts()["done"] == 4
    assert [line.split(":")[0] for line in warnings_of(caplog)] == ["tracker"]
    assert f"`mupsweep sync {sweep.path}` mirrors them later" in warnings_of(caplog)[0]
    code, _, err = cli("sync", str(sweep.path))
    assert code == 2
    assert err.startswith(f"mupsweep: W&B does not take {sweep.path}: ")
    assert err.count("\n") == 1
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    shut_down()  # a new process finds the server
    assert cli("sync", str(sweep.path))[0] == 0
    assert_mirrored(server, sweep)


@of_the_clients_own
@pytest.mark.parametrize("fault", ["broken", "silent"])
def test_a_server_that_fails_in_the_middle_is_caught_up_with_later(
    fault: str,
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cli: Callable[..., tuple[int, str, str]],
) -> None:
    sweep = planned(*ONE, "tracker.finish_timeout=1", "tracker.init_timeout=1")
    interfere(monkeypatch, server, lambda: setattr(server, fault, True))
    with caplog.at_level(logging.WARNING, logger="mupsweep"):
        assert execute(sweep)
    assert sweep.counts()["done"] == 1
    assert [line.split(":")[0] for line in warnings_of(caplog)] == ["tracker"]
    setattr(server, fault, False)
    shut_down()  # a new process finds a new server
    assert cli("sync", str(sweep.path))[0] == 0
    assert_mirrored(server, sweep)


@of_the_clients_own
def test_the_workspace_shows_curves_and_drift_and_is_saved_once(server: WandbServer) -> None:
    pytest.importorskip("wandb_workspaces")
    sweep = analysed("parametrization=sp,spectral")
    generate([sweep])
    (view,) = server.views.values()
    assert view["displayName"] == "tracked LR transfer"
    section = json.loads(view["spec"])["section"]
    panels = {p["name"]: json.dumps(p["panels"]) for p in section["panelBankConfig"]["sections"] if p["panels"]}
    for name in ("sp", "spectral"):
        assert f"loss_vs_lr/nanogpt/adamw/{name}_table" in panels["Loss versus LR"]
    assert "drift/width_table" in panels["Drift of the best LR"]
    assert '"tracked"' in json.dumps(section["runSets"])


def test_without_the_workspaces_package_one_line_says_what_to_install(
    server: WandbServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    sweep = planned(*ONLINE, "sweep.width_ratios=[1]")
    assert execute(sweep)
    with caplog.at_level(logging.WARNING, logger="mupsweep"):
        generate([sweep])
    assert warnings_of(caplog) == [
        "no W&B Workspace: pip install 'mupsweep[workspaces]', or set tracker.workspace=false"
    ]
    assert summary_of(server).state == "finished"


@of_the_clients_own
def test_no_key_reaches_the_records_and_no_environment_the_server(server: WandbServer) -> None:
    sweep = planned(*ONLINE, "sweep.width_ratios=[1]")
    assert execute(sweep)
    generate([sweep])
    for path in sweep.path.rglob("*"):
        assert not path.is_file() or API_KEY.encode() not in path.read_bytes(), path
    uploaded = {name for run in server.runs.values() for name in run.files}
    assert not uploaded & {"wandb-metadata.json", "requirements.txt", "output.log"}


@pytest.fixture
def short_first_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attempt to open a run ends before the client asks a second time, which it does after 2 s."""
    monkeypatch.setattr(wandb_tracker, "FIRST_INIT_TIMEOUT", 1.0)


@of_the_clients_own
@pytest.mark.usefixtures("short_first_attempt")
def test_a_deleted_run_goes_on_under_another_id_and_the_others_as_before(
    server: WandbServer, caplog: pytest.LogCaptureFixture, cli: Callable[..., tuple[int, str, str]]
) -> None:
    sweep = planned("sweep.width_ratios=[1]", "tracker=wandb", "tracker.mode=offline")
    assert execute(sweep)
    lost, kept = (wandb_id(sweep, row["run_id"]) for row in sweep.read_plan())
    server.deleted.add(lost)
    with caplog.at_level(logging.WARNING, logger="mupsweep"):
        code, out, err = cli("sync", str(sweep.path))
    assert (code, out, err) == (0, "2 of 2 runs pushed to lab/mupsweep, group tracked\n", "")
    (warning,) = [line for line in warnings_of(caplog) if "deleted" in line]
    assert lost in warning
    assert set(server.runs) == {f"{lost}-2", kept}
    assert server.refused == [lost]  # asked once, and not until init_timeout ends
    assert len(server.runs[f"{lost}-2"].history) == len(server.runs[kept].history) == 30
    assert cli("sync", str(sweep.path))[1] == "0 of 2 runs pushed to lab/mupsweep, group tracked\n"


@pytest.mark.usefixtures("short_first_attempt")
def test_a_server_that_is_slow_to_open_a_run_is_asked_again(
    server: WandbServer, caplog: pytest.LogCaptureFixture
) -> None:
    sweep = planned(*ONE)
    server.busy = 1
    with caplog.at_level(logging.WARNING, logger="mupsweep"):
        assert execute(sweep)
    assert (server.busy, warnings_of(caplog)) == (0, [])
    (run,) = server.runs.values()
    assert len(run.history) == 60


@pytest.mark.usefixtures("short_first_attempt")
def test_a_run_that_was_deleted_is_pushed_while_it_trains(
    server: WandbServer, caplog: pytest.LogCaptureFixture
) -> None:
    sweep = planned(*ONE)
    lost = wandb_id(sweep, sweep.read_plan()[0]["run_id"])
    server.deleted |= {lost, f"{lost}-2"}
    with caplog.at_level(logging.WARNING, logger="mupsweep"):
        assert execute(sweep)
    assert [lost in line for line in warnings_of(caplog)] == [True, True]
    assert set(server.runs) == {f"{lost}-3"}
    assert len(server.runs[f"{lost}-3"].history) == 60


def test_an_id_has_no_more_characters_than_the_server_takes() -> None:
    assert [len(name) for name in numbered(64 * "a")][:3] == [64, 63, 63]
    assert list(numbered("a"))[:3] == ["a", "a-2", "a-3"]


def test_two_sweeps_of_one_name_have_a_summary_each_and_one_that_grows_keeps_its_own(tmp_path: Path) -> None:
    first, second = SweepDir(tmp_path / "a" / "demo"), SweepDir(tmp_path / "b" / "demo")
    new = summary_id(first, ["aa"], {})
    assert new.startswith("demo-summary-")
    assert summary_id(second, ["bb"], {}) != new
    stored = {new: StoredSummary("x", ("aa",))}
    assert summary_id(first, ["aa", "cc"], stored) == new
    assert summary_id(second, ["bb"], stored) == summary_id(second, ["bb"], {})


def test_a_summary_under_the_id_of_older_versions_is_continued_by_its_own_sweep(tmp_path: Path) -> None:
    sweep = planned()
    run_ids = [wandb_id(sweep, row["run_id"]) for row in sweep.read_plan()]
    old = {"tracked-summary": StoredSummary("x", None), run_ids[0]: StoredSummary("y", None)}
    assert summary_id(sweep, ["aa"], old) == "tracked-summary"
    others = {**old, "tracked-w9-d9-lr-1.00-s0-00000000": StoredSummary("z", None)}
    assert summary_id(sweep, ["aa"], others) == summary_id(sweep, ["aa"], {})


def test_the_environment_says_what_the_config_leaves_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MODE", "PROJECT", "ENTITY", "DIR"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    assert (Wandb().active, Wandb().project_name) == (False, "mupsweep")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_ENTITY", "team")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "client"))
    assert (Wandb().active, Wandb().address()) == (True, ("team", "theirs"))
    assert not Wandb(mode="offline").active
    assert Wandb(project="ours", entity="us").address() == ("us", "ours")
    assert Path(client_folder()).parent == tmp_path / "client"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert not Wandb().active


@of_the_clients_own
def test_without_a_login_one_line_says_what_to_do(
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cli: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    sweep = planned(*ONE)
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    shut_down()  # a new process has no login
    with caplog.at_level(logging.WARNING, logger="mupsweep"):
        assert execute(sweep)
    (warning,) = warnings_of(caplog)
    told = f"no login for {server.url}: run `wandb login`, or set WANDB_API_KEY"
    assert told in warning
    code, _, err = cli("sync", str(sweep.path))
    assert (code, err) == (2, f"mupsweep: {told} (and WANDB_BASE_URL)\n")
    assert server.runs == {}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> SweepDir:
    """A sweep that has nothing but results."""
    sweep = SweepDir(tmp_path_factory.mktemp("whole"))
    row = {"model": "nanogpt", "optimizer": "adamw", "parametrization": "sp", "depth": 4, "depth_ratio": 1.0, "seed": 0}
    runs = [
        {**row, "width": width, "width_ratio": width / 32, "log2_lr": x, "status": DONE, "val_loss": 3 + (x + 8) ** 2}
        for width in (32, 64)
        for x in (-9.0, -8.0, -7.0)
    ]
    write_results(sweep.results, analyse(results(runs)))
    return sweep


@pytest.mark.parametrize("name", summary.FILES)
@given(draws=st.data())
@settings(of_one_folder, max_examples=15)
def test_damaged_results_are_logged_or_named_in_one_line(
    whole: SweepDir, name: str, tmp_path: Path, draws: st.DataObject
) -> None:
    sweep = SweepDir(tmp_path / "sweep")
    undamaged_copy(whole.path, sweep.path)
    (sweep.results / name).write_bytes(draws.draw(damaged_file(whole.results / name)))
    refusals: list[str] = []
    try:
        with summary.of_whole_results(sweep):
            summary.digest(sweep)
            summary.tags(sweep)
            summary.verdicts(sweep)
            summary.content(sweep)
    except RecordError as error:
        refusals.append(str(error))
    for refusal in refusals:
        assert refusal.endswith(f": mupsweep report {sweep.path} writes them anew")
        assert len(refusal.splitlines()) == 1
