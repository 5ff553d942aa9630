"""The Hub's client as this project uses it: with a time limit, with patience where it helps, with
one line for every failure; and the check that it will let an upload in."""

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars, set_client_factory
from huggingface_hub.utils._http import default_client_factory

from sae_core.errors import SAEError, one_line
from sae_core.train_config import RepoConfig

T = TypeVar("T")

TIMEOUT = 30.0
"""Seconds without a byte after which a request has failed; the client itself waits for ever."""

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further try of a failed request, unless the Hub asks for more."""

MAX_WAIT = 60.0
"""Seconds that the Hub may ask for."""


def connect() -> HfApi:
    """The Hub's client, with a time limit on every request."""

    def client() -> httpx2.Client:
        made = default_client_factory()
        made.event_hooks["request"].append(_limit)
        return made

    set_client_factory(client)
    if not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi()


def _limit(request: httpx2.Request) -> None:
    """Set the time limits that the client left open; some of its calls open them explicitly."""
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        step: TIMEOUT if limits.get(step) is None else limits[step]
        for step in ("connect", "read", "write", "pool")
    }


def check_access(repo: RepoConfig) -> None:
    """Check that an upload to `repo` will be let in, without changing anything.

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
        if repo.hf_private and not patiently(lambda: api.repo_info(repo_id)).private:
            raise SAEError(
                f"--hf-private: {repo_id} exists and is public; make it private in its settings "
                "on the Hub, or leave the option out"
            )


def patiently(call: Callable[[], T]) -> T:
    """`call()`, tried again as long as its failure may pass."""
    for wait in WAITS:
        try:
            return call()
        except Exception as error:  # the client's failures have no common base class
            if not _may_pass(error):
                raise
            time.sleep(max(wait, _asked_to_wait(error)))
    return call()


def _check_namespace(account: dict[str, Any], repo_id: str) -> None:
    """Check that a repository may be made there."""
    owner = repo_id.partition("/")[0]
    writable = [account["name"]]
    writable += [o["name"] for o in account.get("orgs", []) if o.get("roleInOrg") != "read"]
    if owner not in writable:
        raise SAEError(
            f"--hf-repo-id {repo_id}: the token may not make a repository under {owner}; it may "
            f"under {', '.join(writable)}"
        )
    _check_role(account, repo_id)


def _check_role(account: dict[str, Any], repo_id: str) -> None:
    token = account.get("auth", {}).get("accessToken", {})
    may_write = token.get("role") != "read"
    if token.get("role") == "fineGrained":
        places = (repo_id, repo_id.partition("/")[0])
        may_write = any(
            scope.get("entity", {}).get("name") in places
            and any(str(right).startswith("repo.write") for right in scope.get("permissions", ()))
            for scope in token.get("fineGrained", {}).get("scoped", ())
        )
    if not may_write:
        raise SAEError(
            f"upload to {repo_id}: the token may not write there; make one with the role `write` "
            "in your settings on the Hub, and give it to `hf auth login`"
        )


def _status(error: Exception) -> int | None:
    """The HTTP status behind a failure; Xet's client has it in its message alone."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code
    found = re.search(r"HTTP status \w+ error \((\d{3})", str(error))
    return int(found[1]) if found else None


def _may_pass(error: Exception) -> bool:
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    # RuntimeError is how Xet's client says that it lost its connection.
    passing = (httpx2.TransportError, ConnectionError, RuntimeError)
    return isinstance(error, passing) and not isinstance(error, OfflineModeIsEnabled)


def _asked_to_wait(error: Exception) -> float:
    if isinstance(error, HfHubHTTPError):
        asked = error.response.headers.get("Retry-After", "")
        return min(float(asked), MAX_WAIT) if asked.isdigit() else 0.0
    return 0.0


@contextmanager
def named(what: str) -> Iterator[None]:
    """Turn a failure of the client into one line with the way out."""
    try:
        yield
    except SAEError:
        raise
    except Exception as error:  # the client's failures have no common base class
        advice = {
            401: "the token is not valid: run `hf auth login` or set HF_TOKEN anew, then run the "
            "same again",
            403: "the token has no right to do this: make one that may write there, then run the "
            "same again",
            404: "no such repository, or the token may not see it",
        }.get(_status(error), "nothing is lost; run the same again when the Hub can be reached")
        raise SAEError(f"{what}: {advice} ({one_line(error)})") from error
