"""Configs: overrides in, one validated and frozen SweepConfig out.

`compose.py` composes the yaml groups of `configs/`. The dataclasses here, and those that a yaml names under `kind`,
define the keys and their types. A section with a `kind` (model, optimizer, parametrization, launcher, tracker) stays a
plain mapping until `instantiate` turns it into that class.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from mupsweep.analysis.config import AnalysisConfig
from mupsweep.analysis.labels import LARGEST_LOG2_LR, HyperparameterOverride, Label
from mupsweep.data.config import DataConfig
from mupsweep.data.tokenizers import is_file, vocab_size
from mupsweep.errors import ConfigError
from mupsweep.formatting import nearest
from mupsweep.models.huggingface import with_config
from mupsweep.optimizers.optimizer import BATCH_RULES
from mupsweep.schema import (
    Consent,
    boolean,
    foreign_code,
    import_object,
    instantiate,
    one_of,
    refuse_foreign_code,
    refused_code,
    require,
    to_dataclass,
    with_whole_numbers,
)
from mupsweep.sweep.compose import COMPARABLE, compose, split_overrides
from mupsweep.sweep.compose import choices as choices
from mupsweep.sweep.compose import config_root as config_root
from mupsweep.sweep.hyperparameters import expand
from mupsweep.sweep.launcher_options import LauncherOptions
from mupsweep.sweep.sizes import ListedSize, base_shape, parse_sizes, refuse_ratios

SCHEDULES = ("cosine", "linear", "wsd", "constant")
PRECISIONS = ("auto", "fp32", "bf16")
ADAMW_RANGE = (-11.0, -5.0)  # where LRs are looked for if an optimizer's yaml does not say
GRID, ADAPTIVE = "grid", "adaptive"
VARIANT_SECTIONS = (*COMPARABLE, "data", "training", "trainer")
OWN_TRAINER = {"name": "mupsweep", "kind": "mupsweep.trainers.mupsweep.Mupsweep"}  # stored variants leave it out
LATER_KEYS: dict[str, dict[str, Any]] = {  # with a default that changes nothing: what is stored holds other values only
    "model": {"norms": True},
    "parametrization": {"update_law_of": None, "embedding_exponent": "0"},
    "training": {"norm_points": 0, "tokens_per_parameter": None},
    "data": {"end_of_text": None, "vocab_size": None},
    "sweep": {"sizes": None, "joint": ()},
}
SHARED_SECTIONS = ("sweep", "analysis", "launcher", "tracker", "out", "allow_imports")
# Code of the user's -> the words of a command line that name it, and with that allow it. Everything else that is
# outside mupsweep needs allow_imports=true.
NAMED_BY = {"model.path": ("model.path",), "trainer.command": ("trainer", "trainer.command")}


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how one run trains; fractions are fractions of the run's steps.

    configs/training/ explains every key.
    """

    steps: int | None = None
    tokens: int | None = None
    tokens_per_parameter: float | None = None
    batch_size: int = 8
    micro_batch: int | None = None
    warmup: float = 0.1
    schedule: str = "cosine"
    min_lr_frac: float = 0.1
    decay_fraction: float = 0.2
    clip: float | None = 1.0
    precision: str = "auto"
    compile: bool = False
    eval_tokens: int = 65536
    eval_batches: int | None = None
    evals: int = 1
    checkpoint_minutes: float = 10.0
    divergence_patience: float = 0.1
    batch_rule: str = "none"
    base_batch_size: int | None = None
    horizon_exponent: float = 0.0
    base_tokens: int | None = None
    branches: tuple[float, ...] = ()
    norm_points: int = 0

    def __post_init__(self) -> None:
        lengths = {key: getattr(self, key) for key in ("steps", "tokens", "tokens_per_parameter")}
        given = [length for length in lengths.values() if length is not None]
        if len(given) != 1:
            all_of_them = " and ".join(f"training.{key}={length}" for key, length in lengths.items())
            raise ConfigError(f"{all_of_them}: set exactly one; training.steps=null unsets the default")
        require(given[0] > 0, f"training.{' or training.'.join(lengths)}", given[0], "positive")
        if self.tokens_per_parameter is not None and self.branches:
            raise ConfigError(
                f"training.branches={list(self.branches)} compares horizons that all sizes share, and with "
                "training.tokens_per_parameter each size has its own: give one of them"
            )
        require(self.batch_size > 0, "training.batch_size", self.batch_size, "positive")
        require(self.micro_batch is None or self.micro_batch > 0, "training.micro_batch", self.micro_batch, "positive")
        require(self.warmup >= 0, "training.warmup", self.warmup, "a fraction below 1 or a number of steps")
        one_of(self.schedule, SCHEDULES, "training.schedule")
        require(0 <= self.min_lr_frac <= 1, "training.min_lr_frac", self.min_lr_frac, "in [0, 1]")
        require(0 < self.decay_fraction <= 1, "training.decay_fraction", self.decay_fraction, "in (0, 1]")
        require(self.clip is None or self.clip > 0, "training.clip", self.clip, "positive or null")
        one_of(self.precision, PRECISIONS, "training.precision")
        require(self.eval_tokens > 0, "training.eval_tokens", self.eval_tokens, "positive")
        batches = self.eval_batches
        require(batches is None or batches > 0, "training.eval_batches", batches, "positive or null")
        require(self.evals > 0, "training.evals", self.evals, "positive")
        require(self.checkpoint_minutes >= 0, "training.checkpoint_minutes", self.checkpoint_minutes, "at least 0")
        require(self.divergence_patience > 0, "training.divergence_patience", self.divergence_patience, "positive")
        require(self.norm_points >= 0, "training.norm_points", self.norm_points, "at least 0, which is off")
        one_of(self.batch_rule, ("none", *BATCH_RULES), "training.batch_rule")
        rising = [0.0, *self.branches, 1.0]
        require(
            all(a < b for a, b in itertools.pairwise(rising)) and (self.schedule == "wsd" or not self.branches),
            "training.branches",
            list(self.branches),
            "rising fractions of the run, between 0 and 1, with training.schedule=wsd",
        )
        for key, used, other in (
            ("base_batch_size", self.batch_rule != "none", f"batch_rule={'|'.join(BATCH_RULES)}"),
            ("base_tokens", self.horizon_exponent != 0, "horizon_exponent=NUMBER"),
        ):
            value = getattr(self, key)
            require(value is None or value > 0, f"training.{key}", value, "positive or null")
            if used != (value is not None) and not (key == "base_tokens" and self.batch_rule_has_tokens):
                raise ConfigError(f"training.{key} and training.{other} go together: give both or neither")

    @property
    def batch_rule_has_tokens(self) -> bool:
        """Whether the batch rule carries LRs to other tokens too; else the horizon's exponent does, if anything."""
        return self.batch_rule != "none" and self.base_tokens is not None and self.horizon_exponent == 0

    def on_tokens(self, tokens: int) -> TrainingConfig:
        """The same training for another number of tokens."""
        return replace(self, steps=None, tokens=tokens, tokens_per_parameter=None)

    def total_steps(self, context: int, parameters: int) -> int:
        """Optimizer steps of a run of a model with so many parameters, whose sequences are `context` tokens long."""
        if self.steps is not None:
            return self.steps
        tokens = self.tokens if self.tokens_per_parameter is None else self.tokens_per_parameter * parameters
        assert tokens is not None
        return max(1, math.ceil(tokens / (self.batch_size * context)))

    def horizons(self, total: int) -> tuple[tuple[int, int], ...]:
        """(first step of the decay, last step) of every branch and of the run itself, the shortest first."""
        ends = [*(round(share * total) for share in self.branches), total]
        return tuple((end - round(self.decay_fraction * end), end) for end in ends)

    def norm_steps(self, total: int) -> frozenset[int]:
        """The steps after which norms of matrices are measured: the first, and `norm_points` evenly spaced ones."""
        points = (max(1, round(total * (i + 1) / self.norm_points)) for i in range(self.norm_points))
        return frozenset((1, *points)) if self.norm_points else frozenset()

    def warmup_steps(self, total: int) -> int:
        """Steps of linear warm-up: `warmup` itself, or that fraction of `total` where it is below 1."""
        return round(self.warmup * total) if self.warmup < 1 else round(self.warmup)


@dataclass(frozen=True)
class GridConfig:
    """The grid of a sweep. Ratios are target / base; `log2_lrs` are base LRs in octaves.

    `log2_lrs` is a list for all optimizers, or a mapping from the names of optimizers to lists. An optimizer without a
    list has the LRs of its own range (`log2_lr_range`); `of` gives the grid of one optimizer.

    With `search=adaptive` runs are chosen round by round (mupsweep/sweep/lr_search.py), beginning amid `log2_lrs`.
    `axes` lists the values of other hyperparameters, which vary one at a time (mupsweep/sweep/hyperparameters.py); the
    best value of those in `joint` is searched together with the LR at every size (mupsweep/sweep/joint_search.py).
    """

    name: str | None = None
    width_ratios: tuple[float, ...] = (1.0,)
    depth_ratios: tuple[float, ...] = (1.0,)
    log2_lrs: Any = None
    seeds: tuple[int, ...] = (0,)
    pair: bool = False
    search: str = GRID
    half_width: float = 0.25
    regret: float = 0.002
    at_once: int = 4
    max_seeds: int = 3
    max_runs: int = 12
    axes: Any = None  # a mapping; `expand` checks its keys, which depend on the variants
    joint: tuple[str, ...] = ()
    max_flops: float | None = None
    sizes: Any = None  # a list of mappings, in place of ratios

    def __post_init__(self) -> None:
        if self.sizes is not None:  # ratios are then those of the sizes
            for key, index in (("width_ratios", 0), ("depth_ratios", 1)):
                object.__setattr__(self, key, tuple(dict.fromkeys(ratio[index] for ratio in self.ratios)))
        one_of(self.search, (GRID, ADAPTIVE), "sweep.search")
        require(0.01 <= self.half_width <= 4, "sweep.half_width", self.half_width, "octaves, 0.01 to 4")
        require(self.regret >= 0, "sweep.regret", self.regret, "nats, 0 or more")
        require(self.at_once > 0, "sweep.at_once", self.at_once, "positive")
        require(self.max_seeds > 0, "sweep.max_seeds", self.max_seeds, "positive")
        require(self.max_runs > 0, "sweep.max_runs", self.max_runs, "positive")
        require(self.max_flops is None or self.max_flops > 0, "sweep.max_flops", self.max_flops, "positive or null")
        require(self.axes is None or isinstance(self.axes, dict), "sweep.axes", self.axes, "{optimizer.lr_ratio:[1,2]}")
        if self.max_flops is not None and self.search != ADAPTIVE:
            raise ConfigError("sweep.max_flops limits a search, and a grid trains all of itself: sweep.search=adaptive")
        for key in self.joint:
            if key not in (self.axes or {}):
                raise ConfigError(f"sweep.joint: {key} has no values; list them as sweep.axes={{{key}:[1,2]}}")
            if self.search != ADAPTIVE:
                raise ConfigError(
                    f"sweep.joint=[{key}] says how a search goes on, and a grid trains every value: "
                    "sweep.search=adaptive"
                )
        object.__setattr__(self, "log2_lrs", _log2_lrs(self.log2_lrs))
        for key in ("width_ratios", "depth_ratios", "seeds"):
            values = getattr(self, key)
            require(len(values) > 0, f"sweep.{key}", list(values), "a list with at least one value")
            require(len(set(values)) == len(values), f"sweep.{key}", list(values), "a list without repeats")
        for key in ("width_ratios", "depth_ratios"):
            require(all(v > 0 for v in getattr(self, key)), f"sweep.{key}", list(getattr(self, key)), "positive")
        if self.pair and len(self.width_ratios) != len(self.depth_ratios):
            raise ConfigError(
                f"sweep.pair=true pairs width_ratios ({len(self.width_ratios)}) with depth_ratios "
                f"({len(self.depth_ratios)}): give two lists of equal length, or sweep.pair=false for all combinations"
            )
        if self.name is not None and (
            not self.name
            or not self.name.isprintable()
            or set(self.name) & set("/\\")
            or self.name.startswith(".")
            or len(self.name) > 128
        ):
            raise ConfigError(
                f"sweep.name={self.name!r}: use a plain folder name of at most 128 characters, "
                "without slashes, control characters or a leading dot"
            )

    def of(self, optimizer: Mapping[str, Any]) -> GridConfig:
        """The grid of one optimizer, whose section this is: `log2_lrs` is its tuple of LRs."""
        lrs = self.log2_lrs.get(optimizer["name"]) if isinstance(self.log2_lrs, dict) else self.log2_lrs
        return replace(self, log2_lrs=default_lrs(optimizer.get("log2_lr_range")) if lrs is None else lrs)

    @property
    def listed(self) -> tuple[ListedSize, ...]:
        """The sizes of the list, if there is one."""
        return () if self.sizes is None else parse_sizes(self.sizes)

    @property
    def ratios(self) -> tuple[tuple[float, float], ...]:
        """(width_ratio, depth_ratio) of every size of the grid."""
        if self.sizes is not None:
            base = self.listed[0]
            return tuple((size.width / base.width, size.depth / base.depth) for size in self.listed)
        if self.pair:
            return tuple(zip(self.width_ratios, self.depth_ratios, strict=True))
        return tuple(itertools.product(self.width_ratios, self.depth_ratios))


def default_lrs(log2_lr_range: Sequence[float] | None) -> tuple[float, ...]:
    """The grid of an optimizer that is given none: octave steps through the range in which its LRs lie."""
    low, high = log2_lr_range or ADAMW_RANGE
    return tuple(low + i for i in range(math.floor(high - low) + 1))


def _log2_lrs(value: Any, key: str = "sweep.log2_lrs") -> Any:
    """A list of base LRs in octaves as a tuple of floats, a mapping with such lists, or None."""
    if value is None:
        return None
    if isinstance(value, Mapping) and key == "sweep.log2_lrs":
        return {str(name): _log2_lrs(lrs, f"{key}: {name}") for name, lrs in value.items()}
    are_numbers = isinstance(value, list | tuple) and all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in value
    )
    require(are_numbers, key, value, "a list of numbers, as [-8,-7], or {muon:[-5,-4],adamw:[-9,-8]}")
    lrs = tuple(map(float, value))
    require(len(lrs) > 0, key, list(lrs), "a list with at least one value")
    require(len(set(lrs)) == len(lrs), key, list(lrs), "a list without repeats")
    octaves = f"octaves, {-LARGEST_LOG2_LR} to {LARGEST_LOG2_LR}"
    require(all(abs(v) <= LARGEST_LOG2_LR for v in lrs), key, list(lrs), octaves)
    if all(0 < v < 0.25 for v in lrs):
        guess = ",".join(f"{round(2 * math.log2(v)) / 2:g}" for v in lrs)
        raise ConfigError(f"{key}={list(lrs)}: these look like LRs, and octaves are wanted: '{key}=[{guess}]'")
    return lrs


@dataclass(frozen=True)
class Variant:
    """One choice of everything that is held fixed along a loss-versus-LR curve and a ladder of sizes.

    Attributes:
        trainer: what trains the runs.
        change: the hyperparameter in which a variant of `sweep.axes` differs from its default; None for a default.
    """

    model: dict[str, Any]
    optimizer: dict[str, Any]
    parametrization: dict[str, Any]
    data: DataConfig
    training: TrainingConfig
    trainer: dict[str, Any] = field(default_factory=OWN_TRAINER.copy)
    change: HyperparameterOverride | None = None

    @property
    def names(self) -> tuple[str, str, str]:
        """(model, optimizer, parametrization)."""
        return self.model["name"], self.optimizer["name"], self.parametrization["name"]

    @property
    def label(self) -> Label:
        """The names, and the change if there is one: what distinguishes the variants of a sweep."""
        return self.names if self.change is None else (*self.names, self.change.name)


@dataclass(frozen=True)
class SweepConfig:
    """A whole sweep: the variants to compare, the grid, the launcher that trains it and the tracker that logs it.

    Attributes:
        allow_imports: which code outside mupsweep the person who started this command allows.
    """

    variants: tuple[Variant, ...]
    sweep: GridConfig
    launcher: dict[str, Any]
    tracker: dict[str, Any]
    out: str = "sweeps"
    allow_imports: Consent = False
    overrides: tuple[str, ...] = field(default=())
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)

    @cached_property
    def launcher_options(self) -> LauncherOptions:
        """The options of the launcher that planning needs."""
        return LauncherOptions.parse(self.launcher)


def load(overrides: Sequence[str] = (), config_dir: str | None = None) -> SweepConfig:
    """Compose `configs/` with the overrides into a validated config.

    Args:
        overrides: `group=choice` and `key=value` words; model, optimizer and parametrization take several choices
            (`optimizer=adamw,muon`), which become the variants of the sweep.
        config_dir: a folder of the user's own yaml groups, searched before the shipped ones.

    Raises:
        ConfigError: an unknown group, choice, key or value, in one line with the nearest valid names.
    """
    groups, other_overrides = split_overrides(overrides, config_dir)
    trees = []
    for combination in itertools.product(*groups.values()):
        chosen = [f"{group}={choice}" for group, choice in zip(groups, combination, strict=True)]
        trees.append(compose([*chosen, *other_overrides], config_dir))
    for key in trees[0]:
        if key not in (*VARIANT_SECTIONS, *SHARED_SECTIONS):
            raise ConfigError(
                f"a yaml sets '{key}', which is no section; {nearest(key, (*VARIANT_SECTIONS, *SHARED_SECTIONS))}; "
                "an experiment begins with the line # @package _global_"
            )
    for tree in trees:
        tree["model"] = with_config(tree["model"])
    if trees[0]["sweep"].get("sizes") is not None:
        refuse_ratios(overrides)
        for tree in trees:
            tree["model"] |= base_shape(parse_sizes(tree["sweep"]["sizes"]))
    variants = [{key: tree[key] for key in VARIANT_SECTIONS} for tree in trees]
    shared = {key: trees[0][key] for key in SHARED_SECTIONS}
    # no yaml has a say: somebody else's experiment would allow somebody else's code
    on_command_line = any(word.partition("=")[0] == "allow_imports" for word in overrides)
    allowed = (boolean(shared["allow_imports"], "allow_imports") and on_command_line) or _named_code(trees, overrides)
    config = from_tree({**shared, "variants": variants, "overrides": tuple(overrides)}, allowed)
    if config.sweep.axes is None:
        return config
    return from_tree({**to_tree(config), "variants": expand(variants, config.sweep.axes)}, allowed)


def _named_code(trees: Iterable[Mapping[str, Any]], overrides: Iterable[str]) -> Consent:
    """The code outside mupsweep that some trees have because the command line names it; False without any."""
    words = {word.partition("=")[0] for word in overrides if "${" not in word}
    named = set[str]()
    for tree in trees:
        for section in VARIANT_SECTIONS:
            for code in foreign_code(tree[section], section, to_train=True):
                if not words.isdisjoint(NAMED_BY.get(code.partition("=")[0], ())):
                    named.add(code)
    return frozenset(named) or False


def from_tree(tree: Mapping[str, Any], allow_imports: Consent = False, to_read: bool = False) -> SweepConfig:
    """A SweepConfig from plain mappings, as `load` composes and `config.yaml` stores them.

    Args:
        tree: the sections; what it says of `allow_imports` has no effect, since a sweep may be somebody else's.
        allow_imports: which code outside mupsweep the person who started this command allows.
        to_read: whether the sweep is only looked at: then a section that names code which is not allowed stays
            unchecked instead of being refused, and programs that training would start are no matter.
    """
    keys = {f.name for f in fields(SweepConfig)}
    for key in tree:
        if key not in keys:
            raise ConfigError(f"unknown key '{key}' in the config; {nearest(key, keys)}")
    if missing := sorted(keys - set(tree) - {"analysis"}):  # which older versions did not write
        raise ConfigError(f"the config has no '{missing[0]}': the command that made the sweep writes config.yaml anew")
    _check_sections(tree)
    config = SweepConfig(
        variants=tuple(_variant(sections) for sections in tree["variants"]),
        sweep=to_dataclass(GridConfig, tree["sweep"], "sweep"),
        launcher=dict(tree["launcher"]),
        tracker=dict(tree["tracker"]),
        out=_folder(tree["out"]),
        allow_imports=allow_imports,
        overrides=tuple(tree["overrides"]),
        analysis=analysis_config(tree),
    )
    for where, section in _sections(config):
        if not to_read:
            refuse_foreign_code(section, where, allow_imports)
        elif refused_code(section, where, allow_imports):
            continue
        if where != "data":  # a source needs the whole DataConfig, so its keys were checked there
            instantiate(section, where)
    if isinstance(config.sweep.log2_lrs, dict):
        names = {variant.optimizer["name"] for variant in config.variants}
        for name in config.sweep.log2_lrs:
            if name not in names:
                raise ConfigError(f"sweep.log2_lrs: the sweep has no optimizer {name!r}; {nearest(name, names)}")
    return config


def _check_sections(tree: Mapping[str, Any]) -> None:
    """Refuse a config whose parts are of another kind: somebody may have edited or damaged it."""
    for key, kind in {"variants": list | tuple, "overrides": list | tuple, "sweep": Mapping}.items():
        if not isinstance(tree[key], kind) or (key == "variants" and not tree[key]):
            raise ConfigError(f"{key}={tree[key]!r:.80} is no such part of a config")
    if not all(isinstance(word, str) for word in tree["overrides"]):
        raise ConfigError("overrides: expected a list of words")
    for key in ("launcher", "tracker"):
        if not isinstance(tree[key], Mapping):
            raise ConfigError(f"{key}={tree[key]!r:.80}: expected a section of keys")


def analysis_config(tree: Mapping[str, Any], overrides: Iterable[str] = ()) -> AnalysisConfig:
    """What the answers of a sweep rest on beside its runs.

    Args:
        tree: of the sweep's config; defaults stand for what it lacks.
        overrides: words such as analysis.verdict.costly=0.05.
    """
    from omegaconf import OmegaConf

    stored = OmegaConf.create({"analysis": dict(tree.get("analysis", {}))})
    words = [word for word in overrides if word.startswith("analysis.")]
    section = OmegaConf.to_container(OmegaConf.merge(stored, OmegaConf.from_dotlist(words)))
    assert isinstance(section, dict)
    return to_dataclass(AnalysisConfig, section["analysis"], "analysis")


def _variant(sections: Mapping[str, Any]) -> Variant:
    """A Variant from its sections as plain mappings.

    Raises:
        ConfigError: a section that is missing or no section.
        DataError: a tokenizer.json that is none, unless its number of ids is stored.
    """
    for key in (*COMPARABLE, "data", "training"):
        if not isinstance(sections, Mapping) or not isinstance(sections.get(key), Mapping):
            raise ConfigError(f"a variant of the config has no section '{key}'")
    for group in COMPARABLE:
        if not isinstance(sections[group].get("name"), str):
            name = sections[group].get("name")
            raise ConfigError(f"{group}.name={name}: expected a word, under which its results are listed")
    data, training, change = sections["data"], sections["training"], sections.get("change")
    if change is not None:
        wrong = not isinstance(change, Mapping) or set(change) != {"hyperparameter", "value", "default"}
        if wrong or not isinstance(change["hyperparameter"], str) or not isinstance(change["value"], int | float):
            raise ConfigError(f"change={change!r:.80}: expected hyperparameter, value and default")
    data = to_dataclass(DataConfig, with_whole_numbers(DataConfig, data), "data")
    if is_file(data.tokenizer) and data.vocab_size is None:
        data = replace(data, vocab_size=vocab_size(data.tokenizer))
    return Variant(
        **{group: _with_later_keys(group, sections[group]) for group in COMPARABLE},
        data=data,
        training=to_dataclass(TrainingConfig, with_whole_numbers(TrainingConfig, training), "training"),
        trainer=dict(sections.get("trainer", OWN_TRAINER)),
        change=None if change is None else HyperparameterOverride(**change),
    )


def _folder(out: Any) -> str:
    """The folder that holds sweeps, as text: yaml reads a name of digits alone as a number."""
    require(out not in (None, "") and isinstance(out, str | int | float), "out", out, "a folder, such as out=sweeps")
    require(str(out).isprintable(), "out", ascii(out), "a folder without control characters")
    return str(out)


def to_tree(config: SweepConfig) -> dict[str, Any]:
    """The inverse of `from_tree`: plain mappings and lists, ready for yaml or json."""
    tree = {**asdict(config), "variants": tuple(variant_tree(variant) for variant in config.variants)}
    tree["allow_imports"] = config.allow_imports is True  # which nothing reads
    return without_defaults(tree)


def variant_tree(variant: Variant) -> dict[str, Any]:
    """A variant as plain mappings; mupsweep's own trainer is left out, as before there were others."""
    tree = without_defaults(asdict(variant))
    if tree["trainer"] == OWN_TRAINER:
        del tree["trainer"]
    return tree


def without_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree without the keys of LATER_KEYS at their defaults, as it was before they existed."""
    for section in LATER_KEYS.keys() & tree.keys():
        defaults = LATER_KEYS[section]
        tree[section] = {key: v for key, v in tree[section].items() if key not in defaults or v != defaults[key]}
    return tree


def _with_later_keys(group: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """A section of a variant with the keys that a stored one leaves out at their defaults, where its class has them."""
    missing = {key: default for key, default in LATER_KEYS.get(group, {}).items() if key not in section}
    if not missing or not str(section.get("kind")).startswith("mupsweep."):  # nobody's code is imported for this
        return dict(section)
    known = getattr(import_object(section["kind"], f"{group}.kind", "a dataclass"), "__dataclass_fields__", {})
    return {**section, **{key: default for key, default in missing.items() if key in known}}


def trainers_of(config: SweepConfig) -> list[dict[str, Any]]:
    """The sections of the trainers that the variants of a config name, each once."""
    trainers: list[dict[str, Any]] = []
    for variant in config.variants:
        if variant.trainer not in trainers:
            trainers.append(variant.trainer)
    return trainers


def _sections(config: SweepConfig) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """(name, section) of every section that names a class under `kind`."""
    for variant in config.variants:
        for group in COMPARABLE:
            yield group, getattr(variant, group)
        yield "data", {"kind": variant.data.kind}
        yield "trainer", variant.trainer
    yield "launcher", config.launcher
    yield "tracker", config.tracker
