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


AT_ONE = ("training.batch_size=1", "training.steps=40")
AT_FOUR = ("training.batch_size=4", "training.steps=10", "training.base_batch_size=1")


@pytest.mark.parametrize(
    "optimizer",
    ["muon", "muon_jordan", "muon_bernstein", "muon_kimi", "lion", "sophia", "soap", "lamb", "adamuon", "adamw"],
)
def test_the_sqrt_rule_doubles_every_lr_at_four_times_the_batch_and_a_token_decays_as_before(optimizer: str) -> None:
    words = (f"optimizer={optimizer}", "optimizer.weight_decay=0.1")
    base, big = resolved(*words, *AT_ONE), resolved(*words, *AT_FOUR, "training.batch_rule=sqrt")
    assert ratio(big, base) == {2.0}  # those of the optimizer of the other tensors too
    decays = [[row.decay_per_step for row in rules(one, one.size(2.0, 1.0), LR)] for one in (base, big)]
    assert decays[1] == pytest.approx([4 * decay for decay in decays[0]], rel=REL)
    assert any(decay > 0 for decay in decays[0])
    for scaled, at_base in zip(big.optimizers, base.optimizers, strict=True):
        for key in ("betas", "momentum"):
            assert getattr(scaled.optimizer, key, None) == getattr(at_base.optimizer, key, None)
    assert any("batch rule sqrt is on" in note for note in audit(big))


@pytest.mark.parametrize(("optimizer", "factor"), [("adamw", 0.5), ("muon", 0.5), ("shampoo", 0.25), ("lion", 1.0)])
def test_eps_follows_the_noise_that_gradients_are(optimizer: str, factor: float) -> None:
    """Shampoo adds eps to squares of gradients; Lion has none."""
    optimizers = [
        resolved(f"optimizer={optimizer}", *words).optimizers[0].optimizer
        for words in (AT_ONE, (*AT_FOUR, "training.batch_rule=sqrt"))
    ]
    assert optimizers[1].eps == pytest.approx(factor * optimizers[0].eps, rel=REL)


@pytest.mark.parametrize(("optimizer", "rule"), [("adamw", "sde"), ("muon", "sqrt")])
def test_with_the_base_tokens_a_rule_carries_to_another_duration(optimizer: str, rule: str) -> None:
    """At sixteen times the tokens a quarter of the LR, and as much decay over the whole run."""
    words = (f"optimizer={optimizer}", "optimizer.weight_decay=0.1")
    base = resolved(*words, "training.batch_size=4", "training.steps=10")
    tokens = 10 * 4 * base.model.context
    on = (f"training.batch_rule={rule}", "training.base_batch_size=4", f"training.base_tokens={tokens}")
    long = resolved(*words, "training.batch_size=4", "training.steps=160", *on)
    assert ratio(long, base) == {0.25}
    decays = [[row.decay_per_step for row in rules(one, one.size(2.0, 1.0), LR)] for one in (base, long)]
    assert [160 * decay for decay in decays[1]] == pytest.approx([10 * decay for decay in decays[0]], rel=REL)
    if isinstance(long.optimizers[0].optimizer, AdamW):
        assert long.optimizers[0].optimizer.betas == pytest.approx((1 - 0.1 / 16, 1 - 0.05 / 16), rel=REL)
    assert any(f"batch rule {rule} is on" in note and f"{tokens} tokens" in note for note in audit(long))
    # four times the batch and the tokens take as many steps, and nothing changes
    both = resolved(*words, "training.batch_size=16", "training.steps=10", *on)
    assert both.optimizers == base.optimizers


def test_with_an_exponent_of_its_own_the_horizon_is_no_matter_of_the_batch_rule() -> None:
    words = ("training.batch_size=4", "training.steps=160", "training.batch_rule=sde", "training.base_batch_size=4")
    tokens = 10 * 4 * resolved().model.context
    carried = resolved(*words, f"training.base_tokens={tokens}", "training.horizon_exponent=-0.25")
    assert ratio(carried, resolved("training.batch_size=4")) == {0.5}
