"""Measured update laws: of shipped optimizers, of optimizers that say something wrong, and of foreign ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from mupsweep.check import gradients, update_law
from mupsweep.check.gradients import Gradients
from mupsweep.check.update_law import BOTH, DEGREE, N_IN, N_OUT, WEIGHT, Measured
from mupsweep.errors import ConfigError
from mupsweep.optimizers import Optimizer
from mupsweep.optimizers.foreign import Foreign
from mupsweep.optimizers.muon import Muon
from mupsweep.optimizers.sgd import SGD
from mupsweep.scaling import Role, UpdateLaw, symbolic
from mupsweep.scaling.laws import match_rms_adamw
from mupsweep.schema import instantiate
from mupsweep.sweep import config
from mupsweep.training.norms import spectral_norm, stable_rank

TOLERANCE = {"exponent": 0.02}
HALF = Fraction(1, 2)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@cache
def aligned() -> tuple[Gradients, ...]:
    return tuple(gradients.aligned())


@cache
def real() -> tuple[Gradients, ...]:
    return tuple(gradients.realistic())


def optimizer(*overrides: str) -> Optimizer:
    return instantiate(config.load(overrides).variants[0].optimizer, "optimizer")


def measured(made: Optimizer, declared: bool = True, points: Sequence[Gradients] | None = None) -> Measured:
    """On rank 1, which stands in for real gradients too where they do not matter."""
    points = points or aligned()
    return update_law.measure(made, points, points[:6], declared)


def values(found: Measured, *names: str) -> list[float]:
    return [found.aligned.by_name[name].value for name in names]


# Foreign optimizers, each with a law that follows from its lines.


class Plain(torch.optim.Optimizer):
    """W -= lr * direction(G, W)."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(self.direction(p.grad, p), alpha=group["lr"])

    def direction(self, G: Tensor, W: Tensor) -> Tensor:  # noqa: N803
        raise NotImplementedError


class Sign(Plain):
    def direction(self, G: Tensor, W: Tensor) -> Tensor:  # noqa: N803
        return G.sign()


class Rows(Plain):
    """Every row of norm 1: sqrt(n_out) of them add up."""

    def direction(self, G: Tensor, W: Tensor) -> Tensor:  # noqa: N803
        return G / G.norm(dim=1, keepdim=True)


class Root(Plain):
    """Degree 1/2: G / sqrt(||G||)."""

    def direction(self, G: Tensor, W: Tensor) -> Tensor:  # noqa: N803
        return G / G.norm().sqrt()


class Trust(Plain):
    """Moves a weight by a fraction of its Frobenius norm."""

    def direction(self, G: Tensor, W: Tensor) -> Tensor:  # noqa: N803
        return W.norm() * G / G.norm()


class SpectralTrust(Plain):
    def direction(self, G: Tensor, W: Tensor) -> Tensor:  # noqa: N803
        return spectral_norm(W) * G / G.norm()


class Tall(Plain):
    """sqrt(max(1, n_out / n_in)), which is no power of n_out times a power of n_in."""

    def direction(self, G: Tensor, W: Tensor) -> Tensor:  # noqa: N803
        return G / G.norm() * max(1.0, G.shape[0] / G.shape[1]) ** 0.5


class Third(Plain):
    """n_out^(1/3)."""

    def direction(self, G: Tensor, W: Tensor) -> Tensor:  # noqa: N803
        return G / G.norm() * G.shape[0] ** (1 / 3)


class Frozen(Plain):
    def direction(self, G: Tensor, W: Tensor) -> Tensor:  # noqa: N803
        return torch.zeros_like(G)


class NeedsClosure(Plain):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()


class L2(Plain):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_((p.grad + group["weight_decay"] * p).sign(), alpha=group["lr"])


class Undecayed(Sign):
    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr)


class Independent(Sign):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["weight_decay"]).sub_(p.grad.sign(), alpha=group["lr"])


def foreign(name: str, *overrides: str) -> Optimizer:
    return optimizer("optimizer=foreign", f"optimizer.path={__name__}.{name}", "allow_imports=true", *overrides)


# Shipped optimizers.


@pytest.mark.parametrize(
    ("name", "degree", "n_out", "n_in"),
    [("adamw", 0, 0.5, 0.5), ("sgd", 1, 0, 0), ("muon", 0, 0, 0), ("muon_bernstein", 0, 0.5, -0.5)],
)
def test_a_shipped_optimizer_does_what_it_declares(name: str, degree: float, n_out: float, n_in: float) -> None:
    law = measured(optimizer(f"optimizer={name}"))
    assert law.violations == []
    assert values(law, DEGREE, N_OUT, N_IN, BOTH, WEIGHT) == pytest.approx(
        [degree, n_out, n_in, n_out + n_in, 0], abs=TOLERANCE["exponent"]
    )
    assert law.declared == pytest.approx({DEGREE: degree, N_OUT: n_out, N_IN: n_in, BOTH: n_out + n_in, WEIGHT: 0})


def test_a_law_that_is_no_monomial_is_compared_as_it_is() -> None:
    law = measured(optimizer("optimizer=muon_jordan"))
    assert law.violations == []
    assert law.aligned.misfit < update_law.MISFIT


@pytest.mark.parametrize(
    ("algorithm", "wrong", "violations"),
    [
        (Muon, UpdateLaw(shape_factor=match_rms_adamw, full_rank=True), [N_OUT, N_IN, BOTH]),
        (SGD, UpdateLaw(degree=Fraction(3, 4), eps_power=None), [DEGREE]),
    ],
    ids=["shape", "degree"],
)
def test_a_law_that_is_declared_wrongly_is_found_and_its_exponents_named(
    algorithm: type, wrong: UpdateLaw, violations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(algorithm, "base_law", lambda self, dims=None: wrong)
    assert set(violations) <= set(measured(optimizer(f"optimizer={algorithm.__name__.lower()}")).violations)


def test_full_rank_is_measured_on_orthogonal_gradients() -> None:
    points = tuple(gradients.aligned(full_rank=True))
    assert {round(stable_rank(g.grads[0])) for g in points} == set(gradients.SIDES)
    law = measured(optimizer("optimizer=muon_hyperball"), points=points)
    assert law.violations == []
    assert law.weight_norm == "frobenius"
    assert law.weight_decay == update_law.FIXED


# Foreign optimizers.


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("Sign", {"degree": "0", "n_out": "1/2", "n_in": "1/2"}),
        ("Rows", {"degree": "0", "n_out": "1/2", "n_in": "0"}),
        ("Root", {"degree": "1/2", "n_out": "0", "n_in": "0"}),
        ("Trust", {"degree": "0", "n_out": "0", "n_in": "0", "weight_norm": "frobenius"}),
        ("SpectralTrust", {"degree": "0", "n_out": "0", "n_in": "0", "weight_norm": "spectral"}),
        ("Tall", {"degree": "0", "n_out": "0", "n_in": "0"}),
    ],
)
def test_the_law_of_a_foreign_optimizer_is_measured(name: str, keys: dict[str, str]) -> None:
    law = measured(foreign(name), declared=False)
    assert law.keys() == keys
    assert law.declared == {}
    assert law.monomial == (name != "Tall")


def test_an_exponent_beside_the_grid_is_not_snapped() -> None:
    law = measured(foreign("Third"), declared=False)
    assert law.aligned.by_name[N_OUT].value == pytest.approx(1 / 3, abs=TOLERANCE["exponent"])
    assert law.snapped[N_OUT] is None
    assert law.snapped[N_IN] == 0
    assert law.keys() is None
    assert law.law() is None


def test_the_measured_law_gives_the_published_rule() -> None:
    """Zheng et al. 2603.00541, Tables 4 and 6: sign-like as AdamW, hidden LR 1/r_n."""
    law = measured(foreign("Sign"), declared=False)
    rule = instantiate(config.load(["parametrization=spectral"]).variants[0].parametrization, "parametrization")
    own, adamw = law.law(), optimizer("optimizer=adamw").update_law()
    assert own is not None
    for role in Role:
        assert symbolic(rule, own, role).lr == symbolic(rule, adamw, role).lr
    assert str(symbolic(rule, own, Role.HIDDEN).lr) == "r_n^-1"


# Laws that change.


def under_all_conditions(made: Optimizer, declared: bool) -> Measured:
    others = {c: list(gradients.aligned(False, c.fresh, c.steps, gradients.FEW_SIDES)) for c in update_law.OTHERS}
    return update_law.measure(made, aligned(), aligned()[:6], declared, others)


@cache
def radam() -> Measured:
    return under_all_conditions(foreign_of_torch("RAdam"), declared=False)


def foreign_of_torch(name: str) -> Optimizer:
    return optimizer("optimizer=foreign", f"optimizer.path=torch.optim.{name}", "allow_imports=true")


def by_condition(law: Measured, name: str) -> dict[tuple[bool, int], float]:
    """(fresh, steps) -> exponent."""
    return {tuple(condition): exponents[name].value for condition, exponents in law.under.items()}


def test_a_law_that_changes_with_the_steps_is_refused() -> None:
    """RAdam (1908.03265, Algorithm 2) is momentum without a denominator for its first five steps."""
    degrees = {(False, 3): 1.0, (True, 3): 1.0, (False, 50): 0.0, (True, 50): 0.0}
    assert by_condition(radam(), DEGREE) == pytest.approx(degrees, abs=TOLERANCE["exponent"])
    assert {DEGREE, N_OUT, N_IN, BOTH} == set(radam().changes)
    assert radam().snapped[DEGREE] == 1  # what its first steps alone would give: the rule of SGD
    assert (radam().keys(), radam().law(), radam().passed) == (None, None, False)


def test_a_law_that_changes_with_the_gradients_is_refused() -> None:
    law = under_all_conditions(optimizer("optimizer=soap_published"), declared=True)
    found = by_condition(law, BOTH)
    assert found[False, 3] == pytest.approx(0, abs=0.05)  # what the published rule is for
    assert found[True, 3] == pytest.approx(1, abs=0.05)  # the basis is that of earlier gradients
    assert found[True, 50] == pytest.approx(0.84, abs=0.05)
    assert law.violations == []
    assert set(law.changes) == {N_OUT, N_IN, BOTH}
    assert not law.passed


@pytest.mark.parametrize("name", ["soap", "adamw", "sgd", "sophia"])
def test_a_law_that_is_one_does_not_change(name: str) -> None:
    law = under_all_conditions(optimizer(f"optimizer={name}"), declared=True)
    assert law.changes == {}
    assert law.passed
    expected = {"soap": 0.0, "sgd": 0.0}.get(name, 1.0)
    assert by_condition(law, BOTH)[False, 50] == pytest.approx(expected, abs=TOLERANCE["exponent"])


def test_fresh_gradients_differ_at_every_step_and_repeated_ones_do_not() -> None:
    fresh, repeated = (next(gradients.aligned(fresh=fresh, steps=4)) for fresh in (True, False))
    assert len(fresh.grads) == len(repeated.grads) == 4
    assert all(torch.equal(g, repeated.grads[0]) for g in repeated.grads)
    assert torch.equal(fresh.grads[0], repeated.grads[0])
    cosines = [float((g * fresh.grads[0]).sum() / g.norm() ** 2) for g in fresh.grads[1:]]
    assert max(map(abs, cosines)) < 0.2


def test_a_law_that_a_user_gives_is_compared_with_the_measured_one() -> None:
    right, wrong = ("{degree: 0, n_out: 1/2, n_in: 1/2}", "{degree: 0, n_out: 0, n_in: 0}")
    assert measured(foreign("Sign", f"optimizer.law={right}")).violations == []
    assert measured(foreign("Sign", f"optimizer.law={wrong}")).violations == [N_OUT, N_IN, BOTH]


def test_an_optimizer_that_cannot_be_measured_says_why() -> None:
    with pytest.raises(ConfigError, match="update of zero, inf or nan"):
        measured(foreign("Frozen"), declared=False)
    with pytest.raises(ConfigError, match=rf"{__name__}\.NeedsClosure cannot step a matrix: TypeError: .*closure"):
        measured(foreign("NeedsClosure"), declared=False)


@pytest.mark.parametrize(
    ("made", "overrides"),
    [
        (lambda: foreign("Sign"), update_law.COUPLED),
        (lambda: foreign("L2"), update_law.INSIDE),
        (lambda: foreign("Independent"), update_law.INDEPENDENT),
        (lambda: optimizer("optimizer=adamw"), update_law.COUPLED),
        (lambda: foreign("Undecayed"), update_law.NO_DECAY),
        (lambda: optimizer("optimizer=sgd"), update_law.COUPLED),
        (lambda: optimizer("optimizer=adopt"), update_law.COUPLED),  # though the first step of these two does nothing
        (lambda: optimizer("optimizer=soap"), update_law.COUPLED),
        (lambda: optimizer("optimizer=lamb"), update_law.INSIDE),
        (
            lambda: Foreign(name="sgd", path="torch.optim.SGD", options={"momentum": 0.9}),
            update_law.THROUGH_MOMENTUM.format(factor=10, share=0.1),
        ),
    ],
    ids=["sign", "l2", "independent", "adamw", "none", "sgd", "adopt", "soap", "lamb", "torch-sgd"],
)
def test_how_weight_decay_is_applied_is_seen(made: Any, overrides: str) -> None:
    assert update_law.decay_of(made()) == overrides


# Gradients.


def test_rank_one_gradients_are_of_rank_one_and_of_every_shape() -> None:
    assert {g.dims for g in aligned()} == {(a, b) for a in gradients.SIDES for b in gradients.SIDES}
    assert all(stable_rank(g.grads[0]) == pytest.approx(1, abs=1e-5) for g in aligned())
    assert len({g.group for g in aligned()}) == 2 * len(gradients.SIDES) - 1


def test_real_gradients_are_those_of_hidden_matrices_in_training() -> None:
    points = real()
    assert {g.dims for g in points if g.depth == 2} == {
        shape for n in (32, 64, 128, 256) for shape in ((n, n), (4 * n, n), (n, 4 * n))
    }
    assert {g.depth for g in points} == {2, 4, 8, 16}
    for g in points:
        assert len(g.grads) == len(g.weights) == gradients.TRAINED
        assert not torch.equal(g.weights[0], g.weights[1])
        assert not torch.equal(g.grads[0], g.grads[1])


def test_sign_updates_are_as_large_on_real_gradients() -> None:
    exponents = update_law.exponents(optimizer("optimizer=adamw"), real(), "frobenius", declared=True)
    assert exponents.by_name[BOTH].value == pytest.approx(1, abs=0.1)
    assert exponents.stable_ranks[0] >= 1
    assert update_law.DEPTH in exponents.by_name


def test_thresholds_follow_scaled_gradients() -> None:
    """Else an optimizer with a large eps would seem to have another degree."""
    made = replace(optimizer("optimizer=adamw"), eps=1.0)
    assert measured(made, points=aligned()[:4]).aligned.by_name[DEGREE].value == pytest.approx(0, abs=1e-4)
