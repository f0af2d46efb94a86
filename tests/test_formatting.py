"""Words that messages share."""

from __future__ import annotations

import pytest

from mupsweep.formatting import counted, nearest, verb

NAMES = ("sp", "mup", "spectral", "depth_mup")


@pytest.mark.parametrize("typed", ["mup", "muP", "MUP", "μP", "µP", "μp", "muup"])
def test_the_nearest_name_is_found_however_it_is_typed(typed: str) -> None:
    assert nearest(typed, NAMES) == "did you mean 'mup'? valid: depth_mup, mup, sp, spectral"


def test_a_valid_name_is_told_as_it_is_written() -> None:
    assert nearest("sweeps/smoke", ["sweeps/Smoke"]) == "did you mean 'sweeps/Smoke'? valid: sweeps/Smoke"
    assert nearest("xyz", NAMES) == "valid: depth_mup, mup, sp, spectral"


def test_one_is_no_plural() -> None:
    assert [counted(n, "run") for n in (0, 1, 2)] == ["0 runs", "1 run", "2 runs"]
    assert [verb(n, "need") for n in (0, 1, 2)] == ["need", "needs", "need"]
    assert [verb(n, "are") for n in (0, 1, 2)] == ["are", "is", "are"]
