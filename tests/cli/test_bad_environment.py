"""A sick environment: exit code 2 and one line that says what is wrong, where, and what to do; or it does not matter.

Each row is a process of its own, started by a shell, so that limits, closed streams and folders that vanish are real.
`PYTHON -m mupsweep` is called `mupsweep`; the folder holds `afile`, and a planned sweep of six runs. Refusals of
nothing but files, variables and a command are forked from a process that has imported what a command needs seconds for.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import Forked
from test_bad_input import Outcome

from mupsweep.sweep import plan
from mupsweep.sweep.config import load

SMOKE = "experiment=smoke"
TORCHRUN = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
RANK_0 = " ".join(f"{name}={value}" for name, value in TORCHRUN.items())
# Files that are made or removed; then variables and a command, but none of the variables that Python reads as it starts
# or that the tests set themselves.
PLAIN = re.compile(r"((mkdir|touch|rm) [^;]*; )*(?!LC_ALL|PYTHON|WANDB)(\w+=\S* )*mupsweep [^|<>&;$]*")
NO_UTF8 = "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0"
ASCII = "PYTHONIOENCODING=ascii"


@pytest.fixture
def shell(tmp_path: Path) -> Path:
    """A folder with `afile`, an empty folder `nothing`, and the sweep sweeps/smoke, nothing trained."""
    (tmp_path / "afile").touch()
    (tmp_path / "nothing").mkdir()
    plan.save(load([SMOKE]), "mupsweep run experiment=smoke out=µ")
    return tmp_path


def call(line: str, folder: Path) -> Outcome:
    """What a shell makes of a line, in an environment that says nothing of encodings and ranks."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON", "WANDB_"))}
    message = f'mupsweep() {{ "{sys.executable}" -m mupsweep "$@"; }}\n{line}'
    command = ["bash", "-c", message]
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, timeout=60)
    return Outcome(done.returncode, *(stream.decode(errors="replace") for stream in (done.stdout, done.stderr)))


def fork(line: str, folder: Path) -> Outcome:
    """What a plain line makes in a process that has imported already what a command needs seconds for."""
    *files, line = line.split("; ")
    subprocess.run(["bash", "-ec", "; ".join(files)], cwd=folder, check=True)
    words = shlex.split(line.replace("$PWD", str(folder)))
    command = words.index("mupsweep")
    process = Forked(*words[command + 1 :], environment=dict(word.split("=", 1) for word in words[:command]))
    out, err = process.communicate(60)
    return Outcome(process.wait(), out, err)


# shell line -> what the one line on stderr must hold: the value, and what to do
REFUSED: list[tuple[str, tuple[str, ...]]] = [
    # folders
    ("mkdir x; cd x; rmdir ../x; mupsweep plan experiment=smoke", ("working directory is gone", "change to one")),
    ("mkdir x; cd x; rmdir ../x; mupsweep status sweeps/smoke", ("working directory is gone", "change to one")),
    ("XDG_CACHE_HOME=$PWD/afile mupsweep data prepare", ("afile/mupsweep", "Not a directory", "data.cache")),
    ("unset XDG_CACHE_HOME; HOME=/proc/none mupsweep data prepare", ("/proc/none/.cache/mupsweep", "data.cache")),
    ("mupsweep run experiment=smoke out=afile", ("afile/smoke", "Not a directory", "out=DIR")),
    ("mupsweep run experiment=smoke out=/proc/none", ("/proc/none/smoke", "No such file", "out=DIR")),
    ("mkdir other; touch other/smoke; mupsweep run experiment=smoke out=other", ("other/smoke", "out=DIR")),
    ("mkdir -p sweeps/smoke/runs; rm -r sweeps/smoke/plan.jsonl; mupsweep status sweeps/smoke", ("is not a sweep",)),
    ("touch sweeps/smoke/runs; mupsweep worker sweeps/smoke --device cpu", ("sweeps/smoke/runs", "out=DIR")),
    ("mupsweep status sweeps/smoke >/dev/full", ("No space left on device", "free space")),
    ("mupsweep plan experiment=smoke --json >/dev/full", ("No space left on device", "free space")),
    # encodings
    (f"{NO_UTF8} mupsweep plan experiment=smoke out=µ", ("'out=\\udcc2\\udcb5'", "LC_ALL=C.UTF-8")),
    (f"{NO_UTF8} mupsweep status µ", ("\\udcc2\\udcb5 is not a sweep",)),
    (r"mupsweep plan experiment=smoke out=$'\xff'", ("'out=\\udcff'", "LC_ALL=C.UTF-8")),
    ("mupsweep run experiment=smoke data=local data.path=µ", ("data.path=µ", ".jsonl")),
    ("mupsweep plan experiment=smoke 'sweep.seeds=[µ]'", ("'sweep.seeds=[µ]'", "quote text beyond ASCII")),
    # programs and devices
    ("PATH=$PWD/nothing mupsweep run experiment=smoke launcher=slurm", ("sbatch", "launcher=local")),
    ("CUDA_VISIBLE_DEVICES= mupsweep worker sweeps/smoke --device cuda:0", ("device cuda:0 is not there", "auto, cpu")),
    ("CUDA_VISIBLE_DEVICES=x mupsweep worker sweeps/smoke --device cuda", ("device cuda is not there", "auto, cpu")),
    # W&B
    (f"WANDB_BASE_URL=nonsense WANDB_API_KEY={40 * 'a'} mupsweep sync sweeps/smoke", ("base_url", "nonsense")),
]


@pytest.mark.parametrize(("line", "expected"), REFUSED, ids=[line for line, _ in REFUSED])
def test_an_environment_that_stands_in_the_way_is_refused_in_one_line(
    line: str, expected: tuple[str, ...], shell: Path
) -> None:
    outcome = (fork if PLAIN.fullmatch(line) else call)(line, shell)
    assert outcome.code == 2, outcome.err
    lines = [line for line in outcome.err.splitlines() if not line.startswith("prepared ")]
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("mupsweep: ")
    for part in expected:
        assert part in lines[0]


# what torchrun or a job script sets otherwise than in TORCHRUN -> what the line must hold
MISPLACED: list[tuple[dict[str, str], tuple[str, ...]]] = [
    ({"LOCAL_WORLD_SIZE": "x"}, ("LOCAL_WORLD_SIZE=x", "from 1 to 2", "torchrun")),
    ({"WORLD_SIZE": "many"}, ("WORLD_SIZE=many", "torchrun")),
    ({"WORLD_SIZE": "-2"}, ("WORLD_SIZE=-2", "unset RANK")),
    ({"RANK": "5"}, ("RANK=5", "from 0 to 1", "unset RANK")),
    ({"LOCAL_RANK": "2"}, ("LOCAL_RANK=2", "from 0 to 1")),
    ({"MASTER_PORT": "http"}, ("MASTER_PORT=http", "from 1 to 65535")),
    ({"MASTER_PORT": "65536"}, ("MASTER_PORT=65536", "from 1 to 65535")),
    ({"MASTER_ADDR": "", "LOCAL_RANK": ""}, ("RANK=0", "LOCAL_RANK, MASTER_ADDR")),
]


@pytest.mark.usefixtures("shell")
@pytest.mark.parametrize(("environment", "expected"), MISPLACED, ids=str)
def test_a_wrong_variable_of_torchrun_is_refused_in_one_line(
    environment: dict[str, str], expected: tuple[str, ...], cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (TORCHRUN | environment).items():
        monkeypatch.setenv(name, value)
    code, _, err = cli("worker", "sweeps/smoke", "--device", "cpu")
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("mupsweep: ")
    for part in expected:
        assert part in line


# Shell line -> a part of what stands on stdout nevertheless. A line holds several things that need not matter to its
# command: if one did, the line would fail.
HARMLESS: list[tuple[str, str]] = [
    (
        f"TMPDIR=/proc/none XDG_CACHE_HOME=$PWD/afile PATH=$PWD/nothing OMP_NUM_THREADS=0 {RANK_0} RANK=x "
        "mupsweep plan experiment=smoke",
        "folder: sweeps/smoke",
    ),
    (
        "TMPDIR=$PWD/afile PATH=$PWD/nothing COLUMNS=0 WANDB_BASE_URL=nonsense WANDB_DIR=$PWD/afile "
        "mupsweep status sweeps/smoke",
        "pending 6",
    ),
    ("unset HOME; ulimit -n 10; mupsweep plan experiment=smoke", "folder: sweeps/smoke"),
    ("HOME=/proc/none mupsweep plan experiment=smoke 'out=~/x'", "folder: /proc/none/x/smoke"),
    ("unset TERM; HOME=/proc/none mupsweep rules experiment=smoke", "no contradiction found"),
    ("LC_ALL=C mupsweep plan experiment=smoke out=µ 'sweep.name=a(µ'", "folder: µ/a(µ"),
    (f"{ASCII} mupsweep plan experiment=smoke out=µ", "folder: ?/smoke"),
    (f"{NO_UTF8} mupsweep report sweeps/smoke", "no finished runs yet"),
    (f"{ASCII} COLUMNS=wide LINES=-1 mupsweep status sweeps/smoke", "pending 6"),
    ("COLUMNS=wide mupsweep --help", "transfer"),
    ("TERM=dumb FORCE_COLOR=1 NO_COLOR=1 mupsweep status sweeps/smoke", "pending 6"),
    ("mupsweep status sweeps/smoke --runs | head -1", "variant"),
]


@pytest.mark.parametrize(("line", "expected"), HARMLESS, ids=[line for line, _ in HARMLESS])
def test_an_environment_that_needs_not_matter_does_not(line: str, expected: str, shell: Path) -> None:
    outcome = call(line, shell)
    assert (outcome.code, outcome.err) == (0, "")
    assert expected in outcome.out


@pytest.mark.parametrize("line", ["mupsweep status sweeps/smoke >&-", "mupsweep plan experiment=smoke --json >&-"])
def test_a_closed_stdout_is_nobody_who_reads(line: str, shell: Path) -> None:
    assert call(line, shell) == Outcome(0, "", "")


@pytest.mark.parametrize(
    "command", ["status sweeps/smoke --runs", "rules experiment=smoke", "status sweeps/smoke --json"]
)
def test_a_reader_that_left_ends_a_command_without_a_word(command: str, shell: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        overrides = [sys.executable, "-m", "mupsweep", *command.split()]
        done = subprocess.run(overrides, cwd=shell, stdout=pipe, stderr=subprocess.PIPE, timeout=60)
    assert done.stderr == b""
    assert done.returncode in (1, 141)  # what the library of the command line makes of it, and what we do


def test_a_port_that_somebody_holds_is_named(shell: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        outcome = fork(f"{RANK_0} MASTER_PORT={port} mupsweep worker sweeps/smoke --device cpu", shell)
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert line.startswith(
        f"mupsweep: the processes of this run do not meet at MASTER_ADDR=127.0.0.1 and MASTER_PORT={port}:"
    )
