"""Completion of overrides in a shell: groups, their choices, the keys of the groups that are chosen, and their values.

It reads the yamls itself, since composing them takes Hydra longer than a person waits for a Tab.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mupsweep.documents import leaves
from mupsweep.sweep.compose import COMPARABLE, choices, config_root

Tree = dict[str, Any]


def complete(words: Sequence[str], incomplete: str, config_dir: str | None = None) -> list[str]:
    """What an incomplete word of overrides may become.

    Args:
        words: the overrides before it. bash makes three words of key=value, and leaves the `=` out where it is last.
        incomplete: the word so far; of bash only what follows the `=`.
        config_dir: a folder of the user's own yaml groups.
    """
    before = _joined(words)
    configs = _Configs(config_dir)
    if before and (before[-1].endswith("=") or (not incomplete and "=" not in before[-1])):
        key = before.pop().removesuffix("=")
        return list(configs.values(key, incomplete, before))
    key, equals, value = incomplete.partition("=")
    if equals:
        return [f"{key}={whole}" for whole in configs.values(key, value, before)]
    keys = list(configs.keys(key, before))
    if len(keys) == 1 and keys[0].endswith("="):  # a shell would put a space behind the only one
        return [keys[0] + value for value in ("", *configs.values(keys[0][:-1], "", before))]
    return keys


def _joined(words: Sequence[str]) -> list[str]:
    """key=value words of what bash splits into `key`, `=` and `value`."""
    joined: list[str] = []
    for word in words:
        if joined and (word == "=" or joined[-1].endswith("=")):
            joined[-1] += word
        else:
            joined.append(word)
    return joined


class _Configs:
    """The yaml groups, the user's own before the shipped ones."""

    def __init__(self, config_dir: str | None) -> None:
        self.config_dir = config_dir
        self.roots = [*([Path(config_dir)] if config_dir else []), config_root()]
        self.groups = sorted(path.name for path in config_root().iterdir() if path.is_dir())
        self.main = _read(config_root() / "mupsweep.yaml")

    def keys(self, prefix: str, words: Sequence[str]) -> Iterator[str]:
        """The groups and keys that begin with a prefix, each with its `=`; a group also with the dot of its keys."""
        tops = [key for key in self.main if key != "defaults"]
        for name in sorted([*self.groups, *tops]):
            if name.startswith(prefix):
                yield f"{name}="
                if name in self.groups and name not in ("experiment", prefix):
                    yield f"{name}."
        group = prefix.partition(".")[0]
        if group in self.groups:
            yield from (f"{key}=" for key, _ in self.leaves(group, words) if key.startswith(f"{prefix}".rstrip(".")))

    def values(self, key: str, prefix: str, words: Sequence[str]) -> Iterator[str]:
        """The choices of a group that begin with a prefix, or the value that a key has."""
        if key in self.groups:
            given, comma, last = prefix.rpartition(",") if key in COMPARABLE else ("", "", prefix)
            for name in choices(key, self.config_dir):
                if name.startswith(last) and name not in given.split(","):
                    yield f"{given}{comma}{name}"
            return
        group = key.partition(".")[0]
        leaves = dict(self.leaves(group, words)) if group in self.groups else self.main
        if key in leaves:
            value = leaves[key]
            texts = ("true", "false") if isinstance(value, bool) else (_text(value),)
            yield from (text for text in texts if text.startswith(prefix))

    def leaves(self, group: str, words: Iterable[str]) -> Iterator[tuple[str, Any]]:
        """(dotted key, value) of the choice of a group, or of all choices where several are compared."""
        chosen = self.chosen(words)
        experiment: Tree = {}
        if chosen.get("experiment"):
            experiment, _ = self.tree("experiment", chosen["experiment"][0])
        seen: dict[str, Any] = {}
        for name in chosen.get(group) or []:
            tree, _ = self.tree(group, name)
            seen |= leaves({group: _merged(tree, experiment.get(group) or {})})
        yield from ((key, value) for key, value in seen.items() if key.rpartition(".")[2] != "kind")

    def chosen(self, words: Iterable[str]) -> dict[str, list[str]]:
        """The choices of every group: those of the words, else of the experiment, else the default ones."""
        defaults: dict[str, list[str]] = {}
        for entry in self.main.get("defaults", []):
            if isinstance(entry, dict):
                defaults |= {group: [name] for group, name in entry.items() if name}
        typed: dict[str, list[str]] = {}
        for word in words:
            group, _, names = word.partition("=")
            if group in self.groups:
                typed[group] = names.split(",")
        if "experiment" in typed:
            _, overridden = self.tree("experiment", typed["experiment"][0])
            defaults |= {group: [name] for group, name in overridden.items()}
        return defaults | typed

    def tree(self, group: str, name: str) -> tuple[Tree, dict[str, str]]:
        """The keys of a choice with those of the yamls that it rests on, and its choices of other groups."""
        path = next((p for root in self.roots if (p := root / group / f"{name}.yaml").is_file()), None)
        content = _read(path) if path is not None else {}
        defaults = content.pop("defaults", [])
        tree: Tree = {}
        others: dict[str, str] = {}
        for entry in defaults if "_self_" in defaults else [*defaults, "_self_"]:
            if entry == "_self_":
                tree = _merged(tree, content)
            elif isinstance(entry, str):
                inherited, chosen = self.tree(group, entry)
                tree, others = _merged(tree, inherited), others | chosen
            else:
                for key, choice in entry.items():
                    other, _, section = key.removeprefix("override ").lstrip("/").partition("@")
                    if section:
                        tree[section] = self.tree(other, choice)[0] if choice else None
                    elif choice:
                        others[other] = choice
        return tree, others


def _read(path: Path) -> Tree:
    """A yaml as a mapping; empty where it cannot be read, since a Tab is no place for a message."""
    import yaml

    try:
        content = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> Tree:
    """Two nested mappings as one; where both have a key, the second one's value."""
    merged = dict(lower)
    for key, value in upper.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _text(value: Any) -> str:
    """A value as one writes it in an override."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
