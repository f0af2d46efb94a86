"""A model of your own: a function of width and depth that returns a network from token ids to logits."""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from mupsweep.errors import ConfigError
from mupsweep.formatting import nearest
from mupsweep.models.inferred import ATTENTION, BLOCK, OUTPUT, InferredArchitecture
from mupsweep.models.shape import BaseShape, Size
from mupsweep.schema import import_object

if TYPE_CHECKING:
    from torch import nn

SHAPE = ("heads", "head_dim", "vocab_size", "context")  # of a size, beside width and depth
CONSTANTS = (OUTPUT, BLOCK, ATTENTION)
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True, kw_only=True)
class Own(InferredArchitecture):
    """A network that a function of the user's builds.

    Attributes:
        path: package.module:function. Its first two arguments are width and depth; of SHAPE and CONSTANTS it gets what
            it names.
        options: further arguments of it, the same at every size.
    """

    path: str | None = None
    options: dict[str, Any] | None = None

    imports: ClassVar[tuple[str, ...]] = ("path",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path is None:
            raise ConfigError("model.path=null: name your function of width and depth, as model.path=my_module:build")

    @property
    def where(self) -> str:
        return f"model.path={self.path}"

    @property
    def base(self) -> BaseShape:
        shape = super().base
        if {"heads", "head_dim"} & self._parameters.keys():
            return shape
        return BaseShape(self.width, self.depth, self.head_dim, 1, 4.0, self.context)  # any width will do

    @property
    def takes(self) -> frozenset[str]:
        return frozenset(CONSTANTS) & self._parameters.keys()

    def construct(self, size: Size, constants: Mapping[str, float]) -> nn.Module:
        given = {name: getattr(size, name) for name in SHAPE if name in self._parameters}
        with importable_folder():
            return self._build(size.width, size.depth, **{**given, **constants, **(self.options or {})})

    def read(self, output: Any) -> Any:
        if isinstance(output, tuple | list | dict) or hasattr(output, "logits"):
            raise ConfigError(f"{self.where}: its network returns a {type(output).__name__}: return the logits alone")
        return output

    def content(self) -> dict[str, Any]:
        return {"code": code_digest(sys.modules[self._build.__module__])}

    def remedy(self, constant: str) -> str:
        others = {
            OUTPUT: "choose parametrization.output=init",
            BLOCK: "name the ends of branches in model.branch_ends",
            ATTENTION: "hold head_dim fixed by an argument heads",
        }
        return f"give the function an argument {constant}, or {others[constant]} (configs/model/README.md)"

    @property
    def _build(self) -> Any:
        with importable_folder():
            function = import_object(str(self.path).replace(":", "."), "model.path", "your function of width and depth")
        if not callable(function) or not hasattr(function, "__module__"):
            raise ConfigError(f"{self.where} is no function: name one of width and depth, as my_module:build")
        return function

    @property
    def _parameters(self) -> dict[str, inspect.Parameter]:
        """What the function takes by name, beside width and depth."""
        try:
            _, _, *others = inspect.signature(self._build).parameters.values()
        except ValueError as error:
            raise ConfigError(
                f"{self.where}: expected a function whose first two arguments are width and depth"
            ) from error
        takes_any = any(p.kind is p.VAR_KEYWORD for p in others)
        parameters = {p.name: p for p in others if p.kind in NAMED}
        given = {*SHAPE, *CONSTANTS, *(self.options or {})}
        for p in parameters.values():
            if p.default is p.empty and p.name not in given:
                raise ConfigError(
                    f"{self.where} needs '{p.name}': it gets width, depth and, where it names them, "
                    f"{', '.join((*SHAPE, *CONSTANTS))}; give others a default, or model.options={{{p.name}:VALUE}}"
                )
        for key in self.options or ():
            if key not in parameters and not takes_any:
                raise ConfigError(f"model.options.{key}: {self.path} takes none; {nearest(key, parameters)}")
        return parameters


@contextmanager
def importable_folder() -> Iterator[None]:
    """Let modules of the working folder be imported, after all others of the same names."""
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.reverse()  # it is the last one of its name
        sys.path.remove(folder)
        sys.path.reverse()


def code_digest(module: ModuleType) -> str:
    """The digest of a module's text, and of those beside it that it uses."""
    file = _file(module)
    if file is None:
        raise ConfigError(
            f"{module.__name__} has no file: put the function into a module, whose text identifies its runs"
        )
    folder, texts, waiting = file.parent, dict[str, bytes](), [module]
    while waiting:
        used = waiting.pop()
        path = _file(used)
        if path is None or used.__name__ in texts or not path.is_relative_to(folder):
            continue
        texts[used.__name__] = path.read_bytes()
        names = {
            value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            for value in vars(used).values()
        }
        waiting += [sys.modules[name] for name in names if isinstance(name, str) and name in sys.modules]
    digest = hashlib.sha256()
    for name, text in sorted(texts.items()):
        digest.update(f"{name} {len(text)} ".encode() + text)
    return digest.hexdigest()[:16]


def _file(module: ModuleType) -> Path | None:
    """The file of a module's text, if it has one."""
    path = getattr(module, "__file__", None)
    return Path(path) if path and path.endswith(".py") and Path(path).is_file() else None
