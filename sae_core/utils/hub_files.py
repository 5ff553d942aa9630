"""Files of a repository on the Hub, listed or downloaded."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile

from sae_core.utils.errors import SAEError
from sae_core.utils.hub_client import connect, named, patiently


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
    """The files `names` of a folder in a repository, from the cache or downloaded.

    Raises:
        SAEError: they cannot be had.
    """
    api = connect()
    wanted = [f"{folder}/{name}" for name in names]
    with named(f"{repo_id}/{folder}"):
        root = patiently(
            lambda: api.snapshot_download(repo_id, revision=revision, allow_patterns=wanted),
            n_bytes(api, repo_id, wanted, revision),
        )
    found = Path(root) / folder
    if not found.is_dir():
        raise SAEError(f"{repo_id}/{folder}: no such folder at revision {revision or 'main'}")
    return found


def n_bytes(api: HfApi, repo_id: str, paths: Sequence[str], revision: str | None) -> int:
    """The size of files that are to be downloaded, as far as the Hub can be asked: without it, they
    are in the cache, or the download itself says what is wrong."""
    try:
        found = patiently(lambda: api.get_paths_info(repo_id, list(paths), revision=revision))
    except Exception:  # the client's failures have no common base class
        return 0
    return sum(info.size for info in found if isinstance(info, RepoFile))
