"""Text data sets of the Hugging Face hub, streamed with the `datasets` library: nothing but the shards is stored.

A set is named by its id, a config, a commit and a split. Only a full commit is taken: what a branch holds changes, and
a plan must be able to say which text a run reads without asking the hub. Rows are read in the order of the files.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from mupsweep.data.config import DataConfig
from mupsweep.data.sources import Document, Reader, Source
from mupsweep.data.sources.hub_errors import asked, explained
from mupsweep.errors import DataError
from mupsweep.formatting import nearest

if TYPE_CHECKING:
    from datasets import IterableDataset

COMMIT = re.compile(r"[0-9a-f]{40}")
ROWS = 256  # read at a time
RETRIES = 6  # of a read, each with retries of its own: a hub that goes away is given up after about three minutes
NANOGPT_SHARE, NANOGPT_SEED = 0.0005, 2357  # train_test_split(test_size=0.0005, seed=2357, shuffle=True)


class Hub(Source):
    """The set `data.hub_id`; a subclass may put several rows together into a document."""

    format = 1  # of the documents: goes into the fingerprint

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        self._refuse_contradictions()
        if not COMMIT.fullmatch(config.revision or ""):
            raise DataError(self._no_commit())

    def fingerprint(self) -> str:
        """sha256 of all that says which documents there are and which of them are held out."""
        config = self.config
        keys = [config.hub_id, config.hub_config, config.revision, config.data_files, config.text_column]
        splits = [config.split, config.validation_split, config.held_out]
        if config.held_out == "nanogpt":
            splits.append(str(config.rows))
        return hashlib.sha256(json.dumps([type(self).__name__, self.format, *keys, *splits]).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """The keys that name the set."""
        names = ("hub_id", "hub_config", "revision", "data_files", "split", "validation_split", "held_out")
        return {name: getattr(self.config, name) for name in names}

    def rows(self) -> int | None:
        return self.config.rows

    def documents(self) -> Iterator[str]:
        """The documents that are not empty, those of a validation split first.

        Raises:
            DataError: the hub, the set or its column cannot be read.
        """
        return (document.text for document in self.reader())

    def reader(self, position: Any = None) -> Reader:
        """A reader that jumps to the file in which `position` lies."""
        return _HubReader(self, position)

    def assembled(self, rows: Iterable[str], unfinished: list[str]) -> Iterator[str]:
        """Rows -> documents. `unfinished` keeps the rows of the document that is not complete yet."""
        return iter(rows)

    def splits(self) -> list[tuple[str, str | None]]:
        """(split of the set, what its documents are for) in the order of reading; None: held out by hash."""
        own = self.config.validation_split
        if own is None:
            return [(self.config.split, None)]
        return [(own, "validation"), (self.config.split, "train")]

    def held_out_rows(self) -> frozenset[int] | None:
        """The rows that nanoGPT's split holds out; None where the hash decides.

        nanoGPT calls `Dataset.train_test_split`, which permutes the numbers of the rows and takes the first as test
        split. Only numbers are permuted: it needs to know how many rows there are, not the rows.
        """
        if self.config.held_out != "nanogpt":
            return None
        import numpy as np

        rows = self.config.rows
        assert rows is not None
        order = np.random.default_rng(NANOGPT_SEED).permutation(rows)
        return frozenset(order[: math.ceil(NANOGPT_SHARE * rows)].tolist())

    def _refuse_contradictions(self) -> None:
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

    def _no_commit(self) -> str:
        """What to set `data.revision` to, from the hub where it can be asked."""
        config = self.config
        branch = config.revision or "main"
        start = f"data.revision={config.revision} of {config.hub_id} is no full commit, so its text may change: "
        try:
            return f"{start}set data.revision={asked(config, branch)}, which is {branch} now"
        except DataError as error:
            return f"{start}set the 40 digits that the set's history on the hub shows (asking failed: {error})"


class _HubReader(Reader):
    """Positions are a split, the state of `datasets` before some rows, how many of them are done, and open rows."""

    def __init__(self, source: Hub, position: Any) -> None:
        self._source, self._config = source, source.config
        self._datasets = _library()
        asked(self._config, str(self._config.revision))  # is the hub there? the library would try for minutes
        self._columns: list[str] = []
        self._at = {"split": 0, "row": 0, "skipped": 0, "state": None, "done": 0, "unfinished": [], "library": ""}
        if position is not None:
            self._at |= position
        if self._at["library"] != self._datasets.__version__:  # another version may write its state otherwise
            self._at |= {"skipped": self._at["row"], "state": None, "done": 0, "library": self._datasets.__version__}

    def position(self) -> dict[str, Any]:
        return {**self._at, "unfinished": list(self._at["unfinished"])}

    def __iter__(self) -> Iterator[Document]:
        held_out, at = self._source.held_out_rows(), self._at
        splits = self._source.splits()
        for index in range(at["split"], len(splits)):
            name, purpose = splits[index]
            for text in self._source.assembled(self._rows(name), at["unfinished"]):
                if held_out is not None:
                    purpose = "validation" if at["row"] - 1 in held_out else "train"
                if text:
                    yield Document(text, purpose)
            self._check_rows(name, at["row"])
            at |= {"split": index + 1, "row": 0, "skipped": 0, "state": None, "done": 0}

    def _rows(self, split: str) -> Iterator[str]:
        """The texts of the rows that are left; null reads as empty."""
        at, column = self._at, self._config.text_column
        try:
            dataset = self._open(split)
            if at["state"] is not None:
                dataset.load_state_dict(at["state"])
            done = at["done"]
            tables: Any = dataset.iter(batch_size=ROWS)
            for table in tables:
                if column not in table.column_names:
                    raise self._column_error("there is no such column", table.column_names)
                for text in table[column].to_pylist()[done:]:
                    if text is not None and not isinstance(text, str):
                        raise self._column_error(f"it is {type(text).__name__}, not text", table.column_names)
                    at["done"] += 1
                    at["row"] += 1
                    yield text or ""
                at["state"], at["done"], done = dataset.state_dict(), 0, 0
        except DataError:
            raise
        except Exception as error:
            raise explained(error, self._config) from error

    def _open(self, split: str) -> IterableDataset:
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
        if column in self._columns:  # a set of json files does not know its columns before it is read
            dataset = dataset.select_columns([column])
        if self._at["skipped"]:
            dataset = dataset.skip(self._at["skipped"])
        return dataset.with_format("arrow")

    def _column_error(self, what: str, columns: list[str]) -> DataError:
        others = [name for name in self._columns or columns if name != self._config.text_column]
        return DataError(
            f"data.text_column={self._config.text_column} of {self._config.hub_id}: {what}; "
            f"{nearest(self._config.text_column, others)}"
        )

    def _check_rows(self, split: str, rows: int) -> None:
        """A wrong number of rows gives another split than nanoGPT's."""
        config = self._config
        if config.held_out == "nanogpt" and rows != config.rows:
            raise DataError(
                f"data.rows={config.rows}, but split {split} of {config.hub_id} has {rows}: set data.rows={rows} and "
                "prepare it again"
            )


def _library() -> Any:
    """The `datasets` package; its warnings tell of retries, its progress bars nothing."""
    try:
        import datasets
        import datasets.config
    except ImportError as error:
        raise DataError(f"data sets of the hub need the package datasets ({error}): pip install datasets") from error
    datasets.utils.logging.disable_progress_bar()
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = RETRIES
    return datasets
