"""The check that an upload to the Hub will be accepted, which changes nothing there."""

from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.hf_api import ModelInfo

from sae_core.settings.services import RepoConfig
from sae_core.utils.errors import SAEError
from sae_core.utils.hub_client import connect, named, patiently
from sae_core.utils.naming import same_name


def check_access(repo: RepoConfig) -> None:
    """Check that an upload to `repo` will be accepted, without changing anything.

    Raises:
        SAEError: there is no valid token, it may not write there, or a private upload would land
            in a public repository.
    """
    repo_id, api = str(repo.hf_repo_id), connect()
    if get_token() is None:
        raise SAEError(
            f"upload to {repo_id}: not logged in to the Hub; run `hf auth login` or set HF_TOKEN"
        )
    with named(f"upload to {repo_id}"):
        account = patiently(api.whoami)
        if not patiently(lambda: api.repo_exists(repo_id)):
            _check_namespace(account, repo_id)
            return
        _check_role(account, repo_id)
        # Asking how a file would be uploaded needs the right to write, and writes nothing.
        probe = CommitOperationAdd("README.md", b"-\n")
        patiently(lambda: api.preupload_lfs_files(repo_id, [probe]))
        repo_info(api, repo)


def repo_info(api: HfApi, repo: RepoConfig) -> ModelInfo:
    """What the Hub says about a repository to write to.

    Raises:
        SAEError: it is public, and is not to be.
    """
    repo_id = str(repo.hf_repo_id)
    info = patiently(lambda: api.model_info(repo_id))
    if repo.hf_private and not info.private:
        raise SAEError(
            f"--hf-private: {repo_id} exists and is public; make it private in its settings on the "
            "Hub, or leave the option out"
        )
    return info


def _check_namespace(account: dict[str, Any], repo_id: str) -> None:
    """Check that a repository may be created there."""
    owner = repo_id.partition("/")[0]
    writable = [account["name"]]
    writable += [o["name"] for o in account.get("orgs", []) if o.get("roleInOrg") != "read"]
    if same_name(owner) not in map(same_name, writable):
        raise SAEError(
            f"--hf-repo-id {repo_id}: the token may not create a repository under {owner}; it may "
            f"under {', '.join(writable)}"
        )
    _check_role(account, repo_id)


def _check_role(account: dict[str, Any], repo_id: str) -> None:
    token = account.get("auth", {}).get("accessToken", {})
    may_write = token.get("role") != "read"
    if token.get("role") == "fineGrained":
        places = (same_name(repo_id), same_name(repo_id.partition("/")[0]))
        may_write = any(
            same_name(scope.get("entity", {}).get("name", "")) in places
            and any(str(right).startswith("repo.write") for right in scope.get("permissions", ()))
            for scope in token.get("fineGrained", {}).get("scoped", ())
        )
    if not may_write:
        raise SAEError(
            f"upload to {repo_id}: the token may not write there; create one with the role `write` "
            "in your settings on the Hub, and give it to `hf auth login`"
        )
