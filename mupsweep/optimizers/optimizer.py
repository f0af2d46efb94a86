"""What every optimizer declares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from mupsweep.analysis.labels import LARGEST_LOG2_LR
from mupsweep.errors import ConfigError
from mupsweep.formatting import nearest
from mupsweep.scaling import Role, UpdateLaw
from mupsweep.scaling.group_lr import check_group_lr
from mupsweep.schema import instantiate, require

if TYPE_CHECKING:
    import torch

Dims = tuple[int, int]  # (n_out, n_in) of a tensor
ROLES = tuple(role.value for role in Role if role is not Role.ROUTER)  # routers go to the optimizer of the head
BATCH_RULES = ("sde", "sqrt")  # how LR, averages and eps go from one batch size to another
MATRICES = tuple(role for role in ROLES if Role(role).is_matrix)


class Threshold(NamedTuple):
    """A hyperparameter that is compared with gradients, such as eps: its value at the base shape, and the law whose
    `eps_power` says how it scales."""

    value: float
    law: UpdateLaw


@dataclass(frozen=True, kw_only=True)
class Optimizer(ABC):
    """The keys that all optimizers share; a subclass adds its own.

    Attributes:
        name: what curves and reports call it.
        weight_decay: at the base shape; `parametrization.weight_decay_rule` says what it is multiplied by.
        eps: at the base shape.
        roles: of the tensors that it takes.
        rest: the optimizer (a section with a `kind`) of all other tensors.
        lr_ratio: base LR of `rest` / base LR of this optimizer.
        group_lr: factors on the LR by role, branch or pattern of names, of all tensors, those of `rest` included
            (mupsweep/scaling/group_lr.py).
        log2_lr_range: the octaves in which its best base LRs lie, as a rule; None where nothing is known of them. It
            makes the default grid and a warning, and changes no run.
    """

    name: str
    weight_decay: float = 0.0
    eps: float = 1e-12
    roles: tuple[str, ...] = ROLES
    rest: dict[str, Any] | None = None
    lr_ratio: float = 1.0
    group_lr: dict[str, Any] | None = None
    log2_lr_range: tuple[float, ...] | None = None

    supported_roles: ClassVar[tuple[str, ...]] = ROLES  # what the algorithm can take at all
    divides_by_weight: ClassVar[bool] = False  # a tensor that starts at zero would never move, or by a wrong amount
    rescales_init: ClassVar[bool] = False  # gives the weights a norm of its own before training

    def __post_init__(self) -> None:
        for key in ("weight_decay", "eps"):
            require(getattr(self, key) >= 0, f"optimizer.{key}", getattr(self, key), "at least 0")
        require(self.lr_ratio > 0, "optimizer.lr_ratio", self.lr_ratio, "a positive number")
        check_group_lr(self.group_lr or {})
        if (self.rest or {}).get("group_lr"):
            raise ConfigError(
                "optimizer.rest.group_lr: give the factors to optimizer.group_lr, which holds for every tensor"
            )
        ends = self.log2_lr_range
        is_range = ends is None or (len(ends) == 2 and -LARGEST_LOG2_LR <= ends[0] < ends[1] <= LARGEST_LOG2_LR)
        require(is_range, "optimizer.log2_lr_range", list(ends or ()), "[LOWEST,HIGHEST] in octaves, or null")
        require(len(self.roles) > 0, "optimizer.roles", list(self.roles), f"some of {', '.join(self.supported_roles)}")
        for role in self.roles:
            if role not in ROLES:
                raise ConfigError(f"optimizer.roles={list(self.roles)}: {nearest(role, ROLES)}")
            if role not in self.supported_roles:
                raise ConfigError(
                    f"optimizer.roles={list(self.roles)}: {self.name} takes {', '.join(self.supported_roles)} tensors "
                    f"only; leave {role} to optimizer.rest"
                )
        if (self.rest is None) != (set(self.roles) == set(ROLES)):
            raise ConfigError(
                f"optimizer.rest of {self.name}: "
                + (
                    f"it takes only {', '.join(self.roles)} tensors, so say which optimizer takes the others: "
                    "optimizer.rest=adamw"
                    if self.rest is None
                    else "it takes every tensor, so set optimizer.rest=null"
                )
            )

    @property
    def curvature_every(self) -> int | None:
        """Every how many steps the algorithm observes gradients of sampled labels; None for never."""
        return None

    @property
    def steps_shards(self) -> bool:
        """Whether some rows of a tensor can take their step without the others, to the same bits."""
        return False

    @property
    def observes_new_batch(self) -> bool:
        """Whether these gradients are those of a batch of their own, and not of the step's."""
        return False

    @property
    def oriented(self) -> bool:
        """Whether it matters which axis is n_out; embeddings are stored (n_in, n_out)."""
        return set(self.supported_roles) <= set(MATRICES)

    def members(self) -> tuple[Optimizer, ...]:
        """The optimizers of a hybrid: this one, that of its `rest` and so on, until every role has one."""
        if self.rest is None:
            return (self,)
        return (self, *instantiate(self.rest, "optimizer.rest").members())

    @abstractmethod
    def update_law(self, dims: Dims | None = None) -> UpdateLaw:
        """How large the update is at LR 1; for a tensor of (n_out, n_in) where an algorithm depends on that."""

    def measured_law(self, dims: Dims | None = None) -> UpdateLaw:
        """The law that updates obey when they are measured, where `update_law` is a published one that differs."""
        return self.update_law(dims)

    def decay_law(self, dims: Dims | None = None) -> UpdateLaw:
        """The law of what weight decay is added to: the update, unless a subclass adds it further inside."""
        return self.update_law(dims)

    def caveats(self, width: int) -> list[str]:
        """What a user should know of its rule before training.

        Args:
            width: of the base shape.
        """
        return []

    def thresholds(self, dims: Dims | None = None) -> Mapping[str, Threshold]:
        """Every hyperparameter that is compared with gradients; always with "eps"."""
        return {"eps": Threshold(self.eps, self.update_law(dims))}

    def at_batch_ratio(self, ratio: float, rule: str) -> tuple[Optimizer, float]:
        """This optimizer at `ratio` times the base batch, and the factor of its LR.

        Args:
            rule: a name of BATCH_RULES.

        Raises:
            ConfigError: the rule says nothing of this optimizer, or not at this ratio.
        """
        return {"sde": self.sde_rule, "sqrt": self.sqrt_rule}[rule](ratio)

    def sde_rule(self, ratio: float) -> tuple[Optimizer, float]:
        """What keeps the stochastic differential equation of training; an optimizer with a published one overrides."""
        grows = self.update_law().degree != 0
        remedy = "tune the LR at the batch size of the target" if grows else "use training.batch_rule=sqrt"
        raise ConfigError(
            f"training.batch_rule=sde has no rule for {self.name}: {remedy}, or set training.batch_rule=none"
        )

    def sqrt_rule(self, ratio: float) -> tuple[Optimizer, float]:
        """LR times sqrt(ratio) at averages over as many steps, for a step whose size no gradient decides.

        The bound of methods with a linear minimisation oracle (normalised SGD, signSGD, Muon; 2603.15958) has its LR in
        D B / (LR tokens) + C LR / (1 - momentum), which is lowest at sqrt(B / tokens) for a fixed momentum. SignSGD's
        SDE (2411.15958) agrees where noise dominates. Gradients are then as noise, and eps follows them.
        """
        if self.update_law().degree != 0:
            raise ConfigError(
                f"training.batch_rule=sqrt is for steps that do not grow with the gradient, and {self.name}'s do: tune "
                "the LR at the target's batch size, or set training.batch_rule=none; sgd has training.batch_rule=sde"
            )
        law = self.thresholds()["eps"].law
        power = (law.eps_power or 0) * law.eps_degree
        return replace(self, eps=self.eps * ratio ** (-power / 2)), ratio**0.5

    @abstractmethod
    def state_size(self, dims: Dims) -> int:
        """How many numbers it remembers of a tensor of (n_out, n_in)."""

    @abstractmethod
    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """A torch optimizer over groups that carry params, lr, weight_decay and every threshold by name.

        A group of embeddings also says `transposed`: they are stored (n_in, n_out).
        """


def check_decays(section: Any, *keys: str) -> None:
    """Refuse decays of averages outside [0, 1); a key holds one number, or one for each of two averages."""
    for key in keys:
        value = getattr(section, key)
        if isinstance(value, list | tuple):
            fine = len(value) == 2 and all(0 <= v < 1 for v in value)
            require(fine, f"optimizer.{key}", list(value), "two numbers in [0, 1)")
        else:
            require(0 <= value < 1, f"optimizer.{key}", value, "a number in [0, 1)")
