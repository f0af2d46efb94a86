"""The rules for batch size and token horizon: off unless asked for, and what they change when they are on."""

from __future__ import annotations

import pytest

from mupsweep.optimizers.adamw import AdamW
from mupsweep.sweep.config import load
from mupsweep.sweep.run_spec import ResolvedVariant, resolve
from mupsweep.sweep.tensor_rules import audit, rules

REL = 1e-12  # a dozen float64 operations
LR = 2.0**-6


def resolved(*overrides: str) -> ResolvedVariant:
    return resolve(load(["experiment=smoke", "parametrization=mup", *overrides]).variants[0])


def lrs(variant: ResolvedVariant) -> list[float]:
    return [row.lr for row in rules(variant, variant.size(2.0, 1.0), LR)]


def ratio(variant: ResolvedVariant, other: ResolvedVariant) -> set[float]:
    return {round(a / b, 12) for a, b in zip(lrs(variant), lrs(other), strict=True)}


def test_nothing_is_on_by_default() -> None:
    variant = resolved()
    assert (variant.training.batch_rule, variant.training.horizon_exponent) == ("none", 0.0)
    assert all(scaled.lr_ratio == 1.0 for scaled in variant.optimizers)
    assert not [note for note in audit(variant) if "rule" in note]


@pytest.mark.parametrize(("optimizer", "factor"), [("adamw", 2.0), ("sgd", 4.0)])
def test_the_sde_rule_at_four_times_the_batch(optimizer: str, factor: float) -> None:
    base = resolved(f"optimizer={optimizer}", "training.batch_size=4")
    big = resolved(
        f"optimizer={optimizer}", "training.batch_size=4", "training.batch_rule=sde", "training.base_batch_size=1"
    )
    assert ratio(big, base) == {factor}
    assert any("batch rule sde is on" in note for note in audit(big))


@pytest.mark.parametrize("optimizer", ["adamw", "adopt", "sgd"])
@pytest.mark.parametrize("rule", ["coupled_constant", "independent", "inverse_width", "timescale", "unscaled"])
def test_at_four_times_the_batch_the_decay_per_step_is_four_times(optimizer: str, rule: str) -> None:
    """Over a run of as many tokens, so that a token decays as before."""
    words = [f"optimizer={optimizer}", f"parametrization.weight_decay_rule={rule}", "optimizer.weight_decay=0.1"]
    words += ["optimizer.betas=[0.9,0.95]"] if optimizer != "sgd" else []
    base = resolved(*words, "training.batch_size=1", "training.steps=40")
    four = ("training.batch_size=4", "training.steps=10", "training.batch_rule=sde", "training.base_batch_size=1")
    big = resolved(*words, *four)
    rows = [rules(variant, variant.size(2.0, 1.0), LR) for variant in (base, big)]
    decays = [(small.decay_per_step, large.decay_per_step) for small, large in zip(*rows, strict=True)]
    assert sum(small > 0 for small, _ in decays) > 2
    assert [large for _, large in decays] == pytest.approx([4 * small for small, _ in decays], rel=REL)


def test_the_sde_rule_shortens_adams_averages_and_lowers_eps() -> None:
    (scaled,) = resolved("training.batch_size=4", "training.batch_rule=sde", "training.base_batch_size=1").optimizers
    assert isinstance(scaled.optimizer, AdamW)
    assert scaled.optimizer.betas == pytest.approx((0.6, 0.8), rel=REL)
    assert scaled.optimizer.eps == pytest.approx(0.5e-12, rel=REL)


def test_at_the_base_batch_the_rule_changes_nothing() -> None:
    overrides = ("training.batch_size=4", "training.batch_rule=sde", "training.base_batch_size=4")
    assert resolved(*overrides).optimizers == resolved("training.batch_size=4").optimizers


def test_the_horizon_rule_multiplies_every_lr_by_a_power_of_the_token_ratio() -> None:
    base = resolved("optimizer=muon")
    tokens = base.steps * base.training.batch_size * base.model.context
    long = resolved("optimizer=muon", "training.horizon_exponent=-0.5", f"training.base_tokens={tokens * 16}")
    assert ratio(long, base) == {4.0}
    assert any("horizon rule is on" in note for note in audit(long))


def test_both_rules_enter_the_runs_identity() -> None:
    overrides = ("training.batch_size=4", "training.batch_rule=sde", "training.base_batch_size=4")
    assert resolved(*overrides).digest != resolved("training.batch_size=4").digest
