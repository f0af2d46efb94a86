"""An optimizer by import path: what it is given, what is refused, and the rule that follows from its law."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch

from mupsweep.errors import ConfigError
from mupsweep.optimizers.foreign import Foreign, Power
from mupsweep.scaling import Role
from mupsweep.scaling.monomial import R_N
from mupsweep.schema import instantiate
from mupsweep.sweep import config
from mupsweep.sweep.plan import plan
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.sweep.tensor_rules import rules
from mupsweep.training.build import build

ADAM_LAW = {"degree": 0, "n_out": "1/2", "n_in": "1/2"}
BASE: dict[str, Any] = {"name": "mine", "path": "torch.optim.NAdam", "law": ADAM_LAW}
LAW = "optimizer.law={degree: 0, n_out: 1/2, n_in: 1/2}"
TINY = ["experiment=smoke", "sweep.width_ratios=[4]", "sweep.log2_lrs=[-6]", "optimizer=foreign"]
CPU = torch.device("cpu")


def made(**keys: Any) -> Foreign:
    return instantiate({"kind": "mupsweep.optimizers.foreign.Foreign", **BASE, **keys}, "optimizer")


def run(*overrides: str) -> RunSpec:
    (one,) = plan(config.load([*TINY, "allow_imports=true", *overrides]))
    return one


def groups(**keys: float) -> list[dict[str, Any]]:
    return [{"params": [torch.nn.Parameter(torch.ones(3, 2))], "lr": 0.1, "weight_decay": 0.5, "eps": 1e-9, **keys}]


def test_the_path_is_refused_like_any_foreign_code() -> None:
    overrides = [*TINY, "optimizer.path=torch.optim.NAdam", LAW]
    message = r"optimizer\.path=torch\.optim\.NAdam is code outside mupsweep: add allow_imports=true if you trust it"
    with pytest.raises(ConfigError, match=message):
        config.load(overrides)
    config.load([*overrides, "allow_imports=true"])


def test_the_path_of_the_rest_is_refused_too() -> None:
    overrides = ["optimizer=muon", "optimizer.rest=foreign", "optimizer.rest.path=torch.optim.NAdam"]
    with pytest.raises(ConfigError, match=r"optimizer\.rest\.path=torch\.optim\.NAdam is code outside mupsweep"):
        config.load(overrides)


def test_a_path_of_data_is_no_code() -> None:
    config.load(["data=local", "data.path=my.jsonl"])


def test_without_a_law_a_plan_is_refused_and_the_command_that_measures_it_named() -> None:
    chosen = config.load([*TINY, "optimizer.path=torch.optim.NAdam", "allow_imports=true"])
    message = "mupsweep check law optimizer=foreign optimizer.path=torch.optim.NAdam allow_imports=true"
    with pytest.raises(ConfigError, match=message) as refused:
        plan(chosen)
    assert "\n" not in str(refused.value)


def test_it_is_trained_with_the_options_and_the_solved_numbers_of_every_tensor() -> None:
    one = run("optimizer.path=torch.optim.NAdam", "optimizer.options={betas: [0.8,0.9]}", LAW)
    (member,) = build(one, CPU).optimizer.members
    assert isinstance(member, torch.optim.NAdam)
    assert {tuple(group["betas"]) for group in member.param_groups} == {(0.8, 0.9)}
    rows = {row.role: row for row in rules(one.resolved, one.size, one.base_lr)}
    assert {group["lr"] for group in member.param_groups} == {row.lr for row in rows.values()}
    assert rows[Role.HIDDEN].lr_ratio == 1 / 4  # as AdamW
    assert rows[Role.INPUT].lr_ratio == 1
    assert {group["eps"] for group in member.param_groups} == {1e-12}  # not scaled
    assert member.param_groups[0]["weight_decay"] == 0.0


def test_eps_follows_the_gradient_where_the_law_says_how() -> None:
    overrides = "optimizer.law={degree: 0, n_out: 1/2, n_in: 1/2, eps_power: 1, blocks: entries}"
    one, adamw = run("optimizer.path=torch.optim.NAdam", overrides), run("optimizer=adamw")
    for mine, theirs in zip(*(rules(r.resolved, r.size, r.base_lr) for r in (one, adamw)), strict=True):
        assert (mine.eps_ratio, mine.lr_ratio) == pytest.approx((theirs.eps_ratio, theirs.lr_ratio)), mine.name


def test_what_the_constructor_does_not_take_is_left_out_of_the_groups() -> None:
    (rprop,) = made(path="torch.optim.Rprop").build(groups()).param_groups
    assert (rprop["lr"], "eps" in rprop, "weight_decay" in rprop) == (0.1, False, False)
    (factored,) = made(path="torch.optim.Adafactor").build(groups()).param_groups
    assert factored["eps"] == (None, 0.001)  # a pair of other things keeps its default
    (adam,) = made().build(groups()).param_groups
    assert (adam["eps"], adam["weight_decay"]) == (1e-9, 0.5)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"options": {"beta": 1}}, r"optimizer\.options\.beta: torch.optim.NAdam takes none; did you mean 'betas'\?"),
        ({"options": {"eps": 1}}, r"optimizer\.options\.eps: every tensor has its own; give optimizer\.eps"),
        ({"path": "torch.optim.Nope"}, r"optimizer\.path=torch\.optim\.Nope cannot be imported"),
        ({"path": "Nope"}, r"optimizer\.path=Nope: name your optimizer as package\.module\.Class"),
        ({"path": "json.dumps"}, r"optimizer\.path=json\.dumps is no subclass of torch\.optim\.Optimizer"),
        ({"path": "torch.optim.Optimizer"}, r"its constructor takes no lr"),
        ({"path": "torch.optim.Rprop", "weight_decay": 0.1}, r"optimizer\.weight_decay=0\.1: torch\.optim\.Rprop"),
        ({"law": ADAM_LAW | {"n_in": "a"}}, r"optimizer\.law\.n_in=a: expected a number or a fraction such as 1/2"),
        ({"law": {"degree": 0, "n_out": 0}}, r"optimizer\.law\.n_in=None: expected a number"),
        ({"law": ADAM_LAW | {"nout": 1}}, r"unknown key 'optimizer\.law\.nout'; did you mean 'n_out'\?"),
        ({"law": ADAM_LAW | {"weight_norm": "rms"}}, r"optimizer\.law\.weight_norm=rms: valid: frobenius, spectral"),
        ({"law": ADAM_LAW | {"blocks": "row"}}, r"optimizer\.law\.blocks=row: did you mean 'rows'\?"),
        ({"law": ADAM_LAW | {"eps_power": 3}}, r"optimizer\.law\.eps_power=3: expected 1, 2, or null"),
        ({"law": ADAM_LAW | {"n_in": 0}}, r"embeddings are stored \(n_in, n_out\).*optimizer\.roles=\[hidden\]"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_wrong_settings_are_refused(keys: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        made(**keys)


def test_what_the_constructor_refuses_is_said_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"torch\.optim\.NAdam says: Invalid beta parameter"):
        made(options={"betas": [2.0, 0.9]}).build(groups())


def test_numbers_and_fractions_are_exact_exponents() -> None:
    law = made(law={"degree": 0.5, "n_out": "-3/4", "n_in": -0.75}).update_law()
    assert law.degree == Fraction(1, 2)
    assert law.shape_factor == Power(Fraction(-3, 4), Fraction(-3, 4))
    assert law.eps_power is None
    assert law.shape_factor(16.0, 4.0) == pytest.approx(64**-0.75)
    assert str(law.shape_factor(R_N, R_N)) == "r_n^-3/2"


def test_blocks_take_their_share_of_the_exponents() -> None:
    """The exponents of a law count everything, so naming its blocks leaves the rule as it is."""
    law = made(law=ADAM_LAW | {"blocks": "entries"}).update_law()
    assert law.shape_factor == Power(Fraction(0), Fraction(0))
    assert law.blocks(8.0, 4.0) == 32


def test_weights_that_start_at_zero_are_refused_where_the_update_carries_their_norm() -> None:
    assert made(law={"degree": 0, "n_out": 0, "n_in": 0, "weight_norm": "frobenius"}).divides_by_weight
    assert not made().divides_by_weight
