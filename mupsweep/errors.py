"""The errors that a user can cause. The command line prints each of them in one line and exits with its code."""

from __future__ import annotations


class MupsweepError(Exception):
    """A mistake outside this program; the message says what, where, the valid values and what to do next."""

    exit_code = 2


def reason(error: Exception) -> str:
    """What an error of a library says, in one line; of a file, without its name, which the message around it holds."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())


def visible(text: str) -> str:
    """Text with its control characters spelled out, which a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


class ConfigError(MupsweepError):
    """A config, an override or a command-line argument that cannot be used."""


class DataError(MupsweepError):
    """A corpus, tokenizer or token shard that is missing, unreadable or damaged."""


class RecordError(MupsweepError):
    """A sweep folder that is missing, unwritable, or does not hold what the command needs."""
