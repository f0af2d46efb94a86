"""The environment of a sweep: code, packages and machine, as far as results depend on them; no secrets."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import mupsweep

PACKAGES = ("torch", "numpy", "scipy", "hydra-core", "omegaconf", "tiktoken", "tokenizers", "pyarrow", "wandb")


def describe() -> dict[str, Any]:
    """Return the content of environment.json."""
    gpus = {"gpus": found} if (found := _gpus()) else {}
    return {
        "mupsweep": mupsweep.__version__,
        "git": _git(Path(mupsweep.__file__).parent),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": cores(),
        "host": socket.gethostname(),
        **gpus,
    }


def cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def accelerator() -> str:
    """Return the kind of device that this machine seems to have, without importing torch: cuda, mps or cpu."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return "mps"
    return "cuda" if any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")) else "cpu"


def find_devices() -> list[str]:
    """Return every accelerator that torch sees, else the CPU; torch is imported only where there might be one."""
    if accelerator() == "cpu":
        return ["cpu"]
    import torch

    if torch.cuda.is_available():
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        return ["mps"]
    if os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):  # users hide GPUs by these values
        _warn_of_unseen_gpu(torch.__version__)
    return ["cpu"]


@cache
def _warn_of_unseen_gpu(version: str) -> None:
    """Say once that a driver or a CPU build of torch leaves a GPU idle, before a user finds out after a day."""
    print(
        f"note: there seems to be a GPU, but torch {version} sees none, so runs are trained on the CPU; "
        "python -c 'import torch; torch.cuda.init()' says why",
        file=sys.stderr,
    )


def device_memory() -> float | None:
    """Return the bytes of the smallest CUDA device of this machine; None where CUDA does not answer.

    A process of its own asks, since asking takes memory on the device.
    """
    script = (
        "import torch.cuda as c; print(min(c.get_device_properties(i).total_memory for i in range(c.device_count())))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    return None if done.returncode else float(done.stdout)


GPU_SCRIPT = """
import json, torch
cuda = torch.cuda
print(json.dumps({
    "names": [cuda.get_device_name(i) for i in range(cuda.device_count())],
    "cuda": torch.version.cuda,
    "cudnn": torch.backends.cudnn.version(),
    "nccl": ".".join(map(str, cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
}))
"""


def _gpus() -> dict[str, Any] | None:
    """Return the CUDA devices of this machine, the driver and the libraries; None where there seem to be none.

    Processes of their own ask, since asking takes memory on the device and the import of torch takes seconds.
    """
    if accelerator() != "cuda":
        return None
    done = subprocess.run([sys.executable, "-c", GPU_SCRIPT], capture_output=True, text=True)
    found = {} if done.returncode else json.loads(done.stdout)
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    except (OSError, subprocess.SubprocessError):
        driver = []
    return {**found, "driver": driver[0] if driver else None}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path) -> dict[str, Any] | None:
    """Return the commit of the checkout that runs and whether it is dirty; None for an installed package."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
