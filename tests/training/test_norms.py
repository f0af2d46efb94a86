"""Norms against torch's singular values and closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from mupsweep.training import norms

TOLERANCE = {
    "exact": 1e-7,  # relative: the root of an eigenvalue in float64
    "iterated": 2e-3,  # relative, of a Gaussian matrix, whose largest singular values lie close together
}
SHAPES = [(48, 48), (96, 24), (24, 96), (1, 40), (40, 1)]


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_spectral_norm_is_the_largest_singular_value(shape: tuple[int, int]) -> None:
    W = gaussian(*shape)
    expected = torch.linalg.svdvals(W.double())[0].item()
    assert norms.spectral_norm(W) == pytest.approx(expected, rel=TOLERANCE["exact"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_rms_operator_norm_is_the_largest_gain_in_rms(shape: tuple[int, int]) -> None:
    W = gaussian(*shape)
    _, _, V = torch.linalg.svd(W.double())
    top = V[0]
    gain = norms.rms_norm(W.double() @ top) / norms.rms_norm(top)
    assert norms.rms_operator_norm(W) == pytest.approx(gain, rel=TOLERANCE["exact"])


def test_norms_of_known_matrices() -> None:
    assert norms.rms_norm(torch.tensor([3.0, 4.0])) == pytest.approx(5 / math.sqrt(2))
    assert norms.rms_operator_norm(torch.eye(7)) == pytest.approx(1)
    assert norms.rms_operator_norm(torch.ones(8, 2)) == pytest.approx(2)  # ones (2,) of RMS 1 become twos
    assert norms.rms_operator_norm(torch.full((9,), 0.5)) == pytest.approx(0.5)
    assert norms.spectral_norm(torch.zeros(4, 6)) == 0
    assert norms.spectral_norm(torch.full((9,), 2.0)) == pytest.approx(6)


def test_a_gaussian_matrix_has_an_rms_operator_norm_near_that_of_its_limit() -> None:
    n_out, n_in, std = 512, 128, 0.1
    expected = math.sqrt(n_in / n_out) * std * (math.sqrt(n_out) + math.sqrt(n_in))
    assert norms.rms_operator_norm(std * gaussian(n_out, n_in)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("shape", [(300, 200), (150, 600)], ids=str)
def test_power_iteration_comes_from_below(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    W = gaussian(*shape)
    exact = norms.spectral_norm(W)
    monkeypatch.setattr(norms, "EXACT_UP_TO", 100)
    iterated = norms.spectral_norm(W)
    assert exact * (1 - TOLERANCE["iterated"]) < iterated <= exact
    assert iterated == norms.spectral_norm(W)


def test_the_stable_rank_counts_equal_singular_values() -> None:
    assert norms.stable_rank(torch.outer(gaussian(30), gaussian(20))) == pytest.approx(1)
    assert norms.stable_rank(torch.linalg.qr(gaussian(30, 20)).Q) == pytest.approx(20)
