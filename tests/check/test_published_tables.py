"""Every cell of the published scaling tables, as printed, against what the solver gives for our optimizers."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from fractions import Fraction

import pytest

from mupsweep.check.published_tables import ROWS, TABLES, Cell, Row, cells, configured
from mupsweep.scaling import Monomial, Parametrization, Role, Rule, UpdateLaw, symbolic
from mupsweep.scaling.laws import ENTRYWISE
from mupsweep.scaling.monomial import ONE, R_L, R_N
from mupsweep.scaling.parametrizations.sp import Standard
from mupsweep.scaling.parametrizations.spectral import Spectral

CELLS = list(cells())


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_solver_reproduces_the_published_cell(cell: Cell) -> None:
    assert cell.solved() == cell.printed


def test_no_published_cell_is_lost_or_given_twice() -> None:
    assert Counter(cell.table.source for cell in CELLS) == {table.source: table.count for table in TABLES}
    assert len({str(cell) for cell in CELLS}) == len(CELLS) == 451
    assert {cell.optimizer for cell in CELLS} == set(ROWS)


def mismatches(name: str, row: Row) -> int:
    """How many cells of an optimizer another one would get wrong."""
    return sum(cell.solved(row) != cell.printed for cell in CELLS if cell.optimizer == name)


@pytest.mark.parametrize("optimizer", ROWS)
def test_an_optimizer_with_another_law_contradicts_its_rows(optimizer: str) -> None:
    others = [mismatches(optimizer, ROWS[other]) for other in ("muon", "adamw")]
    assert max(others) >= 1


def test_every_pair_of_laws_is_told_apart_by_the_tables() -> None:
    """An optimizer is told from every other whose LR or decay differs anywhere: the tables bite.

    Of LAMB only LRs are printed, in the init form and for width alone: 1 everywhere, as of some others.
    """
    solved = {name: [cell.solved(row) for cell in CELLS] for name, row in ROWS.items()}
    rules = defaultdict(list)
    for name, values in solved.items():
        rules[tuple(v for v, cell in zip(values, CELLS, strict=True) if cell.quantity != "eps")].append(name)
    for names in rules.values():
        for others in rules.values():
            if names is not others and names != ["lamb"]:
                pairs = zip(solved[others[0]], CELLS, strict=True)
                assert any(v != cell.printed for v, cell in pairs if cell.optimizer in names), (names, others)
    assert len(rules) >= 13


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("row", sorted(ROWS))
def test_standard_parametrization_scales_nothing(row: str, role: Role) -> None:
    law = configured(ROWS[row].overrides).update_law(ROWS[row].dims)
    assert symbolic(Standard(), law, role) == Rule(ONE, ONE, ONE, ONE, ONE)


@pytest.mark.parametrize(
    ("role", "multiplier"), [(Role.INPUT, ONE), (Role.HIDDEN, R_N ** Fraction(-1, 2)), (Role.OUTPUT, R_N**-1)]
)
@pytest.mark.parametrize("output", ["multiplier", "init"])
def test_gupta_multiplier_form_is_the_same_function_at_init(role: Role, multiplier: Monomial, output: str) -> None:
    """Gupta Table 2 in black: variance 1 everywhere, multipliers 1, 1/sqrt(n_in), 1/n_in."""
    rule = symbolic(Spectral("mup", None, output=output), ENTRYWISE, role)
    assert rule.multiplier * rule.init_std == multiplier


@dataclass(frozen=True)
class Disagreement:
    """A printed cell that the spectral condition contradicts, and what it gives instead."""

    source: str
    parametrization: Parametrization
    law: UpdateLaw
    role: Role
    printed: Monomial
    eps: Monomial


CP, GUPTA_MUP = Spectral("completep", "1"), Spectral("mup", None, output="init")
SHAMPOO = configured(ROWS["shampoo"].overrides).thresholds()["eps"].law
DISAGREEMENTS = [
    # CompleteP's code scales the eps of every group as in a block; Zheng and Qiu leave L out elsewhere.
    Disagreement("CompleteP", CP, ENTRYWISE, Role.INPUT, R_N**-1 * R_L**-1, R_N**-1),
    Disagreement("CompleteP", CP, ENTRYWISE, Role.OUTPUT, R_N**-1 * R_L**-1, R_N**-1),
    # Gupta: Shampoo's delta needs no scaling. Zheng Table 4 and Qiu's code scale it as the squared gradient.
    Disagreement("Gupta", GUPTA_MUP, SHAMPOO, Role.INPUT, ONE, R_N**-1),
    Disagreement("Gupta", GUPTA_MUP, SHAMPOO, Role.OUTPUT, ONE, R_N),
]


@pytest.mark.parametrize("case", DISAGREEMENTS, ids=lambda case: f"{case.source}-{case.role.value}")
def test_eps_differs_from_the_two_sources_that_disagree_with_the_others(case: Disagreement) -> None:
    assert symbolic(case.parametrization, case.law, case.role).eps == case.eps != case.printed
