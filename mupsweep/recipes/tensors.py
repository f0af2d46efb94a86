"""What formats share: tensors as patterns of names, torch's classes for our optimizers, multipliers folded away."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mupsweep.errors import ConfigError
from mupsweep.optimizers.muon import convert

Row = Mapping[str, Any]  # a tensor of a recipe
ResolvedVariant = Mapping[str, Any]

COMPOSED = ("block_size", "graft", "spectral_norm", "hyperball")  # parts that torch's classes do not have
TORCH = {  # ours -> torch's class, and what its constructor takes beside the groups
    "AdamW": ("AdamW", ("betas",)),
    "SGD": ("SGD", ("momentum", "nesterov")),
    "Muon": ("Muon", ("momentum", "nesterov", "ns_steps")),
}
MUON = {"kimi": ("kimi", "match_rms_adamw")}  # convention -> the one of torch's that its LR is given in, and its name

# A weight W behind a constant a trains as V = a W without it: the gradient of V is 1/a of that of W, and V has to move
# a times as far. The powers of a in the LR and in eps, for updates of degree 0 (AdamW, Muon) and 1 (SGD).
FOLDED = {"AdamW": (1, -1), "Muon": (1, -1), "SGD": (2, 0)}
LAST_OF_BRANCH = ("attention.output.", "mlp.down.")


def kind(optimizer: Mapping[str, Any]) -> str:
    """The class of an optimizer, or "" where its algorithm is combined with parts that torch's classes lack."""
    return "" if any(optimizer.get(key) for key in COMPOSED) else str(optimizer["kind"]).rpartition(".")[2]


def kinds(recipe: ResolvedVariant) -> dict[str, str]:
    """Name of an optimizer -> its class."""
    return {optimizer["name"]: kind(optimizer) for optimizer in recipe["optimizers"]}


def only_adamw(recipe: ResolvedVariant) -> bool:
    """Whether AdamW takes every tensor."""
    return set(kinds(recipe).values()) == {"AdamW"}


def torch_class(optimizer: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The name of torch's class and its arguments; None where torch has none."""
    if kind(optimizer) not in TORCH:
        return None
    name, keys = TORCH[kind(optimizer)]
    more = {"adjust_lr_fn": MUON.get(optimizer["scaling"], ("", "original"))[1]} if name == "Muon" else {}
    values = {key: optimizer[key] for key in keys}
    return name, {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()} | more


def as_torch(row: Row, optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a tensor's group as torch's class takes them; the LR of Muon in the convention of torch's."""
    numbers = {"lr": row["lr"], "weight_decay": row["weight_decay"], "eps": row["eps"], **row["thresholds"]}
    if kind(optimizer) == "Muon":
        n_out, n_in = row["shape"]
        convention = MUON.get(optimizer["scaling"], ("jordan", ""))[0]
        factor = convert(1.0, optimizer["scaling"], convention, n_out, n_in)
        numbers |= {"lr": row["lr"] * factor, "weight_decay": row["weight_decay"] / factor}
    if kind(optimizer) == "SGD":
        del numbers["eps"]
    if torch_class(optimizer) is None and row["role"] == "input":
        numbers["transposed"] = True  # embeddings are stored (n_in, n_out), which only ours ask
    return numbers


def groups(recipe: ResolvedVariant, rename: Callable[[str], str] = str) -> list[dict[str, Any]]:
    """The tensors that share an optimizer and its numbers, each group with the patterns of its names."""
    optimizers = {optimizer["name"]: optimizer for optimizer in recipe["optimizers"]}
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in own(recipe):
        numbers = as_torch(row, optimizers[row["optimizer"]])
        group = groups.setdefault(
            (row["optimizer"], *numbers.items()), {"optimizer": row["optimizer"], **numbers, "patterns": []}
        )
        group["patterns"] = unique([*group["patterns"], pattern(rename(row["name"]))])
    _check_partition([rename(row["name"]) for row in own(recipe)], list(groups.values()))
    return list(groups.values())


def starts(recipe: ResolvedVariant, rename: Callable[[str], str] = str) -> dict[str, float | str]:
    """Pattern of names -> the standard deviation that tensors start with, or "ones" or "zeros"."""
    return {
        pattern(rename(row["name"])): row["init_std"] if row["init"] in ("normal", "own") else row["init"]
        for row in own(recipe)
    }


def own(recipe: ResolvedVariant) -> list[Row]:
    """The tensors that have storage of their own."""
    return [row for row in recipe["tensors"] if row["tied_to"] is None]


def pattern(name: str) -> str:
    r"""A regular expression for a name in every block: ^blocks\.\d+\.mlp\.up\.weight$."""
    return "^" + r"\.".join(r"\d+" if part.isdecimal() else part for part in name.split(".")) + "$"


def with_names_of(names: Mapping[str, str], name: str) -> str:
    """A tensor's name with every part that `names` has replaced by the trainer's."""
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


def unique(items: Iterable[Any]) -> list[Any]:
    """Each once, in order."""
    return list(dict.fromkeys(items))


def folded(
    recipe: ResolvedVariant, constants: tuple[str, ...] = ("block", "output")
) -> tuple[ResolvedVariant, list[str]]:
    """The training of a recipe without multipliers in the forward pass, for models that have none, and what is lost.

    Args:
        constants: which multipliers the model lacks: "block", on every branch, and "output", on the logits.
    """
    factors = {name: recipe[f"{name}_multiplier"] for name in constants}
    limits = []
    if any(row["tied_to"] for row in recipe["tensors"]) and factors.get("output", 1.0) != 1:
        limits = [
            f"the logits' multiplier {factors.pop('output'):.6g}: a tied head cannot take it up, so multiply the logits"
        ]
    factors = {name: factor for name, factor in factors.items() if factor != 1}
    if not factors:
        return recipe, limits
    places = {"block": "on every branch", "output": "on the logits"}
    stated = " and ".join(f"{factor:.6g} {places[name]}" for name, factor in factors.items())
    taking = {row["optimizer"] for row in own(recipe) if _constant_behind(row) in factors}
    strange = unique(k or n for n, k in kinds(recipe).items() if n in taking and k not in FOLDED)
    if strange:
        unfolded = f"multipliers {stated}: {', '.join(strange)} cannot take them up, so put them into the model"
        return recipe, [*limits, unfolded]
    rows = [_fold(row, kinds(recipe)[row["optimizer"]], factors) for row in recipe["tensors"]]
    if recipe["clip"] is not None:
        limits.append(
            f"clipping as it was swept (norm {recipe['clip']:g}): multipliers are folded into the weights, whose "
            "gradients are larger by as much; set the norm so high that it meets only spikes, or put the multipliers "
            f"({stated}) into the model"
        )
    return {**recipe, "tensors": rows, **{f"{name}_multiplier": 1.0 for name in factors}}, limits


def _constant_behind(row: Row) -> str:
    """The constant behind which a tensor is the last one, "block" or "output", or "" where it is behind none."""
    if row["role"] == "output":
        return "output"
    return "block" if any(name in row["name"] for name in LAST_OF_BRANCH) else ""


def _fold(row: Row, kind: str, factors: Mapping[str, float]) -> Row:
    """A tensor that takes up the constant behind it, where it is the last one before it."""
    place = "output" if row["role"] == "output" else "block" if row["name"].startswith("blocks.") else ""
    changed = {"multiplier": row["multiplier"] / factors.get(place, 1.0)}
    a = factors.get(_constant_behind(row), 1.0)
    if a != 1:
        lr, eps = FOLDED[kind]
        changed |= {"init_std": row["init_std"] * a, "lr": row["lr"] * a**lr, "eps": row["eps"] * a**eps}
        changed |= {"weight_decay": row["weight_decay"] / a**lr}
    return {**row, **changed}


def _check_partition(names: Iterable[str], groups: list[dict[str, Any]]) -> None:
    """Every name fits the patterns of exactly one group."""
    for name in names:
        fits = [g for g in groups if any(re.search(p, name) for p in g["patterns"])]
        assert len(fits) == 1, f"{name} is in {len(fits)} groups"


def differences(
    recipe: ResolvedVariant, theirs: Callable[[Row], Mapping[str, float]], remedies: Mapping[str, str]
) -> list[str]:
    """Where a trainer would train a tensor with other numbers than the rule's, a line per kind of tensor.

    Args:
        theirs: a tensor -> the numbers that the trainer gives it with the settings that are exported.
        remedies: what to do, by the key of the number.
    """
    names_by_difference: dict[tuple[str, str, str], list[str]] = {}  # as printed: equal numbers differ in a last bit
    for row in own(recipe):
        for key, value in theirs(row).items():
            if not math.isclose(value, row[key], rel_tol=1e-6, abs_tol=1e-30):
                short = row["name"].split(".", 2)[-1] if row["name"].startswith("blocks.") else row["name"]
                names_by_difference.setdefault((key, f"{value:.4g}", f"{row[key]:.4g}"), []).append(short)
    return [
        f"{key.replace('_', ' ')} {right} of {', '.join(unique(names))}: it would be {wrong}; {remedies[key]}"
        for (key, wrong, right), names in names_by_difference.items()
    ]


def ratios(recipe: ResolvedVariant) -> tuple[float, float]:
    """Width and depth of the target / those of the base."""
    target, base = recipe["target"], recipe["base"]
    return target["width"] / base["width"], target["depth"] / base["depth"]


def named(recipe: ResolvedVariant, ending: str) -> Row:
    """The first tensor whose name ends so."""
    return next(row for row in recipe["tensors"] if row["name"].endswith(ending))


def need_model(recipe: ResolvedVariant, trainer: str, wanted: tuple[str, ...], others: str) -> None:
    """Refuse a model that the trainer does not build, or that its format has no names for.

    Args:
        wanted: classes of models.
        others: the formats to use instead.
    """
    kind = recipe["architecture"]["kind"].rpartition(".")[2]
    if kind not in wanted:
        raise ConfigError(
            f"{trainer} builds no {recipe['model']} model ({kind}), only {' and '.join(wanted)}: use --format {others}"
        )


def refuse_experts(recipe: ResolvedVariant, name: str) -> None:
    """Refuse a mixture of experts for a format that writes dense models only."""
    if any(row["role"] == "router" for row in recipe["tensors"]):
        raise ConfigError(f"--format {name} writes models without experts, unlike the sweep's: use --format pytorch")
