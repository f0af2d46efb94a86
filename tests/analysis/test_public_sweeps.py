"""scripts/judge.py: what its references say of public sweeps, with a plain parabola as the program that is judged."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import judge as script

from mupsweep.analysis.estimate import Estimate
from mupsweep.analysis.verdict import DRIFTS, INCONCLUSIVE, TRANSFERS

HALF = 0.4  # octaves: half-width of the parabola's intervals here


def around(middle: float) -> Estimate:
    return Estimate(middle, middle - HALF, middle + HALF)


def parabola(ladder: script.Ladder) -> script.Answer:
    optima = [around(script.vertex(size)) if size.fitted else script.UNKNOWN for size in ladder.sizes]
    moved = script.vertex(ladder.curves[-1]) - script.vertex(ladder.curves[0])
    return script.Answer(script.reference_verdict(ladder), around(moved), tuple(optima))


def staying(ladder: script.Ladder, position: float) -> script.Handed:
    last = script.vertex(ladder.curves[-1])
    return script.Handed(around(last), last)


@cache
def figures() -> dict[str, float]:
    return script.measure(sorted(script.TABLES.glob("*.csv")), parabola, staying)


def test_ladders_and_references_are_those_of_the_tables() -> None:
    ladders = [ladder for table in sorted(script.TABLES.glob("*.csv")) for ladder in script.read(table)]
    expected = [script.reference_verdict(ladder) for ladder in ladders]
    assert {verdict: expected.count(verdict) for verdict in (DRIFTS, TRANSFERS, INCONCLUSIVE)} == {
        DRIFTS: 9,
        TRANSFERS: 14,
        INCONCLUSIVE: 16,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("halves: ladders", 21),
        ("    of the best LR", 0.303),
        ("    of a parabola", 0.144),
        ("forecasts", 34),
        ("    of staying", 0.722),
        ("    of staying, mean", 0.116),
        ("    of staying, median", 0.007),
    ],
)
def test_figures_of_plain_answers(name: str, value: float) -> None:
    assert figures()[name] == pytest.approx(value, abs=0.004)


def test_what_is_handed_over_is_what_is_charged() -> None:
    drawings = figures()
    assert drawings["forecast: regret, mean"] == drawings["    of staying, mean"]
    assert drawings["forecast: rms error"] == drawings["    of staying"]
    assert drawings["halves: rms error"] == pytest.approx(drawings["    of a parabola"])


def test_a_bar_is_missed_by_a_worse_figure_and_by_none() -> None:
    assert not script.is_missed("right", 0.8)
    assert script.is_missed("right", 0.7)
    assert script.is_missed("width", 0.8)
    assert script.is_missed("width", float("nan"))
