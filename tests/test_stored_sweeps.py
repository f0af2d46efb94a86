"""Sweeps that an earlier version stored open, go on and are judged as before; what is written now looks as it did then.

`stored/sweep` was written by version 0.1.0 (commit 2f39660): of its four runs one is done, one diverged, one stopped
after 13 of 20 steps, one was never begun. `stored/run_ids.json` holds run ids of that version by overrides; those of an
optimizer that has another name today are spelled as they are now.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mupsweep

Cli = Callable[..., tuple[int, str, str]]

STORED = Path(__file__).with_name("stored")
DEMO = Path(__file__).parents[1] / "configs" / "experiment" / "demo.csv"
OVERRIDES = yaml.safe_load((STORED / "sweep" / "config.yaml").read_text())["overrides"]
NARROW_DONE, NARROW_DIVERGED = "w4-d1-lr-4.00-s0-76ba844c", "w4-d1-lr4.00-s0-5ac3c34f"
WIDE_DONE, WIDE_DIVERGED = "w8-d1-lr-4.00-s0-bffae01d", "w8-d1-lr4.00-s0-868db5f6"
PLANNED = [WIDE_DONE, WIDE_DIVERGED, NARROW_DONE, NARROW_DIVERGED]  # in the order of the plan
STOPPED_AT = 13
# What the stopped run came to when version 0.1.0 went on with it: training losses of steps 14 to 20, validation loss.
LAST_LOSSES = [
    3.889822006225586,
    3.621687412261963,
    3.2605717182159424,
    3.0992705821990967,
    3.2162649631500244,
    3.0703136920928955,
    2.994152545928955,
]
VAL_LOSS = 3.0665684938430786
ROUNDING = 1e-5  # relative; float32 sums of one CPU beside those of another differ by 1e-7 here
DIGEST_BYTES = 32  # at the end of a checkpoint

RUN_IDS: dict[str, list[str]] = json.loads((STORED / "run_ids.json").read_text())
SMOKE = ["sweep.width_ratios=[2]", "sweep.log2_lrs=[-7]", "experiment=smoke", "training.eval_batches=4"]

INTERVAL = {"low": "", "high": ""}
NATS = {"nats": "", **INTERVAL}
OCTAVES = {"octaves": "", **INTERVAL}
COMPARISON = {
    "of": [""],
    "over": [""],
    "axis": "",
    "width": "",
    "depth": "",
    "horizon": "",
    "lower": NATS,
    "speed_up": {"factor": "", **INTERVAL},
    "asymptotic_penalty": NATS,
}
TRANSFER = {
    "groups": [
        {
            "model": "",
            "optimizer": "",
            "parametrization": "",
            "axis": "",
            "sizes": [
                {
                    "width": "",
                    "depth": "",
                    "horizon": "",
                    "ratio": "",
                    "n_runs": "",
                    "n_diverged": "",
                    "bracketed": "",
                    "log2_lr_optimum": "",
                    "log2_lr_low": "",
                    "log2_lr_high": "",
                    "loss_optimum": "",
                    "loss_low": "",
                    "loss_high": "",
                    "move": OCTAVES,
                    "regret": NATS,
                    "reason": "",
                }
            ],
            "drift": {"octaves_per_doubling": "", **INTERVAL},
            "drift_sizes": "",
            "total_drift": OCTAVES,
            "regret": NATS,
            "verdict": "",
            "reasons": [""],
            "deciding_runs": [{"width": "", "depth": "", "horizon": "", "log2_lrs": [""]}],
            "validations": [
                {
                    "width": "",
                    "depth": "",
                    "log2_lr": "",
                    "forecast": {"log2_lr": "", **INTERVAL},
                    "optimum": {"log2_lr": "", **INTERVAL},
                    "regret": NATS,
                    "outcome": "",
                }
            ],
            "quality": {
                "fit_error": OCTAVES,
                "robustness": {"exponent": "", **INTERVAL},
                "asymptotic_loss": NATS,
                "held_out": {
                    "predicted": {"log2_lr": "", **INTERVAL},
                    "error": OCTAVES,
                    "log2_lr": "",
                    "regret": NATS,
                },
            },
        }
    ],
    "comparisons": [COMPARISON],
    "tuning": [
        {
            "model": "",
            "parametrization": "",
            "optimizer": "",
            "hyperparameter": "",
            "default": "",
            "axis": "",
            "sizes": [
                {
                    "width": "",
                    "depth": "",
                    "horizon": "",
                    "values": [{"value": "", "loss": "", **INTERVAL}],
                    "best": "",
                    "log2_lr_optimum": "",
                    "gain": NATS,
                    "regret": NATS,
                    "minimum": {"value": "", **INTERVAL},
                    "unbounded": [""],
                    "edge": "",
                    "ridge": {
                        "slope": {"octaves_per_octave": "", **INTERVAL},
                        "log2_lr": {"log2_lr": "", **INTERVAL},
                    },
                }
            ],
            "total_drift": OCTAVES,
            "lr_drift": OCTAVES,
            "verdict": "",
            "reasons": [""],
        }
    ],
    "closings": [{"hyperparameter": "", "share": "", "before": [COMPARISON], "after": [COMPARISON]}],
    "tuning_remarks": [""],
    "remarks": [""],
    "confidence": "",
    "tolerance": {"octaves": "", "octaves_per_doubling": "", "nats": "", "costly": "", "span": ""},
    "notes": [""],
}
OWNER = ["host", "boot", "pid", "born", "slurm_cluster", "slurm_job", "slurm_restarts", "taken", "released"]
PROGRESS = ["step", "losses", "seconds", "micro_batch", "horizon", "branching", "branches"]


@pytest.fixture
def sweep() -> Path:
    """A copy of the stored sweep where its own command looks for it."""
    return Path(shutil.copytree(STORED / "sweep", "sweeps/stored"))


@pytest.fixture
def continued(sweep: Path, cli: Cli) -> Path:
    """The sweep after its command was given once more."""
    code, _, err = cli("run", *OVERRIDES)
    assert code == 0, err
    return sweep


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def structure(value: Any) -> Any:
    """The nested keys of a document without its values; the elements of a list are merged into one."""
    if isinstance(value, dict):
        return {key: structure(element) for key, element in value.items()}
    if not isinstance(value, list | tuple):
        return ""
    elements = [structure(element) for element in value]
    if not elements or not isinstance(elements[0], dict):
        return elements[:1]
    merged: dict[str, Any] = {}
    for element in elements:
        for key, inner in element.items():
            merged[key] = merged.get(key) or inner
    return [merged]


def covers(known: Any, found: Any) -> bool:
    """Whether a structure has the keys of a known one, up to lists that are empty and sections that are null."""
    if isinstance(known, dict) and isinstance(found, dict):
        return known.keys() == found.keys() and all(covers(known[key], found[key]) for key in known)
    if isinstance(known, list) and isinstance(found, list):
        return not found or covers(known[0], found[0])
    return found == ""


def shapes(value: Any) -> Any:
    """The structure of a checkpoint: keys, kinds of numbers, types and shapes of tensors."""
    if isinstance(value, dict):
        return {key: shapes(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [shapes(element) for element in value[:1]]
    return (str(value.dtype), tuple(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__


def checkpoint(run: Path) -> dict[str, Any]:
    content = (run / "checkpoint" / "latest.pt").read_bytes()[:-DIGEST_BYTES]
    return torch.load(io.BytesIO(content), weights_only=True)


# Run ids. A change makes every sweep on every disk train again: see test_plan.


def planned(cli: Cli, *overrides: str) -> list[dict[str, Any]]:
    code, out, err = cli("plan", *overrides, "--json")
    assert code == 0, err
    return json.loads(out)["runs"]


@pytest.mark.parametrize("group", ["optimizer", "parametrization", "model"])
def test_the_choices_of_a_group_keep_their_run_ids(group: str, cli: Cli) -> None:
    base = [*SMOKE[:2], "training.eval_batches=16"] if group == "model" else SMOKE  # models have sizes of their own
    stored = {
        key.partition("=")[2]: ids for key, ids in RUN_IDS.items() if key.startswith(f"{group}=") and " " not in key
    }
    found = {run[group]: [run["run_id"]] for run in planned(cli, *base, f"{group}={','.join(stored)}")}
    assert len(stored) >= 4
    assert found == stored


@pytest.mark.parametrize("overrides", [key for key in RUN_IDS if " " in key or "{" in key])
def test_run_ids_of_other_overrides_stay_what_they_were(overrides: str, cli: Cli) -> None:
    assert sorted(run["run_id"] for run in planned(cli, *SMOKE, *overrides.split())) == RUN_IDS[overrides]


def test_a_sweep_from_before_eval_tokens_says_how_it_goes_on(cli: Cli) -> None:
    tiny = ["experiment=smoke", "sweep.width_ratios=[1]", "training.steps=2", "sweep.name=old", "launcher=inline"]
    assert cli("run", *tiny, "training.eval_batches=3", "sweep.log2_lrs=[-7]")[0] == 0
    for other in ([], ["parametrization=sp"]):
        code, _, err = cli("run", *tiny, "sweep.log2_lrs=[-8,-7]", *other)
        assert code == 2
        assert err == (
            "mupsweep: sweep sweeps/old reads its validation losses by training.eval_batches=3, this command by "
            "training.eval_tokens=4096, and the two do not compare: go on with training.eval_batches=3, or choose "
            "another sweep.name\n"
        )
    assert cli("run", *tiny, "training.eval_batches=3", "sweep.log2_lrs=[-8,-7]")[0] == 0


# The stored sweep.


def test_a_stored_sweep_is_the_plan_of_its_own_command(sweep: Path, cli: Cli) -> None:
    runs = planned(cli, *OVERRIDES)
    assert [(run["run_id"], run["status"]) for run in runs] == list(
        zip(PLANNED, ["done", "diverged", "pending", "pending"], strict=True)
    )
    assert [row["run_id"] for row in lines(sweep / "plan.jsonl")] == PLANNED


def test_a_stored_sweep_opens_without_training(sweep: Path, cli: Cli) -> None:
    before = contents(sweep)
    code, out, err = cli("status", str(sweep), "--json")
    assert code == 0, err
    assert json.loads(out)["totals"] == {"done": 1, "diverged": 1, "running": 0, "pending": 2, "failed": 0}
    opened = mupsweep.load(sweep)
    assert [(run.run_id, run.status, run.val_loss) for run in opened.runs] == [
        (WIDE_DONE, "done", 3.0143990516662598),
        (WIDE_DIVERGED, "diverged", None),
    ]
    assert len(opened.metrics(NARROW_DONE)) == STOPPED_AT
    assert contents(sweep) == before


def test_a_stored_sweep_is_reported(sweep: Path, cli: Cli) -> None:
    code, _, err = cli("report", str(sweep))
    assert code == 0, err
    transfer = read(sweep / "results" / "transfer.json")
    assert [(group["verdict"], [size["n_runs"] for size in group["sizes"]]) for group in transfer["groups"]] == [
        ("inconclusive", [2])
    ]
    with (sweep / "results" / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run_id"], row["status"], row["steps"]) for row in rows] == [
        (WIDE_DONE, "done", "20"),
        (WIDE_DIVERGED, "diverged", "3"),
    ]
    page = (sweep / "results" / "report.html").read_text()
    for fact in ("inconclusive", "adamw", "mup", "3.0144"):
        assert fact in page


def test_a_stored_sweep_goes_on(continued: Path) -> None:
    statuses = {run_id: read(continued / "runs" / run_id / "status.json")["status"] for run_id in PLANNED}
    assert list(statuses.values()) == ["done", "diverged", "done", "diverged"]
    assert [row["run_id"] for row in lines(continued / "plan.jsonl")] == PLANNED
    before, after = contents(STORED / "sweep" / "runs"), contents(continued / "runs")
    finished = [name for name in before if name.startswith((WIDE_DONE, WIDE_DIVERGED))]
    assert len(finished) == 12
    assert {name: after.get(name) for name in finished} == {name: before[name] for name in finished}
    [group] = read(continued / "results" / "transfer.json")["groups"]
    assert group["verdict"] == "inconclusive"
    assert [(size["n_runs"], size["n_diverged"]) for size in group["sizes"]] == [(2, 1), (2, 1)]


def test_a_stored_checkpoint_resumes(continued: Path) -> None:
    run = continued / "runs" / NARROW_DONE
    assert f"resuming at step {STOPPED_AT} from latest.pt" in (run / "train.log").read_text()
    rows, stored = lines(run / "metrics.jsonl"), lines(STORED / "sweep" / "runs" / NARROW_DONE / "metrics.jsonl")
    assert rows[:STOPPED_AT] == stored
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert [row["train_loss"] for row in rows[STOPPED_AT:]] == pytest.approx(LAST_LOSSES, rel=ROUNDING)
    assert read(run / "summary.json")["val_loss"] == pytest.approx(VAL_LOSS, rel=ROUNDING)
    assert not (run / "checkpoint").exists()


# Optimizers whose names belong to better forms today.


@pytest.mark.parametrize(
    ("name", "published", "key", "stored"),
    [("lamb", "lamb_published", "weight_norm", "spectral"), ("soap", "soap_published", "spectral_norm", False)],
)
def test_a_stored_sweep_of_a_renamed_optimizer_goes_on_as_what_it_was(
    name: str, published: str, key: str, stored: Any, cli: Cli
) -> None:
    """Its config.yaml holds every key under the old name, so it means what it did; its own command would not."""
    of_sweep = ["experiment=smoke", "sweep.width_ratios=[2]", "training.steps=3", "sweep.name=old", "launcher=inline"]
    now = [f"optimizer={published}", f"optimizer.name={name}"]
    assert cli("run", *of_sweep, *now, "sweep.log2_lrs=[-7]")[0] == 0
    sweep = Path("sweeps/old")
    [variant] = yaml.safe_load((sweep / "config.yaml").read_text())["variants"]
    assert (variant["optimizer"]["name"], variant["optimizer"][key]) == (name, stored)
    (first,) = (sweep / "runs").iterdir()
    lrs = {
        tensor: (group["optimizer"], group["lr"])
        for group in read(first / "groups.json")
        for tensor in group["tensors"]
    }
    assert lrs["blocks.0.mlp.up.weight"] == (name, 2.0**-7)  # the published rules leave hidden LRs alone

    # the old command is another optimizer today
    code, _, err = cli("run", *of_sweep, f"optimizer={name}", "sweep.log2_lrs=[-8,-7]")
    assert code == 2
    assert f"go on with what {name} was by optimizer={published} optimizer.name={name}" in err
    assert len(err.splitlines()) == 1

    # a lost run is trained again from the sweep alone, to the same loss
    loss = read(first / "summary.json")["val_loss"]
    shutil.rmtree(first)
    code, _, err = cli("worker", str(sweep), "--device", "cpu")
    assert code == 0, err
    assert read(first / "summary.json")["val_loss"] == loss

    # and the sweep is extended, reported and handed over
    assert cli("run", *of_sweep, *now, "sweep.log2_lrs=[-8,-7]")[0] == 0
    assert len(list((sweep / "runs").iterdir())) == 2
    [group] = read(sweep / "results" / "transfer.json")["groups"]
    assert (group["optimizer"], [size["n_runs"] for size in group["sizes"]]) == (name, [2])


# Files that are written now, beside those of the stored sweep.


def without_new_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A variant without the keys that change no run and that version did not have."""
    optimizer = {key: value for key, value in config["optimizer"].items() if key not in ("log2_lr_range", "group_lr")}
    assert len(config["optimizer"]) == len(optimizer) + 2
    assert config["optimizer"]["group_lr"] is None
    training = {key: value for key, value in config["training"].items() if key != "eval_tokens"}
    assert len(config["training"]) == len(training) + 1
    return {**config, "optimizer": optimizer, "training": training}


def test_a_sweep_writes_what_the_stored_one_holds(cli: Cli) -> None:
    assert cli("run", *OVERRIDES)[0] == 0
    now, then = Path("sweeps/stored"), STORED / "sweep"
    assert (now / "plan.jsonl").read_bytes() == (then / "plan.jsonl").read_bytes()
    config = yaml.safe_load((now / "config.yaml").read_text())
    assert config.pop("analysis").keys() == {"verdict", "curve"}  # which that version did not have
    assert [without_new_keys(variant) for variant in config.pop("variants")] == (
        stored := yaml.safe_load((then / "config.yaml").read_text())
    ).pop("variants")
    searching = {key: config["sweep"].pop(key) for key in ("regret", "at_once", "max_runs")}  # new, and another default
    assert searching == {"regret": 0.002, "at_once": 4, "max_runs": 12}
    assert stored["sweep"].pop("max_runs") == 18
    assert config == stored
    assert structure(read(now / "environment.json")).keys() == read(then / "environment.json").keys()
    for run_id in (WIDE_DONE, WIDE_DIVERGED):
        new, old = now / "runs" / run_id, then / "runs" / run_id
        for name in ("summary.json", "status.json"):
            assert list(read(new / name)) == list(read(old / name))
        assert [list(row) for row in lines(new / "metrics.jsonl")] == [list(r) for r in lines(old / "metrics.jsonl")]
        config = without_new_keys(yaml.safe_load((new / "config.yaml").read_text()))
        assert config == yaml.safe_load((old / "config.yaml").read_text())
        assert read(new / "groups.json") == read(old / "groups.json")
        assert list(read(new / "claims" / "0000.json")) == list(read(old / "claims" / "0000.json")) == OWNER


def test_a_checkpoint_holds_what_the_stored_one_does(cli: Cli) -> None:
    summary = Path("sweeps/stored/runs", NARROW_DONE, "summary.json")
    (summary / "a folder in its place").mkdir(parents=True)  # the run cannot end, and keeps its checkpoint of step 19
    cli("run", *OVERRIDES)
    assert read(summary.with_name("status.json"))["status"] == "failed"
    written = checkpoint(summary.parent)
    assert written.pop("run_id") == NARROW_DONE  # which the stored one does not say
    assert list(written) == ["network", "optimizer", *PROGRESS]
    assert (written["step"], len(written["losses"])) == (19, 19)
    assert shapes(written) == shapes(checkpoint(STORED / "sweep" / "runs" / NARROW_DONE))


# transfer.json, by the losses that `make demo` measured.


def demo_with_a_second_init() -> str:
    """A table of the demo's runs, and of others with another init whose losses are 0.02 nats higher."""
    with DEMO.open(newline="") as file:
        rows = list(csv.DictReader(file))
    change = {"hyperparameter": "model.init_std", "value": "0.03", "default": "0.083"}
    table = [row | dict.fromkeys(change, "") for row in rows]
    table += [row | change | {"val_loss": f"{float(row['val_loss']) + 0.02:.5f}"} for row in rows]
    with Path("runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return "runs.csv"


def test_transfer_json_keeps_its_keys(cli: Cli) -> None:
    code, out, err = cli("transfer", "--from", demo_with_a_second_init(), "--json")
    assert code == 0, err
    document = json.loads(out)
    assert covers(TRANSFER, structure(document)), json.dumps(structure(document), indent=1)
    lists = (document["groups"], document["comparisons"], document["tuning"], document["closings"], document["remarks"])
    assert [len(rows) > 0 for rows in lists] == [True] * 5
    verdicts = {group["parametrization"]: group["verdict"] for group in document["groups"]}
    assert verdicts == {"mup": "transfers", "sp": "drifts"}
    assert [(size["width"], size["n_runs"], size["bracketed"]) for size in document["groups"][0]["sizes"]] == [
        (32, 9, True),
        (64, 5, True),
        (128, 5, True),
    ]
