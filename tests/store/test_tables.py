"""Tables of runs that were trained elsewhere: every usual form is read, and what cannot be meant is one line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import random
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mupsweep.analysis.analysis import analyse
from mupsweep.analysis.labels import DIVERGED, DONE
from mupsweep.analysis.run_result import RunResult
from mupsweep.errors import ConfigError, DataError
from mupsweep.report.results_files import save_runs
from mupsweep.store.tables import TableOptions, read_table

WIDTHS, LRS = (128, 256, 512), range(-12, -3)
PUBLIC = sorted((Path(__file__).parents[1] / "tables").glob("*.csv"))
HEADING = "parametrization,width,log2_lr,val_loss"
THREE = "sp,64,-8,3.5\nsp,64,-7,3.25\nsp,64,-6,3.75\n"  # the least that is a table
LOSSES = {-8.0: 3.5, -7.0: 3.25, -6.0: 3.75}


def rows(**more: Any) -> list[dict[str, Any]]:
    """Three sizes; above 2^-5 runs explode."""
    lines = []
    for octave, width in enumerate(WIDTHS):
        for log2_lr in LRS:
            d = log2_lr + 8 + octave / 4
            loss = "nan" if d > 3 else 3 + 0.05 * d * d - 0.1 * octave
            lines.append({"parametrization": "mup", "width": width, "log2_lr": log2_lr, "val_loss": loss, **more})
    return lines


def table(folder: Path, lines: list[dict[str, Any]], name: str = "runs.csv", delimiter: str = ",") -> str:
    """Rows as a csv, with the columns of the first."""
    path = folder / name
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(lines)
    return str(path)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., list[RunResult]]:
    """Runs of a table of which the text is given."""

    def reading(content: str | bytes, **options: Any) -> list[RunResult]:
        path = tmp_path / "table"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return read_table(str(path), TableOptions(**options)).runs

    return reading


@pytest.fixture
def notes(tmp_path: Path) -> Callable[..., tuple[str, ...]]:
    """Notes on a table of which the text is given, without the first, which says what was matched."""

    def reading(content: str, **options: Any) -> tuple[str, ...]:
        (tmp_path / "table").write_text(content)
        return read_table(str(tmp_path / "table"), TableOptions(**options)).notes[1:]

    return reading


@pytest.fixture
def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The one line that refuses a table called runs.csv of which the text is given."""
    monkeypatch.chdir(tmp_path)

    def reading(content: str | bytes, name: str = "runs.csv", **options: Any) -> str:
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(DataError) as caught:
            read_table(name, TableOptions(**options))
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return reading


def losses(runs: list[RunResult]) -> dict[float, float | None]:
    return {run.log2_lr: run.val_loss for run in runs}


# What is read


@pytest.mark.parametrize("path", PUBLIC, ids=lambda path: path.stem)
def test_the_public_tables_are_read_whole(path: Path) -> None:
    found = read_table(str(path))
    with path.open() as file:
        lines = list(csv.DictReader(file))
    assert len(found.runs) == len(lines)
    assert Counter(
        (r.model, r.optimizer, r.parametrization, r.width, r.depth, r.log2_lr) for r in found.runs
    ) == Counter(
        (r["model"], r["optimizer"], r["parametrization"], int(r["width"]), int(r["depth"]), float(r["log2_lr"]))
        for r in lines
    )
    assert sorted(r.val_loss for r in found.runs if r.val_loss is not None) == sorted(
        float(r["val_loss"]) for r in lines if r["val_loss"] != "nan"
    )
    assert sum(r.status == DIVERGED for r in found.runs) == sum(r["val_loss"] == "nan" for r in lines)
    assert [note for note in found.notes[1:] if "base is" not in note] == []


@pytest.mark.parametrize("drift", [0.0, -1.0])
def test_four_columns_suffice(tmp_path: Path, drift: float) -> None:
    lines = [
        {"parametrization": "mup", "width": 128 << i, "log2_lr": x, "val_loss": 3 + 0.05 * (x + 8 - drift * i) ** 2}
        for i in range(3)
        for x in LRS
    ]
    [group] = analyse(read_table(table(tmp_path, lines)).runs).groups
    assert group.verdict == ("drifts" if drift else "transfers")
    assert [o.curve.width_ratio for o in group.optima] == [1, 2, 4]


FORMS = {
    "semicolons and decimal commas": (
        "Parametrization;Width;Learning rate;Val loss",
        "sp;64;0,00390625;3,5",
        "sp;64;0,0078125;3,25",
        "sp;64;0,015625;3,75",
    ),
    "tabs": (
        "parametrization\twidth\tlr\tval_loss\r",
        "sp\t64\t0.00390625\t3.5\r",
        "sp\t64\t0.0078125\t3.25\r",
        "sp\t64\t0.015625\t3.75\r",
    ),
    "Excel's own first line": (
        "sep=;",
        "parametrization;width;lr;val_loss",
        "sp;64;2^-8;3.5",
        "sp;64;2**-7;3.25",
        "sp;64;2^(-6);3.75",
    ),
    "quotes": (
        '"parametrization","width","lr","eval/loss"',
        '"sp","64","0.00390625","3.5"',
        '"sp","64","0.0078125","3.25"',
        '"sp","64","0.015625","3.75"',
    ),
    "quoted decimal commas": (
        "parametrization,width,log2_lr,val_loss",
        'sp,64,-8,"3,5"',
        'sp,64,-7,"3,25"',
        'sp,64,-6,"3,75"',
    ),
    "markdown": (
        "| parametrization | d_model | lr | val loss |",
        "|:--|--:|--:|---|",
        "| sp | 64 | 2^-8 | 3.5 |",
        "| sp | 64 | 2^-7 | **3.25** |",
        "| sp | 64 | 2^-6 | 3.75 |",
    ),
    "a query's output": (
        " parametrization | width | log2_lr | loss",
        "-----------------+-------+---------+------",
        " sp | 64 | -8 | 3.5",
        " sp | 64 | -7 | 3.25",
        " sp | 64 | -6 | 3.75",
    ),
    "white space": (
        "parametrization width log2_lr  val_loss",
        "sp  64  -8 3.5",
        "sp 64  -7  3.25",
        "sp  64  −6  3.75",
    ),
    "wide white space": (
        "parametrization   hidden size   log2 lr   validation loss",
        "sp   64   -8   3.5",
        "sp   64   -7   3.25",
        "sp   64   -6   3.75",
    ),
    "a commented heading": (
        "# parametrization,width,log2_lr,val_loss",
        "1,64,-8,3.5",
        "1,64,-7,3.25",
        "1,64,-6,3.75",
    ),
    "comments and blank lines": (
        "# from our paper",
        "",
        "parametrization,width,log2_lr,val_loss",
        "sp,64,-8,3.5",
        "",
        "sp,64,-7,3.25",
        "sp,64,-6,3.75",
        " , ,,",
    ),
    "two files in one": (
        "parametrization,width,log2_lr,val_loss",
        "sp,64,-8,3.5",
        "parametrization,width,log2_lr,val_loss",
        "sp,64,-7,3.25",
        "sp,64,-6,3.75",
    ),
    "a title above": (
        "Sweep of March,,,",
        "parametrization,width,log2_lr,val_loss",
        "sp,64,-8,3.5",
        "sp,64,-7,3.25",
        "sp,64,-6,3.75",
    ),
    "JSON lines": (
        '{"config": {"param": "sp", "model": {"n_embd": 64}, "optimizer": {"lr": 0.00390625}}, "eval/loss": 3.5}',
        '{"config": {"param": "sp", "model": {"n_embd": 64}, "optimizer": {"lr": 0.0078125}}, "eval/loss": 3.25}',
        '{"config": {"param": "sp", "model": {"n_embd": 64}, "optimizer": {"lr": 0.015625}}, "eval/loss": 3.75}',
    ),
    "a JSON array": (
        '[{"param": "sp", "width": 64, "log2_lr": -8, "loss": 3.5},',
        '{"param": "sp", "width": 64, "log2_lr": -7, "loss": 3.25},',
        '{"param": "sp", "width": 64, "log2_lr": -6, "loss": 3.75}]',
    ),
    "a JSON array of Windows": (
        "[\r",
        '{"param": "sp", "width": 64, "log2_lr": -8, "loss": 3.5},\r',
        '{"param": "sp", "width": 64, "log2_lr": -7, "loss": 3.25},\r',
        '{"param": "sp", "width": 64, "log2_lr": -6, "loss": 3.75}]',
    ),
    "W&B's table": (
        '{"columns": ["param", "width", "log2_lr", "loss"],',
        '"data": [["sp", 64, -8, 3.5], ["sp", 64, -7, 3.25], ["sp", 64, -6, 3.75]]}',
    ),
    "columns of JSON": (
        '{"param": ["sp", "sp", "sp"], "width": [64, 64, 64],',
        '"log2_lr": [-8, -7, -6], "loss": [3.5, 3.25, 3.75]}',
    ),
}


@pytest.mark.parametrize("lines", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gzip"])
def test_every_usual_form_is_read(read: Callable[..., list[RunResult]], lines: tuple[str, ...], encoding: str) -> None:
    content = "\n".join(lines) + "\n"
    data = gzip.compress(content.encode()) if encoding == "gzip" else content.encode(encoding)
    runs = read(data)
    assert losses(runs) == LOSSES
    assert {(run.width, run.status, run.seed) for run in runs} == {(64, DONE, 0)}
    assert {run.parametrization for run in runs} <= {"sp", "mup"}


def test_parquet_is_read_with_its_holes(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {"width": [64] * 5, "lr": [2.0**x for x in range(-8, -3)], "loss": [3.5, 3.25, 3.75, math.nan, None]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "runs")
    found = read_table(str(tmp_path / "runs"))
    assert losses(found.runs) == {**LOSSES, -5.0: None}
    assert found.notes[1:] == (
        "no column parametrization: all runs are of one, called given",
        "left out, no loss: row 5",
    )


def test_a_spreadsheet_is_read_or_names_the_package_that_lacks(tmp_path: Path, refusal: Callable[..., str]) -> None:
    try:
        import openpyxl
    except ImportError:
        with zipfile.ZipFile(tmp_path / "parts", "w") as parts:
            parts.writestr("xl/workbook.xml", "<workbook/>")
        assert refusal((tmp_path / "parts").read_bytes(), "runs.xlsx") == (
            "--from runs.xlsx is a spreadsheet, which the package openpyxl reads: pip install openpyxl, or save the "
            "sheet as csv"
        )
        return
    book = openpyxl.Workbook()
    for line in [HEADING.split(","), *(["sp", 64, x, loss] for x, loss in LOSSES.items()), ["sp", 64, -5, "nan"]]:
        book.active.append(line)
    book.save(tmp_path / "runs.xlsx")
    assert losses(read_table(str(tmp_path / "runs.xlsx")).runs) == {**LOSSES, -5.0: None}


def test_a_paste_comes_through_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(f"{HEADING}\n{THREE}".encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert losses(read_table("-").runs) == LOSSES


NAMES = {
    "width": ["width", "d_model", "hidden_size", "n_embd", "Model.Width", "config.hidden_size", "model.d_model"],
    "depth": ["depth", "n_layer", "num_layers", "num_hidden_layers", "N layers", "model.n_layer"],
    "lr": ["lr", "LR", "learning_rate", "Learning Rate", "optimizer.lr", "base_lr", "max_lr", "trainer.optim.lr"],
    "log2_lr": ["log2_lr", "log2lr", "log2(lr)", "Log2 LR"],
    "seed": ["seed", "random_seed", "training.seed"],
    "status": ["status", "State"],
    "val_loss": [
        *("val_loss", "eval/loss", "loss/val", "validation loss", "Val Loss", "test_loss", "final_loss", "loss"),
        "eval.loss",
    ],
    "model": ["model", "arch", "Architecture", "model.name"],
    "optimizer": ["optimizer", "optimizer.name", "optim"],
    "parametrization": ["parametrization", "parameterization", "param", "parametrization.name"],
}


@pytest.mark.parametrize(("meaning", "name"), [(m, name) for m, names in NAMES.items() for name in names])
def test_usual_names_are_matched(tmp_path: Path, meaning: str, name: str) -> None:
    plain = rows(model="m", optimizer="o", depth=2, seed=3, status="finished")
    if meaning == "lr":
        plain = [{k: v for k, v in line.items() if k != "log2_lr"} | {"lr": 2.0 ** line["log2_lr"]} for line in plain]
    named = [{name if key == meaning else key: value for key, value in line.items()} for line in plain]
    found = read_table(table(tmp_path, named, "named.csv"))
    assert found.runs == read_table(table(tmp_path, plain)).runs
    assert (name if name == meaning else f"{meaning} = {name}") in found.notes[0].split(": ", 1)[1].split(", ")


def test_columns_may_be_named(read: Callable[..., list[RunResult]]) -> None:
    content = "kind,size,speed,result\nsp,64,2^-8,3.5\nsp,64,2^-7,3.25\nsp,64,2^-6,3.75\n"
    overrides = ["parametrization=kind,width=size", "lr=speed,val_loss=Result"]
    options = TableOptions.parse(overrides)
    assert losses(read(content, columns=options.columns)) == LOSSES


def test_its_own_name_and_a_better_one_win_and_the_other_is_named(notes: Callable[..., tuple[str, ...]]) -> None:
    content = "parametrization,width,lr,learning_rate,loss,eval/loss\n"
    content += "".join(f"sp,64,{2.0**x},0.001,9,{loss}\n" for x, loss in LOSSES.items())
    assert notes(content) == (
        "lr is read from lr, not learning_rate: --columns lr=NAME takes another",
        "val_loss is read from eval/loss, not loss: --columns val_loss=NAME takes another",
    )


def test_what_lacks_has_a_plain_name(read: Callable[..., list[RunResult]]) -> None:
    [run, *_] = read("width,lr,loss\n64,0.1,3\n64,0.2,2\n64,0.3,2.5\n")
    assert (run.model, run.optimizer, run.parametrization, run.depth) == ("model", "optimizer", "given", 1)


@pytest.mark.parametrize(("name", "expected"), [("True", "mup"), ("0", "sp"), ("no", "sp"), ("spectral", "spectral")])
def test_whether_mup_is_used_is_a_parametrization(
    read: Callable[..., list[RunResult]], name: str, expected: str
) -> None:
    runs = read("use_mup,width,lr,loss\n" + "".join(f"{name},64,{lr},3\n" for lr in (0.1, 0.2, 0.3)))
    assert {run.parametrization for run in runs} == {expected}


@pytest.mark.parametrize(
    ("cell", "status"),
    [
        *((cell, DIVERGED) for cell in ("nan", "NaN", "inf", "-inf", "Infinity", "diverged", "−inf", "#NUM!")),
        *((cell, None) for cell in ("", " ", "-", "N/A", "None", "null")),
        ("1.5", DONE),
    ],
)
def test_no_loss_is_a_hole_and_a_lost_one_diverged(
    read: Callable[..., list[RunResult]], cell: str, status: str | None
) -> None:
    runs = read(f"{HEADING}\n{THREE}sp,64,-5,{cell}\n")
    assert [(run.log2_lr, run.status) for run in runs if run.log2_lr == -5] == ([(-5.0, status)] if status else [])


@pytest.mark.parametrize(
    ("state", "loss", "status"),
    [
        ("finished", "3", DONE),
        ("Completed", "nan", DIVERGED),
        ("", "3", DONE),
        ("crashed", "3", None),
        ("crashed", "", None),
        ("failed", "nan", DIVERGED),
        ("killed", "inf", DIVERGED),
        ("running", "3", None),
        ("running", "nan", None),
        ("diverged", "", DIVERGED),
        ("diverged", "7.5", DIVERGED),
        ("done", "", None),
    ],
)
def test_states_decide_what_counts(
    read: Callable[..., list[RunResult]], state: str, loss: str, status: str | None
) -> None:
    body = "".join(f"sp,64,{x},{y},finished\n" for x, y in LOSSES.items())
    runs = read(f"{HEADING},state\n{body}sp,64,-5,{loss},{state}\n")
    assert [run.status for run in runs if run.log2_lr == -5] == ([status] if status else [])


def test_what_is_left_out_is_named(notes: Callable[..., tuple[str, ...]]) -> None:
    body = "".join(f"sp,64,{x},{y},finished\n" for x, y in LOSSES.items())
    more = "sp,64,-5,3,running\nsp,64,-4,3,crashed\nsp,64,-3,,finished\nsp,64,,3,\nsp,,-2,3,\n"
    more += "".join(f"sp,64,{x},,\n" for x in range(6))
    assert notes(f"{HEADING},state\n{body}{more}") == (
        "left out, crashed or failed, though the loss is no blow-up: row 6",
        "left out, no LR: row 8",
        "left out, no loss: rows 7, 10, 11, 12, 13 and 2 more",
        "left out, no width: row 9",
        "left out, still running: row 5",
    )


@pytest.mark.parametrize(
    ("unit", "factor"),
    [("nats", lambda nats: nats), ("bits", lambda nats: nats / math.log(2)), ("perplexity", math.exp)],
)
def test_units_become_nats(read: Callable[..., list[RunResult]], unit: str, factor: Callable[[float], float]) -> None:
    content = f"{HEADING}\n" + "".join(f"sp,64,{x},{factor(loss)!r}\n" for x, loss in LOSSES.items())
    assert losses(read(content, unit=unit)) == pytest.approx(LOSSES, rel=1e-12)


def test_perplexities_that_are_taken_for_nats_are_remarked(notes: Callable[..., tuple[str, ...]]) -> None:
    content = f"{HEADING}\n" + "".join(f"sp,64,{x},{math.exp(loss)}\n" for x, loss in LOSSES.items())
    assert notes(content) == (
        "half of the losses are above 33.1 nats per token: if they are perplexities, --unit perplexity",
    )


def test_whole_numbers_may_be_grouped_or_abbreviated(read: Callable[..., list[RunResult]]) -> None:
    runs = read(
        'width,lr,loss,tokens\n"1,024",0.1,3,2.5B\n1024.0,0.2,3,"2,500,000,000"\n1e3,0.3,3,1e9\n1024,.3,3,2500M\n'
    )
    assert [(run.width, run.tokens) for run in runs] == [(1000, 10**9)] + [(1024, 2_500_000_000)] * 3


def test_german_numbers_are_read_in_every_column(read: Callable[..., list[RunResult]]) -> None:
    runs = read("width;lr;loss\n2.048;0,1;3,25\n2.048;0,2;3\n2.048;0,4;3,125\n")
    assert [(run.width, round(2**run.log2_lr, 6), run.val_loss) for run in runs] == [
        (2048, 0.1, 3.25),
        (2048, 0.2, 3.0),
        (2048, 0.4, 3.125),
    ]


def test_lrs_of_single_precision_are_those_of_double(read: Callable[..., list[RunResult]]) -> None:
    runs = read("width,lr,loss\n64,0.001,3\n64,0.0010000000474974513,4\n64,0.002,3\n64,0.004,3\n")
    assert len({run.log2_lr for run in runs}) == 3


# What rows are to each other


def test_equal_rows_count_once_and_other_losses_are_repeats(notes: Callable[..., tuple[str, ...]]) -> None:
    body = THREE + THREE + "sp,64,-7,3.3\nsp,64,-8,3.6\nsp,64,-8,3.7\n"
    assert notes(f"{HEADING}\n{body}") == (
        "3 rows equal to another, counted once",
        "other losses of one LR and seed are repeats, at 2 points",
    )


def test_repeats_get_seeds_of_their_own(read: Callable[..., list[RunResult]]) -> None:
    body = "".join(f"sp,64,{x},{y + i / 100},{seed}\n" for x, y in LOSSES.items() for i, seed in enumerate((7, 7, 9)))
    runs = read(f"{HEADING},seed\n{body}")
    by_lr = {x: sorted(run.seed for run in runs if run.log2_lr == x) for x in LOSSES}
    assert by_lr == {x: [0, 7, 9] for x in LOSSES}
    assert {run.val_loss for run in runs if run.seed == 9} == {y + 0.02 for y in LOSSES.values()}


def test_the_first_repeat_is_not_always_the_lower_one(read: Callable[..., list[RunResult]]) -> None:
    body = "".join(f"sp,64,{-x / 4},{3 + x / 64 + i / 100}\n" for x in range(40) for i in range(2))
    runs = read(f"{HEADING}\n{body}")
    first = {run.log2_lr: run.val_loss or 0 for run in runs if run.seed == 0}
    second = {run.log2_lr: run.val_loss or 0 for run in runs if run.seed == 1}
    assert 10 < sum(first[x] < second[x] for x in first) < 30


def test_repeats_that_differ_in_a_setting_say_so(notes: Callable[..., tuple[str, ...]]) -> None:
    heading = f"{HEADING},weight_decay,id\n"
    body = "".join(f"sp,64,{x},{y + d},{d},{x}-{d}\n" for x, y in LOSSES.items() for d in (0, 0.1))
    assert notes(heading + body) == (
        "other losses of one LR and seed are repeats, at 3 points (the rows differ in weight_decay (0, 0.1): "
        "--filter NAME=VALUE keeps one)",
    )
    assert notes(heading + body, filters={"weight_decay": "0.1"}) == ()


def test_every_group_has_a_base_of_its_own(read: Callable[..., list[RunResult]]) -> None:
    sizes = {"a": ((64, 2), (128, 2)), "b": ((256, 4), (256, 8), (512, 4))}
    content = "model,width,depth,lr,loss\n"
    content += "".join(f"{m},{w},{d},{lr},3\n" for m, s in sizes.items() for w, d in s for lr in (0.1, 0.2, 0.4))
    ratios = {(run.model, run.width, run.depth): (run.width_ratio, run.depth_ratio) for run in read(content)}
    assert ratios == {
        ("a", 64, 2): (1, 1),
        ("a", 128, 2): (2, 1),
        ("b", 256, 4): (1, 1),
        ("b", 256, 8): (1, 2),
        ("b", 512, 4): (2, 1),
    }


def test_ratios_that_are_given_win(read: Callable[..., list[RunResult]]) -> None:
    runs = read(
        "width,width_ratio,lr,loss\n" + "".join(f"{w},{w / 32},{lr},3\n" for w in (64, 128) for lr in (1, 2, 4))
    )
    assert {run.width: run.width_ratio for run in runs} == {64: 2.0, 128: 4.0}


def test_a_sparse_rectangle_has_the_smallest_trained_size_as_base(tmp_path: Path) -> None:
    sizes = ((128, 8), (256, 4), (256, 8), (512, 16))
    lines = [
        {"width": w, "depth": d, "log2_lr": x, "loss": 3 + 0.05 * (x + 8) ** 2, "parametrization": "sp"}
        for w, d in sizes
        for x in LRS
    ]
    found = read_table(table(tmp_path, lines))
    assert found.notes[1:] == (
        "model/optimizer/sp: width 128 at depth 4 was not trained, so the base is width 128, depth 8",
    )
    assert {(run.width, run.depth): (run.width_ratio, run.depth_ratio) for run in found.runs} == {
        (128, 8): (1, 1),
        (256, 4): (2, 0.5),
        (256, 8): (2, 1),
        (512, 16): (4, 2),
    }
    assert {group.axis for group in analyse(found.runs).groups} >= {"width"}


def test_tokens_are_a_horizon_where_a_size_has_several(read: Callable[..., list[RunResult]]) -> None:
    content = "width,tokens,lr,loss\n"
    content += "".join(f"{w},{t},{lr},3\n" for w, t in ((64, 100), (64, 200), (128, 200)) for lr in (0.1, 0.2, 0.4))
    assert {(run.width, run.horizon, run.width_ratio) for run in read(content)} == {
        (64, 100, 1),
        (64, 200, 1),
        (128, 200, 2),
    }


@pytest.mark.parametrize("column", ["tokens", "horizon"])
def test_tokens_that_grow_with_the_size_are_no_horizon(tmp_path: Path, column: str) -> None:
    lines = [{"width": w, column: 20 * w, "lr": lr, "loss": 3} for w in (64, 128) for lr in (0.1, 0.2, 0.4)]
    found = read_table(table(tmp_path, lines))
    assert {(run.width, run.horizon, run.tokens) for run in found.runs} == {(64, None, 1280), (128, None, 2560)}
    assert "model/optimizer/given: the tokens of training change along with the size" in found.notes


def test_one_horizon_stays_one(read: Callable[..., list[RunResult]]) -> None:
    runs = read("width,horizon,lr,loss\n" + "".join(f"{w},500,{lr},3\n" for w in (64, 128) for lr in (1, 2, 4)))
    assert {run.horizon for run in runs} == {500}


def test_batch_sizes_are_variants(tmp_path: Path) -> None:
    lines = [
        {"arch": "gpt", "optimizer": "adamw", "width": w, "batch_size": b, "lr": lr, "loss": 3 + b / w}
        for w in (64, 128)
        for b in (32, 512)
        for lr in (0.1, 0.2, 0.4)
    ]
    found = read_table(table(tmp_path, lines))
    assert Counter(run.model for run in found.runs) == {"gpt bs32": 6, "gpt bs512": 6}
    assert "gpt/adamw/given: a ladder for every batch size, 32, 512" in found.notes


def test_a_batch_size_that_grows_with_the_size_belongs_to_it(tmp_path: Path) -> None:
    lines = [{"width": w, "batch size": w // 2, "lr": lr, "loss": 3} for w in (64, 128) for lr in (0.1, 0.2, 0.4)]
    found = read_table(table(tmp_path, lines))
    assert {run.model for run in found.runs} == {"model"}
    assert "model/optimizer/given: the batch size changes along with the size" in found.notes


def test_batch_sizes_and_parameters_stay_with_their_runs(read: Callable[..., list[RunResult]]) -> None:
    content = "n_params,bs,tokens,lr,loss\n" + "".join(
        f"{n},{b},2.5B,{lr},3\n" for n in ("124M", "350e6") for b in (32, 64) for lr in (0.1, 0.2, 0.4)
    )
    found = {(run.parameters, run.batch_size, run.tokens, run.width) for run in read(content)}
    assert found == {(n, b, 2_500_000_000, n) for n in (124e6, 350e6) for b in (32, 64)}


def test_a_column_of_that_name_with_other_content_counts_no_parameters(read: Callable[..., list[RunResult]]) -> None:
    content = f"{HEADING},params\n" + THREE.replace("\n", ",lr=1e-3\n")
    assert {run.parameters for run in read(content)} == {None}


def test_a_batch_size_that_is_tuned_makes_no_variants(read: Callable[..., list[RunResult]]) -> None:
    content = f"{HEADING},batch_size,hyperparameter,value,default\n" + THREE.replace("\n", ",32,,,\n")
    content += THREE.replace("\n", ",64,training.batch_size,64,32\n")
    assert Counter((run.model, run.batch_size, run.value) for run in read(content)) == {
        ("model", 32, None): 3,
        ("model", 64, 64.0): 3,
    }


MESSY = {
    "parameters": lambda: [{**line, "parameters": line["width"] ** 2, "batch_size": 32} for line in rows()],
    "plain": lambda: rows(model="m", optimizer="o", depth=4, seed=3),
    "ratios": lambda: rows(depth=4, depth_ratio=2.0),
    "repeats": lambda: rows() + rows() + [{**line, "val_loss": 3.9} for line in rows()],
    "batch sizes": lambda: rows(batch_size=64) + [{**line, "batch_size": 128} for line in rows()],
    "horizons": lambda: rows(tokens=1000) + [{**line, "tokens": 4000, "val_loss": 2.5} for line in rows()],
    "growing tokens": lambda: [{**line, "tokens": line["width"] * 20} for line in rows()],
    "changes": lambda: (
        rows(hyperparameter="", value="", default="") + rows(hyperparameter="optimizer.eps", value=1e-6, default=1e-8)
    ),
    "validations": lambda: [{**line, "validation": line["width"] == 512} for line in rows()],
    "holes": lambda: [{**line, "val_loss": "" if line["log2_lr"] == -9 else line["val_loss"]} for line in rows()],
    "LRs": lambda: [{"width": line["width"], "lr": 3 ** line["log2_lr"], "loss": line["val_loss"]} for line in rows()],
}


@pytest.mark.parametrize("kind", MESSY)
@pytest.mark.parametrize("unit", ["nats", "bits"])
def test_what_was_read_is_saved_and_read_again(tmp_path: Path, kind: str, unit: str) -> None:
    runs = read_table(table(tmp_path, MESSY[kind]()), TableOptions(unit=unit)).runs
    save_runs(tmp_path / "again.csv", runs)
    again = read_table(str(tmp_path / "again.csv"))
    assert again.runs == runs
    assert not any("equal" in note or "repeats" in note for note in again.notes)


def test_runs_that_validate_an_lr_stay_what_they_are(read: Callable[..., list[RunResult]]) -> None:
    content = f"{HEADING},validation\n" + THREE.replace("\n", ",False\n") + "sp,32,-7,3,True\n"
    assert {(run.width, run.validation, run.width_ratio) for run in read(content)} == {(64, False, 1), (32, True, 0.5)}
    of_a_loss = f"{HEADING},validation\n" + THREE.replace("\n", ",3.5\n")
    assert {run.validation for run in read(of_a_loss)} == {False}


@given(st.randoms(use_true_random=False), st.sampled_from(sorted(MESSY)), st.sampled_from([",", ";", "\t", "|"]))
def test_the_order_of_rows_and_columns_and_other_columns_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, shuffled: random.Random, kind: str, delimiter: str
) -> None:
    lines = MESSY[kind]()
    folder = tmp_path_factory.mktemp("shuffled")
    expected = read_table(table(folder, lines)).runs
    columns = [*lines[0], "note", "_runtime", "train/loss"]
    shuffled.shuffle(columns)
    shuffled.shuffle(lines)
    others = {"note": "x y", "_runtime": "12.5", "train/loss": "2.5"}
    again = [{key: {**others, **line}[key] for key in columns} for line in lines]
    assert read_table(table(folder, again, "again.csv", delimiter)).runs == expected


# What is refused


def test_files_that_are_no_tables_are_refused(refusal: Callable[..., str]) -> None:
    forms = "csv, tsv, xlsx, parquet, jsonl, or a paste of a table"
    assert refusal("") == f"--from runs.csv is empty: expected {forms}, with a heading and a row for every run"
    assert refusal(" \n\n") == f"--from runs.csv is empty: expected {forms}, with a heading and a row for every run"
    assert (
        refusal("# nothing\n") == f"--from runs.csv is empty: expected {forms}, with a heading and a row for every run"
    )
    assert refusal("<!DOCTYPE html>\n<html><body>Sign in</body></html>") == (
        f"--from runs.csv is a web page, not a table: download the raw file, {forms}"
    )
    assert refusal("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n") == (
        "--from runs.csv is a git-lfs pointer, not the file itself: git lfs pull, and try again"
    )
    assert refusal(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR") == (
        f"--from runs.csv cannot be read: it is no text and none of the known formats; expected {forms}"
    )
    assert refusal(b"\x1f\x8b\x08\x00garbage").startswith("--from runs.csv is a damaged gzip file (")
    assert refusal(b"PAR1garbage").startswith("--from runs.csv is a damaged parquet file (")
    assert refusal('{"lr": 0.1}\n{"lr": \n').startswith("--from runs.csv, row 2: no JSON (")
    assert refusal('{"a":' * 100_000) == "--from runs.csv is nested too deep: expected one JSON object a run"
    assert refusal(f"width,lr,loss,notes\n64,0.1,3,{'x' * 200_000}\n").startswith(
        "--from runs.csv is no readable csv (field larger than field limit (131072)): "
    )
    assert refusal("[\n1, 2]") == ('--from runs.csv, row 1: expected one JSON object a run, as {"lr": 0.001, ...}')


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "none.csv",
            "--from none.csv cannot be read: No such file or directory; expected a file (csv, tsv, xlsx, parquet, "
            "jsonl, or a paste of a table), - for stdin, or wandb:ENTITY/PROJECT",
        ),
        (".", "--from . is a folder: a sweep is judged without --from, mupsweep transfer ."),
        (
            "https://example.org/runs.csv",
            "--from https://example.org/runs.csv is an address: curl -L -o runs.csv ADDRESS, then --from runs.csv",
        ),
    ],
)
def test_what_is_no_file_is_refused(source: str, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        read_table(source)
    assert str(caught.value) == expected


LOSS_LIMITS = "write nan for a run that exploded, --unit nats|bits|perplexity for other units"


@pytest.mark.parametrize(
    ("column", "cell", "expected"),
    [
        ("width", "wide", "expected a whole number from 1 to 1e+30"),
        ("width", "16.5", "expected a whole number from 1 to 1e+30"),
        ("width", "1e400", "expected a whole number from 1 to 1e+30"),
        ("width", "nan", "expected a whole number from 1 to 1e+30"),
        ("width", "0", "expected a whole number from 1 to 1e+30"),
        ("width_ratio", "0", "expected a number from 1e-30 to 1e+30"),
        ("seed", "x", "expected a whole number from -1e+30 to 1e+30"),
        ("log2_lr", "x", "expected a number from -1e+30 to 1e+30"),
        ("log2_lr", "nan", "expected a number from -1e+30 to 1e+30"),
        ("log2_lr", "-30", "expected octaves, -29.9 to 6.6, log2 of the peak LR"),
        ("log2_lr", "7", "expected octaves, -29.9 to 6.6, log2 of the peak LR"),
        ("val_loss", "abc", "expected a number from -1e+30 to 1e+30"),
        ("val_loss", "1e400", "expected a number from -1e+30 to 1e+30"),
        ("val_loss", "1e30", f"expected a loss above 0 and at most 1000 nats per token; {LOSS_LIMITS}"),
        ("val_loss", "0", f"expected a loss above 0 and at most 1000 nats per token; {LOSS_LIMITS}"),
        ("val_loss", "-1", f"expected a loss above 0 and at most 1000 nats per token; {LOSS_LIMITS}"),
        ("val_loss", "1001", f"expected a loss above 0 and at most 1000 nats per token; {LOSS_LIMITS}"),
        (
            "status",
            "gone",
            "expected finished, diverged, crashed, failed, killed or running; --columns status= leaves the column out",
        ),
    ],
)
def test_a_bad_cell_is_refused(refusal: Callable[..., str], column: str, cell: str, expected: str) -> None:
    lines = [{"width_ratio": 1, "seed": 0, "status": "done", **line} for line in rows()]
    lines[4] = {**lines[4], column: cell}
    content = "\n".join(",".join(map(str, line)) for line in [list(lines[0]), *(line.values() for line in lines)])
    assert refusal(content) == f"--from runs.csv, row 6: {column}={cell!r}: {expected}"


@pytest.mark.parametrize(
    ("unit", "cell", "expected"),
    [
        ("perplexity", "1", "expected a loss above 1; "),
        ("perplexity", "-3", "expected a loss above 1; "),
        ("bits", "1443", "expected a loss above 0 and at most 1443 bits per token; "),
    ],
)
def test_limits_of_losses_are_in_their_unit(refusal: Callable[..., str], unit: str, cell: str, expected: str) -> None:
    said = refusal(f"{HEADING}\n{THREE}sp,64,-5,{cell}\n", unit=unit)
    assert said == f"--from runs.csv, row 5: val_loss='{cell}': {expected}{LOSS_LIMITS}"


@pytest.mark.parametrize(
    ("lr", "expected"),
    [
        ("-7", "lr='-7': an LR is positive; if these are log2 LRs, --columns log2_lr=lr"),
        ("0", "lr='0': expected the peak LR, from 1e-09 to 100"),
        ("5e-10", "lr='5e-10': expected the peak LR, from 1e-09 to 100"),
        ("101", "lr='101': expected the peak LR, from 1e-09 to 100"),
    ],
)
def test_an_lr_that_is_none_is_refused(refusal: Callable[..., str], lr: str, expected: str) -> None:
    assert refusal(f"width,lr,loss\n64,0.1,3\n64,{lr},3\n") == f"--from runs.csv, row 3: {expected}"


def test_logarithms_of_lrs_may_be_named(read: Callable[..., list[RunResult]]) -> None:
    content = "width,lr,loss\n" + "".join(f"64,{x:g},{y}\n" for x, y in LOSSES.items())
    assert losses(read(content, columns={"log2_lr": "lr"})) == LOSSES


def test_lrs_in_place_of_their_logarithm_are_refused(refusal: Callable[..., str]) -> None:
    assert refusal("width,log2_lr,loss\n64,0.001,3\n64,0.002,3\n64,0.004,3\n") == (
        "--from runs.csv, row 2: log2_lr='0.001': expected log2 of an LR, as -10; if these are LRs, "
        "--columns lr=log2_lr,log2_lr="
    )


def test_two_columns_of_lrs_must_agree(refusal: Callable[..., str], read: Callable[..., list[RunResult]]) -> None:
    content = "width,lr,log2_lr,loss\n64,0.001,-9.97,3\n64,0.002,-8.97,3\n64,0.003,-8.38,3\n64,0.004,-8.97,3\n"
    assert refusal(content) == (
        "--from runs.csv, row 5: log2_lr='-8.97': lr=0.004 is 2^-7.966; leave one of them out, --columns lr= or "
        "--columns log2_lr="
    )
    assert [run.log2_lr for run in read(content, columns={"lr": ""})] == [-9.97, -8.97, -8.38]
    assert [run.log2_lr for run in read(content.replace("0.004,-8.97", "0.004,-7.97"))][-1] == -7.97


@pytest.mark.parametrize(
    ("heading", "expected"),
    [
        ("a,width,loss", "no column lr or log2_lr: it has a, width, loss; --columns lr=NAME says which it is"),
        ("128,0.001,3.5", "no heading, its first row is numbers: put names above them, such as width,lr,val_loss"),
        (
            "Learning Rate (peak),width,loss",
            "no column lr or log2_lr: it has Learning Rate (peak), width, loss; --columns 'lr=Learning Rate (peak)' "
            "says which it is",
        ),
        ("lrate,width,loss", "no column lr or log2_lr: it has lrate, width, loss; --columns lr=NAME says which it is"),
        (
            "learning_rates,width,loss",
            "no column lr or log2_lr: it has learning_rates, width, loss; --columns lr=learning_rates says which it is",
        ),
        (
            "lr,width,train/loss",
            "no column val_loss: it has lr, width, train/loss; --columns val_loss=train/loss says which it is",
        ),
        (
            "lr,width,eval/perplexity",
            "no column val_loss: perplexities are read with --columns val_loss=eval/perplexity --unit perplexity",
        ),
        (
            "lr,embd,loss",
            "no column width: it has lr, embd, loss; --columns width=embd says which it is; where all runs are of one "
            "width, --columns width=",
        ),
    ],
)
def test_a_missing_column_is_named_with_what_there_is(refusal: Callable[..., str], heading: str, expected: str) -> None:
    assert refusal(f"{heading}\n1,2,3\n") == f"--from runs.csv has {expected}"


def test_a_hyperparameter_without_its_value_is_refused(
    refusal: Callable[..., str], read: Callable[..., list[RunResult]]
) -> None:
    content = "width,lr,loss,hyperparameter\n" + "".join(f"64,{2.0**x},{y},eps\n" for x, y in LOSSES.items())
    assert refusal(content) == (
        "--from runs.csv has a column hyperparameter and no column value: --columns value=NAME says which it is, "
        "--columns hyperparameter= leaves both out"
    )
    assert losses(read(content, columns={"hyperparameter": ""})) == LOSSES


def test_of_many_columns_some_are_listed(refusal: Callable[..., str]) -> None:
    heading = ",".join(f"c{i}" for i in range(30))
    assert "c18, c19 and 10 more; --columns" in refusal(f"{heading}\n{heading}\n")


def test_two_columns_of_one_meaning_are_refused(refusal: Callable[..., str]) -> None:
    body = "64,0.1,3,4\n64,0.2,3,4\n64,0.4,3,4\n"
    assert refusal(f"width,lr,eval/loss,validation_loss\n{body}") == (
        "--from runs.csv: is val_loss in eval/loss or validation_loss? Choose with --columns val_loss=eval/loss"
    )
    assert refusal(f"width,lr,loss,loss\n{body}") == ("--from runs.csv has two columns called loss: rename one of them")


def test_two_columns_that_say_alike_are_one(read: Callable[..., list[RunResult]]) -> None:
    body = "".join(f"64,64,{2.0**x},{y}\n" for x, y in LOSSES.items())
    assert losses(read(f"hidden_size,d_model,lr,loss\n{body}")) == LOSSES


def test_one_width_may_be_said(notes: Callable[..., tuple[str, ...]]) -> None:
    content = "tokens,lr,loss\n" + "".join(f"{t},{lr},3\n" for t in (100, 200) for lr in (0.1, 0.2, 0.4))
    assert notes(content, columns={"width": ""}) == (
        "no column parametrization: all runs are of one, called given",
        "no column width: all runs are of one, shown as width 1",
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (HEADING, "--from runs.csv has no runs: expected a heading and one row for every run"),
        (
            f"{HEADING}\nsp,64,-8,\nsp,64,-7,-\n",
            "--from runs.csv has no runs with a result: left out, no loss: rows 2, 3",
        ),
        (
            f"{HEADING}\nsp,64,-8,3\nsp,64,-7,3\nsp,64,-6,nan\nsp,128,-8,3\n",
            "--from runs.csv has no size with three LRs that have a loss (the most is 2): a curve needs three; if a "
            "column tells apart what is one size, --columns model= leaves it out",
        ),
        (
            f"{HEADING}\nsp,64,-8,3,5\n",
            "--from runs.csv, row 2: expected 4 cells, as in the heading, not 5; quote cells that hold the separator",
        ),
        (
            f"{HEADING}\nsp,64,-8\n",
            "--from runs.csv, row 2: expected 4 cells, as in the heading, not 3; quote cells that hold the separator",
        ),
    ],
)
def test_a_table_without_a_curve_is_refused(refusal: Callable[..., str], content: str, expected: str) -> None:
    assert refusal(content) == expected


def test_a_filter_that_nothing_passes_is_refused(refusal: Callable[..., str]) -> None:
    content = f"{HEADING},group\n" + THREE.replace("\n", ",a\n")
    assert refusal(content, filters={"group": "b"}) == "--from runs.csv has no row with group=b: group is a"
    assert refusal(content, filters={"tag": "b"}) == (
        "--from runs.csv has no column tag (--filter tag=b): it has parametrization, width, log2_lr, val_loss, group"
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"unit": "nat"}, "--unit nat: expected the unit of the losses, nats, bits, perplexity"),
        ({"average": 0}, "--average 0: expected how many last logged steps to average over, 1 or more"),
        ({"filters": ["group"]}, "--filter group: expected NAME=VALUE, for example --filter group=sweep-3"),
        (
            {"columns": ["lrs=x"]},
            "--columns lrs=x: expected MEANING=COLUMN, as lr=optimizer.lr,val_loss=eval/loss; did you mean 'lr'? "
            "valid: batch_size, default, depth, depth_ratio, flops, horizon, hyperparameter, log2_lr, lr, model, "
            "optimizer, parameters, parametrization, seed, status, tokens, val_loss, validation, value, width, "
            "width_ratio",
        ),
        ({"columns": ["lr=a", "lr=b"]}, "--columns lr=b: lr=a is given too; name one of them"),
        ({"filters": ["width=64", "width=128"]}, "--filter width=128: width=64 is given too; one value a column"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TableOptions.parse(**options)
    assert str(caught.value) == expected


def test_averages_are_of_histories(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_table("runs.csv", TableOptions(average=5))
    assert str(caught.value) == (
        "--average 5 is of W&B histories, --from wandb:ENTITY/PROJECT; runs.csv has one loss a row"
    )


# The command


def test_the_command_says_what_was_read_and_saves_it(tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    path = table(tmp_path, [{**line, "state": "running" if line["log2_lr"] == -12 else "finished"} for line in rows()])
    code, out, err = cli("transfer", "--from", path, "--save", str(tmp_path / "saved.csv"), "--json")
    assert (code, err) == (0, "")
    content = json.loads(out)
    assert content["notes"] == [
        f"read from {path}: parametrization, width, log2_lr, status = state, val_loss",
        "left out, still running: rows 2, 11, 20",
    ]
    code, out, _ = cli("transfer", "--from", str(tmp_path / "saved.csv"), "--json")
    assert json.loads(out)["groups"] == content["groups"]
    code, out, _ = cli("transfer", "--from", path)
    assert "left out, still running: rows 2, 11, 20" in out.splitlines()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["runs.csv", "saved.csv"]


def test_an_lr_for_a_target_saves_what_was_read_too(tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    path = table(tmp_path, rows())
    code, out, _ = cli("transfer", "--from", path, "--to", "width=4096", "--save", "saved.csv", "--json")
    assert code == 0
    assert [content["parametrization"] for content in json.loads(out)] == ["mup"]
    assert read_table("saved.csv").runs == read_table(path).runs


@pytest.mark.parametrize(
    "arguments", [("--columns", "lr=x"), ("--unit", "bits"), ("--filter", "a=b"), ("--average", "3"), ("--save", "x")]
)
def test_options_of_tables_want_a_table(cli: Callable[..., tuple[int, str, str]], arguments: tuple[str, str]) -> None:
    assert cli("transfer", *arguments) == (
        2,
        "",
        f"mupsweep: {arguments[0]} is of a table: name it too, mupsweep transfer --from FILE {arguments[0]} ...\n",
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--save", "runs.csv"), "--save runs.csv is the table itself, which it would replace: name another file"),
        (("--base", "model=llama"), "--base is of a recipe: name its target with --to width=N depth=N"),
        (
            ("--to", "width=4096", "--validate"),
            "--validate trains the target of a sweep, not of a table: mupsweep transfer --from runs.csv --to width=N "
            "says the LR to train it at",
        ),
    ],
)
def test_options_that_a_table_cannot_follow_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cli: Callable[..., tuple[int, str, str]],
    arguments: tuple[str, ...],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = Path(table(tmp_path, rows())).read_bytes()
    assert cli("transfer", "--from", "runs.csv", *arguments) == (2, "", f"mupsweep: {expected}\n")
    assert Path("runs.csv").read_bytes() == before


def test_a_drift_has_its_exit_code_beside_an_lr_too(tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    drifting = [
        {**line, "val_loss": 3 + 0.05 * (line["log2_lr"] + 8 + WIDTHS.index(line["width"])) ** 2} for line in rows()
    ]
    path = table(tmp_path, drifting)
    assert cli("transfer", "--from", path, "--to", "width=4096")[0] == 0
    assert cli("transfer", "--from", path, "--to", "width=4096", "--strict")[0] == 3


def test_tokens_that_no_run_of_a_table_tells_are_not_carried(
    tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    path = table(tmp_path, rows())
    _, out, _ = cli("transfer", "--from", path, "--to", "width=4096", "tokens=2e9", "--json")
    (content,) = json.loads(out)
    assert content["log2_lr_low"] is None
    assert content["horizon"]["note"] == (
        "NOT carried to 2,000,000,000 tokens: measured at an unknown number of tokens, and the best LR falls with the "
        "horizon; runs at several horizons carry it"
    )


def test_ratios_without_their_size_lead_to_a_target_too(
    tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    path = table(tmp_path, rows(depth_ratio=4))
    code, out, err = cli("transfer", "--from", path, "--to", "width=4096", "--json")
    assert code == 0, err
    assert json.loads(out)[0]["base"] == {"width": min(WIDTHS), "depth": 1}


def test_a_size_whose_runs_all_diverged_is_named_beside_an_lr(
    tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    largest = max(line["width"] for line in rows())
    path = table(tmp_path, [{**line, "val_loss": "nan"} if line["width"] == largest else line for line in rows()])
    code, out, _ = cli("transfer", "--from", path, "--to", "width=4096", "--json")
    (content,) = json.loads(out)
    assert code == 0
    assert f"every LR diverged at width {largest}, depth 1" in content["basis"]


def test_a_model_with_a_slash_in_its_name_has_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = table(tmp_path, [{**line, "model": name} for name in ("org/a", "org/b") for line in rows()])
    base = ("--base", "model=llama", "--base", "optimizer=adamw", "--base", "parametrization=mup")
    code, _, err = cli("transfer", "--from", path, "--to", "width=4096", *base)
    assert code == 0, err
    assert sorted(file.name for file in tmp_path.glob("*.json")) == [
        f"recipe-org-{name}-optimizer-mup-w4096-d1.json" for name in "ab"
    ]


@pytest.mark.parametrize("name", ["../../x", "..", "/etc/x", "a\x1b[31mb", ".hidden"])
def test_a_cell_that_becomes_part_of_a_files_name_leads_nowhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., tuple[int, str, str]]
) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    path = table(inner, [{**line, "model": name} for line in rows()])
    base = ("--base", "model=llama", "--base", "optimizer=adamw", "--base", "parametrization=mup")
    code, _, err = cli("transfer", "--from", path, "--to", "width=4096", *base)
    assert code == 0, err
    written = [file.relative_to(inner) for file in tmp_path.rglob("*") if file.is_file() and file != Path(path)]
    assert len(written) == 1
    assert len(written[0].parts) == 1
    assert written[0].name.startswith("recipe-")
    assert written[0].name.isprintable()


def test_a_base_of_another_name_than_the_tables_gives_no_lr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = table(tmp_path, [{**line, "optimizer": "adamw"} for line in rows()])
    base = ("--base", "model=llama", "--base", "optimizer=lion", "--base", "parametrization=mup")
    code, _, err = cli("transfer", "--from", path, "--to", "width=4096", *base)
    assert code == 2
    assert "--base optimizer=lion is another optimizer than the table's" in err.splitlines()[-1]
    assert not list(tmp_path.glob("recipe*"))


def test_a_file_that_cannot_be_saved_is_refused(tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    path = table(tmp_path, rows())
    code, out, err = cli("transfer", "--from", path, "--save", "none/saved.csv")
    assert (code, out) == (2, "")
    assert err == (
        "mupsweep: --save none/saved.csv: cannot be written (No such file or directory); name a file in a folder that "
        "exists\n"
    )
