"""SAEs on the Hugging Face Hub: uploaded in one commit each, verified, fetched.

A repository has a folder for each SAE, and a card at its root that lists them. Its files never
show half an SAE: a commit is there or it is not.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from huggingface_hub.hf_api import RepoFile

from sae_core.errors import SAEError
from sae_core.files import file_sha256, write_file
from sae_core.naming import EVALUATION_FILE, EXPORT_FILES
from sae_core.publishing.client import connect, named, patiently
from sae_core.publishing.model_card import CARD, SAEFacts, repo_card, sae_card
from sae_core.records import read_record
from sae_core.train_config import RepoConfig

Contents = Mapping[str, Path | bytes]
"""Files, or what is to be in them, by path in the repository."""

CONFLICTS = 20
"""Times that another commit may come first."""


@dataclass(frozen=True)
class Marker:
    """An upload that was done: `results/uploads/<run_name>.json`."""

    run_name: str
    repo: str
    commit: str
    url: str
    time: str
    """UTC, ISO 8601."""
    files: dict[str, str]
    """SHA-256 by path in the repository, but for the card at its root, which all SAEs share."""

    @property
    def summary(self) -> dict[str, str]:
        """What the summary of a W&B run says of it."""
        return {"hf_repo": self.repo, "hf_commit": self.commit, "hf_url": self.url}

    def save(self, path: Path) -> None:
        """Write the marker as JSON."""
        write_file(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Marker":
        """Read a marker.

        Raises:
            SAEError: it is missing or not one.
        """
        return read_record(cls, path, "upload marker", "delete it and upload again")


def upload(folder: Path, evaluation: Path | None, repo: RepoConfig) -> Marker:
    """Bring an SAE directory, its evaluation and its model card into the repository's folder of
    that name, and its line into the card at the root; all in one commit, or none if the
    repository holds exactly this already.

    Raises:
        SAEError: it cannot be done; what was there before is still there.
    """
    repo_id, api = str(repo.hf_repo_id), connect()
    facts = SAEFacts.read(folder, evaluation, repo)
    contents = run_files(folder, evaluation, facts)
    with named(f"upload of {folder.name} to {repo_id}"):
        if not patiently(lambda: api.repo_exists(repo_id)):
            private = True if repo.hf_private else None
            patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        commit = _commit(api, repo_id, contents, facts)
    return Marker(
        run_name=folder.name,
        repo=repo_id,
        commit=commit,
        url=f"{api.endpoint}/{repo_id}/tree/{commit}/{folder.name}",
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        files={name: _sha256(content) for name, content in contents.items()},
    )


def run_files(folder: Path, evaluation: Path | None, facts: SAEFacts) -> Contents:
    """What an SAE's folder in the repository holds, by path."""
    found: dict[str, Path | bytes] = {name: folder / name for name in EXPORT_FILES}
    if evaluation is not None:
        found[EVALUATION_FILE] = evaluation
    found[CARD] = sae_card(facts).encode()
    missing = [
        str(path) for path in found.values() if isinstance(path, Path) and not path.is_file()
    ]
    if missing:
        raise SAEError(f"{missing[0]}: no such file; an upload needs a whole final SAE directory")
    return {f"{folder.name}/{name}": content for name, content in found.items()}


def verify(marker: Marker) -> list[str]:
    """The files of an upload that the Hub no longer has as they were sent, by path.

    Raises:
        SAEError: they cannot be downloaded.
    """
    api = connect()
    with (
        tempfile.TemporaryDirectory() as scratch,
        named(f"verification of {marker.run_name} in {marker.repo}"),
    ):
        patiently(
            lambda: api.snapshot_download(
                marker.repo,
                revision=marker.commit,
                allow_patterns=list(marker.files),
                local_dir=scratch,
            )
        )
        found = {path: Path(scratch, path) for path in marker.files}
        return [
            path
            for path, sha256 in marker.files.items()
            if not found[path].is_file() or file_sha256(found[path]) != sha256
        ]


def list_files(repo_id: str, revision: str | None = None) -> list[str]:
    """The paths of all files in a repository.

    Raises:
        SAEError: it cannot be read.
    """
    api = connect()
    with named(repo_id):
        return patiently(lambda: api.list_repo_files(repo_id, revision=revision))


def fetch_folder(
    repo_id: str, folder: str, names: Sequence[str], revision: str | None = None
) -> Path:
    """The files `names` of a folder in a repository, from the cache or else downloaded.

    Raises:
        SAEError: they cannot be had.
    """
    api = connect()
    wanted = [f"{folder}/{name}" for name in names]
    with named(f"{repo_id}/{folder}"):
        root = patiently(
            lambda: api.snapshot_download(repo_id, revision=revision, allow_patterns=wanted)
        )
    found = Path(root) / folder
    if not found.is_dir():
        raise SAEError(f"{repo_id}/{folder}: no such folder at revision {revision or 'main'}")
    return found


def _commit(api: HfApi, repo_id: str, contents: Contents, facts: SAEFacts) -> str:
    """Commit what the repository does not have yet of the files and of the card at the root, and
    return the commit that has all. The card starts from the newest one whenever somebody else's
    commit came first."""
    sent = {name: CommitOperationAdd(name, content) for name, content in contents.items()}
    for conflict in range(CONFLICTS):
        head = str(patiently(lambda: api.repo_info(repo_id)).sha)
        card = repo_card(_root_card(api, repo_id, head), facts, repo_id).encode()
        missing = _missing(api, repo_id, head, {**contents, CARD: card})
        if not missing:
            return head
        operations = [sent.get(name) or CommitOperationAdd(name, card) for name in missing]
        try:
            # The large files first, so that each further try sends the commit alone.
            patiently(
                lambda ops=operations: api.preupload_lfs_files(repo_id, ops, free_memory=False)
            )
            commit = patiently(
                lambda head=head, ops=operations: api.create_commit(
                    repo_id, ops, commit_message=f"Upload {facts.run_name}", parent_commit=head
                )
            )
            return commit.oid
        except HfHubHTTPError as error:
            if error.response.status_code not in (409, 412):
                raise
            time.sleep(min(0.1 * 2**conflict, 2.0))
    raise SAEError(f"{repo_id}: other commits came first {CONFLICTS} times; run it again")


def _missing(api: HfApi, repo_id: str, commit: str, contents: Contents) -> list[str]:
    """The paths of `contents` that the repository does not have with these contents."""
    found = patiently(lambda: api.get_paths_info(repo_id, list(contents), revision=commit))
    there = {info.path: info for info in found if isinstance(info, RepoFile)}

    def is_there(name: str, content: Path | bytes) -> bool:
        info = there.get(name)
        if info is None:
            return False
        if info.lfs:
            return info.lfs.sha256 == _sha256(content)
        return info.blob_id == _git_id(content)

    return [name for name, content in contents.items() if not is_there(name, content)]


def _root_card(api: HfApi, repo_id: str, commit: str | None) -> str | None:
    def read() -> str:
        return Path(api.hf_hub_download(repo_id, CARD, revision=commit)).read_text(encoding="utf-8")

    try:
        return patiently(read)
    except EntryNotFoundError:
        return None


def _sha256(content: Path | bytes) -> str:
    return (
        file_sha256(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
    )


def _git_id(content: Path | bytes) -> str:
    """What git calls a file of this content."""
    data = content.read_bytes() if isinstance(content, Path) else content
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
