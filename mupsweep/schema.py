"""The schema of a config: sections as instances of their dataclasses, unknown keys refused, values converted.

A section with a `kind` names its class; its other keys are the fields of that dataclass.
"""

from __future__ import annotations

import importlib
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from mupsweep.errors import ConfigError
from mupsweep.formatting import nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig

T = TypeVar("T")
# Which code outside mupsweep may run: all (True), none (False), or what the command line names itself, as KEY=VALUE.
Consent = bool | frozenset[str]
LARGEST = 1e30  # a limit at which the FLOPs of so many parameters and tokens are still finite


def to_dataclass(cls: type[T], section: Mapping[str, Any], where: str) -> T:
    """An instance of the dataclass `cls` from a mapping: unknown keys refused, values converted to their types.

    Variants have most of their sections in common, and equal sections of a frozen class are converted once.

    Raises:
        ConfigError: naming the key, the offending value and the expected ones.
    """
    if cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return _converted_once(cls, pickle.dumps(section), where)
    return _converted(cls, section, where)


@lru_cache(maxsize=256)
def _converted_once(cls: type[T], pickled: bytes, where: str) -> T:
    """What `_converted` returns for a section that is given by its bytes, which can be compared at once."""
    return _converted(cls, pickle.loads(pickled), where)


def _converted(cls: type[T], section: Mapping[str, Any], where: str) -> T:
    """The work of `to_dataclass`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    assert is_dataclass(cls)
    fields_by_name = {f.name: f for f in fields(cls)}
    for key in section:
        if key not in fields_by_name:
            raise ConfigError(f"unknown key '{where}.{key}'; {nearest(str(key), fields_by_name)}")
    for name, field in fields_by_name.items():
        if name not in section and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"missing key '{where}.{name}'; give {where}.{name}=VALUE")

    nested = {}
    for key, default in _sections_of(cls).items():
        given = section.get(key, {})
        if not isinstance(given, Mapping):
            raise ConfigError(f"{where}.{key}={given}: expected a section of keys")
        defaults = {
            f.name: getattr(default, f.name) for f in fields(default) if f.name not in _sections_of(type(default))
        }
        nested[key] = to_dataclass(type(default), {**defaults, **given}, f"{where}.{key}")
    section = {key: value for key, value in section.items() if key not in nested}

    for key, value in section.items():
        entries = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(v, int | float) and not abs(v) <= LARGEST for v in entries):  # also true for nan
            raise ConfigError(f"{where}.{key}={value}: expected finite numbers, up to {LARGEST:.0e}")
        if any(isinstance(v, list | tuple) for v in entries):
            raise ConfigError(f"{where}.{key}={value}: expected a plain list, such as [-8,-7]")

    schema = _schema(cls)
    try:
        merged = OmegaConf.merge(schema, _literal(dict(section)))
        instance = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", None) or getattr(error, "key", None) or "?").split("[")[0]
        raise ConfigError(f"{where}.{key}={section.get(key)!r}: {_expected(fields_by_name.get(key), error)}") from error
    assert isinstance(instance, cls)
    return replace(_lists_to_tuples(instance), **nested)


def _literal(value: Any) -> Any:
    """A value in which OmegaConf resolves nothing: a stored ${oc.env:TOKEN} must not become what it names."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    if isinstance(value, Mapping):
        return {key: _literal(item) for key, item in value.items()}
    return [_literal(item) for item in value] if isinstance(value, list | tuple) else value


@cache
def _sections_of(cls: type) -> dict[str, Any]:
    """The fields of a dataclass that are dataclasses themselves, with their defaults."""
    sections: dict[str, Any] = {}
    for field in fields(cls):
        factory = field.default_factory
        default = factory() if isinstance(factory, type) and is_dataclass(factory) else field.default
        if is_dataclass(default) and not isinstance(default, type):
            sections[field.name] = default
    return sections


@cache
def _schema(cls: type) -> DictConfig:
    """Translate a dataclass for OmegaConf, which takes half of the time of `to_dataclass`; merging copies it."""
    from omegaconf import OmegaConf

    schema = OmegaConf.structured(cls)
    OmegaConf.set_readonly(schema, False)  # the node of a frozen dataclass is read-only, and merging writes to its copy
    return schema


def with_whole_numbers(cls: type, section: Mapping[str, Any]) -> dict[str, Any]:
    """A section with floats such as 1e9 as integers where its dataclass has an integer.

    Only for sections that are kept as instances of their dataclass: of all others, the identity of a run holds the
    values as they are written, so a conversion would change run ids.
    """
    whole = {f.name for f in fields(cls) if f.type in ("int", "int | None")}
    return {
        key: int(value) if key in whole and isinstance(value, float) and value.is_integer() else value
        for key, value in section.items()
    }


def _expected(field_: Field[Any] | None, error: Exception) -> str:
    """A description of the values that a field takes, from its annotation; else the error's own message."""
    annotation = "" if field_ is None else str(field_.type)
    if "tuple" in annotation:
        items = {"int": "whole numbers, such as [0,1]", "str": "words, such as [a,b]"}
        return "expected a list of " + next((w for t, w in items.items() if t in annotation), "numbers, as [-8,-7]")
    if "dict" in annotation:
        return "expected a section of keys, or null"
    descriptions = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a word"}
    for name, description in descriptions.items():
        if re.search(rf"\b{name}\b", annotation):
            return f"expected {description}" + (" or null" if "None" in annotation else "")
    return (getattr(error, "msg", None) or str(error)).splitlines()[0]


def instantiate(section: Mapping[str, Any], where: str) -> Any:
    """The object that a section's `kind` (a dotted class path) and its other keys describe."""
    cls = _class_of(section, where)
    if not (isinstance(cls, type) and is_dataclass(cls)):
        raise ConfigError(f"{where}.kind={section.get('kind')} is no dataclass: its fields would be the section's keys")
    name = section.get("name", cls.__name__)
    if not re.fullmatch(r"[\w.+-]+", str(name)):
        raise ConfigError(f"{where}.name={name}: it becomes part of file names, so use letters, digits, and . + - _")
    return to_dataclass(cls, {k: v for k, v in section.items() if k != "kind"}, where)


def refuse_foreign_code(section: Mapping[str, Any], where: str, allowed: Consent) -> None:
    """Refuse a section that names code outside mupsweep, at any depth, unless the person at the command line allows it.

    Args:
        section: with a `kind`, and perhaps further sections inside.
        where: the section's name, for the message.
        allowed: what this command line says; a file that holds the section has no say.
    """
    code = refused_code(section, where, allowed, to_train=True)
    if code is not None:
        raise ConfigError(
            f"{code} is code outside mupsweep: add allow_imports=true if you trust it (--allow-imports to a "
            "command on a sweep)"
        )


def refused_code(section: Any, where: str, allowed: Consent, to_train: bool = False) -> str | None:
    """The first of what `foreign_code` finds that the person at the command line does not allow; None where all is."""
    if isinstance(allowed, bool):
        return None if allowed else next(foreign_code(section, where, to_train), None)
    return next((code for code in foreign_code(section, where, to_train) if code not in allowed), None)


def foreign_code(section: Any, where: str, to_train: bool = False) -> Iterator[str]:
    """Every key with its value that names code outside mupsweep, at any depth of a section, as KEY=VALUE.

    Nothing outside mupsweep is imported. A class with further keys that name code has them in its attribute `imports`.

    Args:
        to_train: whether programs count that only training starts, which a class has in its attribute `starts`.
    """
    if isinstance(section, list | tuple):
        for value in section:
            yield from foreign_code(value, where, to_train)
    if not isinstance(section, Mapping):
        return
    for key, value in section.items():
        yield from foreign_code(value, f"{where}.{key}", to_train)
    if "kind" not in section:
        return
    keys: tuple[str, ...] = ("kind",)
    if str(section["kind"]).startswith("mupsweep."):
        cls = _class_of(section, where)
        keys = (*getattr(cls, "imports", ()), *(getattr(cls, "starts", ()) if to_train else ()))
    for key in keys:
        if section.get(key) is not None:
            yield f"{where}.{key}={section[key]}"


def _class_of(section: Mapping[str, Any], where: str) -> Any:
    """The class that a section's `kind` names."""
    return import_object(section.get("kind"), f"{where}.kind", "a dataclass")


def import_object(path: Any, key: str, what: str) -> Any:
    """The object that a dotted path names.

    Args:
        path: the value in the config, such as "package.module.Class".
        key: where the config has it, for the message.
        what: a description of the object, for the message.

    Raises:
        ConfigError: the path is no dotted path, its module fails to import, or it has no such attribute.
    """
    module, _, name = str(path).rpartition(".")
    if not module:
        raise ConfigError(f"{key}={'null' if path is None else path}: name {what} as package.module.Class")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a user's code may raise anything
        raise ConfigError(
            f"{key}={path} cannot be imported ({' '.join(str(error).split()) or type(error).__name__}): name {what} as "
            "package.module.Class, of a package that is installed or in a folder of PYTHONPATH"
        ) from error


def _lists_to_tuples(instance: T) -> T:
    """The instance with tuples in its fields instead of the lists that OmegaConf makes of them."""
    for f in fields(instance):  # type: ignore[arg-type]
        value = getattr(instance, f.name)
        if isinstance(value, list):
            object.__setattr__(instance, f.name, tuple(value))
    return instance


def boolean(value: Any, where: str) -> bool:
    """`value` if it is true or false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{where}={value}: expected true or false")
    return value


def require(ok: bool, key: str, value: object, expected: str) -> None:
    """Refuse a value unless `ok`, with the expected values in the message."""
    if not ok:
        raise ConfigError(f"{key}={value}: expected {expected}")


def one_of(value: str, valid: Sequence[str], key: str) -> None:
    """Refuse a value that is not one of the valid ones, with the nearest valid one in the message."""
    if value not in valid:
        raise ConfigError(f"{key}={value}: {nearest(value, valid)}")
