"""The environment: what a machine seems to have, and what torch can use of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mupsweep.store import environment


@pytest.fixture
def _with_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "accelerator", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    environment._warn_of_unseen_gpu.cache_clear()


@pytest.mark.usefixtures("_with_a_gpu_that_torch_cannot_use")
def test_a_gpu_that_torch_does_not_see_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert environment.find_devices() == environment.find_devices() == ["cpu"]
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("note: there seems to be a GPU, but torch ")


@pytest.mark.usefixtures("_with_a_gpu_that_torch_cannot_use")
def test_a_gpu_that_the_user_hides_is_not_missed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert environment.find_devices() == ["cpu"]
    assert capsys.readouterr().err == ""


def test_the_record_of_a_gpu_machine_names_devices_driver_and_libraries(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With a driver's program in the path and the torch that is here, which names what it was built with."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 570.86.15\necho 570.86.15\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(environment, "accelerator", lambda: "cuda")
    gpus = environment.describe()["gpus"]
    assert gpus.keys() == {"names", "cuda", "cudnn", "nccl", "driver"}
    assert gpus["driver"] == "570.86.15"
    assert gpus["cuda"] == torch.version.cuda
    assert gpus["names"] == [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def test_the_record_of_a_machine_without_gpus_names_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "accelerator", lambda: "cpu")
    assert "gpus" not in environment.describe()
