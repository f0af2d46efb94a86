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


def rounded(log2_lr: float) -> float:
    """What becomes of an LR that somebody writes with two digits."""
    return math.log2(float(f"{2**log2_lr:.1e}"))


@pytest.mark.parametrize("best", [-17.0, -12.0, -3.0])
@pytest.mark.parametrize("trained", [(), (-3.0,), (-16.0,)], ids=["nothing", "above the range", "below it"])
@pytest.mark.parametrize("of_user", [float, rounded])
def test_it_ends_within_the_range_wherever_the_best_lr_is(
    best: float, trained: tuple[float, ...], of_user: Callable[[float], float]
) -> None:
    """LRs beyond the range that were trained before, and LRs that are not quite those asked for, included."""
    search = mupsweep.Search([mupsweep.Size(w) for w in WIDTHS], (-14, -5), to=(4096, 1))
    for log2_lr in trained:
        search.add(256, 1, log2_lr, 3 + 0.02 * (log2_lr - best) ** 2)
    count = 0
    while asked := mupsweep.ask(search):
        for run in asked:
            assert -14.1 < run.log2_lr < -4.9
            log2_lr = of_user(run.log2_lr)
            search.add(run.width, 1, log2_lr, 3 + 0.02 * (log2_lr - best) ** 2, run.seed)
        count += len(asked)
        assert count < 30
    for optimum in search.optima():
        if best == -12:
            assert optimum.log2_lr == pytest.approx(best, abs=0.25)
            assert optimum.reason is None
        else:
            assert optimum.log2_lr is None
            assert ("below 2^-14" if best < -14 else "above 2^-5") in str(optimum.reason)


def test_lrs_that_all_but_agree_are_not_proposed() -> None:
    search = mupsweep.Search([mupsweep.Size(256)], (-9.01, -9))
    [run] = mupsweep.ask(search, 4)
    mupsweep.tell(search, run, 3.0)
    assert mupsweep.ask(search) == []


def test_an_end_without_an_optimum_is_called_none(cli: Cli, files: tuple[Path, Path]) -> None:
    rows = [f"o,p,{width},4,-14,0,nan\n" for width in WIDTHS]
    files[0].write_text(files[0].read_text() + "".join(rows))
    said = answer(cli, files)
    assert (said["done"], said["runs"]) == (True, [])
    assert {optimum["log2_lr_optimum"] for optimum in said["optima"]} == {None}
    assert {optimum["reason"] for optimum in said["optima"]} == {"every LR diverges, down to 2^-14"}
    _, out, _ = cli("plan", "--from", str(files[0]), "--sizes", str(files[1]), RANGE)
    assert "every LR diverges, down to 2^-14" in out
    assert "give a wider range" in out
    assert "done" not in out


def test_runs_of_several_lengths_are_not_mixed(cli: Cli, files: tuple[Path, Path]) -> None:
    files[0].write_text("width,depth,lr,tokens,val_loss\n256,4,1e-3,1e6,3.5\n256,4,1e-3,1e7,3.0\n")
    code, _, err = cli("plan", "--from", str(files[0]), "--sizes", str(files[1]), RANGE)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "1M to 10M: one at a time" in err
    words = ("--from", str(files[0]), "--sizes", str(files[1]), RANGE, "--filter", "tokens=1e7")
    assert cli("plan", *words)[0] == 0


def test_a_loss_that_blew_up_is_of_a_run_that_diverged() -> None:
    finite, infinite = (mupsweep.Search([mupsweep.Size(256)], (-14, -5)) for _ in range(2))
    for log2_lr, loss in ((-8.5, 3.02), (-9.5, 3.0), (-10.5, 3.03), (-7.0, 1e300)):
        finite.add(256, 1, log2_lr, loss)
        infinite.add(256, 1, log2_lr, loss if loss < 1e9 else math.inf)
    assert finite.optima() == infinite.optima()
    assert finite.next() == infinite.next()


of_anything: Callable[..., Any] = mupsweep.Search  # a type checker sees the mistakes below


@pytest.mark.parametrize(
    ("attempt", "parts"),
    [
        (lambda search: search.add(256, 1, -9, None), ["loss=None", "nan for a run that diverged"]),
        (lambda search: search.add(256, 1, -9, "3.0"), ["loss='3.0'"]),
        (lambda search: search.add(256, 1, math.nan, 3.0), ["log2_lr=nan", "octaves"]),
        (lambda search: search.add(256, 1, -9, 3.0, None), ["seed=None", "whole number"]),
        (lambda search: search.add(300, 1, -9, 3.0), ["width 300, depth 1", "256x1, 512x1", "add its size"]),
        (lambda search: search.next(0), ["count=0", "1 or more"]),
        (lambda _: mupsweep.Size(0), ["width=0", "whole number above 0"]),
        (lambda _: mupsweep.Size(256, 1, math.inf), ["cost=inf", "number above 0"]),
        (lambda _: of_anything([256, 512], (-14, -5)), ["size=256", "Size(width, depth, cost)"]),
        (lambda _: of_anything([mupsweep.Size(256, 1, 2.0), mupsweep.Size(512)], (-14, -5)), ["512", "no cost"]),
        (lambda _: of_anything([mupsweep.Size(256)], "-14:-5"), ["log2_lrs='-14:-5'", "(-14, -5)"]),
        (lambda _: of_anything([mupsweep.Size(256)], (-14, -5), to=8192), ["to=8192", "(8192, 32)"]),
        (lambda _: of_anything([mupsweep.Size(256)], (-14, -5), to=(0, 1)), ["width=0"]),
        (lambda _: of_anything([mupsweep.Size(256)], (-14, -5), regret=math.nan), ["regret=nan", "0 or more"]),
    ],
)
def test_python_refuses_what_cannot_be_meant(attempt: Callable[[Any], Any], parts: list[str]) -> None:
    search = mupsweep.Search([mupsweep.Size(256), mupsweep.Size(512)], (-14, -5))
    with pytest.raises(ConfigError) as caught:
        attempt(search)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--log2-lrs=-5:-14"], ["-5:-14", "LOW:HIGH"]),
        (["--log2-lrs=-14"], ["--log2-lrs=-14", "LOW:HIGH"]),
        (["--log2-lrs=1e-4:0.1"], ["0.0001:0.1", "look like LRs", "-13.3:-3.3"]),
        (["--log2-lrs=-40:-20"], ["-40:-20", "within -29.9:6.6"]),
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
