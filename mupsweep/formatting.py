"""Numbers and words for people: SI units, durations, counts, and the nearest of several names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SI = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def si(value: float) -> str:
    """A number with three digits and an SI prefix: 1.23M, 4.5G."""
    for size, unit in SI:
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """A duration in its two largest units: 45s, 3m 20s, 2h 05m, 4d 03h."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m {s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h {s % 3600 // 60:02d}m"
    return f"{s // 86400}d {s % 86400 // 3600:02d}h"


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint that names the closest valid spelling first: `did you mean 'x'? valid: x, y, z`."""
    spelling = {choice.lower(): choice for choice in sorted(valid)}
    typed = name.lower().replace("μ", "mu").replace("µ", "mu")  # the Greek letter, and the micro sign of keyboards
    close = difflib.get_close_matches(typed, spelling, n=1, cutoff=0.5)
    guess = f"did you mean '{spelling[close[0]]}'? " if close else ""
    return f"{guess}valid: {', '.join(sorted(valid))}"


def counted(number: int, noun: str) -> str:
    """A number with its noun in the singular or plural: 1 run, 2 runs."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def verb(number: int, plural: str) -> str:
    """A verb in the singular or plural: 1 run needs, 2 runs need; 1 is, 2 are."""
    return {"are": "is"}.get(plural, f"{plural}s") if number == 1 else plural
