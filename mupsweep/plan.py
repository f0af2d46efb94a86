"""The plan: a SweepConfig's runs, each with an id made of what it trains and nothing else."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mupsweep.axes import Label, label_of
from mupsweep.config import GRID, GridConfig, SweepConfig, TrainingConfig, Variant, from_tree, to_tree
from mupsweep.cost import Cost, estimate
from mupsweep.data import epochs_remark
from mupsweep.data.tokenizers import vocab_size
from mupsweep.errors import ConfigError, RecordError, nearest
from mupsweep.identity import digest_of, refuse_namesakes
from mupsweep.models import Architecture
from mupsweep.optimizers import Optimizer
from mupsweep.records import SweepDir
from mupsweep.scaling import WEIGHT_DECAY_RULES, Parametrization
from mupsweep.sections import instantiate, refuse_foreign_code
from mupsweep.sizes import Size

if TYPE_CHECKING:
    from mupsweep.search import Outlook

VOCAB_MULTIPLE = 64  # the vocabulary is padded to this, as nanoGPT pads 50257 to 50304: aligned matrix products


class Part(NamedTuple):
    """One optimizer of a hybrid, at the batch size that is trained with.

    Attributes:
        lr_ratio: its base LR / the base LR of the run, the rules for batch size and token horizon included.
    """

    optimizer: Optimizer
    lr_ratio: float


@dataclass(frozen=True)
class Recipe:
    """A variant with its sections turned into the objects they describe.

    Attributes:
        launcher: of the sweep; it says how many devices share a run.
    """

    variant: Variant
    model: Architecture
    optimizer: Optimizer
    parametrization: Parametrization
    digest: str
    launcher: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The optimizer, that of its `rest` and so on, until every role is taken."""
        training = self.training
        ratio = 1.0
        if training.base_tokens is not None:
            tokens = self.steps * training.batch_size * self.model.context
            ratio = (tokens / training.base_tokens) ** training.horizon_exponent
        parts = []
        for optimizer in self.optimizer.parts():
            factor = 1.0
            if training.base_batch_size is not None:
                optimizer, factor = optimizer.at_batch_ratio(training.batch_size / training.base_batch_size)
            parts.append(Part(optimizer, ratio * factor))
            ratio *= optimizer.lr_ratio
        return tuple(parts)

    @property
    def training(self) -> TrainingConfig:
        return self.variant.training

    @property
    def steps(self) -> int:
        """Optimizer steps of every run of this variant."""
        return self.training.total_steps(self.model.context)

    @property
    def trained_steps(self) -> int:
        """Those, and the steps of the branches that leave the run before its end."""
        return self.steps + sum(end - start for start, end in self.training.horizons(self.steps)[:-1])

    def size(self, width_ratio: float, depth_ratio: float) -> Size:
        """The shape at the given ratios to the base, with a padded vocabulary."""
        padded = -(-vocab_size(self.variant.data.tokenizer) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        return self.model.base.scaled(width_ratio, depth_ratio, padded)

    def cost(self, size: Size) -> Cost:
        """What one run at `size` takes."""
        tensors, training = list(self.model.tensors(size)), self.training
        takes = {role: part.optimizer for part in self.parts[::-1] for role in part.optimizer.takes}  # the first wins
        state = sum(takes[t.role].state_size(t.dims) for t in tensors if t.tied_to is None)
        launcher = {**self.launcher, **(self.launcher.get("sizes") or {}).get(size.name, {})}
        devices, shard = int(launcher.get("devices_per_run", 1)), bool(launcher.get("shard", False))
        return estimate(
            tensors, size, self.trained_steps, training.batch_size, training.micro_batch, state, devices, shard
        )

    def least_memory(self, size: Size, devices: int | None = None) -> float:
        """Bytes on a device that a run at `size` needs with one sequence at a time.

        Args:
            devices: that divide its state; None is what the launcher says.
        """
        training = replace(self.training, micro_batch=1)
        launcher = self.launcher if devices is None else {"devices_per_run": devices, "shard": devices > 1}
        return replace(self, variant=replace(self.variant, training=training), launcher=launcher).cost(size).memory


@dataclass(frozen=True, slots=True)
class RunSpec:
    """One training run: a recipe at a size, a base LR and a seed."""

    run_id: str
    recipe: Recipe
    size: Size
    log2_lr: float
    seed: int
    cost: Cost

    @property
    def base_lr(self) -> float:
        return 2.0**self.log2_lr

    def row(self) -> dict[str, Any]:
        """The line of plan.jsonl."""
        return {
            "run_id": self.run_id,
            "variant": self.recipe.digest,
            **self.identity(),
            "parameters": self.cost.parameters,
            "tokens": self.cost.tokens,
            "flops": self.cost.flops,
        }

    def identity(self) -> dict[str, Any]:
        """The columns that tell runs apart in every table."""
        model, optimizer, parametrization = self.recipe.variant.names
        change = self.recipe.variant.change
        return {
            "model": model,
            "parametrization": parametrization,
            "optimizer": optimizer,
            **({} if change is None else asdict(change)),
            "width": self.size.width,
            "depth": self.size.depth,
            "width_ratio": self.size.width_ratio,
            "depth_ratio": self.size.depth_ratio,
            "log2_lr": self.log2_lr,
            "seed": self.seed,
        }


def recipe(variant: Variant, launcher: Mapping[str, Any] | None = None, digest: str | None = None) -> Recipe:
    """The objects that a variant describes, its combination checked.

    Args:
        launcher: of the sweep.
        digest: of the variant, where it is known; else its text is asked for.

    Raises:
        ConfigError: settings that are each valid but contradict one another.
    """
    made = Recipe(
        variant=variant,
        model=instantiate(variant.model, "model"),
        optimizer=instantiate(variant.optimizer, "optimizer"),
        parametrization=instantiate(variant.parametrization, "parametrization"),
        digest=digest or digest_of(variant),
        launcher=launcher or {},
    )
    warmup = made.training.warmup_steps(made.steps)
    if warmup >= made.steps:
        raise ConfigError(
            f"training.warmup={made.training.warmup:g} is {warmup} steps of warm-up in a run of {made.steps}: "
            "the LR would never reach its peak; lower warmup or train longer"
        )
    starts = [start for start, _ in made.training.horizons(made.steps)]
    if made.training.branches and (starts[0] < warmup or len({*starts}) < len(starts)):
        raise ConfigError(
            f"training.branches={list(made.training.branches)}: in a run of {made.steps} steps, {warmup} of them "
            f"warm-up, the branches would leave at steps {starts}; choose larger fractions or train longer"
        )
    for part in made.parts:  # a batch rule may refuse
        part.optimizer.update_law()  # a foreign optimizer's may be unknown
        _check_decay(part.optimizer, made.parametrization)
    return made


def _check_shares(training: TrainingConfig, launcher: Mapping[str, Any]) -> None:
    """Devices that train a run together take equal shares of each batch."""
    sections = {"launcher": launcher} | {f"launcher.sizes.{k}": v for k, v in (launcher.get("sizes") or {}).items()}
    for where, section in sections.items():
        devices = int(section.get("devices_per_run", 1))
        if training.batch_size % devices:
            raise ConfigError(
                f"training.batch_size={training.batch_size} cannot be divided among {where}.devices_per_run={devices}: "
                "choose a multiple"
            )


def _check_sizes(recipes: Sequence[Recipe], config: SweepConfig) -> None:
    """What a launcher says of sizes names sizes of the sweep."""
    known = {made.size(*ratios).name for made in recipes for ratios in config.sweep.ratios}
    for name in config.launcher.get("sizes") or ():
        if name not in known:
            raise ConfigError(f"launcher.sizes.{name}: the sweep has no such size; {nearest(name, known)}")


def _check_decay(optimizer: Optimizer, parametrization: Parametrization) -> None:
    """Decay that is normalised together with the gradient is a share of the update, and shrinks by no fixed amount."""
    rule = parametrization.weight_decay_rule
    uncoupled = optimizer.weight_decay and WEIGHT_DECAY_RULES[rule].unit != "lr"
    if uncoupled and optimizer.decay_law() != optimizer.update_law():
        coupled = [name for name, other in WEIGHT_DECAY_RULES.items() if other.unit == "lr"]
        raise ConfigError(
            f"parametrization.weight_decay_rule={rule}: {optimizer.name} normalises its weight decay together with "
            f"the gradient, so no step shrinks by a given amount; use {' or '.join(coupled)}"
        )


def plan(config: SweepConfig, finished: Iterable[Mapping[str, Any]] = ()) -> list[RunSpec]:
    """Every run of the grid, or those of a search's next round, the most expensive first. Writes nothing.

    Args:
        finished: summaries of the runs from which a search goes on, with the FLOPs that were planned for each.
    """
    grid = config.sweep
    for variant in config.variants:
        _check_shares(variant.training, config.launcher)
    recipes = [recipe(variant, config.launcher) for variant in config.variants]
    _check_sizes(recipes, config)
    if grid.search != GRID:
        return _longest_first(_next(recipes, grid, list(finished)))
    return _longest_first(run for made in recipes for run in _grid(made, grid.ratios, grid.log2_lrs, grid.seeds))


def _next(recipes: Sequence[Recipe], grid: GridConfig, finished: Sequence[Mapping[str, Any]]) -> list[RunSpec]:
    """The next round of a search: size by size, as far as its budget goes, which the defaults draw on first."""
    from mupsweep.rounds import survey  # which needs scipy

    left = math.inf if grid.max_flops is None else grid.max_flops - sum(row["flops"] for row in finished)
    chosen: list[RunSpec] = []
    for patient in (True, False) if grid.max_flops is not None else (False,):
        looks = survey([made.variant for made in recipes], finished, grid, patient)
        for runs in _wanted(recipes, looks):
            cost = sum(run.cost.flops for run in runs)
            if cost <= left:
                chosen += runs
                left -= cost
        if chosen:
            return chosen
    if grid.max_flops is not None and not finished:
        raise ConfigError(f"sweep.max_flops={grid.max_flops:g}: no size's first round costs so little; give more")
    return []


def _wanted(recipes: Iterable[Recipe], looks: Mapping[Label, Sequence[Outlook]]) -> list[list[RunSpec]]:
    """The runs that a search wants of each size, the defaults first, then by cost."""
    sizes = [
        [run for r_n, r_L, log2_lr, seed in one.wanted for run in _grid(made, [(r_n, r_L)], [log2_lr], [seed])]
        for made in recipes
        for one in looks[made.variant.label]
        if one.wanted
    ]
    return sorted(sizes, key=lambda runs: (runs[0].recipe.variant.change is not None, runs[0].cost.flops))


def sweep_name(config: SweepConfig) -> str:
    """`sweep.name`, or one made from the choices, the same for the same choices whatever the grid."""
    if config.sweep.name is not None:
        return config.sweep.name
    defaults = [variant for variant in config.variants if variant.change is None]
    columns = zip(*(variant.names for variant in defaults), strict=True)
    readable = "-".join("+".join(dict.fromkeys(names)) for names in columns)
    digest = hashlib.sha256("".join(digest_of(v) for v in defaults).encode()).hexdigest()
    return f"{readable}-{digest[:6]}"


def save(
    config: SweepConfig, header: str, sweep: SweepDir | None = None, new: Sequence[RunSpec] | None = None
) -> tuple[SweepDir, list[RunSpec]]:
    """Add the plan to the sweep's folder and return every run of the sweep, planned now or before.

    Args:
        sweep: the folder; None is that of the config.
        new: the config's `plan`, where it was made already.

    Raises:
        ConfigError: the folder holds a variant of the same name with other settings.
    """
    new = plan(config) if new is None else new
    sweep = SweepDir(Path(config.out) / sweep_name(config)) if sweep is None else sweep
    with sweep.lock():
        old = _planned_before(sweep)
        variants = {run.recipe.digest: run.recipe.variant for run in [*old, *new]}
        refuse_namesakes(variants.values(), sweep)
        for variant in variants.values():
            refuse_foreign_code(asdict(variant), str(sweep.path), config.allow_imports)
        if old and config.sweep.search != GRID:
            new = next_round(config, sweep)
        runs = {run.run_id: run for run in [*old, *new]}
        ordered = _longest_first(runs.values())
        sweep.write_config(to_tree(replace(config, variants=tuple(variants.values()))), header)
        sweep.write_plan(run.row() for run in ordered)
    return sweep, ordered


def next_round(config: SweepConfig, sweep: SweepDir) -> list[RunSpec]:
    """What a search adds to its sweep: nothing while a run is not finished, so that what it adds depends on whole
    rounds alone and not on when it was interrupted."""
    planned = {sweep.run(row["run_id"]): row["flops"] for row in sweep.read_plan()}
    if any(folder.is_open() for folder in planned):
        return []
    return plan(config, [{**(folder.summary() or {}), "flops": flops} for folder, flops in planned.items()])


def extend(
    sweep: SweepDir, made: Recipe, ratios: tuple[float, float], log2_lrs: Iterable[float], seeds: Iterable[int]
) -> list[RunSpec]:
    """Add runs of one size of a variant to a sweep's plan, and return them; its config stays as it is."""
    new = list(_grid(made, [ratios], log2_lrs, seeds))
    with sweep.lock():
        runs = {run.run_id: run for run in [*load(sweep), *new]}
        sweep.write_plan(run.row() for run in _longest_first(runs.values()))
    return new


def load(sweep: SweepDir, to_train: bool = True) -> list[RunSpec]:
    """Every run of a sweep that was planned before, in the order of its plan.

    Args:
        to_train: whether on the text that they were planned for; only to be shown, runs need none.
    """
    config = from_tree(sweep.read_config())
    variants = {variant.label: variant for variant in config.variants}
    made = (recipe(variant, config.launcher) for variant in variants.values()) if to_train else ()
    recipes = {one.digest: one for one in made}
    sizes = cache(lambda digest, r_n, r_L: _sized(recipes[digest], r_n, r_L))  # noqa: N803
    runs, rows = [], sweep.read_plan()[::-1]
    while rows:  # each freed as it is used: 100,000 rows take more memory than their runs
        row = rows.pop()
        if not to_train and row["variant"] not in recipes and label_of(row) in variants:
            recipes[row["variant"]] = recipe(variants[label_of(row)], config.launcher, row["variant"])
        if row["variant"] not in recipes:
            where = {variant.data.path or variant.data.name for variant in config.variants}
            raise RecordError(
                f"{sweep.path} was planned on another text than {', '.join(sorted(where))} holds now, or its "
                "config.yaml was edited: choose another sweep.name, or bring the old text back"
            )
        size, cost = sizes(row["variant"], row["width_ratio"], row["depth_ratio"])
        runs.append(RunSpec(row["run_id"], recipes[row["variant"]], size, row["log2_lr"], row["seed"], cost))
    return runs


def corpus_remarks(runs: Iterable[RunSpec]) -> list[str]:
    """What to say of runs that read their corpus more than once, as far as its size is known."""
    one_each = {run.recipe.digest: run for run in runs}.values()
    remarks = (epochs_remark(run.recipe.variant.data, run.cost.tokens) for run in one_each)
    return list(dict.fromkeys(remark for remark in remarks if remark))


def _planned_before(sweep: SweepDir) -> list[RunSpec]:
    """What the folder holds already; nothing where its config or plan is damaged, since both are now written anew."""
    if not sweep.plan_path.is_file():
        return []
    try:
        sweep.read_config()
        sweep.read_plan()
    except RecordError:
        return []
    return load(sweep)


def _longest_first(runs: Iterable[RunSpec]) -> list[RunSpec]:
    return sorted(runs, key=lambda run: (-run.cost.flops, run.run_id))


def _grid(
    made: Recipe, ratios: Iterable[tuple[float, float]], log2_lrs: Iterable[float], seeds: Iterable[int]
) -> Iterable[RunSpec]:
    for r_n, r_L in ratios:
        size, cost = _sized(made, r_n, r_L)
        for log2_lr in log2_lrs:
            for seed in seeds:
                key = f"{made.digest} {size.width_ratio!r} {size.depth_ratio!r} {float(log2_lr)!r} {int(seed)}"
                run_id = f"{size.name}-lr{log2_lr:.2f}-s{seed}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
                yield RunSpec(run_id, made, size, float(log2_lr), int(seed), cost)


def _sized(made: Recipe, r_n: float, r_L: float) -> tuple[Size, Cost]:  # noqa: N803
    size = made.size(r_n, r_L)
    return size, made.cost(size)
