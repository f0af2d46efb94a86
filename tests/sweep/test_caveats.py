"""What the audit of `mupsweep rules` says of optimizers whose rule does not keep the optimum where it is."""

from __future__ import annotations

import chosen
import pytest

from mupsweep.sweep import config
from mupsweep.sweep.run_spec import resolve
from mupsweep.sweep.tensor_rules import audit

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
