"""Write the generated blocks of the documentation anew, or with --check fail where one is out of date.

A block is a comment that holds a command, followed by a fenced text block with what the command prints:

    <!-- $ mupsweep --help -->
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "mupsweep").rglob("*.md")), *sorted((ROOT / "configs").rglob("*.md"))]
BLOCK = re.compile(r"<!-- \$ (?P<command>.+?) -->\n```text\n.*?```", re.DOTALL)


def generated(text: str) -> str:
    """A document with every block replaced by what its command prints now."""
    return BLOCK.sub(lambda match: f"<!-- $ {match['command']} -->\n```text\n{output(match['command'])}```", text)


def output(command: str) -> str:
    """What a mupsweep command prints in a terminal of 100 columns."""
    words = shlex.split(command)
    assert words[0] == "mupsweep", command
    done = subprocess.run(
        [sys.executable, "-m", "mupsweep", *words[1:]],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "100", "TERM": "dumb"},
    )
    return "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines()) + "\n"


def main() -> None:
    for document in DOCUMENTS:
        old = document.read_text()
        new = generated(old)
        if "--check" not in sys.argv:
            document.write_text(new)
        elif old != new:
            sys.exit(f"{document.relative_to(ROOT)} is out of date: run `make docs` and commit what it changes")


if __name__ == "__main__":
    main()
