"""The command line: help with examples, nothing heavy imported early, stable JSON, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import typer

import mupsweep
from mupsweep.analysis.labels import DIVERGED, DONE
from mupsweep.cli import app, was_interrupted
from mupsweep.store.run_dir import FAILED, RUNNING
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.config import load

DRAWN = 0.15  # octaves: two sizes of five LRs an octave apart tell no more

SMOKE = "experiment=smoke"
HEAVY = ("torch", "wandb", "matplotlib", "transformers", "scipy", "pyarrow", "tiktoken", "tokenizers")
LADDER = ["experiment=smoke", "sweep.width_ratios=[1,2]", "sweep.log2_lrs=[-10,-9,-8,-7,-6]", "sweep.seeds=[0,1]"]


def commands() -> list[tuple[str, ...]]:
    """Every command and sub-command of the app."""
    found = []

    def walk(command: object, path: tuple[str, ...]) -> None:
        children = getattr(command, "commands", None)
        if children is None:
            found.append(path)
            return
        for name, child in children.items():
            walk(child, (*path, name))

    walk(typer.main.get_command(app), ())
    return found


def test_the_commands_are_those_of_the_documentation() -> None:
    names = {path[0] for path in commands()}
    assert {"run", "transfer", "plan", "rules", "data", "status", "report", "worker"} <= names
    assert {path[1] for path in commands() if path[0] == "data"} == {"prepare", "list", "verify"}


def test_the_short_options_that_people_try_first(cli: Callable[..., tuple[int, str, str]]) -> None:
    assert cli("--version") == (0, f"{mupsweep.__version__}\n", "")
    for overrides in ((), ("run",), ("check",), ("check", "law")):
        assert cli(*overrides, "-h") == cli(*overrides, "--help")


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_has_help_with_an_example_of_itself(
    command: tuple[str, ...], cli: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, _ = cli(*command, "--help")
    assert code == 0
    text = " ".join(out.split())
    assert f"Usage: mupsweep {' '.join(command)}" in text
    example = re.search(r"Example: mupsweep ([^.]*)", text)
    assert example, text
    assert example[1].startswith(" ".join(command))
    assert len(text.split("Example:")[0]) > 60  # says what it does


def test_the_example_of_every_command_that_takes_overrides_composes() -> None:
    for command in commands():
        doc = typer.main.get_command(app)
        for name in command:
            doc = doc.commands[name]  # type: ignore[attr-defined]
        example = re.search(r"Example: mupsweep (.*)", doc.help or "")
        assert example
        overrides = [w for w in example[1].split() if re.fullmatch(r"[a-z_.]+=\S+", w)]
        if command[0] in ("run", "plan", "rules", "check", "data") and "data.path=my.jsonl" not in overrides:
            load(overrides)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["run", "--help"], ["plan", SMOKE], ["rules", SMOKE], ["status", "sweeps/smoke"]],
    ids=" ".join,
)
def test_a_command_that_trains_nothing_imports_nothing_heavy(arguments: list[str]) -> None:
    plan.save(load([SMOKE]), "")
    script = (
        "import sys\nfrom mupsweep.cli import main\n"
        f"sys.argv = ['mupsweep', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print('LOADED', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert [name for name in HEAVY if name in loaded] == []


def test_rules_as_json_have_the_documented_keys(cli: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = cli("rules", SMOKE, "optimizer=muon", "sweep.depth_ratios=[4]", "sweep.width_ratios=[4]", "--json")
    assert code == 0
    document = json.loads(out)
    assert {"model", "optimizer", "parametrization", "roles", "sizes"} <= set(document)
    assert [document[k] for k in ("model", "optimizer", "parametrization")] == ["nanogpt", "muon", "spectral"]
    assert set(document["roles"]) == {"input", "hidden", "output", "input_vector", "hidden_vector"}
    exponents = ("multiplier", "init_var", "lr", "weight_decay", "eps")
    for role in document["roles"].values():
        assert set(role) == {"optimizer", "thresholds", *exponents}
        for key in exponents:
            assert set(role[key]) == {"r_n", "r_L"}
            assert all(str(Fraction(text)) == text for text in role[key].values()), role[key]
    assert document["roles"]["hidden"]["optimizer"] == "muon"
    assert document["roles"]["hidden"]["multiplier"] == {"r_n": "0", "r_L": "-1"}
    (size,) = document["sizes"]
    assert {"width", "depth", "width_ratio", "depth_ratio", "tensors"} <= set(size)
    assert [size[k] for k in ("width", "depth", "width_ratio", "depth_ratio")] == [64, 8, 4.0, 4.0]
    numbers = ("init_std", "multiplier", "lr", "weight_decay", "decay_per_step", "eps")
    ratios = ("init_var_ratio", "multiplier_ratio", "lr_ratio", "weight_decay_ratio", "eps_ratio")
    for tensor in size["tensors"]:
        assert {"name", "role", "shape", "optimizer", *numbers, *ratios} <= set(tensor)
        assert all(isinstance(tensor[k], float) for k in (*numbers, *ratios)), tensor
        assert tensor["role"] in document["roles"]
    hidden = next(t for t in size["tensors"] if t["role"] == "hidden")
    assert hidden["multiplier_ratio"] == 0.25
    assert hidden["shape"] == [64, 64]


def test_tensors_whose_numbers_differ_in_the_last_bit_share_a_line(cli: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = cli("rules", SMOKE, "model.width=64", "sweep.width_ratios=[15.625]")
    lines = out.splitlines()
    assert (code, len(lines)) == (0, len({*lines}))
    assert sum(line.startswith("output ") for line in lines) == 2  # in symbols and in numbers


def test_rules_of_several_variants_are_a_list(cli: Callable[..., tuple[int, str, str]]) -> None:
    _, out, _ = cli("rules", SMOKE, "parametrization=sp,mup", "--json")
    assert [document["parametrization"] for document in json.loads(out)] == ["sp", "mup"]


def test_a_plan_as_json_has_exactly_the_documented_keys_and_writes_nothing(
    cli: Callable[..., tuple[int, str, str]],
) -> None:
    code, out, err = cli("plan", SMOKE, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert set(document) == {"runs", "search", "totals"}
    assert document["search"] == "grid"
    assert set(document["totals"]) == {"runs", "flops", "tokens", "seconds_estimate"}
    for run in document["runs"]:
        assert set(run) == {
            *("run_id", "width", "depth", "log2_lr", "seed", "parametrization", "optimizer", "model"),
            *("parameters", "tokens", "flops", "status"),
        }
        assert run["status"] == "pending"
    assert document["totals"]["runs"] == len(document["runs"]) == 6
    assert document["totals"]["tokens"] == 6 * 30 * 4 * 32
    assert document["totals"]["flops"] == sum(run["flops"] for run in document["runs"])
    assert list(Path().iterdir()) == []


def test_a_plan_shows_the_lrs_themselves_beside_their_octaves(cli: Callable[..., tuple[int, str, str]]) -> None:
    assert "base LRs: 3, 0.00391 to 0.0312 (2^-8 to 2^-5); seeds: 1" in cli("plan", SMOKE)[1]
    assert "base LRs: 1, 0.00391 (2^-8); seeds: 2" in cli("plan", SMOKE, "sweep.log2_lrs=[-8]", "sweep.seeds=[0,1]")[1]


def test_a_plan_knows_what_is_finished(cli: Callable[..., tuple[int, str, str]]) -> None:
    sweep, runs = plan.save(load([SMOKE]), "")
    trained(sweep, runs[0].run_id, 3.0)
    document = json.loads(cli("plan", SMOKE, "--json")[1])
    assert [run["status"] for run in document["runs"]] == [DONE, *["pending"] * 5]


def test_status_as_json_has_a_row_per_run_and_totals_per_state(cli: Callable[..., tuple[int, str, str]]) -> None:
    sweep, runs = plan.save(load([SMOKE]), "")
    for run, status in zip(runs, (DONE, DIVERGED, FAILED, RUNNING), strict=False):
        sweep.run(run.run_id).path.mkdir(parents=True)
        sweep.run(run.run_id).write_status(status, **({"error": "ouch"} if status == FAILED else {}))
        if status in (DONE, DIVERGED):
            sweep.run(run.run_id).write_summary({"status": status, "val_loss": 2.0 if status == DONE else None})
    code, out, _ = cli("status", "sweeps/smoke", "--json")
    assert code == 0
    document = json.loads(out)
    assert set(document) == {"runs", "totals"}
    assert document["totals"] == {"done": 1, "diverged": 1, "running": 0, "pending": 3, "failed": 1}
    assert [run["run_id"] for run in document["runs"]] == [run.run_id for run in runs]
    assert document["runs"][2]["error"] == "ouch"
    keys = {"run_id", "width", "depth", "log2_lr", "seed", "parametrization", "optimizer", "model", "status"}
    assert all(keys <= set(run) for run in document["runs"])
    code, out, _ = cli("status", "sweeps/smoke")
    assert "ouch" in out
    assert runs[2].run_id in out


def trained(sweep: SweepDir, run_id: str, loss: float) -> None:
    """Records of a run as if it had been trained."""
    row = next(row for row in sweep.read_plan() if row["run_id"] == run_id)
    run = sweep.run(run_id)
    run.path.mkdir(parents=True, exist_ok=True)
    names = ["model", "parametrization", "optimizer", "width", "depth", "width_ratio", "depth_ratio", "log2_lr", "seed"]
    run.write_summary(
        {
            "run_id": run_id,
            **{k: row[k] for k in names},
            "status": DONE,
            "steps": 30,
            "tokens": 3840,
            "train_loss": loss,
            "val_loss": loss,
            "val_bits_per_byte": loss,
            "diverged_at_step": None,
            "seconds": 1.0,
            "tokens_per_second": 3840.0,
            "device": "cpu",
            "precision": "fp32",
        }
    )
    run.write_status(DONE)


def ladder(optimum_at_twice_the_width: float) -> SweepDir:
    """A finished sweep of two widths, noiseless parabolas: the base's optimum is at -8."""
    sweep, runs = plan.save(load(LADDER), "")
    for run in runs:
        best = -8.0 if run.size.width_ratio == 1 else optimum_at_twice_the_width
        trained(sweep, run.run_id, 3.0 + 0.1 * (run.log2_lr - best) ** 2 + 1e-4 * run.seed)
    return sweep


def test_a_drift_exits_with_3_under_strict_and_with_0_otherwise(cli: Callable[..., tuple[int, str, str]]) -> None:
    sweep = ladder(optimum_at_twice_the_width=-9.0)
    code, out, err = cli("transfer", str(sweep.path), "--strict", "--json")
    (group,) = json.loads(out)["groups"]
    assert (group["verdict"], code) == ("drifts", 3), err
    assert group["total_drift"]["octaves"] == pytest.approx(-1.0, abs=DRAWN)
    assert group["drift"]["octaves_per_doubling"] == pytest.approx(-1.0, abs=DRAWN)
    assert cli("run", *LADDER, "--strict")[0] == 3  # nothing is left to train
    assert cli("run", *LADDER)[0] == 0


def test_a_transfer_exits_with_0_under_strict(cli: Callable[..., tuple[int, str, str]]) -> None:
    sweep = ladder(optimum_at_twice_the_width=-8.0)
    code, out, err = cli("transfer", str(sweep.path), "--strict", "--json")
    assert (json.loads(out)["groups"][0]["verdict"], code) == ("transfers", 0), err


def test_a_sweep_whose_folder_cannot_be_written_is_judged_too(cli: Callable[..., tuple[int, str, str]]) -> None:
    sweep = ladder(-8.0)
    sweep.results.write_text("a file where a folder is wanted")
    code, out, err = cli("transfer", str(sweep.path))
    assert (code, len(err.splitlines())) == (2, 1), err
    assert ": TRANSFERS" in out
    assert f"cannot make the folder {sweep.results}" in err


def test_transfer_as_json_has_the_documented_keys_and_is_the_file(cli: Callable[..., tuple[int, str, str]]) -> None:
    sweep = ladder(optimum_at_twice_the_width=-8.0)
    document = json.loads(cli("transfer", str(sweep.path), "--json")[1])
    assert document == json.loads((sweep.results / "transfer.json").read_text())
    assert {"groups", "confidence", "tolerance"} <= set(document)
    assert document["confidence"] == 0.95
    assert document["tolerance"] == {
        "octaves": 0.5,
        "octaves_per_doubling": 0.25,
        "nats": 0.01,
        "costly": 0.03,
        "span": 0.5,
    }
    (group,) = document["groups"]
    keys = {
        "model",
        "optimizer",
        "parametrization",
        "axis",
        "sizes",
        "drift",
        "total_drift",
        "regret",
        "verdict",
        "reasons",
    }
    assert keys <= set(group)
    assert set(group["drift"]) == {"octaves_per_doubling", "low", "high"}
    assert set(group["total_drift"]) == {"octaves", "low", "high"}
    assert set(group["regret"]) == {"nats", "low", "high"}
    for size in group["sizes"]:
        assert {"width", "depth", "ratio", "n_runs", "n_diverged", "bracketed", "log2_lr_optimum"} <= set(size)
        assert {"log2_lr_low", "log2_lr_high", "loss_optimum"} <= set(size)
        assert size["log2_lr_optimum"] == pytest.approx(-8.0, abs=DRAWN)
    header, *lines = (sweep.results / "runs.csv").read_text().splitlines()
    assert header == (
        "run_id,model,parametrization,optimizer,width,depth,width_ratio,depth_ratio,log2_lr,seed,status,steps,tokens,"
        "train_loss,val_loss,val_bits_per_byte,diverged_at_step,seconds,tokens_per_second,device,"
        "flops,horizon,hyperparameter,value,default,validation,parameters,batch_size"
    )
    assert len(lines) == 20
    header, *lines = (sweep.results / "curves.csv").read_text().splitlines()
    assert header.startswith("model,parametrization,optimizer,width,depth,width_ratio,depth_ratio,log2_lr,n_seeds,")
    assert header.endswith("loss_mean,loss_sem,censored,horizon,hyperparameter,value,default")
    assert len(lines) == 10


def test_a_recipe_is_printed_and_written_for_a_target(cli: Callable[..., tuple[int, str, str]]) -> None:
    sweep = ladder(optimum_at_twice_the_width=-8.0)
    code, out, err = cli("transfer", str(sweep.path), "--to", "width=64", "depth=4", "--json")
    assert code == 0, err
    (recipe,) = json.loads(out)
    assert recipe == json.loads((sweep.results / "recipe-adamw-spectral-w64-d4.json").read_text())
    assert recipe["log2_lr"] == pytest.approx(-8.0, abs=DRAWN)
    shape = {"width": 64, "depth": 4, "heads": 8, "kv_heads": 8, "head_dim": 8, "ffn_width": 256}
    assert recipe["target"] == shape | {"vocab_size": 256, "context": 32}


def test_a_sweep_with_a_failed_run_exits_with_1_and_names_its_log(cli: Callable[..., tuple[int, str, str]]) -> None:
    from mupsweep.launchers.driver import Outcome, exit_code

    sweep, runs = plan.save(load([SMOKE]), "")
    for run in runs:
        trained(sweep, run.run_id, 3.0)
    assert exit_code(sweep, Outcome(runs), drifts=False) == 0
    sweep.run(runs[0].run_id).write_status(FAILED, error="ouch\x1b[31m")
    assert exit_code(sweep, Outcome(runs), drifts=True) == 1
    assert exit_code(sweep, Outcome(runs, stopped=True), drifts=True) == 130
    code, out, _ = cli("status", str(sweep.path), "--json")
    assert (code, json.loads(out)["totals"]["failed"]) == (0, 1)
    assert f"failed: {runs[0].run_id}: ouch\\x1b[31m (see " in cli("status", str(sweep.path))[1]


def test_a_run_that_another_command_still_trains_is_not_called_finished() -> None:
    from mupsweep.launchers.driver import Outcome, exit_code

    sweep, runs = plan.save(load([SMOKE]), "")
    for run in runs[1:]:
        trained(sweep, run.run_id, 3.0)
    folder = sweep.run(runs[0].run_id)
    folder.path.mkdir(parents=True)
    assert folder.claim() is not None
    folder.write_status(RUNNING, step=3, steps=30)
    assert exit_code(sweep, Outcome(runs), drifts=False) != 0


def test_ctrl_c_while_a_command_reads_exits_with_130_and_no_traceback() -> None:
    sweep, runs = plan.save(load([SMOKE]), "")
    status = sweep.run(runs[0].run_id).status_path
    status.parent.mkdir(parents=True)
    os.mkfifo(status)  # the command waits for text that never comes
    process = subprocess.Popen(
        [sys.executable, "-m", "mupsweep", "status", str(sweep.path)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's `pytest &` has ignored
    )
    with status.open("w"):  # returns once the command has opened it to read
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")


def test_a_reader_that_leaves_ends_a_command_quietly() -> None:
    plan.save(load([SMOKE, f"sweep.seeds=[{','.join(map(str, range(300)))}]"]), "")
    process = subprocess.Popen(
        [sys.executable, "-m", "mupsweep", "status", "sweeps/smoke", "--runs"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 141


def test_a_run_as_json_leaves_stdout_to_the_json(cli: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = cli("run", SMOKE, "sweep.width_ratios=[1]", "sweep.log2_lrs=[-7]", "launcher=inline", "--json")
    assert code == 0
    assert json.loads(out)["groups"][0]["sizes"][0]["n_runs"] == 1
    assert err.splitlines()[-1].startswith("[1/1] w16-d2-lr-7.00-s0-")


def test_a_plan_says_that_its_run_would_be_refused(cli: Callable[..., tuple[int, str, str]]) -> None:
    sweep, runs = plan.save(load([SMOKE]), "")
    assert "refuse" not in cli("plan", SMOKE, "training.steps=40")[1]  # nothing is trained yet
    assert sweep.run(runs[0].run_id).claim() is not None
    code, out, _ = cli("plan", SMOKE, "training.steps=40")
    assert code == 0
    assert "note: mupsweep run would refuse this: sweep sweeps/smoke already holds" in out
    assert "training.steps=40 (there: 30)" in out
    assert "refuse" not in cli("plan", SMOKE, "sweep.log2_lrs=[-8]")[1]


def test_an_interrupt_is_one_whatever_a_library_makes_of_it() -> None:
    def wrapped(cause: BaseException) -> Exception:
        try:
            raise RuntimeError("Error calling __set_name__") from cause
        except RuntimeError as error:
            return error

    assert was_interrupted(wrapped(wrapped(KeyboardInterrupt())))
    assert not was_interrupted(wrapped(ValueError()))


def test_json_goes_to_stdout_and_news_to_stderr(cli: Callable[..., tuple[int, str, str]]) -> None:
    ladder(optimum_at_twice_the_width=-8.0)
    code, out, err = cli("run", *LADDER, "--json")
    assert code == 0, err
    assert json.loads(out)["groups"][0]["verdict"] == "transfers"


def test_a_missing_device_is_named_in_the_plan(
    cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mupsweep.report.terminal.plan.accelerator", lambda: "cpu")
    code, out, _ = cli("plan", SMOKE, "launcher=local", "launcher.devices=[cuda:7]")
    assert code == 0
    assert " on 1 cuda worker at 100TFLOP/s; " in out
    assert "note: launcher.devices names cuda, and this machine seems to have cpu alone: " in out
    assert "cuda" not in cli("plan", SMOKE, "launcher=local", "launcher.devices=[cpu]")[1]


def test_the_bound_of_a_search_is_not_below_what_its_first_round_trains(
    cli: Callable[..., tuple[int, str, str]],
) -> None:
    words = [SMOKE, "sweep.search=adaptive", "sweep.max_runs=2", "sweep.width_ratios=[1]"]
    for lrs in ("[-9,-7]", "[-9,-7,-5]", "[-11,-9,-7,-5]"):
        out = cli("plan", *words, f"sweep.log2_lrs={lrs}")[1]
        first, limit, most = (
            int(number)
            for pattern in (r"(\d+) of \d+ runs? to train", r"after (\d+) runs? of a size", r"at most (\d+) runs?")
            for number in re.findall(pattern, out)
        )
        assert first <= limit == most


def test_a_first_run_ends_with_three_lines_that_say_what_to_do_next(cli: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = cli("run", SMOKE, "launcher=inline")
    assert code == 0
    look, train, use = out.splitlines()[-3:]
    assert look == "to look at it: open sweeps/smoke/results/report.html"
    assert "the same mupsweep run with " in train
    assert "mupsweep transfer sweeps/smoke --to width=N" in use or use.startswith("no optimum is known at both ends")
