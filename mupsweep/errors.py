"""The errors a user can cause, and words that messages share. The command line prints each error in one line and exits
with its code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MupsweepError(Exception):
    """A mistake outside this program: says what, where, the valid values and what to do next."""

    exit_code = 2


class ConfigError(MupsweepError):
    """A config, an override or a command-line argument that cannot be used."""


class DataError(MupsweepError):
    """A corpus, tokenizer or token shard that is missing, unreadable or not what it claims to be."""


class RecordError(MupsweepError):
    """A sweep folder that is missing, unwritable or holds something else than the command needs."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint that names the closest valid spelling first: `did you mean 'x'? valid: x, y, z`."""
    spelt = {one.lower(): one for one in sorted(valid)}
    typed = name.lower().replace("μ", "mu").replace("µ", "mu")  # the Greek letter, and the micro sign of keyboards
    close = difflib.get_close_matches(typed, spelt, n=1, cutoff=0.5)
    guess = f"did you mean '{spelt[close[0]]}'? " if close else ""
    return f"{guess}valid: {', '.join(sorted(valid))}"


def counted(number: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
