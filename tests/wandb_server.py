"""As much of W&B's server as its client needs to send a run: on loopback, in memory."""

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class StoredRun:
    """What the server was told about a run.

    Attributes:
        upserts: values of every call that created or changed it, without the absent ones.
        history: rows of its history, by the offset that the client gave each.
        files: names of the files that it has sent.
    """

    upserts: list[dict[str, Any]] = field(default_factory=list)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Its history in order."""
        assert sorted(self.history) == list(range(len(self.history)))
        return [self.history[offset] for offset in sorted(self.history)]


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that ends without closing its connections is what some tests are about."""


class WandbServer:
    """Answers the client's GraphQL calls, its stream of history lines and its uploads.

    Attributes:
        url: what WANDB_BASE_URL must be.
        runs: by id.
    """

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = {}
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                with server._lock:
                    answer = json.dumps(server._take(self.path, body)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST = do_PUT = _answer

            def log_message(self, *args: Any) -> None:
                pass

        self._http = _Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    @contextmanager
    def serving(self) -> Iterator["WandbServer"]:
        """Serve until the block is left."""
        thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()
            thread.join()

    def _take(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/graphql":
            call = json.loads(body)
            name = re.search(r"(?:query|mutation)\s+(\w+)", call["query"])
            assert name is not None
            return {"data": self._graphql(name.group(1), call.get("variables") or {})}
        if path.endswith("/file_stream"):
            run = self.runs[path.split("/")[-2]]
            sent = json.loads(body).get("files") or {}
            history = sent.get("wandb-history.jsonl")
            if history:
                for offset, line in enumerate(history["content"], start=history["offset"]):
                    run.history[offset] = json.loads(line)
            return {}
        if path.startswith("/upload/"):
            _, _, identifier, name = path.split("/", 3)
            self.runs[identifier].files.add(name)
        return {}

    def _graphql(self, name: str, values: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": values.get("project") or "none"}
        entity = {"id": "e", "name": values.get("entity") or "somebody"}
        if name == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if name == "Viewer":
            return {
                "viewer": {
                    "id": "v", "entity": "somebody", "username": "somebody", "email": "",
                    "flags": "{}", "teams": {"edges": []}, "apiKeys": {"edges": []},
                }
            }  # fmt: skip
        if name == "RunResumeStatus":
            return {"model": {**project, "entity": entity, "bucket": self._bucket(values["name"])}}
        if name == "UpsertBucket":
            known = values["name"] in self.runs
            run = self.runs.setdefault(values["name"], StoredRun())
            run.upserts.append({k: v for k, v in values.items() if v is not None})
            bucket = {
                "id": values["name"], "name": values["name"], "displayName": values["name"],
                "description": "", "config": "{}", "sweepName": None,
                "historyLineCount": len(run.history), "project": {**project, "entity": entity},
            }  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": not known}}
        if name == "CreateRunFiles":
            files = [
                {"name": file, "uploadUrl": f"{self.url}/upload/{values['run']}/{file}"}
                for file in values["files"]
            ]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {}

    def _bucket(self, identifier: str) -> dict[str, Any] | None:
        if identifier not in self.runs:
            return None
        run = self.runs[identifier]
        tail = [json.dumps(row) for row in run.rows[-1:]]
        return {
            "id": identifier, "name": identifier, "displayName": identifier, "summaryMetrics": "{}",
            "logLineCount": 0, "historyLineCount": len(run.history), "eventsLineCount": 0,
            "historyTail": json.dumps(tail), "eventsTail": "[]", "config": "{}", "tags": [],
            "notes": None, "wandbConfig": json.dumps({"t": 1}),
        }  # fmt: skip
