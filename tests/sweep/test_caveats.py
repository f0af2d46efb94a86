"""What the audit of `mupsweep rules` says of optimizers whose rule does not keep the optimum where it is."""

from __future__ import annotations

from dataclasses import replace

import chosen
import pytest

from mupsweep.errors import ConfigError
from mupsweep.sweep import config
from mupsweep.sweep.run_spec import resolve
from mupsweep.sweep.tensor_rules import audit, rules

MOVES = "moves with the width"


def notes(*overrides: str) -> list[str]:
    return audit(resolve(config.load([*overrides]).variants[0]))


SPECTRAL_NORM = ("optimizer.spectral_norm=true", "optimizer.lr_ratio=0.1")
CURES = {
    "adamuon": SPECTRAL_NORM,
    "lamb_published": ("optimizer.weight_norm=frobenius",),
    "shampoo2": SPECTRAL_NORM,
    "soap_published": SPECTRAL_NORM,
}


@pytest.mark.parametrize("name", CURES)
def test_a_moving_optimum_is_said_with_the_option_that_cures_it(name: str) -> None:
    (note,) = (note for note in notes(f"optimizer={name}") if MOVES in note)
    assert note.startswith(f"the optimum of {name} {MOVES}: ")
    cure = CURES[name]
    assert f"; {' '.join(cure)} cures it" in note
    assert not any(MOVES in note for note in notes(f"optimizer={name}", *cure))


@pytest.mark.parametrize("name", [name for name in config.choices("optimizer") if name not in CURES])
def test_no_other_optimum_is_said_to_move(name: str) -> None:
    assert not any(MOVES in note for note in notes(*chosen.words("optimizer", name)))


def test_lamb_is_the_form_that_keeps_its_optimum_and_the_published_one_says_how_far_it_grows() -> None:
    assert not notes("optimizer=lamb", "parametrization=mup")
    note = notes("optimizer=lamb_published", "parametrization=mup")[0]
    assert "features change as width^+0.46 and ||dW||_R of hidden matrices as width^+0.45" in note
    assert note.endswith("(+0.02 and -0.02), which optimizer=lamb has")


def test_soap_is_the_form_that_keeps_its_optimum_and_the_published_one_says_how_far_it_grows() -> None:
    assert not notes("optimizer=soap")
    (note,) = notes("optimizer=soap_published")
    assert "features change as width^+0.98 and ||dW||_R of hidden matrices as width^+0.76" in note
    assert "cures it (-0.02 and +0.01), which optimizer=soap has" in note
    assert not notes("optimizer=soap_published", "optimizer.block_size=32")  # Qiu et al.'s other cure


def test_sophia_says_how_much_it_clips_and_which_rho_clips_less() -> None:
    (note,) = notes("optimizer=sophia")
    assert note.startswith("sophia clips most entries of small models")
    assert "with optimizer.rho=0.04 100 to 90 % at width 32 in 280 steps, with 0.4 98 to 62 %" in note


@pytest.mark.parametrize(("block", "width", "warns"), [(512, 256, True), (256, 256, False), (128, 64, True)])
def test_blocks_beyond_the_base_width_are_warned_of(block: int, width: int, warns: bool) -> None:
    found = notes("optimizer=muon", f"optimizer.block_size={block}", f"model.width={width}")
    expected = f"optimizer.block_size={block} exceeds the base width {width}: "
    assert [note.startswith(expected) for note in found] == [True] * warns
    assert all(note.endswith(f"choose at most {width}") for note in found)


def test_shampoo2_as_it_stands_is_warned_of_its_blocks() -> None:
    expected = "optimizer.block_size=512 exceeds the base width 256: "
    assert any(note.startswith(expected) for note in notes("optimizer=shampoo2"))


def test_adams_rule_on_muon_is_adams_and_is_called_wrong() -> None:
    """LRs of hidden matrices fall as 1/r_n (Qiu et al. 2512.05620), and a step still shrinks by as much."""
    words = ["data.tokenizer=bytes", "optimizer=muon_jordan", "optimizer.weight_decay=0.1"]
    own, wrong, adam = (
        resolve(config.load([*words, f"parametrization={name}", *more]).variants[0])
        for name, more in (("mup", []), ("mup_adamw_rule", []), ("mup", ["optimizer=adamw", "optimizer.lr_ratio=0.1"]))
    )
    size = own.size(4.0, 1.0)
    of_muon, of_wrong, of_adam = ({row.name: row for row in rules(one, size, 2.0**-6)} for one in (own, wrong, adam))
    for name, row in of_wrong.items():
        assert row.lr_ratio == pytest.approx(of_adam[name].lr_ratio, rel=1e-12), name
        assert row.decay_per_step == pytest.approx(of_muon[name].decay_per_step, rel=1e-12), name
        assert (row.init_std, row.multiplier, row.eps) == (
            (mine := of_muon[name]).init_std,
            mine.multiplier,
            mine.eps,
        ), name
    up = "blocks.0.mlp.up.weight"
    assert (of_muon[up].lr_ratio, of_wrong[up].lr_ratio) == pytest.approx((1.0, 1 / 4), rel=1e-12)
    (note,) = audit(wrong)
    assert note.startswith("WRONG RULE, as parametrization.update_law_of=adamw asks: LRs of muon_jordan scale as if")
    assert "those of hidden tensors as r_n^-1, where its own updates ask for 1; expect no transfer" in note
    assert audit(own) == audit(adam) == notes("optimizer=adamw", "parametrization=mup_adamw_rule") == []


def test_a_law_of_no_name_is_refused_and_none_leaves_runs_as_they_were() -> None:
    with pytest.raises(ConfigError, match=r"parametrization\.update_law_of=adam \(mup\): did you mean 'adamw'"):
        notes("parametrization=mup", "parametrization.update_law_of=adam")
    variant = config.load(["data.tokenizer=bytes", "parametrization=mup"]).variants[0]
    older = {key: value for key, value in variant.parametrization.items() if key != "update_law_of"}
    assert resolve(replace(variant, parametrization=older)).digest == resolve(variant).digest
