"""Json and yaml that somebody else may have written: read as plain data of a bounded size, or refused as ValueError."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

LARGEST_DOCUMENT = 1_000_000  # values of a yaml document, each counted as often as aliases repeat it


class TooLargeError(ValueError):
    """A document that is nested too deeply, or whose aliases repeat more than memory holds."""


def parse_json(text: str | bytes) -> Any:
    """The value of a json document.

    Raises:
        ValueError: it is no json, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def parse_yaml(text: str | bytes) -> Any:
    """The value of a yaml document of plain data.

    Raises:
        ValueError: it is no yaml, nested too deeply, or its aliases repeat more than memory holds.
    """
    import yaml

    try:
        value = yaml.safe_load(text)
        size = _size(value, {})
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise TooLargeError("nested too deeply") from error
    except (OverflowError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"no plain data ({type(error).__name__})") from error
    if size > LARGEST_DOCUMENT:
        raise TooLargeError(f"its aliases make {size:.2g} values of it")
    return value


def leaves(tree: Mapping[str, Any], separator: str = ".", path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings, each with the path of its keys."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, separator, f"{path}{key}{separator}")
        else:
            yield f"{path}{key}", value


def _size(value: Any, known: dict[int, int | None]) -> int:
    """How many values a document holds, those that aliases repeat counted every time.

    Args:
        known: the size of the lists and mappings met so far, by identity; None while one is being counted.
    """
    if not isinstance(value, dict | list | tuple | set):
        return 1
    if id(value) in known:
        size = known[id(value)]
        if size is None:
            raise TooLargeError("it holds itself")
        return size
    known[id(value)] = None
    known[id(value)] = size = 1 + sum(_size(item, known) for item in _items(value))
    return size


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield item
    else:
        yield from value
