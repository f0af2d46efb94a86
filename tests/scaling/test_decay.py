"""What weight decay means under every rule: the shrinkage per step, by hand, for whole runs as they are built."""

from __future__ import annotations

import pytest

from mupsweep.scaling import WEIGHT_DECAY_RULES
from mupsweep.sweep.config import load
from mupsweep.sweep.run_spec import resolve
from mupsweep.sweep.tensor_rules import TensorRule, audit, rules

REL = 1e-12  # a dozen float64 operations
WD, LR, STEPS, R_N = 0.25, 2.0**-6, 40, 4.0


def row(rule: str, lr: float, *overrides: str, width_ratio: float = R_N, name: str = "") -> TensorRule:
    """The rule of a hidden matrix, with decay, at `width_ratio` times the base width."""
    arguments = ["experiment=smoke", "parametrization=mup", f"parametrization.weight_decay_rule={rule}"]
    arguments += [f"optimizer.weight_decay={WD}", f"training.steps={STEPS}", *overrides]
    resolved = resolve(load(arguments).variants[0])
    rows = {r.name: r for r in rules(resolved, resolved.size(width_ratio, 1.0), lr)}
    return rows[name or next(n for n, r in rows.items() if r.role.value == "hidden")]


EXPECTED = {  # shrinkage per step of a hidden matrix under AdamW
    "coupled_constant": lambda lr, r_n: lr * WD,
    "independent": lambda lr, r_n: WD,
    "inverse_width": lambda lr, r_n: WD / r_n,
    "timescale": lambda lr, r_n: WD / STEPS,
    "sqrt_width": lambda lr, r_n: lr * WD / r_n**0.5,
    "unscaled": lambda lr, r_n: lr / r_n * WD,
}


def test_every_rule_is_covered() -> None:
    assert set(EXPECTED) == set(WEIGHT_DECAY_RULES)


@pytest.mark.parametrize("rule", EXPECTED)
@pytest.mark.parametrize("lr", [LR, 4 * LR])
@pytest.mark.parametrize("r_n", [1.0, R_N])
def test_the_shrinkage_per_step(rule: str, lr: float, r_n: float) -> None:
    table_row = row(rule, lr, width_ratio=r_n)
    assert table_row.decay_per_step == pytest.approx(EXPECTED[rule](lr, r_n), rel=REL)
    assert table_row.lr * table_row.weight_decay == pytest.approx(table_row.decay_per_step, rel=REL)


def test_the_rest_of_a_hybrid_decays_by_its_own_lr() -> None:
    head = row("coupled_constant", LR, "optimizer=muon", f"optimizer.rest.weight_decay={WD}", name="head.weight")
    assert head.optimizer == "adamw"
    assert head.lr == pytest.approx(0.1 * LR, rel=REL)
    assert head.decay_per_step == pytest.approx(0.1 * LR * WD, rel=REL)
    same = row("independent", LR, "optimizer=muon", f"optimizer.rest.weight_decay={WD}", name="head.weight")
    assert same.decay_per_step == pytest.approx(WD, rel=REL)


def test_a_longer_run_decays_less_per_step_at_a_fixed_timescale() -> None:
    short, long = (row("timescale", LR, f"training.steps={n}") for n in (STEPS, 10 * STEPS))
    assert short.decay_per_step == pytest.approx(10 * long.decay_per_step, rel=REL)


def test_sqrt_width_keeps_the_steady_state_of_hidden_matrices_and_decays_nothing_else() -> None:
    """At eight times the width 1/8 of the LR and sqrt(8) times the decay (2510.15262, abstract)."""
    config = load(["parametrization=mup", "parametrization.weight_decay_rule=sqrt_width", "optimizer.weight_decay=0.1"])
    resolved = resolve(config.variants[0])
    by_width = [{r.name: r for r in rules(resolved, resolved.size(r_n, 1.0), LR)} for r_n in (1.0, 8.0)]
    for name, big in by_width[1].items():
        small = by_width[0][name]
        if big.role.value != "hidden":
            assert (small.weight_decay, big.weight_decay) == (0.0, 0.0)
            continue
        assert small.weight_decay == pytest.approx(0.1, rel=REL)
        assert big.lr / small.lr == pytest.approx(1 / 8, rel=REL)
        assert big.weight_decay / small.weight_decay == pytest.approx(8**0.5, rel=REL)
        top_singular_value = [(r.lr / r.weight_decay) ** 0.5 * r.shape[1] ** 0.75 for r in (small, big)]
        assert top_singular_value[1] == pytest.approx(top_singular_value[0], rel=REL)


@pytest.mark.parametrize("words", [["parametrization=sp"], ["parametrization=mup", "optimizer=muon"]])
def test_where_the_lr_does_not_fall_as_the_width_grows_the_audit_says_that_sqrt_width_says_nothing(
    words: list[str],
) -> None:
    rule = "parametrization.weight_decay_rule=sqrt_width"
    notes = audit(resolve(load([*words, rule]).variants[0]))
    assert any("goes as 1:" in note and "sqrt_width" in note for note in notes)
    assert not any("sqrt_width" in note for note in audit(resolve(load(["parametrization=mup", rule]).variants[0])))
