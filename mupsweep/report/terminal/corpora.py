"""The output of the data commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

from mupsweep import data
from mupsweep.data import cache, shards, sources
from mupsweep.data.config import DataConfig
from mupsweep.errors import DataError
from mupsweep.formatting import counted, si
from mupsweep.report.terminal.console import console_of, table_of
from mupsweep.sweep.config import load


def prepare_data(overrides: Sequence[str], config_dir: str | None) -> None:
    """Prepare the corpus of a config and print its size."""
    config = _config(overrides, config_dir)
    try:
        with progress() as report:
            corpus = data.prepare(config, report)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        raise
    print(
        f"{config.name}: {len(corpus.train):,} training and {len(corpus.validation):,} validation tokens, "
        f"{corpus.tokenizer}, content {corpus.content_id[:12]}"
    )


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A function that reports progress: on a terminal in one line that changes, elsewhere in a new line each time."""
    console = console_of()
    if not console.is_terminal:
        yield lambda line: print(line, flush=True)
        return
    with console.status("reading") as status:
        yield status.update


def show_prepared(overrides: Sequence[str], config_dir: str | None, as_json: bool) -> None:
    """Print the corpora of the cache, with the incomplete and damaged ones."""
    config = _config(overrides, config_dir)
    corpora = cache.entries(config)
    if as_json:
        print(json.dumps([asdict(entry) for entry in corpora]))
        return
    if not corpora:
        print(f"nothing is prepared in {cache.root(config)}; start with mupsweep data prepare")
        return
    table = table_of("name", "tokenizer", "tokens", "documents", "bytes", "content", "state")
    for entry in corpora:
        table.add_row(
            entry.name,
            entry.tokenizer,
            si(entry.train_tokens + entry.validation_tokens),
            si(entry.documents),
            si(entry.bytes),
            entry.content_id[:12],
            entry.state,
        )
    console_of().show(table)
    for entry in corpora:
        print(f"{entry.folder}: {si(entry.disk_bytes)}B on disk{_origin(entry)}")
    for entry in corpora:
        if entry.state in ADVICE:
            print(f"{entry.state}: {entry.folder}: {ADVICE[entry.state]}")


def _origin(entry: cache.Entry) -> str:
    """Where a corpus comes from, and how it is split where that is not by documents."""
    origin = f", of {entry.path}" if entry.path else ""
    return f"{origin}, the end of every document for validation" if entry.cuts_documents else origin


ADVICE = {
    cache.PARTIAL: "the command that prepared it goes on where it stopped",
    cache.DAMAGED: "delete the folder and prepare it again",
}


def verify_data(overrides: Sequence[str], config_dir: str | None) -> None:
    """Verify the shards of a config's corpus, and raise an error that names what is damaged."""
    config = _config(overrides, config_dir)
    source = sources.load(config)
    ready = source.ready_tokens()
    if ready is not None:
        files = {segment.path for segment in (*ready.train, *ready.validation)}
        print(f"{counted(len(files), 'token file')}, not encoded: headers and a sample of the ids are right")
        return
    folder = cache.folder(config, data.fingerprint(config))
    if not folder.exists():
        raise DataError(
            f"{config.name} with {config.tokenizer} is not prepared: {folder} is not there; "
            "run mupsweep data prepare with the same keys"
        )
    meta = shards.verify(folder)
    count = sum(len(meta["splits"][split]["shards"]) for split in shards.SPLITS)
    print(f"{folder}: {counted(count, 'shard')}, each with its digest")


def _config(overrides: Sequence[str], config_dir: str | None) -> DataConfig:
    return load(overrides, config_dir).variants[0].data
