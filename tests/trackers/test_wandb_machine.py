"""W&B on a machine that lacks what its client needs: runs finish with one warning, and `sync` sends the rest."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_wandb import ONLINE, assert_mirrored, of_the_clients_own, planned, summary_of, warnings_of
from wandb_server import WandbServer

from mupsweep.analysis.labels import DONE
from mupsweep.report.generate import generate
from mupsweep.trackers.wandb import shut_down
from mupsweep.training.worker import execute

FOLDERS = [f"WANDB_{name}" for name in ("DIR", "CONFIG_DIR", "CACHE_DIR", "DATA_DIR", "ARTIFACT_DIR")]
ONE_SIZE = ["sweep.width_ratios=[1]", "tracker.workspace=false", *ONLINE]


@of_the_clients_own
def test_folders_that_cannot_be_made_cost_one_warning_and_no_run(
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cli: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    sweep = planned(*ONE_SIZE)
    with monkeypatch.context() as sick, caplog.at_level(logging.WARNING, logger="mupsweep"):
        for name in FOLDERS:
            sick.setenv(name, str(tmp_path / "file" / name))
        assert execute(sweep)
        generate([sweep])  # whose tables the client stores before it sends them
    assert sweep.counts() == {DONE: 2}
    (warning,) = warnings_of(caplog)
    assert str(tmp_path / "file" / "WANDB_DATA_DIR") in warning
    assert f"`mupsweep sync {sweep.path}` mirrors them later" in warning
    assert summary_of(server).state != "finished"
    shut_down()  # a new process finds other folders
    code, out, err = cli("sync", str(sweep.path))
    assert (code, err) == (0, "")
    assert out.endswith("of 2 runs pushed to lab/mupsweep, group tracked\n")
    assert_mirrored(server, sweep)
    assert summary_of(server).state == "finished"
    assert summary_of(server).summary["tables/runs"]["nrows"] == 2


@of_the_clients_own
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # the client leaves it alone
def test_a_client_whose_service_does_not_start_costs_one_warning_and_no_run(
    server: WandbServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cli: Callable[..., tuple[int, str, str]],
) -> None:
    sweep = planned(*ONE_SIZE)
    monkeypatch.setenv("WANDB_X_SERVICE_WAIT", "0")  # seconds: it is never there in time
    with caplog.at_level(logging.WARNING, logger="mupsweep"):
        assert execute(sweep)
    assert sweep.counts() == {DONE: 2}
    assert [line.split(":")[0] for line in warnings_of(caplog)] == ["tracker"]
    code, _, err = cli("sync", str(sweep.path))
    assert code == 2
    assert err.startswith(f"mupsweep: W&B does not take {sweep.path}: ")
    assert err.count("\n") == 1
    assert server.runs == {}
    gc.collect()  # while that warning is expected
    monkeypatch.delenv("WANDB_X_SERVICE_WAIT")
    shut_down()
    assert cli("sync", str(sweep.path))[0] == 0
    assert_mirrored(server, sweep)


@pytest.mark.parametrize("sick", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_ends_whatever_became_of_the_clients_service(sick: signal.Signals, tmp_path: Path) -> None:
    """Client 0.31 waits forever for a service that does not answer, at the end of the process too."""
    pytest.importorskip("wandb")
    program = f"""
import os
import wandb
from mupsweep.trackers import wandb as tracker
tracker.SHUTDOWN_TIMEOUT = 0.2
tracker.start_service()
service = wandb.setup().ensure_service()._proc._process.pid
print(service, flush=True)
os.kill(service, {int(sick)})
"""
    output = tmp_path / "output"  # no pipe: the service holds it open
    with output.open("w") as file:
        code = subprocess.run(
            [sys.executable, "-c", program], stdout=file, stderr=file, timeout=60, check=False
        ).returncode
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(output.read_text()), signal.SIGKILL)
    assert code == 0
