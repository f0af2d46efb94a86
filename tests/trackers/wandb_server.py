"""A W&B server on this machine's loopback: what the real client sent is what a test asserts on.

It keeps a run's history as the real one does: lines at the offsets that the client names, the later line wins. Unknown
operations are remembered in `unknown`, so that a test which asks for an empty list notices what it does not serve.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote

API_KEY = "0123456789" * 4
ENTITY = {"id": "RW50aXR5", "name": "lab", "username": "lab"}


@dataclass
class StoredRun:
    """One run as the server holds it."""

    fields: dict[str, Any] = field(default_factory=dict)
    lines: dict[int, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    state: str = "running"
    sessions: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """The config without the client's own entries."""
        pairs = json.loads(self.fields["config"]).items()
        return {key: entry["value"] for key, entry in pairs if not key.startswith("_")}

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows in order, without the client's clock."""
        assert sorted(self.lines) == list(range(len(self.lines))), "a hole in the history"
        rows = [json.loads(self.lines[i]) for i in range(len(self.lines))]
        return [{k: v for k, v in row.items() if k not in ("_timestamp", "_runtime")} for row in rows]

    def attribute(self, name: str) -> Any:
        """What a filter of the public API asks for."""
        return self.state if name == "state" else self.fields.get({"group": "groupName"}.get(name, name))

    @property
    def content(self) -> dict[str, Any]:
        """Return all that must not depend on how the run got here."""
        summary = {k: v for k, v in self.summary.items() if not k.startswith("_")}
        kept = ("displayName", "groupName", "jobType", "tags")
        return {
            "fields": {key: self.fields.get(key) for key in kept},
            "config": self.config,
            "history": self.history,
            "summary": summary,
            "state": self.state,
        }


class WandbServer(ThreadingHTTPServer):
    """`runs` and `views` by name; `broken` makes every answer an error, `silent` leaves every request unanswered.

    An id in `deleted` is of a run that was deleted, which no later run can have; `refused` lists the attempts. The next
    `busy` requests for a run get an error that passes.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs: dict[str, StoredRun] = {}
        self.views: dict[str, dict[str, Any]] = {}
        self.artifacts: list[str] = []
        self.unknown: list[str] = []
        self.deleted: set[str] = set()
        self.refused: list[str] = []
        self.busy = 0
        self.lock = threading.Lock()
        self.broken = False
        self.silent = False
        self.released = threading.Event()
        self.arrived = threading.Condition(self.lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors of clients that went away."""

    def wait_for_rows(self, run_id: str, count: int, seconds: float = 120.0) -> None:
        """Wait until so many rows of a run have arrived."""
        with self.arrived:
            there = self.arrived.wait_for(
                lambda: run_id in self.runs and len(self.runs[run_id].lines) >= count, seconds
            )
        assert there, f"{run_id} has not got {count} rows"

    def run(self, run_id: str) -> StoredRun:
        return self.runs.setdefault(run_id, StoredRun())

    def answer(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a GraphQL operation."""
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", operation).lower()
        served = getattr(self, f"gql_{name}", None)
        if served is None:
            self.unknown.append(operation)
            return {}
        return served(given)

    def gql_viewer(self, given: dict[str, Any]) -> dict[str, Any]:
        nobody = {"edges": []}
        viewer = {"id": "VXNlcg==", "entity": "lab", "username": "lab", "name": "lab", "email": "lab@example.org"}
        more = {"flags": "{}", "teams": nobody, "apiKeys": nobody, "defaultEntity": ENTITY, "admin": False}
        return {"viewer": viewer | more | {"deletedAt": None}}

    gql_get_default_entity = gql_get_viewer = gql_viewer

    def gql_server_features_query(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def gql_upsert_bucket(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given.get("name") or _decoded(given["id"])
        new = name not in self.runs
        run = self.run(name)
        run.fields |= {k: v for k, v in given.items() if v is not None}
        if given.get("summaryMetrics"):
            run.summary = json.loads(given["summaryMetrics"])
        project = {"id": "UHJvamVjdA==", "name": run.fields.get("project"), "entity": ENTITY}
        fields = {key: run.fields.get(key) for key in ("displayName", "config", "summaryMetrics")}
        fields |= {"id": _encoded(name), "name": name, "description": "", "sweepName": None, "project": project}
        return {"upsertBucket": {"bucket": fields | {"historyLineCount": len(run.lines)}, "inserted": new}}

    def gql_run_resume_status(self, given: dict[str, Any]) -> dict[str, Any]:
        is_stored = given["name"] in self.runs and "config" in self.runs[given["name"]].fields
        if given["name"] in self.deleted:
            return {"model": None}
        run = self.run(given["name"])
        run.sessions += 1
        run.state = "running"
        if not is_stored:
            return {"model": None}
        started = json.loads(run.fields["config"])["_wandb"]["value"].get("t")
        fields = {"id": _encoded(given["name"]), "name": given["name"], "summaryMetrics": json.dumps(run.summary)}
        fields |= {"displayName": run.fields.get("displayName"), "notes": None, "tags": run.fields.get("tags")}
        fields |= {"logLineCount": 0, "historyLineCount": len(run.lines), "eventsLineCount": 0, "eventsTail": "[]"}
        fields |= {"historyTail": json.dumps([run.lines[i] for i in sorted(run.lines)][-1:])}
        fields |= {"config": run.fields["config"], "wandbConfig": json.dumps({"t": started})}
        return {"model": {"id": "UHJvamVjdA==", "name": given["project"], "entity": ENTITY, "bucket": fields}}

    def gql_create_run_files(self, given: dict[str, Any]) -> dict[str, Any]:
        at = f"{self.url}/upload/{given['run']}/"
        files = [{"name": name, "uploadUrl": at + quote(name, safe="")} for name in given["files"]]
        return {"createRunFiles": {"runID": _encoded(given["run"]), "uploadHeaders": [], "files": files}}

    def gql_runs(self, given: dict[str, Any]) -> dict[str, Any]:
        filters, first = json.loads(given["filters"]), int(given.get("cursor") or 0)
        chosen = [
            (name, run)
            for name, run in self.runs.items()
            if run.fields.get("project") == given["project"]
            and all(run.attribute(key) == value for key, value in filters.items())
        ]
        page = chosen[first : first + given.get("perPage", 50)]
        edges = []
        for place, (name, run) in enumerate(page, first + 1):
            fields = {"id": _encoded(name), "name": name, "state": run.state, "tags": run.fields.get("tags")}
            fields |= {"displayName": run.fields.get("displayName"), "group": run.fields.get("groupName")}
            fields |= {"user": ENTITY, "sweepName": None, "config": run.fields["config"], "projectId": "1"}
            fields |= {"summaryMetrics": json.dumps(run.summary), "systemMetrics": "{}", "historyKeys": None}
            edges.append({"node": fields | {"createdAt": "", "heartbeatAt": ""}, "cursor": str(place)})
        ends = {"endCursor": str(first + len(page)), "hasNextPage": first + len(page) < len(chosen)}
        project_exists = any(run.fields.get("project") == given["project"] for run in self.runs.values())
        runs = {"runCount": len(chosen), "readOnly": False, "runs": {"edges": edges, "pageInfo": ends}}
        return {"project": {"internalId": "1"} | runs if project_exists else None}

    def gql_run_history_keys(self, given: dict[str, Any]) -> dict[str, Any]:
        steps = [json.loads(line)["_step"] for line in self.runs[given["name"]].lines.values()]
        return {"project": {"run": {"historyKeys": {"lastStep": max(steps, default=-1), "keys": {}}}}}

    def gql_run_parquet_history(self, given: dict[str, Any]) -> dict[str, Any]:
        """No part of a history was exported to parquet: the client asks for pages of the rest."""
        live = [json.loads(self.runs[given["runName"]].lines[i]) for i in sorted(self.runs[given["runName"]].lines)]
        return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": live}}}}

    def gql_sampled_history_page(self, given: dict[str, Any]) -> dict[str, Any]:
        spec, rows = json.loads(given["spec"]), []
        for _, line in sorted(self.runs[given["run"]].lines.items()):
            row = json.loads(line)
            if spec["minStep"] <= row["_step"] <= spec["maxStep"] and set(spec["keys"]) <= row.keys():
                rows.append({key: row[key] for key in spec["keys"]})
        assert len(rows) <= spec["samples"], "the server would choose some of them"
        return {"project": {"run": {"sampledHistory": [rows]}}}

    def gql_artifact_type(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": {"artifactType": {"name": "run_table"}}}}

    def gql_create_artifact(self, given: dict[str, Any]) -> dict[str, Any]:
        self.artifacts.append(given["input"]["artifactCollectionName"] if "input" in given else str(given))
        artifact = {
            "id": "QXJ0aWZhY3Q=",
            "state": "PENDING",
            "artifactSequence": {"id": "c2Vx", "latestArtifact": None},
        }
        return {"createArtifact": {"artifact": artifact}}

    def _manifest(self) -> dict[str, Any]:
        name = "wandb_manifest.json"
        file = {"id": "Zg==", "name": name, "displayName": name, "uploadHeaders": []}
        return {"artifactManifest": {"id": "bQ==", "file": file | {"uploadUrl": f"{self.url}/upload/-/manifest"}}}

    def gql_create_artifact_manifest(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"createArtifactManifest": self._manifest()}

    def gql_update_artifact_manifest(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"updateArtifactManifest": self._manifest()}

    def gql_create_artifact_files(self, given: dict[str, Any]) -> dict[str, Any]:
        edges = []
        for file in given["input"]["artifactFiles"]:
            fields = {"id": "Zg==", "name": file["name"], "displayName": file["name"], "uploadHeaders": []}
            fields |= {"uploadUrl": f"{self.url}/upload/-/{quote(file['name'], safe='')}", "storagePath": None}
            edges.append({"node": fields | {"artifact": {"id": "QXJ0aWZhY3Q="}, "uploadMultipartUrls": None}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def gql_commit_artifact(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"commitArtifact": {"artifact": {"id": "QXJ0aWZhY3Q=", "digest": "d"}}}

    def gql_upsert_view2(self, given: dict[str, Any]) -> dict[str, Any]:
        new = given["name"] not in self.views
        self.views[given["name"]] = given
        return {"upsertView": {"view": {"id": _encoded(given["name"]), "name": given["name"]}, "inserted": new}}

    def gql_view(self, given: dict[str, Any]) -> dict[str, Any]:
        views = [view for name, view in self.views.items() if name == given["viewName"]]
        nodes = [{"id": _encoded(v["name"]), "displayName": v["displayName"], "spec": v["spec"]} for v in views]
        return {"project": {"allViews": {"edges": [{"node": node} for node in nodes]}}}


class Handler(BaseHTTPRequestHandler):
    """Answers the three protocols of a client: GraphQL, a run's file stream, uploads."""

    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def _served(self) -> bytes | None:
        """The request's body; None where the server is out of order."""
        body = self._body()
        if self.server.silent:
            self.server.released.wait()
            self.close_connection = True
            return None
        if self.server.broken:
            self._send({"error": "out of order"}, 503)
            return None
        return body

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _send(self, content: Any, code: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self._served() is not None:
            self._send({})

    def do_PUT(self) -> None:
        body = self._served()
        if body is None:
            return
        _, _, run_id, name = self.path.split("/", 3)
        with self.server.lock:
            if run_id != "-":
                self.server.run(run_id).files[unquote(name)] = body
        self._send({})

    def do_POST(self) -> None:
        body = self._served()
        if body is None:
            return
        if self.path.endswith("/graphql"):
            query = json.loads(body)
            operation = re.search(r"(?:query|mutation)\s+(\w+)", query["query"])
            name = (query.get("variables") or {}).get("name")
            opens = operation is not None and operation[1] == "UpsertBucket"
            if opens and self.server.busy:
                self.server.busy -= 1
                self._send({"error": "busy"}, 503)
                return
            if opens and name in self.server.deleted:
                self.server.refused.append(name)
                message = f"run {name} was previously created and deleted; try a new run name"
                errors = [{"message": message, "path": ["upsertBucket"], "extensions": {"code": "ERR"}}]
                self._send({"data": {"upsertBucket": None}, "errors": errors}, 409)
                return
            with self.server.lock:
                fields = self.server.answer(operation[1] if operation else "?", query.get("variables") or {})
            self._send({"data": fields})
        elif self.path.endswith("/file_stream"):
            with self.server.arrived:
                self._stream(self.server.run(unquote(self.path.split("/")[-2])), json.loads(body))
                self.server.arrived.notify_all()
            self._send({"exitcode": None, "limits": {}})
        else:
            if "/otel/" not in self.path:  # how the client itself is doing
                self.server.unknown.append(self.path)
            self._send({})

    def _stream(self, run: StoredRun, sent: dict[str, Any]) -> None:
        for name, chunk in (sent.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                run.lines |= {chunk["offset"] + i: line for i, line in enumerate(chunk["content"])}
            elif name == "wandb-summary.json":
                run.summary = json.loads(chunk["content"][-1])
        if sent.get("preempting"):
            run.state = "preempting"
        if sent.get("complete"):
            stopped = run.state == "preempting" and sent.get("exitcode")
            run.state = "preempted" if stopped else "failed" if sent.get("exitcode") else "finished"


@contextlib.contextmanager
def serving() -> Iterator[WandbServer]:
    """Context of a running server."""
    server = WandbServer()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()


def _encoded(name: str) -> str:
    return base64.b64encode(name.encode()).decode()


def _decoded(name: str) -> str:
    return base64.b64decode(name).decode()
