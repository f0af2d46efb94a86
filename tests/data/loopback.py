"""The sets that the tests' loopback hub serves, and processes that work with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hub import digest

TEXTS = [f"Document {i}. " + f"It says {i % 7} things, for example Ünïcode. " * (5 + i % 11) for i in range(60)]
ARTICLES = [
    " \n = Äpfel = \n \n A fruit . \n \n = = History = = \n \n Long . \n \n = = = Early = = = \n \n Old . \n \n",
    " = Bread , and = butter = \n \n Food . \n = in the middle of a list = \n more \n \n",
    *(f" = Article {i} = \n \n Text {i} , \n \n" + " more of it , \n" * (i + 20) + " \n" for i in range(30)),
]
VALIDATION = [" \n = Held = \n \n out . \n \n", " = Also held = \n \n out . \n \n"]
TOKEN = "hf_" + "secret" * 5


class Client:
    """A process of hub_client.py; commands go in, answers come out."""

    def __init__(self, home: Path, endpoint: str, **environment: str) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("hub_client.py"))],
            env={
                **{k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")},
                "HF_ENDPOINT": endpoint,
                "HF_HOME": str(home),
                "USE_TORCH": "0",
                **environment,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, **command: list[Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise EOFError(self.process.communicate()[1])
        return json.loads(line)

    def prepare(self, *overrides: str) -> dict[str, Any]:
        return self(cli=["data", "prepare", *overrides])

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def own(name: str, *overrides: str) -> list[str]:
    """A set of the loopback hub through the config of a plain one."""
    return [
        "data=openwebtext",
        f"data.hub_id={name}",
        "data.hub_config=null",
        f"data.revision={digest(name)}",
        *overrides,
    ]
