"""SAEs on the Hugging Face Hub: upload in one commit each, verify, fetch.

A repository has one folder per SAE, and a card at its root that lists them. It never has half an
SAE, because a commit is complete or absent.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError
from huggingface_hub.hf_api import RepoFile

from sae_core.publishing.access import repo_info
from sae_core.publishing.model_card import CARD, SAEFacts, repo_card, sae_card
from sae_core.settings.services import RepoConfig
from sae_core.utils.errors import PassingError, SAEError
from sae_core.utils.files import file_sha256, write_file
from sae_core.utils.hub_client import connect, named, patiently
from sae_core.utils.hub_files import n_bytes
from sae_core.utils.naming import EVALUATION_FILE
from sae_core.utils.records import read_json, read_record

Contents = Mapping[str, Path | bytes]
"""Files, or what is to be in them, by path in the repository."""

CONFLICTS = 20
"""Times that another commit may come first."""


@dataclass(frozen=True)
class Marker:
    """The record of an upload: `results/uploads/<run_name>.json`."""

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
        """The entries for the summary of a W&B run."""
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


def upload(
    folder: Path,
    evaluation: Path | None,
    repo: RepoConfig,
    labels: Path | None = None,
    features: Path | None = None,
) -> Marker:
    """Upload an SAE directory, its evaluation, what is known of its features (`SAEFacts.read`) and
    its model card to the repository's folder of that name, and add its line to the card at the
    root. All of it is one commit, or none if the repository already has exactly this. Nothing that
    is sent contains a path of this machine.

    Raises:
        SAEError: it cannot be done; what was there before is still there.
    """
    repo_id, api = str(repo.hf_repo_id), connect()
    facts = SAEFacts.read(folder, evaluation, repo, labels, features)
    run_files(folder, evaluation, facts)  # what is missing is said before a repository is made
    if facts.run_name != folder.name:
        print(f"{folder}: its name contains a local path; published as {facts.run_name}")
    with named(f"upload of {facts.run_name} to {repo_id}"):
        if not patiently(lambda: api.repo_exists(repo_id)):
            private = True if repo.hf_private else None
            patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        # As the Hub spells it, which pays no regard to case.
        repo_id = repo_info(api, repo).id
        facts = replace(facts, repo=replace(repo, hf_repo_id=repo_id))
        contents = run_files(folder, evaluation, facts)
        commit = _commit(api, repo_id, contents, facts)
    return Marker(
        run_name=facts.run_name,
        repo=repo_id,
        commit=commit,
        url=f"{api.endpoint}/{repo_id}/tree/{commit}/{facts.run_name}",
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        files={name: _sha256(content) for name, content in contents.items()},
    )


def run_files(folder: Path, evaluation: Path | None, facts: SAEFacts) -> Contents:
    """The contents of an SAE's folder in the repository, by path."""
    sources = dict(facts.files)
    if evaluation is not None:
        sources[EVALUATION_FILE] = evaluation
    missing = [str(path) for path in sources.values() if not path.is_file()]
    if missing:
        raise SAEError(
            f"{missing[0]}: no such file; an upload needs a complete final SAE directory"
        )
    found = {name: _public(path, facts) for name, path in sources.items()}
    found[CARD] = sae_card(facts).encode()
    return {f"{facts.run_name}/{name}": content for name, content in found.items()}


def _public(path: Path, facts: SAEFacts) -> Path | bytes:
    """A file as it is published: unchanged, unless it is JSON that contains a local path."""
    if path.suffix != ".json":
        return path
    content = facts.public(path)
    if content == read_json(path, path.stem, "create it again"):
        return path
    return (json.dumps(content, indent=2) + "\n").encode()


def verify(marker: Marker) -> list[str]:
    """The files of an upload that differ from what was sent or are missing on the Hub, by path.

    Raises:
        SAEError: they cannot be downloaded.
    """
    api = connect()
    with (
        tempfile.TemporaryDirectory() as scratch,
        named(f"verification of {marker.run_name} in {marker.repo}"),
    ):
        paths = list(marker.files)
        patiently(
            lambda: api.snapshot_download(
                marker.repo, revision=marker.commit, allow_patterns=paths, local_dir=scratch
            ),
            n_bytes(api, marker.repo, paths, marker.commit),
        )
        found = {path: Path(scratch, path) for path in marker.files}
        return [
            path
            for path, sha256 in marker.files.items()
            if not found[path].is_file() or file_sha256(found[path]) != sha256
        ]


def _commit(api: HfApi, repo_id: str, contents: Contents, facts: SAEFacts) -> str:
    """Commit the files, and the card at the root, that the repository does not have yet, and
    return the commit that has everything. If somebody else's commit came first, start again from
    the newest card."""
    sent = {name: CommitOperationAdd(name, content) for name, content in contents.items()}
    for conflict in range(CONFLICTS):
        head = str(repo_info(api, facts.repo).sha)
        card = repo_card(_root_card(api, repo_id, head), facts, repo_id).encode()
        missing = _missing(api, repo_id, head, {**contents, CARD: card})
        if not missing:
            return head
        operations = [sent.get(name) or CommitOperationAdd(name, card) for name in missing]
        try:
            # The large files first, so that each further try sends only the commit.
            n_bytes = sum(operation.upload_info.size for operation in operations)
            patiently(
                partial(api.preupload_lfs_files, repo_id, operations, free_memory=False),
                n_bytes,
            )
            repo_info(api, facts.repo)  # it may have become public in the meantime
            commit = patiently(
                partial(
                    api.create_commit,
                    repo_id,
                    operations,
                    commit_message=f"Upload {facts.run_name}",
                    parent_commit=head,
                ),
                n_bytes,
            )
            return commit.oid
        except HfHubHTTPError as error:
            if error.response.status_code not in (409, 412):
                raise
            time.sleep(min(0.1 * 2**conflict, 2.0))
    raise PassingError(f"{repo_id}: other commits came first {CONFLICTS} times; run it again")


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
    except RemoteEntryNotFoundError:  # a Hub that cannot be asked is no repository without a card
        return None


def _sha256(content: Path | bytes) -> str:
    return (
        file_sha256(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
    )


def _git_id(content: Path | bytes) -> str:
    """What git calls a file of this content."""
    data = content.read_bytes() if isinstance(content, Path) else content
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
