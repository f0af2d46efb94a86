"""The identity of a variant: everything that decides what its runs compute, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from mupsweep.analysis.labels import Label
from mupsweep.data import fingerprint, tokenizers
from mupsweep.documents import leaves
from mupsweep.errors import ConfigError
from mupsweep.scaling.group_lr import without_ones
from mupsweep.schema import instantiate
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep.config import TrainingConfig, Variant, without_defaults
from mupsweep.sweep.trainer import PlannedTrainer

HUB_KEYS = ("hub_id", "hub_config", "revision", "data_files", "split", "validation_split", "held_out", "rows")
UNIDENTIFYING = {  # keys that change no number, but for micro_batch, which changes the order and rounding of sums
    # the content of the corpus, its end of text included, is in the identity itself
    "data": ("path", "cache", "kind", "end_of_text", "vocab_size", *HUB_KEYS),
    "training": ("checkpoint_minutes", "micro_batch"),
}

# Optimizers that are another today -> the words by which a stored sweep goes on with what they were.
AS_BEFORE = {
    "lamb": "optimizer=lamb_published optimizer.name=lamb",
    "soap": "optimizer=soap_published optimizer.name=soap",
    "sophia": "optimizer.curvature_batch=step",
}


def digest_of(variant: Variant) -> str:
    """The digest of everything that decides what the runs of a variant compute, the content of the corpus included."""
    tree = _identifying(variant)
    if not instantiate(variant.trainer, "trainer").runs_program:
        tree["data"]["content"] = fingerprint(variant.data)
    canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _identifying(variant: Variant) -> dict[str, Any]:
    """The sections of a variant without the keys that have no effect on its numbers."""
    tree = without_defaults(asdict(variant))
    del tree["change"]  # it only names a difference that the other keys hold
    trainer: PlannedTrainer = instantiate(tree.pop("trainer"), "trainer")
    for section, keys in UNIDENTIFYING.items():
        for key in keys:
            tree[section].pop(key, None)
    tree["data"]["tokenizer"] = tokenizers.identity(variant.data.tokenizer)
    if not tree["training"]["branches"]:
        del tree["training"]["branches"]  # an empty list trains as before the key existed
    # of the two only one decides what is read, and a sweep from before eval_tokens existed has the other
    del tree["training"]["eval_batches" if variant.training.eval_batches is None else "eval_tokens"]
    if tree["model"].get("attention_multiplier") == 1:
        del tree["model"]["attention_multiplier"]  # a factor of 1 trains as before the key existed
    tree["model"] |= instantiate(variant.model, "model").content()
    if trainer.runs_program:  # which reads a corpus of its own
        tree["data"] = {"tokenizer": tree["data"]["tokenizer"]}
    if identity := trainer.identity():
        tree["trainer"] = dict(identity)
    group_lr = without_ones(tree["optimizer"].get("group_lr"))
    tree = _without(tree, "group_lr")  # that of no effect trains as before the key existed
    if group_lr:
        tree["optimizer"]["group_lr"] = group_lr
    tree = _without(tree, "curvature_batch", "step")  # as before the key existed
    return _without(tree, "log2_lr_range")  # of the optimizer and of those that it contains: where LRs are looked for


def _without(tree: dict[str, Any], name: str, only: Any = None) -> dict[str, Any]:
    """A nested mapping without a key, at any depth.

    Args:
        only: the value with which the key is left out; None for any.
    """
    return {
        key: _without(value, name, only) if isinstance(value, dict) else value
        for key, value in tree.items()
        if key != name or only not in (None, value)
    }


def refuse_namesakes(variants: Iterable[Variant], sweep: SweepDir) -> None:
    """Refuse two different variants with one label, which would be drawn as one curve.

    And two that read their validation losses from different tokens, which do not compare.
    """
    variants = list(variants)
    read = list(dict.fromkeys(_validation_key(variant.training) for variant in variants))
    if len(read) > 1:
        raise ConfigError(
            f"sweep {sweep.path} reads its validation losses by {read[0]}, this command by {read[1]}, and the two do "
            f"not compare: go on with {read[0]}, or choose another sweep.name"
        )
    by_label: dict[Label, Variant] = {}
    for variant in variants:
        namesake = by_label.setdefault(variant.label, variant)
        if namesake is variant:
            continue
        new, stored = dict(leaves(_identifying(variant))), dict(leaves(_identifying(namesake)))
        keys = [k for k in new | stored if new.get(k) != stored.get(k)]
        differences = ", ".join(f"{k}={new.get(k)} (there: {stored.get(k)})" for k in keys[:3]) or "another corpus"
        name = variant.optimizer["name"]
        words = AS_BEFORE.get(name) if any(k.startswith("optimizer.") for k in keys) else None
        as_before = "" if words is None else f"go on with what {name} was by {words}, "
        raise ConfigError(
            f"sweep {sweep.path} already holds {'/'.join(variant.label)} with other settings: {differences}; "
            f"{as_before}choose another sweep.name, or give this choice a name of its own such as "
            "optimizer.name=adamw-2"
        )


def _validation_key(training: TrainingConfig) -> str:
    """The setting that says which tokens a validation loss is of."""
    name = "eval_tokens" if training.eval_batches is None else "eval_batches"
    return f"training.{name}={getattr(training, name)}"
