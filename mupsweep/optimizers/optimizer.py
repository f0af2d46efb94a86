"""What every optimizer declares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mupsweep.errors import ConfigError
from mupsweep.scaling import Role, UpdateLaw
from mupsweep.sections import instantiate

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Optimizer(ABC):
    """The keys that all optimizers share; a subclass adds its own.

    Attributes:
        name: what curves and reports call it.
        weight_decay: at the base shape, in the coupled form: a step subtracts lr * weight_decay * W.
        eps: at the base shape.
        base_lr_ratio: base LR of this optimizer / base LR of the run; 1 except where it serves as another's `rest`.
        rest: the optimizer (a section with a `kind`) of the tensors whose role this one does not take.
    """

    name: str
    weight_decay: float = 0.0
    eps: float = 1e-12
    base_lr_ratio: float = 1.0
    rest: dict[str, Any] | None = None

    takes: ClassVar[frozenset[Role]] = frozenset(Role)

    def __post_init__(self) -> None:
        for key in ("weight_decay", "eps"):
            if getattr(self, key) < 0:
                raise ConfigError(f"optimizer.{key}={getattr(self, key)}: expected at least 0")
        if self.base_lr_ratio <= 0:
            raise ConfigError(f"optimizer.base_lr_ratio={self.base_lr_ratio}: expected a positive number")
        if (self.rest is None) != (self.takes == frozenset(Role)):
            raise ConfigError(
                f"optimizer.rest of {self.name}: "
                + (
                    f"it takes only {', '.join(sorted(self.takes))} tensors, so say which optimizer takes the others"
                    if self.rest is None
                    else "it takes every tensor, so set rest to null"
                )
            )

    def parts(self) -> tuple[Optimizer, ...]:
        """This optimizer, then the one of its `rest`, and so on until every role is taken."""
        if self.rest is None:
            return (self,)
        return (self, *instantiate(self.rest, "optimizer.rest").parts())

    @abstractmethod
    def update_law(self) -> UpdateLaw:
        """How large the update is at LR 1."""

    @abstractmethod
    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """A torch optimizer over groups that carry params, lr, weight_decay and eps."""
