"""The law over size, tokens and batch finds what it was made of, and what is known of Step Law's public runs."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mupsweep.analysis.estimate import Estimate
from mupsweep.analysis.law import AXES, Law, PowerLaw, fit_laws
from mupsweep.analysis.run_result import RunResult
from mupsweep.analysis.setting_curve import Setting, by_variant
from mupsweep.errors import RecordError
from mupsweep.report.html import page
from mupsweep.report.terminal.law import law_lines
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.store.tables import read_table
from mupsweep.sweep import config, plan

TABLES = Path(__file__).parents[1] / "tables"
Cli = Callable[..., tuple[int, str, str]]
TRUTH = {"parameters": -0.6, "tokens": 0.1, "batch_size": 0.3}
GRID = [Setting(n, d, b) for n in (2e8, 5e8, 1e9) for d in (1e10, 4e10) for b in (32, 128, 512, 2048)]


def on_law(setting: Setting, curvature: float = 0.0) -> float:
    """log2 of the best LR, by TRUTH."""
    n, d, b = np.log2(np.array(setting, dtype=float)) - np.log2([4e8, 2e10, 256])
    return -10 - 0.6 * n + 0.1 * d + 0.3 * b + curvature * b * b


def drawn(seed: int, settings: list[Setting], scatter: float, curvature: float = 0.0) -> PowerLaw:
    """The law through optima that scatter around TRUTH and are known to 0.05 to 0.3 octaves."""
    rng = np.random.default_rng(seed)
    sds = rng.uniform(0.05, 0.3, len(settings))
    optima = np.array([on_law(setting, curvature) for setting in settings])
    law = PowerLaw.of(
        settings, optima + scatter * rng.standard_normal(len(sds)) + sds * rng.standard_normal(len(sds)), sds
    )
    assert law is not None
    return law


def holds(estimate: Estimate, truth: float) -> bool:
    return estimate.low is not None and estimate.high is not None and estimate.low <= truth <= estimate.high


def runs(
    settings: Iterable[Setting], lrs: Iterable[float] = np.arange(-14, -5.9, 0.5), seed: int = 0, **more: Any
) -> list[RunResult]:
    """Runs with the noise and the lopsided valleys of public sweeps; the optima scatter by 0.3 octaves."""
    rng = np.random.default_rng(seed)
    made = []
    for setting in settings:
        best = on_law(setting) + 0.3 * rng.standard_normal()
        for lr in lrs:
            u = float(lr) - best
            rise = 0.02 * u * u * (1 if u < 0 else 1.5)
            names = {"model": "m", "parametrization": "sp", "optimizer": "adamw", "run_id": "", "seed": 0}
            size = {"width": round(math.sqrt(setting[0] or 1)), "depth": 8, "width_ratio": 1.0, "depth_ratio": 1.0}
            loss = 2.5 + rise + 0.0015 * rng.standard_normal()
            row = {
                **names,
                **size,
                **setting._asdict(),
                "log2_lr": float(lr),
                "status": "done",
                "val_loss": loss,
                **more,
            }
            made.append(RunResult.of(row))
    return made


def write(path: Path, lines: list[dict[str, Any]]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return str(path)


# ---- synthetic truth


def test_exponents_and_forecasts_hold_the_truth_in_random_designs() -> None:
    rng = np.random.default_rng(0)
    held: dict[str, list[bool]] = {axis: [] for axis in (*AXES, "far")}
    far = Setting(8e9, 2e11, 4096)
    for seed in range(100):
        settings = [GRID[k] for k in rng.choice(len(GRID), rng.integers(8, len(GRID)), replace=False)]
        law = drawn(seed, settings, scatter=rng.choice([0.1, 0.3, 0.6]))
        for axis in law.axes:
            held[axis].append(holds(law.exponent(axis), TRUTH[axis]))
        if law.axes == AXES and law.curvature is None:
            held["far"].append(holds(Estimate.of(law.optima([far])[0]), on_law(far)))
    shares = {name: np.mean(values) for name, values in held.items()}
    assert min(shares.values()) >= 0.92, shares
    assert all(len(values) > 70 for values in held.values())


def test_curvature_is_kept_where_there_is_some_and_else_left_out() -> None:
    curved = [drawn(seed, GRID, 0.3, curvature=-0.12) for seed in range(40)]
    assert np.mean([law.curvature is not None for law in curved]) >= 0.9
    assert np.mean([law.curvature is not None and holds(law.curvature, -0.12) for law in curved]) >= 0.85
    straight = [drawn(seed, GRID, 0.3) for seed in range(40)]
    assert np.mean([law.curvature is not None for law in straight]) <= 0.1


def test_intervals_widen_with_distance_and_fewer_curves() -> None:
    law, few = drawn(1, GRID, 0.3), drawn(1, GRID[::3], 0.3)
    targets = [Setting(n, 2e10, 256) for n in (4e8, 4e9, 4e10)]
    widths = [np.ptp(np.quantile(draws, [0.025, 0.975])) for draws in law.optima(targets)]
    assert widths[0] < 0.5 * widths[1]
    assert 1.7 < widths[2] / widths[1] < 2.3  # in proportion to the octaves
    assert np.ptp(np.quantile(few.optima(targets[2:]), [0.025, 0.975])) > 1.3 * widths[2]


def test_axes_that_do_not_vary_on_their_own_have_no_exponent() -> None:
    at_20 = [Setting(n, 20 * n, b) for n in (1e8, 2e8, 4e8) for b in (32, 128)]
    law = PowerLaw.of(at_20, np.arange(6.0), np.full(6, 0.1))
    assert law is not None
    assert law.axes == ("parameters", "batch_size")
    assert law.missing == {"tokens": "varied only along with parameters"}
    assert law.exponent("tokens") == Estimate(None, None, None)
    assert law.off_course("tokens", Setting(8e8, 160e8, 64)) == pytest.approx(0, abs=1e-9)
    assert law.off_course("tokens", Setting(8e8, 640e8, 64)) == pytest.approx(2)

    unknown = PowerLaw.of([s._replace(batch_size=None, tokens=1e9) for s in at_20], np.arange(6.0), np.full(6, 0.1))
    assert unknown is not None
    assert unknown.missing == {"tokens": "never varied", "batch_size": "is not known"}
    assert unknown.off_course("batch_size", Setting(8e8, 1e9, 64)) == 0


def test_a_law_is_found_from_runs_and_their_order_changes_nothing() -> None:
    made = runs(GRID[::2])
    [law], _ = fit_laws(made)
    for axis, error in zip(AXES, (0.2, 0.25, 0.1), strict=True):
        assert law.power.exponent(axis).value == pytest.approx(TRUTH[axis], abs=error)
    assert law.left_out == 0
    assert law.held_out is not None
    assert (law.held_out.axis, law.held_out.curves) == ("parameters", 4)
    assert law.held_out.octaves < 0.6
    assert law.held_out.inside >= 3
    [again], _ = fit_laws(made[::-1])
    assert again.power.exponent("tokens") == law.power.exponent("tokens")


def test_best_lrs_at_an_end_are_left_out() -> None:
    cut = [run for run in runs(GRID) if run.log2_lr <= -10]
    [law], _ = fit_laws(cut)
    assert law.left_out > 5
    assert len(law.curves) + law.left_out == len(GRID)


def test_models_are_one_where_their_names_only_tell_settings_apart() -> None:
    named = [*runs(GRID[:4], model="gpt-200m"), *runs(GRID[8:12], model="gpt-500m")]
    assert [variant.models for variant in by_variant(named)] == [("gpt-200m", "gpt-500m")]
    of_batches = [*runs(GRID[:1], model="gpt bs32"), *runs(GRID[1:2], model="gpt bs128")]
    assert [variant.models for variant in by_variant(of_batches)] == [("gpt",)]
    compared = [*runs(GRID[:4], model="gpt"), *runs(GRID[:4], model="llama")]
    assert [variant.models for variant in by_variant(compared)] == [("gpt",), ("llama",)]


def test_a_diverged_run_belongs_to_the_training_it_was_meant_for() -> None:
    done = runs([Setting(2e8, 1000, 32), Setting(2e8, 4000, 32)])
    lost = runs([Setting(2e8, 600, 32)], lrs=[-4.0], status="diverged", val_loss=None)
    [by_setting] = by_variant([*done, *lost]).values()
    assert {
        setting.tokens: sum(run.status == "diverged" for run in of) for (setting, *_), of in by_setting.items()
    } == {
        1000: 1,
        4000: 0,
    }


def test_sizes_without_a_count_are_told_by_their_shape() -> None:
    shaped = runs(GRID[:1], width=128, depth=4, parameters=None)
    [by_setting] = by_variant(shaped).values()
    assert [setting.parameters for setting, *_ in by_setting] == [12 * 128**2 * 4]


def test_shapes_with_as_many_parameters_are_curves_of_their_own() -> None:
    made = [*runs(GRID[:1], width=128, depth=4), *runs(GRID[:1], width=64, depth=16)]
    [by_setting] = by_variant(made).values()
    assert [place[1:] for place in by_setting] == [(128, 4), (64, 16)]


def test_runs_of_another_hyperparameter_or_a_validation_are_no_part_of_it() -> None:
    other = runs(GRID[:1], hyperparameter="optimizer.weight_decay", value=0.2, default=0.1)
    batch = runs(GRID[:1], hyperparameter="training.batch_size", value=64.0, default=32.0)
    [by_setting] = by_variant([*other, *batch, *runs(GRID[:1], validation=True)]).values()
    assert sum(map(len, by_setting.values())) == len(batch)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ([], "no finished runs"),
        (runs(GRID[:1]), "m/adamw/sp: every curve is of one size, horizon and batch size"),
        (runs(GRID[:2]), "m/adamw/sp: of 2 curves, 2 have the best LR between two others, too few for a law"),
        (runs(GRID, lrs=[-5.0, -4.0, -3.0]), "m/adamw/sp: of 24 curves, 0 have the best LR between two others"),
    ],
)
def test_what_has_no_law_is_refused_with_what_to_do(made: list[RunResult], expected: str) -> None:
    with pytest.raises(RecordError, match=expected) as refusal:
        fit_laws(made)
    assert "train" in str(refusal.value) or "mupsweep run" in str(refusal.value)


# ---- Step Law's runs, arXiv 2503.04715, as far as tests/tables has them

SIZES = {  # width and depth -> parameters, and tokens at 53 of them per parameter
    (960, 7): (214e6, 11.4e9),
    (1024, 8): (268e6, 14.2e9),
    (1280, 10): (429e6, 22.7e9),
    (1280, 13): (536e6, 28.4e9),
    (2048, 16): (1073e6, 56.9e9),
}


@cache
def step_law() -> list[dict[str, Any]]:
    """The three tables as one, with columns for size, tokens and batch."""
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name in ("steplaw_width_tpp53", "steplaw_horizon_bs128", "steplaw_horizon_bs512"):
        with (TABLES / f"{name}.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                parameters, tokens = SIZES[int(row["width"]), int(row["depth"])]
                batch_size = (row["model"] if "tpp" in name else name).rpartition("bs")[2]
                kept = {key: row[key] for key in ("optimizer", "parametrization", "log2_lr", "val_loss")}
                setting = {"parameters": parameters, "tokens": row.get("horizon", tokens), "batch_size": batch_size}
                key = parameters, float(setting["tokens"]), batch_size, row["log2_lr"]
                lines.setdefault(key, {**kept, **setting, "width": row["width"], "depth": row["depth"]})
    return list(lines.values())


@pytest.fixture(scope="module")
def steps_law(tmp_path_factory: pytest.TempPathFactory) -> Law:
    [law], _ = fit_laws(read_table(write(tmp_path_factory.mktemp("law") / "steplaw.csv", step_law())).runs)
    return law


def test_step_laws_runs_follow_what_is_known_of_them(steps_law: Law) -> None:
    """All 1911 runs, curve by curve: N^(-0.64 +- 0.06) D^(-0.01 +- 0.03) B^(0.31 +- 0.03), -0.11 a squared octave."""
    power = steps_law.power
    assert len(steps_law.curves) + steps_law.left_out == 74
    assert steps_law.left_out < 10
    assert holds(power.exponent("parameters"), -0.64)
    assert holds(power.exponent("tokens"), -0.01)
    assert power.curvature is not None
    assert holds(power.curvature, -0.11)
    batch = Estimate.of(power.coefficients[3] + 2 * power.coefficients[4] * (math.log2(256) - power.center[2]))
    assert batch.value == pytest.approx(0.31, abs=0.06)
    for axis, widest in zip(AXES, (0.3, 0.2, 0.12), strict=True):
        exponent = power.exponent(axis)
        assert exponent.low is not None
        assert exponent.high is not None
        assert exponent.high - exponent.low < widest
    assert Estimate.of(power.scatter).value == pytest.approx(0.3, abs=0.1)  # 0.37 off the law with all runs


def test_step_laws_best_batches_move_the_lr_as_its_authors_say(steps_law: Law) -> None:
    """At 53 tokens per parameter N^-0.713 D^0.307 is N^-0.41; with all runs, curve by curve, N^(-0.89 + 0.22)."""
    assert steps_law.best_batch is not None
    assert steps_law.best_batch.axes == ("parameters",)
    assert holds(steps_law.best_batch.exponent("parameters"), -0.41)
    assert holds(steps_law.best_batch.exponent("parameters"), -0.67)
    sentence = next(line for line in law_lines(steps_law) if line.startswith("at the best batch size"))
    assert sentence.endswith("through 5 pairs, whose tokens varied only along with parameters")


def test_step_laws_largest_size_is_forecast_from_the_others(steps_law: Law) -> None:
    held_out = steps_law.held_out
    assert held_out is not None
    assert (held_out.axis, held_out.value, held_out.curves) == ("parameters", 1073e6, 7)
    assert held_out.octaves < 0.5
    assert held_out.inside >= 6


def test_the_law_hands_over_an_lr_whose_interval_grows_with_distance(steps_law: Law) -> None:
    near = steps_law.forecast(Setting(1e9, 5e10, 512))
    far = steps_law.forecast(Setting(1e11, 2e12, 4096))
    assert near.optimum.value == pytest.approx(math.log2(1.79 * 1e9**-0.713 * 5e10**0.307), abs=0.3)  # the authors' law
    assert near.log2_lr < np.median(near.draws)  # the right side is steep
    assert 0 < near.expected_regret < 0.01
    assert np.ptp(np.quantile(far.draws, [0.025, 0.975])) > 1.8 * np.ptp(np.quantile(near.draws, [0.025, 0.975]))


# ---- the command


@pytest.fixture
def table(tmp_path: Path) -> str:
    """Runs at a cheap part of GRID: two batch sizes of three sizes, one horizon."""
    made = runs([setting for setting in GRID if setting.tokens == 1e10 and setting.batch_size in (32, 128)])
    keys = (
        "parametrization",
        "optimizer",
        "width",
        "depth",
        "parameters",
        "tokens",
        "batch_size",
        "log2_lr",
        "val_loss",
    )
    return write(tmp_path / "runs.csv", [{key: getattr(run, key) for key in keys} for run in made])


def test_the_law_of_a_table_as_json_and_in_sentences(cli: Cli, table: str) -> None:
    code, out, _ = cli("transfer", "--from", table, "--law", "--json")
    law = json.loads(out)["law"]
    assert code == 0
    assert law["exponents"]["parameters"]["low"] < -0.6 < law["exponents"]["parameters"]["high"]
    assert law["exponents"]["batch_size"]["low"] < 0.3 < law["exponents"]["batch_size"]["high"]
    assert law["exponents"]["tokens"] == {
        "value": None,
        "low": None,
        "high": None,
        "smallest": 1e10,
        "largest": 1e10,
        "reason": "never varied",
    }
    assert law["curves"] == 6
    assert law["held_out"]["axis"] == "parameters"
    code, out, _ = cli("transfer", "--from", table, "--law")
    assert code == 0
    assert "through 6 curves with the best LR between two others" in out
    assert "twice the batch_size (32 to 128 were trained): 1." in out
    assert "tokens: never varied (10G), so it has no exponent of its own" in out
    assert "held out: the other curves forecast the optima of the 2 curves with parameters 1G" in out


def test_a_variant_without_a_law_says_why_beside_those_that_have_one(cli: Cli, tmp_path: Path) -> None:
    keys = ("optimizer", "parameters", "tokens", "batch_size", "log2_lr", "val_loss")
    made = [*runs(GRID[::8]), *runs(GRID[:1], optimizer="muon")]
    path = write(tmp_path / "two.csv", [{key: getattr(run, key) for key in keys} for run in made])
    answer = json.loads(cli("transfer", "--from", path, "--law", "--json")[1])
    assert [law["optimizer"] for law in answer["laws"]] == ["adamw"]
    assert any("no law for model/muon/given: every curve is of one size" in note for note in answer["notes"])


def test_a_target_has_its_lr_from_the_law_and_says_what_was_assumed(cli: Cli, table: str) -> None:
    target = ("--to", "parameters=4e9", "tokens=4e10", "batch_size=256")
    code, out, _ = cli("transfer", "--from", table, *target, "--json")
    [content] = json.loads(out)
    assert code == 0
    assert content["target"] == {"parameters": 4e9, "tokens": 4e10, "batch_size": 256}
    assert content["log2_lr_low"] < on_law(Setting(4e9, 4e10, 256)) < content["log2_lr_high"]
    assert content["base_lr"] == pytest.approx(2 ** content["log2_lr"])
    assert content["expected_regret"] > 0
    assert content["law"]["curves"] == 6
    assert "the target's parameters: 4 times the largest trained" in content["basis"]
    assert "tokens never varied: +2.00 octaves are carried by the assumed tokens^-0.16 ± 0.16" in content["basis"]
    [here] = json.loads(cli("transfer", "--from", table, "--to", "parameters=4e9", "batch_size=256", "--json")[1])
    assert here["target"]["tokens"] == 1e10
    assert here["log2_lr_high"] - here["log2_lr_low"] < content["log2_lr_high"] - content["log2_lr_low"]
    assert "assumed" not in here["basis"]


def test_what_is_assumed_depends_on_optimizer_and_parametrization() -> None:
    made = runs(GRID[::8])
    law = {name: fit_laws([replace(run, optimizer=name) for run in made])[0][0] for name in ("adamw", "sgd")}
    assert law["adamw"].assumed("batch_size", {}).exponent == 0.5
    assert law["sgd"].assumed("batch_size", {}).exponent == 1.0
    [of_mup], _ = fit_laws([replace(run, parametrization="mup") for run in made])
    assert [one.assumed("parameters", {}).exponent for one in (law["sgd"], of_mup)] == [-0.7, 0.0]


def test_a_size_without_a_count_is_scaled_from_the_largest(cli: Cli, table: str) -> None:
    shape = ("--to", f"width={2 * round(math.sqrt(1e9))}", "depth=16", "batch_size=128")
    [content] = json.loads(cli("transfer", "--from", table, *shape, "--json")[1])
    assert content["target"]["parameters"] == pytest.approx(8e9, rel=1e-3)


def test_a_table_without_a_count_says_what_stands_for_it(cli: Cli, tmp_path: Path) -> None:
    keys = ("width", "depth", "log2_lr", "val_loss")
    lines = [{key: getattr(run, key) for key in keys} for run in runs(GRID[::8])]
    _, out, _ = cli("transfer", "--from", write(tmp_path / "shapes.csv", lines), "--law")
    assert "no run has a count of parameters: 12 width^2 depth stands for it" in out
    assert "tokens: is not known, so it has no exponent of its own" in out


def test_a_table_without_widths_tells_sizes_by_their_parameters(cli: Cli, tmp_path: Path) -> None:
    keys = ("parameters", "tokens", "batch_size", "log2_lr", "val_loss")
    lines = [{key: getattr(run, key) for key in keys} for run in runs(GRID[:1] + GRID[8:9] + GRID[16:17])]
    code, out, _ = cli("transfer", "--from", write(tmp_path / "bare.csv", lines), "--law", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["law"]["exponents"]["parameters"]["smallest"] == 2e8
    assert "no column width: sizes are told apart by their parameters, which are shown as widths" in answer["notes"]


def finished_sweep(*more: str) -> SweepDir:
    """A finished sweep under SP over three widths, batch sizes and two horizons, whose optima follow TRUTH."""
    axes = ["sweep.width_ratios=[1,2,4]", "sweep.axes={training.batch_size:[8,32]}", "sweep.seeds=[0]"]
    length = ["training.steps=null", "training.tokens=8192", "training.batch_size=16"]
    overrides = ["experiment=smoke", "model=llama", "parametrization=sp", "sweep.log2_lrs=[-12,-11,-10,-9,-8,-7,-6,-5]"]
    sweep, planned = plan.save(config.load([*overrides, *axes, *length, *more]), "")
    for run in planned:
        training, ends = run.resolved.training, []
        for _, end in training.horizons(run.resolved.steps):
            tokens = end * training.batch_size * run.size.context
            n, d, b = (math.log2(x) for x in (run.cost.parameters / 1e4, tokens / 8192, training.batch_size / 16))
            u = run.log2_lr - (-8 - 0.6 * n + 0.1 * d + 0.3 * b)
            ends.append({"horizon": tokens, "status": "done", "val_loss": 3 + 0.02 * u * u, "tokens": tokens})
        *shorter, last = ends
        if not shorter:
            del last["horizon"]
        folder = sweep.run(run.run_id)
        folder.path.mkdir(parents=True, exist_ok=True)
        of_run = {"run_id": run.run_id, **run.label_columns(), **last, "branches": shorter, "device": "cpu"}
        folder.write_summary(of_run)
        folder.write_status("done")
    return sweep


@pytest.fixture
def sweep() -> SweepDir:
    return finished_sweep()


def test_a_sweep_over_batch_sizes_has_a_law_and_a_recipe_from_it(cli: Cli, sweep: SweepDir) -> None:
    law = json.loads(cli("transfer", str(sweep.path), "--law", "--json")[1])["law"]
    assert law["curves"] == 9
    assert law["exponents"]["parameters"]["value"] == pytest.approx(-0.6, abs=0.05)
    assert law["exponents"]["batch_size"]["value"] == pytest.approx(0.3, abs=0.05)
    assert law["exponents"]["tokens"]["reason"] == "never varied"

    target = ("--to", "width=128", "tokens=16384", "batch_size=64")
    code, out, _ = cli("transfer", str(sweep.path), *target, "--json", "--format", "pytorch")
    [recipe] = json.loads(out)
    assert code == 0
    assert recipe["training"]["batch_size"] == 64
    assert recipe["training"]["tokens"] == 16384
    n = math.log2(recipe["parameters"] / 1e4)
    assert recipe["log2_lr_optimum"] == pytest.approx(-8 - 0.6 * n + 0.3 * 2 - 0.16, abs=0.1)
    assert "tokens never varied: +1.00 octaves are carried by the assumed tokens^-0.16" in recipe["basis"]
    assert recipe["basis"].endswith("betas and weight decay are those of a batch of 16")
    named = "recipe-adamw-sp-w128-d2-t16384-b64"
    assert {path.name for path in sweep.results.iterdir()} == {"law.json", f"{named}.json", f"{named}-pytorch.py"}
    code, out, _ = cli("transfer", str(sweep.path), *target)
    assert code == 0
    assert "LR for 16.4k tokens of training in batches of 64" in out
    code, _, err = cli("transfer", str(sweep.path), "--law", "--to", "parameters=1e6")
    assert code == 2
    assert "name width and depth of the target" in err


def test_branches_of_a_sweep_are_its_horizons(cli: Cli) -> None:
    sweep = finished_sweep("training.schedule=wsd", "training.branches=[0.25]")
    law = json.loads(cli("transfer", str(sweep.path), "--law", "--json")[1])["law"]
    assert law["curves"] == 18
    assert law["exponents"]["tokens"]["value"] == pytest.approx(0.1, abs=0.05)
    assert law["exponents"]["batch_size"]["value"] == pytest.approx(0.3, abs=0.05)


def test_what_a_rule_carries_already_is_not_carried_twice(cli: Cli) -> None:
    rules = ["training.batch_rule=sde", "training.base_batch_size=16", "sweep.axes=null"]
    sweep = finished_sweep(*rules, "training.horizon_exponent=-0.32", "training.base_tokens=8192")
    here, there = ("batch_size=16", "tokens=8192"), ("batch_size=32", "tokens=16384")
    at = [json.loads(cli("transfer", str(sweep.path), "--to", *to, "--json")[1])[0] for to in (here, there)]
    assert at[0]["log2_lr_optimum"] == pytest.approx(at[1]["log2_lr_optimum"], abs=0.02)
    assert at[1]["log2_lr_high"] > at[0]["log2_lr_high"]
    assert "^0 ± 0.15, beside training.batch_rule=sde, which carries the LR" in at[1]["basis"]
    assert "^0 ± 0.16, beside training.horizon_exponent=-0.32, which carries the LR" in at[1]["basis"]


def test_the_report_of_a_sweep_has_the_law_that_was_asked_for(cli: Cli, sweep: SweepDir) -> None:
    code, out, _ = cli("transfer", str(sweep.path), "--law")
    assert code == 0
    assert f"wrote {sweep.law_path}" in out
    [law] = json.loads(sweep.law_path.read_text())["laws"]
    assert all(line in out for line in law["sentences"])
    assert cli("report", str(sweep.path))[0] == 0
    report = (sweep.results / "report.html").read_text()
    assert "<h2>One law over size, tokens and batch</h2>" in report
    assert "twice the parameters" in report
    sweep.law_path.write_text('{"laws": [{"sentences": 3}]}')
    assert page._law(sweep) == ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ("--to", "tokens=1e11", "batch_size=64"),
            "--to lacks width=N depth=N, or parameters=N: 200M to 1G were trained",
        ),
        (("--to", "parameters=1e9", "--law"), "--to lacks batch_size=N: 32 to 128 were trained"),
        (("--to", "batch_size=0"), "--to batch_size=0: expected"),
        (("--law", "--strict"), "--strict is of a ladder's verdict, which a law does not have"),
        (("--to", "batch_size=64", "parameters=1e9", "--results", "x"), "--results is for the recipes of a table"),
        (("--law", "--optimizer", "adam"), "no optimizer 'adam' among these runs; did you mean 'adamw'?"),
        (("--to", "batch_size=64", "parameters=1e9", "--format", "pytorch"), "add --base model=NAME"),
        (("--to", "parameters=1e9"), "--to parameters=1e9: only a law carries an LR there"),
    ],
)
def test_bad_words_beside_a_law_are_one_line(cli: Cli, table: str, words: tuple[str, ...], expected: str) -> None:
    code, _, err = cli("transfer", "--from", table, *words)
    assert code == 2
    assert expected in err
    assert "Traceback" not in err
