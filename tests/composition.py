"""Composition of configs as Hydra does it, with what Hydra reads from files composed once per session."""

from __future__ import annotations

import hashlib
import os
import pickle
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mupsweep.atomic_files import write_bytes
from mupsweep.errors import ConfigError
from mupsweep.sweep import config

FOLDER = "MUPSWEEP_TESTS_COMPOSED"  # environment variable: where the processes of a test session share trees
compose = config.compose
compose_by_hydra = hydra.compose


@cache
def compose_groups(*groups: str) -> DictConfig:
    """The tree of the choices of groups, its interpolations unresolved; processes of one test session share it."""
    path = Path(os.environ[FOLDER], hashlib.sha256("\n".join(groups).encode()).hexdigest())
    if path.exists():
        return pickle.loads(path.read_bytes())
    with hydra.initialize_config_dir(str(config.config_root().resolve()), version_base="1.3"):
        tree = compose_by_hydra("mupsweep", list(groups))
    write_bytes(path, pickle.dumps(tree), durable=False)
    return tree


def compose_groups_once(name: str, overrides: list[str]) -> DictConfig:
    """In place of `hydra.compose`, which the product asks a second time about overrides that Hydra refuses."""
    return compose_groups(*overrides) if all(map(is_group, overrides)) else compose_by_hydra(name, overrides)


def is_group(override: str) -> bool:
    """Whether an override chooses of a config group, whose yamls Hydra reads and merges in 0.1 s."""
    return (config.config_root() / override.split("=")[0].split("@")[0]).is_dir()


@cache
def compose_shipped(*overrides: str) -> dict[str, Any]:
    """The tree of the shipped yamls under some overrides.

    Hydra sets values after it has composed the choices of groups.

    Raises:
        ConfigError: as the product does, which is asked about whatever cannot be composed in this way.
    """
    if any("${" in override for override in overrides):
        return compose(list(overrides), None)
    try:
        tree = deepcopy(compose_groups(*filter(is_group, overrides)))
        for override in OverridesParser.create().parse_overrides([o for o in overrides if not is_group(o)]):
            if override.is_add() or override.is_force_add() or override.is_delete() or override.package:
                return compose(list(overrides), None)
            OmegaConf.update(tree, override.key_or_group, override.value(), merge=True)
        return OmegaConf.to_container(tree, resolve=True)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException, ValueError, ConfigError):
        return compose(list(overrides), None)


def compose_once(overrides: list[str], config_dir: str | None) -> dict[str, Any]:
    """In place of `config.compose`: equal overrides of the shipped yamls are composed only once."""
    return compose(overrides, config_dir) if config_dir else deepcopy(compose_shipped(*overrides))
