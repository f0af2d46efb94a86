"""Sources of documents. A new source is one file in this folder and one yaml in `configs/data/`.

`data.kind` names the class of a source, which is constructed with the DataConfig. `mupsweep.data.preparation` encodes
and splits the documents; a source that holds tokens already returns them from `ready_tokens` instead.
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
    """A text and its split, "train" or "validation"; None where the hash of the text decides the split."""

    text: str
    split: str | None = None


@dataclass(frozen=True)
class ReadyTokens:
    """Token files that are read as they are, in order."""

    train: tuple[Segment, ...]
    validation: tuple[Segment, ...]


class Reader(ABC):
    """Reads the documents of a source in order and keeps its position."""

    @abstractmethod
    def __iter__(self) -> Iterator[Document]:
        """The remaining documents."""

    @abstractmethod
    def position(self) -> Any:
        """The position after the last document that was yielded, as plain json for `Source.reader`."""


class Source(ABC):
    """A corpus of documents; subclasses raise DataError for the errors that a user can cause."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """The documents, always in one order and without holding the whole corpus in memory."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest that changes whenever the documents do; cheap, since every run asks for it."""

    def split(self, index: int) -> str | None:
        """The split of the document with number `index` in `documents`; None where the hash of its text decides."""
        return None

    def ready_tokens(self) -> ReadyTokens | None:
        """The tokens of a corpus that needs no encoding, with their split; None where the corpus holds documents."""
        return None

    def reader(self, position: Any = None) -> Reader:
        """A reader of the documents from `position` on; None is the beginning.

        This default reads the documents before the position again. A source that can seek overrides it.

        Raises:
            ValueError: this is no position of such a reader; a disk may have damaged where it was stored.
        """
        return _CountingReader(self, position or 0)

    def describe(self) -> dict[str, Any]:
        """Keys that meta.json stores of the source beside its class and fingerprint."""
        return {}

    def rows(self) -> int | None:
        """The number of documents, to report progress; None where it is unknown before the end."""
        return None


class _CountingReader(Reader):
    """A reader whose position is the number of documents that were yielded."""

    def __init__(self, source: Source, skip: int) -> None:
        if type(skip) is not int or skip < 0:
            raise ValueError(f"no number of documents: {skip!r:.80}")
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
        DataError: the class cannot be imported, or it refuses the config.
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
