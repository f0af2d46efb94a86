"""A disk that is full or may only be read: one line, an exit code, and nothing that was trained is lost."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import mupsweep
from forked import Forked
from outcome import results

from mupsweep.store.sweep_dir import SweepDir

SMALL = ["experiment=smoke", "training.steps=40", "training.checkpoint_minutes=0", "sweep.width_ratios=[1]"]
INLINE = ["launcher=inline", "launcher.device=cpu"]
LOCAL = ["launcher=local", "launcher.devices=cpu", "launcher.slots_per_device=1"]  # two could both lack the room
ONE_CHECKPOINT = "250k"  # of the 200k that each takes


def call(*arguments: str) -> tuple[int, list[str]]:
    """(exit code, lines on stderr but for remarks)."""
    code, _, err = mupsweep(*arguments)
    return code, without_notes(err)


def call_process(*arguments: str) -> tuple[int, list[str]]:
    """A command in a process of its own, whose leases end with it."""
    process = Forked(*arguments)
    _, err = process.communicate(timeout=120)
    return process.wait(), without_notes(err)


def without_notes(err: str) -> list[str]:
    return [line for line in err.splitlines() if not line.startswith("note: ")]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system with the given options, or again with others."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("may not mount a small file system")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> SweepDir:
    """The sweep where there is space."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert call("run", *SMALL, *INLINE, f"out={out}")[0] == 0
    return SweepDir(out / "smoke")


@pytest.mark.parametrize("launcher", [INLINE, pytest.param(LOCAL, marks=pytest.mark.slow)], ids=["inline", "local"])
def test_a_full_disk_ends_in_one_line_and_the_sweep_goes_on_when_there_is_space(
    launcher: list[str], disk: Callable[[str], Path], undisturbed: SweepDir
) -> None:
    out = disk(f"size={ONE_CHECKPOINT}")
    code, (*_, last) = call_process("run", *SMALL, *launcher, f"out={out}")
    assert code in (1, 2)
    assert "Traceback" not in last
    assert any(
        overrides in last for overrides in ("No space left on device", "runs failed", "with 0 bytes left on the disk")
    )
    sweep = SweepDir(out / "smoke")
    kept = list(sweep.path.glob("runs/*/checkpoint/*.pt"))
    assert len(kept) == 1

    disk("remount,size=20m")
    code, lines = call("run", *SMALL, *launcher, f"out={out}")
    assert (code, lines) == (0, [])
    assert "resuming at step" in kept[0].parent.with_name("train.log").read_text()
    assert results(sweep) == results(undisturbed)


def test_a_folder_that_may_only_be_read_is_named_in_one_line_and_can_be_looked_at(disk: Callable[[str], Path]) -> None:
    out = disk("size=20m")
    sweep = str(out / "smoke")
    assert call("run", *SMALL, *INLINE, f"out={out}")[0] == 0
    disk("remount,ro")
    for command in (["run", *SMALL, *INLINE, f"out={out}"], ["run", *SMALL, *LOCAL, f"out={out}"]):
        code, lines = call(*command)
        assert code == 2
        (line,) = lines
        assert line.startswith(f"mupsweep: cannot write {sweep}")
        assert "Read-only file system" in line
    assert call("worker", sweep) == (0, [])  # nothing is left to train
    assert call("status", sweep) == (0, [])


def test_a_sweep_that_may_only_be_read_is_judged_and_its_results_go_elsewhere(
    disk: Callable[[str], Path], tmp_path: Path
) -> None:
    out = disk("size=20m")
    sweep = str(out / "smoke")
    assert call("run", *SMALL, "sweep.width_ratios=[1,2]", *INLINE, f"out={out}")[0] == 0
    target = ["--to", "width=64"]
    recipe = json.loads(mupsweep("transfer", sweep, *target, "--json")[1])
    written = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    disk("remount,ro")
    for command in (["transfer", sweep], ["report", sweep], ["transfer", sweep, *target]):
        code, printed, err = mupsweep(*command)
        assert code == 0
        (line,) = without_notes(err)
        assert line.startswith(f"nothing is written, {sweep}/results")
        assert line.endswith("Read-only file system; --results DIR writes elsewhere")
        assert "width 64" in printed if target[0] in command else "nanogpt/adamw/spectral" in printed
        assert "wrote" not in printed

    elsewhere = tmp_path / "verdicts" / "theirs"
    code, printed, err = mupsweep("transfer", sweep, "--results", str(elsewhere))
    assert (code, without_notes(err)) == (0, [])
    assert f"{elsewhere}/report.html" in printed
    code, printed, err = mupsweep("transfer", sweep, *target, "--results", str(elsewhere))
    assert (code, without_notes(err)) == (0, [])
    names = {str(path.relative_to(elsewhere)) for path in elsewhere.rglob("*") if path.is_file()}
    assert names >= {
        "transfer.json",
        "runs.csv",
        "curves.csv",
        "report.html",
        "figures/curves.png",
        "figures/drift.svg",
    }
    (stored,) = elsewhere.glob("recipe-*.json")
    assert json.loads(stored.read_text()) == recipe[0]
    assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()} == written

    code, _, err = mupsweep("transfer", sweep, "--results", f"{out}/elsewhere")  # what was asked for is not done
    assert code == 2
    assert "Read-only file system" in without_notes(err)[-1]


def test_two_sweeps_and_a_table_have_results_where_they_are_asked_for(undisturbed: SweepDir, tmp_path: Path) -> None:
    before = sorted(path for path in undisturbed.path.rglob("*"))
    assert call("transfer", str(undisturbed.path), str(undisturbed.path), "--results", str(tmp_path / "two"))[0] == 0
    table = str(undisturbed.results / "runs.csv")
    assert call("transfer", "--from", table, "--results", str(tmp_path / "table"))[0] == 0
    for name in ("two", "table"):
        assert json.loads((tmp_path / name / "transfer.json").read_text())["groups"]
        assert (tmp_path / name / "figures" / "curves.png").is_file()
    assert sorted(path for path in undisturbed.path.rglob("*")) == before


def test_a_worker_that_cannot_claim_or_log_ends_in_one_line(disk: Callable[[str], Path]) -> None:
    out = disk("size=20m")
    assert call("run", *SMALL, *INLINE, "sweep.log2_lrs=[-7]", f"out={out}")[0] == 0
    (run,) = (out / "smoke" / "runs").iterdir()
    (run / "status.json").unlink()
    disk("remount,ro")
    code, (line,) = call("worker", str(out / "smoke"))
    assert code == 2
    assert line.startswith(f"mupsweep: cannot write {run}/claims/0001.json: Read-only file system")

    disk("remount,rw")
    (run / "train.log").unlink()
    (run / "train.log").mkdir()
    assert call("worker", str(out / "smoke"))[0] == 0  # of this run alone
    assert "train.log: Is a directory" in SweepDir(out / "smoke").run(run.name).status()["error"]
