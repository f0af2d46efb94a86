"""Exports: a recipe as the settings of another trainer, as far as that trainer can express them.

One format is one file under `formats/`, found by its name: SUFFIX, MADE_FOR (the trainer's version or commit), and
render(recipe) -> (text, limits). A format reads the recipe's JSON and nothing else. Every part of the rule that the
trainer cannot express is one line of `limits`, which also says what to do, or it is refused with the reason.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mupsweep.errors import ConfigError
from mupsweep.formatting import nearest
from mupsweep.recipes import formats

JSON = "json"  # the recipe itself
ANY_MODEL = "pytorch"  # the format that knows no names of tensors
OWN_MODELS = ("mupsweep.models.own.Own", "mupsweep.models.huggingface.HuggingFace")


@dataclass(frozen=True)
class Export:
    """A file for another trainer.

    Attributes:
        limits: what it cannot express, a line each; they also stand at the top of the text.
    """

    text: str
    suffix: str
    limits: tuple[str, ...]


def names() -> list[str]:
    """The formats there are."""
    return sorted([JSON, *(module.name for module in pkgutil.iter_modules(formats.__path__))])


def check(name: str) -> None:
    """Refuse a format that there is not."""
    if name not in names():
        raise ConfigError(f"--format {name}: {nearest(name, names())}")


def export(name: str, recipe: Mapping[str, Any]) -> Export:
    """A recipe (see `mupsweep.recipes.recipe.target_recipe`) in a format other than JSON."""
    check(name)
    if name != ANY_MODEL and recipe["architecture"]["kind"] in OWN_MODELS:
        raise ConfigError(
            f"--format {name} is for the decoders of mupsweep, whose tensors it renames: --format {ANY_MODEL} takes "
            f"the names of {recipe['model']}"
        )
    if name != ANY_MODEL and not recipe["architecture"].get("norms", True):
        raise ConfigError(
            f"--format {name} writes models with norm layers, and model.norms=false: use --format {ANY_MODEL}"
        )
    form = importlib.import_module(f"{formats.__name__}.{name}")
    text, limits = form.render(recipe)
    return Export("\n".join([*_header(form.MADE_FOR, recipe, limits), text]), form.SUFFIX, tuple(limits))


def _header(made_for: str, recipe: Mapping[str, Any], limits: list[str]) -> list[str]:
    """Comment lines: what this is, what the LR rests on, and what the file does not say."""
    from mupsweep.analysis.estimate import Estimate  # which needs scipy

    target = recipe["target"]
    optimum = Estimate(*(recipe[key] for key in ("log2_lr_optimum", "log2_lr_low", "log2_lr_high")))
    lines = [
        f"{recipe['model']}/{recipe['optimizer']}/{recipe['parametrization']} at width {target['width']}, "
        f"depth {target['depth']}; base LR {recipe['base_lr']:.4g}, log2 {recipe['log2_lr']:+.2f}; "
        f"the optimum there: log2 {optimum}; {recipe['basis']}",
        f"LR {recipe['horizon']['note']}",
        f"made for {made_for}",
        *(f"NOT HERE: {limit}" for limit in limits),
    ]
    return [f"# {line}" for line in lines]
