"""Losses that a program reports: rows, events and lines, while they are written and when nothing follows."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from damage import damaged_file, of_one_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboardX import SummaryWriter

from mupsweep.training.reported import EventReader, Keys, Lines, OutputReader, Reader, Reported, reader_of

KEYS = Keys("val_loss", "step")


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_rows_are_read_once_each_and_only_whole_lines(tmp_path: Path) -> None:
    reader, path = reader_of(tmp_path, "log.jsonl", KEYS), tmp_path / "log.jsonl"
    assert reader.read() == []
    append(path, '{"step": 1, "val_loss": 3.5}\n{"step": 2, "train_loss": 3}\n{"step": 2, "val_')
    assert reader.read() == [Reported(1, 3.5)]
    append(path, 'loss": 3.25}\nno json\n[1]\n{"step": 3, "val_loss": NaN}\n{"step": 4, "val_loss": null}\n')
    [second, third] = reader.read()
    assert second == Reported(2, 3.25)
    assert (third.step, math.isnan(third.loss)) == (3, True)
    append(path, '{"step": 5, "val_loss": "3"}')
    assert reader.read() == []
    assert reader.read(ended=True) == [Reported(5, 3.0)]


def test_a_file_that_was_begun_anew_is_read_from_its_start(tmp_path: Path) -> None:
    reader, path = reader_of(tmp_path, "{dir}/log.jsonl", KEYS), tmp_path / "log.jsonl"
    append(path, "".join(json.dumps({"step": step, "val_loss": 3}) + "\n" for step in range(5)))
    assert len(reader.read()) == 5
    path.write_text('{"step": 4, "val_loss": 2}\n')
    assert reader.read() == [Reported(4, 2.0)]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_columns_of_csv(separator: str, tmp_path: Path) -> None:
    reader = reader_of(tmp_path, "log.csv", Keys("val_loss", "step", "loss"))
    rows = ["step,loss,val_loss", "10,3.5,", "20,3.0,3.25", "30,inf,nan"]
    append(tmp_path / "log.csv", "\n".join(rows).replace(",", separator) + "\n")
    [first, lost] = reader.read()
    assert first == Reported(20, 3.25, 3.0)
    assert (lost.step, math.isnan(lost.loss), lost.train_loss) == (30, True, math.inf)


def test_keys_may_be_paths_and_steps_may_be_counted(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, "log.jsonl", Keys("eval.loss", None))
    append(tmp_path / "log.jsonl", '{"eval": {"loss": 2}}\n{"eval": {}}\n{"eval.loss": 1}\n')
    assert reader.read() == [Reported(1, 2.0), Reported(2, 1.0)]


def test_a_pattern_of_names_stands_for_the_newest_file(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, "*/log.jsonl", KEYS)
    (tmp_path / "today").mkdir()
    append(tmp_path / "today" / "log.jsonl", '{"step": 1, "val_loss": 3}\n')
    assert reader.read() == [Reported(1, 3.0)]


def test_scalars_of_tensorboard_are_read_from_every_file_once(tmp_path: Path) -> None:
    reader = reader_of(tmp_path, "tb", Keys("val/loss", "step", "train/loss"))
    assert isinstance(reader, EventReader)
    writer = SummaryWriter(logdir=str(tmp_path / "tb" / "run"))
    writer.add_scalar("train/loss", 3.5, 10)
    writer.add_scalar("val/loss", 3.25, 10)
    writer.close()
    assert reader.read() == [Reported(10, 3.25, 3.5)]
    resumed = SummaryWriter(logdir=str(tmp_path / "tb" / "resumed"))
    resumed.add_scalar("val/loss", math.nan, 20)
    resumed.close()
    [lost] = reader.read(ended=True)
    assert (lost.step, math.isnan(lost.loss)) == (20, True)


def test_an_event_that_is_not_yet_whole_is_left_for_later(tmp_path: Path) -> None:
    writer = SummaryWriter(logdir=str(tmp_path / "whole"))
    writer.add_scalar("val_loss", 2.0, 1)
    writer.close()
    [path] = (tmp_path / "whole").iterdir()
    content, growing = path.read_bytes(), tmp_path / "growing" / path.name
    growing.parent.mkdir()
    reader = reader_of(tmp_path, "growing", KEYS)
    found = []
    for end in range(len(content) + 1):
        growing.write_bytes(content[:end])
        found += reader.read()
    assert found == [Reported(1, 2.0)]


def test_lines_of_output_by_a_pattern(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    append(log, "step 0: val loss 9.0\n")
    pattern = re.compile(r"step (?P<step>\d+): (train loss (?P<train_loss>\S+), )?val loss (?P<loss>\S+)")
    reader = OutputReader(Lines(log, log.stat().st_size), pattern)
    append(log, "step 10: train loss 3.5, val loss 3.25\niter 11: loss 3\n 50%\rstep 20: val loss nan\r")
    [first, lost] = reader.read()
    assert first == Reported(10, 3.25, 3.5)
    assert (lost.step, math.isnan(lost.loss)) == (20, True)
    reader = OutputReader(Lines(log), re.compile(r"loss (?P<loss>[\d.]+)"))
    assert reader.read(ended=True) == [Reported(1, 9.0), Reported(2, 3.5), Reported(3, 3.0)]


def test_a_reader_says_why_it_found_nothing(tmp_path: Path) -> None:
    def complaint(reader: Reader) -> str:
        assert reader.read(ended=True) == []
        return reader.complaint()

    assert complaint(reader_of(tmp_path, "log.jsonl", KEYS)) == (
        "it wrote no trainer.metrics=log.jsonl under {dir}, nor anything else"
    )
    append(tmp_path / "metrics.jsonl", '{"step": 1, "loss/val": 3}\n')
    assert complaint(reader_of(tmp_path, "log.jsonl", KEYS)).endswith("under {dir}, but metrics.jsonl")
    assert complaint(reader_of(tmp_path, "metrics.jsonl", KEYS)) == (
        "metrics.jsonl has no trainer.loss=val_loss; did you mean 'loss/val'? valid: loss/val, step"
    )
    assert complaint(reader_of(tmp_path, "metrics.jsonl", Keys("loss/val", "iter"))) == (
        "metrics.jsonl has no trainer.step=iter; did you mean 'step'? valid: loss/val, step"
    )
    assert complaint(reader_of(tmp_path, "tb", KEYS)) == (
        f"it wrote no TensorBoard events under {tmp_path}/tb (trainer.metrics)"
    )
    append(tmp_path / "out", "hello\n")
    assert complaint(OutputReader(Lines(tmp_path / "out"), re.compile("loss (?P<loss>.*)"))) == (
        "no line of its output has trainer.pattern=loss (?P<loss>.*); its last line was 'hello'"
    )


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Losses of ten steps in every format."""
    folder = tmp_path_factory.mktemp("logs")
    rows = [{"step": step, "val_loss": 3.0 + 1 / step} for step in range(1, 11)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "log.csv").write_text("step,val_loss\n" + "".join(f"{r['step']},{r['val_loss']}\n" for r in rows))
    writer = SummaryWriter(logdir=str(folder / "tb"))
    for row in rows:
        writer.add_scalar("val_loss", row["val_loss"], row["step"])
    writer.close()
    (path,) = (folder / "tb").iterdir()
    path.rename(folder / "events.tfevents")
    return folder


@pytest.mark.parametrize("name", ["log.jsonl", "log.csv", "events.tfevents"])
@given(draws=st.data())
@settings(of_one_folder, max_examples=40)
def test_of_a_damaged_log_the_rows_are_read_that_are_whole(
    name: str, logs: Path, tmp_path: Path, draws: st.DataObject
) -> None:
    (tmp_path / name).write_bytes(draws.draw(damaged_file(logs / name)))
    for row in reader_of(tmp_path, name, KEYS).read(ended=True):
        assert 0 <= row.step <= 10**18
        assert isinstance(row.loss, float)
