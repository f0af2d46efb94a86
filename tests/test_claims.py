"""The page of `make claims` says what mupsweep says of the recorded runs, and every sweep of a preset is on it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import claims
import readme


def test_every_sweep_of_a_preset_tries_a_claim_and_is_recorded() -> None:
    tried = {name for claim in claims.CLAIMS for name in claim.sweeps}
    assert tried == set(claims.commands())
    for name in tried:
        assert (claims.RECORDED / f"{name}.csv").exists()
        picture = claims.RECORDED / f"{name}.svg"
        assert f"]({picture.relative_to(claims.EXPERIMENTS)})" in claims.PAGE.read_text()
        assert picture.stat().st_size < 100_000
        ElementTree.parse(picture)


def test_the_page_has_the_verdicts_on_the_recorded_runs() -> None:
    text = claims.PAGE.read_text()
    table = claims.transfer("claim_gqa", claims.MUP_TRANSFERS)
    assert len(table.findings) == 4
    for finding in table.findings:
        optimizer, rule, *_, verdict = finding.cells
        assert re.search(rf"\| {optimizer} \| {rule} \|.*\| {verdict} \| \*\*{finding.verdict}\*\* \|", text)


@pytest.mark.slow
def test_the_page_is_what_the_recorded_runs_give() -> None:
    assert readme.same(claims.PAGE.read_text(), claims.page(), fitted=True)
