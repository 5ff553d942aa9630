"""One process at a time for one piece of work.

The lock (`filelock`) is the kernel's, on a file next to the work, and ends with the process that
holds it, however it ends: a killed process leaves a file behind, which locks nobody out. Between
the nodes of a cluster it works where the shared file system passes locks on, as NFS does, and
Lustre if it is mounted with `flock`. Where it does not, and the file is of a process of another
machine, nobody can know whether that process lives: then the lock is refused, until the file is
deleted.
"""

import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from sae_core.utils.errors import PassingError, SAEError
from sae_core.utils.holders import Holder
from sae_core.utils.naming import LOCK_FILE
from sae_core.utils.ranks import is_follower

POLL = 0.5
"""Seconds between checks of a lock that another process holds."""

MOUNTS = Path("/proc/self/mountinfo")

OWN_LOCKS = ("fuse", "9p", "virtiofs")
"""Kinds of file systems that may be shared, but whose locks are not."""

OWN_LOCK_OPTIONS = {"localflock", "nolock", "local_lock=flock", "local_lock=all"}
"""Mount options of Lustre and NFS."""


def run_lock(checkpoints: Path) -> AbstractContextManager[None]:
    """Lock the training whose checkpoints are in a folder against other processes. Of several
    processes that share the training, the first has the lock.

    Raises:
        SAEError: another one is at it, or the folder does not take locks.
    """
    if is_follower():
        return nullcontext()
    return lock(checkpoints / LOCK_FILE, "is training this SAE")


@contextmanager
def lock(path: Path, work: str, wait: float = 0.0) -> Iterator[None]:
    """Keep out every other process that asks for this lock.

    Args:
        path: of the file that is locked, and deleted at the end.
        work: what its holder does, for the message.
        wait: seconds for which another holder is waited for.

    Raises:
        SAEError: another process holds it, or the folder does not take locks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = _acquired(path, wait)
    except Timeout as error:
        raise PassingError(
            f"{path.parent}: {_holder(path)} {work}; wait for it, or stop it"
        ) from error
    except OSError as error:
        raise SAEError(
            f"{path}: cannot be locked ({error.strerror}); choose another folder"
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        held.release()


def _acquired(path: Path, wait: float) -> BaseFileLock:
    """The lock, with a record of this process in its file."""
    # Where the kernel has no locks, filelock would take the file itself for one, which a killed
    # process leaves behind.
    held = FileLock(path, timeout=wait, poll_interval=POLL, fallback_to_soft=False)
    held.acquire()
    try:
        _check_earlier(path)
        path.write_text(Holder.here().text, encoding="utf-8")
    except BaseException:
        held.release()
        raise
    return held


def _check_earlier(path: Path) -> None:
    """Check, for a lock file that was left behind, that its holder cannot be running elsewhere.

    Raises:
        SAEError: it is of another machine, whose locks do not reach this one.
    """
    earlier = Holder.parse(path.read_text(encoding="utf-8"))
    here = Holder.here()
    if earlier is None or earlier.boot == here.boot:  # one kernel, which knows of all its locks
        return
    if earlier.state() == "unknown" and has_own_locks(path, MOUNTS.read_text(encoding="utf-8")):
        raise SAEError(
            f"{path}: {earlier} may still be running, and on this file system machines cannot see "
            "each other's locks; if it is not running, delete the file"
        )


def has_own_locks(path: Path, mounts: str) -> bool:
    """Whether each machine has separate locks on the file system of a file.

    Args:
        mounts: as Linux lists them in `MOUNTS`.
    """
    own = False
    place = ""
    for line in mounts.split("\n"):
        mount, _, system = line.partition(" - ")
        if len(fields := mount.split()) < 5 or not system:
            continue
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        if path.resolve().is_relative_to(point) and len(point) >= len(place):
            place, (kind, *rest) = point, system.split()
            options = set(",".join(rest[1:]).split(","))
            own = kind.startswith(OWN_LOCKS) or bool(options & OWN_LOCK_OPTIONS)
    return own


def _holder(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has only just begun
        return "another process"
