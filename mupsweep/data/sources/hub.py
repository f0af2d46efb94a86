"""Text data sets of the Hugging Face hub, streamed with the `datasets` library, so that only token shards are stored.

A data set is named by its id, a config, a commit and a split. The commit must be a full one: a branch may change, and a
plan must identify the text that a run reads without asking the hub. Rows are read in the order of the files.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mupsweep.data.config import DataConfig
from mupsweep.data.sources import Document, Reader, Source
from mupsweep.data.sources.hub_errors import hub_error, resolve_commit
from mupsweep.errors import DataError
from mupsweep.formatting import nearest

if TYPE_CHECKING:
    from datasets import IterableDataset

COMMIT = re.compile(r"[0-9a-f]{40}")
BATCH_ROWS = 256  # rows that are read at a time
RETRIES = 6  # of a read, each with its own retries: reading fails about three minutes after the hub goes away
NANOGPT_SHARE, NANOGPT_SEED = 0.0005, 2357  # train_test_split(test_size=0.0005, seed=2357, shuffle=True)


class Hub(Source):
    """The data set `data.hub_id`; a subclass may join several rows into a document."""

    format = 1  # version of the documents that rows become, part of the fingerprint

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        self._refuse_contradictions()
        if not COMMIT.fullmatch(config.revision or ""):
            raise DataError(self._revision_message())

    def fingerprint(self) -> str:
        """sha256 of the keys that decide which documents there are and which of them are held out."""
        config = self.config
        keys = [config.hub_id, config.hub_config, config.revision, config.data_files, config.text_column]
        splits = [config.split, config.validation_split, config.held_out]
        if config.held_out == "nanogpt":
            splits.append(str(config.rows))
        return hashlib.sha256(json.dumps([type(self).__name__, self.format, *keys, *splits]).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """The keys that name the data set."""
        names = ("hub_id", "hub_config", "revision", "data_files", "split", "validation_split", "held_out")
        return {name: getattr(self.config, name) for name in names}

    def rows(self) -> int | None:
        return self.config.rows

    def documents(self) -> Iterator[str]:
        """The documents that are not empty, those of a validation split first.

        Raises:
            DataError: the hub, the data set or its column cannot be read.
        """
        return (document.text for document in self.reader())

    def reader(self, position: Any = None) -> Reader:
        """A reader that seeks to the file in which `position` lies."""
        return _HubReader(self, position)

    def assembled(self, rows: Iterable[str], unfinished: list[str]) -> Iterator[str]:
        """The documents that the rows make up; `unfinished` holds the rows of a document that is still incomplete."""
        return iter(rows)

    def splits(self) -> list[tuple[str, str | None]]:
        """(split of the data set, our split) in the order of reading; our split is None where the hash decides."""
        validation_split = self.config.validation_split
        if validation_split is None:
            return [(self.config.split, None)]
        return [(validation_split, "validation"), (self.config.split, "train")]

    def held_out_rows(self) -> frozenset[int] | None:
        """The numbers of the rows that nanoGPT's split holds out; None where the hash decides.

        nanoGPT calls `Dataset.train_test_split`, which permutes the row numbers and takes the first ones as test split.
        So the number of rows suffices to repeat it.
        """
        if self.config.held_out != "nanogpt":
            return None
        import numpy as np

        rows = self.config.rows
        assert rows is not None
        order = np.random.default_rng(NANOGPT_SEED).permutation(rows)
        return frozenset(order[: math.ceil(NANOGPT_SHARE * rows)].tolist())

    def _refuse_contradictions(self) -> None:
        """Refuse keys that are missing or contradict each other."""
        config = self.config
        if config.hub_id is None:
            raise DataError(f"data={config.name} needs data.hub_id=ORGANISATION/NAME, a data set of the hub")
        if config.path is not None:
            raise DataError(
                f"data.path={config.path} is not read by data={config.name}: add data=local to train on your files"
            )
        if config.validation_split is not None and (config.data_files or config.held_out != "hash"):
            key = "data_files" if config.data_files else "held_out"
            raise DataError(
                f"data.validation_split={config.validation_split} and data.{key}={getattr(config, key)}: set the one "
                "to null, or leave the other out"
            )
        if config.held_out == "nanogpt" and (config.rows is None or config.max_tokens is not None):
            raise DataError(
                "data.held_out=nanogpt permutes the numbers of all rows (the rows stay on disk): set data.rows to how "
                f"many there are (now {config.rows}) and data.max_tokens=null (now {config.max_tokens})"
            )

    def _revision_message(self) -> str:
        """The message for a revision that is no full commit, with the commit to use where the hub can be reached."""
        config = self.config
        branch = config.revision or "main"
        problem = f"data.revision={config.revision} of {config.hub_id} is no full commit, so its text may change: "
        try:
            return f"{problem}set data.revision={resolve_commit(config, branch)}, which is {branch} now"
        except DataError as error:
            return f"{problem}set the 40 digits that the set's history on the hub shows (asking failed: {error})"


def _checked(position: Any, start: Mapping[str, Any]) -> dict[str, Any]:
    """A stored position.

    Args:
        start: the position of the first row, whose values have the types that every position's have.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(position, dict) or not position.keys() <= start.keys():
        raise ValueError("no position of a data set")
    for key, value in position.items():
        types = (dict, type(None)) if key == "state" else (type(start[key]),)
        if type(value) not in types or (isinstance(value, int) and value < 0):
            raise ValueError(f"no position of a data set: {key}={value!r:.80}")
    if not all(isinstance(row, str) for row in position.get("unfinished", ())):
        raise ValueError("no position of a data set: unfinished")
    return position


class _HubReader(Reader):
    """Reads the rows of a data set with `datasets`, and can resume at any of them.

    A position is a dict, stored in checkpoints:
        split: number of the split that is being read.
        row: number of rows of the split that were read.
        skipped: rows of the split that are skipped when it is opened, where there is no state to resume from.
        state: the state of the `datasets` iterator before the current batch of rows, or None.
        done: number of rows of the current batch that were read.
        unfinished: rows of a document that is still incomplete.
        library: version of `datasets` that wrote the state.
    """

    def __init__(self, source: Hub, position: Any) -> None:
        self._source, self._config = source, source.config
        self._datasets = _import_datasets()
        resolve_commit(self._config, str(self._config.revision))  # fails fast, where the library retries for minutes
        self._columns: list[str] = []
        start = {"split": 0, "row": 0, "skipped": 0, "state": None, "done": 0, "unfinished": [], "library": ""}
        self._position: dict[str, Any] = start | _checked(position or {}, start)
        version = self._datasets.__version__
        if self._position["library"] != version:  # the format of a state may differ between versions
            self._position |= {"skipped": self._position["row"], "state": None, "done": 0, "library": version}

    def position(self) -> dict[str, Any]:
        return {**self._position, "unfinished": list(self._position["unfinished"])}

    def __iter__(self) -> Iterator[Document]:
        held_out, position = self._source.held_out_rows(), self._position
        splits = self._source.splits()
        for index in range(position["split"], len(splits)):
            name, our_split = splits[index]
            for text in self._source.assembled(self._rows(name), position["unfinished"]):
                if held_out is not None:
                    our_split = "validation" if position["row"] - 1 in held_out else "train"
                if text:
                    yield Document(text, our_split)
            self._check_rows(name, position["row"])
            position |= {"split": index + 1, "row": 0, "skipped": 0, "state": None, "done": 0}

    def _rows(self, split: str) -> Iterator[str]:
        """The texts of the remaining rows of a split; null reads as an empty text."""
        position, column = self._position, self._config.text_column
        try:
            dataset = self._open(split)
            if position["state"] is not None:
                dataset.load_state_dict(position["state"])
            done = position["done"]
            tables: Any = dataset.iter(batch_size=BATCH_ROWS)
            for table in tables:
                if column not in table.column_names:
                    raise self._column_error("there is no such column", table.column_names)
                for text in table[column].to_pylist()[done:]:
                    if text is not None and not isinstance(text, str):
                        raise self._column_error(f"it is {type(text).__name__}, not text", table.column_names)
                    position["done"] += 1
                    position["row"] += 1
                    yield text or ""
                position["state"], position["done"], done = dataset.state_dict(), 0, 0
        except DataError:
            raise
        except Exception as error:
            raise hub_error(error, self._config) from error

    def _open(self, split: str) -> IterableDataset:
        """A stream of the text column of a split, after the rows to skip."""
        config, column = self._config, self._config.text_column
        files = {split: list(config.data_files)} if config.data_files else None
        dataset = self._datasets.load_dataset(
            config.hub_id,
            name=config.hub_config,
            split=split,
            revision=config.revision,
            data_files=files,
            streaming=True,
        )
        if files is None and split in (dataset.info.splits or {}):
            self._check_rows(split, dataset.info.splits[split].num_examples)
        self._columns = dataset.column_names or []
        if column in self._columns:  # the columns of json files are unknown before they are read
            dataset = dataset.select_columns([column])
        if self._position["skipped"]:
            dataset = dataset.skip(self._position["skipped"])
        return dataset.with_format("arrow")

    def _column_error(self, what: str, columns: list[str]) -> DataError:
        """The error for a text column that cannot be used, with the nearest name of another column."""
        others = [name for name in self._columns or columns if name != self._config.text_column]
        return DataError(
            f"data.text_column={self._config.text_column} of {self._config.hub_id}: {what}; "
            f"{nearest(self._config.text_column, others)}"
        )

    def _check_rows(self, split: str, rows: int) -> None:
        """Refuse a wrong `data.rows`, which would give another split than nanoGPT's."""
        config = self._config
        if config.held_out == "nanogpt" and rows != config.rows:
            raise DataError(
                f"data.rows={config.rows}, but split {split} of {config.hub_id} has {rows}: set data.rows={rows} and "
                "prepare it again"
            )


def _import_datasets() -> Any:
    """The `datasets` package with bounded retries and without progress bars; its warnings report retries."""
    try:
        import datasets
        import datasets.config
    except ImportError as error:
        raise DataError(f"data sets of the hub need the package datasets ({error}): pip install datasets") from error
    datasets.utils.logging.disable_progress_bar()
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = RETRIES
    return datasets
