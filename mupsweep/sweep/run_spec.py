"""Run specifications: a variant resolved to its model, optimizers and rules, and one run of it at one size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from mupsweep.data.tokenizers import vocab_size
from mupsweep.errors import ConfigError
from mupsweep.formatting import nearest
from mupsweep.models import Architecture
from mupsweep.models.shape import Size
from mupsweep.optimizers import Optimizer
from mupsweep.scaling import WEIGHT_DECAY_RULES, Parametrization, Role
from mupsweep.scaling.group_lr import check_matches
from mupsweep.schema import instantiate
from mupsweep.sweep.config import SweepConfig, TrainingConfig, Variant
from mupsweep.sweep.cost import Cost, estimate
from mupsweep.sweep.launcher_options import LauncherOptions
from mupsweep.sweep.run_identity import digest_of
from mupsweep.sweep.sizes import ListedSize
from mupsweep.sweep.trainer import PlannedTrainer

VOCAB_MULTIPLE = 64  # the vocabulary is padded to this, as nanoGPT pads 50257 to 50304: aligned matrix products


class ScaledOptimizer(NamedTuple):
    """One optimizer of a hybrid, with its hyperparameters at the batch size of the run.

    Attributes:
        lr_ratio: base LR of this optimizer / base LR of the run, the rules for batch size and token horizon included.
    """

    optimizer: Optimizer
    lr_ratio: float


@dataclass(frozen=True)
class ResolvedVariant:
    """A variant with its sections turned into the objects they describe.

    Attributes:
        digest: identifies the variant by everything that decides what its runs compute (`digest_of`).
        launcher: options of the sweep's launcher, which say how many devices share a run.
        listed: the sizes that the sweep lists one by one.
        length_of: the size whose runs' length is meant, where that follows from the size (`at`); None for the base.
    """

    variant: Variant
    model: Architecture
    optimizer: Optimizer
    parametrization: Parametrization
    trainer: PlannedTrainer
    digest: str
    launcher: LauncherOptions = field(default_factory=LauncherOptions)
    listed: tuple[ListedSize, ...] = ()
    length_of: Size | None = None

    def at(self, size: Size) -> ResolvedVariant:
        """The variant with the number of steps that its runs have at a size: its own under tokens_per_parameter."""
        return self if self.training.tokens_per_parameter is None else replace(self, length_of=size)

    @cached_property
    def optimizers(self) -> tuple[ScaledOptimizer, ...]:
        """The optimizer, that of its `rest` and so on, until every role has one."""
        training = self.training
        lr_ratio = 1.0
        if training.horizon_exponent:
            lr_ratio = self.token_ratio**training.horizon_exponent
        scaled = []
        for optimizer in self.optimizer.members():
            batch_factor = 1.0
            if self.batch_ratio is not None:
                optimizer, batch_factor = self._at_batch_size(optimizer, self.batch_ratio)
            scaled.append(ScaledOptimizer(optimizer, lr_ratio * batch_factor))
            lr_ratio *= optimizer.lr_ratio
        return tuple(scaled)

    @property
    def token_ratio(self) -> float:
        """Training tokens over those that the base LRs are meant for."""
        assert self.training.base_tokens is not None
        return self.tokens / self.training.base_tokens

    @property
    def batch_ratio(self) -> float | None:
        """How many times the base's batch the batch rule is given, None without a rule.

        Where tokens are the rule's matter too, n times the tokens are as 1/n of the batch: both make a run of n times
        the steps.
        """
        training = self.training
        if training.base_batch_size is None:
            return None
        ratio = training.batch_size / training.base_batch_size
        return ratio / self.token_ratio if training.batch_rule_has_tokens else ratio

    def _at_batch_size(self, optimizer: Optimizer, ratio: float) -> tuple[Optimizer, float]:
        """An optimizer at `ratio` times the base batch, its weight decay included, and the factor of its LR."""
        carried, lr_factor = optimizer.at_batch_ratio(ratio, self.training.batch_rule)
        decay_rule = WEIGHT_DECAY_RULES[self.parametrization.weight_decay_rule]
        weight_decay = optimizer.weight_decay * decay_rule.at_batch_ratio(ratio, lr_factor)
        return replace(carried, weight_decay=weight_decay), lr_factor

    def optimizer_for(self, role: Role) -> ScaledOptimizer:
        """The optimizer of the tensors of a role: the first that names it, and the last names every role.

        Routers, whose rule is published for Adam and SGD alone, go with the head.
        """
        named = Role.OUTPUT if role is Role.ROUTER else role
        return next(scaled for scaled in self.optimizers if named in scaled.optimizer.roles)

    @property
    def training(self) -> TrainingConfig:
        return self.variant.training

    @cached_property
    def steps(self) -> int:
        """Optimizer steps of every run of this variant, or of those of one size (`at`)."""
        if self.training.tokens_per_parameter is None:
            return self.training.total_steps(self.model.context, 0)
        size = self.size(1.0, 1.0) if self.length_of is None else self.length_of
        return self.training.total_steps(self.model.context, self.parameters(size))

    @property
    def tokens(self) -> int:
        """Training tokens of a run, as `steps` counts them."""
        return self.steps * self.training.batch_size * self.model.context

    def parameters(self, size: Size) -> int:
        """Number of trained parameters at a size, embeddings included; of a program what the sweep's list says."""
        if not self.trainer.runs_program:
            return sum(math.prod(t.shape) for t in self.model.tensors(size) if t.tied_to is None)
        entry = self._listed(size)
        if entry is None or entry.parameters is None:
            raise ConfigError(
                f"training.tokens_per_parameter: the parameters of a program at {size.name} are not known; give them "
                "in sweep.sizes"
            )
        return entry.parameters

    @property
    def trained_steps(self) -> int:
        """Optimizer steps of every run, those of the branches that leave it before its end included."""
        return self.steps + sum(end - start for start, end in self.training.horizons(self.steps)[:-1])

    def size(self, width_ratio: float, depth_ratio: float) -> Size:
        """The shape at the given ratios to the base, with a padded vocabulary."""
        data = self.variant.data
        padded = -(-(data.vocab_size or vocab_size(data.tokenizer)) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        size = self.model.base.scaled(width_ratio, depth_ratio, padded)
        entry = self._listed(size)
        return size if entry is None else replace(size, label=entry.name)

    def _listed(self, size: Size) -> ListedSize | None:
        """The entry of a size in the sweep's list."""
        return next((entry for entry in self.listed if (entry.width, entry.depth) == (size.width, size.depth)), None)

    def cost(self, size: Size) -> Cost:
        """The FLOPs, tokens, parameters and memory of one run at `size`.

        Of a program of the user's only the parameters can be known, and with them 6 FLOPs per parameter and token.
        """
        cost = self._declared_cost(size)
        if not self.trainer.runs_program:
            return cost
        entry = self._listed(size)
        if entry is None or entry.parameters is None:
            return replace(cost, known=False)
        flops = 6.0 * entry.parameters * cost.tokens
        return replace(cost, parameters=entry.parameters, flops=flops, active_parameters=None)

    def _declared_cost(self, size: Size) -> Cost:
        """The cost by the table of tensors that the model declares."""
        tensors, training = list(self.model.tensors(size)), self.training
        state = sum(self.optimizer_for(t.role).optimizer.state_size(t.dims) for t in tensors if t.tied_to is None)
        options = self.launcher.for_size(size.name)
        return estimate(
            tensors,
            size,
            self.at(size).trained_steps,
            training.batch_size,
            training.micro_batch,
            state,
            options.devices_per_run,
            options.shard,
        )

    def least_memory(self, size: Size, devices: int | None = None) -> float:
        """Bytes on a device that a run at `size` needs with one sequence at a time.

        Args:
            devices: how many devices divide its state; None for what the launcher says.
        """
        training = replace(self.training, micro_batch=1)
        launcher = self.launcher
        if devices is not None:
            launcher = LauncherOptions(devices_per_run=devices, shard=devices > 1)
        return replace(self, variant=replace(self.variant, training=training), launcher=launcher).cost(size).memory


@dataclass(frozen=True, slots=True)
class RunSpec:
    """One training run: a resolved variant at a size, with a base LR and a seed.

    Attributes:
        validation: whether it validates an LR at a target, and is no part of the sweep's ladders.
        round: of the search that chose it, from 1; 0 for a run of a grid.
        reason: why the search chose it.
    """

    run_id: str
    resolved: ResolvedVariant
    size: Size
    log2_lr: float
    seed: int
    cost: Cost
    validation: bool = False
    round: int = 0
    reason: str = ""

    @property
    def base_lr(self) -> float:
        return 2.0**self.log2_lr

    def row(self) -> dict[str, Any]:
        """The line of plan.jsonl."""
        return {
            "run_id": self.run_id,
            "variant": self.resolved.digest,
            **self.label_columns(),
            **({"size": self.size.label} if self.size.label else {}),
            **({"parameters": self.cost.parameters} if self.cost.known else {}),
            **({"active_parameters": active} if self.cost.known and (active := self.cost.active_parameters) else {}),
            "tokens": self.cost.tokens,
            **({"flops": self.cost.flops} if self.cost.known else {}),
            **({"validation": True} if self.validation else {}),
            **({"round": self.round, "reason": self.reason} if self.round else {}),
        }

    def label_columns(self) -> dict[str, Any]:
        """The columns that distinguish runs in every table."""
        model, optimizer, parametrization = self.resolved.variant.names
        change = self.resolved.variant.change
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


def resolve(
    variant: Variant,
    launcher: LauncherOptions | None = None,
    digest: str | None = None,
    listed: tuple[ListedSize, ...] = (),
) -> ResolvedVariant:
    """The objects that a variant describes, after a check that its settings fit together.

    Args:
        launcher: options of the sweep's launcher; None stands for one device per run.
        digest: the variant's digest, where it is known; without it the corpus is read to compute the digest.
        listed: the sizes that the sweep lists one by one.

    Raises:
        ConfigError: settings that are each valid but contradict one another.
    """
    resolved = ResolvedVariant(
        variant=variant,
        model=instantiate(variant.model, "model"),
        optimizer=instantiate(variant.optimizer, "optimizer"),
        parametrization=instantiate(variant.parametrization, "parametrization"),
        trainer=instantiate(variant.trainer, "trainer"),
        digest=digest or digest_of(variant),
        launcher=launcher or LauncherOptions(),
        listed=listed,
    )
    if resolved.optimizer.group_lr:
        check_matches(resolved.optimizer.group_lr, resolved.model.tensors(resolved.size(1.0, 1.0)))
    training = resolved.training
    if training.compile and not resolved.model.compiles:
        raise ConfigError(
            f"training.compile=true: the shapes within model={resolved.model.name} change with every batch, and torch "
            "would compile it anew each time; set training.compile=false"
        )
    if training.norm_points and resolved.trainer.runs_program:
        raise ConfigError(
            f"training.norm_points={training.norm_points}: the weights of a program are its own; set it to 0 with "
            f"trainer={resolved.trainer.name}"
        )
    check_schedule(resolved)
    for optimizer, _ in resolved.optimizers:  # refuses an optimizer without the batch rule that is asked for
        optimizer.update_law()  # refuses a custom optimizer whose law is unknown
        _check_decay(optimizer, resolved.parametrization)
    return resolved


def check_schedule(resolved: ResolvedVariant) -> None:
    """Refuse a schedule that does not fit in as many steps as runs have."""
    training, steps = resolved.training, resolved.steps
    warmup = training.warmup_steps(steps)
    if warmup >= steps:
        raise ConfigError(
            f"training.warmup={training.warmup:g} is {warmup} steps of warm-up in a run of {steps}: "
            "the LR would never reach its peak; lower warmup or train longer"
        )
    starts = [start for start, _ in training.horizons(steps)]
    if training.branches and (starts[0] < warmup or len({*starts}) < len(starts)):
        raise ConfigError(
            f"training.branches={list(training.branches)}: in a run of {steps} steps, {warmup} of them "
            f"warm-up, the branches would leave at steps {starts}; choose larger fractions or train longer"
        )


def check_batch_shares(resolved: ResolvedVariant, launcher: LauncherOptions) -> None:
    """Refuse a number of devices per run that does not divide the batch; a program divides it as it likes."""
    if resolved.trainer.runs_program:
        return
    batch_size = resolved.training.batch_size
    for where, options in launcher.sections():
        devices = options.devices_per_run
        if options.shard and resolved.model.inferred:
            raise ConfigError(
                f"{where}.shard=true divides the models of mupsweep only, not {resolved.model.name}, which is whole on "
                f"every device: set {where}.shard=false"
            )
        if devices > 1 and resolved.training.norm_points:
            raise ConfigError(
                f"training.norm_points measures runs on one device, and {where}.devices_per_run={devices}: set one of "
                "them back"
            )
        if batch_size % devices:
            raise ConfigError(
                f"training.batch_size={batch_size} cannot be divided among {where}.devices_per_run={devices}: "
                "choose a multiple"
            )


def check_size_overrides(resolved: Sequence[ResolvedVariant], config: SweepConfig) -> None:
    """Refuse launcher.sizes for a size that the sweep does not have."""
    sizes = {one.size(*ratios).name for one in resolved for ratios in config.sweep.ratios}
    for name in config.launcher_options.sizes:
        if name not in sizes:
            raise ConfigError(f"launcher.sizes.{name}: the sweep has no such size; {nearest(name, sizes)}")


def _check_decay(optimizer: Optimizer, parametrization: Parametrization) -> None:
    """Refuse a decay rule that an optimizer cannot obey.

    Weight decay that is normalised together with the gradient is a share of the update, so it does not shrink the
    weight by a given amount.
    """
    rule = parametrization.weight_decay_rule
    uncoupled = optimizer.weight_decay and WEIGHT_DECAY_RULES[rule].unit != "lr"
    if uncoupled and optimizer.decay_law() != optimizer.update_law():
        coupled = [name for name, other in WEIGHT_DECAY_RULES.items() if other.unit == "lr"]
        raise ConfigError(
            f"parametrization.weight_decay_rule={rule}: {optimizer.name} normalises its weight decay together with "
            f"the gradient, so no step shrinks by a given amount; use {' or '.join(coupled)}"
        )
