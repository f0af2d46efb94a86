"""Roles: which dimensions of a tensor grow with the width of the model. Weights are stored (n_out, n_in)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What a tensor is to the scaling rules (Zheng et al. 2603.00541, section 3.1; one-hot inputs count n_in = 1)."""

    INPUT = "input"  # token and position embeddings: only n_out grows
    HIDDEN = "hidden"  # matrices inside a residual block: both grow
    OUTPUT = "output"  # the head: only n_in grows
    INPUT_VECTOR = "input_vector"  # gains and biases outside the blocks
    HIDDEN_VECTOR = "hidden_vector"  # gains and biases inside a residual block
    ROUTER = "router"  # logits of a fixed number of experts inside a residual block: only n_in grows

    @property
    def grows(self) -> tuple[bool, bool]:
        """(n_out grows, n_in grows)."""
        return self not in (Role.OUTPUT, Role.ROUTER), self in (Role.HIDDEN, Role.OUTPUT, Role.ROUTER)

    @property
    def is_matrix(self) -> bool:
        """Whether tensors of this role have two dimensions; vectors are (n_out,) and count as n_in = 1."""
        return self in (Role.INPUT, Role.HIDDEN, Role.OUTPUT, Role.ROUTER)


class Init(StrEnum):
    """How a tensor starts. The standard deviation of NORMAL and OWN is the model's init_std times the rule's ratio."""

    NORMAL = "normal"
    ZEROS = "zeros"
    ONES = "ones"
    OWN = "own"  # as the model's own code draws it, scaled
    FIXED = "fixed"  # as the model's own code sets it, the same under every seed


class Fold(StrEnum):
    """Which forward constant a tensor takes up, because the network does not have it."""

    MULTIPLIER = "multiplier"  # that of its role: on the logits, or on its branch
    ATTENTION = "attention"  # what the scale of attention logits lacks where heads widen with the model


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as its model declares it.

    Attributes:
        name: the key in the module's state dict.
        shape: as stored: (n_out, n_in) of a matrix, (n_in, n_out) of an embedding, (n_out,) of a vector.
        role: which rule applies.
        init: the distribution at the start.
        init_std: standard deviation at the base shape, for `Init.NORMAL`.
        decay: whether weight decay applies.
        tied_to: the name of the tensor whose storage this one shares.
        repeats: how often the forward pass uses every row: keys that several query heads share, a gain that all heads
            share. What it acts on grows as n_out * repeats.
        as_matrix: (n_out, n_in), where the stored shape does not say it: of a matrix stored (n_in, n_out), of a
            convolution's kernel, of a gain with several dimensions.
        stacked: whether rows that grow with the width and rows that do not are stacked in it.
        fold: the forward constant behind it that its own numbers take up; None where the network has it.
        active: the share of the tokens that it computes, below 1 of an expert.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    init: Init = Init.NORMAL
    init_std: float = 0.0
    decay: bool = True
    tied_to: str | None = None
    repeats: float = 1
    as_matrix: tuple[int, int] | None = None
    stacked: bool = False
    fold: Fold | None = None
    active: float = 1.0

    @property
    def dims(self) -> tuple[int, int]:
        """(n_out, n_in), with n_in = 1 for a vector."""
        if self.as_matrix is not None:
            return self.as_matrix
        if len(self.shape) == 1:
            return self.shape[0], 1
        rows, columns = self.shape
        return (columns, rows) if self.role is Role.INPUT else (rows, columns)

    @property
    def acting_dims(self) -> tuple[float, int]:
        """(n_out, n_in) with repeated rows counted as often as they are used: what grows with the width."""
        n_out, n_in = self.dims
        return n_out * self.repeats, n_in
