"""The settings of a process that trains."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator

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


@pytest.fixture
def _settings_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Settings of this process that training on an accelerator changes are put back."""
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_NVLS_ENABLE", "NCCL_COLLNET_ENABLE"):
        monkeypatch.setenv(name, "as it was")
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


@pytest.mark.usefixtures("_settings_kept")
def test_workers_of_one_gpu_take_equal_parts_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[tuple[float, str]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(devices, "make_handles", lambda _: None)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append((share, str(device)))
    )
    configure(torch.get_num_threads(), torch.device("cuda:1"))
    configure(torch.get_num_threads(), torch.device("cuda:1"), workers=4)
    assert shares == [(0.95 / 4, "cuda:1")]


@pytest.mark.usefixtures("_settings_kept")
def test_glibcs_thresholds_are_for_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator the host holds batches and checkpoints, whose blocks should go back."""
    kept: list[int] = []
    monkeypatch.setattr(devices, "set_kept_memory", kept.append)
    configure(torch.get_num_threads(), torch.device("cpu"))
    configure(torch.get_num_threads(), torch.device("cpu"), shard=True)
    configure(torch.get_num_threads(), torch.device("mps"))
    assert kept == [devices.MAX_KEPT_BYTES, devices.MIN_KEPT_BYTES]
