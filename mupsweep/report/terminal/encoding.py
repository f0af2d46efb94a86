"""Output in ASCII, for locales without more: each character that a view draws or writes has its nearest in ASCII."""

from __future__ import annotations

import codecs
import io
from collections.abc import Mapping

ERRORS, ERRORS_UTF8 = "mupsweep-nearest", "mupsweep-nearest-utf8"  # names of the error handlers
NEAREST = {
    "·": ".",
    "±": "+-",
    "×": "x",
    "…": ".",
    "–": "-",
    "≥": ">=",
    "≤": "<=",
    "•": "*",
    "│": "|",
    "┤": "+",
    "─": "-",
    "└": "+",
    "┬": "+",
    "━": "=",
    "╸": "=",
    "╺": "-",
}
UPPER, LOWER = 0x01 | 0x02 | 0x08 | 0x10, 0x04 | 0x40 | 0x20 | 0x80  # dots of the two halves of a braille character


def is_ascii(environment: Mapping[str, str]) -> bool:
    """Whether a locale is named that has ASCII alone; Python itself writes UTF-8 there, whatever the terminal shows."""
    named = next((value for key in ("LC_ALL", "LC_CTYPE", "LANG") if (value := environment.get(key))), "")
    return named in ("C", "POSIX")


def prepare(stream: object, environment: Mapping[str, str]) -> None:
    """Let a stream write the nearest ASCII of what it cannot encode, and of what views draw where the locale is ASCII.

    What a user called in other characters, such as a folder, keeps its name where the stream can encode it.
    """
    if not isinstance(stream, io.TextIOWrapper):  # a closed stdout is None
        return
    codecs.register_error(ERRORS, lambda error: _replace(error, utf8=False))
    codecs.register_error(ERRORS_UTF8, lambda error: _replace(error, utf8=True))
    if is_ascii(environment) and codecs.lookup(stream.encoding).name == "utf-8":
        stream.reconfigure(encoding="ascii", errors=ERRORS_UTF8)
    else:
        stream.reconfigure(errors=ERRORS)


def _replace(error: UnicodeError, utf8: bool) -> tuple[bytes, int]:
    """Replace what a stream cannot encode; where it is one of UTF-8, what no view draws stays."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    replaced = b""
    for index in range(error.start, error.end):
        character = error.object[index]
        dots = ord(character) - 0x2800
        if 0 < dots <= 0xFF:  # the dots of a braille character are in its upper half, its lower one or both
            nearest = ":" if dots & UPPER and dots & LOWER else "'" if dots & UPPER else "."
        elif character == "μ" and error.object[index + 1 : index + 2] == "P":
            nearest = "u"
        else:
            nearest = NEAREST.get(character)
        if nearest is not None:
            replaced += nearest.encode()
        else:
            replaced += character.encode(errors="replace") if utf8 else b"?"
    return replaced, error.end
