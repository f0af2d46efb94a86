"""Random damage to the records of a sweep and to tables: every reading command answers, or refuses in one line."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from command_line import mupsweep
from damage import CELLS, damaged_bytes, damaged_cells, damaged_file, of_one_folder, undamaged_copy
from hypothesis import given, settings
from hypothesis import strategies as st

STORED = Path(__file__).with_name("stored") / "sweep"
RUN = "runs/w8-d1-lr-4.00-s0-bffae01d"
RECORDS = [
    *("config.yaml", "plan.jsonl", "environment.json", "jobs/12.json"),
    *(f"{RUN}/{name}" for name in ("summary.json", "status.json", "metrics.jsonl", "claims/0000.json", "config.yaml")),
    "results/check.json",
]
TABLE = "model,width,lr,val_loss,seed,status\n" + "".join(
    f"gpt,{width},{lr},{3 + (i - 1.6) ** 2 / 10 + 9 / width},0,done\n"
    for width in (64, 128)
    for i, lr in enumerate((0.001, 0.002, 0.004, 0.008))
)
CPU_SECONDS = 60  # that a command may take before it counts as one that hangs


def hangs(*_: object) -> None:
    raise AssertionError(f"no answer after {CPU_SECONDS} s of CPU")


def answers(*arguments: str) -> None:
    """Assert that a command gives a result, or refuses in one line that no library wrote."""
    handler = signal.signal(signal.SIGVTALRM, hangs)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        code, _, err = mupsweep(*arguments)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
    assert code in (0, 1, 2), (arguments, code)
    assert "Traceback" not in err
    assert "weights_only" not in err
    if code == 2:
        lines = err.splitlines()
        assert lines[-1].startswith("mupsweep: "), err
        assert sum(line.startswith("mupsweep: ") for line in lines) == 1, err


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of every kind of record, undamaged."""
    folder = tmp_path_factory.mktemp("whole") / "sweep"
    shutil.copytree(STORED, folder)
    (folder / "jobs").mkdir()
    job = {"job": "12", "script": "submit-w8-d1.sbatch", "tasks": [["w8-d1-lr-4.00-s0-bffae01d"]]}
    (folder / "jobs" / "12.json").write_text(json.dumps(job))
    (folder / "results").mkdir()
    interval = {"value": 0.0, "low": -0.1, "high": 0.1}
    row = {"axis": "width", "quantity": "change of features", "role": None, "promised": "0", "sizes": [8, 16]}
    row |= {"judged": interval, "after": {"2": {**interval, "values": [1.0, 1.5]}}, "shown": True, "off": ["head"]}
    label = {"model": "nanogpt", "optimizer": "adamw", "parametrization": "sp"}
    check = {"variants": [{**label, "passed": False, "causes": ["its eps"], "roles": [row]}]}
    (folder / "results" / "check.json").write_text(json.dumps(check))
    return folder


def damage(whole: Path, data: st.DataObject, commands: list[list[str]]) -> None:
    """Damage one record of a sweep and run one of the commands on it."""
    record = data.draw(st.sampled_from(RECORDS))
    content = data.draw(damaged_file(whole / record))
    undamaged_copy(whole, Path("sweep"))
    Path("sweep", record).write_bytes(content)
    answers(*data.draw(st.sampled_from(commands)))


STATUS = [["status", "sweep"], ["status", "sweep", "--runs"], ["status", "sweep", "--json"]]
VERDICTS = [["transfer", "sweep", "sweep", "--json"], ["transfer", "sweep", "--to", "width=16"], ["report", "sweep"]]


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """No squeue is found, whose time is not this package's."""
    monkeypatch.setenv("PATH", "/nowhere")


@given(st.data())
@settings(of_one_folder, max_examples=30)
def test_status_of_a_damaged_sweep_is_a_result_or_one_line(whole: Path, no_slurm: None, data: st.DataObject) -> None:
    damage(whole, data, STATUS)


@given(st.data())
@settings(of_one_folder, max_examples=8)
def test_verdicts_of_a_damaged_sweep_are_results_or_one_line(whole: Path, no_slurm: None, data: st.DataObject) -> None:
    damage(whole, data, VERDICTS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@given(st.data())
@settings(of_one_folder, max_examples=300)
def test_every_command_on_a_damaged_sweep_gives_a_result_or_one_line(
    whole: Path, no_slurm: None, data: st.DataObject
) -> None:
    damage(whole, data, [*STATUS, *VERDICTS, *VERDICTS])


@st.composite
def damaged_table(draw: st.DrawFn) -> bytes:
    """A table as bytes that were damaged, or with some cells replaced."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged_bytes(TABLE.encode()))
    return draw(damaged_cells(TABLE.encode()))


def judge_table(content: bytes, as_jsonl: bool) -> None:
    """Run the verdict of a damaged table, as a csv or with its rows as mappings."""
    path = Path("runs.jsonl" if as_jsonl else "runs.csv")
    if as_jsonl:
        names, *rows = (line.decode(errors="replace").split(",") for line in content.split(b"\n"))
        content = "\n".join(json.dumps(dict(zip(names, row, strict=False))) for row in rows).encode()
    path.write_bytes(content)
    answers("transfer", "--from", str(path), "--to", "width=1024")


@given(damaged_table(), st.booleans())
@settings(of_one_folder, max_examples=25)
def test_a_damaged_table_gives_a_result_or_one_line(content: bytes, as_jsonl: bool) -> None:
    judge_table(content, as_jsonl)


@st.composite
def damaged_parquet(draw: st.DrawFn) -> bytes:
    """A parquet table as bytes that were damaged, or with a column of another type, another name or none."""
    names, *rows = (line.split(",") for line in TABLE.splitlines())
    columns: dict[str, Any] = dict(zip(names, zip(*rows, strict=True), strict=True))
    for name in ("width", "lr", "val_loss", "seed"):
        columns[name] = [float(cell) for cell in columns[name]]
    name = draw(st.sampled_from(names))
    n = len(rows)
    other: list[Any] = [
        *(n * [value] for value in (None, True, -1, 2**62, 1e308, math.nan, math.inf, "abc", "\x1b[31m", b"\xff")),
        *(n * [{"a": 1}], n * [[1]], n * [Decimal("1e30")], [1.0, *(n - 1) * [None]]),
        pyarrow.array(n * [b"\xff"]).view(pyarrow.utf8()),  # no UTF-8
        *(pyarrow.array(n * [2**62], kind) for kind in (pyarrow.timestamp("s"), pyarrow.timestamp("ns", "UTC"))),
        pyarrow.array(n * [2**31 - 1], pyarrow.date32()),
    ]
    change = draw(st.integers(0, 4))
    if change == 0:
        columns["val_loss " if name == "model" else "model"] = columns.pop(name)
    elif change < 4:
        columns[name] = draw(st.sampled_from(other))
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return draw(damaged_bytes(buffer.getvalue())) if change == 4 else buffer.getvalue()


@given(damaged_parquet())
@settings(of_one_folder, max_examples=25)
def test_a_damaged_parquet_table_gives_a_result_or_one_line(content: bytes) -> None:
    Path("runs.parquet").write_bytes(content)
    answers("transfer", "--from", "runs.parquet", "--to", "width=1024")


SIZES = "width,depth,cost\n64,4,1\n128,4,8\n"


ROWS_OF_SIZES = st.lists(CELLS, min_size=2, max_size=4).map(lambda cells: f"{SIZES}{','.join(cells)}".encode())


@given(damaged_bytes(SIZES.encode()) | ROWS_OF_SIZES)
@settings(of_one_folder, max_examples=25)
def test_a_damaged_table_of_sizes_gives_a_result_or_one_line(content: bytes) -> None:
    Path("runs.csv").write_text(TABLE)
    Path("sizes.csv").write_bytes(content)
    answers("plan", "--from", "runs.csv", "--sizes", "sizes.csv", "--log2-lrs=-14:-5")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and the cache of its tokens, complete and as a process leaves it that is killed."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = (f"line {i} of a text that is short" for i in range(40))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    code, _, err = mupsweep("data", "prepare", *words_of(folder))
    assert code == 0, err
    (whole,) = (folder / "cache").glob("[!.]*")
    partial = whole.with_name(f".{whole.name}.partial")
    shutil.copytree(whole, partial)
    header = json.loads((partial / "meta.json").read_text())
    (partial / "meta.json").unlink()
    (partial / "checkpoint.json").write_text(json.dumps({**header, "position": 40}))
    return folder


def words_of(folder: Path) -> list[str]:
    """The words that name the corpus of a folder."""
    data = (f"data.path={folder}/text.jsonl", f"data.cache={folder}/cache", "data.validation_fraction=0.2")
    return ["data=local", "data.tokenizer=bytes", *data]


@given(st.data())
@settings(of_one_folder, max_examples=40)
def test_a_damaged_corpus_gives_a_result_or_one_line(corpus: Path, data: st.DataObject) -> None:
    folder = Path("damaged").absolute()
    undamaged_copy(corpus, folder)
    (whole,) = (folder / "cache").glob("[!.]*")
    if data.draw(st.booleans()):
        record = whole / data.draw(st.sampled_from(["meta.json", "meta.json", "train-00000.bin"]))
    else:
        shutil.rmtree(whole)
        record = whole.with_name(f".{whole.name}.partial") / "checkpoint.json"
    record.write_bytes(data.draw(damaged_file(record)))
    command = data.draw(st.sampled_from([["list"], ["list", "--json"], ["verify"], ["prepare"]]))
    answers("data", *command, *words_of(folder))
    assert (folder / "text.jsonl").read_bytes() == (corpus / "text.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@given(damaged_table(), st.booleans())
@settings(of_one_folder, max_examples=1000)
def test_every_damaged_table_gives_a_result_or_one_line(content: bytes, as_jsonl: bool) -> None:
    judge_table(content, as_jsonl)


@pytest.mark.parametrize("loss", ["3.5±0.01", "3.5 +/- 0.01", "3.5(1)"])
def test_a_loss_with_its_error_is_refused_with_a_hint(loss: str) -> None:
    head, first, *rest = TABLE.splitlines()
    cells = first.split(",")
    cells[3] = loss
    Path("runs.csv").write_text("\n".join([head, ",".join(cells), *rest]))
    code, _, err = mupsweep("transfer", "--from", "runs.csv")
    assert code == 2
    assert f"{loss!r}: expected a number" in err
    assert "an error is a column of its own" in err


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take no such name")
def test_a_sweep_whose_folder_is_named_in_no_utf_8_has_a_report(whole: Path) -> None:
    folder = os.fsdecode(b"sw\xf6ep of mine")
    shutil.copytree(whole, folder)
    code, out, err = mupsweep("report", folder)
    assert (code, err) == (0, "")
    assert "open 'sw\\udcf6ep of mine/results/report.html'" in out
    assert b"sw\xf6ep of mine" in Path(folder, "results", "report.html").read_bytes()


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(9 * [f'*{old}'])}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize("content", [BOMB, "a: &a [*a]\n", "[" * 1500])
def test_a_document_that_repeats_itself_is_refused_in_one_line(content: str, whole: Path) -> None:
    shutil.copytree(whole, "sweep")
    Path("sweep", "config.yaml").write_text(content)
    answers("status", "sweep")
    own = Path("mine", "optimizer", "mine.yaml")
    own.parent.mkdir(parents=True)
    own.write_text(content)
    answers("plan", "optimizer=mine", "--config-dir", "mine")
