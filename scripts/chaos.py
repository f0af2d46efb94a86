"""A drill: kill, stop and damage whatever a sweep is made of while it runs; its results must not change by a bit.

    make chaos                         ten minutes: half on launcher=local, half on a Slurm cluster of its own, if any
    python scripts/chaos.py --minutes 3 --seed 7 --launcher local

Small sweeps run one after the other until the minutes are over, each with random faults, the command that made it
started again wherever it ended. Each is then finished undisturbed and compared with a twin that nobody disturbed:
plan, summaries, metrics and results are the same, no run is lost and none was trained twice at once.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from mupsweep.atomic_files import read_json
from mupsweep.store import lease
from mupsweep.store.run_dir import RunDir
from mupsweep.store.sweep_dir import SweepDir

OF_THE_CLOCK = ("seconds", "tokens_per_second")  # all else in a summary is a result
SWEEP = ["experiment=smoke", "training.checkpoint_minutes=0.002", "sweep.log2_lrs=[-10,-9,-8,-7,-6,-5]"]
ON_CPU = ["launcher=local", "launcher.devices=cpu", "launcher.slots_per_device=3"]
ON_CPU += ["launcher.sizes={w32-d2:{devices_per_run:2}}"]  # the larger size takes two ranks
BETWEEN_FAULTS = 0.8  # seconds, on average
OFTEN = 8  # times as often as a fault of the launcher is one of a run: a command takes seconds to start again
SUSPENDED = 4.0  # seconds at most
FINISH = 300.0  # seconds that an undisturbed command may take
ATTEMPTS = 20  # commands that may be needed to finish what is left, while orphaned workers still hold runs
TICK = 0.01  # of the clock that dates files, and some


class Drill:
    """Faults on sweeps that `launcher=local` trains.

    Attributes:
        folder: where the sweeps are.
        words: of the command, without the sweep's name.
        counts: how often each kind of fault struck.
    """

    name = "local"

    def __init__(self, folder: Path, words: list[str], rng: random.Random) -> None:
        self.folder, self.words, self.rng = folder, words, rng
        self.counts: Counter[str] = Counter()
        self.command: subprocess.Popen[bytes] | None = None
        self.suspended: dict[int, tuple[str | None, float]] = {}
        self.faults: dict[str, Callable[[], bool]] = {
            "worker killed": lambda: self.hit(signal.SIGKILL),
            "process without a run killed": self.kill_other,
            "worker told TERM": lambda: self.hit(signal.SIGTERM),
            "worker told USR1": lambda: self.hit(signal.SIGUSR1),
            "worker suspended": self.suspend,
            "checkpoint damaged": self.damage_checkpoint,
            "status half-written": self.damage_status,
            **self.own_faults(),
        }

    def own_faults(self) -> dict[str, Callable[[], bool]]:
        """Those of this launcher."""
        return {
            "command and workers killed": lambda: self.end_command(signal.SIGKILL, group=True),
            "command killed, workers orphaned": lambda: self.end_command(signal.SIGKILL),
            "command told TERM": lambda: self.end_command(signal.SIGTERM),
            "command told USR1": lambda: self.end_command(signal.SIGUSR1),
        }

    def begin(self, name: str) -> SweepDir:
        """A new sweep, and its command started."""
        self.sweep = SweepDir(self.folder / name)
        self.start()
        return self.sweep

    def start(self) -> None:
        """Start the sweep's command."""
        words = [sys.executable, "-m", "mupsweep", "run", *self.words, f"out={self.folder}"]
        with self.log_path.open("ab") as log:
            self.command = subprocess.Popen(
                [*words, f"sweep.name={self.sweep.name}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def log_path(self) -> Path:
        """What the sweep's commands print."""
        return self.folder / f"{self.sweep.name}.log"

    def is_active(self) -> bool:
        """Whether somebody is meant to work on the sweep."""
        return self.command is not None and self.command.poll() is None

    def is_complete(self) -> bool:
        """Whether every run is finished, and the command said so."""
        done = self.command is not None and self.command.poll() == 0
        rows = self.sweep.read_plan() if done else []
        return bool(rows) and not any(self.sweep.run(row["run_id"]).is_open() for row in rows)

    def strike(self) -> None:
        """A random fault, where there is something to hit."""
        own = self.own_faults()
        kind = self.rng.choices(list(self.faults), [1 if kind in own else OFTEN for kind in self.faults])[0]
        self.counts[kind] += self.faults[kind]()

    def mend(self, everything: bool = False) -> None:
        """Let suspended workers go on whose time is over, or all of them."""
        for pid, (born, until) in list(self.suspended.items()):
            if everything or time.monotonic() > until:
                del self.suspended[pid]
                if lease.process_start_time(pid) == born:
                    os.kill(pid, signal.SIGCONT)

    def finish(self) -> str | None:
        """Let the sweep end undisturbed; what is wrong where it does not."""
        self.mend(everything=True)
        for _ in range(ATTEMPTS):
            deadline = time.monotonic() + FINISH
            while self.is_active():
                if time.monotonic() > deadline:
                    return f"the command has not ended after {FINISH:.0f} s"
                time.sleep(0.1)
            if self.is_complete():
                return None
            time.sleep(0.5)
            self.start()
        code = self.command.wait() if self.command else None
        return f"not finished by {ATTEMPTS} undisturbed commands, the last ended with exit code {code}"

    def close(self) -> None:
        """End what is left of the drill."""
        self.mend(everything=True)
        if self.is_active():
            self.end_command(signal.SIGKILL, group=True)
        for _, pid in self.workers():
            _send(pid, signal.SIGKILL)

    def workers(self) -> list[tuple[RunDir, int]]:
        """Every run that a living process trains, and its pid."""
        found = []
        for path in sorted((self.sweep.path / "runs").glob("*/claims")):
            newest = lease.newest(path)
            owner = (read_json(newest) if newest else None) or {"released": True}
            if not owner.get("released") and lease.process_start_time(owner["pid"]) == owner["born"]:
                found.append((RunDir(path.parent), owner["pid"]))
        return found

    def victim(self) -> tuple[RunDir, int] | None:
        """A worker that is not suspended, with its run."""
        found = [(run, pid) for run, pid in self.workers() if pid not in self.suspended]
        return self.rng.choice(found) if found else None

    def hit(self, number: signal.Signals) -> bool:
        """Send a signal to a worker."""
        chosen = self.victim()
        return chosen is not None and _send(chosen[1], number)

    def kill_other(self) -> bool:
        """Kill a process that trains along with a worker, or is between two runs."""
        owners = {pid for _, pid in self.workers()}
        command = [sys.executable, "-m", "mupsweep", "worker", str(self.sweep.path)]
        others = [pid for pid, words in commands() if words[: len(command)] == command and pid not in owners]
        return bool(others) and _send(self.rng.choice(others), signal.SIGKILL)

    def suspend(self) -> bool:
        """Stop a worker for a while."""
        chosen = self.victim()
        if chosen is None:
            return False
        self.suspended[chosen[1]] = (
            lease.process_start_time(chosen[1]),
            time.monotonic() + self.rng.uniform(0.1, SUSPENDED),
        )
        return _send(chosen[1], signal.SIGSTOP)

    def damage_checkpoint(self) -> bool:
        """Cut or change the newest checkpoint of a run whose worker is suspended, then kill the worker."""
        chosen = self.victim()
        if chosen is None or not chosen[0].checkpoints[0].exists():
            return False
        run, pid = chosen
        if not _send(pid, signal.SIGSTOP):
            return False
        time.sleep(0.05)  # until it has stopped
        hit = False
        with contextlib.suppress(FileNotFoundError):  # it finished the run in the meantime, or is between two writes
            content = bytearray(run.checkpoints[0].read_bytes())
            if self.rng.random() < 0.5:
                del content[self.rng.randrange(len(content)) :]
            else:
                content[self.rng.randrange(len(content))] ^= 0xFF
            run.checkpoints[0].write_bytes(content)
            hit = True
        _send(pid, signal.SIGKILL)
        return hit

    def damage_status(self) -> bool:
        """Leave half of a run's status.json; the run may be open, in progress or finished."""
        found = sorted((self.sweep.path / "runs").glob(f"*/{RunDir(Path()).status_path.name}"))
        if not found:
            return False
        path = self.rng.choice(found)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        return True

    def end_command(self, number: signal.Signals, group: bool = False) -> bool:
        """Send a signal to the command, or to it and its workers; it is started again when it has ended."""
        if self.command is None or self.command.poll() is not None:
            return False
        if group:
            os.killpg(self.command.pid, number)
        else:
            self.command.send_signal(number)
        if number == signal.SIGKILL:
            self.command.wait()
        return True


def commands() -> Iterator[tuple[int, list[str]]]:
    """Every process of this machine, with the words of its command."""
    for path in sorted(Path("/proc").glob("[0-9]*/cmdline")):
        with contextlib.suppress(OSError):
            yield int(path.parent.name), os.fsdecode(path.read_bytes()).split("\0")


def _send(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def differences(twin: SweepDir, sweep: SweepDir) -> list[str]:
    """What tells a sweep from its undisturbed twin."""
    found = [] if sweep.read_plan() == twin.read_plan() else ["the plan differs"]
    for row in twin.read_plan():
        run, other = sweep.run(row["run_id"]), twin.run(row["run_id"])
        if run.summary() is None or run.is_open():
            found.append(f"{run.run_id} is lost: {run.status()}")
            continue
        mine, theirs = _timeless(run.summary() or {}), _timeless(other.summary() or {})
        keys = [key for key in mine | theirs if mine.get(key) != theirs.get(key)]
        found += [f"{run.run_id}: {key}={mine.get(key)}, undisturbed {theirs.get(key)}" for key in keys]
        if run.metrics_path.read_bytes() != other.metrics_path.read_bytes():
            found.append(f"{run.run_id}: other metrics, {len(run.metrics())} rows, undisturbed {len(other.metrics())}")
        found += [f"{run.run_id} was trained twice at once: claim {pair}" for pair in overlaps(run)]
    for name in ("transfer.json", "curves.csv", "runs.csv"):
        if _table(sweep.results / name) != _table(twin.results / name):
            found.append(f"results/{name} differs")
    return found


def overlaps(run: RunDir) -> list[str]:
    """Claims that were taken before the one before was released; of an owner that died its release is not known."""
    paths = sorted(run.claims.glob("[0-9]*.json"))
    pairs = []
    for before, after in pairwise(paths):
        released = (read_json(before) or {}).get("released")
        if released and before.stat().st_mtime > (read_json(after) or {"taken": 0.0})["taken"] + TICK:
            pairs.append(f"{before.stem} and {after.stem}")
    return pairs


def _timeless(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key not in OF_THE_CLOCK}


def _table(path: Path) -> Any:
    """A file of results without the clock; None where it is not there."""
    if not path.is_file():
        return None
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with path.open(newline="") as file:
        return [_timeless(row) for row in csv.DictReader(file)]


def torment(drill: Drill, twin: SweepDir, seconds: float) -> list[str]:
    """Sweeps with faults until the time is over; what differs from the twin."""
    deadline = time.monotonic() + seconds
    found: list[str] = []
    try:
        while time.monotonic() < deadline:
            sweep = drill.begin(f"{drill.name}-{drill.counts['sweeps']}")
            while time.monotonic() < deadline and not drill.is_complete():
                drill.mend()
                if not drill.is_active():
                    drill.start()
                    drill.counts["command started again"] += 1
                time.sleep(drill.rng.expovariate(1 / BETWEEN_FAULTS))
                drill.strike()
            wrong = drill.finish()
            found += [f"{sweep.path}: {line}" for line in ([wrong] if wrong else differences(twin, sweep))]
            drill.counts["sweeps"] += 1
            drill.counts["runs"] += len(sweep.read_plan())
            drill.counts["claims"] += len(list(sweep.path.glob("runs/*/claims/[0-9]*.json")))
            drill.counts["tracebacks"] += sum(
                len(re.findall("^Traceback", path.read_text(errors="replace"), re.MULTILINE))
                for path in (drill.log_path, *sweep.logs.glob("*.*"), *sweep.path.glob("runs/*/train.log"))
                if path.is_file()
            )
    finally:
        drill.close()
    print(f"launcher={drill.name}: {', '.join(f'{count} {kind}' for kind, count in drill.counts.items())}", flush=True)
    return found


def undisturbed(folder: Path, words: list[str]) -> SweepDir:
    """The twin."""
    drill = Drill(folder, words, random.Random(0))
    sweep = drill.begin("undisturbed")
    try:
        if wrong := drill.finish():
            sys.exit(f"the undisturbed sweep: {wrong}; see {drill.log_path}")
    finally:
        drill.close()
    return sweep


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of faults, for all launchers together")
    parser.add_argument("--seed", type=int, default=0, help="of the faults; their timing is the machine's")
    parser.add_argument("--launcher", choices=("local", "slurm", "all"), default="all")
    parser.add_argument("--steps", type=int, default=60, help="of a run")
    parser.add_argument("--seeds", type=int, default=2, help="12 runs each")
    parser.add_argument("--folder", type=Path, help="where the sweeps stay; a new temporary one if not given")
    options = parser.parse_args()
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    words = [*SWEEP, f"training.steps={options.steps}", f"sweep.seeds={list(range(options.seeds))}".replace(" ", "")]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
    print(f"seed {options.seed}, sweeps in {folder}", flush=True)
    with contextlib.ExitStack() as stack:
        drills = []
        if options.launcher != "slurm":
            drills.append(Drill(folder, [*words, *ON_CPU], random.Random(options.seed)))
        if options.launcher != "local":
            from chaos_slurm import drill_on_slurm

            drills += drill_on_slurm(stack, folder, words, random.Random(options.seed))
        twin = undisturbed(folder, [*words, *ON_CPU])
        found = [line for drill in drills for line in torment(drill, twin, 60 * options.minutes / len(drills))]
    for line in found:
        print(line, file=sys.stderr)
    total = sum((drill.counts for drill in drills), Counter[str]())
    what = f"{total['runs']} runs of {total['sweeps']} sweeps"
    print(f"DIFFERENT: {len(found)} differences in {what}" if found else f"IDENTICAL: {what} as if undisturbed")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
