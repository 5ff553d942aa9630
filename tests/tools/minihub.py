"""A look-alike of the Hugging Face Hub for tests: model repositories, over LFS and over Xet.

It speaks what the unmodified huggingface_hub client (checked with 2.4.0) asks for to make a
repository, commit to it and download from it; Xet's storage is hf_xet's own `local://FOLDER`.

    with MiniHub(folder) as hub:
        HfApi(endpoint=hub.url, token="hf_alice")

`hub.fail(...)` makes requests fail, `hub.requests` are those that came.
"""

import base64
import fnmatch
import hashlib
import io
import json
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_store import TOKENS, Entry, HubError, HubStore, Repository
from loopback import LoopbackServer, QuietHandler

LFS = ("*.pt", "*.bin", "*.safetensors")
"""What the Hub's own .gitattributes sends through LFS, as far as it matters here."""


@dataclass
class Fault:
    """What becomes of the next `times` requests whose `METHOD /path` matches `pattern`."""

    pattern: str
    status: int | None = None
    """Answered at once."""
    cut_after: int | None = None
    """Bytes of the body, sent or received, after which the connection is cut."""
    silence: float = 0.0
    """Seconds without a word, before all else."""
    lose_answer: bool = False
    """Do what was asked, and cut the connection instead of saying so."""
    drip: float = 0.0
    """Seconds between two bytes of the answer, its headers included."""
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class Request(NamedTuple):
    method: str
    path: str
    status: int | str


class MiniHub(HubStore, LoopbackServer):
    """The server, as a context; `files` says what a repository holds."""

    def __init__(self, root: Path, xet: bool = True) -> None:
        super().__init__(root, xet)
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.received: list[bytes] = []
        """Lines, headers and bodies of all requests, in pieces."""
        self.bind(Handler, "hub")

    def fail(self, pattern: str, **how: Any) -> None:
        """Let the next requests that match fail; see `Fault`."""
        self.faults.append(Fault(pattern, **how))


class Dripping(io.RawIOBase):
    """A connection on which a byte is sent every so many seconds."""

    def __init__(self, connection: socket.socket, seconds: float, stopping: threading.Event):
        self.connection, self.seconds, self.stopping = connection, seconds, stopping

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        for byte in bytes(data):
            if self.stopping.wait(self.seconds):
                raise ConnectionError("the test has ended")
            self.connection.sendall(bytes([byte]))
        return len(data)


class Handler(QuietHandler):
    """One connection: plumbing first, then a method for each route."""

    hub: MiniHub
    fault: Fault | None
    body_is_read: bool

    def handle_request(self) -> None:
        # A data set is a repository like a model's, under the same name.
        self.route = re.sub(r"^(/api)?/datasets/", _as_model, urlsplit(self.path).path)
        self.body_is_read = False
        line = f"{self.command} {self.route}"
        self.hub.received.append(f"{self.requestline}\n{self.headers}".encode())
        with self.hub.lock:
            matching = (f for f in self.hub.faults if f.times > 0 and re.search(f.pattern, line))
            self.fault = next(matching, None)
            if self.fault:
                self.fault.times -= 1
        try:
            if self.fault and self.was_faulty(self.fault):
                return
            for methods, pattern, answer in ROUTES:
                found = re.fullmatch(pattern, self.route)
                if found and self.command in methods:
                    groups = found.groupdict().items()
                    parts = {name: unquote(part) for name, part in groups if part is not None}
                    answer(self, **parts)
                    return
            raise HubError(404, f"no route for {line}")
        except HubError as error:
            self.body()
            headers = {"X-Error-Message": error.message}
            headers |= {"X-Error-Code": error.code} if error.code else {}
            self.reply(error.status, {"error": error.message, **error.more}, headers)
        except (ConnectionError, ValueError):  # the client went away
            self.cut()

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def was_faulty(self, fault: Fault) -> bool:
        self.hub.stopping.wait(fault.silence)
        if fault.cut_after is not None and self.command != "GET":
            received = 0
            for block in self.blocks():
                received += len(block)
                if received >= fault.cut_after:
                    break
            self.cut()
            return True
        if fault.status:
            self.body()
            self.reply(fault.status, {"error": "injected fault"}, fault.headers)
            return True
        return False

    def cut(self) -> None:
        self.hub.requests.append(Request(self.command, self.route, "cut"))
        self.close_connection = True
        self.connection.close()

    def blocks(self) -> Iterator[bytes]:
        if self.body_is_read:
            return
        self.body_is_read = True
        chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
        left = self.chunk_size() if chunked else int(self.headers.get("Content-Length") or 0)
        while left:
            block = self.rfile.read(min(left, 1 << 16))
            if not block:
                raise ConnectionError("the client went away")
            self.hub.received.append(block)
            yield block
            left -= len(block)
            if chunked and left == 0:
                self.rfile.readline()
                left = self.chunk_size()
        if chunked:
            self.rfile.readline()

    def chunk_size(self) -> int:
        return int(self.rfile.readline().split(b";")[0], 16)

    def body(self) -> bytes:
        return b"".join(self.blocks())

    def json(self) -> Any:
        return json.loads(self.body() or b"{}")

    def reply(
        self,
        status: int = 200,
        answer: Any = None,
        headers: dict[str, str] | None = None,
        data: bytes = b"",
    ) -> None:
        if self.fault and self.fault.lose_answer:
            self.cut()
            return
        if answer is not None:
            data = json.dumps(answer).encode()
        self.hub.requests.append(Request(self.command, self.route, status))
        if self.fault and self.fault.drip:
            self.wfile = Dripping(self.connection, self.fault.drip, self.hub.stopping)
        self.send_response(status)
        kind = "application/octet-stream" if answer is None else "application/json"
        sent = {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault.cut_after is not None:
            self.wfile.write(data[: self.fault.cut_after])
            self.wfile.flush()
            self.cut()
        else:
            self.wfile.write(data)

    def user(self) -> dict[str, Any] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if token and token not in TOKENS:
            raise HubError(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token)

    # Accounts and repositories

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        access: dict[str, Any] = {"displayName": "test", "role": user["role"]}
        if user["role"] == "fineGrained":
            scope = {"type": "model", "name": "alice/saes"}
            access["fineGrained"] = {"scoped": [{"entity": scope, "permissions": ["repo.write"]}]}
        orgs = [{"type": "org", "name": o, "roleInOrg": role} for o, role in user["orgs"].items()]
        auth = {"type": "access_token", "accessToken": access}
        self.reply(200, {"type": "user", "name": user["name"], "orgs": orgs, "auth": auth})

    def create(self) -> None:
        wanted, user = self.json(), self.user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        owner = (wanted.get("organization") or user["name"]).lower()
        roles = {user["name"]: "write", **user["orgs"]}
        if user["role"] == "read" or roles.get(owner) != "write":
            raise HubError(403, f"You may not create a model under {owner}")
        repo_id = self.hub.spelled(f"{owner}/{wanted['name']}")
        with self.hub.lock:
            if repo_id in self.hub.repositories:
                url = f"{self.hub.url}/{repo_id}"
                raise HubError(409, "You already created this model repo", url=url)
            made = Repository(private=wanted.get("visibility") == "private")
            self.hub.repositories[repo_id] = made
            self.hub.add_commit(made, {".gitattributes": self.hub.put(b"")})
        self.reply(200, {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id})

    def at(self, repository: Repository, revision: str) -> tuple[str, dict[str, Entry]]:
        sha = repository.head if revision == "main" else revision
        if sha not in repository.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repository.commits[sha]

    def info(self, repo: str, revision: str = "main") -> None:
        repository = self.hub.repository(repo, self.user())
        sha, files = self.at(repository, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        repo = self.hub.spelled(repo)
        described = {"id": repo, "modelId": repo, "sha": sha, "private": repository.private}
        self.reply(200, described | {"siblings": siblings, "tags": []})

    def tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        _, files = self.at(self.hub.repository(repo, self.user()), revision)
        below = f"{folder}/" if folder else ""
        found = {path: entry for path, entry in files.items() if path.startswith(below)}
        if below and not found:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        answer = [{"type": "file", "path": p, **entry} for p, entry in found.items()]
        if "recursive=true" not in self.path.lower():
            nested = {
                f"{below}{p[len(below) :].split('/')[0]}" for p in found if "/" in p[len(below) :]
            }
            answer = [entry for entry in answer if "/" not in entry["path"][len(below) :]]
            answer += [{"type": "directory", "path": p, "oid": "0" * 40} for p in sorted(nested)]
        self.reply(200, answer)

    def paths_info(self, repo: str, revision: str) -> None:
        data = self.body().decode()
        paths = parse_qs(data)["paths"] if "=" in data else json.loads(data)["paths"]
        _, files = self.at(self.hub.repository(repo, self.user()), revision)
        folders = [p for p in paths if any(path.startswith(f"{p}/") for path in files)]
        answer = [{"type": "file", "path": p, **files[p]} for p in paths if p in files]
        self.reply(
            200, answer + [{"type": "directory", "path": p, "oid": "0" * 40} for p in folders]
        )

    # Uploads

    def validate_yaml(self) -> None:
        block = re.match(r"\s*---\n(.*?)\n---", self.json()["content"], re.DOTALL)
        if block and isinstance(yaml.safe_load(block[1]), dict):
            self.reply(200, {"errors": [], "warnings": []})
        else:
            self.reply(400, {"errors": [{"message": "no metadata"}], "warnings": []})

    def preupload(self, repo: str) -> None:
        wanted = self.json()
        repository = self.hub.repository(repo, self.user(), write=True)
        held, answers = repository.commits[repository.head], []
        for file in wanted["files"]:
            path = file["path"]
            large = any(fnmatch.fnmatch(path, pattern) for pattern in LFS)
            answer = {"path": path, "uploadMode": "lfs" if large else "regular"}
            if path in held:
                answer["oid"] = held[path].get("lfs", held[path])["oid"]
            answers.append(answer | {"shouldIgnore": False})
        self.reply(200, {"files": answers, "commitOid": repository.head})

    def xet_token(self, repo: str, mode: str) -> None:
        self.hub.repository(repo, self.user(), write=mode == "write")
        if not self.hub.xet:
            raise HubError(404, "Xet is not enabled")
        expiry = int(time.time()) + 900
        answer = {"casUrl": self.hub.cas_url, "exp": expiry, "accessToken": "xet"}
        headers = {"X-Xet-Cas-Url": self.hub.cas_url, "X-Xet-Access-Token": "xet"}
        self.reply(200, answer, headers | {"X-Xet-Token-Expiration": str(expiry)})

    def lfs_batch(self, repo: str) -> None:
        self.hub.repository(repo, self.user(), write=True)
        objects = []
        for wanted in self.json()["objects"]:
            oid, answer = wanted["oid"], {**wanted, "authenticated": True}
            if not (self.hub.root / "lfs" / oid).exists():
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/_lfs/{oid}"}}
            objects.append(answer)
        self.reply(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, sha256: str) -> None:
        data = self.body()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise HubError(400, "sha256 mismatch")
        (self.hub.root / "lfs" / sha256).write_bytes(data)
        self.reply(200)

    def receive_commit(self, repo: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines() if line.strip()]
        with self.hub.lock:
            repository = self.hub.repository(repo, self.user(), write=True)
            files = dict(repository.commits[repository.head])
            for key, value in ((line["key"], line["value"]) for line in lines):
                if (
                    key == "header"
                    and value.get("parentCommit", repository.head) != repository.head
                ):
                    raise HubError(412, "A commit has happened since. Please refresh.")
                if key == "file":
                    files[value["path"]] = self.hub.put(base64.b64decode(value["content"]))
                if key == "lfsFile":
                    files[value["path"]] = self.hub.put_large(value["oid"], value["size"])
            sha = self.hub.add_commit(repository, files)
        self.reply(200, {"commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    # Downloads

    def resolve(self, repo: str, revision: str, path: str) -> None:
        sha, files = self.at(self.hub.repository(repo, self.user()), revision)
        if path not in files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        entry = files[path]
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if "lfs" not in entry:
            self.send_file(self.hub.content(entry), {**headers, "ETag": f'"{entry["oid"]}"'})
            return
        oid = self.hub.content(entry).name
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(entry["size"])}
        # Another host than the Hub's, as there: the client follows no further to ask for details.
        cdn = self.hub.url.replace("127.0.0.1", "localhost")
        headers["Location"] = f"{cdn}/_cdn/{oid}?signature={secrets.token_hex(4)}"
        if "xetHash" in entry and self.hub.xet:
            refresh = f"{self.hub.url}/api/models/{repo}/xet-read-token/{sha}"
            headers |= {"X-Xet-Hash": entry["xetHash"], "X-Xet-Refresh-Route": refresh}
            headers["Link"] = f'<{refresh}>; rel="xet-auth"'
        self.reply(302, headers=headers)

    def cdn(self, sha256: str) -> None:
        self.send_file(self.hub.root / "lfs" / sha256, {"ETag": f'"{sha256}"'})

    def send_file(self, path: Path, headers: dict[str, str]) -> None:
        data = path.read_bytes()
        if asked := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            content_range = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            self.reply(206, headers={**headers, **content_range}, data=data[first : last + 1])
        else:
            self.reply(200, headers=headers, data=data)


def _as_model(prefix: re.Match[str]) -> str:
    return "/api/models/" if prefix[1] else "/"


REPO, REVISION = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
API = f"/api/models/{REPO}"
ROUTES = (
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("GET", API, Handler.info),
    ("GET", f"{API}/revision/{REVISION}", Handler.info),
    ("GET", f"{API}/tree/{REVISION}(/(?P<folder>.+))?", Handler.tree),
    ("POST", f"{API}/paths-info/{REVISION}", Handler.paths_info),
    ("POST", f"{API}/preupload/main", Handler.preupload),
    ("POST", f"{API}/commit/main", Handler.receive_commit),
    ("GET", API + r"/xet-(?P<mode>read|write)-token/[^/]+", Handler.xet_token),
    ("POST", f"/{REPO}\\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/_lfs/(?P<sha256>[0-9a-f]{64})", Handler.lfs_put),
    ("GET HEAD", r"/_cdn/(?P<sha256>[0-9a-f]{64})", Handler.cdn),
    ("GET HEAD", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
)
