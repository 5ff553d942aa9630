"""A look-alike of the W&B server for tests: what the unmodified client (checked with 0.31) asks
for to run, resume and sync without artifacts.

    with MiniWandb() as server:  # WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY
        ...
    server.runs["abc123"].history

`server.down` makes every request fail, as an outage does; `server.silent` is a pattern, and makes
that no request is answered whose path matches.
"""

import base64
import gzip
import json
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from loopback import LoopbackServer, QuietHandler

KEY = "k" * 40
LONG_KEY = f"wandb_v1_{'k' * 70}"

SILENCE = 120.0
"""Seconds after which a silent server closes the connection."""

ME = {"id": "e", "name": "me"}


@dataclass
class StoredRun:
    """What the server knows of a run."""

    config: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By step."""
    summary: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)
    """Project, entity, group, job type, notes and name."""
    exit_code: int | None = None
    times_started: int = 0


class MiniWandb(LoopbackServer):
    """The server, as a context."""

    def __init__(self) -> None:
        self.keys = {KEY, LONG_KEY}
        self.runs: dict[str, StoredRun] = {}
        self.received: list[bytes] = []
        """The bodies of all requests."""
        self.down = False
        self.down_after_login = False
        """Let the client see that its key is good, and then fail."""
        self.strange = False
        """Answer as something that is not W&B."""
        self.silent: str | None = None
        self.bind(Handler, "wandb")

    @property
    def only(self) -> StoredRun:
        """The one run there is."""
        [run] = self.runs.values()
        return run


class Handler(QuietHandler):
    wandb: MiniWandb

    def handle_request(self) -> None:
        body, path = self.body(), urlsplit(self.path).path
        self.wandb.received.append(body)
        if self.wandb.silent and re.search(self.wandb.silent, path):
            self.wandb.stopping.wait(SILENCE)
            self.close_connection = True
        elif self.wandb.strange:
            self.send(b"<html></html>", "text/html", 200)
        elif self.wandb.down:
            self.reply({"error": "down"}, 503)
        elif path == "/":
            self.reply({})
        elif path.startswith("/storage/"):
            self.reply({})
        elif self.key() not in self.wandb.keys:
            self.reply({"errors": [{"message": "user is not logged in"}]}, 401)
        elif path == "/graphql":
            asked = json.loads(body)
            self.wandb.down = self.wandb.down_after_login
            self.graphql(asked.get("query", ""), asked.get("variables") or {})
        elif found := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path):
            self.stream(self.wandb.runs[found[1]], json.loads(body))
        else:
            self.reply({}, 404)

    do_GET = do_POST = do_PUT = handle_request

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def key(self) -> str:
        given = self.headers.get("Authorization", "").removeprefix("Basic ")
        return base64.b64decode(given).decode().removeprefix("api:")

    def reply(self, answer: Any, status: int = 200) -> None:
        self.send(json.dumps(answer).encode(), "application/json", status)

    def send(self, data: bytes, kind: str, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self, run: StoredRun, sent: dict[str, Any]) -> None:
        for name, file in (sent.get("files") or {}).items():
            lines = [json.loads(line) for line in file.get("content", []) if line[:1] == "{"]
            if name == "wandb-history.jsonl":
                run.history |= {line["_step"]: line for line in lines}
            elif name == "wandb-summary.json":
                run.summary |= lines[-1]
        if sent.get("complete"):
            run.exit_code = sent.get("exitcode")
        self.reply({})

    def graphql(self, query: str, values: dict[str, Any]) -> None:
        if "upsertBucket" in query:
            answer = {"upsertBucket": self.upsert(values)}
        elif "createRunFiles" in query:
            run = values.get("run") or values.get("runName") or values.get("runId")
            names = values.get("files") or []
            files = [{"name": n, "uploadUrl": f"{self.wandb.url}/storage/{run}/{n}"} for n in names]
            answer = {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}
        elif "RunResumeStatus" in query:
            bucket = self.resume_status(values["name"])
            answer = {"model": {"id": "p", "name": "p", "entity": ME, "bucket": bucket}}
        elif "viewer" in query or "serverInfo" in query:
            viewer = {"id": "u", "entity": "me", "username": "me", "flags": "{}"}
            server = {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []}
            answer = {"viewer": viewer | {"teams": {"edges": []}}, "serverInfo": server}
        else:
            self.reply({"errors": [{"message": "unknown operation"}]}, 400)
            return
        self.reply({"data": answer})

    def upsert(self, values: dict[str, Any]) -> dict[str, Any]:
        name = values["name"]
        inserted = name not in self.wandb.runs
        run = self.wandb.runs.setdefault(name, StoredRun())
        if values.get("config"):
            config = json.loads(values["config"])
            run.config |= {key: held["value"] for key, held in config.items()}
        run.tags = values.get("tags") or run.tags
        for key in ("groupName", "jobType", "notes", "displayName", "project", "entity"):
            if values.get(key):
                run.about[key] = values[key]
        run.times_started += "groupName" in values
        entity = {"id": "e", "name": values.get("entity") or "me"}
        project = {"id": "p", "name": values.get("project") or "p", "entity": entity}
        return {"bucket": described(name, run) | {"project": project}, "inserted": inserted}

    def resume_status(self, name: str) -> dict[str, Any] | None:
        run = self.wandb.runs.get(name)
        if run is None:
            return None
        tail = [json.dumps(run.history[max(run.history)])] if run.history else []
        return described(name, run) | {
            "summaryMetrics": json.dumps(run.summary),
            "logLineCount": 0,
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "historyTail": json.dumps(tail),
            "tags": run.tags,
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
        }


def described(name: str, run: StoredRun) -> dict[str, Any]:
    return {
        "id": f"id-{name}",
        "name": name,
        "displayName": run.about.get("displayName", name),
        "description": None,
        "sweepName": None,
        "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
        "historyLineCount": len(run.history),
    }
