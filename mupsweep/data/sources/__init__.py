"""Sources: where documents come from. A new source is one file here and one yaml in `configs/data/`.

`data.kind` names the class; it is constructed with the DataConfig. Documents are encoded and split by
`mupsweep.data.preparation`; a source that holds tokens already returns them from `ready_tokens` instead.
"""

from __future__ import annotations

import importlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from mupsweep.data.config import DataConfig
from mupsweep.errors import DataError

if TYPE_CHECKING:
    from mupsweep.data.streams import Segment


class Document(NamedTuple):
    """A text, and its split ("train", "validation") where the source decides that; None: its hash does."""

    text: str
    split: str | None = None


@dataclass(frozen=True)
class ReadyTokens:
    """Token files that are read as they are, in order."""

    train: tuple[Segment, ...]
    validation: tuple[Segment, ...]


class Reader(ABC):
    """Reads the documents of a source in order, and knows where it stands."""

    @abstractmethod
    def __iter__(self) -> Iterator[Document]:
        """The documents that are left."""

    @abstractmethod
    def position(self) -> Any:
        """Where the document after the last one given begins, for `Source.reader`; plain json."""


class Source(ABC):
    """A corpus. Subclasses raise DataError for what a user can cause."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """The documents, always in the same order; never the whole corpus in memory."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest that changes whenever the documents do; cheap, since every run asks for it."""

    def split(self, index: int) -> str | None:
        """The split of a document, by its place in `documents`; None where its hash decides."""
        return None

    def ready_tokens(self) -> ReadyTokens | None:
        """The tokens of a corpus that needs no encoding, with its split; None where there are documents."""
        return None

    def reader(self, position: Any = None) -> Reader:
        """The documents from `position` on; None is the beginning.

        This one reads again what lies before the position. A source that can jump has a reader of its own.
        """
        return _Counted(self, position or 0)

    def describe(self) -> dict[str, Any]:
        """What meta.json keeps of the source, beside its class and fingerprint."""
        return {}

    def rows(self) -> int | None:
        """How many documents there are, to show progress; None where nobody knows before the end."""
        return None


class _Counted(Reader):
    """Positions are numbers of documents."""

    def __init__(self, source: Source, skip: int) -> None:
        self._source, self._count = source, skip

    def __iter__(self) -> Iterator[Document]:
        for text in itertools.islice(self._source.documents(), self._count, None):
            self._count += 1
            yield Document(text, self._source.split(self._count - 1))

    def position(self) -> int:
        return self._count


def load(config: DataConfig) -> Source:
    """The source that `config.kind` names.

    Raises:
        DataError: it cannot be imported, or it refuses the config.
    """
    module, _, name = config.kind.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(
            f"data.kind={config.kind} cannot be imported ({error}): it names a source as "
            "package.module.Class, for example mupsweep.data.sources.local.Local"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Source)):
        raise DataError(
            f"data.kind={config.kind} is no data source: make it a subclass of mupsweep.data.sources.Source"
        )
    return cls(config)
