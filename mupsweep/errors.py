"""The errors a user can cause, and words that messages share. The command line prints each error in one line and exits
with its code."""

from __future__ import annotations


class MupsweepError(Exception):
    """A mistake outside this program: says what, where, the valid values and what to do next."""

    exit_code = 2


class ConfigError(MupsweepError):
    """A config, an override or a command-line argument that cannot be used."""


class DataError(MupsweepError):
    """A corpus, tokenizer or token shard that is missing, unreadable or not what it claims to be."""


class RecordError(MupsweepError):
    """A sweep folder that is missing, unwritable or holds something else than the command needs."""
