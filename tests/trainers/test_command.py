"""trainer=command: programs are started with the numbers of their run, watched, stopped, and judged by their losses."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from forked import Forked
from polling import DEADLINE, until

from mupsweep.errors import ConfigError
from mupsweep.store.lease import process_start_time
from mupsweep.store.run_dir import FAILED, RUNNING, RunDir
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.config import load
from mupsweep.training.program import visible_devices

Cli = Callable[..., tuple[int, str, str]]

ONE = ["sweep.width_ratios=[1]", "sweep.log2_lrs=[-8]"]
BASE = ["trainer=command", "sweep.name=mine", "launcher=inline", "data.tokenizer=bytes"]
# A bowl over log2 LR; a run goes on from its folder, logs every step, and waits at step 5 until it may go on.
PROGRAM = """
import json, math, pathlib, sys, time
lr, width, seed, folder = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), pathlib.Path(sys.argv[4])
state, log, first = folder / "state", folder / "log.jsonl", 0
if "--resume" in sys.argv:
    first = int(state.read_text())
(folder / "starts").open("a").write(f"{first}\\n")
for step in range(first, 10):
    loss = 3 + 0.05 * (math.log2(lr) + 8) ** 2 + 0.1 * math.exp(-step) + 0.001 * seed
    with log.open("a") as file:
        file.write(json.dumps({"step": step + 1, "val_loss": loss}) + "\\n")
    state.write_text(str(step + 1))
    while step == 4 and not pathlib.Path("go").exists():
        time.sleep(0.01)
"""


def command(*words: str) -> str:
    """The override that starts these words."""
    return "trainer.command=" + shlex.join(words)


def shell(text: str) -> str:
    """The override that has a shell run a text, whose first argument is {dir}; the LR is named, and not used."""
    return command("sh", "-c", text.replace("{", "{{").replace("}", "}}"), "{lr}", "{dir}")


@pytest.fixture
def program() -> list[str]:
    """The overrides of a sweep of PROGRAM."""
    Path("train.py").write_text(PROGRAM)
    words = (sys.executable, "train.py", "{lr}", "{width}", "{seed}", "{dir}", "{resume}")
    return [*BASE, command(*words), "trainer.metrics=log.jsonl", "trainer.resume=--resume"]


def planned(*overrides: str) -> tuple[SweepDir, RunDir]:
    """A sweep of one run that is planned, and its run."""
    sweep, runs = plan.save(load([*BASE, *overrides]), "")
    assert len(runs) == 1
    return sweep, sweep.run(runs[0].run_id)


def trained(cli: Cli, *overrides: str) -> RunDir:
    """The run of a sweep of one run, as a worker leaves it that has nothing else to do."""
    sweep, run = planned(*ONE, *overrides)
    if run.status()["status"] == FAILED:  # as `mupsweep run` does for another try
        run.write_status("pending")
    code, _, err = cli("worker", str(sweep.path), "--device", "cpu", "--allow-imports")
    assert code == 0, err
    return run


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


# A sweep from its command to a recipe.


@pytest.fixture(scope="module")
def bowl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished sweep over three widths."""
    from command_line import mupsweep

    folder = tmp_path_factory.mktemp("bowl")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        Path("train.py").write_text(PROGRAM)
        Path("go").touch()
        words = (sys.executable, "train.py", "{lr}", "{width}", "{seed}", "{dir}")
        first, *others = (
            "{width:128,depth:4,heads:2,name:small}",
            *(f"{{width:{64 * h},depth:4,heads:{h}}}" for h in (4, 8)),
        )
        overrides = [command(*words), "trainer.metrics=log.jsonl", "sweep.log2_lrs=[-10,-9,-8,-7,-6]"]
        overrides += [f"sweep.sizes=[{','.join([first, *others])}]", "parametrization=mup", "optimizer=muon"]
        code, _, err = mupsweep("run", *BASE, *overrides, "tracker=tensorboard")
        assert code == 0, err
    return folder / "sweeps" / "mine"


def test_a_sweep_of_programs_has_a_verdict(bowl: Path) -> None:
    [group] = json.loads((bowl / "results" / "transfer.json").read_text())["groups"]
    assert group["verdict"] == "transfers"
    assert [size["width"] for size in group["sizes"]] == [128, 256, 512]
    for size in group["sizes"]:
        assert size["log2_lr_optimum"] == pytest.approx(-8.0, abs=0.1)
        assert size["loss_optimum"] == pytest.approx(3.0, abs=0.01)


def test_a_run_leaves_its_losses_and_its_numbers(bowl: Path) -> None:
    sweep = SweepDir(bowl)
    row = next(row for row in sweep.read_plan() if row["width"] == 128 and row["log2_lr"] == -8)
    assert row["size"] == "small"
    assert "flops" not in row
    run = sweep.run(row["run_id"])
    summary = run.summary()
    assert summary is not None
    loss = 3 + 0.1 * math.exp(-9)
    assert summary["val_loss"] == pytest.approx(loss)
    assert (summary["status"], summary["steps"], summary["tokens"]) == ("done", 10, row["tokens"])
    rows = run.metrics()
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert rows[-1] == {"step": 10, "tokens": 10 * 8 * 1024, "val_loss": loss}
    assert lines(run.output / "starts") == ["0"]
    assert not run.process_path.exists()
    assert (bowl / "trackers" / "tensorboard" / run.run_id).is_dir()


def test_a_recipe_for_a_target_has_the_numbers_that_runs_were_given(bowl: Path, cli: Cli) -> None:
    """A program reads a run's recipe; what it is handed at a target is the same document, solved for another size."""
    code, out, err = cli("transfer", str(bowl), "--to", "width=512", "--json")
    assert code == 0, err
    [target] = json.loads(out)
    sweep = SweepDir(bowl)
    row = next(row for row in sweep.read_plan() if row["width"] == 512 and row["log2_lr"] == -8)
    given = json.loads(sweep.run(row["run_id"]).recipe_path.read_text())
    assert given["base_lr"] == 2**-8
    scale = target["base_lr"] / given["base_lr"]
    assert given.keys() - {"run_id", "seed"} <= target.keys()
    for key in ("target", "base", "block_multiplier", "output_multiplier", "attention_scale", "training", "optimizers"):
        assert given[key] == target[key]
    assert len(given["tensors"]) == len(target["tensors"]) > 20
    for mine, theirs in zip(given["tensors"], target["tensors"], strict=True):
        assert theirs["lr"] == pytest.approx(scale * mine["lr"])
        same = {key: value for key, value in mine.items() if key not in ("lr", "decay_per_step")}
        assert same == {key: theirs[key] for key in same}


def test_what_is_finished_is_not_started_again_and_a_longer_grid_fills_the_holes(program: list[str], cli: Cli) -> None:
    Path("go").touch()
    assert cli("run", *program, *ONE)[0] == 0
    assert cli("run", *program, *ONE, "sweep.log2_lrs=[-8,-7]")[0] == 0
    starts = [lines(path) for path in Path("sweeps/mine/runs").glob("*/output/starts")]
    assert starts == [["0"], ["0"]]


# Placeholders.


def filled(*overrides: str) -> list[str]:
    """The command line of the only run of these overrides."""
    [run] = plan.plan(load([*BASE, "trainer.metrics=log.jsonl", *ONE, *overrides]))
    trainer: Any = run.resolved.trainer
    return trainer.arguments(run, RunDir(Path("/runs/one")), again=False)


def test_placeholders_are_the_numbers_of_the_run() -> None:
    names = (
        *("lr", "log2_lr", "width", "depth", "heads", "width_ratio", "depth_ratio", "seed", "tokens", "steps"),
        *("batch_size", "dir", "recipe", "size"),
    )
    overrides = command("train", *(f"{{{name}}}" for name in names)), "sweep.width_ratios=[2]", "sweep.seeds=[3]"
    assert filled(*overrides)[1:] == [
        *("0.00390625", "-8.0", "512", "4", "8", "2.0", "1.0", "3", "8192000", "1000"),
        *("8", "/runs/one/output", "/runs/one/recipe.json", "w512-d4"),
    ]


def test_placeholders_of_roles_and_tensors_are_what_the_rules_solve() -> None:
    names = ("lr.hidden", "init_std.hidden", "multiplier.output", "weight_decay.mlp.up", "eps.input", "lr.head")
    words = filled(
        command("train", *(f"{{{name}}}" for name in names)),
        *("sweep.width_ratios=[4]", "parametrization=mup", "optimizer.weight_decay=0.1", "optimizer.eps=1e-8"),
    )
    # muP for AdamW at width ratio 4: hidden LR / 4, init std / 2, logits / 4, coupled decay * 4
    lr, std, multiplier, decay, eps, head = map(float, words[1:])
    assert (lr, std, multiplier, decay, head) == (2**-10, 0.01, 0.25, 0.4, 2**-8)
    assert eps == pytest.approx(2.5e-9)
    assert "e-09" in words[5]
    assert "." in words[5]


def test_values_are_arguments_and_braces_can_be_written() -> None:
    assert filled(command("train", "a b", "{{lr}}", "--x={lr} {seed}", "$(echo {lr})")) == [
        *("train", "a b", "{lr}", "--x=0.00390625 0", "$(echo 0.00390625)")
    ]
    assert filled("trainer.command=[train,--lr,'{lr}',3,'a b']") == ["train", "--lr", "0.00390625", "3", "a b"]


def test_a_shell_runs_a_command_only_where_it_is_named_and_gets_quoted_values() -> None:
    words = filled("trainer.command='cd sub && train {lr} {dir} > $LOG'", "trainer.shell=true")
    assert words == ["/bin/sh", "-c", "cd sub && train 0.00390625 /runs/one/output > $LOG"]
    overrides = ["trainer.metrics=x.csv", *ONE, "trainer.command='train {dir}'", "trainer.shell=true"]
    [run] = plan.plan(load([*BASE, *overrides]))
    trainer: Any = run.resolved.trainer
    assert trainer.arguments(run, RunDir(Path("/a b")), again=False)[-1] == "train '/a b/output'"


# Keys and values that do not grow with the width: their LR is another than that of the other hidden matrices.
GROUPED = [
    *("model=llama", "model.kv_heads=2", "model.gqa_rule=fixed_kv_heads", "sweep.width_ratios=[4]"),
    *("parametrization=spectral", "optimizer=muon"),
]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([command("train", "{lrr}")], r"no placeholder \{lrr\}; did you mean 'lr'\? valid: .*batch_size"),
        ([command("train", "{lr.hiden}")], r"no placeholder \{lr.hiden\}; did you mean 'lr.hidden'\?"),
        ([command("train", "{lr.hidden}"), *GROUPED], r"is several numbers \(0.*: name a tensor, as {lr.mlp.up}"),
        ([command("train", "{width}"), "sweep.log2_lrs=[-8,-7]"], r"same for all LRs .* neither \{lr\} nor \{recipe\}"),
        ([command("train", "{lr}"), "sweep.width_ratios=[1,2]"], r"same for all sizes .* neither \{width\} nor"),
        ([command("train", "{lr}"), "sweep.seeds=[0,1]"], r"same for all seeds .* neither \{seed\} nor"),
        ([command("train", "{lr}"), "sweep.search=adaptive"], r"same for all seeds"),
        (["trainer.command=null"], r"trainer.command=null: give the command line"),
        (["trainer.command='train \"{lr}'"], r"No closing quotation"),
        (["trainer.command=[train,'{lr}']", "trainer.shell=true"], r"a list holds plain arguments, and no shell"),
        ([command("train", "{lr}"), "trainer.metrics=null"], r"say where the loss is"),
        ([command("train", "{lr}"), "trainer.pattern=a"], r"in one of them"),
        ([command("train", "{lr}"), "trainer.metrics=null", "trainer.pattern=loss"], r"name the group of the loss"),
        ([command("train", "{lr}"), "trainer.metrics=null", "trainer.pattern='(?P<loss>'"], r"no regular expression"),
        ([command("train", "{lr}"), "trainer.timeout=0"], r"trainer.timeout=0: expected more than 0 seconds"),
        (
            [command("train", "{lr}"), "sweep.search=adaptive", "sweep.max_seeds=1", "sweep.max_flops=1e12"],
            r"what a program costs is known only where every entry of sweep.sizes has parameters",
        ),
    ],
)
def test_a_command_that_cannot_be_right_is_refused_before_anything_is_started(
    overrides: Sequence[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        plan.plan(load([*BASE, *ONE, "trainer.metrics=log.jsonl", *overrides]))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("device", "outside", "inside"),
    [
        ("cuda:1", "", {"CUDA_VISIBLE_DEVICES": "1"}),
        ("cuda:1", "4,6", {"CUDA_VISIBLE_DEVICES": "6"}),
        ("cuda:0,cuda:1", "GPU-a,GPU-b", {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}),
        ("cpu", "4,6", {"CUDA_VISIBLE_DEVICES": ""}),
        ("auto", "4,6", {}),
    ],
)
def test_a_program_sees_the_devices_of_its_slot(device: str, outside: str, inside: dict[str, str]) -> None:
    assert visible_devices(device, {"CUDA_VISIBLE_DEVICES": outside}) == inside


# What programs come to.

ROW = """echo '{"step": 1, "val_loss": 3}' >> $1/log.jsonl"""
JSONL = "trainer.metrics=log.jsonl"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            "echo hello",
            [JSONL],
            "ended without a loss: it wrote no trainer.metrics=log.jsonl under {dir}, nor anything",
        ),
        ("touch $1/a.csv", [JSONL], "it wrote no trainer.metrics=log.jsonl under {dir}, but a.csv"),
        ("touch $1/log.jsonl", [JSONL], "log.jsonl holds no rows"),
        (ROW, [JSONL, "trainer.loss=loss"], "log.jsonl has no trainer.loss=loss; did you mean 'val_loss'? valid: step"),
        (
            ROW,
            [JSONL, "trainer.step=iter"],
            "log.jsonl has no trainer.step=iter; did you mean 'step'? valid: step, val_loss",
        ),
        (
            "echo 'loss: low'",
            ["trainer.pattern='loss=(?P<loss>.*)'"],
            "no line of its output has trainer.pattern=loss=(?P<loss>.*); its last line was 'loss: low'",
        ),
        (
            f"{ROW}; echo one; echo two; echo three; echo four; exit 3",
            [JSONL],
            "exit code 3; its last lines: two | three",
        ),
        (f"{ROW}; kill -SEGV $$", [JSONL], "the program ended with SIGSEGV; it printed nothing"),
        (f"{ROW}; echo full | cat > /dev/full", [JSONL], "No space left on device"),
        ("sleep 1000", [JSONL, "trainer.timeout=0.2"], "stopped after 0s (trainer.timeout); it printed nothing"),
        ("echo on; sleep 1000", [JSONL, "trainer.silence=0.3"], "without output or a loss (trainer.silence); its last"),
        (f"({ROW}) & exit 0", ["trainer.metrics=late.csv"], "it wrote no trainer.metrics=late.csv"),
    ],
)
def test_a_program_that_gives_no_loss_is_a_failed_run_with_one_line(
    text: str, overrides: list[str], message: str, cli: Cli
) -> None:
    run = trained(cli, shell(text), *overrides)
    status = run.status()
    assert status["status"] == FAILED
    assert message in status["error"]
    assert "\n" not in status["error"]
    assert run.summary() is None
    assert "Traceback" not in run.log_path.read_text()


def test_a_program_that_does_not_exist_is_named(cli: Cli) -> None:
    code, out, err = cli("run", *BASE, *ONE, command("no-such-trainer", "{lr}"), JSONL)
    assert code == 1
    assert "failed  trainer.command: cannot start no-such-trainer: No such file or directory  (see " in out
    assert "1 run failed, the first is w256-d4-lr-8.00-s0-" in err


def test_a_failed_run_is_tried_again_from_a_clean_folder(cli: Cli) -> None:
    text = f"{ROW}; test -e mended || exit 1; ls $1"
    assert trained(cli, shell(text), JSONL).status()["status"] == FAILED
    Path("mended").touch()
    run = trained(cli, shell(text), JSONL)
    assert run.status() == {"status": "done"}
    assert len(run.metrics()) == len(lines(run.output / "log.jsonl")) == 1


def rows_of(losses: Sequence[object]) -> str:
    """Shell code that logs losses from step 1 on."""
    rows = "".join(json.dumps({"step": step, "val_loss": loss}) + "\n" for step, loss in enumerate(losses, 1))
    return f"cat > $1/log.jsonl <<EOF\n{rows}EOF\n"


@pytest.mark.parametrize(
    ("losses", "after", "outcome"),
    [
        ([4.0, 3.0, 2.5], "", ("done", 2.5, 3, None)),
        ([4.0, 3.0, math.nan], "", ("diverged", None, 3, 3)),
        ([4.0, math.inf, 3.0], "", ("diverged", None, 2, 2)),
        ([4.0, 5.0, math.nan], "exit 1", ("diverged", None, 3, 3)),  # many trainers raise when a loss is lost
        ([4.0, "nan"], "sleep 1000", ("diverged", None, 2, 2)),  # and the rest would be wasted
        ([4.0, 3.0, 4.5], "", ("diverged", None, 3, 3)),
        ([4.0, 3.0, 4.1], "", ("done", 4.1, 3, None)),  # within 5 % of the first, as for mupsweep's own trainer
        ([4.0], "", ("done", 4.0, 1, None)),
    ],
)
def test_a_lost_loss_is_a_diverged_run(losses: list[object], after: str, outcome: tuple[object, ...], cli: Cli) -> None:
    run = trained(cli, shell(rows_of(losses) + after), JSONL)
    summary = run.summary()
    assert summary is not None, run.status()
    assert (summary["status"], summary["val_loss"], summary["steps"], summary["diverged_at_step"]) == outcome


def test_losses_come_from_output_by_a_pattern(cli: Cli) -> None:
    text = "echo 'step 10: train loss 3.5, val loss 3.25'; echo noise; echo 'step 20: train loss 3.1, val loss 3.0'"
    pattern = "trainer.pattern='step (?P<step>[0-9]+): train loss (?P<train_loss>.*), val loss (?P<loss>.*)'"
    run = trained(cli, shell(text), pattern)
    assert [(row["step"], row["train_loss"], row["val_loss"]) for row in run.metrics()] == [
        *((10, 3.5, 3.25), (20, 3.1, 3.0))
    ]


# How programs end.


def pids(folder: Path) -> list[int]:
    return [int(line) for line in lines(folder / "pids")]


def test_what_a_program_leaves_behind_is_killed(cli: Cli) -> None:
    text = f"{ROW}; sleep 1000 & echo $! > $1/pids; (trap '' TERM; sleep 1000) & echo $! >> $1/pids; exit 0"
    run = trained(cli, shell(text), JSONL)
    assert run.status() == {"status": "done"}
    assert len(pids(run.output)) == 2
    assert [process_start_time(pid) for pid in pids(run.output)] == [None, None]


def test_a_program_that_ignores_the_request_to_end_is_killed_with_all_that_it_started(cli: Cli) -> None:
    text = "trap '' TERM; echo $$ > $1/pids; setsid sleep 1000 & echo $! >> $1/pids; while :; do sleep 0.01; done"
    run = trained(cli, shell(text), JSONL, "trainer.timeout=0.5", "trainer.grace=0.1")
    assert "trainer.timeout" in run.status()["error"]
    assert len(pids(run.output)) == 2
    assert [process_start_time(pid) for pid in pids(run.output)] == [None, None]


def at_step_five(sweep: SweepDir, run: RunDir) -> Forked:
    """A worker whose program waits at step 5, and has been seen to."""
    worker = Forked("worker", str(sweep.path), "--device", "cpu", "--allow-imports")
    until(lambda: run.status().get("step") == 5, worker)
    return worker


def test_a_stopped_program_goes_on_from_its_folder(program: list[str], cli: Cli) -> None:
    sweep, run = planned(*program, *ONE)
    worker = at_step_five(sweep, run)
    assert run.status()["status"] == RUNNING
    assert run.status()["train_loss"] == pytest.approx(3 + 0.1 * math.exp(-4))
    owner = json.loads(run.process_path.read_text())["pid"]
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(DEADLINE) == 130
    assert run.status() == {"status": "pending"}
    assert process_start_time(owner) is None
    Path("go").touch()
    assert cli("worker", str(sweep.path), "--device", "cpu", "--allow-imports")[0] == 0
    assert lines(run.output / "starts") == ["0", "5"]
    assert [row["step"] for row in run.metrics()] == list(range(1, 11))
    assert run.status() == {"status": "done"}


def test_a_program_without_a_way_to_go_on_starts_anew(program: list[str], cli: Cli) -> None:
    overrides = [word.replace(" '{resume}'", "") for word in program]
    assert overrides != program
    sweep, run = planned(*overrides, *ONE)
    worker = at_step_five(sweep, run)
    worker.send_signal(signal.SIGINT)
    assert worker.wait(DEADLINE) == 130
    Path("go").touch()
    assert cli("worker", str(sweep.path), "--device", "cpu", "--allow-imports")[0] == 0
    assert lines(run.output / "starts") == ["0"]
    assert [row["step"] for row in run.metrics()] == list(range(1, 11))


def test_a_killed_worker_takes_its_program_along_and_nothing_is_lost(program: list[str], cli: Cli) -> None:
    sweep, run = planned(*program, *ONE)
    worker = at_step_five(sweep, run)
    owner = json.loads(run.process_path.read_text())["pid"]
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait(DEADLINE)
    until(lambda: process_start_time(owner) is None)  # its watch ends it
    Path("go").touch()
    assert cli("worker", str(sweep.path), "--device", "cpu", "--allow-imports")[0] == 0
    assert lines(run.output / "starts") == ["0", "5"]
    assert [row["step"] for row in run.metrics()] == list(range(1, 11))
    assert run.status() == {"status": "done"}


def test_a_program_that_was_killed_before_its_first_checkpoint_starts_anew(cli: Cli) -> None:
    text = f"ls $1 > $1/found; test $# = 1 || touch $1/resumed; {ROW}; test -e mended"
    overrides = [shell(text) + " '{resume}'", JSONL, "trainer.checkpoint='*.pt'"]
    assert trained(cli, *overrides).status()["status"] == FAILED
    assert trained(cli, *overrides).status()["status"] == FAILED
    run = trained(cli, *overrides)
    assert not (run.output / "resumed").exists()
    (run.output / "last.pt").touch()
    Path("mended").touch()
    assert trained(cli, *overrides).status() == {"status": "done"}
    assert (run.output / "resumed").exists()


def test_rows_that_come_again_after_a_resumption_replace_the_old_ones(cli: Cli) -> None:
    """A checkpoint is older than the last row, and the program logs into the same file again."""
    text = f"test -e $1/again || {{ {rows_of([4.0, 3.5, 3.0])} touch $1/again; exit 1; }}\n" + (
        """echo '{"step": 2, "val_loss": 3.4}' >> $1/log.jsonl; echo '{"step": 4, "val_loss": 2.5}' >> $1/log.jsonl"""
    )
    override = shell(text) + " '{resume}'"
    assert trained(cli, override, JSONL).status()["status"] == FAILED
    run = trained(cli, override, JSONL)
    assert [(row["step"], row["val_loss"]) for row in run.metrics()] == [(1, 4.0), (2, 3.4), (4, 2.5)]


def test_a_worker_that_starts_programs_imports_no_torch(program: list[str]) -> None:
    Path("go").touch()
    sweep, run = planned(*program, *ONE)
    script = (
        "import sys; from mupsweep.training.worker import execute; from mupsweep.store.sweep_dir import SweepDir; "
        "from mupsweep.training.slot import Slot; "
        f"execute(SweepDir.open({str(sweep.path)!r}, True), Slot(device='cpu')); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, run.status()) == ("False\n", {"status": "done"}), done.stderr


def test_a_job_of_several_nodes_starts_one_program_that_has_them_all(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = ["launcher=slurm", "launcher.nodes=2", "launcher.gpus=4", "launcher.devices_per_run=8"]
    cluster += ["launcher.max_array=100", "sweep.log2_lrs=[-9,-8]", "launcher.cpus=32"]
    words = ["srun", "--ntasks-per-node=1", "train", "{lr}"]
    code, script, err = cli("run", *BASE, *ONE, command(*words), JSONL, *cluster, "--dry-run")
    assert code == 0, err
    for option in ("nodes=2", "ntasks-per-node=1", "cpus-per-task=32", "gres=gpu:4", "array=0-1"):
        assert f"#SBATCH --{option}\n" in script
    worker = next(line for line in script.splitlines() if "mupsweep worker" in line and "--device" in line)
    assert "--device cuda:0,cuda:1,cuda:2,cuda:3 " in worker
    assert "--nodes" not in worker
    assert "--allow-imports" in worker
