"""Several devices per run: which ones, the same results, and nobody is left behind when one of them ends."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import mupsweep
from forked import CONTEXT, Forked
from outcome import results
from polling import until
from test_launchers import SMALL, busy, finish, owners
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.run import main as run_torchrun

from mupsweep.analysis.labels import DONE
from mupsweep.errors import ConfigError
from mupsweep.launchers.local import Local
from mupsweep.launchers.slurm import Slurm
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep.config import load
from mupsweep.sweep.plan import plan, save

TOLERANCE = {"loss": 1e-3}  # relative, after 60 steps: fp32 sums in another order, bf16 products where there are any
FEW = ["experiment=smoke", "training.steps=2", "sweep.log2_lrs=[-7]"]
SHORT = [*SMALL, "sweep.width_ratios=[1]"]
PAIRS = ["launcher=local", "launcher.devices=cpu", "launcher.devices_per_run=2", "launcher.slots_per_device=1"]

linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="asks /proc for the children of a process")


@pytest.mark.parametrize(
    ("made", "slots"),
    [
        (
            Local(devices=["cuda:0", "cuda:1", "cuda:2", "cuda:3"], devices_per_run=2),
            ["cuda:0,cuda:1", "cuda:2,cuda:3"],
        ),
        (Local(devices=["cuda:0", "cuda:1"], devices_per_run=2, slots_per_device=2), ["cuda:0,cuda:1"] * 2),
        (Local(devices="cpu", devices_per_run=4, slots_per_device=2), ["cpu,cpu,cpu,cpu"] * 2),
        (Local(devices="cpu", devices_per_run=1024), [",".join(["cpu"] * 1024)]),
    ],
)
def test_a_slot_is_a_group_of_devices(made: Local, slots: list[str]) -> None:
    assert made.slots() == slots


def test_devices_that_do_not_divide_into_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^launcher\.devices_per_run=2: the 3 devices \(cuda:0, cuda:1, cuda:2\)"):
        Local(devices=["cuda:0", "cuda:1", "cuda:2"], devices_per_run=2).slots()
    with pytest.raises(ConfigError, match=r"^launcher\.devices_per_run=3: expected a divisor of launcher\.gpus=4$"):
        Slurm(gpus=4, devices_per_run=3)
    with pytest.raises(ConfigError, match=r"^launcher\.devices_per_run=0: expected at least 1$"):
        load(["launcher=local", "launcher.devices_per_run=0"])
    with pytest.raises(ConfigError, match=r"=2: expected all GPUs of the nodes, .*nodes \* launcher\.gpus = 4$"):
        Slurm(gpus=2, nodes=2, devices_per_run=2)
    with pytest.raises(ConfigError, match=r"^launcher\.devices_per_run=3: expected a multiple of launcher\.nodes=2$"):
        Slurm(gpus=0, nodes=2, devices_per_run=3)
    with pytest.raises(ConfigError, match=r"^launcher\.workers=2: launcher\.nodes=2 train one run at a time$"):
        Slurm(gpus=0, nodes=2, devices_per_run=2, workers=2)


@pytest.mark.parametrize("launcher", [["launcher=local"], ["launcher=slurm", "launcher.gpus=0"]])
@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ("5", r"launcher\.sizes=5: expected keys for sizes, such as \{w512-d4:"),
        ("{w32-d2:4}", r"launcher\.sizes=\{.*\}: expected keys for sizes"),
        ("{w32-d2:{thread:2}}", r"unknown key 'launcher\.sizes\.w32-d2\.thread'; .*threads"),
        ("{w32-d2:{threads:two}}", r"launcher\.sizes\.w32-d2\.threads='two': expected a whole number"),
        ("{w32-d2:{threads:0}}", r"launcher\.sizes\.w32-d2: launcher\.threads=0: expected at least 1"),
        ("{w32-d2:{sizes:{}}}", r"launcher\.sizes\.w32-d2\.sizes: it is the same for all sizes"),
        ("{w64-d2:{threads:2}}", r"launcher\.sizes\.w64-d2: the sweep has no such size; .*w32-d2"),
        (
            "{w32-d2:{devices_per_run:3}}",
            r"training.batch_size=4 cannot be .* launcher\.sizes\.w32-d2\.devices_per_run=3",
        ),
    ],
)
def test_what_is_said_of_a_size_is_checked_before_anything_is_written(
    launcher: list[str], sizes: str, expected: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{expected}"):
        plan(load(["experiment=smoke", *launcher, f"launcher.sizes={sizes}"]))


@pytest.mark.usefixtures("_forked_workers")
def test_sizes_get_the_devices_that_they_need_and_the_rest_what_the_launcher_says() -> None:
    sizes = "launcher.sizes={w32-d2:{devices_per_run:2}}"
    code, _, err = mupsweep("run", *FEW, "launcher=local", "launcher.devices=cpu", sizes)
    assert code == 0, err
    sweep = SweepDir(Path("sweeps/smoke"))
    found = {row["run_id"]: (row["width"], sweep.run(row["run_id"]).summary()["devices"]) for row in sweep.read_plan()}
    assert sorted(found.values()) == [(16, 1), (32, 2)]


@pytest.mark.parametrize(
    ("made", "devices"),
    [
        (Slurm(gpus=4, devices_per_run=2), ("cuda:0,cuda:1", "cuda:2,cuda:3")),
        (Slurm(gpus=4, devices_per_run=4), ("cuda:0,cuda:1,cuda:2,cuda:3",)),
        (Slurm(gpus=2, devices_per_run=2, workers=2), ("cuda:0,cuda:1", "cuda:0,cuda:1")),
        (Slurm(gpus=0, devices_per_run=2, workers=2), ("cpu,cpu", "cpu,cpu")),
        (Slurm(gpus=2, nodes=3, devices_per_run=6), ("cuda:0,cuda:1",)),
        (Slurm(gpus=0, nodes=2, devices_per_run=2), ("cpu",)),
    ],
)
def test_a_task_of_a_job_array_has_a_worker_per_group(made: Slurm, devices: tuple[str, ...]) -> None:
    assert made.devices == devices


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, object], bytes]]:
    """What two ranks make of the sweep, undisturbed."""
    out = tmp_path_factory.mktemp("pairs")
    code, _, err = mupsweep("run", *SHORT, *PAIRS, f"out={out}")
    assert code == 0, err
    return results(SweepDir.open(out / "smoke"))


def ranks_of(sweep: SweepDir) -> list[int]:
    """The processes that train a run now, rank 0 first; empty while there are not two."""
    run = busy(sweep)
    if run is None:
        return []
    leader = json.loads(max((run.path / "claims").glob("*.json")).read_text())["pid"]
    server = Path(f"/proc/{leader}/stat").read_text().rpartition(")")[2].split()[1]
    return sorted(map(int, Path(f"/proc/{server}/task/{server}/children").read_text().split()), key=leader.__ne__)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


@linux
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_rank_is_killed_the_others_end_and_a_new_worker_ends_with_the_same_bits(
    rank: int, pairs: dict[str, tuple[dict[str, object], bytes]]
) -> None:
    sweep = SweepDir(Path("sweeps/smoke"))
    launcher = Forked("run", *SHORT, *PAIRS)
    found: list[int] = []

    def killed() -> bool:
        found[:] = ranks_of(sweep)
        if found:
            os.kill(found[rank], signal.SIGKILL)
        return bool(found)

    until(killed, launcher)
    until(lambda: all(map(is_gone, found)), launcher)
    code, _, err = finish(launcher)
    assert code == 0, err
    assert len(found) == 2
    assert results(sweep) == pairs
    assert owners(sweep) == [1, 2]


@pytest.mark.slow
@pytest.mark.usefixtures("_forked_workers")
def test_a_sharded_sweep_has_the_losses_of_a_whole_one(pairs: dict[str, tuple[dict[str, object], bytes]]) -> None:
    rarely = "training.checkpoint_minutes=10"
    code, _, err = mupsweep("run", *SHORT, *PAIRS, rarely, "launcher.shard=true")
    assert code == 0, err
    by_run = results(SweepDir(Path("sweeps/smoke")))
    assert by_run.keys() == pairs.keys()
    for run_id, (summary, _) in by_run.items():
        assert summary["val_loss"] == pytest.approx(pairs[run_id][0]["val_loss"], rel=TOLERANCE["loss"])


@pytest.mark.parametrize(
    ("share", "batch", "width"),
    [(0.79, 8, 1), (0.81, 8, 2), (1.61, 8, 4), (9.0, 8, 4), (1.61, 6, 2), (1.61, 7, 1)],
)
def test_a_run_that_does_not_fit_on_a_device_is_divided_among_as_many_as_it_needs(
    share: float, batch: int, width: int
) -> None:
    four = Local(devices=["cuda:0", "cuda:1", "cuda:2", "cuda:3"])
    (run, *_) = plan(load(["experiment=smoke", f"training.batch_size={batch}", "model.context=1"]))
    memory = run.resolved.least_memory(run.size, 1) / share
    launcher = four.for_runs([run], memory)
    assert (launcher.devices_per_run, launcher.shard) == (width, width > 1)
    assert four.for_runs([run]) == four
    pair = replace(four, devices_per_run=2)  # what is asked for stays
    assert pair.for_runs([run], memory) == pair


@pytest.mark.usefixtures("_forked_workers")
def test_small_devices_share_large_runs_and_train_small_ones_alone() -> None:
    runs = plan(load(["experiment=smoke"]))
    small, large = (min(runs, key=lambda r: r.size), max(runs, key=lambda r: r.size))
    between = (small.resolved.least_memory(small.size) + large.resolved.least_memory(large.size)) / 2 / 0.8 / 1e9
    memory = f"launcher.device_memory={between}"
    code, _, err = mupsweep("run", *FEW, "launcher=local", "launcher.devices=[cpu,cpu]", memory)
    assert code == 0, err
    sweep = SweepDir(Path("sweeps/smoke"))
    found = {row["run_id"]: (row["width"], sweep.run(row["run_id"]).summary()["devices"]) for row in sweep.read_plan()}
    assert sorted(found.values()) == [(16, 1), (32, 2)]
    assert re.search(r"^w32-d2: roughly \S+B at least and \S+B of a device: 2 share each run$", err, re.MULTILINE)


def torchrun(arguments: list[str], folder: Path) -> None:
    """Be the process of torchrun."""
    os.chdir(folder)
    run_torchrun(arguments)


def test_processes_that_torchrun_starts_on_two_machines_train_together(
    pairs: dict[str, tuple[dict[str, object], bytes]],
) -> None:
    sweep = save(load([*SHORT]), "")[0]
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the agents meet here
    where = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{store.port}", "--rdzv-conf=is_host=false"]
    worker = ["-m", "mupsweep", "worker", str(sweep.path), "--device", "cpu"]
    arguments = ["--nnodes=2", "--nproc-per-node=1", *where, *worker]
    agents = [CONTEXT.Process(target=torchrun, args=(arguments, Path.cwd())) for _ in range(2)]
    for agent in agents:
        agent.start()
    for agent in agents:
        agent.join()
    assert [agent.exitcode for agent in agents] == [0, 0]
    assert results(sweep) == pairs


@linux
@pytest.mark.slow
def test_when_a_sharded_rank_is_killed_a_new_worker_ends_with_the_same_bits() -> None:
    whole, killed = (SweepDir(Path(out) / "smoke") for out in ("whole", "killed"))
    for out in (whole, killed):
        launcher = Forked("run", *SHORT, *PAIRS, "launcher.shard=true", f"out={out.path.parent}")
        if out is killed:
            found: list[int] = []
            until(lambda: bool(found.extend(ranks_of(killed)) or found), launcher)  # noqa: B023
            os.kill(found[1], signal.SIGKILL)
        code, _, err = finish(launcher)
        assert code == 0, err
    assert results(killed) == results(whole)
    assert owners(killed) == [1, 2]


@linux
@pytest.mark.usefixtures("_forked_workers")
def test_a_stop_ends_all_ranks_with_a_checkpoint_and_the_run_goes_on_to_the_same_bits(
    pairs: dict[str, tuple[dict[str, object], bytes]],
) -> None:
    sweep = SweepDir(Path("sweeps/smoke"))
    launcher = Forked("run", *SHORT, *PAIRS)
    found: list[int] = []
    until(lambda: bool(found.extend(ranks_of(sweep)) or found), launcher)
    launcher.send_signal(signal.SIGTERM)
    code, _, err = finish(launcher)
    assert code == 130, err
    assert all(map(is_gone, found))
    assert sweep.counts()[DONE] < 2
    assert list(sweep.path.glob("runs/*/checkpoint/latest.pt")) != []
    code, _, err = mupsweep("run", *SHORT, *PAIRS)
    assert code == 0, err
    assert results(sweep) == pairs
