"""What the Hub look-alike holds: repositories with their commits, files, and who may do what."""

import hashlib
import json
import struct
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOKENS = {
    "hf_alice": {"name": "alice", "orgs": {"acme": "write", "club": "read"}, "role": "write"},
    "hf_bob": {"name": "bob", "orgs": {"acme": "write"}, "role": "write"},
    "hf_reader": {"name": "alice", "orgs": {}, "role": "read"},
    "hf_fine": {"name": "alice", "orgs": {}, "role": "fineGrained"},
}
"""Who is who; the fine-grained token may write to alice/saes only."""

Entry = dict[str, Any]
"""A file of a commit, as the Hub describes it: oid, size, and lfs and xetHash where it has them."""


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **more: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.more = status, message, code, more


@dataclass
class Repository:
    private: bool
    gated: bool = False
    """Whether only its owner has been given access."""
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    """The files of each commit, by its id; the last one is `main`."""

    @property
    def head(self) -> str:
        return list(self.commits)[-1]


class HubStore:
    """Repositories by name, and their files under `root`."""

    def __init__(self, root: Path, xet: bool) -> None:
        self.root, self.xet = root, xet
        for folder in ("blobs", "lfs", "cas"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        self.repositories: dict[str, Repository] = {}
        self.lock = threading.RLock()

    def files(self, repo_id: str) -> dict[str, bytes]:
        """The contents of a repository's files now, by path."""
        repository = self.repositories[repo_id]
        found = repository.commits[repository.head].items()
        return {path: self.content(entry).read_bytes() for path, entry in found}

    def commit(self, repo_id: str, files: dict[str, bytes]) -> None:
        """A commit by somebody else."""
        with self.lock:
            repository = self.repositories[repo_id]
            held = dict(repository.commits[repository.head])
            self.add_commit(repository, held | {p: self.put(data) for p, data in files.items()})

    def add_commit(self, repository: Repository, files: dict[str, Entry]) -> str:
        number = f"{len(repository.commits)} {json.dumps(files)}"
        sha = hashlib.sha1(number.encode()).hexdigest()
        repository.commits[sha] = files
        return sha

    def put(self, data: bytes) -> Entry:
        oid = git_id(data)
        (self.root / "blobs" / oid).write_bytes(data)
        return {"oid": oid, "size": len(data)}

    def put_large(self, sha256: str, size: int) -> Entry:
        """The entry of a file that came through LFS or Xet before."""
        xet_hash = self.xet_hash(sha256)
        if xet_hash is None and not (self.root / "lfs" / sha256).exists():
            raise HubError(400, f"LFS pointer to a file that does not exist: {sha256}")
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        lfs = {"oid": sha256, "size": size, "pointerSize": len(pointer)}
        entry = {"oid": git_id(pointer.encode()), "size": size, "lfs": lfs}
        return entry | ({"xetHash": xet_hash} if xet_hash else {})

    @property
    def cas_url(self) -> str:
        return f"local://{(self.root / 'cas').absolute()}"

    def xet_hash(self, sha256: str) -> str | None:
        for shard in (self.root / "cas").rglob("shards/*.mdb"):
            if sha256 in (known := xet_hashes(shard)):
                return known[sha256]
        return None

    def content(self, entry: Entry) -> Path:
        if "lfs" not in entry:
            return self.root / "blobs" / entry["oid"]
        path = self.root / "lfs" / entry["lfs"]["oid"]
        if not path.exists():  # it came through Xet
            import hf_xet

            expiry = int(time.time()) + 3600
            with hf_xet.XetSession().new_file_download_group(
                endpoint=self.cas_url, token="x", token_expiry_unix_secs=expiry
            ) as group:
                wanted = hf_xet.XetFileInfo(entry["xetHash"], entry["size"])
                group.start_download_file(wanted, str(path))
        return path

    def spelled(self, repo_id: str) -> str:
        """The name of a repository as it was made; the Hub pays no regard to case."""
        same = (name for name in self.repositories if name.lower() == repo_id.lower())
        return next(same, repo_id)

    def repository(self, repo_id: str, user: dict | None, write: bool = False) -> Repository:
        repo_id = self.spelled(repo_id)
        found = self.repositories.get(repo_id)
        owner = repo_id.split("/")[0].lower()
        role = (
            "write" if user and owner == user["name"] else (user or {"orgs": {}})["orgs"].get(owner)
        )
        if found is None or (found.private and role is None):
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if found.gated and role is None:
            raise HubError(403, f"Access to {repo_id} is restricted. Ask for access.", "GatedRepo")
        fine = user is not None and user["role"] == "fineGrained" and repo_id == "alice/saes"
        if write and not (role == "write" and user and (user["role"] == "write" or fine)):
            raise HubError(403, f"Forbidden: you have no write access to {repo_id}")
        return found


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def xet_hashes(shard: Path) -> dict[str, str]:
    """Xet's hash of each file in a shard, by its SHA-256: the file section of an .mdb file."""
    data, offset, found = shard.read_bytes(), 48, {}

    def text(part: bytes) -> str:
        return "".join(f"{number:016x}" for number in struct.unpack("<4Q", part))

    while offset + 48 <= len(data) and data[offset : offset + 32] != b"\xff" * 32:
        xet_hash = text(data[offset : offset + 32])
        flags, n = struct.unpack("<II", data[offset + 32 : offset + 40])
        offset += 48 * (1 + n + (n if flags & (1 << 31) else 0))
        if flags & (1 << 30):
            found[text(data[offset : offset + 32])] = xet_hash
            offset += 48
    return found
