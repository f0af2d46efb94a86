"""Records: files are replaced whole, a run has one owner, and damage is told in one line."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import CONTEXT
from polling import until

from mupsweep import atomic_files
from mupsweep.analysis.labels import DIVERGED, DONE
from mupsweep.errors import RecordError
from mupsweep.store import lease
from mupsweep.store.run_dir import FAILED, PENDING, RUNNING, RunDir
from mupsweep.store.sweep_dir import SweepDir

RACERS, RACES = 8, 50
HOLDER = """
import sys
from pathlib import Path
from mupsweep.store.sweep_dir import RunDir

claim = RunDir(Path(sys.argv[1])).claim()
print("none" if claim is None else claim.path.name, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    folder = RunDir(tmp_path / "sweep" / "runs" / "w16-d2-lr-7.00-s0-00000000")
    folder.path.mkdir(parents=True)
    return folder


PLANNED = {
    "variant": "v",
    "model": "m",
    "optimizer": "o",
    "parametrization": "p",
    "width": 16,
    "depth": 2,
    "width_ratio": 1.0,
    "depth_ratio": 1.0,
    "log2_lr": -7.0,
    "seed": 0,
}


@pytest.fixture
def sweep(tmp_path: Path) -> SweepDir:
    """A planned sweep of three runs, without a config."""
    made = SweepDir(tmp_path / "sweep")
    made.path.mkdir()
    made.write_plan({"run_id": f"run-{i}", **PLANNED, "seed": i} for i in range(3))
    for i in range(3):
        made.run(f"run-{i}").path.mkdir(parents=True)
    return made


def holder(run: RunDir, *prefix: str) -> subprocess.Popen[str]:
    """A process that has claimed the run and lives until its stdin closes."""
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", HOLDER, str(run.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "0000.json\n"
    return process


def end(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    process.send_signal(number)
    process.communicate(timeout=30)


def rewrite_claim(run: RunDir, **changes: object) -> Path:
    """The newest claim with some fields of its owner changed."""
    path = max((run.path / "claims").iterdir())
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("durable", [True, False])
def test_a_replaced_file_has_the_new_content_and_leaves_nothing_beside_it(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "status.json"
    for text in ("a" * 100_000, "b"):
        atomic_files.write_text(path, text, durable)
        assert path.read_text() == text
        assert names(tmp_path) == ["status.json"]


def test_a_write_that_cannot_be_renamed_keeps_what_was_there_and_leaves_no_temporary_file(
    tmp_path: Path,
) -> None:
    target = tmp_path / "status.json"
    (target / "inside").mkdir(parents=True)
    with pytest.raises(
        RecordError, match=rf"^cannot write {re.escape(str(target))}: .+; free space or choose"
    ) as caught:
        atomic_files.write_text(target, "new")
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["status.json"]
    assert names(target) == ["inside"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is a device of Linux")
def test_a_full_disk_keeps_the_old_content_and_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "status.json"
    path.write_text("old")
    # the temporary name leads to a device that is always full
    full = tmp_path / ".status.json.tmp"
    full.symlink_to("/dev/full")
    monkeypatch.setattr(atomic_files, "temporary_beside", lambda _: full)
    with pytest.raises(RecordError, match="No space left on device; free space or choose another folder with out=DIR"):
        atomic_files.write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["status.json"]


def test_a_write_into_a_folder_that_is_gone_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="No such file or directory") as caught:
        atomic_files.write_json(tmp_path / "gone" / "status.json", {})
    assert "\n" not in str(caught.value)


def test_json_holds_null_where_a_float_is_not_finite(run: RunDir) -> None:
    bad = {
        "loss": float("nan"),
        "deep": [{"x": (1.0, float("inf"))}, float("-inf")],
        "fine": 0.5,
        "name": "nan",
    }
    wanted = {"loss": None, "deep": [{"x": [1.0, None]}, None], "fine": 0.5, "name": "nan"}

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no json")

    run.write_summary(bad)
    run.write_status(DIVERGED, **bad)
    run.append_metrics(bad)
    assert json.loads(run.summary_path.read_text(), parse_constant=refuse) == wanted
    assert json.loads(run.status_path.read_text(), parse_constant=refuse) == {"status": DIVERGED, **wanted}
    assert json.loads(run.metrics_path.read_text(), parse_constant=refuse) == wanted


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"status": "do',
        b"[]",
        b"null",
        b"\xff\xfe",
        b"{}",
        b'{"step": 3}',
        b'{"status": "sleeping"}',
        b'{"status": ["done"]}',
        b'{"status": "done", "error": 3}',
    ],
)
def test_a_missing_or_damaged_status_reads_as_pending(run: RunDir, content: bytes) -> None:
    assert run.status() == {"status": PENDING}
    run.status_path.write_bytes(content)
    assert run.status()["status"] == PENDING
    assert run.is_open()


@pytest.mark.parametrize(("status", "is_open"), [(PENDING, 1), (RUNNING, 1), (FAILED, 1), (DONE, 0), (DIVERGED, 0)])
def test_only_done_and_diverged_are_results(run: RunDir, status: str, is_open: int) -> None:
    run.write_summary({"val_loss": 1.0})
    run.write_status(status)
    assert run.is_open() == bool(is_open)


@pytest.mark.parametrize("content", [None, b"", b'{"val_loss": 1.', b"[]"])
def test_a_result_whose_summary_is_missing_or_damaged_is_none(run: RunDir, content: bytes | None) -> None:
    if content is not None:
        run.summary_path.write_bytes(content)
    run.write_status(DONE)
    assert run.is_open()


def test_metrics_without_their_cut_last_line_are_the_rows_before_it(run: RunDir) -> None:
    for step in (1, 2):
        run.append_metrics({"step": step})
    with run.metrics_path.open("a") as file:
        file.write('{"step": 3, "tra')  # a process killed while it wrote
    assert [row["step"] for row in run.metrics()] == [1, 2]


def test_metrics_with_a_damaged_byte_are_the_rows_before_it(run: RunDir) -> None:
    run.metrics_path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st\xffp": 3}\n{"step": 4}\n')
    assert [row["step"] for row in run.metrics()] == [1, 2]


def test_a_second_claim_fails_while_the_first_lives_and_succeeds_after_its_release(run: RunDir) -> None:
    first = run.claim()
    assert first is not None
    assert run.claim() is None
    assert run.is_claimed()
    first.release()
    assert not run.is_claimed()
    second = run.claim()
    assert second is not None
    assert second.path.name == "0001.json"
    assert names(run.path / "claims") == ["0000.json", "0001.json"]


def test_the_run_of_a_living_process_is_not_for_others_and_of_a_killed_one_is(run: RunDir) -> None:
    process = holder(run)
    assert run.is_claimed()
    assert run.is_owned_by(process.pid)
    assert run.claim() is None
    end(process, signal.SIGKILL)
    assert not run.is_claimed()
    taken = run.claim()
    assert taken is not None
    assert taken.is_held()
    assert run.is_owned_by(os.getpid())


def test_the_claim_of_a_killed_process_that_nobody_waited_for_is_taken_over(run: RunDir) -> None:
    process = holder(run)
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    assert run.claim() is not None
    process.communicate(timeout=30)


def test_a_pid_that_belongs_to_another_process_now_does_not_hold_a_claim(run: RunDir) -> None:
    assert run.claim() is not None
    rewrite_claim(run, born="1")  # this pid, but of a process that started at boot
    assert not run.is_claimed()
    assert run.claim() is not None


def test_a_container_knows_nothing_of_the_pids_of_another_one_of_the_same_name(run: RunDir) -> None:
    container = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc")
    if shutil.which("unshare") is None or subprocess.run([*container, "true"], capture_output=True).returncode:
        pytest.skip("no pid namespaces here")
    process = holder(run, *container)
    assert run.claim() is None
    assert not run.is_owned_by(1)
    end(process, signal.SIGTERM)
    past = time.time() - lease.LEASE_TIMEOUT - 1
    os.utime(run.claims / "0000.json", (past, past))
    assert run.claim() is not None


def test_a_claim_counts_the_owners_that_never_released_the_run(run: RunDir) -> None:
    died = []
    for release in (False, True, False):
        claim = run.claim()
        assert claim is not None
        died.append(claim.deaths())
        if release:
            claim.release()
        else:
            rewrite_claim(run, born="1")
    claim = run.claim()
    assert claim is not None
    assert [*died, claim.deaths()] == [0, 1, 1, 2]


def test_another_hosts_claim_holds_while_it_beats_and_is_taken_over_when_stale(run: RunDir) -> None:
    first = run.claim()
    assert first is not None
    path = rewrite_claim(run, host="elsewhere", pid=1)
    assert run.claim() is None
    beat = path.stat().st_mtime
    os.utime(path, (beat, beat - lease.LEASE_TIMEOUT + 60))
    assert run.claim() is None
    os.utime(path, (beat, beat - lease.LEASE_TIMEOUT - 60))
    assert not run.is_claimed()
    assert run.claim() is not None


@pytest.mark.parametrize("jump", [-1e7, 1e7])
def test_a_host_whose_clock_jumps_judges_another_hosts_heartbeat_as_before(
    jump: float, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run.claim() is not None
    path = rewrite_claim(run, host="elsewhere", pid=1)
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + jump)
    assert run.claim() is None
    past = right() - lease.LEASE_TIMEOUT - 60
    os.utime(path, (past, past))
    assert run.claim() is not None
    assert names(run.path / "claims") == ["0000.json", "0001.json"]


def test_a_link_whose_answer_was_lost_is_a_claim_all_the_same(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS asks again, and the server finds the name taken."""
    right = os.link

    def link(source: Path, target: Path) -> None:
        right(source, target)
        right(source, target)

    monkeypatch.setattr(os, "link", link)
    claim = run.claim()
    assert claim is not None
    assert claim.is_held()
    assert run.claim() is None


def test_a_file_system_without_hard_links_has_claims_too(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    claim = run.claim()
    assert claim is not None
    assert run.claim() is None
    claim.release()
    assert run.claim() is not None


def test_claim_10000_comes_after_9999(run: RunDir) -> None:
    first = run.claim()
    assert first is not None
    first.release()
    first.path.rename(first.path.with_name("9999.json"))
    for name in ("10000.json", "10001.json"):
        claim = run.claim()
        assert claim is not None
        assert claim.path.name == name
        assert claim.is_held()
        claim.release()


def test_a_heartbeat_that_a_server_refuses_does_not_end_the_run(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = run.claim()
    assert claim is not None
    refused: list[Path] = []

    def refuse(path: Path) -> None:
        refused.append(path)
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(lease, "HEARTBEAT_INTERVAL", 0.001)
    with claim.renewed():
        until(lambda: len(refused) > 1)
    assert claim.is_held()
    assert not claim.lost


def test_a_claim_from_before_a_reboot_is_judged_by_its_heartbeat(run: RunDir) -> None:
    assert run.claim() is not None
    path = rewrite_claim(run, boot="an earlier one", pid=2**22 + 1, born="5")
    assert run.is_claimed()
    os.utime(path, (0, 0))
    assert run.claim() is not None


def test_a_heartbeat_keeps_a_claim_fresh_for_other_hosts_while_its_owner_computes(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = run.claim()
    assert claim is not None
    os.utime(claim.path, (0, 0))
    with claim.renewed():
        pass
    assert claim.path.stat().st_mtime == 0  # it ended before the first one: nothing is written
    monkeypatch.setattr(lease, "HEARTBEAT_INTERVAL", 0.001)
    with claim.renewed():
        until(lambda: claim.path.stat().st_mtime > 1e9)


def test_a_heartbeat_tells_an_owner_that_it_was_taken_over(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = run.claim()
    assert claim is not None
    os.utime(rewrite_claim(run, host="elsewhere"), (0, 0))
    assert run.claim() is not None
    monkeypatch.setattr(lease, "HEARTBEAT_INTERVAL", 0.001)
    with claim.renewed():
        until(lambda: claim.lost)


def test_an_owner_that_was_taken_over_knows_it(run: RunDir) -> None:
    claim = run.claim()
    assert claim is not None
    assert claim.is_held()
    path = rewrite_claim(run, host="elsewhere")
    os.utime(path, (0, 0))
    other = run.claim()
    assert other is not None
    assert not claim.is_held()
    assert other.is_held()
    claim.release()  # of what is not its own any more: the new owner keeps the run
    assert other.is_held()
    assert run.is_claimed()


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_claim_is_taken_over(run: RunDir, content: str) -> None:
    claim = run.claim()
    assert claim is not None
    claim.path.write_text(content)
    assert run.claim() is None  # it may just be being written
    past = time.time() - lease.HEARTBEAT_GRACE - 1
    os.utime(claim.path, (past, past))
    assert run.claim() is not None


def test_a_claim_on_a_run_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where a folder belongs")
    with pytest.raises(RecordError, match=r"^cannot make the folder ") as caught:
        RunDir(tmp_path / "runs" / "one").claim()
    assert "\n" not in str(caught.value)


def _race(root: Path, start: multiprocessing.Barrier, won: multiprocessing.Queue) -> None:  # type: ignore[valid-type]
    mine = []
    for number in range(RACES):
        start.wait(60)
        if RunDir(root / f"run-{number}").claim() is not None:
            mine.append(number)
    start.wait(60)  # nobody dies before everybody has tried: a dead winner's claim would be free again
    won.put(mine)


def race(root: Path) -> list[int]:
    """The runs that were won, once per winner, by processes that try each at the same moment."""
    start, won = CONTEXT.Barrier(RACERS), CONTEXT.Queue()
    racers = [CONTEXT.Process(target=_race, args=(root, start, won)) for _ in range(RACERS)]
    for racer in racers:
        racer.start()
    winners = [number for _ in racers for number in won.get(timeout=120)]
    for racer in racers:
        racer.join(60)
    return winners


def test_of_eight_processes_racing_for_a_run_exactly_one_wins(tmp_path: Path) -> None:
    assert sorted(race(tmp_path)) == list(range(RACES))
    assert {tuple(names(tmp_path / f"run-{n}" / "claims")) for n in range(RACES)} == {("0000.json",)}


def test_of_eight_processes_racing_to_take_a_dead_run_over_exactly_one_wins(tmp_path: Path) -> None:
    for number in range(RACES):
        run = RunDir(tmp_path / f"run-{number}")
        assert run.claim() is not None
        rewrite_claim(run, born="1")
    assert sorted(race(tmp_path)) == list(range(RACES))


PLANNER = """
import json
import sys
from pathlib import Path
from mupsweep.store.sweep_dir import SweepDir

sweep = SweepDir(Path(sys.argv[1]))
row = json.loads(sys.argv[3])
for i in range(20):
    with sweep.lock():
        sweep.write_plan([*sweep.read_plan(), {"run_id": f"{sys.argv[2]}-{i}", **row}])
"""


def test_commands_that_plan_at_once_lose_none_of_the_others_runs(tmp_path: Path) -> None:
    """Without a lock of the file system, which many network file systems have not."""
    sweep = SweepDir(tmp_path / "sweep")
    planners = [
        subprocess.Popen([sys.executable, "-c", PLANNER, str(sweep.path), name, json.dumps(PLANNED)]) for name in "abcd"
    ]
    assert [planner.wait(120) for planner in planners] == [0] * 4
    assert sorted(row["run_id"] for row in sweep.read_plan()) == sorted(f"{n}-{i}" for n in "abcd" for i in range(20))


def test_a_lock_that_is_let_go_while_others_look_at_it_is_left_for_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def let_go(path: Path) -> None:
        path.unlink()

    folder = tmp_path / "lock"
    for look in (lease.acquire, lease.holder):
        held = lease.acquire(folder)
        assert held is not None
        with monkeypatch.context() as patch:
            patch.setattr(lease, "read_json", let_go)  # between the list of the folder and the look into the file
            assert look(folder) is None
        assert not held.path.exists()
    assert lease.acquire(folder) is not None


def test_a_lock_is_renewed_while_a_slow_scheduler_takes_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_INTERVAL", 0.001)
    with SweepDir(tmp_path).lock():
        (claim,) = (tmp_path / ".planning").glob("*.json")
        os.utime(claim, (0, 0))
        until(lambda: claim.stat().st_mtime > 1e9)


def test_a_command_that_was_killed_while_it_planned_holds_nobody_up(tmp_path: Path) -> None:
    sweep = SweepDir(tmp_path / "sweep")
    planner = "import os,sys; from pathlib import Path; from mupsweep.store.sweep_dir import SweepDir\n"
    planner += "with SweepDir(Path(sys.argv[1])).lock(): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", planner, str(sweep.path)]).returncode == -signal.SIGKILL
    with sweep.lock():
        sweep.write_plan([])


def test_a_run_whose_owner_died_is_pending_again_and_one_that_is_trained_is_running(sweep: SweepDir) -> None:
    run = sweep.run("run-0")
    process = holder(run)
    run.write_status(RUNNING, step=5, steps=30)
    assert sweep.state("run-0") == {"status": RUNNING, "step": 5, "steps": 30}
    sweep.run("run-1").write_summary({"status": DIVERGED, "val_loss": None})
    sweep.run("run-1").write_status(DIVERGED)
    assert sweep.counts() == {RUNNING: 1, DIVERGED: 1, PENDING: 1}
    end(process)
    assert sweep.state("run-0") == {"status": PENDING}
    assert sweep.counts() == {PENDING: 2, DIVERGED: 1}


def test_a_folder_that_is_no_sweep_is_refused_naming_the_sweeps_beside_it(sweep: SweepDir, tmp_path: Path) -> None:
    other = SweepDir(tmp_path / "another")
    other.path.mkdir()
    other.write_plan([])
    wrong = tmp_path / "swep"
    with pytest.raises(RecordError) as caught:
        SweepDir.open(wrong)
    assert str(caught.value) == (
        f"{wrong} is not a sweep (it has no plan.jsonl); did you mean '{tmp_path}/sweep'? "
        f"valid: {tmp_path}/another, {tmp_path}/sweep"
    )
    assert SweepDir.open(sweep.path).path == sweep.path
    (wrong / "plan.jsonl").mkdir(parents=True)
    with pytest.raises(RecordError, match=f"did you mean '{tmp_path}/sweep'[?] valid: {tmp_path}/another, "):
        SweepDir.open(wrong)


def test_where_there_is_no_sweep_at_all_the_error_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"is not a sweep .* start one with mupsweep run$"):
        SweepDir.open(tmp_path / "none")


@pytest.mark.parametrize("content", [None, b"a: [1", b"\xff\xfe\x00", b"", b"only words", b"- a list"])
def test_a_damaged_config_is_one_line_that_says_to_run_the_command_again(
    sweep: SweepDir, content: bytes | None
) -> None:
    if content is not None:
        sweep.config_path.write_bytes(content)
    with pytest.raises(RecordError, match="run the command that made the sweep again") as caught:
        sweep.read_config()
    assert str(caught.value).startswith(f"{sweep.config_path} cannot be read")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b'{"run_id": "a"}\n{"run_i', b"\xff\xfe\n", b"{}\nwords\n", b"null\n", b"[1]\n"])
def test_a_damaged_plan_is_one_line_that_says_what_to_do(sweep: SweepDir, content: bytes) -> None:
    sweep.plan_path.write_bytes(content)
    with pytest.raises(
        RecordError, match=r"is damaged .* delete it and run the command that made the sweep again"
    ) as caught:
        sweep.read_plan()
    assert str(caught.value).startswith(str(sweep.plan_path))
    assert "\n" not in str(caught.value)


def test_what_is_written_of_a_config_is_what_is_read(sweep: SweepDir) -> None:
    tree = {"variants": [], "sweep": {"seeds": (0, 1)}, "launcher": {}, "tracker": {}, "out": "μ: #"}
    sweep.write_config(tree, "mupsweep run\nsweep.seeds=[0,1]")
    assert sweep.read_config() == {**tree, "sweep": {"seeds": [0, 1]}}
    assert sweep.config_path.read_text().splitlines()[:2] == ["# mupsweep run", "# sweep.seeds=[0,1]"]


def test_removed_checkpoints_leave_no_folder(run: RunDir) -> None:
    run.remove_checkpoints()
    for path in (*run.checkpoints, run.trunk_checkpoint, run.checkpoints[0].with_name(".latest.pt.0123.tmp")):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    run.remove_checkpoints()
    assert names(run.path) == []
