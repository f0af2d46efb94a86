"""The rules: roles, update laws, parametrizations, and the one solver that joins them.

An optimizer declares its `UpdateLaw`, a parametrization its `RoleScaling` per role, a model its `TensorSpec`s; `solve`
derives init std, LR, weight decay and eps. No LR rule is written anywhere else.
"""

from mupsweep.scaling.decay import WEIGHT_DECAY_RULES
from mupsweep.scaling.laws import UpdateLaw
from mupsweep.scaling.monomial import Monomial
from mupsweep.scaling.parametrizations.parametrization import Parametrization, RoleScaling, Rule
from mupsweep.scaling.roles import Fold, Init, Role, TensorSpec
from mupsweep.scaling.solve import numeric, symbolic

__all__ = [
    "WEIGHT_DECAY_RULES",
    "Fold",
    "Init",
    "Monomial",
    "Parametrization",
    "Role",
    "RoleScaling",
    "Rule",
    "TensorSpec",
    "UpdateLaw",
    "numeric",
    "symbolic",
]
