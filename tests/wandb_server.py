"""A W&B server of this machine: what the real client asks for to record a run, to resume it and to upload one later."""

import contextlib
import gzip
import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef" * 2 + "01234567"  # as long as a real one


@dataclass
class Kept:
    """What the server has of a run.

    Args:
        history: rows, by place.
        events: rows of system metrics.
        summary: the newest.
        config: the newest, a value by key.
        given: project, entity, group and so on, as the newest start gave them.
        exit_codes: of the starts that ended.
    """

    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    events: dict[int, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)
    preempting: bool = False


class Server(ThreadingHTTPServer):
    """Answers on a port of its own.

    Args:
        status: of every answer; another than 200 refuses.
    """

    daemon_threads = True

    def __init__(self, status: int = 200):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = status
        self.runs: dict[str, Kept] = defaultdict(Kept)
        self.keys: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, path: str, body: bytes) -> Any:
        if path.endswith("/file_stream"):
            self._stream(self.runs[path.split("/")[-2]], json.loads(body))
            return {}
        if not path.endswith("/graphql"):
            return {}  # a file
        asked = json.loads(body)
        name, given = asked.get("operationName"), asked.get("variables") or {}
        return {"data": getattr(self, f"_{name}")(given) if hasattr(self, f"_{name}") else {}}

    def handle_error(self, *_: Any) -> None:
        """A client that is gone is none."""

    def _RunResumeStatus(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        kept, project = self.runs.get(given["name"]), {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
        if kept is None or not kept.given:
            return {"model": project | {"bucket": None}}
        tail = [json.dumps(kept.history[max(kept.history)])] if kept.history else []
        bucket = {
            **{"id": "b", "name": given["name"], "displayName": "d", "tags": [], "notes": None, "logLineCount": 0},
            **{"historyLineCount": len(kept.history), "eventsLineCount": len(kept.events), "wandbConfig": '{"t": 1}'},
            **{"historyTail": json.dumps(tail), "eventsTail": "[]", "summaryMetrics": json.dumps(kept.summary)},
            "config": json.dumps({key: {"value": value} for key, value in kept.config.items()}),
        }
        return {"model": project | {"bucket": bucket}}

    def _UpsertBucket(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        kept = self.runs[given["name"]]
        new = not kept.given
        kept.given |= {key: value for key, value in given.items() if value is not None}
        kept.config |= {key: item["value"] for key, item in json.loads(given.get("config") or "{}").items()}
        kept.summary |= json.loads(given.get("summaryMetrics") or "{}")
        project = {"id": "p", "name": given.get("project") or "p", "entity": {"id": "e", "name": "e"}}
        bucket = {"id": "b", "name": given["name"], "displayName": "d", "historyLineCount": len(kept.history)}
        return {"upsertBucket": {"bucket": bucket | {"project": project}, "inserted": new}}

    def _CreateRunFiles(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}

    @staticmethod
    def _stream(kept: Kept, sent: dict[str, Any]) -> None:
        for name, rows in (("wandb-history.jsonl", kept.history), ("wandb-events.jsonl", kept.events)):
            part = sent.get("files", {}).get(name, {"offset": 0, "content": []})
            rows.update({part["offset"] + i: json.loads(row) for i, row in enumerate(part["content"])})
        for row in sent.get("files", {}).get("wandb-summary.json", {}).get("content", []):
            kept.summary |= json.loads(row)
        kept.preempting = kept.preempting or bool(sent.get("preempting"))
        if sent.get("complete"):
            kept.exit_codes.append(sent["exitcode"])


@contextlib.contextmanager
def serving(status: int = 200) -> Iterator[Server]:
    """A server that goes with the block."""
    server = Server(status)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.keys.add(self.headers.get("Authorization") or "")
        text = json.dumps(self.server.answer(self.path, body) if self.server.status == 200 else {}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_PUT = do_POST

    def log_message(self, *_: Any) -> None:
        pass
