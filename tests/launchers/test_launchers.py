"""Launchers decide where runs are trained: every one of them leaves the same results, whatever dies meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import pytest
from command_line import mupsweep
from forked import Forked
from outcome import results
from polling import DEADLINE, until

from mupsweep import data
from mupsweep.analysis.labels import DONE
from mupsweep.errors import ConfigError, RecordError
from mupsweep.launchers import local_pool
from mupsweep.launchers.inline import Inline
from mupsweep.launchers.local import Local
from mupsweep.launchers.worker_pool import WorkerPool
from mupsweep.schema import instantiate
from mupsweep.store import lease
from mupsweep.store.run_dir import FAILED, RUNNING, RunDir
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.config import choices, config_root, load
from mupsweep.training import signals, worker

TWO_SLOTS = ["launcher=local", "launcher.devices=cpu", "launcher.slots_per_device=2"]
ONE_SLOT = ["launcher=local", "launcher.devices=cpu", "launcher.slots_per_device=1"]
SMALL = ["experiment=smoke", "training.steps=60", "sweep.log2_lrs=[-9,-7]", "training.checkpoint_minutes=0"]
LAUNCHERS = choices("launcher")


def finish(process: Forked) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    out, err = process.communicate(timeout=DEADLINE)
    return process.wait(), out, err


def rows(run: RunDir) -> int:
    return run.metrics_path.read_bytes().count(b"\n") if run.metrics_path.exists() else 0


def busy(sweep: SweepDir, steps: int = 3) -> RunDir | None:
    """A run in the middle of its training."""
    for row in sweep.read_plan():
        run = sweep.run(row["run_id"])
        if run.status()["status"] == RUNNING and rows(run) > steps and run.is_claimed():
            return run
    return None


def owners(sweep: SweepDir) -> list[int]:
    """How often each run was claimed."""
    return sorted(len(list(p.glob("*.json"))) for p in sweep.path.glob("runs/*/claims"))


def trained_inline(overrides: list[str], out: Path) -> SweepDir:
    """The sweep as one worker in one go leaves it."""
    config = load([*overrides, f"out={out}"])
    data.prepare(config.variants[0].data)
    sweep = plan.save(config, "")[0]
    code, _, err = mupsweep("worker", str(sweep.path), "--device", "cpu")
    assert code == 0, err
    return sweep


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, object], bytes]]:
    return results(trained_inline(SMALL, tmp_path_factory.mktemp("inline")))


def test_a_stop_while_the_workers_still_start_ends_them_without_a_word(tmp_path: Path) -> None:
    launcher = Forked("run", *SMALL, *ONE_SLOT)
    log = Path("sweeps/smoke/logs/worker-0.log")
    until(log.exists, launcher)
    launcher.send_signal(signal.SIGTERM)
    code, _, err = finish(launcher)
    assert code == 130, err
    assert log.read_text() == ""


def test_a_stop_between_two_workers_that_start_ends_the_first_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def sleeper(_: object, environment: dict[str, str], output: IO[bytes]) -> subprocess.Popen[bytes]:
        """In place of a worker: a process that waits for the signal."""
        waiting = [sys.executable, "-c", "import signal; signal.sigwait([signal.SIGINT])"]
        started.append(begin(waiting, environment, output))
        if len(started) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    begin = signals.start
    monkeypatch.setattr(signals, "start", sleeper)
    sweep, runs = plan.save(load(SMALL), "")
    assert not Local(devices="cpu", slots_per_device=3).launch(sweep, [run.run_id for run in runs])
    assert [worker.poll() for worker in started] == [0, 0]


def test_workers_that_die_before_they_take_a_run_are_given_up_however_many_runs_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def dying(_: object, environment: dict[str, str], output: IO[bytes]) -> subprocess.Popen[bytes]:
        started.append(begin(["sh", "-c", "echo broken driver; kill -SEGV $$"], environment, output))
        return started[-1]

    begin = signals.start
    monkeypatch.setattr(signals, "start", dying)
    monkeypatch.setattr(local_pool, "POLL_SECONDS", 0.0)
    sweep, runs = plan.save(load([*SMALL, "sweep.seeds=[0,1,2,3,4]"]), "")
    with pytest.raises(RecordError, match=r"^a worker ended with SIGSEGV: broken driver \(see .*worker-[01]\.log\)$"):
        Local(devices="cpu", slots_per_device=2).launch(sweep, [run.run_id for run in runs])
    assert len(started) == 6  # MAX_WORKER_DEATHS more per slot


def test_a_stop_after_the_last_run_of_a_process_is_not_lost_and_the_next_one_interrupts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def told_at_the_end(*_: object, **__: object) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    monkeypatch.setattr(worker, "execute", told_at_the_end)
    sweep, runs = plan.save(load(SMALL), "")
    assert not Inline().launch(sweep, [run.run_id for run in runs])
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_has_the_name_of_its_file_and_can_be_made(name: str) -> None:
    config = load([f"launcher={name}"])
    instance = instantiate(config.launcher, "launcher")
    assert instance.name == config.launcher["name"] == name
    assert callable(instance.launch)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_key_of_a_launchers_yaml_is_explained(name: str) -> None:
    first, *lines = (config_root() / "launcher" / f"{name}.yaml").read_text().splitlines()
    assert first.startswith("# ")
    for line in lines:
        if not line.startswith(("#", " ", "name:", "kind:")) and ":" in line:
            assert "#" in line, line


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_refuses_an_unknown_key_naming_the_valid_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'launcher\.treads'; .*launcher\."):
        load([f"launcher={name}", "launcher.treads=2"])


@pytest.mark.parametrize(
    ("made", "slots"),
    [
        (Local(devices="cpu", slots_per_device=3), ["cpu"] * 3),
        (Local(devices=["cuda:0", "cuda:1"]), ["cuda:0", "cuda:1"]),
        (Local(devices=("cuda:0", "cuda:1"), slots_per_device=2), ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]),
        (Local(devices="cpu", threads=1024), ["cpu"]),
    ],
)
def test_slots_are_devices_times_workers_per_device(made: Local, slots: list[str]) -> None:
    assert made.slots() == slots


def test_workers_that_share_a_gpu_are_told_how_many_they_are(tmp_path: Path) -> None:
    def told(*slots: str) -> list[str]:
        pool = WorkerPool(SweepDir(tmp_path), slots)
        commands = [pool.command(index) for index in range(len(slots))]
        return [" ".join(command[command.index("--threads") + 2 :]) for command in commands]

    assert told("cuda:0", "cuda:0", "cuda:1") == ["--workers 2", "--workers 2", ""]
    assert told("cuda:0,cuda:1", "cuda:0,cuda:1", "cuda:0,cuda:1") == ["--workers 3"] * 3
    assert told("cpu", "cpu") == ["", ""]


def test_a_cpu_has_a_slot_per_core_over_the_threads() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert len(Local(devices="cpu").slots()) == cores
    assert len(Local(devices="cpu", threads=2).slots()) == max(1, cores // 2)


@pytest.mark.parametrize("key", ["slots_per_device", "threads"])
@pytest.mark.parametrize("value", [0, -1])
def test_slots_and_threads_below_one_are_refused(key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"^launcher\.{key}={value}: expected at least 1$"):
        load(["launcher=local", f"launcher.{key}={value}"])


@pytest.mark.parametrize("name", ["local", "inline", "slurm"])
def test_more_threads_than_a_machine_has_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^launcher\.threads=99999: expected at most 1024$"):
        load([f"launcher={name}", "launcher.threads=99999"])


@pytest.mark.parametrize(
    ("typed", "message"), [("[]", "[]"), ("null", "None"), ("[0,1]", "[0, 1]"), ("'cuda:0,cuda:1'", "cuda:0,cuda:1")]
)
def test_devices_that_are_no_list_of_names_are_refused(typed: str, message: str) -> None:
    expected = f"launcher.devices={message}: expected auto or a list, such as [cuda:0,cuda:1]"
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}$"):
        load(["launcher=local", f"launcher.devices={typed}"])


@pytest.mark.usefixtures("_forked_workers")
@pytest.mark.parametrize(
    "launcher", [["launcher=local", "launcher.devices=gpu7"], ["launcher=inline", "launcher.device=gpu7"]]
)
def test_a_device_that_is_none_ends_with_one_line_that_names_it(launcher: list[str]) -> None:
    code, _, err = mupsweep("run", *SMALL, *launcher, "sweep.log2_lrs=[-7]")
    assert code == 2, err
    *_, last = err.strip().splitlines()
    assert "Traceback" not in err
    assert last.startswith("mupsweep: ")
    assert "gpu7" in last
    assert SweepDir.open("sweeps/smoke").counts()[FAILED] == 0


@pytest.mark.usefixtures("_forked_workers")
def test_two_workers_give_the_same_bits_as_one_process(inline: dict[str, tuple[dict[str, object], bytes]]) -> None:
    code, out, err = mupsweep("run", *SMALL, *TWO_SLOTS)
    assert code == 0, err
    sweep = SweepDir.open("sweeps/smoke")
    assert results(sweep) == inline
    assert owners(sweep) == [1] * 4
    assert sorted(p.name for p in sweep.logs.iterdir()) == ["worker-0.log", "worker-1.log"]
    lines = [line for line in out.splitlines() if line.startswith("[")]
    assert [line.split("]")[0] for line in lines] == [f"[{i}/4" for i in range(1, 5)]
    assert all(" done  val_loss " in line for line in lines)


@pytest.mark.usefixtures("_forked_workers")
def test_a_device_that_is_gone_is_left_and_the_others_train_everything(
    inline: dict[str, tuple[dict[str, object], bytes]],
) -> None:
    code, _, err = mupsweep("run", *SMALL, "launcher=local", "launcher.devices=[gone,cpu]", ONE_SLOT[-1])
    assert code == 0, err
    said = r"^a worker ended with exit code 2: mupsweep: device gone is not .*; going on without gone$"
    said = r"^a worker ended with exit code 2: mupsweep: device gone is not .*; going on without gone$"
    assert re.search(said, err, re.MULTILINE)
    assert results(SweepDir.open("sweeps/smoke")) == inline


def test_the_run_that_a_lost_device_leaves_last_is_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def ending(command: Sequence[str], environment: dict[str, str], output: IO[bytes]) -> subprocess.Popen[bytes]:
        started.append(command[command.index("--device") + 1])
        return begin(["sh", "-c", "exit 2" if started[-1] == "a" else "exit 0"], environment, output)

    begin = signals.start
    monkeypatch.setattr(signals, "start", ending)
    monkeypatch.setattr(local_pool, "POLL_SECONDS", 0.0)
    sweep, runs = plan.save(load(SMALL), "")
    assert Local(devices=["a", "b", "c"]).launch(sweep, [run.run_id for run in runs])
    assert started == ["a", "b", "c", "b"]


def test_a_killed_worker_is_replaced_and_the_sweep_ends_with_the_same_bits(
    inline: dict[str, tuple[dict[str, object], bytes]],
) -> None:
    sweep = SweepDir(Path("sweeps/smoke"))
    launcher = Forked("run", *SMALL, *ONE_SLOT)
    victims: list[int] = []

    def killed() -> bool:
        run = busy(sweep)
        if run is not None:
            victims.append(json.loads(max((run.path / "claims").glob("*.json")).read_text())["pid"])
            os.kill(victims[-1], signal.SIGKILL)
        return bool(victims)

    until(killed, launcher)
    code, _, err = finish(launcher)
    assert code == 0, err
    assert results(sweep) == inline
    assert owners(sweep) == [1, 1, 1, 2]
    claims = [json.loads(p.read_text())["pid"] for p in sweep.path.glob("runs/*/claims/*.json")]
    assert len(set(claims)) == 2  # the dead one and its replacement, which finished the sweep
    assert victims[0] in claims


@pytest.mark.usefixtures("_forked_workers")
def test_a_stopped_launcher_ends_its_workers_says_how_to_go_on_and_goes_on(
    inline: dict[str, tuple[dict[str, object], bytes]],
) -> None:
    sweep = SweepDir(Path("sweeps/smoke"))
    launcher = Forked("run", *SMALL, *TWO_SLOTS)
    until(lambda: busy(sweep) is not None, launcher)
    launcher.send_signal(signal.SIGHUP)
    code, _, err = finish(launcher)
    claimed = [row["run_id"] for row in sweep.read_plan() if sweep.run(row["run_id"]).is_claimed()]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGKILL)  # no worker outlives this test
    assert code == 130, err
    assert "go on with the same command: the sweep is in sweeps/smoke" in err.splitlines()[-1]
    assert claimed == []
    assert sweep.counts()[DONE] + sum(run.exists() for run in sweep.path.glob("runs/*/checkpoint/latest.pt")) > 0
    assert sweep.counts()[DONE] < 4

    code, _, err = mupsweep("run", *SMALL, *TWO_SLOTS)
    assert code == 0, err
    assert results(sweep) == inline


@pytest.mark.slow
def test_a_run_that_keeps_killing_its_worker_has_failed_and_the_others_are_trained(tmp_path: Path) -> None:
    (tmp_path / "deadly.py").write_text(
        "import os, signal\n"
        "from dataclasses import dataclass\n"
        "from mupsweep.optimizers.adamw import AdamW\n\n\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Deadly(AdamW):\n"
        "    def build(self, groups):\n"
        "        if groups[0]['lr'] > 2**-6:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return super().build(groups)\n"
    )
    kind = ["optimizer.kind=deadly.Deadly", "allow_imports=true", "sweep.width_ratios=[1]", "sweep.log2_lrs=[-9,-7,-5]"]
    code, _, err = finish(Forked("run", *SMALL, *ONE_SLOT, *kind))  # python -m finds deadly.py in the working folder
    assert code == 1, err
    sweep = SweepDir.open("sweeps/smoke")
    found = {row["log2_lr"]: sweep.run(row["run_id"]).status() for row in sweep.read_plan()}
    assert found[-9.0] == found[-7.0] == {"status": DONE}
    assert found[-5.0]["status"] == FAILED
    assert found[-5.0]["error"].startswith("its worker died 2 times (SIGKILL); out of memory?")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killing_the_whole_process_group_at_random_moments_never_changes_a_result(tmp_path: Path) -> None:
    drill = [*SMALL, "sweep.log2_lrs=[-9,-8,-7,-6,-5,-4]", "sweep.seeds=[0,1]"]
    undisturbed = results(trained_inline(drill, tmp_path / "undisturbed"))
    assert len(undisturbed) == 24
    sweep = SweepDir(Path("sweeps/smoke"))
    for more in random.Random(20).choices(range(20, 160), k=10):  # so many rows of metrics later
        goal = _progress(sweep) + more
        launcher = Forked("run", *drill, *TWO_SLOTS)
        until(lambda goal=goal: _progress(sweep) >= goal, launcher)
        os.killpg(launcher.pid, signal.SIGKILL)
        assert finish(launcher)[0] == -signal.SIGKILL
    code, _, err = finish(Forked("run", *drill, *TWO_SLOTS))
    assert code == 0, err
    assert results(sweep) == undisturbed


def _progress(sweep: SweepDir) -> int:
    """Rows of metrics that a sweep holds."""
    return sum(rows(RunDir(p)) for p in sweep.path.glob("runs/*"))


@pytest.mark.usefixtures("_forked_workers")
def test_the_workers_of_a_killed_launcher_are_named_and_stopped_and_no_other_process_is(
    inline: dict[str, tuple[dict[str, object], bytes]],
) -> None:
    sweep = SweepDir(Path("sweeps/smoke"))
    launcher = Forked("run", *SMALL, *ONE_SLOT)
    until(lambda: busy(sweep) is not None, launcher)
    launcher.kill()
    launcher.wait(DEADLINE)
    (record,) = (json.loads(path.read_text()) for path in sweep.workers.glob("*.json"))
    pid = record["pid"]
    assert pid not in (os.getpid(), launcher.pid)

    # what only has the pid of a worker: this process, and one that began at another time than its record says
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "mupsweep"])
    for other in (os.getpid(), stranger.pid):
        recycled = {**record, "pid": other, "born": "1"}
        (sweep.workers / f"recycled-{other}.json").write_text(json.dumps(recycled))
    # and a process of another program, which a record of somebody else's making names rightly
    program = subprocess.Popen(["sleep", "600"])
    named = {**record, "pid": program.pid, "born": lease.process_start_time(program.pid)}
    (sweep.workers / "named.json").write_text(json.dumps(named))

    _, out, _ = mupsweep("status", str(sweep.path))
    line = next(line for line in out.splitlines() if line.startswith("trained by "))
    assert re.search(rf"\bpid {pid} on {re.escape(record['host'])} \(w\d+-d2-lr-\d\.00-s0-[0-9a-f]{{8}}\)", line)
    assert line.endswith("; mupsweep cancel sweeps/smoke stops those of this machine")
    assert str(stranger.pid) not in line

    code, out, err = mupsweep("cancel", str(sweep.path))
    assert (code, out) == (0, "")
    first, second, third = err.splitlines()
    assert first.startswith(f"asked 1 worker to stop: pid {pid} on ")
    assert second == "each finishes its step, checkpoints and ends; go on with the command that made the sweep"
    assert third.startswith(f"trained on by pid {program.pid} on ")
    until(lambda: lease.process_start_time(pid) != record["born"])
    assert (stranger.poll(), program.poll()) == (None, None)
    for process in (stranger, program):
        process.kill()
        process.wait()
    assert not list(sweep.workers.glob(f"*-{pid}.json"))
    assert sweep.counts()[RUNNING] == 0
    assert sweep.counts()[DONE] < 4
    assert "nobody trains sweeps/smoke now" in mupsweep("cancel", str(sweep.path))[2]

    code, _, err = mupsweep("run", *SMALL, *ONE_SLOT)
    assert code == 0, err
    assert results(sweep) == inline
