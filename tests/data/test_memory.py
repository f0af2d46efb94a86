"""Memory: a million documents take no more than the first hundred thousand, streamed from a loopback hub or made up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hub import OPENWEBTEXT_COMMIT, Hub, write_card, write_parquet

DOCUMENTS, FILES = 1_000_000, 4
GROWTH_MB = 24  # a few batches in flight more or less; all tokens are 100 MB, all text is 240 MB
PROBE = """
import json, os, sys
from mupsweep import data
from mupsweep.data import preparation
from mupsweep.data.sources import Source
from mupsweep.sweep import config

preparation.REPORT_SECONDS = 0
seen = []

class Words(Source):
    def documents(self):
        for i in range(1_000_000):
            yield f"document {i} holds a few words of its own, among them {i * i} and {i % 977}. " * 3

    def fingerprint(self):
        return "a million"

def say(line):
    if line.startswith("encoding"):
        pages = int(open("/proc/self/statm").read().split()[1])
        seen.append((int(line.split(" documents")[0].split()[-1].replace(",", "")), pages * os.sysconf("SC_PAGE_SIZE")))

data.prepare(config.load(sys.argv[1:]).variants[0].data, say)
print(json.dumps(seen))
"""


def text(i: int) -> str:
    return f"document {i} holds a few words of its own, among them {i * i} and {i % 977}. " * 3


def growth(overrides: Sequence[str], folder: Path, **environment: str) -> float:
    """MB that the process grows between its first tenth and its end."""
    (folder / "probe.py").write_text(PROBE)
    done = subprocess.run(
        [sys.executable, str(folder / "probe.py"), f"data.cache={folder / 'cache'}", *overrides],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    early = max(size for documents, size in seen if documents <= DOCUMENTS // 10)
    late = max(size for documents, size in seen if documents > DOCUMENTS // 10)
    assert max(documents for documents, _ in seen) > DOCUMENTS * 0.95
    return (late - early) / 1e6


@pytest.mark.slow
def test_a_million_documents_are_encoded_in_constant_memory(tmp_path: Path) -> None:
    overrides = ["data.kind=__main__.Words", "allow_imports=true", "data.tokenizer=gpt2"]
    assert growth(overrides, tmp_path) < GROWTH_MB


@pytest.mark.slow
def test_a_million_documents_are_streamed_in_constant_memory(tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "Skylion007" / "openwebtext"
    for i in range(FILES):
        texts = [text(n) for n in range(DOCUMENTS * i // FILES, DOCUMENTS * (i + 1) // FILES)]
        write_parquet(folder / f"plain_text/train-{i:05d}-of-{FILES:05d}.parquet", {"text": texts}, 1000)
    write_card(folder, {"plain_text": {"train": "plain_text/train-*"}}, default="plain_text")
    with Hub(tmp_path / "hub") as hub:
        assert hub.repositories["Skylion007/openwebtext"].commit == OPENWEBTEXT_COMMIT
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        assert growth(["data=openwebtext"], tmp_path, **environment) < GROWTH_MB
