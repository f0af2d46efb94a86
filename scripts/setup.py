"""Make a virtual environment with everything mupsweep needs to run, test and check: `python3 scripts/setup.py .venv`.

On Linux machines without an NVIDIA GPU it insists on torch's CPU build: the default build there is a CUDA one of
several gigabytes. TORCH=torch==2.13.0 in the environment overrides that.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(venv: str) -> None:
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        sys.exit(f"mupsweep needs Python 3.11 to 3.13, this is {platform.python_version()}: make PYTHON=python3.12 ...")
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    pip = [str(Path(venv) / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    pip += ["-c", str(ROOT / "constraints.txt")]
    if subprocess.run([*pip, wanted_torch()]).returncode != 0:
        sys.exit(
            f"cannot install {wanted_torch()}: if your package index has no CPU builds of torch, set "
            "PIP_EXTRA_INDEX_URL to the CPU index that PyTorch's install page names, or accept the CUDA build with "
            "TORCH=torch==2.13.0 make ..."
        )
    if subprocess.run([*pip, "-e", f"{ROOT}[dev]"]).returncode != 0:
        sys.exit("cannot install mupsweep's dependencies: see pip's message above")
    # A reference for tests, which are skipped without it. It wants a torchvision that does not fit torch's CPU build.
    if subprocess.run([*pip, "--no-deps", "mup"]).returncode != 0:
        print("cannot install mup: the tests that compare with it will be skipped", file=sys.stderr)


def wanted_torch() -> str:
    """The pinned torch; its CPU build on Linux x86-64 without a GPU."""
    if "TORCH" in os.environ:
        return os.environ["TORCH"]
    match = re.search(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert match is not None
    has_gpu = shutil.which("nvidia-smi") is not None or Path("/dev/nvidiactl").exists()
    cpu_only = sys.platform == "linux" and platform.machine() == "x86_64" and not has_gpu
    return match[0] + ("+cpu" if cpu_only else "")


if __name__ == "__main__":
    main(sys.argv[1])
