"""Lion against its closed form and another implementation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import Tensor
from walking import PEAK_LR, Moment, largest_error, parameters, walk, walked

from mupsweep.errors import ConfigError
from mupsweep.optimizers.lion import Lion
from mupsweep.scaling import Role
from mupsweep.sweep import config
from mupsweep.sweep.run_spec import resolve

TOLERANCE = {"closed form": 1e-6}  # relative to the distance walked, fp32 against float64
BETAS = [(0.9, 0.99), (0.95, 0.98), (0.0, 0.5)]


def closed_form(w: Tensor, walk: Iterator[Moment], betas: tuple[float, float], decay: float) -> Tensor:
    m = torch.zeros_like(w)
    for now in walk:
        w = w - now.lr * (torch.sign(betas[0] * m + (1 - betas[0]) * now.grad) + decay * w)
        m = betas[1] * m + (1 - betas[1]) * now.grad
    return w


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("betas", BETAS, ids=str)
def test_lion_is_its_closed_form(betas: tuple[float, float], decay: float) -> None:
    got = walked(Lion(name="lion", betas=betas), decay)
    assert largest_error(got, partial(closed_form, betas=betas, decay=decay)) < TOLERANCE["closed form"]


@pytest.mark.parametrize("betas", BETAS, ids=str)
def test_lion_is_pytorch_optimizers(betas: tuple[float, float]) -> None:
    theirs = parameters()
    walk(pytorch_optimizer.Lion(theirs, lr=PEAK_LR, betas=betas, weight_decay=0.5, weight_decouple=True), theirs)
    for a, b in zip(walked(Lion(name="lion", betas=betas), 0.5), theirs, strict=True):
        assert torch.equal(a, b)


def test_lion_serves_as_the_rest_of_a_matrix_optimizer() -> None:
    resolved = resolve(config.load(["optimizer=muon", "optimizer.rest=lion"]).variants[0])
    muon, lion = (scaled.optimizer for scaled in resolved.optimizers)
    assert isinstance(lion, Lion)
    assert set(muon.roles) == {Role.HIDDEN}
    assert lion.betas == (0.9, 0.99)


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"betas": (0.9, 1.0)}, r"optimizer.betas=\[0.9, 1.0\]"), ({"betas": (0.9,)}, r"optimizer.betas=\[0.9\]")],
)
def test_a_bad_setting_is_refused_with_its_key_and_value(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Lion(name="lion", **keys)
