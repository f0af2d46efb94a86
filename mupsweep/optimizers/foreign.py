"""A `torch.optim.Optimizer` of your own, by import path, with an update law that was measured or is known."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from mupsweep.errors import ConfigError
from mupsweep.formatting import nearest
from mupsweep.optimizers.optimizer import Dims, Optimizer, Threshold
from mupsweep.scaling import UpdateLaw
from mupsweep.scaling.laws import columns, entries, one, rows
from mupsweep.schema import import_object, one_of

if TYPE_CHECKING:
    import torch

BLOCKS = {"one": one, "rows": rows, "columns": columns, "entries": entries}
WEIGHT_NORMS = ("frobenius", "spectral")
EXPONENTS = ("degree", "n_out", "n_in")
LAW_KEYS = (*EXPONENTS, "weight_norm", "eps_power", "blocks")
OURS = ("params", "lr", "weight_decay", "eps")  # what a group already says of its tensors


@dataclass(frozen=True)
class Power:
    """n_out^x n_in^y, of numbers or monomials."""

    n_out: Fraction
    n_in: Fraction

    def __call__(self, n_out: Any, n_in: Any) -> Any:
        return n_out**self.n_out * n_in**self.n_in


@dataclass(frozen=True, kw_only=True)
class Foreign(Optimizer):
    """An optimizer class that is imported. lr: whatever it means there.

    Attributes:
        path: package.module.Class, a subclass of `torch.optim.Optimizer` whose constructor takes groups and `lr`.
        options: what else its constructor takes.
        law: ||A||_2 = ||G||_2^degree n_out^x n_in^y of its update at LR 1, as {degree, n_out, n_in}, numbers or
            fractions; `mupsweep check law` measures it. Optional: weight_norm, where the update also carries that norm
            of the weight; eps_power and blocks, by which eps is scaled (see `UpdateLaw`).
    """

    path: str | None = None
    options: dict[str, Any] | None = None
    law: dict[str, Any] | None = None

    imports: ClassVar[tuple[str, ...]] = ("path",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path is not None:
            self._check_options()
        law = self._law
        if law is not None and self._exponents["n_out"] != self._exponents["n_in"] and "input" in self.roles:
            raise ConfigError(
                f"optimizer.law={self.law}: embeddings are stored (n_in, n_out), so {self.name} would see their axes "
                "exchanged; leave input tensors to another: optimizer.roles=[hidden] optimizer.rest=adamw"
            )

    @property
    def divides_by_weight(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._law is not None and self._law.weight_norm is not None

    def update_law(self, dims: Dims | None = None) -> UpdateLaw:
        if self._law is None:
            raise ConfigError(
                "optimizer.law=null: nobody knows how large its updates are; measure that with mupsweep check law "
                f"optimizer=foreign optimizer.path={self.path or 'package.module.Class'} allow_imports=true"
            )
        return self._law

    def thresholds(self, dims: Dims | None = None) -> Mapping[str, Threshold]:
        return {"eps": Threshold(self.eps, self._law or UpdateLaw(eps_power=None))}

    def state_size(self, dims: Dims) -> int:
        """Two moments are assumed, as Adam has them."""
        return 2 * math.prod(dims)

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        left_out = {key for key in ("weight_decay", "eps") if not self._takes(key)}
        default = self._parameters["eps"].default if "eps" in self._parameters else 0.0
        left_out |= set() if isinstance(default, float) else {"eps"}  # Adafactor's is a pair of other things
        groups = [{k: v for k, v in group.items() if k not in left_out} for group in groups]
        try:
            return self._class(groups, lr=groups[0]["lr"], **(self.options or {}))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"optimizer.options={self.options}: {self.path} says: {error}") from error

    @cached_property
    def _class(self) -> Any:
        import torch

        cls = import_object(self.path, "optimizer.path", "your optimizer")
        if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
            raise ConfigError(f"optimizer.path={self.path} is no subclass of torch.optim.Optimizer")
        return cls

    @cached_property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        """Of the constructor."""
        return inspect.signature(self._class).parameters

    def _takes(self, key: str) -> bool:
        return key in self._parameters or any(p.kind is p.VAR_KEYWORD for p in self._parameters.values())

    def _check_options(self) -> None:
        """Refuse options that the constructor does not take, or that the parameter groups give."""
        if not self._takes("lr"):
            raise ConfigError(f"optimizer.path={self.path}: its constructor takes no lr, so there is none to transfer")
        if self.weight_decay and not self._takes("weight_decay"):
            raise ConfigError(f"optimizer.weight_decay={self.weight_decay}: {self.path} takes none; set it to 0")
        for key in self.options or ():
            if key in OURS:
                raise ConfigError(f"optimizer.options.{key}: every tensor has its own; give optimizer.{key} or the LR")
            if not self._takes(key):
                accepted = [name for name in self._parameters if name not in OURS]
                raise ConfigError(f"optimizer.options.{key}: {self.path} takes none; {nearest(key, accepted)}")

    @cached_property
    def _exponents(self) -> dict[str, Fraction]:
        assert self.law is not None
        exponents = {}
        for key in EXPONENTS:
            try:
                exponents[key] = Fraction(str(self.law[key]))
            except (KeyError, ValueError, ZeroDivisionError) as error:
                raise ConfigError(
                    f"optimizer.law.{key}={self.law.get(key)}: expected a number or a fraction such as 1/2, "
                    "all of them as optimizer.law={degree: 0, n_out: 1/2, n_in: 1/2}"
                ) from error
        return exponents

    @cached_property
    def _law(self) -> UpdateLaw | None:
        if self.law is None:
            return None
        for key in self.law:
            if key not in LAW_KEYS:
                raise ConfigError(f"unknown key 'optimizer.law.{key}'; {nearest(key, LAW_KEYS)}")
        blocks, norm, eps_power = (self.law.get(key) for key in ("blocks", "weight_norm", "eps_power"))
        one_of(blocks or "one", tuple(BLOCKS), "optimizer.law.blocks")
        if norm is not None:
            one_of(norm, WEIGHT_NORMS, "optimizer.law.weight_norm")
        if eps_power not in (None, 1, 2):
            raise ConfigError(f"optimizer.law.eps_power={eps_power}: expected 1, 2, or null where eps is not scaled")
        degree, n_out, n_in = (self._exponents[key] for key in EXPONENTS)
        by_blocks = {"one": (0, 0), "rows": (1, 0), "columns": (0, 1), "entries": (1, 1)}[blocks or "one"]
        half = (1 - degree) / 2  # what the blocks contribute to the exponents, which count everything
        return UpdateLaw(
            degree=degree,
            blocks=BLOCKS[blocks or "one"],
            shape_factor=Power(n_out - half * by_blocks[0], n_in - half * by_blocks[1]),
            eps_power=eps_power,
            weight_norm=norm,
        )
