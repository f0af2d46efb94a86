"""The data section of a config."""

from __future__ import annotations

from dataclasses import dataclass

from mupsweep.schema import one_of, require

HELD_OUT = ("hash", "nanogpt")


@dataclass(frozen=True)
class DataConfig:
    """A corpus and how it becomes tokens; `kind` names the class of the source (see `mupsweep/data`).

    `vocab_size` is set and stored for a tokenizer.json, so that a sweep can be read where that file is not.
    `hub_id` and all keys after it describe a data set on the Hugging Face hub; configs/data/_hub.yaml explains them.
    """

    name: str = "sotu"
    kind: str = "mupsweep.data.sources.sotu.Sotu"
    tokenizer: str = "gpt2-1024"
    end_of_text: str | None = None
    vocab_size: int | None = None
    path: str | None = None
    text_column: str = "text"
    validation_fraction: float = 0.05
    max_tokens: int | None = None
    cache: str | None = None
    hub_id: str | None = None
    hub_config: str | None = None
    revision: str | None = None
    data_files: tuple[str, ...] = ()
    split: str = "train"
    validation_split: str | None = None
    held_out: str = "hash"
    rows: int | None = None

    def __post_init__(self) -> None:
        require(
            0 < self.validation_fraction < 1,
            "data.validation_fraction",
            self.validation_fraction,
            "in (0, 1)",
        )
        require(self.max_tokens is None or self.max_tokens > 0, "data.max_tokens", self.max_tokens, "positive")
        require(self.vocab_size is None or self.vocab_size > 0, "data.vocab_size", self.vocab_size, "positive")
        require(self.rows is None or self.rows > 0, "data.rows", self.rows, "positive")
        one_of(self.held_out, HELD_OUT, "data.held_out")
