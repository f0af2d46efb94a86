"""Devices: the choice of devices and precision, and the settings of a process that trains on them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from pathlib import Path
from typing import Any

import torch

from mupsweep.errors import ConfigError

SHARED_MEMORY = 0.95  # the part of a GPU's memory that its workers share; contexts of CUDA take the rest
MIN_KEPT_BYTES, MAX_KEPT_BYTES = 2**20, 2**31 - 1  # thresholds for `set_kept_memory`


def choose_precision(precision: str, device: torch.device) -> str:
    """Resolve `auto`: bf16 where the device multiplies bf16 matrices in hardware, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and torch.cpu._is_amx_tile_supported() else "fp32"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Context of bf16 matrix products over fp32 weights; for fp32 a context that changes nothing."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def device_name(device: torch.device) -> str:
    """Return the device's name in results: cpu, or the model of the accelerator."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def choose_devices(device: str, processes: int = 1) -> list[torch.device]:
    """Choose the device of every rank on this machine; all are of one type.

    Args:
        device: a torch device, "auto", or several separated by commas.
        processes: the number of ranks that were started on this machine; for several ranks a device without an index
            stands for as many devices. Where each of them was given a GPU of its own and sees no other, as by
            Slurm's --gpus-per-task, that GPU is cuda:0 to each.
    """
    names = [name.strip() for name in device.split(",") if name.strip()] or [device]
    first = choose_device(names[0])
    n_gpus = torch.cuda.device_count()
    if processes > 1 and first.type == "cuda" and n_gpus == 1 and os.environ.get("CUDA_VISIBLE_DEVICES"):
        return [first] * processes
    if processes > 1 and device in ("auto", first.type):
        names = [f"{first.type}:{i}" if first.type == "cuda" else first.type for i in range(processes)]
    if processes > 1 and len(names) != processes:
        raise ConfigError(
            f"device {device}: {processes} processes of a run were started on this machine (LOCAL_WORLD_SIZE); name a "
            "device for each, or auto"
        )
    devices = [first, *(_parse_device(name) for name in names[1:])]
    indices = [d.index or 0 for d in devices if d.type != "cpu"]
    for other in devices[1:]:
        if other.type != first.type or first.type not in ("cpu", "cuda") or (other.index or 0) >= max(1, n_gpus):
            raise ConfigError(f"device {device}: a run takes several CUDA devices that are there, or several cpu")
    if len(set(indices)) < len(indices):
        raise ConfigError(f"device {device}: each rank of a run needs a GPU of its own")
    return devices


def _parse_device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name} is not there ({str(error).splitlines()[0]})") from error


def choose_device(device: str) -> torch.device:
    """Resolve `auto` to the first accelerator, else the CPU, and check that any other device exists."""
    if device != "auto":
        try:
            named = torch.device(device)
            if named.type == "cuda" and torch.cuda.is_available() and (named.index or 0) < torch.cuda.device_count():
                # not tried out: a tensor would take memory on a GPU that may be another process's
                return torch.device("cuda", named.index or 0)
            existing = torch.empty(0, device=named).device
            if existing.type == "meta":
                raise RuntimeError("it computes nothing")
            return existing
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"device {device} is not there ({str(error).splitlines()[0]}): use auto, cpu, cuda:0 or another that is"
            ) from error
    if torch.cuda.is_available():
        return torch.device("cuda:0")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def configure(threads: int, device: torch.device, shard: bool = False, workers: int = 1) -> None:
    """Set this process up so that its runs are reproducible, and fast or, where they are sharded, small in memory.

    Args:
        threads: CPU threads of this process.
        workers: how many workers share the device, each of which may take an equal part of its memory.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # no dumps of gigabytes
    if device.type == "cpu":
        set_kept_memory(MIN_KEPT_BYTES if shard else MAX_KEPT_BYTES)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # used by pinned memory and capability checks
        if workers > 1:  # else what one takes first would halve the micro-batches of another
            torch.cuda.set_per_process_memory_fraction(SHARED_MEMORY / workers, device)
    torch.set_float32_matmul_precision("highest")  # the environment of some containers turns TF32 on
    # a product split along its sums would add the parts in bf16, and whether cuBLAS splits it depends on the width
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if device.type != "cpu":  # CPU kernels are deterministic anyway, and this setting imports half of torch
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # cuBLAS repeats its bits only with a fixed workspace
        # switches that sum take numbers in the order of their arrival
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        os.environ.setdefault("NCCL_COLLNET_ENABLE", "0")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda":
        make_handles(device)


def make_handles(device: torch.device) -> None:
    """Make cuBLAS's and cuSOLVER's handles and workspaces, which cannot be made once data fills the device."""
    torch.cuda.current_blas_handle()
    torch.linalg.eigh(torch.eye(1, device=device))


def is_alive(device: torch.device) -> bool:
    """Whether the device still computes: some errors leave a CUDA context unusable for good."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def set_kept_memory(size: int) -> None:
    """Let glibc keep freed blocks below `size` bytes for reuse, and return larger ones to the kernel.

    Returning blocks at every step doubles the time of a step with a large vocabulary. Keeping them leaves holes between
    the weights that a sharded run gathers and frees block by block, until it takes as much memory as full weights.
    """
    if Path("/proc/self").exists():
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, size)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, size)  # M_TRIM_THRESHOLD
