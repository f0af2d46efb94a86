"""Composition of configs: overrides and the yaml groups of `configs/` in, plain mappings out.

Hydra is used in this module only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mupsweep.documents import TooLargeError, parse_yaml
from mupsweep.errors import ConfigError
from mupsweep.formatting import nearest

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

COMPARABLE = ("model", "optimizer", "parametrization")  # groups that take several choices: optimizer=adamw,muon
MAPPINGS = (  # whose keys are the user's
    *("launcher.sizes", "optimizer.group_lr", "sweep.axes", "sweep.log2_lrs"),
    *("model.options", "model.roles", "model.fields", "model.scaled", "model.settings"),
)
NESTED = ("optimizer.rest", "optimizer.graft")  # sections that another choice of the same group fills


def choices(group: str, config_dir: str | None = None) -> list[str]:
    """The names of a config group, the user's own folder included."""
    roots = [Path(config_dir), config_root()] if config_dir else [config_root()]
    return sorted({p.stem for root in roots for p in (root / group).glob("[!_]*.yaml")})


def config_root() -> Path:
    """The shipped `configs/` folder: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).parents[1]
    for root in (package / "configs", package.parent / "configs"):
        if (root / "mupsweep.yaml").is_file():
            return root
    raise ConfigError(f"configs/mupsweep.yaml is in neither {package} nor {package.parent}: install mupsweep again")


def _groups() -> list[str]:
    """The names of the config groups."""
    return sorted(p.name for p in config_root().iterdir() if p.is_dir())


def split_overrides(overrides: Sequence[str], config_dir: str | None) -> tuple[dict[str, list[str]], list[str]]:
    """Overrides -> ({comparable group: choices}, all other overrides), with the names in them checked."""
    groups = _groups()
    comparable: dict[str, list[str]] = {}
    others: list[str] = []
    for text in overrides:
        override = _parsed(text, config_dir)
        text = override.input_line or text
        key = override.key_or_group
        _check_form(override, text, groups)
        if key in NESTED and not override.is_sweep_override() and isinstance(override.value(), str):
            group, name = key.split(".")[0], str(override.value())
            if name not in choices(group, config_dir):
                raise ConfigError(f"no {group} named '{name}' for {key}; {nearest(name, choices(group, config_dir))}")
            others.append(f"{group}@{key}={name}")
        elif key not in groups:
            if override.is_sweep_override():
                raise ConfigError(
                    f"override {text!r}: only {', '.join(COMPARABLE)} take several choices; write a list as [a,b], "
                    f"and values to compare as sweep.axes={{{key}:[a,b]}}"
                )
            # Hydra merges mappings key by key; one of a command line replaces that of an experiment
            if key.startswith("optimizer.group_lr."):
                others.append(f"++{text}")  # a key of the user's, which no yaml has
            else:
                others += [f"{key}=null", text] if key in MAPPINGS else [text]
        else:
            names = _choices_in(override, text, config_dir)
            if key in COMPARABLE:
                comparable[key] = names
            else:
                others.append(text)
    return comparable, others


def _check_form(override: Override, text: str, groups: Sequence[str]) -> None:
    """Refuse an override that adds or deletes a key, has no key, or is addressed to Hydra itself."""
    key = override.key_or_group
    if override.is_add() or override.is_force_add() or override.is_delete():
        raise ConfigError(f"override {text!r}: every key exists already, so write it without the sign: {key}=VALUE")
    if not key:
        raise ConfigError(f"cannot read the override {text!r}: write key=value")
    if key.startswith("hydra"):
        raise ConfigError(f"override {text!r}: Hydra only composes here and has no keys; {nearest(key, groups)}")


def _choices_in(override: Override, text: str, config_dir: str | None) -> list[str]:
    """The choices that an override of a config group names, each of them checked."""
    key, value = override.key_or_group, override.value()
    names = [str(v) for v in value.list] if override.is_sweep_override() else [str(value)]  # type: ignore[union-attr]
    if len(set(names)) < len(names):
        raise ConfigError(f"override {text!r}: each choice once")
    if len(names) > 1 and key not in COMPARABLE:
        raise ConfigError(f"override {text!r}: only {', '.join(COMPARABLE)} take several choices")
    for name in names:
        if name not in choices(key, config_dir) and text != "experiment=null":
            raise ConfigError(f"no {key} named '{name}'; {nearest(name, choices(key, config_dir))}")
    return names


def compose(overrides: list[str], config_dir: str | None) -> dict[str, Any]:
    """One Hydra composition as plain containers.

    Raises:
        ConfigError: an unknown key, a value of the wrong form, or a yaml file that cannot be read.
    """
    import hydra
    import yaml
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    search = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    if config_dir and not Path(config_dir).is_dir():
        raise ConfigError(
            f"--config-dir {config_dir} is not a folder: it holds yaml groups such as optimizer/mine.yaml"
        )

    def tree_of(overrides: list[str]) -> dict[str, Any]:
        try:
            composed = hydra.compose("mupsweep", [*search, *overrides])
            _refuse_resolvers(OmegaConf.to_container(composed))
            tree = OmegaConf.to_container(composed, resolve=True)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"a yaml file cannot be read: {' '.join(str(error).split())}") from error
        assert isinstance(tree, dict)
        return {str(k): v for k, v in tree.items()}

    for path in Path(config_dir).glob("*/*.yaml") if config_dir else ():
        if (config_root() / path.parent.name / path.name).exists():
            raise ConfigError(f"{path}: mupsweep ships {path.parent.name}={path.stem} itself; give yours another name")
        try:
            parse_yaml(path.read_bytes())
        except TooLargeError as error:  # Hydra would copy what its aliases repeat
            raise ConfigError(f"{path} cannot be read: {error}") from error
        except (OSError, ValueError):  # Hydra says more, where the file is chosen
            continue

    with hydra.initialize_config_dir(str(config_root().resolve()), version_base="1.3"):
        try:
            return tree_of(overrides)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            # the choices of groups alone compose, as a rule, and then list every key that there is
            try:
                keys = list(_dotted(tree_of([o for o in overrides if _is_group(o)])))
            except (HydraException, OmegaConfBaseException, ValueError):
                keys = []
            for override in overrides:
                key = override.split("=")[0]
                if keys and "@" not in key and not _is_group(override) and key not in keys:
                    valid = [*keys, *_groups()]  # not every group is a section: experiment is none
                    raise ConfigError(f"unknown key '{key}'; {nearest_key(key, valid)}") from error
            message = " ".join(str(error).split())
            if "Error merging override" in message:
                message += ": it replaces a list, so write one, as [1,2]"
            raise ConfigError(message) from error


def _refuse_resolvers(tree: Any, where: str = "") -> None:
    """Refuse values that are taken from elsewhere than the config, since every record of a sweep would hold them.

    Raises:
        ConfigError: naming the key; ${model.width}, the value of another key, is no such value.
    """
    if isinstance(tree, dict):
        for key, value in tree.items():
            _refuse_resolvers(value, f"{where}.{key}" if where else str(key))
    elif isinstance(tree, list):
        for value in tree:
            _refuse_resolvers(value, where)
    elif isinstance(tree, str) and _has_resolver(tree):
        raise ConfigError(
            f"{where}={tree}: nothing is taken from the environment, since config.yaml, the report and trackers show "
            "every value; write the value itself, or \\${...} for text that has such a form"
        )


def _has_resolver(text: str) -> bool:
    """Whether a text has an interpolation that calls a resolver: ${NAME:ARGUMENT}, at any depth of braces."""
    depth = 0
    for match in re.finditer(r"(\\*)\$\{|[{}:]", text):
        token = match[0]
        if token.endswith("${") and len(match[1]) % 2 == 0:
            depth += 1
        elif depth and token in ("{", "}"):
            depth += 1 if token == "{" else -1
        elif depth and token == ":":
            return True
    return False


def _parsed(text: str, config_dir: str | None) -> Override:
    """An override as Hydra parses it; a value outside its grammar, such as µ or a(b, is taken literally."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Quote, QuotedString
    from hydra.errors import HydraException

    text = re.sub(r"^([\w.]+=)(~/.*)", lambda match: match[1] + os.path.expanduser(match[2]), text)  # not by a shell
    if any("\ud800" <= character <= "\udfff" for character in text):  # Python's surrogates for undecodable bytes
        raise ConfigError(
            f"override {text!r} is no text in the encoding of this shell: use ASCII, or UTF-8 with LC_ALL=C.UTF-8"
        )
    parse = OverridesParser.create().parse_override
    try:
        return parse(text)
    except HydraException as error:
        key, _, value = text.partition("=")
        if not re.fullmatch(r"\w+(\.\w+)*", key, re.ASCII) or not value or value[0] in "[{'\"":
            raise ConfigError(f"cannot read the override {text!r}: {_hint(text, config_dir)}") from error
    return parse(f"{key}={QuotedString(value, Quote.single).with_quotes()}")


def _hint(word: str, config_dir: str | None) -> str:
    """What to write instead of a word that is not an override."""
    if word in choices("experiment", config_dir):
        return f"did you mean experiment={word}?"
    if "=" not in word and Path(word).exists():
        return "folders and files are for mupsweep status, transfer and report; here write key=value"
    if not word.isascii():
        return "inside of a list or mapping, quote text beyond ASCII: \"key=['µ']\""
    return "write key=value; quote lists for the shell: 'sweep.seeds=[0,1]'"


def nearest_key(key: str, keys: Collection[str]) -> str:
    """The hint for a dotted key: its nearest spelling, and the keys of its own group only."""
    *_, name = key.split(".")
    if name in ("lr", "lrs", "learning_rate", "base_lr"):
        return "the base LRs of a sweep are sweep.log2_lrs=[-10,-9,-8], which are 2^-10, 2^-9 and 2^-8"
    elsewhere = [k for k in keys if k.endswith(f".{name}")]
    if len(elsewhere) == 1:
        return f"did you mean '{elsewhere[0]}'?"
    siblings = [k for k in keys if "." in k and k.split(".")[0] == key.split(".")[0]]
    return nearest(key, siblings or sorted({k.split(".")[0] for k in keys}))


def _is_group(override: str) -> bool:
    """Whether an override is the choice of a config group."""
    return (config_root() / override.split("=")[0]).is_dir()


def _dotted(tree: Any, prefix: str = "") -> Iterable[str]:
    """The dotted keys of a nested mapping, those of its sections included."""
    for key, value in tree.items():
        yield prefix + str(key)
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
