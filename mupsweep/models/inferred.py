"""Models of somebody else's code: roles, starts and forward constants are read off the networks that it builds."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from mupsweep.errors import ConfigError
from mupsweep.models.architecture import Architecture, Multipliers
from mupsweep.models.inference import QUERIES, InferredTensor, Network, infer, without_wrappers
from mupsweep.models.shape import BaseShape, Size
from mupsweep.scaling import Fold, Init, Role, TensorSpec

if TYPE_CHECKING:
    from torch import nn

    from mupsweep.models.observation import Attention, Start

BLOCK, OUTPUT, ATTENTION = "block_multiplier", "output_multiplier", "attention_multiplier"
OTHER_WIDTHS = (2.0, 3.0, 0.5)  # ratios to the base, one of which tells what grows


@dataclass(frozen=True, kw_only=True)
class InferredArchitecture(Architecture):
    """A network that its own code builds and initialises; a subclass says how to call that code.

    Attributes:
        roles: pattern of names -> role, where shapes cannot tell.
        branch_ends: patterns of the modules that end a residual branch, which take its multiplier up where depths
            differ.
    """

    roles: dict[str, Any] | None = None
    branch_ends: tuple[str, ...] = ()

    inferred = True

    @property
    @abstractmethod
    def where(self) -> str:
        """What messages call its code, as model.path=my_module:build."""

    @property
    @abstractmethod
    def takes(self) -> frozenset[str]:
        """Which of BLOCK, OUTPUT and ATTENTION its code takes as arguments."""

    @abstractmethod
    def construct(self, size: Size, constants: Mapping[str, float]) -> nn.Module:
        """Call its code, which builds and initialises the network; whatever that raises comes through.

        Args:
            constants: the values of what it `takes`.
        """

    @abstractmethod
    def read(self, output: Any) -> Any:
        """The logits in what its network returns; anything else that it returned, where there are none."""

    @abstractmethod
    def remedy(self, constant: str) -> str:
        """What a user can do where a constant can be taken up by nothing."""

    def active(self, name: str) -> float:
        """The share of the tokens that a tensor computes, below 1 of an expert."""
        return 1.0

    @property
    def base(self) -> BaseShape:
        return BaseShape(self.width, self.depth, self.head_dim, self.heads, 4.0, self.context)

    def tensors(self, size: Size) -> Sequence[TensorSpec]:
        return self.known(size.vocab_size).tensors(size)

    def network(self, size: Size, multipliers: Multipliers) -> nn.Module:
        from mupsweep.models.observation import as_language_model, built

        return as_language_model(built(self, size, self._constants(size, multipliers)), self.read)

    def drawn(self, size: Size, multipliers: Multipliers, seed: int) -> nn.Module:
        """The network as its own code initialises it under a seed, on the CPU."""
        from mupsweep.models.observation import seeded

        with seeded(seed):
            return self.network(size, multipliers).train()

    def multipliers(self, size: Size, block: float, output: float, attention_power: float) -> Multipliers:
        known = self.known(size.vocab_size)
        if block != 1 and BLOCK not in self.takes:
            known.require(BLOCK, block)
        if output != 1 and OUTPUT not in self.takes:
            known.require(OUTPUT, output)
        scale = factor = known.attention.scale(size)
        if known.attention.lacks_power:
            factor *= size.width_ratio ** (attention_power + 0.5)
            if factor != scale and ATTENTION not in self.takes:
                known.require(ATTENTION, factor / scale)
        return Multipliers(
            block=block if BLOCK in self.takes else 1.0,
            output=output if OUTPUT in self.takes else 1.0,
            attention=factor if ATTENTION in self.takes else scale,
        )

    def features(self, size: Size) -> str:
        return f"{self.known(size.vocab_size).blocks}.{size.depth - 1}"

    def check(self, size: Size, vocab_size: int) -> None:
        from mupsweep.models.observation import check

        check(self, size, vocab_size)

    def remarks(self, size: Size) -> list[str]:
        return self.known(size.vocab_size).remarks()

    def known(self, vocab_size: int) -> Known:
        """What its networks show, kept for as long as this process lives."""
        key = json.dumps([asdict(self), self.content(), vocab_size], sort_keys=True, default=str)
        if key not in _KNOWN:
            _KNOWN[key] = Known.of(self, vocab_size)
        return _KNOWN[key]

    def _constants(self, size: Size, multipliers: Multipliers) -> dict[str, float]:
        values = {BLOCK: multipliers.block, OUTPUT: multipliers.output}
        if ATTENTION in self.takes and (scale := self.known(size.vocab_size).attention.scale(size)):
            values[ATTENTION] = multipliers.attention / scale
        return {name: values.get(name, 1.0) for name in self.takes}


@dataclass
class Known:
    """What networks of a model show: their shapes at two widths, how they start and where constants can be folded.

    Attributes:
        base, wide: the networks at the base and at another width, without values.
        starts: how the tensors of a family (`family`) start at the base.
        attention: its heads and their scale.
        refused: constant -> why its tensors cannot take it up, or "" where they can; as far as somebody asked.
        tables: the tensors of every size so far.
    """

    model: InferredArchitecture
    base_size: Size
    base: nn.Module
    wide: nn.Module
    starts: Mapping[str, Start]
    attention: Attention
    refused: dict[str, str] = field(default_factory=dict)
    tables: dict[Size, Sequence[TensorSpec]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: InferredArchitecture, vocab_size: int) -> Known:
        from mupsweep.models import observation

        base_size = model.base.scaled(1.0, 1.0, vocab_size)
        base = observation.outline(model, base_size)
        refusals = []
        for ratio in OTHER_WIDTHS:
            try:
                wide_size = model.base.scaled(ratio, 1.0, vocab_size)
                wide = observation.outline(model, wide_size)
                break
            except ConfigError as error:
                refusals.append(error)
        else:
            raise refusals[0]
        starts = observation.starts(model, base_size)
        return cls(model, base_size, base, wide, starts, observation.attention(model, base_size, wide_size))

    def tensors(self, size: Size) -> Sequence[TensorSpec]:
        """The tensors at a size, with the roles that shapes tell."""
        if size not in self.tables:
            self.tables[size] = self._tensors(size)
        return self.tables[size]

    def _tensors(self, size: Size) -> Sequence[TensorSpec]:
        from mupsweep.models.observation import outline

        network = outline(self.model, size)
        try:
            inferred = infer(network, self.base, self.wide, self.model.roles)
        except ConfigError as error:
            text = str(error).replace("delta_model and base_model", "its networks at two widths")
            text = re.sub(r"roles=\{'([^']*)': '(\w+)'\}", r"'model.roles={\1:\2}'", text)
            raise ConfigError(f"{self.model.where}: {text}") from error
        unknown = [p for p in self.model.roles or () if not any(fnmatchcase(t.name, p) for t in inferred)]
        if unknown:
            raise ConfigError(f"model.roles: the pattern {unknown[0]!r} fits no tensor, such as {inferred[0].name}")
        if not any(tensor.grows for tensor in inferred):
            raise ConfigError(f"{self.model.where}: no tensor is larger at twice the width, so it ignores the width")
        repeated = {tensor.depth_ratio for tensor in inferred} - {1.0} or {1.0}
        if repeated != {size.depth_ratio}:
            raise ConfigError(
                f"{self.model.where}: at {size.depth_ratio:g} times the depth it has {repeated.pop():g} times the "
                "numbered blocks, so no rule for depth fits: build as many blocks as the depth says"
            )
        first_name: dict[int, str] = {}
        return [self._spec(tensor, first_name.setdefault(id(tensor.parameter), tensor.name)) for tensor in inferred]

    def _spec(self, tensor: InferredTensor, storage: str) -> TensorSpec:
        """The inferred tensor as stored, with its start and what it takes up."""
        name, role, start = tensor.name, tensor.spec.role, self.starts[family(tensor.name)]
        return TensorSpec(
            name,
            tuple(tensor.parameter.shape),
            role,
            start.init,
            start.rms,
            decay=role.is_matrix,
            tied_to=None if storage == name else storage,
            repeats=tensor.spec.repeats,
            as_matrix=tensor.spec.dims,
            stacked=tensor.spec.stacked,
            fold=self._fold(name, role),
            active=self.model.active(name),
        )

    def _fold(self, name: str, role: Role) -> Fold | None:
        """The constant that a tensor takes up, where a size wants one."""
        module = name.rpartition(".")[0]
        if role is Role.OUTPUT and OUTPUT not in self.model.takes and not self._is_tied(name):
            return Fold.MULTIPLIER
        inside = role in (Role.HIDDEN, Role.HIDDEN_VECTOR)
        if inside and BLOCK not in self.model.takes and (self._ends_branch(module) or self._ends_branch(name)):
            return Fold.MULTIPLIER
        lacks_power = self.attention.lacks_power and ATTENTION not in self.model.takes
        if inside and lacks_power and QUERIES & {*module.rpartition(".")[2].split("_")}:
            return Fold.ATTENTION
        return None

    def _ends_branch(self, module: str) -> bool:
        is_numbered = any(part.isdecimal() for part in module.split("."))
        return is_numbered and any(fnmatchcase(module, pattern) for pattern in self.model.branch_ends)

    def _is_tied(self, name: str) -> bool:
        parameters = Network(self.base).parameters
        like = next((n for n in parameters if family(n) == family(name)), name)
        return sum(parameter is parameters[like] for parameter in parameters.values()) > 1

    @property
    def blocks(self) -> str:
        """The path of the list of blocks, of which there are as many as the depth says.

        Raises:
            ConfigError: there is none.
        """
        numbers = Network(self.base).numbers
        lists = [path for path, found in numbers.items() if len(found) == self.base_size.depth and "#" not in path]
        if not lists:
            raise ConfigError(
                f"{self.model.where}: no numbered list, such as nn.ModuleList, has as many blocks as the depth, "
                f"{self.base_size.depth}"
            )
        return min(lists, key=lambda path: (path.count("."), -sum(n.startswith(path) for n in self.starts)))

    def require(self, constant: str, value: float) -> None:
        """Refuse a size that wants a constant which the network does not have and its tensors cannot take up.

        Args:
            value: of the constant there.
        """
        from mupsweep.models.observation import why_not_folded

        if constant not in self.refused:
            folds = {t.name: t.fold for t in self.tensors(self.base_size)}
            self.refused[constant] = why_not_folded(self, constant, folds)
        if why := self.refused[constant]:
            raise ConfigError(
                f"{self.model.where}: the rule wants {MEANING[constant]} times {value:.6g}, and no tensor can take "
                f"that up: {why}; {self.model.remedy(constant)}"
            )

    def remarks(self) -> list[str]:
        notes = []
        specs = self.tensors(self.base_size)
        ends = [t.name for t in specs if t.fold is Fold.MULTIPLIER and t.role is not Role.OUTPUT]
        heads = [t.name for t in specs if t.fold is Fold.MULTIPLIER and t.role is Role.OUTPUT]
        queries = [t.name for t in specs if t.fold is Fold.ATTENTION]
        for names, what in (
            (heads, "multiplier on its logits"),
            (ends, "multiplier on its residual branches"),
            (queries, "attention scale of 1/d_head"),
        ):
            if names:
                members = ", ".join(dict.fromkeys(map(family, names)))
                notes.append(f"the model has no {what}; where a size wants one, it is folded into {members}")
        if self.attention.dims is None:
            notes.append(
                "no call of scaled_dot_product_attention was seen: where heads widen with the model, attention logits "
                "must be divided by d_head, not by its root, by the model itself"
            )
        drawn = [t.name for t in specs if t.init is Init.FIXED and t.role is Role.HIDDEN]
        if drawn:
            notes.append(f"{drawn[0]} starts at values that no seed changes: they stay as the model sets them")
        return notes


MEANING = {
    BLOCK: "its residual branches",
    OUTPUT: "its logits",
    ATTENTION: "its attention logits",
}
_KNOWN: dict[str, Known] = {}


def family(name: str) -> str:
    """The name of a tensor with every number as #."""
    return ".".join("#" if part.isdecimal() else part for part in without_wrappers(name).split("."))
