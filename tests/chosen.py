"""Every choice of a config group with what it needs to be usable."""

from __future__ import annotations

import shlex

from mupsweep.sweep import config


def words(group: str, name: str) -> list[str]:
    """The overrides of the example in a choice's yaml, where it has one; else the choice alone."""
    lines = (config.config_root() / group / f"{name}.yaml").read_text().splitlines()
    header = [line.lstrip("# ") for line in lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")]]
    example = " ".join(header).partition("Example: ")[2]
    return shlex.split(example) or [f"{group}={name}"]


def imports_foreign_code(group: str, name: str) -> bool:
    """Whether it names code that imports what it likes."""
    return "allow_imports=true" in words(group, name) or f"{group}={name}" in ("model=own", "model=huggingface")
