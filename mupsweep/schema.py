"""Sections: a part of a config as an object of its dataclass, unknown keys refused and values converted.

A section with a `kind` names its class; its other keys are that dataclass's fields.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, TypeVar

from mupsweep.errors import ConfigError
from mupsweep.formatting import nearest

T = TypeVar("T")
LARGEST = 1e30  # FLOPs of models and tokens so large are still finite


def to_dataclass(cls: type[T], section: Mapping[str, Any], where: str) -> T:
    """An instance of the dataclass `cls` from a mapping: unknown keys refused, values converted to their types.

    Raises:
        ConfigError: naming `where`.key, the offending value and what was expected.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    assert is_dataclass(cls)
    known = {f.name: f for f in fields(cls)}
    for key in section:
        if key not in known:
            raise ConfigError(f"unknown key '{where}.{key}'; {nearest(str(key), known)}")
    missing = [
        n for n, f in known.items() if n not in section and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise ConfigError(f"missing key '{where}.{missing[0]}'; give {where}.{missing[0]}=VALUE")

    for key, value in section.items():
        entries = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(v, int | float) and not abs(v) <= LARGEST for v in entries):  # nan is not, either
            raise ConfigError(f"{where}.{key}={value}: expected finite numbers, up to {LARGEST:.0e}")
        if any(isinstance(v, list | tuple) for v in entries):
            raise ConfigError(f"{where}.{key}={value}: expected a plain list, such as [-8,-7]")

    schema = OmegaConf.structured(cls)
    OmegaConf.set_readonly(schema, False)  # a frozen dataclass is read-only until told otherwise
    try:
        merged = OmegaConf.merge(schema, dict(section))
        made = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or getattr(error, "key", None) or "?").split("[")[0]
        raise ConfigError(f"{where}.{key}={section.get(key)!r}: {_expected(known.get(key), error)}") from error
    assert isinstance(made, cls)
    return _tuples(made)


def with_whole_numbers(cls: type, section: Mapping[str, Any]) -> dict[str, Any]:
    """A section with 1e9 as 1000000000 where its dataclass wants a whole number.

    For sections that are kept as their dataclass. Of others a run's identity holds the values as they are written.
    """
    whole = {f.name for f in fields(cls) if f.type in ("int", "int | None")}
    return {
        key: int(value) if key in whole and isinstance(value, float) and value.is_integer() else value
        for key, value in section.items()
    }


def _expected(field_: Field[Any] | None, error: Exception) -> str:
    """What a key takes, in words, from its annotation."""
    annotation = "" if field_ is None else str(field_.type)
    if "tuple" in annotation:
        what = {"int": "whole numbers, such as [0,1]", "str": "words, such as [a,b]"}
        return "expected a list of " + next((w for t, w in what.items() if t in annotation), "numbers, as [-8,-7]")
    if "dict" in annotation:
        return "expected a section of keys, or null"
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a word"}
    for name, word in words.items():
        if re.search(rf"\b{name}\b", annotation):
            return f"expected {word}" + (" or null" if "None" in annotation else "")
    return (getattr(error, "msg", None) or str(error)).splitlines()[0]


def instantiate(section: Mapping[str, Any], where: str) -> Any:
    """The object that a section's `kind` (a dotted class path) and its other keys describe."""
    cls = _named(section, where)
    if not (isinstance(cls, type) and is_dataclass(cls)):
        raise ConfigError(f"{where}.kind={section.get('kind')} is no dataclass: its fields would be the section's keys")
    name = section.get("name", cls.__name__)
    if not re.fullmatch(r"[\w.+-]+", str(name)):
        raise ConfigError(f"{where}.name={name}: it becomes part of file names, so use letters, digits, and . + - _")
    return to_dataclass(cls, {k: v for k, v in section.items() if k != "kind"}, where)


def refuse_foreign_code(section: Mapping[str, Any], where: str, allowed: bool) -> None:
    """A config may name only our own classes, at any depth, unless the user trusts it.

    A class whose keys name code too lists them as `imports`.
    """
    if allowed:
        return
    for key, value in section.items():
        if isinstance(value, Mapping):
            refuse_foreign_code(value, f"{where}.{key}", allowed)
    if "kind" not in section:
        return
    ours = str(section["kind"]).startswith("mupsweep.")
    for key in getattr(_named(section, where), "imports", ()) if ours else ("kind",):
        if section.get(key) is not None:
            raise ConfigError(
                f"{where}.{key}={section[key]} is code outside mupsweep: add allow_imports=true if you trust it"
            )


def _named(section: Mapping[str, Any], where: str) -> Any:
    """What a section's `kind` names."""
    return import_object(section.get("kind"), f"{where}.kind", "a dataclass")


def import_object(path: Any, key: str, what: str) -> Any:
    """What a dotted path names, which the config gives at `key`.

    Raises:
        ConfigError: nothing, or code that fails; only its last word is told.
    """
    module, _, name = str(path).rpartition(".")
    if not module:
        raise ConfigError(f"{key}={'null' if path is None else path}: name {what} as package.module.Class")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # code that is not ours may raise anything
        raise ConfigError(
            f"{key}={path} cannot be imported ({' '.join(str(error).split()) or type(error).__name__}): name {what} as "
            "package.module.Class, of a package that is installed or in a folder of PYTHONPATH"
        ) from error


def _tuples(made: T) -> T:
    """OmegaConf returns lists for tuple fields; frozen objects hold tuples."""
    for f in fields(made):  # type: ignore[arg-type]
        value = getattr(made, f.name)
        if isinstance(value, list):
            object.__setattr__(made, f.name, tuple(value))
    return made


def boolean(value: Any, where: str) -> bool:
    """`value` if it is true or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{where}={value}: expected true or false")
    return value


def require(ok: bool, key: str, value: object, expected: str) -> None:
    """Refuse a value that is not ok, saying what was expected."""
    if not ok:
        raise ConfigError(f"{key}={value}: expected {expected}")


def one_of(value: str, valid: Sequence[str], key: str) -> None:
    """Refuse a value that is not one of the valid ones, naming the nearest."""
    if value not in valid:
        raise ConfigError(f"{key}={value}: {nearest(value, valid)}")
