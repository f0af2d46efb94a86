"""A compute-optimal ladder: the length of a run follows from the parameters of its size."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from run_results import results

from mupsweep.analysis.analysis import analyse
from mupsweep.data import prepare
from mupsweep.errors import ConfigError
from mupsweep.recipes.recipe import target_recipe
from mupsweep.store.run_dir import RunDir
from mupsweep.sweep import config, plan
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.sweep.settings import settings
from mupsweep.sweep.tensor_rules import rules
from mupsweep.training.build import build
from mupsweep.training.trainer import train

LADDER = ["experiment=smoke", "sweep.log2_lrs=[-6]", "sweep.width_ratios=[1,2,4]", "parametrization=mup"]
PER_PARAMETER = ["training.steps=null", "training.tokens_per_parameter=0.05"]
TOKENS_PER_STEP = 4 * 32


@cache
def planned(*overrides: str) -> list[RunSpec]:
    """The runs of three widths, the smallest first."""
    return plan.plan(config.load([*LADDER, *PER_PARAMETER, *overrides]))[::-1]


def test_every_size_has_its_own_number_of_steps_tokens_and_flops() -> None:
    steps = [math.ceil(0.05 * run.cost.parameters / TOKENS_PER_STEP) for run in planned()]
    assert [run.size.width_ratio for run in planned()] == [1, 2, 4]
    assert len(set(steps)) == 3
    assert [run.resolved.steps for run in planned()] == steps
    assert [run.cost.tokens for run in planned()] == [TOKENS_PER_STEP * n for n in steps]
    assert [run.row()["tokens"] for run in planned()] == [run.resolved.tokens for run in planned()]
    fixed = plan.plan(config.load([*LADDER, "training.steps=30"]))[::-1]
    for run, other, n in zip(planned(), fixed, steps, strict=True):
        assert run.cost.flops / n == pytest.approx(other.cost.flops / 30, rel=1e-12)


def test_schedule_decay_and_horizon_rule_follow_the_size() -> None:
    words = ["parametrization.weight_decay_rule=timescale", "optimizer.weight_decay=0.5"]
    carried = ["training.horizon_exponent=-0.5", "training.base_tokens=1000"]
    for run in planned(*words, *carried):
        numbers = settings(run.resolved, run.size, run.base_lr)
        assert numbers["training"]["steps"] == run.resolved.steps
        assert numbers["training"]["warmup_steps"] == round(0.1 * run.resolved.steps)
        (up,) = (row for row in rules(run.resolved, run.size, run.base_lr) if row.name == "blocks.0.mlp.up.weight")
        assert up.decay_per_step * run.resolved.steps == pytest.approx(0.5, rel=1e-9)
        assert up.lr == pytest.approx(run.base_lr * up.lr_ratio * (run.resolved.tokens / 1000) ** -0.5, rel=1e-12)


def test_a_stored_plan_gives_its_runs_their_length_back(tmp_path: Path) -> None:
    ladder = config.load([*LADDER, *PER_PARAMETER, "sweep.name=ladder", f"out={tmp_path}"])
    sweep, _ = plan.save(ladder, "mupsweep run")
    for to_train in (True, False):
        loaded = {run.run_id: run.resolved.steps for run in plan.load(sweep, to_train=to_train)}
        assert loaded == {run.run_id: run.resolved.steps for run in planned()}


def test_a_run_is_trained_for_as_long(tmp_path: Path) -> None:
    run = planned()[1]
    summary = train(
        run,
        build(run, torch.device("cpu")),
        prepare(run.resolved.variant.data),
        RunDir(tmp_path),
        torch.device("cpu"),
        Undisturbed(),
    )
    assert (summary["status"], summary["steps"], summary["tokens"]) == ("done", run.resolved.steps, run.cost.tokens)


class Undisturbed:
    """The control of a run that nothing stops."""

    def stop_requested(self) -> bool:
        return False

    def lease_lost(self) -> bool:
        return False


def test_an_analysis_says_that_size_and_tokens_move_together_and_a_target_has_its_own_length() -> None:
    rows = [
        {
            **run.label_columns(),
            "run_id": f"{run.size.name}-{log2_lr}",
            "log2_lr": float(log2_lr),
            "status": "done",
            "steps": run.resolved.steps,
            "tokens": run.cost.tokens,
            "flops": run.cost.flops,
            "val_loss": 3 - 0.1 * math.log2(run.size.width_ratio) + 0.03 * (log2_lr + 6) ** 2,
        }
        for run in planned()
        for log2_lr in range(-9, -3)
    ]
    analysis = analyse(results(rows))
    assert analysis.remarks[0].startswith("size and training tokens move together, ")
    assert list(analysis.flops.values()) == [run.cost.flops for run in planned()]  # what a speed-up is read from
    level = analyse(results({**row, "tokens": 3840} for row in rows))
    assert not any("move together" in remark for remark in level.remarks)

    resolved = planned()[0].resolved
    recipe = target_recipe(analysis.groups, resolved, {"width": 8 * resolved.model.width})
    tokens = resolved.at(resolved.size(8.0, 1.0)).tokens
    assert recipe["training"]["tokens"] == recipe["horizon"]["tokens"] == tokens > planned()[-1].cost.tokens
    assert recipe["horizon"]["note"] == f"for {tokens:,} training tokens, 0.05 per parameter, as all sizes of the sweep"
    longer = target_recipe(analysis.groups, resolved, {"width": 8 * resolved.model.width, "tokens": 10 * tokens})
    assert longer["horizon"]["note"].startswith(f"NOT carried to {10 * tokens:,} tokens: measured at {tokens:,}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training.tokens_per_parameter=20"], r"training\.steps=30 and .*tokens_per_parameter=20\.0: set exactly one"),
        ([*PER_PARAMETER, "training.schedule=wsd", "training.branches=[0.5]"], "each size has its own: give one"),
        (["training.steps=null", "training.tokens_per_parameter=0"], "expected positive"),
        ([*PER_PARAMETER, "training.warmup=12"], "12 steps of warm-up in a run of"),
    ],
)
def test_lengths_that_contradict_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan.plan(config.load([*LADDER, *words]))


def test_runs_of_one_length_are_what_they_were() -> None:
    variant = config.load(LADDER).variants[0]
    assert "tokens_per_parameter" not in config.variant_tree(variant)["training"]
    resolved = plan.plan(config.load(LADDER))[0].resolved
    assert resolved.at(resolved.size(2.0, 1.0)) is resolved
    assert replace(resolved, length_of=resolved.size(2.0, 1.0)).steps == resolved.steps
