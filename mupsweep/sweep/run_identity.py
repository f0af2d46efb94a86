"""Identity: what decides what the runs of a variant compute, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from mupsweep.analysis.labels import Label
from mupsweep.data import fingerprint
from mupsweep.errors import ConfigError
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep.config import Variant

HUB_KEYS = ("hub_id", "hub_config", "revision", "data_files", "split", "validation_split", "held_out", "rows")
UNIDENTIFYING = {
    "data": ("path", "cache", "kind", *HUB_KEYS),  # the content of the corpus stands in the identity itself
    "training": ("checkpoint_minutes", "micro_batch"),
}  # no effect on the numbers; that of micro_batch is the rounding of sums taken in another order


def digest_of(variant: Variant) -> str:
    """Identifies a variant by everything that decides what its runs compute, the content of the corpus included."""
    tree = _identifying(variant)
    tree["data"]["content"] = fingerprint(variant.data)
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _identifying(variant: Variant) -> dict[str, Any]:
    """A variant's keys without those that have no effect on its numbers."""
    tree = asdict(variant)
    del tree["change"]  # a name for what the other keys say
    for section, keys in UNIDENTIFYING.items():
        for key in keys:
            del tree[section][key]
    if not tree["training"]["branches"]:
        del tree["training"]["branches"]  # the run itself is the same with and without the key
    if tree["model"].get("attention_multiplier") == 1:
        del tree["model"]["attention_multiplier"]  # and so it is here
    return tree


def refuse_namesakes(variants: Iterable[Variant], sweep: SweepDir) -> None:
    """Two variants of one label would be drawn as one curve."""
    seen: dict[Label, Variant] = {}
    for variant in variants:
        other = seen.setdefault(variant.label, variant)
        if other is variant:
            continue
        mine, theirs = _flat(_identifying(variant)), _flat(_identifying(other))
        different = [k for k in mine | theirs if mine.get(k) != theirs.get(k)]
        shown = ", ".join(f"{k}={mine.get(k)} (there: {theirs.get(k)})" for k in different[:3]) or "another corpus"
        raise ConfigError(
            f"sweep {sweep.path} already holds {'/'.join(variant.label)} with other settings: {shown}; "
            "choose another sweep.name, or give this choice a name of its own such as optimizer.name=adamw-2"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
