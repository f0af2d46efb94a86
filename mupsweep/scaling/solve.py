"""One solver: from what an optimizer and a parametrization declare to init std, LR, weight decay and eps.

Written once over numbers and over monomials, so that the symbols `mupsweep rules` prints and the numbers a run trains
with come from the same lines.
"""

from __future__ import annotations

from dataclasses import fields, replace
from fractions import Fraction
from typing import Any

from mupsweep.errors import ConfigError
from mupsweep.scaling.decay import WEIGHT_DECAY_RULES, DecayRule
from mupsweep.scaling.laws import UpdateLaw
from mupsweep.scaling.monomial import ONE, R_N, Monomial, maximum, sqrt
from mupsweep.scaling.parametrizations.parametrization import Parametrization, RoleScaling, Rule
from mupsweep.scaling.roles import Fold, Role, TensorSpec


def solve(
    scaling: RoleScaling,
    law: UpdateLaw,
    dims: tuple[Any, Any],
    role: Role,
    decay_rule: DecayRule,
    at: Any,
    repeats: float = 1,
) -> Rule:
    """The absolute sizes that the spectral condition asks for, up to constants that cancel in a ratio.

    Args:
        scaling: what the parametrization promises for the role.
        law: what the optimizer declares.
        dims: (n_out, n_in) of the tensor.
        role: which of the two dimensions grow.
        decay_rule: how lr * weight_decay follows the size.
        at: how to read a monomial of the scaling: its value at (r_n, r_L), or the monomial itself.
        repeats: how often the forward pass uses every row. Entries start as those of the repeated matrix would, so that
            a key that more query heads share at larger widths keeps its size; norms and updates are the matrix's own,
            since ||W||_R does not change when rows repeat.
    """
    n_out, n_in = dims
    s, u, c = at(scaling.weight), at(scaling.update), at(scaling.loss_share)
    rms = sqrt(n_out / n_in)

    # A Gaussian matrix has ||W||_2 ~ std sqrt(max(n_out, n_in)). One-hot tokens use one column of an embedding and
    # the vocabulary is fixed, so dimensions that do not grow count as 1 here: only their asymptotics may enter.
    grows_out, grows_in = role.grows
    free_out, free_in = (n_out * repeats if grows_out else 1.0), (n_in if grows_in else 1.0)
    std = s * sqrt(free_out / free_in) / sqrt(maximum(free_out, free_in))

    gradient = c / (u * rms)  # ||G||_2: a step of size ||dW||_2 = u * rms changes the loss by c
    blocks = law.blocks(n_out, n_in)
    half = (1 - law.degree) / 2
    weight = {None: at(ONE), "spectral": s * rms, "frobenius": std * sqrt(n_out * n_in)}[law.weight_norm]
    update = gradient**law.degree * blocks**half * law.shape_factor(n_out, n_in) * weight  # ||A||_2 at LR 1
    lr = u * rms / update

    decay = (u / (s * lr) if decay_rule.scaled else at(ONE)) * at(decay_rule.falls)
    eps = at(ONE) if law.eps_power is None else (gradient**law.eps_degree / sqrt(blocks)) ** Fraction(law.eps_power)
    return Rule(multiplier=at(scaling.multiplier), init_std=std, lr=lr, weight_decay=decay, eps=eps)


def symbolic(parametrization: Parametrization, law: UpdateLaw, role: Role, fold: Fold | None = None) -> Rule:
    """The rule of a role as monomials in (r_n, r_L), for tensors whose growing dimensions all grow as r_n.

    Args:
        fold: the forward constant that every tensor of the role takes up.
    """
    scaling, decay_rule = parametrization.role_scalings()[role], WEIGHT_DECAY_RULES[parametrization.weight_decay_rule]
    if isinstance(scaling, Rule):
        return _fixed(scaling, decay_rule, at=lambda m: m)
    grows_out, grows_in = role.grows
    dims = (R_N if grows_out else ONE, R_N if grows_in else ONE)
    rule = solve(scaling, law, dims, role, decay_rule, at=lambda m: m)
    if fold is None:
        return rule
    scaling = folded(scaling, folded_constant(parametrization, role, fold), fold)
    taken = solve(scaling, law, dims, role, decay_rule, at=lambda m: m)
    return replace(taken, weight_decay=rule.weight_decay * rule.lr / taken.lr)


def numeric(
    parametrization: Parametrization,
    law: UpdateLaw,
    target: TensorSpec,
    base: TensorSpec,
    r_n: float,
    r_L: float,  # noqa: N803
    base_law: UpdateLaw | None = None,
) -> Rule:
    """The rule of one tensor, f(target shape) / f(base shape) with the real shapes of both.

    Constants such as a 4x FFN or Kimi's 0.2 cancel, block counts are exact, and at the base shape every entry is
    exactly 1.0. `base_law` is the optimizer's at the base shape where it depends on the shape; of the same degree.
    """
    scaling = parametrization.role_scalings()[target.role]
    decay_rule = WEIGHT_DECAY_RULES[parametrization.weight_decay_rule]

    def absolute(
        scaling: RoleScaling | Rule, spec: TensorSpec, law: UpdateLaw, width_ratio: float, depth_ratio: float
    ) -> Rule:
        def at(monomial: Monomial) -> float:
            return monomial.at(width_ratio, depth_ratio)

        if isinstance(scaling, Rule):
            return _fixed(scaling, decay_rule, at)
        dims = (float(spec.dims[0]), float(spec.dims[1]))
        return solve(scaling, law, dims, spec.role, decay_rule, at, spec.repeats)

    assert base_law is None or base_law.degree == law.degree
    big, small = absolute(scaling, target, law, r_n, r_L), absolute(scaling, base, base_law or law, 1.0, 1.0)
    rule = Rule(**{f.name: getattr(big, f.name) / getattr(small, f.name) for f in fields(Rule)})
    if target.fold is None:
        return rule
    constant = folded_constant(parametrization, target.role, target.fold)
    if isinstance(scaling, Rule):
        if constant == ONE:
            return rule
        raise ConfigError(
            f"{target.name}: {parametrization.name} gives no rule for an update of another size, so its numbers cannot "
            f"take up a forward constant of {constant}"
        )
    taken = absolute(folded(scaling, constant, target.fold), target, law, r_n, r_L)
    ratios = {f.name: getattr(taken, f.name) / getattr(small, f.name) for f in fields(Rule)}
    # the shrinkage of a step, lr * weight_decay, is that of the tensor behind its constant
    return Rule(**{**ratios, "weight_decay": rule.weight_decay * rule.lr / ratios["lr"]})


def folded_constant(parametrization: Parametrization, role: Role, fold: Fold) -> Monomial:
    """The forward constant that a tensor of a role takes up."""
    if fold is Fold.MULTIPLIER:
        return parametrization.role_scalings()[role].multiplier
    return R_N ** (parametrization.attention_power + Fraction(1, 2))  # d_head grows as the width


def folded(scaling: RoleScaling, constant: Monomial, fold: Fold) -> RoleScaling:
    """The scaling of V = constant * W, which stands without the constant where W stood behind it.

    V and its updates are as many times as large, and a step of V changes the loss by what one of W did. So the solver
    gives the LR and eps of V for any law.
    """
    multiplier = ONE if fold is Fold.MULTIPLIER else scaling.multiplier
    return replace(scaling, multiplier=multiplier, weight=scaling.weight * constant, update=scaling.update * constant)


def _fixed(rule: Rule, decay_rule: DecayRule, at: Any) -> Rule:
    """A rule that needs no solving: with one LR, lr * weight_decay is constant until its rule says otherwise."""
    values = {f.name: at(getattr(rule, f.name)) for f in fields(Rule)}
    values["weight_decay"] = values["weight_decay"] * at(decay_rule.falls)
    return Rule(**values)
