"""The page of `make judge` has every public sweep, with a picture that stays small."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

TABLES = Path(__file__).parent / "tables"


@pytest.mark.parametrize("table", sorted(TABLES.glob("*.csv")), ids=lambda path: path.stem)
def test_every_table_is_judged_and_has_a_small_picture(table: Path) -> None:
    picture = table.with_suffix(".svg")
    assert f"]({picture.name})" in (TABLES / "JUDGED.md").read_text()
    assert picture.stat().st_size < 60_000
    assert len(list(ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}circle"))) >= 8
