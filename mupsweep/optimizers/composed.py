"""Optimizers whose algorithm combines with the parts of this module: blocks, a graft, a norm.

    direction of the algorithm -> in blocks -> grafted -> spectral norm 1 -> Frobenius norm of the weight

Each part is one key, null or false by default, and the update law of a combination follows from its parts.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from mupsweep.errors import ConfigError
from mupsweep.optimizers.algorithm import Algorithm
from mupsweep.optimizers.optimizer import MATRICES, Dims, Optimizer, Threshold
from mupsweep.scaling import UpdateLaw
from mupsweep.scaling.laws import SPECTRAL_NORMALISED, Sizes, blocked, frobenius_normalised
from mupsweep.schema import instantiate, require

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class ComposableOptimizer(Optimizer, Algorithm):
    """The keys of the parts; a subclass adds its algorithm.

    Attributes:
        block_size: treat every block of this side length as a matrix of its own.
        graft: an optimizer (a section with a `kind`) whose update gives the Frobenius norm; the direction stays.
        spectral_norm: divide by the spectral norm, followed online by power iteration, times sqrt(n_out / n_in).
        hyperball: keep the Frobenius norms of weight and update fixed (Wen et al., 2606.16899); LR: relative change.
    """

    block_size: int | None = None
    graft: dict[str, Any] | None = None
    spectral_norm: bool = False
    hyperball: bool = False

    entrywise: ClassVar[bool] = False  # the update of an entry depends on no other entry

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.block_size is None or self.block_size > 0, "optimizer.block_size", self.block_size, "positive")
        _ = self.graft_source  # may refuse
        in_use = [key for key in ("block_size", "graft", "spectral_norm", "hyperball") if getattr(self, key)]
        for role in self.roles:
            if in_use and role not in MATRICES:
                raise ConfigError(
                    f"optimizer.{in_use[0]} is for matrices, but {self.name} takes {role} tensors too: "
                    "give optimizer.roles=[hidden] optimizer.rest=adamw"
                )
        if self.renormalizes and in_use:
            raise ConfigError(f"optimizer.{in_use[0]}: {self.name} fixes the norm of its weights itself; drop it")
        if self.weight_decay and (self.hyperball or self.renormalizes):
            raise ConfigError(
                f"optimizer.weight_decay={self.weight_decay}: {self.name} fixes the norm of its weights, "
                "so decay has no effect; set it to 0"
            )

    @property
    def composed(self) -> bool:
        """Whether any part is in use."""
        return bool(self.block_size or self.graft or self.spectral_norm or self.hyperball)

    @property
    def oriented(self) -> bool:
        return self.composed or super().oriented

    @property
    def steps_shards(self) -> bool:
        return self.entrywise and not self.composed

    @abstractmethod
    def base_law(self, dims: Dims | None = None) -> UpdateLaw:
        """The update law of the algorithm alone."""

    def base_algorithm(self, dims: Dims) -> ComposableOptimizer:
        """The algorithm alone, for tensors of (n_out, n_in)."""
        return self

    def block_sizes(self, dims: Dims | None) -> Sizes:
        """The longest sides of a block; None leaves an axis whole."""
        return self.block_size, self.block_size

    @cached_property
    def graft_source(self) -> ComposableOptimizer | None:
        """The optimizer that `graft` names."""
        if self.graft is None:
            return None
        source = instantiate({**self.graft, "roles": list(self.roles), "rest": self.rest}, "optimizer.graft")
        if not isinstance(source, ComposableOptimizer):
            raise ConfigError(f"optimizer.graft={source.name}: its update cannot be computed apart from its step")
        if source.curvature_every is not None:
            raise ConfigError(f"optimizer.graft={source.name}: a graft observes no curvature; graft adamw or sgd")
        if source.renormalizes or source.hyperball:
            raise ConfigError(
                f"optimizer.graft={source.name}: the norm of its update is that of the weight; graft adamw"
            )
        return source

    def update_law(self, dims: Dims | None = None) -> UpdateLaw:
        law = self._blocked_law(dims)
        if self.graft_source is not None:  # Qiu et al. 2512.05620, Table 1: the rule of Q1#Q2 is that of Q1
            law = replace(self.graft_source.update_law(dims), full_rank=law.full_rank)
        if self.spectral_norm:
            law = replace(SPECTRAL_NORMALISED, full_rank=law.full_rank)
        return frobenius_normalised(law) if self.hyperball else law

    def thresholds(self, dims: Dims | None = None) -> Mapping[str, Threshold]:
        grafted = {} if self.graft_source is None else self.graft_source.thresholds(dims)
        eps = {"eps": Threshold(self.eps, self._blocked_law(dims))}
        return eps | {f"graft_{name}": threshold for name, threshold in grafted.items()}

    def caveats(self, width: int) -> list[str]:
        if self.block_size is None or self.block_size <= width:
            return []
        return [
            f"optimizer.block_size={self.block_size} exceeds the base width {width}: up to width {self.block_size} the "
            f"blocks of {self.name} are whole matrices that grow with the width, so they are no cure for updates that "
            f"line up less in wider models; choose at most {width}"
        ]

    def base_state_size(self, dims: Dims) -> int:
        """`state_size` of the algorithm alone, or of one block."""
        return len(self.memory) * math.prod(dims)

    def state_size(self, dims: Dims) -> int:
        sizes = (None, None) if self.block_size is None else self.block_sizes(dims)
        b_out, b_in = (min(n, size or n) for n, size in zip(dims, sizes, strict=True))
        blocks = math.ceil(dims[0] / b_out) * math.ceil(dims[1] / b_in)
        grafted = 0 if self.graft_source is None else self.graft_source.state_size(dims)
        parts = self.spectral_norm * dims[1] + self.hyperball  # a singular vector, a norm
        return blocks * self.base_algorithm(dims).base_state_size((b_out, b_in)) + grafted + parts

    def algorithm(self, dims: Dims) -> Algorithm:
        """The algorithm with its parts, for tensors of (n_out, n_in)."""
        from mupsweep.optimizers.wrappers import Blocked, Grafted, Hyperball, SpectralNormalised

        algorithm: Algorithm = self.base_algorithm(dims)
        if self.block_size is not None:
            algorithm = Blocked(algorithm, self.block_sizes(dims))
        if self.graft_source is not None:
            algorithm = Grafted(algorithm, self.graft_source.algorithm(dims))
        if self.spectral_norm:
            algorithm = SpectralNormalised(algorithm)
        return Hyperball(algorithm) if self.hyperball else algorithm

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        from mupsweep.optimizers.stacked import StackedOptimizer

        return StackedOptimizer(groups, self.algorithm)

    def _blocked_law(self, dims: Dims | None) -> UpdateLaw:
        law = self.base_law(dims)
        return law if self.block_size is None else blocked(law, self.block_sizes(dims))


Composed = ComposableOptimizer  # the name that optimizers outside this repository may import
