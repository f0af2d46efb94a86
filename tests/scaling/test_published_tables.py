"""Every cell of the published scaling tables, as printed, against what the solver derives.

Each row transcribes a table; nothing here is computed by the solver. Cells are target / base as monomials
in the width ratio r_n and the depth ratio r_L, written as `str(Monomial)` writes them; a cell that the
source does not give is empty. Formulas in (d_in, d_out) are read with the growing dimensions at r_n: an
embedding has d_in = 1, a head d_out = 1, and a fixed block size makes d blocks along an axis.

Sources: Zheng et al. 2603.00541 v2, Tables 3-7 and 9-13; Gupta et al. 2602.20937, Table 2 and sections
4.2-4.5; Qiu et al. 2512.05620, Table 1, and its code, charliezchen/scaling-matrix-preconditioning
(train.py, optax_optim/); CompleteP, EleutherAI/nanoGPT-mup, branch completep (model.py).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest

from mupsweep.scaling import Monomial, Parametrization, Role, Rule, UpdateLaw, symbolic
from mupsweep.scaling.laws import ENTRYWISE, GRADIENT, entries, match_rms_adamw, one, spectral_ratio
from mupsweep.scaling.monomial import ONE, R_L, R_N, sqrt
from mupsweep.scaling.parametrizations.sp import Standard
from mupsweep.scaling.parametrizations.spectral import Spectral


def out_axis(n_out: Any, n_in: Any) -> Any:
    """One block per row, or fixed-size blocks along the out axis alone."""
    return n_out


def in_axis(n_out: Any, n_in: Any) -> Any:
    """One block per column, or fixed-size blocks along the in axis alone."""
    return n_in


def shampoo(left: str, right: str, blocks: Any = one) -> UpdateLaw:
    """Shampoo with exponents e_L and e_R: degree 1 - 2 (e_L + e_R), eps beside a block's squared gradient."""
    return UpdateLaw(degree=1 - 2 * (Fraction(left) + Fraction(right)), blocks=blocks, eps_power=2)


PLAIN = UpdateLaw()  # one block, degree 0: an update of spectral norm 1
BERNSTEIN = UpdateLaw(shape_factor=spectral_ratio)  # Gupta's LAMB too: its factor ||W||_F is taken as ||W||_2

LAWS: dict[str, UpdateLaw] = {
    "sgd": GRADIENT,
    "adam": ENTRYWISE,
    "adamw": ENTRYWISE,
    "adopt": ENTRYWISE,
    "lion": ENTRYWISE,
    "sophia": ENTRYWISE,
    "adamuon": ENTRYWISE,
    "adam#shampoo": ENTRYWISE,  # the direction of Shampoo with the norm of Adam
    "muon": PLAIN,
    "muon_kimi": UpdateLaw(shape_factor=match_rms_adamw),
    "muon_bernstein": BERNSTEIN,
    "sso": BERNSTEIN,
    "lamb": BERNSTEIN,
    "shampoo": shampoo("1/4", "1/4"),
    "shampoo+blocks": shampoo("1/4", "1/4", entries),
    "shampoo2": shampoo("1/2", "1/2"),
    "shampoo2+blocks": shampoo("1/2", "1/2", entries),
    "shampoo,one_side": shampoo("1/4", "0"),
    "shampoo,out_side+blocks": shampoo("1/4", "0", out_axis),
    "shampoo,in_side+blocks": shampoo("0", "1/4", in_axis),
    "shampoo2,one_side": shampoo("1/2", "0"),
    "shampoo2,out_side+blocks": shampoo("1/2", "0", out_axis),
    "shampoo2,in_side+blocks": shampoo("0", "1/2", in_axis),
    "soap": PLAIN,
    "soap+blocks": UpdateLaw(blocks=entries),
    "soap,out_side": UpdateLaw(blocks=in_axis),  # the axis that is not rotated normalises entry by entry
    "soap,in_side": UpdateLaw(blocks=out_axis),
    "soap,out_side+blocks": UpdateLaw(blocks=entries),
    "soap,in_side+blocks": UpdateLaw(blocks=entries),
}


ZHENG_K2 = """
optimizers                  | quantity     | input    | hidden        | output   | hidden_vector
muon_kimi muon shampoo soap | multiplier   | 1        | r_L^-1        | r_n^-1   |
sgd adamw lion sophia sso   | multiplier   | 1        | r_L^-1        | r_n^-1   |
muon_kimi muon shampoo soap | init_var     | 1        | r_n^-1        | 1        |
sgd adamw lion sophia sso   | init_var     | 1        | r_n^-1        | 1        |
muon_kimi                   | lr           | 1        | r_n^-1/2      | 1        |
muon_kimi                   | weight_decay | 1        | r_n^1/2       | 1        |
muon shampoo soap           | lr           | r_n^1/2  | 1             | r_n^1/2  |
muon shampoo soap           | weight_decay | r_n^-1/2 | 1             | r_n^-1/2 |
shampoo                     | eps          | r_n^-1   | r_L^-2        | r_n^-1   |
sgd                         | lr           | r_n      | r_L           | r_n      | r_n r_L
sgd                         | weight_decay | r_n^-1   | r_L^-1        | r_n^-1   | r_n^-1 r_L^-1
adamw lion sophia           | lr           | 1        | r_n^-1        | 1        | 1
adamw lion sophia           | weight_decay | 1        | r_n           | 1        | 1
adamw                       | eps          | r_n^-1   | r_n^-1 r_L^-1 | r_n^-1   | r_n^-1 r_L^-1
sso                         | lr           | 1        | 1             | r_n      |
sso                         | weight_decay | 1        | 1             | r_n^-1   |
"""

ZHENG_K1 = """
optimizers                  | quantity     | input    | hidden            | output   | hidden_vector
muon_kimi muon shampoo soap | multiplier   | 1        | r_L^-1/2          | r_n^-1   |
sgd adamw lion sophia sso   | multiplier   | 1        | r_L^-1/2          | r_n^-1   |
muon_kimi muon shampoo soap | init_var     | 1        | r_n^-1            | 1        |
sgd adamw lion sophia sso   | init_var     | 1        | r_n^-1            | 1        |
muon_kimi                   | lr           | 1        | r_n^-1/2 r_L^-1/2 | 1        |
muon_kimi                   | weight_decay | 1        | r_n^1/2           | 1        |
muon shampoo soap           | lr           | r_n^1/2  | r_L^-1/2          | r_n^1/2  |
muon shampoo soap           | weight_decay | r_n^-1/2 | 1                 | r_n^-1/2 |
shampoo                     | eps          | r_n^-1   | r_L^-1            | r_n^-1   |
sgd                         | lr           | r_n      | 1                 | r_n      | r_n
sgd                         | weight_decay | r_n^-1   | r_L^-1/2          | r_n^-1   | r_n^-1 r_L^-1/2
adamw lion sophia           | lr           | 1        | r_n^-1 r_L^-1/2   | 1        | r_L^-1/2
adamw lion sophia           | weight_decay | 1        | r_n               | 1        | 1
adamw                       | eps          | r_n^-1   | r_n^-1 r_L^-1/2   | r_n^-1   | r_n^-1 r_L^-1/2
sso                         | lr           | 1        | r_L^-1/2          | r_n      |
sso                         | weight_decay | 1        | 1                 | r_n^-1   |
"""

# "Input biases as input weights."
ZHENG_INPUT_BIAS = """
optimizers        | quantity     | input_vector
sgd               | lr           | r_n
sgd               | weight_decay | r_n^-1
adamw lion sophia | lr           | 1
adamw lion sophia | weight_decay | 1
adamw             | eps          | r_n^-1
"""

# The init form, for which the paper gives its LRs. Decay is n_in times, eps 1 / n_out times the base value.
GUPTA = """
optimizers         | quantity     | input   | hidden | output
adamw              | multiplier   | 1       | 1      | 1
adamw              | init_var     | 1       | r_n^-1 | r_n^-2
adamw adopt sophia | lr           | 1       | r_n^-1 | r_n^-1
lamb               | lr           | 1       | 1      | 1
shampoo            | lr           | r_n^1/2 | 1      | r_n^-1/2
muon_bernstein     | lr           |         | 1      |
adamw sophia       | weight_decay | 1       | r_n    | r_n
adamw sophia       | eps          | r_n^-1  | r_n^-1 | 1
"""

# n_blk = (d_in / b_in)(d_out / b_out) with blocks, 1 without; an axis that is not preconditioned is one
# block. "out_side" has the out axis alone preconditioned (the embedding of a large vocabulary), "in_side"
# the in axis alone (its head). The code leaves L out of the one-sided eps of SOAP, used outside the blocks
# only: those hidden cells are empty. With blocks the LR of Shampoo is Table 1's: the code scales it by
# n_blk only inside grafts. `update_norm` is the eps of the graft Adam#Shampoo2, which sits beside the norm
# of the inner Shampoo update.
QIU = """
optimizers                                       | quantity    | input    | hidden           | output
adam adamuon                                     | lr          | 1        | r_n^-1           | r_n^-1
adam                                             | eps         | r_n^-1   | r_n^-1 r_L^-1    | 1
sgd                                              | lr          | r_n      | r_L              | r_n^-1
muon                                             | lr          | r_n^1/2  | 1                | r_n^-1/2
muon                                             | eps         | r_n^-1/2 | r_L^-1           | r_n^1/2
shampoo                                          | lr          | r_n^1/2  | 1                | r_n^-1/2
shampoo+blocks                                   | lr          | 1        | r_n^-1           | r_n^-1
shampoo2                                         | lr          | 1        | r_L^-1           | 1
shampoo2+blocks                                  | lr          | r_n^-1   | r_n^-2 r_L^-1    | r_n^-1
shampoo shampoo2                                 | eps         | r_n^-1   | r_L^-2           | r_n
shampoo+blocks shampoo2+blocks                   | eps         | r_n^-2   | r_n^-2 r_L^-2    | 1
shampoo,one_side                                 | lr          | r_n^3/4  | r_L^1/2          | r_n^-3/4
shampoo,out_side+blocks                          | lr          | r_n^1/2  | r_n^-1/4 r_L^1/2 |
shampoo,in_side+blocks                           | lr          |          | r_n^-1/4 r_L^1/2 | r_n^-1
shampoo2,one_side                                | lr          | r_n^1/2  | 1                | r_n^-1/2
shampoo2,out_side+blocks                         | lr          | 1        | r_n^-1/2         |
shampoo2,in_side+blocks                          | lr          |          | r_n^-1/2         | r_n^-1
shampoo,one_side shampoo2,one_side               | eps         | r_n^-1   | r_L^-2           | r_n
shampoo,out_side+blocks shampoo2,out_side+blocks | eps         | r_n^-2   | r_n^-1 r_L^-2    |
shampoo,in_side+blocks shampoo2,in_side+blocks   | eps         |          | r_n^-1 r_L^-2    | 1
soap                                             | lr          | r_n^1/2  | 1                | r_n^-1/2
soap                                             | eps         | r_n^-1/2 | r_L^-1           | r_n^1/2
soap+blocks                                      | lr          | 1        | r_n^-1           | r_n^-1
soap+blocks                                      | eps         | r_n^-1   | r_n^-1 r_L^-1    | 1
soap,out_side                                    | lr          | r_n^1/2  | r_n^-1/2         | r_n^-1
soap,out_side                                    | eps         | r_n^-1/2 |                  | 1
soap,out_side+blocks                             | lr          | 1        | r_n^-1           | r_n^-1
soap,out_side+blocks                             | eps         | r_n^-1   |                  | 1
soap,in_side                                     | lr          | 1        | r_n^-1/2         | r_n^-1/2
soap,in_side                                     | eps         | r_n^-1   |                  | r_n^1/2
soap,in_side+blocks                              | lr          | 1        | r_n^-1           | r_n^-1
soap,in_side+blocks                              | eps         | r_n^-1   |                  | 1
adam#shampoo                                     | lr          | 1        | r_n^-1           | r_n^-1
adam#shampoo                                     | eps         | r_n^-1   | r_n^-1 r_L^-1    | 1
shampoo2                                         | update_norm | r_n^1/2  | r_L              | r_n^-1/2
shampoo2+blocks                                  | update_norm | r_n^3/2  | r_n^2 r_L        | r_n^1/2
"""

# The code ties head and embedding and does not decay vectors. Its eps of embedding and head: see the end.
COMPLETEP_1 = """
optimizers | quantity     | input | hidden        | output | hidden_vector | input_vector
adamw      | multiplier   |       | r_L^-1        | r_n^-1 | r_L^-1        |
adamw      | init_var     |       | r_n^-1        |        |               |
adamw      | lr           | 1     | r_n^-1        | 1      | 1             | 1
adamw      | weight_decay | 1     | r_n           |        |               |
adamw      | eps          |       | r_n^-1 r_L^-1 |        | r_n^-1 r_L^-1 |
"""

COMPLETEP_3_4 = """
optimizers | quantity     | input | hidden          | output | hidden_vector   | input_vector
adamw      | multiplier   |       | r_L^-3/4        | r_n^-1 | r_L^-3/4        |
adamw      | init_var     |       | r_n^-1          |        |                 |
adamw      | lr           | 1     | r_n^-1 r_L^-1/4 | 1      | r_L^-1/4        | 1
adamw      | weight_decay | 1     | r_n             |        |                 |
adamw      | eps          |       | r_n^-1 r_L^-3/4 |        | r_n^-1 r_L^-3/4 |
"""

COMPLETEP_1_2 = """
optimizers | quantity     | input | hidden          | output | hidden_vector   | input_vector
adamw      | multiplier   |       | r_L^-1/2        | r_n^-1 | r_L^-1/2        |
adamw      | init_var     |       | r_n^-1          |        |                 |
adamw      | lr           | 1     | r_n^-1 r_L^-1/2 | 1      | r_L^-1/2        | 1
adamw      | weight_decay | 1     | r_n             |        |                 |
adamw      | eps          |       | r_n^-1 r_L^-1/2 |        | r_n^-1 r_L^-1/2 |
"""


@dataclass(frozen=True)
class Table:
    """A published table, the parametrization it is for, and the number of cells it must have."""

    source: str
    parametrization: Parametrization
    text: str
    count: int


TABLES = [
    Table("Zheng T3-T7", Spectral("spectral", "1"), ZHENG_K2, 123),
    Table("Zheng T9-T13", Spectral("depth_mup", "1/2"), ZHENG_K1, 123),
    Table("Zheng T3-T7, input bias", Spectral("spectral", "1"), ZHENG_INPUT_BIAS, 9),
    Table("Zheng T9-T13, input bias", Spectral("depth_mup", "1/2"), ZHENG_INPUT_BIAS, 9),
    Table("Gupta T2", Spectral("mup", None, output="init"), GUPTA, 34),
    Table("Qiu T1", Spectral("spectral", "1", output="init"), QIU, 114),
    Table("CompleteP a=1", Spectral("completep", "1"), COMPLETEP_1, 13),
    Table("CompleteP a=3/4", Spectral("completep", "3/4"), COMPLETEP_3_4, 13),
    Table("CompleteP a=1/2", Spectral("completep", "1/2"), COMPLETEP_1_2, 13),
]


@dataclass(frozen=True)
class Cell:
    """One published entry."""

    table: Table
    optimizer: str
    quantity: str
    role: Role
    printed: str

    def __str__(self) -> str:
        return f"{self.table.source}-{self.optimizer}-{self.quantity}-{self.role.value}"

    def solved(self, law: UpdateLaw) -> str:
        """What the solver gives in this cell for an optimizer with this law, written as the cell is."""
        rule = symbolic(self.table.parametrization, law, self.role)
        if self.quantity == "init_var":
            return str(rule.init_std**2)
        if self.quantity == "update_norm":
            return str(update_norm(self.table.parametrization, rule, self.role))
        return str(getattr(rule, self.quantity))


def update_norm(parametrization: Parametrization, rule: Rule, role: Role) -> Monomial:
    """||A||_2 at LR 1: lr * ||A||_2 is the spectral norm of the update that the parametrization asks for."""
    claims = parametrization.claims()
    assert claims is not None
    n_out, n_in = (R_N if grows else ONE for grows in role.grows)
    return claims[role].update * sqrt(n_out / n_in) / rule.lr


def cells_of(table: Table) -> list[Cell]:
    """The cells of a table that are not empty."""
    header, *rows = ([field.strip() for field in line.split("|")] for line in table.text.strip().splitlines())
    roles = [Role(name) for name in header[2:]]
    return [
        Cell(table, optimizer, quantity, role, printed)
        for optimizers, quantity, *entries_ in rows
        for optimizer in optimizers.split()
        for role, printed in zip(roles, entries_, strict=True)
        if printed
    ]


CELLS = [cell for table in TABLES for cell in cells_of(table)]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_solver_reproduces_the_published_cell(cell: Cell) -> None:
    assert cell.solved(LAWS[cell.optimizer]) == cell.printed


def test_no_published_cell_is_lost_or_given_twice() -> None:
    assert Counter(cell.table.source for cell in CELLS) == {table.source: table.count for table in TABLES}
    assert len({str(cell) for cell in CELLS}) == len(CELLS) == 451
    assert {cell.optimizer for cell in CELLS} == set(LAWS)


def mismatches(cells: list[Cell], law: UpdateLaw) -> int:
    """How many cells an optimizer with this law would get wrong."""
    return sum(cell.solved(law) != cell.printed for cell in cells)


@pytest.mark.parametrize("optimizer", LAWS)
def test_an_optimizer_with_another_law_contradicts_its_rows(optimizer: str) -> None:
    other = PLAIN if LAWS[optimizer] == ENTRYWISE else ENTRYWISE
    assert mismatches([cell for cell in CELLS if cell.optimizer == optimizer], other) >= 1


def test_every_pair_of_laws_is_told_apart_by_the_tables() -> None:
    laws = set(LAWS.values())
    rows = {law: [cell for cell in CELLS if LAWS[cell.optimizer] == law] for law in laws}
    bites = {(law, other): mismatches(rows[law], other) for law in laws for other in laws - {law}}
    assert len(bites) == 16 * 15
    assert min(bites.values()) >= 1, [pair for pair, count in bites.items() if count == 0]


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("law", sorted(LAWS))
def test_standard_parametrization_scales_nothing(law: str, role: Role) -> None:
    assert symbolic(Standard(), LAWS[law], role) == Rule(ONE, ONE, ONE, ONE, ONE)


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
DISAGREEMENTS = [
    # CompleteP's code scales the eps of every group as in a block; Zheng and Qiu leave L out elsewhere.
    Disagreement("CompleteP", CP, ENTRYWISE, Role.INPUT, R_N**-1 * R_L**-1, R_N**-1),
    Disagreement("CompleteP", CP, ENTRYWISE, Role.OUTPUT, R_N**-1 * R_L**-1, R_N**-1),
    # Gupta: Shampoo's delta needs no scaling. Zheng Table 4 and Qiu's code scale it as the squared gradient.
    Disagreement("Gupta", GUPTA_MUP, LAWS["shampoo"], Role.INPUT, ONE, R_N**-1),
    Disagreement("Gupta", GUPTA_MUP, LAWS["shampoo"], Role.OUTPUT, ONE, R_N),
]


@pytest.mark.parametrize("case", DISAGREEMENTS, ids=lambda case: f"{case.source}-{case.role.value}")
def test_eps_differs_from_the_two_sources_that_disagree_with_the_others(case: Disagreement) -> None:
    assert symbolic(case.parametrization, case.law, case.role).eps == case.eps != case.printed
