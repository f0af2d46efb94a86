"""The figure of a coordinate check."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mupsweep.check.exponents import DEPTH, WIDTH, Coordinates, Row
from mupsweep.check.measure import CHANGE, FEATURES, LOGITS
from mupsweep.check.regression import slope
from mupsweep.errors import ConfigError
from mupsweep.report.figures.coordinates import check, draw

SIZES = {WIDTH: (32, 64, 128, 256), DEPTH: (2, 4, 8, 16)}


def row(axis: str, quantity: str, exponent: float, promised: Fraction | None) -> Row:
    values = {count: tuple(0.01 * count * size**exponent for size in SIZES[axis]) for count in (2, 5, 10)}
    exponents = {count: slope(SIZES[axis], v) for count, v in values.items()}
    return Row(axis, CHANGE + quantity, "", None, SIZES[axis], values, exponents, promised)


def checked(name: str, exponent: float, promised: Fraction | None) -> Coordinates:
    rows = tuple(row(axis, quantity, exponent, promised) for axis in SIZES for quantity in (FEATURES, LOGITS))
    return Coordinates(("nanogpt", "adamw", name), -8.0, rows)


BOTH = [checked("sp", 1.0, None), checked("mup", 0.04, Fraction(0))]


def texts(svg: Path) -> list[str]:
    """Comments hold the text that matplotlib draws as paths."""
    return [text.strip() for text in re.findall(r"<!--(.*?)-->", svg.read_text(), re.DOTALL)]


def test_every_variant_and_axis_is_a_column_with_its_exponents(tmp_path: Path) -> None:
    path = tmp_path / "check.svg"
    draw(BOTH, path)
    ElementTree.fromstring(path.read_text())
    drawn_texts = texts(path)
    assert drawn_texts.count("sp") == drawn_texts.count("mup") == 2
    assert drawn_texts.count("exponent +1.00") == 4
    assert drawn_texts.count("exponent +0.04, promised 0") == 4
    assert {"change of features", "change of logits", "width", "depth", "after 2 steps", "after 10 steps"} <= set(
        drawn_texts
    )
    assert not any("attention" in text for text in drawn_texts)  # nobody measured it


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_same_check_draws_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    paths = [tmp_path / f"{name}{suffix}" for name in ("a", "b")]
    for path in paths:
        draw(BOTH, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--figure .*check\.gif: expected a path that ends in \.png or \.svg"):
        check(tmp_path / "check.gif")
