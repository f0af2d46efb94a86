"""The settings of a process that trains."""

from __future__ import annotations

import pytest
import torch

from mupsweep.training.devices import configure

REDUCED = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


@pytest.mark.parametrize("setting", REDUCED)
def test_sums_of_16_bit_products_are_in_fp32_at_every_width(setting: str) -> None:
    """Where cuBLAS splits a sum, and it does so by shape, its parts would else be added in 16 bits."""
    before = getattr(torch.backends.cuda.matmul, setting)
    setattr(torch.backends.cuda.matmul, setting, True)
    try:
        configure(torch.get_num_threads(), torch.device("cpu"))
        assert getattr(torch.backends.cuda.matmul, setting) is False
    finally:
        setattr(torch.backends.cuda.matmul, setting, before)
