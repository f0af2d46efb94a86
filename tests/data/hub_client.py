"""A process that works with a hub: commands as lines of json in, answers as lines of json out.

The hub's libraries read HF_ENDPOINT, HF_HUB_OFFLINE and HF_HOME when they are imported, so that another hub needs
another process; one process does many commands, for they take seconds to import.

    {"cli": [word, ...]}           a mupsweep command: {"code", "out", "err"}
    {"read": [word, ...]}          the documents of a config, and whether every position goes on with the right ones
    {"go_on": [position, word...]} the documents from a position on, each with how many rows were skipped for it
    {"literal": [set, ...]}        the calls that the sets' documentation gives: rows of each split
    {"held_out": [n, ...]}         rows that `train_test_split` holds out, as nanoGPT calls it, and ours
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from mupsweep import cli
from mupsweep.data import preparation, sources
from mupsweep.data.config import DataConfig
from mupsweep.data.sources import hub
from mupsweep.sweep import config

LITERAL = {
    "fineweb": (("HuggingFaceFW/fineweb",), {"name": "sample-10BT", "split": "train", "streaming": True}),
    "openwebtext": (("Skylion007/openwebtext",), {"split": "train", "streaming": True}),
    "wikitext103": (("Salesforce/wikitext", "wikitext-103-raw-v1"), {"streaming": True}),
}


def run_cli(overrides: list[str]) -> dict[str, Any]:
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["mupsweep", *overrides]
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def read(overrides: list[str]) -> dict[str, Any]:
    source = sources.load(config.load(overrides).variants[0].data)
    reader = source.reader()
    found, positions = [], [json.dumps(reader.position())]
    for document in reader:
        found.append(tuple(document))
        positions.append(json.dumps(reader.position()))
    wrong = [
        i
        for i, position in enumerate(positions)
        if [tuple(document) for document in source.reader(json.loads(position))] != found[i:]
    ]
    return {"documents": found, "wrong": wrong, "position": json.loads(positions[-2])}


def go_on(arguments: list[Any]) -> list[Any]:
    position, *overrides = arguments
    reader = sources.load(config.load(overrides).variants[0].data).reader(position)
    return [[document.text, reader.position()["skipped"]] for document in reader]


def literal(names: list[str]) -> dict[str, Any]:
    from datasets import load_dataset

    found = {}
    for name in names:
        overrides, keys = LITERAL[name]
        dataset = load_dataset(*overrides, **keys)
        splits = dataset if isinstance(dataset, dict) else {"train": dataset}
        found[name] = {split: [row["text"] for row in rows] for split, rows in splits.items()}
    return found


def held_out(counts: list[int]) -> dict[str, Any]:
    from datasets import Dataset

    found = {}
    for n in counts:
        split = Dataset.from_dict({"n": range(n)}).train_test_split(test_size=0.0005, seed=2357, shuffle=True)
        settings = DataConfig(hub_id="a/b", revision="0" * 40, held_out="nanogpt", rows=n)
        found[str(n)] = [sorted(split["test"]["n"]), sorted(hub.Hub(settings).held_out_rows() or [])]
    return found


COMMANDS: dict[str, Callable[[list[Any]], Any]] = {
    "cli": run_cli,
    "read": read,
    "go_on": go_on,
    "literal": literal,
    "held_out": held_out,
}


def main() -> None:
    """Small batches and a checkpoint after each; the libraries retry without waiting."""
    if os.environ.get("WITHOUT_DATASETS"):
        sys.modules["datasets"] = None  # type: ignore[assignment]
    preparation.BATCH_CHARACTERS = 1_000
    preparation.CHECKPOINT_SECONDS = 0
    hub.BATCH_ROWS = 16
    if os.environ.get("IMPATIENT"):
        import datasets
        import huggingface_hub.utils._http as http

        http.time = SimpleNamespace(sleep=lambda seconds: None)
        datasets.config.STREAMING_READ_RETRY_INTERVAL = 0
        datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0
    answers = sys.stdout
    for line in sys.stdin:
        ((name, argument),) = json.loads(line).items()
        print(json.dumps(COMMANDS[name](argument)), file=answers, flush=True)


if __name__ == "__main__":
    main()
