"""Job scripts: their text, what a shell makes of them, and which runs share a task."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_slurm import Fake
from hypothesis import given
from hypothesis import strategies as st
from polling import until

from mupsweep.errors import ConfigError
from mupsweep.launchers import sbatch
from mupsweep.launchers.slurm import Site, Slurm, bundled
from mupsweep.launchers.task_pool import TaskPool
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep.config import load
from mupsweep.sweep.plan import save
from mupsweep.training.distributed import TORCHRUN_ENV
from mupsweep.training.signals import StopSignal

Start = Callable[..., subprocess.Popen[bytes]]

GOLDEN = Path(__file__).parents[1] / "slurm"
SITE = Site("first sweep", Path("/data/first sweep"), Path("/data/first sweep/logs"), Path("/home/me"), "/opt/python")
TASKS = [
    sbatch.Task(("w64-d2-lr-9.00-s0-aa", "w64-d2-lr-8.00-s0-bb"), 1500.0),
    sbatch.Task(("w64-d2-lr-7.00-s0-cc",), 9e4),
]


def test_the_scripts_are_these() -> None:
    small = Slurm(gpus=0, mem="4G", time=None)
    full = Slurm(
        partition="gpu",
        account="lab",
        qos="long",
        constraint="a100|h100",
        time="1-00:00:00",
        mem="32G",
        gpus=2,
        cpus=16,
        threads=4,
        throttle=8,
        signal_seconds=300,
        max_restarts=5,
        modules=("cuda/12.4",),
        setup=("source ~/env/bin/activate",),
        options=("--exclusive", "--nice=100"),
        analysis_options=("--partition=cpu",),
    )
    nodes = Slurm(gpus=4, nodes=2, devices_per_run=8, shard=True, cpus=32, threads=8)
    assert small.array_text(SITE, "w64-d2", TASKS) == (GOLDEN / "small.sbatch").read_text()
    assert full.array_text(SITE, "w64-d2", TASKS) == (GOLDEN / "full.sbatch").read_text()
    assert nodes.array_text(SITE, "w4096-d4", TASKS[1:]) == (GOLDEN / "nodes.sbatch").read_text()
    assert full.analysis_text(SITE) == (GOLDEN / "report.sbatch").read_text()


@pytest.mark.parametrize(
    ("launcher", "cpus"),
    [
        (Slurm(), 4),
        (Slurm(gpus=2), 8),
        (Slurm(gpus=2, threads=6), 12),
        (Slurm(gpus=4, nodes=2, devices_per_run=8), 4),  # of each of a node's four processes
        (Slurm(gpus=4, cpus=7), 7),
        (Slurm(gpus=0, workers=3, threads=2), 6),
    ],
)
def test_a_gpu_gets_cores_to_feed_it(launcher: Slurm, cpus: int) -> None:
    assert f"\n#SBATCH --cpus-per-task={cpus}\n" in launcher.array_text(SITE, "w64-d2", TASKS)


def executed(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a script does on this machine."""
    return subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_names_that_look_like_code_stay_names(tmp_path: Path) -> None:
    nasty = "a'; touch pwned; $(touch pwned) `touch pwned` \" & b"
    site = Site(nasty, tmp_path / nasty, tmp_path / nasty / "logs", tmp_path / nasty, "echo")
    launcher = Slurm(gpus=0)
    array = launcher.array_text(site, "w64-d2", [sbatch.Task((nasty, "b"), 1.0)])
    done = executed(array, tmp_path, SLURM_ARRAY_TASK_ID="0")
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    options = "--device cpu --threads 1 --restarts 2 --requeue 100"
    assert last == f"-m mupsweep worker {tmp_path / nasty} {nasty} b {options}"
    done = executed(launcher.analysis_text(site), tmp_path)
    assert done.stdout == f"-m mupsweep report {tmp_path / nasty}\n"
    assert list(tmp_path.iterdir()) == []
    for line in array.splitlines():
        if line.startswith("#SBATCH"):
            assert len(shlex.split(line, comments=False)) == 2, line  # sbatch reads words as a shell does


@pytest.mark.parametrize(
    "key", ["partition", "account", "qos", "constraint", "mem", "gres", "device", "modules", "time"]
)
@pytest.mark.parametrize(
    "value",
    [
        "debug\n#SBATCH --uid=0",
        "debug --uid=0",
        "--uid=0",
        "-p",
        "a'b",
        'a"b',
        "a`b`",
        "$(b)",
        "a;b",
        "a#b",
        "a\\b",
        "",
    ],
)
def test_an_option_that_is_more_than_one_word_is_refused(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^launcher\.{key}="):
        Slurm(**{key: (value,) if key == "modules" else value})


@pytest.mark.parametrize(
    "option",
    [
        "exclusive",
        "-x",
        "--nice 100",
        "--nice=100 --uid=0",
        "--nice=1\n--uid=0",
        "--nice=\n",
        "--comment='a'",
        "--",
        "--=1",
    ],
)
def test_a_further_option_is_one_option(option: str) -> None:
    for key in ("options", "analysis_options"):
        with pytest.raises(ConfigError, match=rf"^launcher\.{key}: .* is no single option of sbatch"):
            Slurm(**{key: (option,)})


@pytest.mark.parametrize("name", sbatch.RESERVED_OPTIONS)
def test_an_option_that_the_scripts_rely_on_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--{name} is set by mupsweep"):
        Slurm(options=(f"--{name}=1",))


def test_a_path_that_slurm_cannot_be_told_is_refused() -> None:
    for folder in ("/data/a\\b", "/data/a\nb"):
        with pytest.raises(ConfigError, match=r"choose another out=DIR|more than one line"):
            Slurm().array_text(Site("a", Path(folder), Path(folder), Path("/"), "python"), "w64-d2", TASKS)
    with pytest.raises(ConfigError, match="more than one line"):
        Slurm().analysis_text(Site("a", Path("/a"), Path("/a"), Path("/a\nb"), "python"))
    with pytest.raises(ConfigError, match=r"^launcher\.setup: .* is not one line"):
        Slurm(setup=("true\ntouch pwned",))


@pytest.mark.parametrize("value", ["90", "1:00", "24:61:00", "1-2", "01:00:00 ", "00:02:00", "forever"])
def test_a_time_limit_that_means_something_else_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^launcher\.time={value}: expected "):
        Slurm(time=value)
    assert Slurm(time="00:02:01").time == "00:02:01"


@pytest.mark.parametrize(
    ("key", "value", "least"),
    [
        ("gpus", -1, 0),
        ("cpus", 0, 1),
        ("workers", 0, 1),
        ("throttle", 0, 1),
        ("max_array", 0, 1),
        ("max_restarts", -1, 0),
    ],
)
def test_a_number_below_its_least_is_refused(key: str, value: int, least: int) -> None:
    with pytest.raises(ConfigError, match=rf"^launcher\.{key}={value}: expected at least {least}$"):
        load(["launcher=slurm", f"launcher.{key}={value}"])


def test_lists_and_numbers_of_another_type_are_refused_in_words() -> None:
    with pytest.raises(ConfigError, match=r"^launcher\.modules='cuda': expected a list of words, such as \[a,b\]$"):
        load(["launcher=slurm", "launcher.modules=cuda"])
    with pytest.raises(ConfigError, match=r"^launcher\.minutes_per_task=0: expected more than 0$"):
        load(["launcher=slurm", "launcher.minutes_per_task=0"])
    with pytest.raises(ConfigError, match=r"^launcher\.device=cuda: expected launcher\.gpus to be at least 1$"):
        load(["launcher=slurm", "launcher.device=cuda", "launcher.gpus=0"])


@pytest.mark.parametrize(
    ("made", "devices"),
    [
        (Slurm(), ("cuda:0",)),
        (Slurm(gpus=2), ("cuda:0", "cuda:1")),
        (Slurm(gpus=2, workers=4), ("cuda:0", "cuda:1", "cuda:0", "cuda:1")),
        (Slurm(gpus=0), ("cpu",)),
        (Slurm(gpus=0, workers=3), ("cpu", "cpu", "cpu")),
        (Slurm(gpus=2, device="cpu"), ("cpu", "cpu")),
        (Slurm(device="xpu"), ("xpu",)),
    ],
)
def test_a_task_has_a_worker_per_gpu_or_as_many_as_asked_for(made: Slurm, devices: tuple[str, ...]) -> None:
    assert made.devices == devices


# In place of python: `worker --restarts` is the real supervisor. Its workers are `worker.sh`, which bash could not run
# as they are started: with stop signals blocked.
PYTHON = f"""\
#!{sys.executable}
import os, signal, sys
if "--restarts" in sys.argv:
    from mupsweep.cli import main
    sys.executable = os.path.abspath("python")
    sys.argv[:3] = ["mupsweep"]
    main()
else:
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.execvp("bash", ["bash", "worker.sh", *sys.argv[1:]])
"""
WORKER = "trap 'echo USR1 >> told; exit 130' USR1\ntrap 'echo TERM >> told; exit 130' TERM\n"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a task with a worker that is a shell script; what is left of it when the test ends is killed."""
    started = []
    os.mkfifo(tmp_path / "clock")

    def start(
        worker: str, restarts: int, gpus: int = 0, setup: tuple[str, ...] = (), **environment: str
    ) -> subprocess.Popen[bytes]:
        python = tmp_path / "python"
        python.write_text(PYTHON)
        (tmp_path / "worker.sh").write_text(WORKER + worker)
        python.chmod(0o755)
        (tmp_path / "plan.jsonl").touch()
        site = Site("s", tmp_path, tmp_path, tmp_path, str(python))
        text = Slurm(gpus=gpus, max_restarts=restarts, setup=setup).array_text(site, "w64-d2", TASKS)
        task = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_ID": "7"}
        variables = {**os.environ, **task, **environment}
        started.append(subprocess.Popen(["bash", "-c", text], cwd=tmp_path, env=variables, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# Waits for a signal. Nobody writes into the fifo, so that a read ends with its time. No process substitution: bash 5
# fails to parse one during which a trap runs.
READY = "touch ready; while :; do read -t 1 _ <> clock || true; done"


def ended(process: subprocess.Popen[bytes], tmp_path: Path, number: signal.Signals) -> int:
    """The exit code of a task that got a signal when its worker was ready."""
    until((tmp_path / "ready").exists, process)
    process.send_signal(number)
    return process.wait(30)


def test_before_the_time_limit_the_workers_are_told_and_this_task_alone_is_queued_again(
    start: Start, slurm: Fake, tmp_path: Path
) -> None:
    ended(start(READY, restarts=2, SLURM_RESTART_COUNT="1"), tmp_path, signal.SIGUSR1)
    assert (tmp_path / "told").read_text() == "USR1\n"
    assert slurm.calls("scontrol") == ["requeue 7_1"]


def test_a_task_that_was_restarted_often_enough_is_left_alone(start: Start, slurm: Fake, tmp_path: Path) -> None:
    assert ended(start(READY, restarts=2, SLURM_RESTART_COUNT="2"), tmp_path, signal.SIGUSR1) != 0
    assert (tmp_path / "told").read_text() == "USR1\n"
    assert slurm.calls("scontrol") == []


def test_a_cancelled_task_tells_its_workers_and_is_not_queued_again(start: Start, slurm: Fake, tmp_path: Path) -> None:
    assert ended(start(READY, restarts=2), tmp_path, signal.SIGTERM) != 0
    assert (tmp_path / "told").read_text() == "USR1\n"
    assert slurm.calls("scontrol") == []


def test_a_signal_before_the_supervisor_can_take_it_ends_no_task(start: Start, slurm: Fake, tmp_path: Path) -> None:
    """In the shell that prepares the job, and as Python starts; workers are started with stop signals blocked."""
    early = "import os, signal as s\nif not s.pthread_sigmask(s.SIG_BLOCK, []): os.kill(os.getpid(), s.SIGUSR1)\n"
    (tmp_path / "sitecustomize.py").write_text(early)
    paths = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    task = start("echo >> trained", restarts=2, setup=("kill -USR1 $$",), PYTHONPATH=paths)
    assert task.wait(30) == 0
    assert (tmp_path / "trained").read_text() == "\n"
    assert slurm.calls("scontrol") == []


@pytest.mark.parametrize(("worker", "code"), [("exit 0", 0), ("exit 2", 2), ("kill -ABRT $$", 134)])
def test_a_task_ends_as_its_worker_did(worker: str, code: int, start: Start, slurm: Fake) -> None:
    assert start(worker, restarts=2).wait(30) == code
    assert slurm.calls("scontrol") == []


@pytest.mark.parametrize(("deaths", "code", "starts"), [(1, 0, 2), (2, 0, 3), (9, 137, 3)])
def test_a_worker_that_is_killed_is_started_again_some_times_while_the_others_go_on(
    deaths: int, code: int, starts: int, start: Start, slurm: Fake, tmp_path: Path
) -> None:
    dying = f'echo >> started; [ "$(wc -l < started)" -gt {deaths} ] || kill -KILL $$'
    # the second worker ends when the first has been started as often as it will be
    waiting = f'until [ "$(wc -l < started)" -ge {starts} ]; do read -t 0.1 _ <> clock || true; done; echo >> trained'
    worker = f'touch started; case "$*" in *cuda:1*) {waiting} ;; *) {dying} ;; esac'
    assert start(worker, restarts=2, gpus=2).wait(30) == code
    assert len((tmp_path / "started").read_text().splitlines()) == starts
    assert (tmp_path / "trained").read_text() == "\n"


def test_a_worker_that_is_killed_when_it_was_told_to_stop_is_not_started_again(
    start: Start, slurm: Fake, tmp_path: Path
) -> None:
    worker = f"echo >> started; trap 'kill -KILL $$' USR1; {READY}"
    assert ended(start(worker, restarts=2), tmp_path, signal.SIGUSR1) == 137
    assert (tmp_path / "started").read_text() == "\n"
    assert slurm.calls("scontrol") == ["requeue 7_1"]


def test_over_several_nodes_srun_starts_a_process_per_device_as_torchrun_would(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    srun = TaskPool(SweepDir(tmp_path), ["cuda:0,cuda:1"], ["w64-d2"], shard=True, nodes=3).command(0)
    split = srun.index("bash")
    assert srun[:split] == ["srun", "--nodes=3", "--ntasks-per-node=2", "--kill-on-bad-exit", "--cpus-per-task=8"]
    worker = [sys.executable, "-m", "mupsweep", "worker", str(tmp_path), "w64-d2"]
    assert srun[-len(worker) - 5 :] == [*worker, "--device", "cuda:0,cuda:1", "--threads", "1", "--shard"]
    # What srun sets for the last of the six processes, and what a worker reads of it.
    task = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "6", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}
    shell = [*srun[split : -len(worker) - 5], "env"]
    done = subprocess.run(shell, env={**os.environ, **task}, capture_output=True, text=True, check=True)
    env = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert 0 < int(env.pop("MASTER_PORT")) < 2**16
    expected = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1"}
    assert {name: env.get(name) for name in TORCHRUN_ENV if name != "MASTER_PORT"} == expected


def test_ranks_of_several_nodes_that_record_why_they_end_start_again_whatever_their_worker_may_cost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sweep, (run, *_) = save(load(["experiment=smoke"]), "")
    checkpoint = sweep.run(run.run_id).checkpoints[0].parent
    record = json.dumps({"reason": "rank 1: why", "micro_batch": None, "final": False})
    failing = f"echo '{record}' > {checkpoint}/failure-$(wc -l < started).json; kill -ABRT $$"
    checkpoint.mkdir(parents=True)
    for script, code, starts in (
        (f"[ $(wc -l < started) -gt 2 ] || {{ {failing}; }}", 0, 3),
        ("kill -ABRT $$", 134, 1),
    ):
        Path("started").unlink(missing_ok=True)
        monkeypatch.setattr(TaskPool, "command", lambda *_, s=script: ["bash", "-c", f"echo >> started; {s}"])
        assert TaskPool(sweep, ["cpu"], nodes=2).train(StopSignal()) == code
        assert len(Path("started").read_text()) == starts


def test_a_task_that_the_script_does_not_have_is_refused(tmp_path: Path) -> None:
    done = executed(Slurm(gpus=0).array_text(SITE, "w64-d2", TASKS), tmp_path, SLURM_ARRAY_TASK_ID="2")
    assert (done.returncode, done.stderr) == (2, "no task 2 in this script\n")


@pytest.mark.parametrize(
    ("lengths", "workers", "target", "bundles"),
    [
        ([6] * 10, 1, 60, [[6] * 10]),
        ([6] * 11, 1, 60, [[6] * 6, [6] * 5]),  # even, not 10 and 1
        ([90, 70, 6, 6], 1, 60, [[90], [70], [6, 6]]),  # what is longer than the target runs alone
        ([90, 90, 90], 1, 60, [[90], [90], [90]]),
        ([90, 90, 90], 2, 60, [[90, 90], [90]]),  # a run for every worker
        ([30] * 8, 4, 60, [[30] * 8]),
        ([5], 8, 60, [[5]]),
    ],
)
def test_short_runs_are_bundled_evenly(
    lengths: list[float], workers: int, target: float, bundles: list[list[float]]
) -> None:
    named = {f"run-{i}": float(seconds) for i, seconds in enumerate(lengths)}
    tasks = bundled(named, workers, target)
    assert [[named[run_id] for run_id in task.run_ids] for task in tasks] == bundles
    for task, bundle in zip(tasks, bundles, strict=True):
        assert task.seconds == max(max(bundle), sum(bundle) / workers)


@given(st.lists(st.floats(0.1, 1e5), min_size=1), st.integers(1, 8), st.floats(1, 1e4))
def test_every_run_is_in_one_bundle_and_a_bundle_is_a_run_too_long_at_most(
    lengths: list[float], workers: int, target: float
) -> None:
    named = {f"run-{i}": seconds for i, seconds in enumerate(lengths)}
    tasks = bundled(named, workers, target)
    assert sorted(run_id for task in tasks for run_id in task.run_ids) == sorted(named)
    for task in tasks:
        most = sum(lengths) / len(tasks) + max(lengths)
        assert sum(named[run_id] for run_id in task.run_ids) <= most * (1 + 1e-9)
    assert len(tasks) <= max(1, sum(lengths) / (target * workers) + 1)
