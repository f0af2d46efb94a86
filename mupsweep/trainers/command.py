"""A program of the user's per run: placeholders of its command line are filled, its losses read while it runs."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mupsweep.analysis.labels import DIVERGED, DONE
from mupsweep.atomic_files import make_folder, write_json
from mupsweep.errors import ConfigError, RecordError
from mupsweep.formatting import duration, nearest
from mupsweep.store.run_dir import RUNNING, RunDir
from mupsweep.sweep.settings import run_config, run_recipe
from mupsweep.training import program, reported
from mupsweep.training.divergence import diverged_at
from mupsweep.training.program import Program
from mupsweep.training.reported import Keys, Lines, OutputReader, Reader, Reported
from mupsweep.training.signals import LeaseLost, StopRequested

if TYPE_CHECKING:
    from mupsweep.store.sweep_dir import SweepDir
    from mupsweep.sweep.run_spec import RunSpec
    from mupsweep.training.signals import StopSignal
    from mupsweep.training.slot import Slot
    from mupsweep.training.worker import LeaseControl, Session

PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([A-Za-z_][\w.]*)\}")
RESUME = "resume"
NUMBERS = ("lr", "init_std", "multiplier", "weight_decay", "eps")  # that roles and tensors have
OF_LR = ("lr", "log2_lr", "recipe")  # placeholders, or their first parts, that depend on the LR
POLL_SECONDS = 0.05  # between two looks at a program; its end is noticed at once
READ_SECONDS = 0.5  # between two looks at what it reports
TAIL_LINES, TAIL_LENGTH = 3, 300  # of a program's output, in the message of its failure


@dataclass(frozen=True)
class Command:
    """A program per run, in a process group of its own.

    Attributes:
        command: its command line with placeholders, as text, which is split as a shell would, or as a list.
        metrics: the file or folder under its folder that holds its losses.
        pattern: a regular expression that finds its losses in its output.
        loss, step, train_loss: what the values are called there.
        resume: what {resume} stands for when the run was begun before.
        checkpoint: a file, or a pattern of files, under its folder without which it cannot go on.
        cwd: the folder that it runs in.
        shell: whether a shell runs it.
        timeout: seconds that a run may take.
        silence: seconds that a run may print and log nothing.
        grace: seconds that it has to end by itself when it is stopped.
    """

    name: str = "command"
    command: Any = None
    metrics: str | None = None
    pattern: str | None = None
    loss: str = "val_loss"
    step: str | None = "step"
    train_loss: str | None = None
    resume: str = "{dir}"
    checkpoint: str | None = None
    cwd: str | None = None
    shell: bool = False
    timeout: float | None = None
    silence: float | None = None
    grace: float = 30.0

    starts: ClassVar[tuple[str, ...]] = ("command",)

    def __post_init__(self) -> None:
        is_list = isinstance(self.command, list | tuple)
        if not self.command or not (is_list or isinstance(self.command, str)):
            raise ConfigError(
                "trainer.command=null: give the command line of your program, such as "
                "\"trainer.command='python train.py --lr {lr} --width {width} --out {dir}'\""
            )
        if is_list and (self.shell or not all(isinstance(word, str | int | float) for word in self.command)):
            raise ConfigError(
                f"trainer.command={list(self.command)}: a list holds plain arguments, and no shell; "
                "trainer.shell=true takes one text"
            )
        if (self.metrics is None) == (self.pattern is None):
            raise ConfigError(
                f"trainer.metrics={self.metrics or 'null'} and trainer.pattern={self.pattern or 'null'}: say where the "
                "loss is to be found, in one of them: trainer.metrics=log.jsonl, or "
                "\"trainer.pattern='step (?P<step>[0-9]+).* loss (?P<loss>[^ ]+)'\""
            )
        for key in ("timeout", "silence"):
            if (value := getattr(self, key)) is not None and value <= 0:
                raise ConfigError(f"trainer.{key}={value:g}: expected more than 0 seconds, or null for no limit")
        if self.grace < 0:
            raise ConfigError(f"trainer.grace={self.grace:g}: expected at least 0 seconds")
        self.words()
        self.resume_words()
        self.compiled()

    @property
    def runs_program(self) -> bool:
        return True

    def identity(self) -> Mapping[str, Any]:
        """The keys on which results depend; a change of any of them trains every run again."""
        keys = ("command", "shell", "metrics", "pattern", "loss", "step")
        return {key: getattr(self, key) for key in keys}

    def words(self) -> list[str]:
        """The command's arguments before placeholders are filled; one text where a shell splits it."""
        if not isinstance(self.command, str):
            return [str(word) for word in self.command]
        return [self.command] if self.shell else split(self.command, "command")

    def can_resume(self, output: Path) -> bool:
        """Whether the program can go on from what an earlier attempt left in its folder."""
        if not output.is_dir() or not any(f"{{{RESUME}}}" in word for word in self.words()):
            return False
        return self.checkpoint is None or any(output.glob(self.checkpoint))

    def resume_words(self) -> list[str]:
        return split(self.resume, "resume")

    def compiled(self) -> re.Pattern[str] | None:
        """The pattern of losses, if there is one."""
        if self.pattern is None:
            return None
        try:
            pattern = re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"trainer.pattern={self.pattern} is no regular expression: {error}") from error
        if "loss" not in pattern.groupindex:
            raise ConfigError(f"trainer.pattern={self.pattern}: name the group of the loss, as (?P<loss>[0-9.]+)")
        return pattern

    def reader(self, folder: RunDir, log: Lines) -> Reader:
        """What reads the losses of a run.

        Args:
            log: the lines that the program prints.
        """
        pattern = self.compiled()
        if pattern is not None:
            return OutputReader(log, pattern)
        assert self.metrics is not None
        return reported.reader_of(folder.output, self.metrics, Keys(self.loss, self.step, self.train_loss))

    def check(self, runs: Iterable[RunSpec]) -> None:
        """Fill the command of a run of every size, and refuse one that is the same for different runs."""
        runs = list(runs)
        folder = RunDir(Path(runs[0].run_id).absolute())
        for run in {run.size: run for run in runs}.values():
            self.arguments(run, folder, again=False)
            self.arguments(run, folder, again=True)
        if self.metrics is not None:
            self.reader(folder, Lines(folder.log_path))
        names = {name.partition(".")[0] for word in self.words() for name in PLACEHOLDER.findall(word)}
        per_size = {name for word in self.words() for name in PLACEHOLDER.findall(word)} - {
            *("lr", "log2_lr", "seed", "tokens", "steps", "warmup_steps", "batch_size", "dir", "run_id", RESUME)
        }
        for what, several, given, advice in (
            ("LRs", len({run.log2_lr for run in runs}) > 1, names & set(OF_LR), "{lr}"),
            ("sizes", len({run.size for run in runs}) > 1, per_size, "{width}"),
            ("seeds", len({run.seed for run in runs}) > 1, names & {"seed", "recipe"}, "{seed}"),
        ):
            if several and not given:
                raise ConfigError(
                    f"trainer.command is the same for all {what} of the sweep: it names neither {advice} nor {{recipe}}"
                )

    def arguments(
        self, run: RunSpec, folder: RunDir, again: bool, recipe: Mapping[str, Any] | None = None
    ) -> list[str]:
        """The command line of a run.

        Args:
            again: whether the run was begun before.
            recipe: of the run, where it is solved already.

        Raises:
            ConfigError: a placeholder that does not exist, or stands for several numbers.
        """
        values = placeholders(run, folder, recipe or run_recipe(run))
        resume = [fill(word, values) for word in self.resume_words()] if again else []
        if self.shell:
            quoted = {name: shlex.quote(as_text(value, name)) for name, value in values.items()}
            text = fill(self.command, {**quoted, RESUME: shlex.join(resume)})
            return ["/bin/sh", "-c", text]
        filled: list[str] = []
        for word in self.words():
            # alone it stands for any number of arguments, also for none
            filled += resume if word == f"{{{RESUME}}}" else [fill(word, {**values, RESUME: " ".join(resume)})]
        return filled

    def work(self, sweep: SweepDir, slot: Slot, stop: StopSignal, take_runs: Callable[[Session], bool]) -> bool:
        """Take runs, unless this process is another rank of mupsweep's own trainer."""
        if int(os.environ.get("RANK", 0)) != 0:
            return True
        return take_runs(ProgramSession(self, slot.device))


def split(text: str, key: str) -> list[str]:
    """The arguments in a text, as a shell would split it."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"trainer.{key}={text}: {error}, so it cannot be split into arguments") from error


def fill(word: str, values: Mapping[str, Any]) -> str:
    """A word with its placeholders replaced; {{ and }} stand for braces."""

    def replacement(match: re.Match[str]) -> str:
        name = match[1]
        if name is None:
            return match[0][0]
        if name not in values:
            family = name.partition(".")[0]
            listed = [known for known in values if "." not in known or ("." in name and known.startswith(family))]
            raise ConfigError(
                f"trainer.command: no placeholder {{{name}}}; {nearest(name, listed)}; {{{{ and }}}} are plain braces"
            )
        return as_text(values[name], name)

    return PLACEHOLDER.sub(replacement, word)


def as_text(value: Any, name: str) -> str:
    """A value as an argument: whole numbers without, all others with a point, as every language reads them."""
    if isinstance(value, tuple):
        numbers = ", ".join(as_text(number, name) for number in value[:4])
        raise ConfigError(
            f"trainer.command: {{{name}}} is several numbers ({numbers}): name a tensor, as {{lr.mlp.up}}, or read "
            "them from {recipe}"
        )
    text = str(value)
    return text.replace("e", ".0e") if isinstance(value, float) and "e" in text and "." not in text else text


def placeholders(run: RunSpec, folder: RunDir, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> value of every placeholder but {resume}; a tuple where tensors of a role have different numbers."""
    shape, training = recipe["target"], recipe["training"]
    values: dict[str, Any] = {
        "lr": run.base_lr,
        "log2_lr": run.log2_lr,
        **{key: shape[key] for key in ("width", "depth", "heads", "kv_heads", "head_dim", "ffn_width", "context")},
        "width_ratio": run.size.width_ratio,
        "depth_ratio": run.size.depth_ratio,
        "size": run.size.label or run.size.name,
        "seed": run.seed,
        **{key: training[key] for key in ("tokens", "steps", "warmup_steps", "batch_size")},
        **{key: recipe[key] for key in ("block_multiplier", "output_multiplier", "attention_scale")},
        "run_id": run.run_id,
        "dir": str(folder.output.absolute()),
        "recipe": str(folder.recipe_path.absolute()),
    }
    numbers: dict[str, dict[float, None]] = {}
    for tensor in recipe["tensors"]:
        for key in NUMBERS:
            for group in (tensor["role"], stem(tensor["name"])):
                numbers.setdefault(f"{key}.{group}", {})[tensor[key]] = None
    for name, found in numbers.items():
        values[name] = tuple(found) if len(found) > 1 else next(iter(found))
    return values


def stem(name: str) -> str:
    """A tensor's name without its block's number: blocks.3.mlp.up.weight is mlp.up."""
    return re.sub(r"^blocks\.\d+\.", "", name).removesuffix(".weight")


@dataclass
class ProgramSession:
    """Runs programs on the devices of a slot, one after the other."""

    trainer: Command
    device: str

    def prepare(self, run: RunSpec) -> None:
        pass

    def tidy(self) -> None:
        pass

    def failure_message(self, error: Exception, run: RunSpec) -> str:
        from mupsweep.training.worker import one_line

        return one_line(error)

    def train(self, run: RunSpec, folder: RunDir, control: LeaseControl) -> dict[str, Any]:
        trainer = self.trainer
        program.end_earlier(folder.process_path)
        again = trainer.can_resume(folder.output)
        if not again:  # what an attempt that cannot go on left behind must not be taken for this one's
            shutil.rmtree(folder.output, ignore_errors=True)
            folder.write_metrics([])
        make_folder(folder.output)
        recipe = run_recipe(run)
        write_json(folder.recipe_path, recipe, durable=False)
        folder.write_rules(run_config(run))
        arguments = trainer.arguments(run, folder, again, recipe)
        environment = program.visible_devices(self.device, os.environ)
        with folder.log_path.open("ab") as log:
            output = Lines(folder.log_path, offset=log.seek(0, os.SEEK_END))
            followed = Followed(trainer, run, folder, output.offset, trainer.reader(folder, output))
            with program.started(
                arguments, environment, trainer.cwd, log, folder.process_path, trainer.grace
            ) as process:
                followed.follow(process, control)
        return followed.summary(process, self.device)


class Followed:
    """A running program, and what it has reported so far.

    Attributes:
        rows: its losses, in order of steps; those of an attempt that it goes on from included.
    """

    def __init__(self, trainer: Command, run: RunSpec, folder: RunDir, log_start: int, reader: Reader) -> None:
        self.trainer, self.run, self.folder, self.reader, self.log_start = trainer, run, folder, reader, log_start
        self.tokens_per_step = run.resolved.training.batch_size * run.size.context
        self.rows = [Reported(r["step"], r["val_loss"], r.get("train_loss")) for r in folder.metrics()]
        self.first_step = self.rows[-1].step if self.rows else 0
        self.started = self.last_sign = time.monotonic()
        self.position = (0, 0)

    def follow(self, process: Program, control: LeaseControl) -> None:
        """Record what the program reports until it ends, its loss is lost, or it is stopped.

        Raises:
            StopRequested: `control` asked to stop, and the program was ended.
            RecordError: the program took too long, or was silent too long.
        """
        next_read = 0.0
        while not process.wait(POLL_SECONDS):
            if control.lease_lost():
                raise LeaseLost
            if control.stop_requested():
                process.stop()
                raise StopRequested
            if time.monotonic() >= next_read:
                self.record(self.reader.read())
                next_read = time.monotonic() + READ_SECONDS
                self.check_limits()
            if self.rows and not math.isfinite(self.rows[-1].loss):
                break  # a lost loss is a result, and the rest of the run would be wasted
        process.stop()  # before the last look, so that nothing can follow it
        self.record(self.reader.read(ended=True))

    def record(self, new: Sequence[Reported]) -> None:
        """Add rows to the run's metrics, and show the last one in its status.

        Rows that come again, as after a resumption from a checkpoint, replace those from their step on.
        """
        if not new:
            return
        kept = len(self.rows)
        merged = list(self.rows)
        for row in new:
            while merged and merged[-1].step >= row.step:
                merged.pop()
                kept = min(kept, len(merged))
            merged.append(row)
        if kept < len(self.rows):
            self.folder.write_metrics(map(self.columns, merged))
        else:
            for row in merged[kept:]:
                self.folder.append_metrics(self.columns(row))
        self.rows = merged
        last = self.rows[-1]
        self.folder.write_status(
            RUNNING,
            durable=False,
            step=last.step,
            steps=self.run.resolved.steps,
            train_loss=last.loss if last.train_loss is None else last.train_loss,
            tokens_per_second=self.tokens_per_second(),
        )

    def columns(self, row: Reported) -> dict[str, Any]:
        """A row of metrics.jsonl."""
        columns: dict[str, Any] = {"step": row.step, "tokens": row.step * self.tokens_per_step, "val_loss": row.loss}
        return columns if row.train_loss is None else {**columns, "train_loss": row.train_loss}

    def tokens_per_second(self) -> float:
        """The speed of this attempt."""
        steps = self.rows[-1].step - self.first_step
        return max(0, steps) * self.tokens_per_step / max(1e-9, time.monotonic() - self.started)

    def check_limits(self) -> None:
        """Raise RecordError where the program takes too long or gives no sign of life."""
        now, trainer = time.monotonic(), self.trainer
        position = self.reader.position(), self.folder.log_path.stat().st_size
        if position != self.position:
            self.position, self.last_sign = position, now
        if trainer.timeout is not None and now - self.started > trainer.timeout:
            raise RecordError(f"stopped after {duration(trainer.timeout)} (trainer.timeout); {self.tail()}")
        if trainer.silence is not None and now - self.last_sign > trainer.silence:
            raise RecordError(
                f"stopped after {duration(trainer.silence)} without output or a loss (trainer.silence); {self.tail()}"
            )

    def summary(self, process: Program, device: str) -> dict[str, Any]:
        """The run's summary.json.

        Raises:
            RecordError: the program failed, or reported no loss.
        """
        bad_row = next((row for row in self.rows if not math.isfinite(row.loss)), None)
        if bad_row is None and process.code != 0:
            how = f"exit code {process.code}"
            if process.code is not None and process.code < 0:
                how = program.signal.Signals(-process.code).name
            raise RecordError(f"the program ended with {how}; {self.tail()}")
        if not self.rows:
            raise RecordError(f"the program ended without a loss: {self.reader.complaint()}")
        losses, training = [row.loss for row in self.rows], self.run.resolved.training
        bad = diverged_at(losses, training.divergence_patience, len(losses))
        last = bad_row or self.rows[-1]
        lost = bad is not None
        steps = last.step if self.trainer.step is not None and last.step > 0 else self.run.resolved.steps
        return {
            "run_id": self.run.run_id,
            **self.run.label_columns(),
            "status": DIVERGED if lost else DONE,
            "steps": steps,
            "tokens": steps * self.tokens_per_step if lost else self.run.cost.tokens,
            "train_loss": last.train_loss,
            "val_loss": None if lost else last.loss,
            "val_bits_per_byte": None,
            "diverged_at_step": last.step if lost else None,
            "seconds": time.monotonic() - self.started,
            "tokens_per_second": self.tokens_per_second(),
            "device": device.partition(":")[0],
            "devices": len(device.split(",")),
            "precision": None,
        }

    def tail(self) -> str:
        """The last lines that the program printed."""
        with self.folder.log_path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self.log_start, size - 10 * TAIL_LENGTH))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
        last = " | ".join([line for line in lines if line][-TAIL_LINES:])
        return f"its last lines: {reported.shortened(last, TAIL_LENGTH)}" if last else "it printed nothing"
