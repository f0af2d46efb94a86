"""The words behind the numbers of a report: each links to its explanation in the page, and shows it where it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape

WORDS = {  # id -> (pattern, what it is called, explanation)
    "drift": (r"\bdrift\b", "drift", "how far the best learning rate moves along the ladder, in octaves"),
    "octaves": (r"\boctaves?\b", "octave", "a factor of two in the learning rate"),
    "regret": (r"\bregret\b", "regret", "the loss that a size gives away by using the base's best rate, not its own"),
    "nats": (r"\bnats\b", "nat", "the unit of losses, per token; 1 nat is 1.44 bits"),
    "held-out": (
        r"\bheld out\b",
        "held out",
        "the largest size is forecast from the smaller ones as if it had not been trained, and compared with its runs",
    ),
    "fit-error": (
        r"\bE(?= [-+]?[\d.])",
        "E",
        "the distance of the best rates from a straight line over the sizes, in octaves; small means predictable "
        "(Kalra and Barkeshli, arXiv 2605.21486)",
    ),
    "kappa": (
        r"\bkappa\b",
        "kappa",
        "what missing the best rate by an octave costs grows as ratio^kappa: above zero, larger sizes forgive less "
        "(Kalra and Barkeshli, arXiv 2605.21486)",
    ),
    "asymptotic-loss": (
        r"\basymptotic loss\b",
        "asymptotic loss",
        "what the loss at the best rate tends to as the ladder goes on (Kalra and Barkeshli, arXiv 2605.21486)",
    ),
    "speed-up": (
        r"\bcompute-equivalent speed-up\b",
        "compute-equivalent speed-up",
        "how many times its compute the other variant would need, on a larger size, for a loss this low; below 1 the "
        "other one is cheaper (Qiu et al., arXiv 2512.05620)",
    ),
    "infinite-size": (
        r"\bextrapolated to infinite size\b",
        "extrapolated to infinite size",
        "the difference of the two asymptotic losses",
    ),
}
_ANY = re.compile("|".join(f"(?P<{key.replace('-', '_')}>{pattern})" for key, (pattern, _, _) in WORDS.items()))


def explained(line: str) -> str:
    """A line as HTML, in which every word of WORDS links to its explanation."""
    parts, end = [], 0
    for match in _ANY.finditer(line):
        key = str(match.lastgroup).replace("_", "-")
        parts.append(escape(line[end : match.start()]))
        title = escape(WORDS[key][2])
        parts.append(f'<a class="word" href="#word-{key}" title="{title}">{escape(match[0])}</a>')
        end = match.end()
    return "".join([*parts, escape(line[end:])])


def definitions() -> str:
    """The explanations, to which the words link."""

    def entries() -> Iterator[str]:
        for key, (_, name, explanation) in WORDS.items():
            yield f'<dt id="word-{key}">{escape(name)}</dt><dd>{escape(explanation)}</dd>'

    return f'<dl class="words">{"".join(entries())}</dl>'
