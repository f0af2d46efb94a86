"""Devices: which to train on, in which precision, and how they are set up."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import Any

import torch

from mupsweep.errors import ConfigError


def choose_precision(wanted: str, device: torch.device) -> str:
    """`auto` is bf16 where the device multiplies bf16 matrices in hardware, else fp32."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and torch.cpu._is_amx_tile_supported() else "fp32"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 matrix products over fp32 weights, or nothing."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def device_name(device: torch.device) -> str:
    """What results call the device: cpu, or the accelerator's own name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


MIN_KEPT_BYTES, MAX_KEPT_BYTES = 2**20, 2**31 - 1  # bytes; of `set_kept_memory`


def choose_devices(device: str, processes: int = 1) -> list[torch.device]:
    """The device of every rank, each of the kind of the first.

    Args:
        processes: that were started on this machine; for several, one device without a number stands for all.
    """
    names = [name.strip() for name in device.split(",") if name.strip()] or [device]
    first = choose_device(names[0])
    if processes > 1 and device in ("auto", first.type):
        names = [f"{first.type}:{i}" if first.type == "cuda" else first.type for i in range(processes)]
    if processes > 1 and len(names) != processes:
        raise ConfigError(
            f"device {device}: {processes} processes of a run were started on this machine (LOCAL_WORLD_SIZE); name a "
            "device for each, or auto"
        )
    devices = [first, *(_parsed(name) for name in names[1:])]
    seen = [d.index or 0 for d in devices if d.type != "cpu"]
    there = torch.cuda.device_count()
    for other in devices[1:]:
        if other.type != first.type or first.type not in ("cpu", "cuda") or (other.index or 0) >= max(1, there):
            raise ConfigError(f"device {device}: a run takes several CUDA devices that are there, or several cpu")
    if len(set(seen)) < len(seen):
        raise ConfigError(f"device {device}: each rank of a run needs a GPU of its own")
    return devices


def _parsed(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name} is not there ({str(error).splitlines()[0]})") from error


def choose_device(device: str) -> torch.device:
    """`auto` is the first accelerator there is, else the CPU."""
    if device != "auto":
        try:
            made = torch.device(device)
            if made.type == "cuda" and torch.cuda.is_available() and (made.index or 0) < torch.cuda.device_count():
                return torch.device("cuda", made.index or 0)  # to try it would take memory there: it may be another's
            made = torch.empty(0, device=made).device
            if made.type == "meta":
                raise RuntimeError("it computes nothing")
            return made
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"device {device} is not there ({str(error).splitlines()[0]}): use auto, cpu, cuda:0 or another that is"
            ) from error
    if torch.cuda.is_available():
        return torch.device("cuda:0")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def configure(threads: int, device: torch.device, shard: bool = False) -> None:
    """Settings of the process that make runs reproducible, and fast, or small where they are sharded."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    set_kept_memory(MIN_KEPT_BYTES if shard else MAX_KEPT_BYTES)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # pinned memory and capability checks use the current device
    torch.set_float32_matmul_precision("highest")  # containers may turn TF32 on
    if device.type != "cpu":  # CPU kernels are deterministic anyhow, and asking for it imports half of torch
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs a fixed workspace for it
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # switches that add up take the numbers as they come
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def is_alive(device: torch.device) -> bool:
    """False after an error that leaves a CUDA context unusable for good."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def set_kept_memory(size: int) -> None:
    """From which size on glibc returns freed blocks to the kernel.

    To return them at every step doubles it at large vocabularies. To keep them leaves holes between the weights that a
    sharded run gathers and frees, block by block, and in the end as much memory as whole weights would take.
    """
    if Path("/proc/self").exists():
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, size)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, size)  # M_TRIM_THRESHOLD
