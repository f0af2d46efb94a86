"""`mupsweep plan --from` and `mupsweep.ask`: which run to train next, for people who start their runs themselves."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mupsweep
from mupsweep.errors import ConfigError

Cli = Callable[..., tuple[int, str, str]]
WIDTHS = (256, 512, 1024)
RANGE = "--log2-lrs=-14:-5"


def loss(width: int, log2_lr: float) -> float:
    """A lopsided valley whose optimum moves from 2^-9.3 by -0.4 octaves per doubling; runs diverge far above it."""
    u = log2_lr + 9.3 + 0.4 * math.log2(width / 256)
    return math.nan if u > 3 else 3.0 - 0.1 * math.log2(width) + (0.03 if u < 0 else 0.05) * u * u


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A table with a heading alone, and the sizes."""
    runs, sizes = tmp_path / "runs.csv", tmp_path / "sizes.csv"
    runs.write_text("optimizer,parametrization,width,depth,log2_lr,seed,val_loss\n")
    sizes.write_text("width,depth,cost\n256,4,1\n512,4,8\n1024,4,64\n")
    return runs, sizes


def answer(cli: Cli, files: tuple[Path, Path], *words: str) -> dict:
    code, out, err = cli("plan", "--from", str(files[0]), "--sizes", str(files[1]), RANGE, *words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_it_ends_with_the_optimum_of_every_size_after_few_runs(cli: Cli, files: tuple[Path, Path]) -> None:
    trained = []
    while not (said := answer(cli, files, "--next", "2"))["done"]:
        assert 1 <= len(said["runs"]) <= 2
        with files[0].open("a", newline="") as file:
            for run in said["runs"]:
                trained.append(run["width"])
                assert run["cost"] == {256: 1, 512: 8, 1024: 64}[run["width"]]
                row = ("adamw", "mup", run["width"], 4, run["log2_lr"], 0, loss(run["width"], run["log2_lr"]))
                csv.writer(file).writerow(row)
    assert trained == sorted(trained)
    assert max(map(trained.count, WIDTHS)) <= 5
    assert said["runs"] == []
    for k, (optimum, width) in enumerate(zip(said["optima"], WIDTHS, strict=True)):
        assert (optimum["width"], optimum["depth"]) == (width, 4)
        assert optimum["log2_lr_optimum"] == pytest.approx(-9.3 - 0.4 * k, abs=0.2)
        assert optimum["log2_lr_low"] < -9.3 - 0.4 * k < optimum["log2_lr_high"]


def test_the_first_run_is_in_the_middle_of_the_range_at_the_cheapest_size(cli: Cli, files: tuple[Path, Path]) -> None:
    assert answer(cli, files) == {
        "done": False,
        "runs": [{"width": 256, "depth": 4, "log2_lr": -9.5, "seed": 0, "cost": 1.0, "why": "the middle of the range"}],
    }


def test_python_asks_and_tells_what_the_command_does(cli: Cli, files: tuple[Path, Path]) -> None:
    search = mupsweep.Search([mupsweep.Size(w, 4, c) for w, c in zip(WIDTHS, (1, 8, 64), strict=True)], (-14, -5))
    with files[0].open("a", newline="") as file:
        for run in mupsweep.ask(search, 3):
            mupsweep.tell(search, run, loss(run.width, run.log2_lr))
            csv.writer(file).writerow(("o", "p", run.width, run.depth, run.log2_lr, 0, loss(run.width, run.log2_lr)))
    assert [vars(run) for run in mupsweep.ask(search)] == answer(cli, files)["runs"]


def test_a_target_asks_for_more_than_the_sizes_optima_do() -> None:
    """Until its LR is known, or is expected to lose little."""

    def runs_of(**keys: Any) -> int:
        search = mupsweep.Search([mupsweep.Size(w) for w in WIDTHS], (-14, -5), **keys)
        count = 0
        while asked := mupsweep.ask(search, 4):
            for run in asked:
                mupsweep.tell(search, run, loss(run.width, run.log2_lr))
            count += len(asked)
            assert count < 80
        return count

    sizes_alone = runs_of()
    assert runs_of(to=(1024, 1), regret=0.5) == sizes_alone
    assert runs_of(to=(1024, 1), regret=0.0, half_width=0.05) > sizes_alone


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--log2-lrs=-5:-14"], ["-5:-14", "LOW:HIGH"]),
        (["--log2-lrs=-14"], ["--log2-lrs=-14", "LOW:HIGH"]),
        ([RANGE, "--next", "0"], ["--next 0", "1 or more"]),
        ([RANGE, "--to", "tokens=1e9"], ["tokens", "width=N"]),
        ([RANGE, "optimizer=muon"], ["optimizer=muon", "of a sweep"]),
        ([], ["--log2-lrs=-14:-5"]),
    ],
)
def test_what_cannot_be_meant_is_refused(
    words: list[str], parts: list[str], cli: Cli, files: tuple[Path, Path]
) -> None:
    code, out, err = cli("plan", "--from", str(files[0]), "--sizes", str(files[1]), *words)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert all(part in err for part in parts), err


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("width,depth\n256,0\n", ["row 2", "depth is 0"]),
        ("width,depth\n2.5,4\n", ["row 2", "width is 2.5"]),
        ("width,depth,cost\n256,4,cheap\n", ["row 2", "cost is cheap"]),
        ("depth\n4\n", ["no column width"]),
        ("width,depth\n", ["no sizes"]),
        ("", ["--sizes", "is empty"]),
        ("width,depth\n1e200,4\n", ["width is 1e200", "at most 1e+30"]),
        ("width,depth\n256,4\n256,4\n", ["stands twice"]),
    ],
)
def test_a_table_of_sizes_that_cannot_be_meant_is_refused(
    text: str, parts: list[str], cli: Cli, files: tuple[Path, Path]
) -> None:
    files[1].write_text(text)
    code, _, err = cli("plan", "--from", str(files[0]), "--sizes", str(files[1]), RANGE)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert all(part in err for part in parts), err


def test_runs_of_a_size_that_is_not_named_and_options_without_a_table_are_refused(
    cli: Cli, files: tuple[Path, Path]
) -> None:
    files[0].write_text(files[0].read_text() + "o,p,128,4,-9,0,3.0\n")
    code, _, err = cli("plan", "--from", str(files[0]), "--sizes", str(files[1]), RANGE)
    assert (code, "width 128, depth 4" in err) == (2, True)
    code, _, err = cli("plan", "--next", "2")
    assert (code, "--next is of a table" in err) == (2, True)
    with pytest.raises(ConfigError, match="needs a size"):
        mupsweep.Search([], (-14, -5))
