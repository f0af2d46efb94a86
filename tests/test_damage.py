"""Random damage to the records of a sweep and to tables: every reading command answers, or refuses in one line."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import mupsweep
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

STORED = Path(__file__).with_name("stored") / "sweep"
RUN = "runs/w8-d1-lr-4.00-s0-bffae01d"
RECORDS = [
    *("config.yaml", "plan.jsonl", "environment.json", "jobs/12.json"),
    *(f"{RUN}/{name}" for name in ("summary.json", "status.json", "metrics.jsonl", "claims/0000.json", "config.yaml")),
]
TABLE = "model,width,lr,val_loss,seed,status\n" + "".join(
    f"gpt,{width},{lr},{3 + (i - 1.6) ** 2 / 10 + 9 / width},0,done\n"
    for width in (64, 128)
    for i, lr in enumerate((0.001, 0.002, 0.004, 0.008))
)
CPU_SECONDS = 60  # that a command may take before it counts as one that hangs

STRANGE = st.one_of(
    st.sampled_from(
        [None, True, 0, -1, 1e30, 1e308, 10**400, "", "abc", "../../x", "/etc/passwd", "x" * 3000, "\x1b[31m", "\n"]
    ),
    st.sampled_from([[], {}, [[]], {"kind": "os.path"}, "${oc.env:HOME}", "\u00b2", "1e5", "running", 2**63, 1e-300]),
    st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False),
    st.integers(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of every value in plain data."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


@st.composite
def damaged_data(draw: st.DrawFn, value: Any) -> Any:
    """Plain data with one value replaced or left out, or a key more."""
    copy = json.loads(json.dumps(value))
    path = draw(st.sampled_from(list(places(copy))))
    if not path:
        return draw(STRANGE)
    parent = copy
    for key in path[:-1]:
        parent = parent[key]
    change = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
    if change == "remove":
        del parent[path[-1]]
    elif change == "add" and isinstance(parent, dict):
        parent["unknown"] = draw(STRANGE)
    else:
        parent[path[-1]] = draw(STRANGE)
    return copy


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes that were cut or flipped."""
    if draw(st.booleans()):
        return content[: draw(st.integers(0, len(content)))]
    flipped = bytearray(content)
    for place in draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        flipped[place] = draw(st.integers(0, 255))
    return bytes(flipped)


@st.composite
def damaged_file(draw: st.DrawFn, path: Path) -> bytes:
    """The content of a record, damaged as data or as bytes."""
    content = path.read_bytes()
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged_bytes(content))
    if path.suffix == ".yaml":
        return yaml.safe_dump(draw(damaged_data(yaml.safe_load(content)))).encode()
    if path.suffix == ".json":
        return json.dumps(draw(damaged_data(json.loads(content)))).encode()
    lines = content.splitlines()
    row = draw(st.integers(0, len(lines) - 1))
    lines[row] = json.dumps(draw(damaged_data(json.loads(lines[row])))).encode()
    return b"\n".join(lines) + b"\n"


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
    return folder


def damage(whole: Path, data: st.DataObject, commands: list[list[str]]) -> None:
    """Damage one record of a sweep and run one of the commands on it."""
    record = data.draw(st.sampled_from(RECORDS))
    content = data.draw(damaged_file(whole / record))
    shutil.rmtree("sweep", ignore_errors=True)
    shutil.copytree(whole, "sweep")
    Path("sweep", record).write_bytes(content)
    answers(*data.draw(st.sampled_from(commands)))


STATUS = [["status", "sweep"], ["status", "sweep", "--runs"], ["status", "sweep", "--json"]]
VERDICTS = [["transfer", "sweep", "sweep", "--json"], ["transfer", "sweep", "--to", "width=16"], ["report", "sweep"]]
of_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


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


CELLS = st.one_of(
    st.sampled_from(
        ["", "nan", "inf", "-1", "1e30", "abc", "3.5±0.01", "1e400", "\x1b[31m", "../../x", "2^-10", '"', "9" * 400]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
)


@st.composite
def damaged_table(draw: st.DrawFn) -> bytes:
    """A table as bytes that were damaged, or with some cells replaced."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged_bytes(TABLE.encode()))
    rows = [line.split(",") for line in TABLE.splitlines()]
    for _ in range(draw(st.integers(1, 3))):
        row = draw(st.integers(0, len(rows) - 1))
        rows[row][draw(st.integers(0, len(rows[row]) - 1))] = draw(CELLS)
    return "\n".join(",".join(row) for row in rows).encode()


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
