"""As much of a W&B server as a run and `wandb sync` need, on this machine."""

from __future__ import annotations

import gzip
import http.server
import json
import threading
import time
from typing import Any


class Server(http.server.ThreadingHTTPServer):
    """Keeps what it is told of one run. `silent` makes it accept requests and not answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.silent = threading.Event()
        self.run: dict[str, Any] = {}  # the last upsertBucket's variables
        self.history: list[str] = []  # wandb-history.jsonl
        self.alerts: list[dict[str, Any]] = []
        self.artifacts: list[dict[str, Any]] = []
        self.manifests: list[dict[str, Any]] = []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.history]

    def data(self, query: str, asked: dict[str, Any]) -> dict[str, Any]:
        """The answer to a GraphQL query: every field that any of them reads."""
        if "upsertBucket" in query:
            self.run = {**self.run, **{key: value for key, value in asked.items() if value is not None}}
        if "notifyScriptableRunAlert" in query:
            self.alerts.append(asked)
        if "createArtifact(" in query:
            self.artifacts.append(asked["input"])
        project = {"name": "p", "entity": {"name": "e"}}
        upload = {"id": "f", "uploadUrl": f"{self.url}/upload", "uploadHeaders": []}
        return {
            "upsertBucket": {"bucket": {"id": "", "name": asked.get("name"), "config": "{}", "project": project}},
            "createRunFiles": {"runID": "", "uploadHeaders": [], "files": []},
            "createArtifact": {"artifact": {"id": "a", "state": "PENDING", "artifactSequence": {}}},
            "createArtifactManifest": {"artifactManifest": {"id": "m", "file": upload}},
            "commitArtifact": {"artifact": {"id": "a", "digest": "d"}},
            "notifyScriptableRunAlert": {"success": True},
            "serverInfo": {"features": []},
            "model": self._model(asked) if self.history else None,
        }

    def _model(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What a run that goes on is told of its past: without it, wandb writes over the history from its start."""
        bucket = {
            "id": "b",
            "name": asked.get("name"),
            "config": "{}",
            "wandbConfig": '{"t": {"1": []}}',
            "summaryMetrics": "{}",
            "historyLineCount": len(self.history),
            "historyTail": json.dumps(self.history[-1:]),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "tags": [],
        }
        return {"id": "m", "name": "p", "entity": {"id": "e", "name": "e"}, "bucket": bucket}

    def keep(self, stream: dict[str, Any]) -> None:
        """A part of the file stream: lines from an offset on."""
        if part := stream.get("files", {}).get("wandb-history.jsonl"):
            self.history[part["offset"] :] = part["content"]

    def handle_error(self, *_: object) -> None:
        """A client that has gone is no matter."""


class Answer(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.server.silent.is_set():
            time.sleep(60)
        reply = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            reply = {"data": self.server.data(asked["query"], asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            self.server.keep(json.loads(body))
        elif self.path == "/upload":
            self.server.manifests.append(json.loads(body))
        text = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_PUT = do_POST  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass
