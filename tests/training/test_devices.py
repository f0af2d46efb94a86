"""The settings of a process that trains."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import torch

from mupsweep.training import devices
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


def test_a_process_that_trains_leaves_no_core_dump() -> None:
    """A dump holds all memory of a run; in a process of its own, since a limit cannot be raised again."""
    program = (
        "import resource, torch; from mupsweep.training.devices import configure; configure(1, torch.device('cpu')); "
        "print(resource.getrlimit(resource.RLIMIT_CORE)[0])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_glibcs_thresholds_are_for_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator the host holds batches and checkpoints, whose blocks should go back."""
    kept: list[int] = []
    monkeypatch.setattr(devices, "set_kept_memory", kept.append)
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_NVLS_ENABLE", "NCCL_COLLNET_ENABLE"):
        monkeypatch.setenv(name, "as it was")
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        configure(torch.get_num_threads(), torch.device("cpu"))
        configure(torch.get_num_threads(), torch.device("cpu"), shard=True)
        configure(torch.get_num_threads(), torch.device("mps"))
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    assert kept == [devices.MAX_KEPT_BYTES, devices.MIN_KEPT_BYTES]
