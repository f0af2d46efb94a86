"""The page of `make claims` says what mupsweep says of the recorded runs, and every command of a preset is on it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import claim_tables
import claims
import readme


def test_every_command_of_a_preset_is_on_the_page_and_recorded() -> None:
    text = claims.PAGE.read_text()
    for name, words in claims.commands().items():
        assert f"- `mupsweep {words}`" in text
        assert (claims.RECORDED / f"{name}.csv").exists()
    for name in filter(claims.is_sweep, claims.commands()):
        picture = claims.RECORDED / f"{name}.svg"
        assert f"]({picture.relative_to(claims.EXPERIMENTS)})" in text
        assert picture.stat().st_size < 150_000
        ElementTree.parse(picture)


def test_a_block_has_the_verdicts_on_the_recorded_runs() -> None:
    text = claims.PAGE.read_text()
    table = claim_tables.transfer("claim_gqa", sp="drifts", mup="transfers")
    assert len(table.findings) == 4
    for finding in table.findings:
        optimizer, rule, *_, verdict = finding.cells
        assert re.search(rf"\| {optimizer} \| {rule} \|.*\| {verdict} \| \*\*{finding.verdict}\*\* \|", text)


@pytest.mark.slow
def test_the_page_is_what_the_recorded_runs_give() -> None:
    old = claims.PAGE.read_text()
    assert readme.same(old, claims.page(old), fitted=True)
