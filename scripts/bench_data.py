"""Tokens/s of preparing a corpus, against what one writes first: `make bench`.

The loop encodes one document after the other with tiktoken, appends the end of text and writes uint16, as nanoGPT's
prepare.py does in each of its processes. Both read the same parquet file; preparation also hashes every document for
the split, and flushes and digests its shards. Each turn is a process of its own, one side after the other.

With a tokenizer.json, a small one of bytes with Llama 3's pre-tokenization that is trained here, the other side is the
batch call of Hugging Face's tokenizers on all cores.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

DOCUMENTS, CHARACTERS = 20_000, 4_000  # a web page's length
JSON_SHARE = 10  # that package is so much slower, and reads this part of the documents
TURNS = 5


def write(path: Path, documents: int) -> None:
    """A parquet file of documents: sentences of the embedded corpus."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from mupsweep.data.config import DataConfig
    from mupsweep.data.sources.sotu import Sotu

    sentences = [s for text in Sotu(DataConfig()).documents() for s in re.split(r"(?<=[.;]) ", text)]
    endless = itertools.cycle(sentences)

    def texts() -> Iterator[str]:
        for _ in range(documents):
            taken, length = [], 0
            while length < CHARACTERS:
                taken.append(next(endless))
                length += len(taken[-1])
            yield " ".join(taken)

    pq.write_table(pa.table({"text": list(texts())}), path, row_group_size=1000)


def loop(path: Path, out: Path) -> tuple[int, float]:
    """(tokens, seconds) of the plain loop."""
    import numpy as np
    import tiktoken

    from mupsweep.data import tokenizers

    encoder = tiktoken.Encoding(
        "gpt2",
        pat_str=tokenizers.PATTERN,
        mergeable_ranks={piece: rank for rank, piece in enumerate(tokenizers.gpt2_pieces())},
        special_tokens={"<|endoftext|>": tokenizers.GPT2_VOCAB - 1},
    )
    tokens, begin = 0, time.perf_counter()
    with open(out / "train.bin", "wb") as file:
        for text in documents(path):
            ids = encoder.encode_ordinary(text)
            ids.append(encoder.eot_token)
            file.write(np.array(ids, dtype=np.uint16).tobytes())
            tokens += len(ids)
    return tokens, time.perf_counter() - begin


def library(path: Path, out: Path) -> tuple[int, float]:
    """(tokens, seconds) of the batch call of `tokenizers`."""
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path.with_name("tokenizer.json")))
    end = tokenizer.token_to_id("<|end_of_text|>")
    tokens, begin = 0, time.perf_counter()
    with open(out / "train.bin", "wb") as file:
        texts = documents(path)
        while batch := list(itertools.islice(texts, 1000)):
            for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                ids = [*encoding.ids, end]
                file.write(np.array(ids, dtype=np.uint16).tobytes())
                tokens += len(ids)
    return tokens, time.perf_counter() - begin


def train(path: Path) -> None:
    """A tokenizer.json of 4,096 ids beside the documents."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    split = pre_tokenizers.Split(Regex(words + r"|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
    tokenizer = Tokenizer(models.BPE())
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, in_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=4095, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(itertools.islice(documents(path), 500), trainer)
    tokenizer.add_special_tokens(["<|end_of_text|>"])
    tokenizer.save(str(path.with_name("tokenizer.json")))


def prepare_json(path: Path, out: Path) -> tuple[int, float]:
    """(tokens, seconds) of `mupsweep data prepare` with the tokenizer.json."""
    return prepare(path, out, str(path.with_name("tokenizer.json")))


def prepare(path: Path, out: Path, tokenizer: str = "gpt2") -> tuple[int, float]:
    """(tokens, seconds) of `mupsweep data prepare`."""
    from mupsweep import data
    from mupsweep.data import tokenizers
    from mupsweep.data.config import DataConfig

    tokenizers.load(tokenizer)
    kind = "mupsweep.data.sources.local.Local"
    config = DataConfig(name="bench", kind=kind, tokenizer=tokenizer, path=str(path), cache=str(out))
    begin = time.perf_counter()
    made = data.prepare(config)
    return len(made.train) + len(made.validation), time.perf_counter() - begin


def documents(path: Path) -> Iterator[str]:
    """The texts of the parquet file."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(1024, columns=["text"]):
            yield from batch.column(0).to_pylist()


SIDES = {"loop": loop, "prepare": prepare, "library": library, "prepare_json": prepare_json}


def turn(side: str, path: Path) -> float:
    """Tokens/s of one turn, in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--path", str(path)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    parser.add_argument("--side", choices=tuple(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.side:
            import pyarrow.parquet  # noqa: F401, neither side is asked to import it while the clock runs

            tokens, seconds = SIDES[options.side](options.path, Path(folder))
            print(tokens / seconds)
            return
        path = Path(folder) / "texts.parquet"
        write(path, options.documents)
        compare("gpt2", options.documents, path, "prepare", "loop", "a loop over tiktoken")
        write(path, options.documents // JSON_SHARE)
        train(path)
        compare(
            "a tokenizer.json", options.documents // JSON_SHARE, path, "prepare_json", "library", "encode_batch_fast"
        )


def compare(tokenizer: str, n_documents: int, path: Path, side: str, other_side: str, other_name: str) -> None:
    """Print the tokens/s of two sides, turn by turn."""
    turns = [(turn(side, path), turn(other_side, path)) for _ in range(TURNS)]
    ours, theirs = (statistics.median(side) for side in zip(*turns, strict=True))
    ratios = sorted(a / b for a, b in turns)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"\npreparation: {n_documents:,} documents of {CHARACTERS:,} characters, {tokenizer}, {cores} core(s)")
    print(f"  mupsweep data prepare     {ours / 1e6:.2f} M tokens/s")
    print(f"  {other_name:<25} {theirs / 1e6:.2f} M tokens/s")
    print(f"  ratio {statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]")


if __name__ == "__main__":
    main()
