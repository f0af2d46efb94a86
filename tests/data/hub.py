"""A Hugging Face hub on 127.0.0.1, with the shipped data sets in the layouts that the real hub has.

`Hub` serves the folders ORGANISATION/NAME of a root: the part of the hub's HTTP interface that `load_dataset` uses,
with ranges, commits and the hub's own error codes. `write_*` make the sets out of any texts. By hand:

    python tests/data/hub.py FOLDER        prints the HF_ENDPOINT to set, and serves until it is stopped
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

# The commits that configs/data pins.
OPENWEBTEXT_COMMIT = "79d93d786212f7344586290adb811d4ae6a1762c"
FINEWEB_COMMIT = "9bb295ddab0e05d785b879661af7260fed5140fc"
WIKITEXT_COMMIT = "b08601e04326c79dfdd32d625aee71d232d685c3"
API = re.compile(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?")
RESOLVE = re.compile(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repository:
    """A data set as the hub holds it; `refs` are names of its commit."""

    folder: Path
    commit: str
    refs: set[str] = field(default_factory=lambda: {"main"})
    gated: bool = False

    def files(self) -> dict[str, Path]:
        return {p.relative_to(self.folder).as_posix(): p for p in sorted(self.folder.rglob("*")) if p.is_file()}

    def entries(self, under: str, recursive: bool) -> list[dict[str, Any]]:
        """The rows of a tree listing."""
        rows: dict[str, dict[str, Any]] = {}
        prefix = f"{under}/" if under else ""
        for name, path in self.files().items():
            if not name.startswith(prefix):
                continue
            parents = [name[: m.start()] for m in re.finditer("/", name) if m.start() > len(prefix)]
            for parent in parents[: None if recursive else 1]:
                rows[parent] = {"type": "directory", "path": parent, "oid": digest(parent), "size": 0}
            if recursive or not parents:
                rows[name] = self.entry(name, path)
        return list(rows.values())

    def entry(self, name: str, path: Path) -> dict[str, Any]:
        size = path.stat().st_size
        return {"type": "file", "path": name, "oid": digest(f"{self.commit} {name}"), "size": size}


class Hub:
    """Serves `root` from construction to `close`; a context manager. `requests` are the paths asked for so far."""

    def __init__(self, root: Path, port: int = 0) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.token: str | None = None  # what opens gated sets
        self.on_request: Callable[[str], None] | None = None  # told every path before it is answered
        self.refuse_times = 0  # so many of the next requests are answered with 503
        for folder in sorted(p for p in root.glob("*/*") if p.is_dir()):
            name = folder.relative_to(root).as_posix()
            self.repositories[name] = Repository(folder, COMMITS.get(name, digest(name)))
        self._server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._server.handle_error = lambda request, client_address: None  # a client may be killed
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT is to be set to."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a head and a body are two small packets
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def answer(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(unquote(url.path))
        if self.hub.on_request:
            self.hub.on_request(url.path)
        if self.hub.refuse_times:
            self.hub.refuse_times -= 1
            self.refuse(503, "Unavailable", "out of order")
            return
        for pattern, respond in ((API, self.api), (RESOLVE, self.file)):
            # a slash inside a ref is %2F in the path, and must not end it
            match = pattern.fullmatch(url.path)
            if match:
                respond(*(unquote(part or "") for part in match.groups()), parse_qs(url.query), body)
                return
        self.refuse(404, "NotFound", "no such page")

    do_GET = do_HEAD = do_POST = answer  # noqa: N815

    def repository(self, name: str, revision: str) -> Repository | None:
        """The repository, or None when the request has been refused."""
        served = self.hub.repositories.get(name)
        if served is None:
            self.refuse(401, "RepoNotFound", "Repository not found")
        elif revision and revision != served.commit and revision not in served.refs:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return served

    def api(self, name: str, kind: str, revision: str, path: str, query: dict[str, list[str]], body: bytes) -> None:
        served = self.repository(name, revision)
        if served is None:
            return
        if kind == "tree":
            self.json(served.entries(path, query.get("recursive", [""])[0].lower() in ("true", "1")))
        elif kind == "paths-info":
            asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            files = served.files()
            self.json([served.entry(p, files[p]) for p in asked if p in files])
        else:
            siblings = [{"rfilename": p} for p in served.files()]
            flags = {"private": False, "disabled": False, "gated": "auto" if served.gated else False}
            self.json({"_id": "1", "id": name, "sha": served.commit, "tags": [], "siblings": siblings, **flags})

    def file(self, name: str, revision: str, path: str, query: dict[str, list[str]], body: bytes) -> None:
        served = self.repository(name, revision)
        if served is None:
            return
        if served.gated and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.refuse(401, "GatedRepo", f"Access to dataset {name} is restricted. You must be authenticated.")
            return
        target = served.files().get(path)
        if target is None:
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        size = target.stat().st_size
        headers = {
            "ETag": f'"{digest(served.commit + path)}"',
            "X-Repo-Commit": served.commit,
            "Accept-Ranges": "bytes",
        }
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if span is None or self.command == "HEAD":
            self.send(200, target, 0, size, headers)
            return
        first, last = span.groups()
        start = int(first) if first else size - int(last)
        stop = min(int(last) + 1, size) if first and last else size
        self.send(206, target, start, stop, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"})

    def send(self, code: int, path: Path, start: int, stop: int, headers: dict[str, str]) -> None:
        self.head(code, "application/octet-stream", stop - start, headers)
        if self.command != "HEAD":
            with open(path, "rb") as handle:
                handle.seek(start)
                self.wfile.write(handle.read(stop - start))

    def json(self, content: Any, code: int = 200, headers: dict[str, str] | None = None) -> None:
        raw = json.dumps(content).encode()
        self.head(code, "application/json", len(raw), headers or {})
        if self.command != "HEAD":
            self.wfile.write(raw)

    def refuse(self, code: int, name: str, message: str) -> None:
        self.json({"error": message}, code, {"X-Error-Code": name, "X-Error-Message": message})

    def head(self, code: int, kind: str, length: int, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in {"Content-Type": kind, "Content-Length": str(length), **headers}.items():
            self.send_header(key, value)
        self.end_headers()


COMMITS = {
    "Skylion007/openwebtext": OPENWEBTEXT_COMMIT,
    "HuggingFaceFW/fineweb": FINEWEB_COMMIT,
    "Salesforce/wikitext": WIKITEXT_COMMIT,
}


def digest(text: str) -> str:
    """40 hexadecimal digits, as a commit has."""
    return hashlib.sha1(text.encode()).hexdigest()


def write_parquet(path: Path, columns: dict[str, Sequence[Any]], rows_per_group: int = 7) -> None:
    """A parquet file in small row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), path, row_group_size=rows_per_group)


def write_card(folder: Path, configs: dict[str, dict[str, str]], default: str | None = None) -> None:
    """README.md with the configs {name: {split: pattern}} in its header, as the hub's cards have it."""
    lines = ["---", "configs:"]
    for name, splits in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += [line for split, path in splits.items() for line in (f"  - split: {split}", f"    path: {path}")]
        lines += ["  default: true"] if name == default else []
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("\n".join([*lines, "---", "", "A data set."]) + "\n")


def write_fineweb(root: Path, texts: Sequence[str], files: int = 3) -> None:
    """HuggingFaceFW/fineweb: nine columns, train only, the default config holds other files than sample-10BT."""
    folder = root / "HuggingFaceFW" / "fineweb"
    for i in range(files):
        some = texts[len(texts) * i // files : len(texts) * (i + 1) // files]
        write_parquet(folder / f"sample/10BT/{i:03d}_00000.parquet", fineweb_columns(some))
    write_parquet(folder / "data/CC-MAIN-2013-20/000_00000.parquet", fineweb_columns(["another crawl"]))
    write_card(folder, {"default": {"train": "data/*/*"}, "sample-10BT": {"train": "sample/10BT/*"}})


def fineweb_columns(texts: Sequence[str]) -> dict[str, Sequence[Any]]:
    n = len(texts)
    return {
        "text": list(texts),
        "id": [f"<urn:uuid:{digest(text)}>" for text in texts],
        "dump": ["CC-MAIN-2013-20"] * n,
        "url": [f"http://example.com/{i}" for i in range(n)],
        "date": ["2013-05-18T07:24:47Z"] * n,
        "file_path": ["s3://commoncrawl/crawl-data/x.warc.gz"] * n,
        "language": ["en"] * n,
        "language_score": [0.91] * n,
        "token_count": [len(text) // 4 for text in texts],
    }


def write_openwebtext(root: Path, texts: Sequence[str], files: int = 4) -> None:
    """Skylion007/openwebtext as it is since its loading script is gone: one column, one config, train only."""
    folder = root / "Skylion007" / "openwebtext"
    for i in range(files):
        some = texts[len(texts) * i // files : len(texts) * (i + 1) // files]
        write_parquet(folder / f"plain_text/train-{i:05d}-of-{files:05d}.parquet", {"text": list(some)})
    write_card(folder, {"plain_text": {"train": "plain_text/train-*"}}, default="plain_text")


def write_wikitext(root: Path, train: Sequence[str], validation: Sequence[str]) -> None:
    """Salesforce/wikitext: a row is a line with its line break, an empty line is an empty row; four configs."""
    folder = root / "Salesforce" / "wikitext"
    cards = {}
    for config in ("wikitext-103-raw-v1", "wikitext-103-v1", "wikitext-2-raw-v1", "wikitext-2-v1"):
        for split, texts in (("test", validation[:1]), ("train", train), ("validation", validation)):
            for i in range(files := 2 if split == "train" else 1):
                rows = list(wikitext_rows(texts))
                part = rows[len(rows) * i // files : len(rows) * (i + 1) // files]
                write_parquet(folder / config / f"{split}-{i:05d}-of-{files:05d}.parquet", {"text": part})
        cards[config] = {split: f"{config}/{split}-*" for split in ("test", "train", "validation")}
    write_card(folder, cards)


def wikitext_rows(texts: Iterable[str]) -> Iterable[str]:
    for text in texts:
        yield from (line if line.strip() else "" for line in text.splitlines(keepends=True))


def write_script(root: Path, name: str) -> None:
    """A set of the old kind: a loading script, and nothing that `datasets` 4 reads."""
    folder = root / name
    write_card(folder, {})
    (folder / "README.md").write_text("# A data set with a script\n")
    (folder / f"{folder.name}.py").write_text("raise SystemExit\n")


if __name__ == "__main__":
    with Hub(Path(sys.argv[1])) as served:
        print(f"HF_ENDPOINT={served.endpoint}", flush=True)
        threading.Event().wait()
