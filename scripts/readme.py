"""Write the generated blocks of the documentation anew, or with --check fail where one is out of date.

A block is a comment that holds a command, followed by a fenced text block with what the command prints:

    <!-- $ mupsweep --help -->

Commands run in a shell, in an empty folder. Those that name sweeps/demo find it finished, with the losses that
`make demo` measured (configs/experiment/demo.csv). Numbers that are fitted to them may differ in their last digits from
one machine to the next, so --check allows such blocks TOLERANCE; how long something takes is compared nowhere.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import math
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import textwrap
from collections.abc import Iterator
from pathlib import Path

from mupsweep.analysis.labels import DONE
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.config import load
from mupsweep.sweep.run_spec import RunSpec

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "mupsweep").rglob("*.md")), *sorted((ROOT / "configs").rglob("*.md"))]
BLOCK = re.compile(r"<!-- \$ (?P<command>.+?) -->\n```text\n(?P<output>.*?)```", re.DOTALL)
DEMO = ["experiment=demo", "parametrization=sp,mup"]
LOSSES = ROOT / "configs" / "experiment" / "demo.csv"
FIGURE = LOSSES.with_suffix(".svg")  # made from the losses too
COLUMNS = 100  # of the terminal that blocks show, and the longest line of a block
TOLERANCE = 0.03  # absolute, or relative where that is more
NUMBER = re.compile(r"[+-]?\d+\.\d+(?:e[+-]\d+)?")  # with a fraction: counts and sizes are exact
TIMED = re.compile(r"roughly [^;]*FLOP/s(?:\s+each)?", re.DOTALL)  # depends on the machine


def generated(text: str, folder: Path) -> str:
    """A document with every block replaced by what its command prints now."""
    return BLOCK.sub(
        lambda match: f"<!-- $ {match['command']} -->\n```text\n{output(match['command'], folder)}```", text
    )


def outdated(text: str, folder: Path) -> Iterator[str]:
    """The commands of a document whose blocks do not say what they print now."""
    for match in BLOCK.finditer(text):
        if not same(match["output"], output(match["command"], folder), fitted="sweeps/demo" in match["command"]):
            yield match["command"]


def output(command: str, folder: Path) -> str:
    """What a command prints in a terminal of COLUMNS, of which rich uses 80; `folder` is that of `prepared`."""
    where = folder / ("finished" if "sweeps/demo" in command else "empty")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "COLUMNS": str(COLUMNS), "TERM": "dumb", "LC_ALL": "C.UTF-8"}
    env.pop("LINES", None)  # with it rich takes COLUMNS, and readline leaves it to every program that pytest starts
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, shell=True, cwd=where, stdout=theirs, stderr=errors, env=env)
        os.close(theirs)
        printed = b""
        with contextlib.suppress(OSError):  # which is how a terminal ends
            while chunk := os.read(ours, 1 << 16):
                printed += chunk
        os.close(ours)
        if process.wait():
            errors.seek(0)
            sys.exit(f"$ {command}\n{errors.read()}")
    lines = printed.decode().replace("\r\n", "\n").strip("\n").splitlines()
    return "\n".join(wrapped(line.rstrip()) for line in lines) + "\n"


def wrapped(line: str) -> str:
    """A line as a terminal of COLUMNS shows it, also where a pipe such as grep has taken it."""
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.fill(line, COLUMNS, subsequent_indent=f"{indent}  ", break_long_words=False, break_on_hyphens=False)


def same(old: str, new: str, fitted: bool) -> bool:
    """Whether two outputs say the same, up to fitted numbers and times."""
    # where a line breaks depends on how long its numbers are
    old, new = (" ".join(TIMED.sub("", text).split()) for text in (old, new))
    if not fitted:
        return old == new
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (old, new)]
    words = [" ".join(NUMBER.sub("#", text).split()) for text in (old, new)]  # columns are as wide as their numbers
    return words[0] == words[1] and all(
        math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE) for a, b in zip(*numbers, strict=True)
    )


def place_of(run: RunSpec) -> tuple[str, int, float, int]:
    """What a line of the recorded losses is about."""
    return run.resolved.variant.parametrization["name"], run.size.width, run.log2_lr, run.seed


def demo(*overrides: str) -> SweepDir:
    """The sweep of `make demo` in ./sweeps, finished, with the recorded losses instead of training."""
    with LOSSES.open(newline="") as file:
        losses = {
            (row["parametrization"], int(row["width"]), float(row["log2_lr"]), int(row["seed"])): row
            for row in csv.DictReader(file)
        }
    lrs, seeds = ({key[place] for key in losses} for place in (2, 3))
    grid = load([*DEMO, *overrides, "sweep.search=grid", f"sweep.log2_lrs={[*lrs]}", f"sweep.seeds={[*seeds]}"])
    searched = [run for run in plan.plan(grid) if place_of(run) in losses]
    sweep, runs = plan.save(load([*DEMO, *overrides]), f"mupsweep run {' '.join(DEMO)}", new=searched)
    for run in runs:
        row = run.row()
        lost = losses[place_of(run)]
        folder = sweep.run(run.run_id)
        folder.path.mkdir(parents=True, exist_ok=True)
        kept = ("run_id", "model", "parametrization", "optimizer", "width", "depth", "width_ratio", "depth_ratio")
        folder.write_summary(
            {
                **{key: row[key] for key in (*kept, "log2_lr", "seed", "tokens")},
                "status": DONE,
                "steps": run.resolved.steps,
                "train_loss": float(lost["train_loss"]),
                "val_loss": float(lost["val_loss"]),
                "val_bits_per_byte": float(lost["val_loss"]) / math.log(2),
                **dict.fromkeys(("diverged_at_step", "seconds", "tokens_per_second")),
                "device": "cpu",
                "precision": "fp32",
            }
        )
        folder.write_status(DONE, durable=False)
    return sweep


@contextlib.contextmanager
def prepared() -> Iterator[Path]:
    """A folder with the folders that commands run in."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for inner in ("empty", "finished"):
            (folder / inner).mkdir()
        with contextlib.chdir(folder / "finished"):
            demo()
        yield folder


def main() -> None:
    with prepared() as folder:
        for document in DOCUMENTS:
            text = document.read_text()
            if "--check" not in sys.argv:
                document.write_text(generated(text, folder))
            elif stale := list(outdated(text, folder)):
                sys.exit(
                    f"{document.relative_to(ROOT)}, {stale[0]}: out of date; run `make docs` and commit what it changes"
                )
        if "--check" not in sys.argv:
            output("mupsweep report sweeps/demo", folder)
            shutil.copy(folder / "finished/sweeps/demo/results/figures/curves.svg", FIGURE)


if __name__ == "__main__":
    main()
