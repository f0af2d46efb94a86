"""The scaling rules that papers print, cell by cell, beside what our optimizers and the solver give.

Each row transcribes a table; nothing in it is computed. Cells are target / base as monomials in the width ratio r_n
and the depth ratio r_L; a cell that the source does not give is empty. Formulas in (d_in, d_out) are read with the
growing dimensions at r_n: an embedding has d_in = 1, a head d_out = 1, and a fixed block size makes d blocks along an
axis. `mupsweep rules --papers` prints the comparison.

Sources: Zheng et al. 2603.00541 v2, Tables 3-7 and 9-13; Gupta et al. 2602.20937, Table 2 and sections 4.2-4.5;
Qiu et al. 2512.05620, Table 1, and its code, charliezchen/scaling-matrix-preconditioning (train.py, optax_optim/);
CompleteP, EleutherAI/nanoGPT-mup, branch completep (model.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from mupsweep.optimizers import Optimizer
from mupsweep.scaling import Parametrization, Role, RoleScaling, symbolic
from mupsweep.scaling.monomial import ONE, R_N, sqrt
from mupsweep.scaling.parametrizations.spectral import Spectral
from mupsweep.schema import instantiate
from mupsweep.sweep.config import load

TALL, WIDE = (64, 1_000_000), (1_000_000, 64)  # shapes with one axis beyond optimizer.max_axis


@dataclass(frozen=True)
class Row:
    """How the optimizer of a table's row is configured here, and for which shape its law is asked."""

    overrides: str
    dims: tuple[int, int] | None = None
    eps: str = "eps"  # which of its thresholds the source calls eps


# "out_side": the out axis alone is preconditioned, the other one is too long, as in the embedding of a large vocabulary
ROWS = {
    "sgd": Row("optimizer=sgd"),
    "adam": Row("optimizer=adamw"),
    "adamw": Row("optimizer=adamw"),
    "adopt": Row("optimizer=adopt"),
    "lion": Row("optimizer=lion"),
    "sophia": Row("optimizer=sophia"),
    "adamuon": Row("optimizer=adamuon"),
    "adam#shampoo": Row("optimizer=shampoo optimizer.graft=adamw", eps="graft_eps"),
    "muon": Row("optimizer=muon"),
    "muon_kimi": Row("optimizer=muon_kimi"),
    "muon_bernstein": Row("optimizer=muon_bernstein"),
    "sso": Row("optimizer=sso"),
    "lamb": Row("optimizer=lamb_published"),
    "shampoo": Row("optimizer=shampoo"),
    "shampoo+blocks": Row("optimizer=shampoo optimizer.block_size=64"),
    "shampoo2": Row("optimizer=shampoo optimizer.exponents=[1/2,1/2]"),
    "shampoo2+blocks": Row("optimizer=shampoo optimizer.exponents=[1/2,1/2] optimizer.block_size=64"),
    "shampoo,one_side": Row("optimizer=shampoo optimizer.exponents=[1/4,0]"),
    "shampoo,out_side+blocks": Row("optimizer=shampoo optimizer.block_size=64", TALL),
    "shampoo,in_side+blocks": Row("optimizer=shampoo optimizer.block_size=64", WIDE),
    "shampoo2,one_side": Row("optimizer=shampoo optimizer.exponents=[1/2,0]"),
    "shampoo2,out_side+blocks": Row("optimizer=shampoo optimizer.exponents=[1/2,1/2] optimizer.block_size=64", TALL),
    "shampoo2,in_side+blocks": Row("optimizer=shampoo optimizer.exponents=[1/2,1/2] optimizer.block_size=64", WIDE),
    "soap": Row("optimizer=soap_published"),
    "soap+blocks": Row("optimizer=soap_published optimizer.block_size=64"),
    "soap,out_side": Row("optimizer=soap_published", TALL),
    "soap,in_side": Row("optimizer=soap_published", WIDE),
    "soap,out_side+blocks": Row("optimizer=soap_published optimizer.block_size=64", TALL),
    "soap,in_side+blocks": Row("optimizer=soap_published optimizer.block_size=64", WIDE),
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
    """A published table, the parametrization it is for, and its number of cells."""

    source: str
    parametrization: Parametrization
    text: str
    count: int

    def cells(self) -> Iterator[Cell]:
        """The cells that are not empty, row by row."""
        header, *rows = ([field.strip() for field in line.split("|")] for line in self.text.strip().splitlines())
        roles = [Role(name) for name in header[2:]]
        for optimizers, quantity, *printed in rows:
            for optimizer in optimizers.split():
                for role, cell in zip(roles, printed, strict=True):
                    if cell:
                        yield Cell(self, optimizer, quantity, role, cell)


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

    def solved(self, row: Row | None = None) -> str:
        """What the solver gives in this cell for the row's optimizer, or for another one, written as the cell is."""
        row = row or ROWS[self.optimizer]
        optimizer, parametrization = configured(row.overrides), self.table.parametrization
        law = {
            "weight_decay": optimizer.decay_law(row.dims),
            "eps": optimizer.thresholds(row.dims)[row.eps].law,
        }.get(self.quantity, optimizer.update_law(row.dims))
        rule = symbolic(parametrization, law, self.role)
        if self.quantity == "init_var":
            return str(rule.init_std**2)
        if self.quantity == "update_norm":  # lr * ||A||_2 is the spectral norm that the parametrization asks for
            scaling = parametrization.role_scalings()[self.role]
            assert isinstance(scaling, RoleScaling)
            n_out, n_in = (R_N if grows else ONE for grows in self.role.grows)
            return str(scaling.update * sqrt(n_out / n_in) / rule.lr)
        return str(getattr(rule, self.quantity))


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


@cache
def configured(overrides: str) -> Optimizer:
    """The optimizer that some overrides configure."""
    return instantiate(load(overrides.split()).variants[0].optimizer, "optimizer")


def cells() -> Iterator[Cell]:
    """Every published cell."""
    for table in TABLES:
        yield from table.cells()
